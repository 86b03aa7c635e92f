// The kernel of token_major_backward.cu: what a block does. Compiled for sm_90a alone.
#pragma once

#include "token_major_gather.cuh"

namespace flexmore::cuda {
namespace token_mix_impl {

struct MixBackward {
    const void *gate, *up, *dmixed, *s, *q, *factors;
    const float* weights;
    const int32_t *token_order, *expert_to_row, *row_to_slot;
    void *dgate, *dup;  // (T, F)
    float* dots;        // (planes, N)
    int64_t num_tokens, width, s_width, q_width, num_rows;
    int num_experts;
    int num_chunks, chunks_per_block;  // multiples of kExpanding
    Experts experts;
};

struct CutBackward {
    static constexpr int kColumns = 32, kExpanding = 3;
    static constexpr int kCopy = 32, kExpand = 160;  // registers
    static constexpr int kThreads = (kExpanding + 1) * kWarpgroup;
    static constexpr int kLaunchRegisters = 65536 / kThreads / 8 * 8;
};
static_assert(CutBackward::kCopy + CutBackward::kExpanding * CutBackward::kExpand <=
              (CutBackward::kExpanding + 1) * CutBackward::kLaunchRegisters);

template <int Rank>
struct SharedBackward {
    static constexpr int kRank = Rank, kColumns = CutBackward::kColumns;
    static constexpr int kExpanding = CutBackward::kExpanding;
    static constexpr int kStages = 2 * kExpanding;
    static constexpr int kFactor = kColumns * Rank * 2;
    alignas(128) unsigned char s[kMaxLowRank][3][kTokens * Rank * 2];  // S_g, S_u, Q
    alignas(128) unsigned char stage[kStages][3 * kFactor];            // B_g, B_u, A_d^T
    float weight[kMaxLowRank][kTokens];
    float base_weight[kTokens];
    int token[kTokens];
    int chosen[kTokens];
    // Of each expanding warpgroup: <dh, h> of every present expert, and last that of the base's.
    float dots[kExpanding][kMaxLowRank + 1][kTokens];
    int present[kMaxLowRank], depth[kMaxLowRank], num_present, set;
    Barrier stage_full[kStages], stage_empty[kStages];
};

template <class T, int Rank>
__device__ void gather(const MixBackward& m, SharedBackward<Rank>& sh) {
    const int thread = threadIdx.x;
    if (thread == 0) {
        sh.set = 0;
        for (int i = 0; i < sh.kStages; ++i) {
            sh.stage_full[i].init(1);
            sh.stage_empty[i].init(kWarpgroup / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    find_experts(m, sh);
    float* dots = &sh.dots[0][0][0];
    for (int i = thread; i < int(sizeof(sh.dots) / sizeof(float)); i += CutBackward::kThreads)
        dots[i] = 0;
    __syncthreads();
    constexpr int kGroups = Rank / 8;  // of 8 elements, 16 bytes
    for (int i = thread; i < sh.num_present * 3 * kTokens * kGroups; i += CutBackward::kThreads) {
        const int group = i % kGroups, row = i / kGroups % kTokens;
        const int side = i / kGroups / kTokens % 3, which = i / kGroups / kTokens / 3;
        const int e = sh.present[which];
        const Experts& x = m.experts;
        const int at = side == 0 ? x.gate_at[e] : side == 1 ? x.up_at[e] : x.down_at[e];
        const int rank = side == 0 ? x.gate_rank[e] : side == 1 ? x.up_rank[e] : x.down_rank[e];
        const bool is_q = side == 2;
        gather_words<T>(sh, sh.s[which][side], is_q ? m.q : m.s, is_q ? m.q_width : m.s_width, at,
                        rank, row, group);
    }
    fence_async_proxy();
    __syncthreads();
}

// Begins g += s b^T, u and dh, each over Depth summed columns.
template <class T, int Depth, int Size>
__device__ __forceinline__ void three_products(float (&g)[Size], float (&u)[Size],
                                               float (&dh)[Size], uint64_t s, uint64_t b,
                                               uint64_t next_s, uint64_t next_b) {
    products_begin();
    product<T, true, Depth>(g, s, b);
    products_commit();
    product<T, true, Depth>(u, s + next_s, b + next_b);
    products_commit();
    product<T, true, Depth>(dh, s + 2 * next_s, b + 2 * next_b);
    products_commit();
}

// Of eight neighbouring columns of one of a thread's two rows, from values in a product's order.
template <class T, int Size>
__device__ __forceinline__ uint4 eight_of(const float (&v)[Size], int row) {
    const float* of = v + 2 * row;
    return {pack<T>(of[0], of[1]), pack<T>(of[4], of[5]), pack<T>(of[8], of[9]),
            pack<T>(of[12], of[13])};
}

// sum += a b where the mask is set: what others have in a and b, Inf and NaN too, stays out.
__device__ __forceinline__ void add_where(uint32_t mask, float& sum, float a, float b) {
    asm("{\n"
        ".reg .pred set;\n"
        "setp.ne.u32 set, %1, 0;\n"
        "@set fma.rn.f32 %0, %2, %3, %0;\n"
        "}"
        : "+f"(sum)
        : "r"(mask), "f"(a), "f"(b));
}

// The gradients of a thread's elements, from g, u and dh, and <dh, h> of its two rows, are added to
// dgate (twice if kDoubled), dup and dot, the gradients times p and where the row's mask is set.
template <class T, int Size>
__device__ __forceinline__ void add_through(const float (&g)[Size], const float (&u)[Size],
                                            const float (&dh)[Size], const float (&p)[2],
                                            const uint32_t (&mask)[2], float (&dgate)[Size],
                                            float (&dup)[Size], float (&dot)[2]) {
#pragma unroll
    for (int j = 0; j < Size; ++j) {
        const int row = j / 2 % 2;
        const float weighted = p[row] * dh[j];
        float silu, slope;
        silu_and_slope<T>(0.5f * g[j], silu, slope);
        dot[row] = fmaf(dh[j], silu * u[j], dot[row]);
        add_where(mask[row], dgate[j], weighted * u[j], kDoubled<T> ? slope + 1 : slope);
        add_where(mask[row], dup[j], weighted, silu);
    }
}

// Warpgroup `which` of those that expand: every kExpanding-th chunk, beginning with this one.
template <class T, int Rank>
__device__ void expand(const MixBackward& m, SharedBackward<Rank>& sh, int begin, int end,
                       int which) {
    using Sh = SharedBackward<Rank>;
    constexpr int kColumns = Sh::kColumns, kWords = kColumns / 8, kOwn = kColumns / 2;
    constexpr int kFactor = Sh::kFactor, kExpanding = Sh::kExpanding;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
    const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    const int present = uniform(sh.num_present), column = lane % 4 * (kColumns / 4);
    const int width = int(m.width);
    const int depths = depths_of(sh);
    uint32_t first[2];  // where a row begins, in eights of elements
#pragma unroll
    for (int i = 0; i < 2; ++i)
        first[i] = uint32_t(max(sh.token[rows[i]], 0)) * uint32_t(m.width / 8) + lane % 4;
    const void* sources[3] = {m.gate, m.up, m.dmixed};
    // Of G, U and dmixed: as they are read, two elements a register; 0 past the width.
    uint32_t base[3][2][kWords] = {};
    const auto load = [&](int chunk) {
        const bool inside = chunk < end && chunk * kColumns + column < width;
#pragma unroll
        for (int from = 0; from < 3; ++from)
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                if (inside) {
                    load_row(base[from][i], sources[from],
                             8 * int64_t(first[i] + chunk * (kColumns / 8)));
                } else {
#pragma unroll
                    for (uint32_t& word : base[from][i]) word = 0;
                }
            }
    };
    const auto start = [&](float (&v)[kOwn], int from) {
#pragma unroll
        for (int j = 0; j < kOwn; j += 2) {
            const float2 two = unpack<T>(base[from][j / 2 % 2][j / 4]);
            v[j] = two.x, v[j + 1] = two.y;
        }
        settle(v);
    };
    load(begin + which);
    const uint32_t stages = shared_address(sh.stage);
    const uint64_t operands_s = operand(shared_address(sh.s), Rank);
    constexpr uint64_t kNextS = kTokens * Rank * 2 / 16;
    Ring<Sh::kStages, kExpanding> ring{which};
    const int chosen[2] = {sh.chosen[rows[0]], sh.chosen[rows[1]]};
    // The four lanes of a row, in a fixed order; each row of a warpgroup has one writer.
    const auto add_dot = [&](int place, float (&dot)[2]) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            dot[i] += __shfl_xor_sync(kFullWarp, dot[i], 1);
            dot[i] += __shfl_xor_sync(kFullWarp, dot[i], 2);
            if (lane % 4 == 0) sh.dots[which][place][rows[i]] += dot[i];
        }
    };
    for (int chunk = begin + which; chunk < end; chunk += kExpanding) {
        float dgate[kOwn] = {}, dup[kOwn] = {};
        for (int e = 0; e < present; ++e) {
            float g[kOwn], u[kOwn], dh[kOwn], dot[2] = {};
            start(g, 0);
            start(u, 1);
            start(dh, 2);
            const int depth = depth_of(depths, e);
            sh.stage_full[ring.slot].wait(ring.parity);
            const uint64_t b = operand(stages + ring.slot * (3 * kFactor), depth);
            const uint64_t s = operands_s + e * (3 * kNextS);
            const uint64_t next_b = kFactor / Rank * depth / 16;
            // Apart, since a branch among products costs a fence.
            if (depth == Rank) {
                three_products<T, Rank>(g, u, dh, s, b, kNextS, next_b);
            } else if (Rank == 64 && depth == 32) {
                three_products<T, 32>(g, u, dh, s, b, kNextS, next_b);
            } else {
                three_products<T, 16>(g, u, dh, s, b, kNextS, next_b);
            }
            const float p[2] = {sh.weight[e][rows[0]], sh.weight[e][rows[1]]};
            const uint32_t mask[2] = {chosen[0] >> e & 1 ? ~0u : 0u, chosen[1] >> e & 1 ? ~0u : 0u};
            products_wait<0>(g);
            settle(u);
            settle(dh);
            if (lane == 0) sh.stage_empty[ring.slot].arrive();
            ring.next();
            add_through<T>(g, u, dh, p, mask, dgate, dup, dot);
            add_dot(e, dot);
        }
        {  // the base's own, last: the next chunk is on its way meanwhile
            float g[kOwn], u[kOwn], dh[kOwn], dot[2] = {};
            start(g, 0);
            start(u, 1);
            start(dh, 2);
            load(chunk + kExpanding);
            const float p[2] = {sh.base_weight[rows[0]], sh.base_weight[rows[1]]};
            const uint32_t mask[2] = {chosen[0] < 0 ? ~0u : 0u, chosen[1] < 0 ? ~0u : 0u};
            add_through<T>(g, u, dh, p, mask, dgate, dup, dot);
            add_dot(kMaxLowRank, dot);
        }
#pragma unroll
        for (float& twice : dgate) twice *= kSingle<T>;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (sh.token[rows[i]] < 0 || chunk * kColumns + column >= width) continue;
            const uint32_t at = first[i] + chunk * (kColumns / 8);
            static_cast<uint4*>(m.dgate)[at] = eight_of<T>(dgate, i);
            static_cast<uint4*>(m.dup)[at] = eight_of<T>(dup, i);
        }
    }
}

// The block's part of dp of its tokens' rows.
template <class Shared>
__device__ void store_dots(const MixBackward& m, const Shared& sh) {
    float* plane = m.dots + int64_t(blockIdx.y) * m.num_rows;
    for (int i = threadIdx.x; i < kTokens * m.num_experts; i += CutBackward::kThreads) {
        const int e = i / kTokens, at = i % kTokens, token = sh.token[at];
        const int row = token < 0 ? -1 : m.expert_to_row[int64_t(token) * m.num_experts + e];
        if (row < 0) continue;
        int place = kMaxLowRank;
        for (int j = 0; j < sh.num_present; ++j)
            if (sh.present[j] == e) place = j;
        float sum = 0;
        for (int w = 0; w < Shared::kExpanding; ++w) sum += sh.dots[w][place][at];
        plane[row] = sum;
    }
}

template <class T, int Rank>
__global__ void __launch_bounds__(CutBackward::kThreads, 1)
    token_mix_backward_kernel(const __grid_constant__ MixBackward m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) unsigned char raw[];
    using Sh = SharedBackward<Rank>;
    Sh& sh = *reinterpret_cast<Sh*>(raw);
    gather<T>(m, sh);
    const int begin = blockIdx.y * m.chunks_per_block;
    const int end = min(begin + m.chunks_per_block, m.num_chunks);
    const int role = uniform(threadIdx.x / kWarpgroup);
    if (role == 0) {
        fewer_registers<CutBackward::kCopy>();
        if (threadIdx.x == 0) copy_factors(m, sh, begin, end);
    } else {
        more_registers<CutBackward::kExpand>();
        expand<T>(m, sh, begin, end, role - 1);
    }
    __syncthreads();
    store_dots(m, sh);
#endif
}

}  // namespace token_mix_impl
}  // namespace flexmore::cuda
