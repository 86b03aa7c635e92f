// The plan on CUDA: a stable counting sort of the slots by expert, and of the tokens by their
// expert set. Mathematics: reference/routing.py. Included by routing.cu only.
//
// Floor: reads 8 N bytes of ids, writes 8 N + 4 E (and 4 T + 4 T E by set): 2 MB at T=16384, E=7,
// K=5, below a microsecond of memory time, so it is launches and waiting: one launch up to
// kOneBlockSlots slots, two above.
//
// Tokens are cut into chunks, one block each, whose warps own contiguous slices. A warp counts and
// ranks 32 keys at a time: match_any finds the lanes of equal key, the popcount of those below is
// the rank, the lowest lane adds the group's size to the warp's own counter. So ranks are stable,
// every counter has one writer, and there are no atomics. Nothing is read back to the host.
//
// With several chunks, each block counts its own, waits for all others (a cooperative launch: one
// launch less, and the ids and counts stay at hand) and sums what the chunks before it have
// counted. All blocks read all counts, from the L2 cache: kMaxCounts bounds them. How many blocks
// and warps: plan_launch in launch.h.
#pragma once

#include <cooperative_groups.h>

#include <tuple>

#include "common.cuh"

namespace flexmore::cuda {
namespace {

struct Plan {
    const int64_t* indices;
    int32_t *row_to_slot, *slot_to_row, *row_offsets, *token_order, *expert_to_row;
    // (chunks, padded keys) each: how many of the chunk's slots (tokens) have the key.
    int32_t *expert_counts, *set_counts;
    int64_t num_tokens, chunk_tokens;
    int num_experts, top_k, num_chunks;
    bool by_set;

    __device__ int num_sets() const { return cuda::num_sets(num_experts, by_set); }
    __device__ int max_keys() const { return cuda::max_keys(num_experts, by_set); }
    // The slot's expert, or -1 for an empty slot.
    __device__ __forceinline__ int expert(int64_t slot) const {
        const int64_t e = indices[slot];
        return e >= 0 && e < num_experts ? int(e) : -1;
    }
    __device__ __forceinline__ int expert_set(int64_t t) const {
        int set = 0;
        for (int k = 0; k < top_k; ++k) {
            const int e = expert(t * top_k + k);
            set |= e >= 0 ? 1 << e : 0;
        }
        return set;
    }
};

// What the slots are sorted by. A token's second slot of an expert counts as empty; so that its
// slots meet in one access of a warp, the warp takes whole tokens (of up to 32 slots) at a time.
struct BySlot {
    const Plan& p;
    unsigned step, earlier = 0;  // lanes; those of the same token that come before

