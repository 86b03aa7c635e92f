// Top-k routing of many experts from 16-bit logits without a bias: a warp a token, every logit one
// 32-bit key that carries its expert. Mathematics: reference/routing.py. Included by routing.cu
// only.
//
// A key is the logit's bits made to sort as the numbers do, above 0xFFFF less the expert's index:
// keys are distinct, and the larger one is the larger logit, or of equal logits the lower expert.
// Each lane sorts its keys (the kMostSlots largest of them) in registers; then the largest of the
// lanes' first ones, one instruction for a warp, is the next expert, and its lane moves on to its
// next.
//
// Floor at T=16384, E=256, 2 bytes a logit: 8.4 MB read, 1.6 MB written at K=8: 3.3 us at 3 TB/s.
// About 330 instructions a token (of 8 logits a lane: 40 to load and make keys, 70 for
// exponentials, 40 to sort, 13 for each expert): 16384 / 528 schedulers * 330 = 10,000 clocks, 6
// us.
#pragma once

#include "common.cuh"
#include "token.cuh"

namespace flexmore::cuda {
namespace {

constexpr int kMostSlots = 8;
constexpr int kFewExperts = 8;  // a group of eight lanes serves them faster
constexpr unsigned kNoKey = 0;

// Keys a > b afterwards.
__device__ __forceinline__ void order(unsigned& a, unsigned& b) {
    const unsigned high = max(a, b);
    b = min(a, b);
    a = high;
}

// Sorts Count keys (1, 2, 4 or 8), largest first: Batcher's odd-even merges.
template <int Count>
__device__ __forceinline__ void sort_keys(unsigned (&k)[Count]) {
    if constexpr (Count >= 2) {
#pragma unroll
        for (int i = 0; i < Count; i += 2) order(k[i], k[i + 1]);
    }
    if constexpr (Count >= 4) {
#pragma unroll
        for (int i = 0; i < Count; i += 4) {
            order(k[i], k[i + 2]);
            order(k[i + 1], k[i + 3]);
            order(k[i + 1], k[i + 2]);
        }
    }
    if constexpr (Count >= 8) {
        order(k[0], k[4]);
        order(k[1], k[5]);
        order(k[2], k[6]);
        order(k[3], k[7]);
        order(k[2], k[4]);
        order(k[3], k[5]);
        order(k[1], k[2]);
        order(k[3], k[4]);
        order(k[5], k[6]);
    }
}

// The 8 largest of two sorted lists, sorted, into the first.
__device__ __forceinline__ void merge_keys(unsigned (&a)[8], const unsigned (&b)[8]) {
#pragma unroll
    for (int i = 0; i < 8; ++i) a[i] = max(a[i], b[7 - i]);
#pragma unroll
    for (int distance = 4; distance > 0; distance /= 2) {
#pragma unroll
        for (int i = 0; i < 8; ++i) {
            if (!(i & distance)) order(a[i], a[i + distance]);
        }
    }
}

template <class T>
__device__ __forceinline__ float logit_of(unsigned bits) {
    const unsigned short half = static_cast<unsigned short>(bits);
    return to_acc(*reinterpret_cast<const T*>(&half));
}
__device__ __forceinline__ unsigned sortable(unsigned bits) {
    bits = bits == 0x8000u ? 0u : bits;  // -0 counts as 0
    return (bits & 0x8000u ? ~bits : bits | 0x8000u) & 0xFFFFu;
}
__device__ __forceinline__ unsigned bits_of(unsigned sorted) {
    return (sorted & 0x8000u ? sorted ^ 0x8000u : ~sorted) & 0xFFFFu;
}

// e^x for x <= 0, off by a few roundings, for a sum of many.
__device__ __forceinline__ float exponential(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x * 1.4426950408889634f));
    return y;
}

