// The plan on CUDA: a stable counting sort of the slots by expert, and of the tokens by their
// expert set. Mathematics: reference/routing.py. Included by routing.cu only.
//
// Floor: reads 8 N bytes of ids, writes 8 N + 4 E (and 4 T + 4 T E by set): 2 MB at T=16384, E=7,
// K=5, below a microsecond of memory time. One launch up to kOneBlockSlots slots, three above.
//
// Tokens are cut into chunks, one block each, whose warps own contiguous slices. A warp counts and
// ranks 32 keys at a time: match_any finds the lanes of equal key, the popcount of those below is
// the rank, the lowest lane adds the group's size to the warp's own counter. So ranks are stable,
// every counter has one writer, and there are no atomics. Nothing is read back to the host.
#pragma once

#include <tuple>

#include "common.cuh"

namespace flexmore::cuda {
namespace {

constexpr int64_t kOneBlockSlots = 8192;
constexpr int64_t kChunkSlots = 2048;  // per block, at least
constexpr int64_t kMaxChunks = 128;
constexpr int kMaxKeys = 1024;
constexpr int kMaxSetExperts = 8;

struct Plan {
    const int64_t* indices;
    int32_t *row_to_slot, *slot_to_row, *row_offsets, *token_order, *expert_to_row;
    // (keys, chunks) each: how many of the chunk's slots (tokens) have the key; after the scan,
    // the position of the first of them.
    int32_t *expert_counts, *set_counts;
    int64_t num_tokens, chunk_tokens;
    int num_experts, top_k, num_chunks;
    bool by_set;

