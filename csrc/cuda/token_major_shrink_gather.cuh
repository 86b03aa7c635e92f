// What the kernels of token_major_shrink.cu are given, which rows are a block's, and what is copied
// into shared memory. Compiled for sm_90a alone.
#pragma once

#include "mma.cuh"
#include "token_major_block.cuh"

namespace flexmore::cuda {
namespace token_shrink_impl {

using namespace token_mix_impl;

constexpr int kConsumers = 3;  // warpgroups that compute, of 64 rows each
constexpr int kRows = kConsumers * 64;
constexpr int kColumns = 32;  // of a chunk
constexpr int kStages = 3;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kProduceRegisters = 32, kConsumeRegisters = 160;
static_assert(kProduceRegisters + kConsumers * kConsumeRegisters <=
              (kConsumers + 1) * (65536 / kThreads / 8 * 8));
constexpr int kCopying = 96;  // threads that copy G, U and dmixed: all but the factors' warp
constexpr int kMostRank = 64;
// Bytes of a row's columns of G, U or dmixed. Eight lanes take two rows, 16 bytes each: all banks.
constexpr int kPitch = kColumns * 2;

struct Shrink {
    const void *gate, *up, *dmixed;  // (T, F)
    const void *s, *q;
    const unsigned char* factors;  // as token_mix_pack_kernel leaves them
    const float* weights;
    const int32_t *row_offsets, *row_to_slot;
    void* ds;       // (T, s_width), zeros
    float* planes;  // with more than one: (planes, tiles, kConsumers, kMostRank, 128)
    int64_t width, s_width, q_width;
    int top_k, num_chunks, chunks_per_block, num_planes;
    int most_depth;  // that the factors are laid out for
    int count;       // of the experts that have columns of ds
    int expert[kMaxLowRank];
    Experts experts;
};

struct SharedShrink {
    alignas(128) unsigned char s[3 * kRows * kMostRank * 2];      // S_g, S_u, Q of `depth` columns
    alignas(128) unsigned char base[kStages][3][kRows * kPitch];  // G, U, dmixed
    alignas(128) unsigned char factor[kStages][3 * kColumns * kMostRank * 2];  // B_g, B_u, A_d^T
    int token[kRows];                                                          // -1 past the last
    float weight[kRows];
    Barrier base_full[kStages], base_empty[kStages], factor_full[kStages], factor_empty[kStages];
};
static_assert(sizeof(SharedShrink) <= 232448 - 1024);

// A block's rows: of an expert, from `begin`, `rows` of them; 0 if there is nothing to do.
struct Tile {
    int expert, begin, rows;
};

// Experts of the same tokens run side by side: tile t of most an expert's goes with those tiles of
// the others that begin in the same t-th part of their rows.
__device__ __forceinline__ Tile find_tile(const Shrink& m) {
    uint32_t tiles[kMaxLowRank], most = 0;  // fewer than 2^16 each
#pragma unroll
    for (int i = 0; i < kMaxLowRank; ++i) {
        const int e = i < m.count ? m.expert[i] : 0;
        const int rows = i < m.count ? m.row_offsets[e + 1] - m.row_offsets[e] : 0;
        tiles[i] = uint32_t(rows + kRows - 1) / kRows;
        most = max(most, tiles[i]);
    }
    const auto before = [&](int t, int i) { return int(uint32_t(t) * tiles[i] / most); };
    const auto all_before = [&](int t) {
        int sum = 0;
#pragma unroll
        for (int i = 0; i < kMaxLowRank; ++i) sum += before(t, i);
        return sum;
    };
    const int index = blockIdx.x;
    if (most == 0 || index >= all_before(int(most))) return {0, 0, 0};
    int low = 0, high = int(most);  // all_before(low) <= index < all_before(high)
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (all_before(middle) <= index ? low : high) = middle;
    }
    int left = index - all_before(low);
#pragma unroll
    for (int i = 0; i < kMaxLowRank; ++i) {
        const int at = before(low, i);
        if (before(low + 1, i) == at) continue;
        if (left-- > 0) continue;
        const int e = m.expert[i], begin = m.row_offsets[e] + at * kRows;
        return {e, begin, min(kRows, m.row_offsets[e + 1] - begin)};
    }
    return {0, 0, 0};
}

// What a block reads before its columns: its rows' tokens and weights, S_g, S_u and Q.
template <class T>
__device__ void gather(const Shrink& m, SharedShrink& sh, const Tile& tile) {
    const int thread = threadIdx.x;
    if (thread == 0) {
        for (int i = 0; i < kStages; ++i) {
            sh.base_full[i].init(kCopying);
            sh.factor_full[i].init(1);
            sh.base_empty[i].init(kConsumers * kWarpgroup);
            sh.factor_empty[i].init(kConsumers * kWarpgroup / 32);
        }
        fence_barrier_init();
    }
    if (thread < kRows) {
        const int slot = thread < tile.rows ? m.row_to_slot[tile.begin + thread] : -1;
        sh.token[thread] = slot < 0 ? -1 : slot / m.top_k;
        sh.weight[thread] = slot < 0 ? 0.0f : m.weights[slot];
    }
    __syncthreads();
    const Experts& x = m.experts;
    const int e = tile.expert, depth = x.depth[e], groups = depth / 8;
    for (int i = thread; i < 3 * kRows * groups; i += kThreads) {
        const int group = i % groups, row = i / groups % kRows, side = i / groups / kRows;
        const int at = side == 0 ? x.gate_at[e] : side == 1 ? x.up_at[e] : x.down_at[e];
        const int rank = side == 0 ? x.gate_rank[e] : side == 1 ? x.up_rank[e] : x.down_rank[e];
        const int64_t token = sh.token[row];
        uint4 words{};
        if (token >= 0 && 8 * group < rank) {
            words = *reinterpret_cast<const uint4*>(static_cast<const T*>(side == 2 ? m.q : m.s) +
                                                    token * (side == 2 ? m.q_width : m.s_width) +
                                                    at + 8 * group);
        }
        *reinterpret_cast<uint4*>(sh.s + side * (kRows * depth * 2) +
                                  operand_offset(row, group, depth)) = words;
    }
    fence_async_proxy();
    __syncthreads();
}

// One thread: the factors of every chunk.
__device__ __forceinline__ void copy_factors(const Shrink& m, SharedShrink& sh, int e, int begin,
                                             int end) {
    const int stride = 3 * kColumns * m.most_depth * 2;
    const int bytes = 3 * kColumns * m.experts.depth[e] * 2;
    const unsigned char* from =
        m.factors + (int64_t(m.experts.place[e]) * m.num_chunks + begin) * stride;
    Ring<kStages> ring;
    for (int chunk = begin; chunk < end; ++chunk, from += stride) {
        Barrier* full = &sh.factor_full[ring.slot];
        sh.factor_empty[ring.slot].wait(ring.parity ^ 1);
        full->arrive_expecting(bytes);
        copy_bulk(sh.factor[ring.slot], from, bytes, full);
        ring.next();
    }
}

// kCopying threads: every chunk of the rows of G, U and dmixed, four threads a row. L2 is asked for
// whole lines, of which the next chunks are.
__device__ __forceinline__ void copy_base(const Shrink& m, SharedShrink& sh, int thread, int begin,
                                          int end) {
    constexpr int kEach = kRows * 4 / kCopying;
    static_assert(kEach * kCopying == kRows * 4);
    const int first = thread / 4, group = thread % 4;
    // In 16 bytes: where a row begins, and which rows there are.
    uint32_t rows[kEach], valid = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
        const int token = sh.token[first + i * (kCopying / 4)];
        rows[i] = uint32_t(max(token, 0)) * uint32_t(m.width / 8) + group;
        valid |= uint32_t(token >= 0) << i;
    }
    const int groups = int(m.width / 8);
    const uint32_t to = shared_address(sh.base) + first * kPitch + group * 16;
    Ring<kStages> ring;
    for (int chunk = begin; chunk < end; ++chunk) {
        const int column = chunk * 4;
        const bool inside = column + group < groups;
        const uint32_t present = inside ? valid : 0, past = inside ? column : 0;
        const uint32_t slot = to + ring.slot * int(sizeof(sh.base[0]));
        sh.base_empty[ring.slot].wait(ring.parity ^ 1);
#pragma unroll
        for (int i = 0; i < kEach; ++i) {
            const auto copy = [&](int k, const void* source) {
                copy_async<16>(slot + (k * kRows + i * (kCopying / 4)) * kPitch,
                               static_cast<const uint4*>(source) + (rows[i] + past),
                               present >> i & 1);
            };
            copy(0, m.gate);
            copy(1, m.up);
            copy(2, m.dmixed);
        }
        arrive_after_copies(&sh.base_full[ring.slot]);
        ring.next();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace token_shrink_impl
}  // namespace flexmore::cuda