    __device__ explicit BySlot(const Plan& plan) : p(plan), step(32) {
        const unsigned K = p.top_k, lane = threadIdx.x % 32;
        if (K > 32) return;
        step = 32 / K * K;
        earlier = (1u << lane) - (1u << lane / K * K);
    }
    __device__ __forceinline__ int key(int64_t slot) const { return p.expert(slot); }
    // Whether no earlier slot of the token names expert e, as lanes `peers` do.
    __device__ __forceinline__ bool counts(int64_t slot, int e, unsigned peers) const {
        bool again = (peers & earlier) != 0;
        if (p.top_k > 32) {
            for (int64_t s = slot / p.top_k * p.top_k; s < slot; ++s) again |= p.expert(s) == e;
        }
        return !again;
    }
};

// What the tokens are sorted by.
struct ByToken {
    const Plan& p;
    static constexpr unsigned step = 32;
    __device__ __forceinline__ int key(int64_t t) const { return p.expert_set(t); }
    __device__ __forceinline__ bool counts(int64_t, int, unsigned) const { return true; }
};

// Calls f(i, key, peers) for this warp's slice of [begin, end) in order, in all lanes of the warp
// (for i past the slice with key -1); peers: the lanes of equal key. The next key is on its way
// while f works on this one.
template <class By, class F>
__device__ __forceinline__ void for_slice(int64_t begin, int64_t end, const By& by, const F& f) {
    const unsigned warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    // In 32 bits, which hold any number of slots: divisions of 64 are slow.
    const unsigned step = by.step, each = (unsigned(end - begin) + warps - 1) / warps;
    const unsigned slice = (each + step - 1) / step * step;
    const int64_t begins = begin + int64_t(warp) * slice, stop = min(begins + slice, end);
    int64_t i = lane < step ? begins + lane : end;
    int next = i < stop ? by.key(i) : -1;
    for (int64_t first = begins; first < stop; first += step) {
        const int key = next;
        next = i + step < stop ? by.key(i + step) : -1;
        unsigned peers = __match_any_sync(kFullWarp, key);
        const bool counts = key >= 0 && by.counts(i, key, peers);
        peers &= __ballot_sync(kFullWarp, counts);
        f(i, counts ? key : -1, peers);
        i += step;
    }
}

// Counts keys into counts[warp][key].
template <class By>
__device__ void count_keys(int64_t begin, int64_t end, int num_keys, int32_t* counts,
                           const By& by) {
    const int warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < warps * num_keys; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    int32_t* mine = counts + threadIdx.x / 32 * num_keys;
    const int lane = threadIdx.x % 32;
    for_slice(begin, end, by, [&](int64_t, int k, unsigned peers) {
        if (k >= 0 && lane == __ffs(peers) - 1) mine[k] += __popc(peers);
        __syncwarp();
    });
    __syncthreads();
}

// Turns counts[warp][key] into the position of the warp's first entry of that key, starts[key]
// being the block's. Then calls emit(i, position) for every i; -1 if it has no key.
template <class By, class Emit>
__device__ void rank_keys(int64_t begin, int64_t end, int num_keys, int32_t* counts,
                          const int32_t* starts, const By& by, const Emit& emit) {
    const int warps = blockDim.x / 32;
    for (int k = threadIdx.x; k < num_keys; k += blockDim.x) {
        int32_t position = starts[k];
        for (int w = 0; w < warps; ++w) {
            const int32_t count = counts[w * num_keys + k];
            counts[w * num_keys + k] = position;
            position += count;
        }
    }
    __syncthreads();
    int32_t* mine = counts + threadIdx.x / 32 * num_keys;
    const int lane = threadIdx.x % 32;
    for_slice(begin, end, by, [&](int64_t i, int k, unsigned peers) {
        const int rank = __popc(peers & ((1u << lane) - 1));
        const int32_t position = k >= 0 ? mine[k] + rank : -1;
        __syncwarp();
        if (k >= 0 && rank == 0) mine[k] += __popc(peers);
        __syncwarp();
        if (i < end) emit(i, position);
    });
    __syncthreads();
}

// Turns starts[key], the key's total, into the sum of the totals of smaller keys; starts[num_keys]
// becomes the sum of all. By the first warp.
__device__ void scan_totals(int num_keys, int32_t* starts) {
    const int lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        int32_t running = 0;
        for (int base = 0; base < num_keys; base += 32) {
            const int k = base + lane;
            const int32_t total = k < num_keys ? starts[k] : 0;
            int32_t inclusive = total;
            for (int offset = 1; offset < 32; offset *= 2) {
                const int32_t below = __shfl_up_sync(kFullWarp, inclusive, offset);
                if (lane >= offset) inclusive += below;
            }
            if (k < num_keys) starts[k] = running + inclusive - total;
            running += __shfl_sync(kFullWarp, inclusive, 31);
        }
        if (lane == 0) starts[num_keys] = running;
    }
    __syncthreads();
}

// Sums of this block's counts[warp][key], for the other blocks.
__device__ void publish(int num_keys, const int32_t* counts, int32_t* chunk_counts) {
    const int warps = blockDim.x / 32, padded = padded_keys(num_keys);
    for (int k = threadIdx.x; k < padded; k += blockDim.x) {
        int32_t sum = 0;
        for (int w = 0; k < num_keys && w < warps; ++w) sum += counts[w * num_keys + k];
        chunk_counts[int(blockIdx.x) * padded + k] = sum;
    }
}

// starts[key] = where this block's first entry of the key goes; starts[num_keys] = the number of
// all entries. One block sums its counts[warp][key]; of several, each sums
// chunk_counts[chunk][key], over all chunks and over those before its own, by way of
// scratch[2][threads_per_quad][key]; four keys are one access.
template <bool OneBlock>
__device__ void find_starts(int num_keys, int num_chunks, const int32_t* counts,
                            const int32_t* chunk_counts, int32_t* starts, int32_t* scratch) {
    const int padded = OneBlock ? num_keys : padded_keys(num_keys), quads = padded / 4;
    const int parts = OneBlock ? int(blockDim.x / 32) : threads_per_quad(blockDim.x, num_keys);
    if constexpr (!OneBlock) {
        for (int i = threadIdx.x; i < parts * quads; i += blockDim.x) {
            const int4* of_key = reinterpret_cast<const int4*>(chunk_counts) + i % quads;
            int4 all{}, before{};
#pragma unroll 8
            for (int c = i / quads; c < num_chunks; c += parts) {
                const int4 count = __ldcg(of_key + c * quads);
                const int earlier = c < int(blockIdx.x) ? -1 : 0;
                all.x += count.x, all.y += count.y, all.z += count.z, all.w += count.w;
                before.x += count.x & earlier, before.y += count.y & earlier;
                before.z += count.z & earlier, before.w += count.w & earlier;
            }
            reinterpret_cast<int4*>(scratch)[i] = all;
            reinterpret_cast<int4*>(scratch)[parts * quads + i] = before;
        }
        __syncthreads();
    }
    const auto sum_of_parts = [&](const int32_t* of, int k) {
        int32_t sum = 0;
        for (int part = 0; part < parts; ++part) sum += of[part * padded + k];
        return sum;
    };
    for (int k = threadIdx.x; k < num_keys; k += blockDim.x) {
        starts[k] = sum_of_parts(OneBlock ? counts : scratch, k);
    }
    __syncthreads();
    scan_totals(num_keys, starts);
    if constexpr (!OneBlock) {
        for (int k = threadIdx.x; k < num_keys; k += blockDim.x) {
            starts[k] += sum_of_parts(scratch + parts * padded, k);
        }
        __syncthreads();
    }
}

// The token's row of expert_to_row: reads the slot_to_row that this block has just written.
__device__ __forceinline__ void write_expert_rows(const Plan& p, int64_t t) {
    int32_t row[kMaxSetExperts];
#pragma unroll
    for (int e = 0; e < kMaxSetExperts; ++e) row[e] = -1;
    for (int k = 0; k < p.top_k; ++k) {
        const int chosen = p.expert(t * p.top_k + k);
        const int32_t r = p.slot_to_row[t * p.top_k + k];
#pragma unroll
        for (int e = 0; e < kMaxSetExperts; ++e) row[e] = e == chosen && r >= 0 ? r : row[e];
    }
#pragma unroll
    for (int e = 0; e < kMaxSetExperts; ++e) {
        if (e < p.num_experts) p.expert_to_row[t * p.num_experts + e] = row[e];
    }
}

__device__ __forceinline__ int64_t chunk_end(const Plan& p) {
    const int64_t end = (int64_t(blockIdx.x) + 1) * p.chunk_tokens;
    return end < p.num_tokens ? end : p.num_tokens;
}

// A block a chunk of tokens; OneBlock: it holds all of them.
template <bool OneBlock>
__global__ void plan_kernel(Plan p) {
    extern __shared__ int4 shared[];  // scratch, (warps, keys) twice, (keys + 1) starts
    const int warps = blockDim.x / 32, E = p.num_experts;
    int32_t* scratch = reinterpret_cast<int32_t*>(shared);
    int32_t* counts = scratch + (OneBlock ? 0 : scratch_size(blockDim.x, p.max_keys()));
    int32_t* set_counts = counts + warps * E;
    int32_t* starts = set_counts + warps * p.num_sets();
    const int64_t begin = int64_t(blockIdx.x) * p.chunk_tokens, end = chunk_end(p);

    const BySlot by_slot{p};
    const ByToken by_token{p};
    const int64_t begin_slot = begin * p.top_k, end_slot = end * p.top_k;
    count_keys(begin_slot, end_slot, E, counts, by_slot);
    if (p.by_set) count_keys(begin, end, p.num_sets(), set_counts, by_token);
    if constexpr (!OneBlock) {
        publish(E, counts, p.expert_counts);
        if (p.by_set) publish(p.num_sets(), set_counts, p.set_counts);
        cooperative_groups::this_grid().sync();
    }
    find_starts<OneBlock>(E, p.num_chunks, counts, p.expert_counts, starts, scratch);
    if (blockIdx.x == 0) {
        for (int e = threadIdx.x; e <= E; e += blockDim.x) p.row_offsets[e] = starts[e];
    }
    const int32_t num_routed = starts[E];
    rank_keys(begin_slot, end_slot, E, counts, starts, by_slot, [&](int64_t slot, int32_t row) {
        p.slot_to_row[slot] = row;
        if (row >= 0) p.row_to_slot[row] = int32_t(slot);
        // The tail: row number `slot` belongs to nobody.
        if (slot >= num_routed) p.row_to_slot[slot] = -1;
    });
    if (!p.by_set) return;

    find_starts<OneBlock>(p.num_sets(), p.num_chunks, set_counts, p.set_counts, starts, scratch);
    rank_keys(begin, end, p.num_sets(), set_counts, starts, by_token,
              [&](int64_t t, int32_t position) {
                  p.token_order[position] = int32_t(t);
                  write_expert_rows(p, t);
              });
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> make_plan(Tensor indices_TK, int64_t num_experts,
                                                             bool by_set) {
    check_make_plan(indices_TK, num_experts, by_set);
    const int64_t T = indices_TK.size(0), K = indices_TK.size(1), N = T * K, E = num_experts;
    STD_TORCH_CHECK(E <= kMaxKeys, "at most ", kMaxKeys, " experts, got ", E);
    const OnDevice guard(indices_TK);
    const cudaStream_t stream = current_stream(indices_TK);
    const auto ints = [&](std::initializer_list<int64_t> sizes) {
        return empty(indices_TK, sizes, ScalarType::Int);
    };
    Tensor row_to_slot_N = ints({N}), slot_to_row_TK = ints({T, K}), row_offsets_E1 = ints({E + 1});
    Tensor token_order_T = ints({by_set ? T : 0});
    Tensor expert_to_row_TE = ints({by_set ? T : 0, by_set ? E : 0});

    Plan p{};
    p.indices = data<int64_t>(indices_TK);
    p.row_to_slot = mutable_data<int32_t>(row_to_slot_N);
    p.slot_to_row = mutable_data<int32_t>(slot_to_row_TK);
    p.row_offsets = mutable_data<int32_t>(row_offsets_E1);
    p.token_order = mutable_data<int32_t>(token_order_T);
    p.expert_to_row = mutable_data<int32_t>(expert_to_row_TE);
    p.num_tokens = T;
    p.num_experts = static_cast<int>(E);
    p.top_k = static_cast<int>(K);
    p.by_set = by_set;
    const PlanLaunch launch =
        plan_launch(T, K, p.num_experts, by_set, multiprocessors(indices_TK.get_device_index()));
    p.chunk_tokens = launch.chunk_tokens;
    p.num_chunks = launch.num_chunks;
    const int threads = 32 * launch.warps;
    const size_t shared = static_cast<size_t>(launch.shared_bytes);

    if (launch.one_block) {
        plan_kernel<true><<<1, threads, shared, stream>>>(p);
        check_launch("make_plan");
    } else {
        Tensor workspace = ints({launch.counts});
        p.expert_counts = mutable_data<int32_t>(workspace);
        p.set_counts = p.expert_counts + padded_keys(p.num_experts) * p.num_chunks;
        launch_together(plan_kernel<false>, p.num_chunks, threads, shared, stream, p);
    }
    return {row_to_slot_N, slot_to_row_TK, row_offsets_E1, token_order_T, expert_to_row_TE};
}

}  // namespace
}  // namespace flexmore::cuda
