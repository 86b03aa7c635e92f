// The kernel of token_major.cu: what a block does. Compiled for sm_90a alone.
#pragma once

#include "token_major_block.cuh"

namespace flexmore::cuda {
namespace token_mix_impl {

// Of one token: its rows of h from outside.
template <int Rank>
__device__ __forceinline__ void gather_rows(const Mix& m, Shared<Rank, true>& sh, int token,
                                            int thread) {
    int count = 0;
    for (int k = 0; k < m.top_k && token >= 0; ++k) {
        const int64_t slot = int64_t(token) * m.top_k + k;
        if (m.row_slots[slot] < 0) continue;
        sh.row[count][thread] = m.row_slots[slot];
        sh.row_weight[count++][thread] = m.weights[slot];
    }
    atomicMax(&sh.num_rows, count);
    for (; count < kMaxSet; ++count) sh.row[count][thread] = -1, sh.row_weight[count][thread] = 0;
}

// Which experts the block's tokens chose, with which weights; the tokens' rows of s.
template <class T, int Rank, bool Rows>
__device__ void gather(const Mix& m, Shared<Rank, Rows>& sh) {
    const int thread = threadIdx.x;
    if (thread == 0) {
        sh.set = 0, sh.num_rows = 0;
        for (int i = 0; i < sh.kStages; ++i) {
            sh.stage_full[i].init(1);
            sh.stage_empty[i].init(2 * kWarpgroup / 32);
        }
        for (int i = 0; i < sh.kHidden; ++i) {
            sh.hidden_full[i].init(kWarpgroup);
            sh.hidden_empty[i].init(kWarpgroup / 32);
        }
        fence_barrier_init();
    }
    __syncthreads();
    int set = 0;
    if (thread < kTokens) {
        const int64_t place = int64_t(blockIdx.x) * kTokens + thread;
        const int token = place < m.num_tokens ? m.token_order[place] : -1;
        sh.token[thread] = token;
        for (int e = 0; e < m.num_experts && token >= 0; ++e) {
            set |= m.expert_to_row[int64_t(token) * m.num_experts + e] >= 0 ? 1 << e : 0;
        }
        atomicOr(&sh.set, set);
    }
    __syncthreads();
    if (thread == 0) {
        int count = 0;
        for (int e = 0; e < m.num_experts; ++e) {
            if ((sh.set >> e & 1) && m.experts.place[e] >= 0) sh.present[count++] = e;
        }
        sh.num_present = count;
    }
    __syncthreads();
    if (thread < kTokens) {
        const int token = sh.token[thread];
        const auto weight_of = [&](int e) {
            const int32_t row = m.expert_to_row[int64_t(token) * m.num_experts + e];
            return m.weights[m.row_to_slot[row]];
        };
        int chosen = 0;
        float base = 0;
        for (int e = 0; e < m.num_experts; ++e) {
            if ((set >> e & 1) && m.experts.place[e] < 0) {
                base += weight_of(e);
                chosen |= 1 << 31;
            }
        }
        for (int i = 0; i < sh.num_present; ++i) {
            const bool mine = set >> sh.present[i] & 1;
            sh.weight[i][thread] = mine ? weight_of(sh.present[i]) : 0.0f;
            chosen |= int(mine) << i;
        }
        sh.base_weight[thread] = base;
        sh.chosen[thread] = chosen;
        if constexpr (Rows) gather_rows(m, sh, token, thread);
    }
    constexpr int kGroups = Rank / 8;  // of 8 elements, 16 bytes
    const T* s = static_cast<const T*>(m.s);
    for (int i = thread; i < sh.num_present * 2 * kTokens * kGroups; i += kThreads<Rank>) {
        const int group = i % kGroups, row = i / kGroups % kTokens, up = i / kGroups / kTokens % 2;
        const int which = i / kGroups / kTokens / 2, e = sh.present[which];
        const int at = up ? m.experts.up_at[e] : m.experts.gate_at[e];
        const int rank = up ? m.experts.up_rank[e] : m.experts.gate_rank[e];
        const int token = sh.token[row];
        uint4 words{};
        if (token >= 0 && 8 * group < rank) {
            words = *reinterpret_cast<const uint4*>(s + token * m.s_width + at + 8 * group);
        }
        *reinterpret_cast<uint4*>(sh.s[which][up] + operand_offset(row, group, Rank)) = words;
    }
    fence_async_proxy();
    __syncthreads();
}

// One thread: the factors of every step, in order: kExpanding chunks, each expert, each chunk.
template <class Shared>
__device__ void copy_factors(const Mix& m, Shared& sh, int begin, int end) {
    constexpr int kBytes = 3 * Shared::kFactor, kExpanding = Shared::kExpanding;
    Ring<Shared::kStages> ring;
    for (int chunk = begin; chunk < end; chunk += kExpanding) {
        for (int i = 0; i < sh.num_present; ++i) {
            const int64_t tile = int64_t(m.experts.place[sh.present[i]]) * m.num_chunks + chunk;
            const auto* from = static_cast<const unsigned char*>(m.factors) + tile * kBytes;
            for (int w = 0; w < kExpanding; ++w) {
                sh.stage_empty[ring.slot].wait(ring.parity ^ 1);
                sh.stage_full[ring.slot].arrive_expecting(kBytes);
                copy_bulk(sh.stage[ring.slot], from + w * kBytes, kBytes,
                          &sh.stage_full[ring.slot]);
                ring.next();
            }
        }
    }
}

// A thread's part of a chunk of G or U: of two rows, Columns / 4 neighbouring columns.
template <int Words>
__device__ __forceinline__ void load_row(uint32_t (&to)[Words], const void* from, int64_t element) {
    const auto* at = reinterpret_cast<const uint4*>(static_cast<const uint16_t*>(from) + element);
#pragma unroll
    for (int i = 0; i < Words / 4; ++i) {
        const uint4 words = load_once(at + i);
        to[4 * i] = words.x, to[4 * i + 1] = words.y;
        to[4 * i + 2] = words.z, to[4 * i + 3] = words.w;
    }
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
            sh.stage_full[ring.slot].wait(ring.parity);
            const uint64_t b = operand(stages + ring.slot * (3 * kFactor), Rank);
            const uint64_t s = operands_s + e * (2 * kTokens * Rank * 2 / 16);
            products_begin();
            product<T, false, Rank>(g, s, b);
            products_commit();
            product<T, false, Rank>(u, s + kTokens * Rank * 2 / 16, b + kFactor / 16);
            products_commit();
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
    const uint64_t factors = operand(shared_address(sh.stage) + 2 * kFactor, kColumns);
    float sums[kMost][Rank / 2] = {};
    Ring<Sh::kStages> ring;
    Ring<Sh::kHidden> hidden;
    for (int chunk = begin; chunk < end; chunk += kExpanding) {
#pragma unroll
        for (int e = 0; e < kMost; ++e) {
            if (e >= present) continue;
#pragma unroll 1
            for (int w = 0; w < kExpanding; ++w) {
                sh.stage_full[ring.slot].wait(ring.parity);
                sh.hidden_full[hidden.slot].wait(hidden.parity);
                products_begin();
                product<T, true, kColumns>(sums[e],
                                           h_tiles + hidden.slot * (kTokens * kColumns * 2 / 16),
                                           factors + ring.slot * (3 * kFactor / 16));
                products_commit();
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
#pragma unroll
            for (int j = 0; j < Rank / 8; ++j) {
                const int column = 8 * j + lane % 4 * 2;
                if (column < rank) {
                    *reinterpret_cast<float2*>(out + at + column) = {
                        p * sums[e][4 * j + 2 * i], p * sums[e][4 * j + 2 * i + 1]};
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
