// The kernel of token_major.cu: what a block reads before its columns, and its copying thread.
// Compiled for sm_90a alone.
#pragma once

#include "token_major_block.cuh"

namespace flexmore::cuda {
namespace token_mix_impl {

// The ranks that are computed of each present expert, in two bits: 16, 32, 64.
template <class Shared>
__device__ __forceinline__ int depths_of(const Shared& sh) {
    int found = 0;
    for (int i = 0; i < sh.num_present; ++i) found |= (sh.depth[i] / 32) << 2 * i;
    return uniform(found);
}
__device__ __forceinline__ int depth_of(int depths, int i) { return 16 << (depths >> 2 * i & 3); }

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

// Which experts the block's tokens chose, with which weights. All threads call it; `sh.set` is 0.
template <class M, class Shared>
__device__ void find_experts(const M& m, Shared& sh) {
    const int thread = threadIdx.x;
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
            if (!(sh.set >> e & 1) || m.experts.place[e] < 0) continue;
            sh.depth[count] = m.experts.depth[e];
            sh.present[count++] = e;
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
    }
}

// 16 bytes of a token's row of s or the like, of an expert's columns from `at` on, into an operand.
template <class T, class Shared>
__device__ __forceinline__ void gather_words(Shared& sh, unsigned char* operand, const void* from,
                                             int64_t stride, int at, int rank, int row, int group) {
    const int token = sh.token[row];
    uint4 words{};
    if (token >= 0 && 8 * group < rank) {
        words = *reinterpret_cast<const uint4*>(static_cast<const T*>(from) + token * stride + at +
                                                8 * group);
    }
    *reinterpret_cast<uint4*>(operand + operand_offset(row, group, Shared::kRank)) = words;
}

// What a block reads before its columns: its experts, the tokens' rows of s.
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
    find_experts(m, sh);
    if constexpr (Rows) {
        if (thread < kTokens) gather_rows(m, sh, sh.token[thread], thread);
    }
    constexpr int kGroups = Rank / 8;  // of 8 elements, 16 bytes
    for (int i = thread; i < sh.num_present * 2 * kTokens * kGroups; i += kThreads<Rank>) {
        const int group = i % kGroups, row = i / kGroups % kTokens, up = i / kGroups / kTokens % 2;
        const int which = i / kGroups / kTokens / 2, e = sh.present[which];
        const int at = up ? m.experts.up_at[e] : m.experts.gate_at[e];
        const int rank = up ? m.experts.up_rank[e] : m.experts.gate_rank[e];
        gather_words<T>(sh, sh.s[which][up], m.s, m.s_width, at, rank, row, group);
    }
    fence_async_proxy();
    __syncthreads();
}

// One thread: the factors of every step, in order: kExpanding chunks, each expert, each chunk.
template <class M, class Shared>
__device__ void copy_factors(const M& m, Shared& sh, int begin, int end) {
    constexpr int kBytes = 3 * Shared::kFactor, kExpanding = Shared::kExpanding;
    Ring<Shared::kStages> ring;
    for (int chunk = begin; chunk < end; chunk += kExpanding) {
        for (int i = 0; i < sh.num_present; ++i) {
            const int64_t tile = int64_t(m.experts.place[sh.present[i]]) * m.num_chunks + chunk;
            const auto* from = static_cast<const unsigned char*>(m.factors) + tile * kBytes;
            const int bytes = kBytes / Shared::kRank * sh.depth[i];
            for (int w = 0; w < kExpanding; ++w) {
                sh.stage_empty[ring.slot].wait(ring.parity ^ 1);
                sh.stage_full[ring.slot].arrive_expecting(bytes);
                copy_bulk(sh.stage[ring.slot], from + w * kBytes, bytes, &sh.stage_full[ring.slot]);
                ring.next();
            }
        }
    }
}

}  // namespace token_mix_impl
}  // namespace flexmore::cuda
