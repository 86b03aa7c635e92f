// The kernel of token_major.cu: what a block does. Compiled for sm_90a alone.
#pragma once

#include "token_major_gather.cuh"

namespace flexmore::cuda {
namespace token_mix_impl {

template <int Size, int Of>
using First = float[Size < Of ? Size : Of];
template <int Size, int Of>
__device__ __forceinline__ First<Size, Of>& first_of(float (&d)[Of]) {
    return reinterpret_cast<First<Size, Of>&>(d);
}

// Begins g = s b^T and u, each over Depth summed columns.
template <class T, int Depth, int Size>
__device__ __forceinline__ void two_products(float (&g)[Size], float (&u)[Size], uint64_t s,
                                             uint64_t b, uint64_t s_up, uint64_t b_up) {
    products_begin();
    product<T, false, Depth>(g, s, b);
    products_commit();
    product<T, false, Depth>(u, s_up, b_up);
    products_commit();
}
// Begins sums += h a^T of so many ranks.
template <class T, int Columns, int Size>
__device__ __forceinline__ void one_product(float (&sums)[Size], uint64_t h, uint64_t a) {
    products_begin();
    product<T, true, Columns>(sums, h, a);
    products_commit();
}

// Warpgroup `which` of those that expand: every kExpanding-th chunk, beginning with this one.
template <class T, int Rank, bool Rows>
__device__ void expand(const Mix& m, Shared<Rank, Rows>& sh, int begin, int end, int which) {
    using Sh = Shared<Rank, Rows>;
    constexpr int kColumns = Sh::kColumns, kWords = kColumns / 8;
    constexpr int kFactor = Sh::kFactor, kExpanding = Sh::kExpanding, kAhead = Sh::Cut::kAhead;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
    const int rows[2] = {warp * 16 + lane / 4, warp * 16 + lane / 4 + 8};
    // Where this lane's row of the blocks that stmatrix stores lies in an h tile.
    const int stored = operand_offset(warp * 16 + lane / 8 % 2 * 8 + lane % 8, lane / 16, kColumns);
    const int present = uniform(sh.num_present), column = lane % 4 * (kColumns / 4);
    const int depths = depths_of(sh);
    int64_t first[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) first[i] = max(sh.token[rows[i]], 0) * m.width;
    uint32_t next_gate[2][kWords], next_up[2][kWords];
    const auto load = [&](int chunk) {
        // Past the width, a place that exists: not used.
        const int at = chunk * kColumns + column, place = at < m.width ? at : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_row(next_gate[i], m.gate, first[i] + place);
            load_row(next_up[i], m.up, first[i] + place);
        }
    };
    load(begin + which);
    // The n-th row from outside of both tokens; where there is none, what `add_rows` does not use.
    const auto load_rows = [&](uint32_t (&to)[2][kWords], int n, int chunk) {
        const int at = chunk * kColumns + column, place = at < m.width ? at : 0;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int row = sh.row[n][rows[i]];
            const int64_t element = row < 0 ? first[i] : row * m.width;
            load_row(to[i], row < 0 ? m.gate : m.rows, element + place);
        }
    };
    const auto add_rows = [&](float (&mixed)[kColumns / 2], const uint32_t (&from)[2][kWords],
                              int n) {
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t mask = sh.row[n][rows[i]] < 0 ? 0u : ~0u;
            const float p = sh.row_weight[n][rows[i]];
#pragma unroll
            for (int j = 0; j < kWords; ++j) {
                const float2 h = unpack<T>(from[i][j] & mask);
                const int at = 4 * j + 2 * i;
                mixed[at] = fmaf(p, h.x, mixed[at]);
                mixed[at + 1] = fmaf(p, h.y, mixed[at + 1]);
            }
        }
    };
    const int num_rows = Rows ? uniform(sh.num_rows) : 0;
    const uint32_t stages = shared_address(sh.stage), hiddens = shared_address(sh.hidden) + stored;
    const uint64_t operands_s = operand(shared_address(sh.s), Rank);
    Ring<Sh::kStages, kExpanding> ring{which};
    Ring<Sh::kHidden, kExpanding> hidden{which};
    const int chosen[2] = {sh.chosen[rows[0]], sh.chosen[rows[1]]};
    // Experts that all of the warp's tokens chose.
    const int whole = __reduce_and_sync(kFullWarp, chosen[0] & chosen[1]);
    for (int chunk = begin + which; chunk < end; chunk += kExpanding) {
        float half_gate[kColumns / 2], up[kColumns / 2], mixed[kColumns / 2];
        const bool inside = chunk * kColumns + column < m.width;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t mask = chosen[i] < 0 ? ~0u : 0u;
            const float p = sh.base_weight[rows[i]];
#pragma unroll
            for (int j = 0; j < kWords; ++j) {
                const float2 g = unpack<T>(inside ? next_gate[i][j] : 0);
                const float2 u = unpack<T>(inside ? next_up[i][j] : 0);
                const int at = 4 * j + 2 * i;
                half_gate[at] = 0.5f * g.x, half_gate[at + 1] = 0.5f * g.y;
                up[at] = u.x, up[at + 1] = u.y;
                mixed[at] = p * selected(silu_of_half(half_gate[at]) * up[at], mask);
                mixed[at + 1] = p * selected(silu_of_half(half_gate[at + 1]) * up[at + 1], mask);
            }
        }
        load(min(chunk + kExpanding, end - 1));
        uint32_t outside[Rows ? kAhead : 1][2][kWords];
        if constexpr (Rows) {
#pragma unroll
            for (int n = 0; n < kAhead; ++n) load_rows(outside[n], n, chunk);
        }
        for (int e = 0; e < present; ++e) {
            float g[kColumns / 2], u[kColumns / 2];
            const int depth = depth_of(depths, e);
            sh.stage_full[ring.slot].wait(ring.parity);
            const uint64_t b = operand(stages + ring.slot * (3 * kFactor), depth);
            const uint64_t s = operands_s + e * (2 * kTokens * Rank * 2 / 16);
            const uint64_t s_up = s + kTokens * Rank * 2 / 16,
                           b_up = b + kFactor / Rank * depth / 16;
            // Apart, since a branch among products costs a fence.
            if (depth == Rank) {
                two_products<T, Rank>(g, u, s, b, s_up, b_up);
            } else if (Rank == 64 && depth == 32) {
                two_products<T, 32>(g, u, s, b, s_up, b_up);
            } else {
                two_products<T, 16>(g, u, s, b, s_up, b_up);
            }
            const float p[2] = {sh.weight[e][rows[0]], sh.weight[e][rows[1]]};
            sh.hidden_empty[hidden.slot].wait(hidden.parity ^ 1);
            products_wait<1>(g);
#pragma unroll
            for (int j = 0; j < kColumns / 2; ++j) {
                g[j] = silu_of_half(fmaf(0.5f, g[j], half_gate[j]));
            }
            settle(g);
            products_wait<0>(u);
            if (lane == 0) sh.stage_empty[ring.slot].arrive();
            ring.next();
#pragma unroll
            for (int j = 0; j < kColumns / 2; ++j) g[j] *= u[j] + up[j];
            if (!(whole >> e & 1)) {
                const uint32_t mask[2] = {chosen[0] >> e & 1 ? ~0u : 0u,
                                          chosen[1] >> e & 1 ? ~0u : 0u};
#pragma unroll
                for (int j = 0; j < kColumns / 2; ++j) g[j] = selected(g[j], mask[j / 2 % 2]);
            }
            const uint32_t h_tile = hiddens + hidden.slot * (kTokens * kColumns * 2);
#pragma unroll
            for (int j = 0; j < kColumns / 2; ++j) {
                mixed[j] = fmaf(p[j / 2 % 2], g[j], mixed[j]);
            }
#pragma unroll
            for (int j = 0; j < kColumns / 2; j += 8) {
                store_blocks(h_tile + j / 4 * 128, pack<T>(g[j], g[j + 1]),
                             pack<T>(g[j + 2], g[j + 3]), pack<T>(g[j + 4], g[j + 5]),
                             pack<T>(g[j + 6], g[j + 7]));
            }
            fence_async_proxy();
            sh.hidden_full[hidden.slot].arrive();
            hidden.next();
        }
        if constexpr (Rows) {
#pragma unroll
            for (int n = 0; n < kAhead; ++n) add_rows(mixed, outside[n], n);
            for (int n = kAhead; n < num_rows; ++n) {
                load_rows(outside[0], n, chunk);
                add_rows(mixed, outside[0], n);
            }
        }
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            if (sh.token[rows[i]] < 0 || !inside) continue;
            uint4* out = reinterpret_cast<uint4*>(static_cast<uint16_t*>(m.mixed) + first[i] +
                                                  chunk * kColumns + column);
