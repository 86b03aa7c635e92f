// What the kernels of token_major_factors.cu are given, what is gathered once for all columns, and
// the warpgroup that copies. Compiled for sm_90a alone.
#pragma once

#include "mma.cuh"
#include "token_major_block.cuh"
#include "token_major_pack.cuh"

namespace flexmore::cuda {
namespace factor_grads_impl {

using namespace token_mix_impl;

constexpr int kRows = 32;      // of a step: tokens of the expert
constexpr int kConsumers = 2;  // warpgroups that compute, of 64 columns each
constexpr int kColumns = kConsumers * 64;
constexpr int kStages = 4;
constexpr int kThreads = (kConsumers + 1) * kWarpgroup;
constexpr int kProduceRegisters = 40, kConsumeRegisters = 232;
static_assert(kProduceRegisters + kConsumers * kConsumeRegisters <= 3 * (65536 / kThreads / 8 * 8));
// Of a token's columns of G, U or dmixed: a multiple of 16 bytes that is odd, so that the eight
// rows of a block of 8 x 8 lie in different banks.
constexpr int kPitch = kColumns * 2 + 16;
constexpr int kMostRank = 64;

// Of a step: S_g, S_u and p Q as operands of `depth` columns, one after the other, then p.
__host__ __device__ constexpr int operands_bytes(int depth) { return 3 * kRows * depth * 2; }
__host__ __device__ constexpr int tile_bytes(int depth) {
    return operands_bytes(depth) + kRows * 4;
}

// Bits of FactorGrads::wanted.
constexpr int kWantGate = 1, kWantUp = 2, kWantDown = 4;

struct FactorGrads {
    const void *gate, *up, *dmixed;  // (T, F)
    const void *s, *q;
    const float* weights;
    const int32_t *row_offsets, *row_to_slot;
    unsigned char* tiles;  // of every step of the wanted experts, in order
    int* tokens;           // of every row of these; -1 past an expert's last
    void* grads[3];        // dB_g, dB_u (F, R), dA_d (R, F)
    int64_t grad_width[3];
    float* planes;  // with more than one part: (parts, items, 2, 3, depth / 2, 128)
    int64_t width, s_width, q_width;
    int top_k, num_chunks, parts, tile_stride;
    int count;  // of the wanted experts
    int expert[kMaxLowRank], wanted[kMaxLowRank], grad_at[kMaxLowRank][3];
    Experts experts;
    Factors factors;
};

__host__ __device__ inline int steps_of(int rows) { return (rows + kRows - 1) / kRows; }

// The first step of a wanted expert among all wanted ones'.
__device__ __forceinline__ int first_step(const FactorGrads& m, int which) {
    int first = 0;
    for (int i = 0; i < which; ++i) {
        const int e = m.expert[i];
        first += steps_of(m.row_offsets[e + 1] - m.row_offsets[e]);
    }
    return first;
}

// Gathers what is the same for all columns, once: of every step its operands, weights and tokens.
template <class T>
__global__ void __launch_bounds__(256)
    factor_grads_gather_kernel(const __grid_constant__ FactorGrads m) {
    int which = 0, step = blockIdx.x;
    for (; which < m.count; ++which) {
        const int e = m.expert[which];
        const int steps = steps_of(m.row_offsets[e + 1] - m.row_offsets[e]);
        if (step < steps) break;
        step -= steps;
    }
    if (which == m.count) return;
    const int e = m.expert[which], thread = threadIdx.x, depth = m.experts.depth[e];
    const int begin = m.row_offsets[e] + step * kRows;
    const int rows = min(kRows, m.row_offsets[e + 1] - begin);
    unsigned char* tile = m.tiles + int64_t(blockIdx.x) * m.tile_stride;
    if (thread < kRows) {
        const int slot = thread < rows ? m.row_to_slot[begin + thread] : -1;
        m.tokens[int64_t(blockIdx.x) * kRows + thread] = slot < 0 ? -1 : slot / m.top_k;
        reinterpret_cast<float*>(tile + operands_bytes(depth))[thread] =
            slot < 0 ? 0.0f : m.weights[slot];
    }
    const int groups = depth / 8;
    const Experts& x = m.experts;
    for (int i = thread; i < 3 * kRows * groups; i += blockDim.x) {
        const int group = i % groups, row = i / groups % kRows, side = i / groups / kRows;
        const int at = side == 0 ? x.gate_at[e] : side == 1 ? x.up_at[e] : x.down_at[e];
        const int rank = side == 0 ? x.gate_rank[e] : side == 1 ? x.up_rank[e] : x.down_rank[e];
        union {
            uint32_t pairs[4];
            uint4 words;
        } eight{};
        if (row < rows && 8 * group < rank) {
            const int slot = m.row_to_slot[begin + row];
            const int64_t token = slot / m.top_k;
            const auto* from = static_cast<const T*>(side == 2 ? m.q : m.s) +
                               token * (side == 2 ? m.q_width : m.s_width) + at + 8 * group;
            eight.words = *reinterpret_cast<const uint4*>(from);
            if (side == 2) {
                const float p = m.weights[slot];
#pragma unroll
                for (uint32_t& pair : eight.pairs) {
                    const float2 two = unpack<T>(pair);
                    pair = pack<T>(p * two.x, p * two.y);
                }
            }
        }
        *reinterpret_cast<uint4*>(tile + side * (kRows * depth * 2) +
                                  operand_offset(row, group, depth)) = eight.words;
    }
}

struct SharedFactors {
    alignas(128) unsigned char factor[kConsumers][64 * kMostRank * 2];  // A_d^T of 64 columns
    alignas(128) unsigned char base[kStages][3][kRows * kPitch];        // G, U, dmixed
    alignas(128) unsigned char tile[kStages][tile_bytes(kMostRank)];
    Barrier full[kStages], empty[kStages];
};
static_assert(sizeof(SharedFactors) <= 232448 - 1024);

// A block's work: an expert, a chunk of columns, some of its steps.
struct Item {
    int which, chunk, part, begin, end;
};
__device__ __forceinline__ Item find_item(const FactorGrads& m) {
    Item item;
    const int index = blockIdx.x;
    item.which = index % m.count;  // experts of the same columns run side by side
    item.chunk = index / m.count % m.num_chunks;
    item.part = index / m.count / m.num_chunks;
    const int e = m.expert[item.which];
    const int steps = steps_of(m.row_offsets[e + 1] - m.row_offsets[e]);
    const int first = first_step(m, item.which);
    item.begin = first + int(int64_t(steps) * item.part / m.parts);
    item.end = first + int(int64_t(steps) * (item.part + 1) / m.parts);
    return item;
}

// A warpgroup: rows of G, U and dmixed, 16 threads a row, four rows a thread.
__device__ void produce(const FactorGrads& m, SharedFactors& sh, const Item& item) {
    const int thread = threadIdx.x % kWarpgroup, row = thread / 16 * 4, group = thread % 16;
    const int column = item.chunk * kColumns + group * 8;
    const bool inside = column < m.width;
    const void* sources[3] = {m.gate, m.up, m.dmixed};
    const int bytes = tile_bytes(m.experts.depth[m.expert[item.which]]);
    const auto tokens_of = [&](int step) {
        return *reinterpret_cast<const int4*>(m.tokens + int64_t(step) * kRows + row);
    };
    Ring<kStages> ring;
    int4 next = item.begin < item.end ? tokens_of(item.begin) : int4{};
    for (int step = item.begin; step < item.end; ++step) {
        const int tokens[4] = {next.x, next.y, next.z, next.w};
        if (step + 1 < item.end) next = tokens_of(step + 1);
        sh.empty[ring.slot].wait(ring.parity ^ 1);
        Barrier* full = &sh.full[ring.slot];
        if (thread == 0) {
            full->arrive_expecting(bytes);
            copy_bulk(sh.tile[ring.slot], m.tiles + int64_t(step) * m.tile_stride, bytes, full);
        }
        const uint32_t to = shared_address(sh.base[ring.slot]) + row * kPitch + group * 16;
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const bool valid = inside && tokens[i] >= 0;
            const int64_t from = valid ? int64_t(tokens[i]) * m.width + column : 0;
#pragma unroll
            for (int k = 0; k < 3; ++k) {
                copy_async<16, false>(to + (k * kRows + i) * kPitch,
                                      static_cast<const uint16_t*>(sources[k]) + from, valid);
            }
        }
        arrive_after_copies(full);
        ring.next();
    }
    asm volatile("cp.async.wait_all;" ::: "memory");
}

}  // namespace factor_grads_impl
}  // namespace flexmore::cuda
