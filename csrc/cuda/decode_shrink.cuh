// s = A_gate x, A_up x of the chosen experts, while the kernel that needs it at its end reads the
// base. A thread block has a tile of rows, its warps the columns, in turns; operands come straight
// from memory: the columns of a step are the lanes' in an order of their own, the same for both.
#pragma once

#include "decode.cuh"

namespace flexmore::cuda {
namespace decode {

template <int TP>
struct Shrink {
    static constexpr int kRows = 16;
    static constexpr int kParts = 8;  // of a sum, alike for any number of tokens
    // Few warps with many tokens: the next kernel's block has to fit beside.
    static constexpr int kWarps = TP == 64 ? 4 : 8;
    static constexpr int kBlockThreads = 32 * kWarps;
    static constexpr int kTokens = TP < 16 ? TP : 16;  // of a thread block
    static constexpr int kTiles = kTokens / 8;
    static constexpr int kAcross = TP / kTokens;      // thread blocks that share rows
    static constexpr int kAtOnce = TP <= 16 ? 4 : 2;  // steps, as registers leave room
};

template <class T, int TP>
__global__ void __launch_bounds__(Shrink<TP>::kBlockThreads, TP == 64 ? 8 : 3)
    decode_shrink_kernel(const __grid_constant__ Problem p) {
    using Parts = Shrink<TP>;
    constexpr int kRows = Parts::kRows, kBlockThreads = Parts::kBlockThreads;
    constexpr int kTiles = Parts::kTiles, kTokens = Parts::kTokens;
    struct FactorRows {
        const char* a;
        int first, end;
    };
    __shared__ FactorRows factors[2 * kMaxExperts];
    __shared__ float sums[Parts::kParts][kRows][kTokens];
    __shared__ unsigned shared_active;
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int first_row = int(blockIdx.x) / Parts::kAcross * kRows;
    const int first_token = int(blockIdx.x) % Parts::kAcross * kTokens;
    const int64_t row_bytes = int64_t(p.D) * sizeof(T);
    if (threadIdx.x < 2 * p.E) {
        const Pair& pair = p.pairs[threadIdx.x % 2][threadIdx.x / 2];
        factors[threadIdx.x] = {pair.a, pair.first, pair.first + pair.rank};
    }
    __syncthreads();
    const char* rows[2];
    int expert[2] = {-1, -1};
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        const int row = first_row + half * 8 + lane / 4;
        for (int i = 0; i < 2 * p.E; ++i) {
            const FactorRows factor = factors[i];
            if (row < factor.first || row >= factor.end) continue;
            rows[half] = factor.a + (row - factor.first) * row_bytes;
            expert[half] = i / 2;
        }
    }
    // Only now may the next kernel start: it counts on all before this one.
    wait_for_previous();
    launch_dependents();
    if (blockIdx.x == 0)
        for (int i = threadIdx.x; i < p.num_counters; i += kBlockThreads) p.counters[i] = 0;
    const unsigned active = Choices<kBlockThreads>(p).active(&shared_active);
    bool valid[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        valid[half] = expert[half] >= 0 && (active >> expert[half] & 1);
        if (!valid[half]) rows[half] = p.x;
    }
    if (!__syncthreads_or(valid[0] || valid[1])) return;
    // All of it into L2, before the next kernel has the memory busy.
    if (first_token == 0 && warp == 0 && lane % 4 < 2 && (lane % 4 ? valid[1] : valid[0]))
        prefetch_l2(lane % 4 ? rows[1] : rows[0], int(row_bytes));
    const char* tokens = p.x + (first_token + lane / 4) * row_bytes;
    constexpr int kAtOnce = Parts::kAtOnce, kStep = Parts::kParts * 32;
    for (int part = warp; part < Parts::kParts; part += Parts::kWarps) {
        float c[kTiles][4] = {};
        for (int begin = part * 32; begin < p.D; begin += kAtOnce * kStep) {
            uint4 a[kAtOnce][2], x[kAtOnce][kTiles];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const int column = begin + i * kStep + lane % 4 * 8;
                const auto load = [&](const char* row, bool inside) {
                    inside = inside && column < p.D;
                    const uint4 words =
                        *reinterpret_cast<const uint4*>(inside ? row + column * sizeof(T) : p.x);
                    return inside ? words : uint4{0, 0, 0, 0};
                };
#pragma unroll
                for (int half = 0; half < 2; ++half) a[i][half] = load(rows[half], valid[half]);
#pragma unroll
                for (int n = 0; n < kTiles; ++n)
                    x[i][n] =
                        load(tokens + n * 8 * row_bytes, first_token + n * 8 + lane / 4 < p.T);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                const uint4 upper = a[i][0], lower = a[i][1];
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    mma<T>(c[n], {upper.x, lower.x, upper.y, lower.y}, {x[i][n].x, x[i][n].y});
                    mma<T>(c[n], {upper.z, lower.z, upper.w, lower.w}, {x[i][n].z, x[i][n].w});
                }
            }
        }
#pragma unroll
        for (int n = 0; n < kTiles; ++n) {
#pragma unroll
            for (int half = 0; half < 2; ++half)
                *reinterpret_cast<float2*>(
                    &sums[part][half * 8 + lane / 4][n * 8 + lane % 4 * 2]) = {c[n][half * 2],
                                                                               c[n][half * 2 + 1]};
        }
    }
    __syncthreads();
    const int count = min(kRows, p.ranks_in - first_row);
    for (int i = threadIdx.x * 2; i < count * kTokens; i += kBlockThreads * 2) {
        float2 sum{0, 0};
#pragma unroll
        for (int j = 0; j < Parts::kParts; ++j) {
            const float2 one = *reinterpret_cast<const float2*>(&sums[j][0][0] + i);
            sum.x += one.x;
            sum.y += one.y;
        }
        const int64_t to = (first_row + i / kTokens) * TP + first_token + i % kTokens;
        *reinterpret_cast<uint32_t*>(p.s_in + to * sizeof(T)) = pack_pair<T>(sum.x, sum.y);
    }
}

}  // namespace decode
}  // namespace flexmore::cuda