    __host__ __device__ int num_sets() const { return by_set ? 1 << num_experts : 0; }
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

// Calls f(i, key) for this warp's slice of [begin, end) in order, in all lanes of the warp (for
// i past the slice with key -1).
template <class Key, class F>
__device__ __forceinline__ void for_slice(int64_t begin, int64_t end, const Key& key, const F& f) {
    const int warps = blockDim.x / 32, warp = threadIdx.x / 32, lane = threadIdx.x % 32;
    const int64_t slice = ((end - begin + warps - 1) / warps + 31) / 32 * 32;
    const int64_t first = begin + warp * slice;
    const int64_t stop = first + slice < end ? first + slice : end;
    for (int64_t base = first; base < stop; base += 32) {
        const int64_t i = base + lane;
        f(i, i < stop ? key(i) : -1);
    }
}

// Counts keys into counts[warp][key].
template <class Key>
__device__ void count_keys(int64_t begin, int64_t end, int num_keys, int32_t* counts,
                           const Key& key) {
    const int warps = blockDim.x / 32;
    for (int i = threadIdx.x; i < warps * num_keys; i += blockDim.x) counts[i] = 0;
    __syncthreads();
    int32_t* mine = counts + threadIdx.x / 32 * num_keys;
    const int lane = threadIdx.x % 32;
    for_slice(begin, end, key, [&](int64_t, int k) {
        const unsigned peers = __match_any_sync(kFullWarp, k);
        if (k >= 0 && lane == __ffs(peers) - 1) mine[k] += __popc(peers);
        __syncwarp();
    });
    __syncthreads();
}

// Turns counts[warp][key] into the position of the warp's first entry of that key; start(key) is
// the block's first. Then calls emit(i, key, position) for every i, key -1 included.
template <class Key, class Start, class Emit>
__device__ void rank_keys(int64_t begin, int64_t end, int num_keys, int32_t* counts, const Key& key,
                          const Start& start, const Emit& emit) {
    const int warps = blockDim.x / 32;
    for (int k = threadIdx.x; k < num_keys; k += blockDim.x) {
        int32_t position = start(k);
        for (int w = 0; w < warps; ++w) {
            const int32_t count = counts[w * num_keys + k];
            counts[w * num_keys + k] = position;
            position += count;
        }
    }
    __syncthreads();
    int32_t* mine = counts + threadIdx.x / 32 * num_keys;
    const int lane = threadIdx.x % 32;
    for_slice(begin, end, key, [&](int64_t i, int k) {
        const unsigned peers = __match_any_sync(kFullWarp, k);
        const int rank = __popc(peers & ((1u << lane) - 1));
        const int32_t position = k >= 0 ? mine[k] + rank : -1;
        __syncwarp();
        if (k >= 0 && rank == 0) mine[k] += __popc(peers);
        __syncwarp();
        if (i < end) emit(i, k, position);
    });
    __syncthreads();
}

// starts[key] = sum over smaller keys of counts[*][key]; starts[num_keys] = all. By the first warp.
__device__ void scan_keys(int num_keys, const int32_t* counts, int32_t* starts) {
    const int warps = blockDim.x / 32, lane = threadIdx.x % 32;
    if (threadIdx.x < 32) {
        int32_t running = 0;
        for (int base = 0; base < num_keys; base += 32) {
            const int k = base + lane;
            int32_t count = 0;
            for (int w = 0; w < warps && k < num_keys; ++w) count += counts[w * num_keys + k];
            int32_t inclusive = count;
            for (int offset = 1; offset < 32; offset *= 2) {
                const int32_t below = __shfl_up_sync(kFullWarp, inclusive, offset);
                if (lane >= offset) inclusive += below;
            }
            if (k < num_keys) starts[k] = running + inclusive - count;
            running += __shfl_sync(kFullWarp, inclusive, 31);
        }
        if (lane == 0) starts[num_keys] = running;
    }
    __syncthreads();
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
        for (int e = 0; e < kMaxSetExperts; ++e) row[e] = e == chosen ? r : row[e];
    }
#pragma unroll
    for (int e = 0; e < kMaxSetExperts; ++e) {
        if (e < p.num_experts) p.expert_to_row[t * p.num_experts + e] = row[e];
    }
}

// Writes the rows of this block's tokens. OneBlock: the block holds all tokens and finds the starts
// itself; else the counts' scan has found them.
template <bool OneBlock>
__global__ void plan_write_kernel(Plan p) {
    extern __shared__ int32_t counts[];  // (warps, keys), then (keys + 1) starts
    const int warps = blockDim.x / 32;
    const int64_t begin = int64_t(blockIdx.x) * p.chunk_tokens;
    const int64_t end =
        begin + p.chunk_tokens < p.num_tokens ? begin + p.chunk_tokens : p.num_tokens;
    int32_t* starts =
        counts + warps * (p.num_experts > p.num_sets() ? p.num_experts : p.num_sets());

    const auto expert = [&](int64_t slot) { return p.expert(slot); };
    const int64_t begin_slot = begin * p.top_k, end_slot = end * p.top_k;
    count_keys(begin_slot, end_slot, p.num_experts, counts, expert);
    if constexpr (OneBlock) {
        scan_keys(p.num_experts, counts, starts);
        for (int e = threadIdx.x; e <= p.num_experts; e += blockDim.x) p.row_offsets[e] = starts[e];
    }
    const int32_t num_routed = OneBlock ? starts[p.num_experts] : p.row_offsets[p.num_experts];
    rank_keys(
        begin_slot, end_slot, p.num_experts, counts, expert,
        [&](int e) {
            return OneBlock ? starts[e] : p.expert_counts[e * p.num_chunks + blockIdx.x];
        },
        [&](int64_t slot, int, int32_t row) {
            p.slot_to_row[slot] = row;
            if (row >= 0) p.row_to_slot[row] = int32_t(slot);
            // The tail: row number `slot` belongs to nobody.
            if (slot >= num_routed) p.row_to_slot[slot] = -1;
        });
    if (!p.by_set) return;

    const auto expert_set = [&](int64_t t) { return p.expert_set(t); };
    count_keys(begin, end, p.num_sets(), counts, expert_set);
    if constexpr (OneBlock) scan_keys(p.num_sets(), counts, starts);
    rank_keys(
        begin, end, p.num_sets(), counts, expert_set,
        [&](int s) { return OneBlock ? starts[s] : p.set_counts[s * p.num_chunks + blockIdx.x]; },
        [&](int64_t t, int, int32_t position) {
            p.token_order[position] = int32_t(t);
            write_expert_rows(p, t);
        });
}

// expert_counts and set_counts of this block's tokens.
__global__ void plan_count_kernel(Plan p) {
    extern __shared__ int32_t counts[];
    const int warps = blockDim.x / 32;
    const int64_t begin = int64_t(blockIdx.x) * p.chunk_tokens;
    const int64_t end =
        begin + p.chunk_tokens < p.num_tokens ? begin + p.chunk_tokens : p.num_tokens;
    const auto store = [&](int num_keys, int32_t* out) {
        for (int k = threadIdx.x; k < num_keys; k += blockDim.x) {
            int32_t sum = 0;
            for (int w = 0; w < warps; ++w) sum += counts[w * num_keys + k];
            out[k * p.num_chunks + blockIdx.x] = sum;
        }
        __syncthreads();
    };
    count_keys(begin * p.top_k, end * p.top_k, p.num_experts, counts,
               [&](int64_t slot) { return p.expert(slot); });
    store(p.num_experts, p.expert_counts);
    if (!p.by_set) return;
    count_keys(begin, end, p.num_sets(), counts, [&](int64_t t) { return p.expert_set(t); });
    store(p.num_sets(), p.set_counts);
}

// Exclusive prefix sums in place: block 0 over expert_counts, giving row_offsets besides; block 1
// over set_counts. A thread sums a contiguous piece, the block scans the pieces.
constexpr int kScanThreads = 1024;

__global__ void __launch_bounds__(kScanThreads) plan_scan_kernel(Plan p) {
    __shared__ int32_t warp_sums[32];
    int32_t* counts = blockIdx.x == 0 ? p.expert_counts : p.set_counts;
    const int size = (blockIdx.x == 0 ? p.num_experts : p.num_sets()) * p.num_chunks;
    const int piece = (size + kScanThreads - 1) / kScanThreads;
    const int begin = min(int(threadIdx.x) * piece, size), end = min(begin + piece, size);
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    int32_t sum = 0;
    for (int i = begin; i < end; ++i) sum += counts[i];
    const auto inclusive_scan = [&](int32_t x) {
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int32_t below = __shfl_up_sync(kFullWarp, x, offset);
            if (lane >= offset) x += below;
        }
        return x;
    };
    const int32_t inclusive = inclusive_scan(sum);
    if (lane == 31) warp_sums[warp] = inclusive;
    __syncthreads();
    if (warp == 0) warp_sums[lane] = inclusive_scan(warp_sums[lane]);
    __syncthreads();
    int32_t running = inclusive - sum + (warp > 0 ? warp_sums[warp - 1] : 0);
    for (int i = begin; i < end; ++i) {
        const int32_t count = counts[i];
        counts[i] = running;
        running += count;
    }
    if (blockIdx.x != 0) return;
    __syncthreads();
    for (int e = threadIdx.x; e < p.num_experts; e += kScanThreads) {
        p.row_offsets[e] = counts[e * p.num_chunks];
    }
    if (threadIdx.x == 0) p.row_offsets[p.num_experts] = warp_sums[31];
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
    const int keys = std::max(p.num_experts, p.num_sets());
    const int warps = keys <= 256 ? 32 : 8;  // a counter per warp and key: 32 KB of shared memory
    const size_t shared = sizeof(int32_t) * (size_t(warps) * keys + keys + 1);

    if (N <= kOneBlockSlots) {
        p.chunk_tokens = T;
        p.num_chunks = 1;
        plan_write_kernel<true><<<1, 32 * warps, shared, stream>>>(p);
        check_launch("make_plan");
    } else {
        p.chunk_tokens = std::max(ceil_div(T, kMaxChunks), ceil_div(kChunkSlots, K));
        p.num_chunks = static_cast<int>(ceil_div(T, p.chunk_tokens));
        Tensor workspace = ints({(E + p.num_sets()) * p.num_chunks});
        p.expert_counts = mutable_data<int32_t>(workspace);
        p.set_counts = p.expert_counts + E * p.num_chunks;
        plan_count_kernel<<<p.num_chunks, 32 * warps, shared, stream>>>(p);
        check_launch("make_plan: count");
        plan_scan_kernel<<<by_set ? 2 : 1, kScanThreads, 0, stream>>>(p);
        check_launch("make_plan: scan");
        plan_write_kernel<false><<<p.num_chunks, 32 * warps, shared, stream>>>(p);
        check_launch("make_plan: write");
    }
    return {row_to_slot_N, slot_to_row_TK, row_offsets_E1, token_order_T, expert_to_row_TE};
}

}  // namespace
}  // namespace flexmore::cuda