#pragma unroll
            for (int part = 0; part < kWords / 4; ++part) {
                const float* v = mixed + 16 * part + 2 * i;
                out[part] = {pack<T>(v[0], v[1]), pack<T>(v[4], v[5]), pack<T>(v[8], v[9]),
                             pack<T>(v[12], v[13])};
            }
        }
    }
}

template <class T, int Rank, bool Rows>
__device__ void shrink(const Mix& m, Shared<Rank, Rows>& sh, int begin, int end) {
    using Sh = Shared<Rank, Rows>;
    constexpr int kColumns = Sh::kColumns, kFactor = Sh::kFactor, kExpanding = Sh::kExpanding;
    constexpr int kMost = kMostLowRank<Rows>;
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
    const int present = uniform(sh.num_present);
    const uint64_t h_tiles = operand(shared_address(sh.hidden), kColumns);
    const int depths = depths_of(sh);
    const uint64_t factors = operand(shared_address(sh.stage), kColumns);
    float sums[kMost][Rank / 2] = {};
    Ring<Sh::kStages> ring;
    Ring<Sh::kHidden> hidden;
    for (int chunk = begin; chunk < end; chunk += kExpanding) {
#pragma unroll
        for (int e = 0; e < kMost; ++e) {
            if (e >= present) continue;
            const int depth = depth_of(depths, e);
#pragma unroll 1
            for (int w = 0; w < kExpanding; ++w) {
                sh.stage_full[ring.slot].wait(ring.parity);
                sh.hidden_full[hidden.slot].wait(hidden.parity);
                const uint64_t h = h_tiles + hidden.slot * (kTokens * kColumns * 2 / 16);
                const uint64_t a =
                    factors + (ring.slot * (3 * kFactor) + 2 * (kFactor / Rank) * depth) / 16;
                if (depth == Rank) {
                    one_product<T, kColumns>(sums[e], h, a);
                } else if (Rank == 64 && depth == 32) {
                    one_product<T, kColumns>(first_of<16>(sums[e]), h, a);
                } else {
                    one_product<T, kColumns>(first_of<8>(sums[e]), h, a);
                }
                products_wait<0>(sums[e]);
                if (lane == 0) {
                    sh.stage_empty[ring.slot].arrive();
                    sh.hidden_empty[hidden.slot].arrive();
                }
                ring.next();
                hidden.next();
            }
        }
    }
    float* plane = m.s_down + int64_t(blockIdx.y) * m.num_tokens * m.down_width;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = warp * 16 + lane / 4 + 8 * i, token = sh.token[row];
        if (token < 0) continue;
        float* out = plane + token * m.down_width;
#pragma unroll
        for (int e = 0; e < kMost; ++e) {
            if (e >= present) continue;
            const int at = m.experts.down_at[sh.present[e]];
            const int rank = m.experts.down_rank[sh.present[e]];
            const float p = sh.weight[e][row];
            const uint32_t mask = sh.chosen[row] >> e & 1 ? ~0u : 0u;
#pragma unroll
            for (int j = 0; j < Rank / 8; ++j) {
                const int column = 8 * j + lane % 4 * 2;
                const float* sum = &sums[e][4 * j + 2 * i];
                if (column < rank) {
                    *reinterpret_cast<float2*>(out + at + column) = {selected(p * sum[0], mask),
                                                                     selected(p * sum[1], mask)};
                }
            }
        }
        for (int e = 0; e < m.num_experts; ++e) {
            if (m.experts.place[e] < 0 || (sh.set >> e & 1)) continue;
            for (int column = lane % 4 * 2; column < m.experts.down_rank[e]; column += 8) {
                *reinterpret_cast<float2*>(out + m.experts.down_at[e] + column) = {0, 0};
            }
        }
    }
}

template <class T, int Rank, bool Rows>
__global__ void __launch_bounds__(kThreads<Rank>, 1)
    token_mix_kernel(const __grid_constant__ Mix m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) unsigned char raw[];
    using Sh = Shared<Rank, Rows>;
    using Cut = typename Sh::Cut;
    Sh& sh = *reinterpret_cast<Sh*>(raw);
    gather<T>(m, sh);
    const int begin = blockIdx.y * m.chunks_per_block;
    const int end = min(begin + m.chunks_per_block, m.num_chunks);
    const int role = uniform(threadIdx.x / kWarpgroup);
    if (role == 0) {
        fewer_registers<kCopyRegisters>();
        if (threadIdx.x == 0) copy_factors(m, sh, begin, end);
    } else if (role <= Cut::kExpanding) {
        more_registers<Cut::kExpand>();
        expand<T>(m, sh, begin, end, role - 1);
    } else {
        if constexpr (Cut::kShrink > kLaunchRegisters<Rank>) {
            more_registers<Cut::kShrink>();
        } else {
            fewer_registers<Cut::kShrink>();
        }
        shrink<T>(m, sh, begin, end);
    }
#endif
}

}  // namespace token_mix_impl
}  // namespace flexmore::cuda