// Lane l's chunk c holds experts Chunk * (32 c + l) + 0 .. Chunk - 1.
template <class T, int PerLane, bool IsSoftmax>
__global__ void __launch_bounds__(kThreads)
    topk_keys_kernel(Inputs in, float* __restrict__ weights, int64_t* __restrict__ indices) {
    constexpr int kChunk = PerLane < 8 ? PerLane : 8, kChunks = PerLane / kChunk;
    const int lane = threadIdx.x % 32, E = in.num_experts;
    const int64_t t = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / 32;
    if (t >= in.num_tokens) return;  // the whole warp
    const uint16_t* row = static_cast<const uint16_t*>(in.logits) + t * E;
    const bool whole =
        kChunk == 8 && E % 8 == 0 && reinterpret_cast<uintptr_t>(in.logits) % 16 == 0;

    unsigned best[kChunk];
    float v[PerLane];
    bool is_nan = false;
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
        const int first = kChunk * (32 * c + lane);
        unsigned bits[kChunk], keys[kChunk];
        if (whole) {
            uint4 words = make_uint4(0, 0, 0, 0);
            if (first < E) words = *reinterpret_cast<const uint4*>(row + first);
            const unsigned w[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
            for (int j = 0; j < kChunk; ++j) bits[j] = (w[j / 2 % 4] >> 16 * (j % 2)) & 0xFFFFu;
        } else {
#pragma unroll
            for (int j = 0; j < kChunk; ++j) bits[j] = first + j < E ? row[first + j] : 0;
        }
#pragma unroll
        for (int j = 0; j < kChunk; ++j) {
            const int e = first + j;
            const bool allowed = e < E && (!in.mask || in.mask[t * in.mask_t + e * in.mask_e]);
            const float logit = logit_of<T>(bits[j]);
            v[c * kChunk + j] = allowed ? logit : -INFINITY;
            is_nan |= allowed && logit != logit;
            keys[j] = allowed ? sortable(bits[j]) << 16 | (0xFFFFu - unsigned(e)) : kNoKey;
        }
        sort_keys(keys);
        if (c == 0) {
#pragma unroll
            for (int j = 0; j < kChunk; ++j) best[j] = keys[j];
        } else if constexpr (kChunk == 8) {
            merge_keys(best, keys);
        }
    }
    const unsigned largest_key = __reduce_max_sync(kFullWarp, best[0]);
    const float largest = logit_of<T>(bits_of(largest_key >> 16));
    is_nan = __any_sync(kFullWarp, is_nan);
    const bool usable =
        !is_nan && largest_key != kNoKey && largest > -INFINITY && largest < INFINITY;

    // Lane k gets slot k's key.
    unsigned mine = kNoKey;
    if (usable) {
#pragma unroll
        for (int k = 0; k < kMostSlots; ++k) {
            if (k == in.top_k) break;
            const unsigned key = k ? __reduce_max_sync(kFullWarp, best[0]) : largest_key;
            mine = lane == k ? key : mine;
            const bool moves = best[0] == key;
            // Of a lane's list, no more than the slots that are left can be chosen.
#pragma unroll
            for (int j = 0; j < kMostSlots - 1 - k && j < kChunk; ++j) {
                best[j] = moves ? (j + 1 < kChunk ? best[j + 1] : kNoKey) : best[j];
            }
        }
    }
    const bool found = mine != kNoKey;
    const float logit = found ? logit_of<T>(bits_of(mine >> 16)) : 0;
    double weight = 0, sum = 1;
    if constexpr (IsSoftmax) {
        if (found) weight = exp(double(logit) - double(largest));
        if (in.norm_topk_prob) {
            sum = group_sum<32>(weight);
        } else {
            float part = 0;
#pragma unroll
            for (int j = 0; j < PerLane; ++j) part += exponential(v[j] - largest);
            sum = group_sum<32>(part);
        }
    } else {
        const double shift = in.norm_topk_prob ? fmin(double(largest), 0.0) : 0;
        if (found) weight = score_of(in, logit, shift);
        if (in.norm_topk_prob) sum = group_sum<32>(weight);
    }
    if (lane < in.top_k) {
        weights[t * in.top_k + lane] = found ? float(weight / (sum > 0 ? sum : 1)) : 0.0f;
        indices[t * in.top_k + lane] = found ? int64_t(0xFFFFu - (mine & 0xFFFFu)) : int64_t(E);
    }
}

// Whether topk_keys_kernel serves these inputs.
inline bool keys_serve(const Inputs& in) {
    const bool narrow =
        in.logits_dtype == ScalarType::BFloat16 || in.logits_dtype == ScalarType::Half;
    return narrow && !in.bias && in.top_k <= kMostSlots && in.num_experts > kFewExperts;
}

inline void launch_topk_keys(const Inputs& in, float* weights, int64_t* indices,
                             cudaStream_t stream) {
    const unsigned grid = static_cast<unsigned>(ceil_div(in.num_tokens, kThreads / 32));
    const auto launch = [&]<class T, int PerLane>(T, std::integral_constant<int, PerLane>) {
        const auto kernel = in.scoring == Scoring::softmax ? topk_keys_kernel<T, PerLane, true>
                                                           : topk_keys_kernel<T, PerLane, false>;
        kernel<<<grid, kThreads, 0, stream>>>(in, weights, indices);
    };
    const auto by_size = [&](auto tag) {
        const int E = in.num_experts;
        if (E <= 32) {
            launch(tag, std::integral_constant<int, 1>{});
        } else if (E <= 64) {
            launch(tag, std::integral_constant<int, 2>{});
        } else if (E <= 128) {
            launch(tag, std::integral_constant<int, 4>{});
        } else if (E <= 256) {
            launch(tag, std::integral_constant<int, 8>{});
        } else if (E <= 512) {
            launch(tag, std::integral_constant<int, 16>{});
        } else {
            launch(tag, std::integral_constant<int, 32>{});
        }
    };
    if (in.logits_dtype == ScalarType::BFloat16) {
        by_size(__nv_bfloat16{});
    } else {
        by_size(__half{});
    }
    check_launch("topk_route");
}

}  // namespace
}  // namespace flexmore::cuda
