// What routing reads, and one token of it: the biased logits over a group of lanes.
#pragma once

#include <cmath>

#include "common.cuh"

namespace flexmore::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kMaxExperts = 1024;

// What routing reads, the same in both directions.
struct Inputs {
    const void* logits;  // (T, E)
    const void* bias;    // (E - 1,) or null
    ScalarType logits_dtype, bias_dtype;
    const bool* mask;  // (T, E) of these strides, or null
    int64_t mask_t, mask_e;
    int64_t num_tokens;
    int num_experts, top_k;
    bool norm_topk_prob;
    Scoring scoring;
};

// Of checked arguments.
inline Inputs make_inputs(const Tensor& logits_TE, const OptionalTensor& bias,
                          const OptionalTensor& mask, int64_t top_k, bool norm_topk_prob,
                          Scoring scoring) {
    STD_TORCH_CHECK(logits_TE.size(1) <= kMaxExperts, "at most ", kMaxExperts, " experts, got ",
                    logits_TE.size(1));
    Inputs in{};
    in.logits = logits_TE.const_data_ptr();
    in.logits_dtype = logits_TE.scalar_type();
    dispatch(in.logits_dtype, [](auto) {});  // refuses other dtypes
    if (bias && bias->numel() > 0) {
        dispatch(bias->scalar_type(), [](auto) {});
        in.bias = bias->const_data_ptr();
        in.bias_dtype = bias->scalar_type();
    }
    if (mask) {
        in.mask = data<bool>(*mask);
        in.mask_t = mask->stride(0);
        in.mask_e = mask->stride(1);
    }
    in.num_tokens = logits_TE.size(0);
    in.num_experts = static_cast<int>(logits_TE.size(1));
    in.top_k = static_cast<int>(top_k);
    in.norm_topk_prob = norm_topk_prob;
    in.scoring = scoring;
    return in;
}

// f(element of dtype T at p) for the T that `dtype` names: all threads take the same branch.
template <class F>
__device__ __forceinline__ void with_dtype(const void* p, ScalarType dtype, const F& f) {
    switch (dtype) {
        case ScalarType::Double:
            return f(static_cast<const double*>(p));
        case ScalarType::BFloat16:
            return f(static_cast<const __nv_bfloat16*>(p));
        case ScalarType::Half:
            return f(static_cast<const __half*>(p));
        default:
            return f(static_cast<const float*>(p));
    }
}

template <int Lanes, class A>
__device__ __forceinline__ A group_sum(A x) {
#pragma unroll
    for (int offset = Lanes / 2; offset > 0; offset /= 2)
        x += __shfl_xor_sync(kFullWarp, x, offset);
    return x;
}

// sigma(v) e^-shift, with shift 0 or the largest of min(v, 0). In double, as `exponentials` says.
__device__ __forceinline__ double shifted_sigmoid(double v, double shift) {
    return exp(fmin(v, 0.0) - shift) / (1 + exp(-fabs(v)));
}

// A selected expert's sigmoid or unit weight. `shift` is 0 or, where weights are renormalised,
// min(largest, 0): it cancels, and the largest sigmoid does not underflow.
__device__ __forceinline__ double score_of(const Inputs& in, double logit, double shift) {
    return in.scoring == Scoring::unit ? 1 : shifted_sigmoid(logit, shift);
}

// Integers in the order of the numbers; -0 counts as 0.
__device__ __forceinline__ unsigned sorted_bits(float v) {
    const unsigned bits = __float_as_uint(v + 0.0f);
    return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float number_of(unsigned sorted) {
    return __uint_as_float(sorted & 0x80000000u ? sorted ^ 0x80000000u : ~sorted);
}

// One token's biased logits over the lanes of its group; lane l, entry j: expert l + j * Lanes.
template <class A, int Lanes, int PerLane>
struct Token {
    A v[PerLane];
    unsigned allowed = 0;  // bit j: entry j exists and is allowed
    A largest;
    bool usable;  // the largest allowed logit is finite, and none is NaN

    __device__ __forceinline__ Token(const Inputs& in, int64_t t, int lane) {
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            const int e = lane + j * Lanes;
            const bool allowed_here =
                e < in.num_experts && (!in.mask || in.mask[t * in.mask_t + e * in.mask_e]);
            allowed |= unsigned(allowed_here) << j;
        }
        with_dtype(in.logits, in.logits_dtype, [&](const auto* logits) {
            const auto* row = logits + t * in.num_experts;
#pragma unroll
            for (int j = 0; j < PerLane; ++j) {
                v[j] = allowed >> j & 1 ? A(to_acc(row[lane + j * Lanes])) : -A(INFINITY);
            }
        });
        if (in.bias) {
            with_dtype(in.bias, in.bias_dtype, [&](const auto* bias) {
#pragma unroll
                for (int j = 0; j < PerLane; ++j) {
                    const int e = lane + j * Lanes;
                    if ((allowed >> j & 1) && e > 0) {
                        const A b = A(to_acc(bias[e - 1]));
                        v[j] += b > 0 ? A(0) : b;
                    }
                }
            });
        }
        largest = -A(INFINITY);
        bool is_nan = false;
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            is_nan |= v[j] != v[j];
            largest = v[j] > largest ? v[j] : largest;
        }
#pragma unroll
        for (int offset = Lanes / 2; offset > 0; offset /= 2) {
            const A other = __shfl_xor_sync(kFullWarp, largest, offset);
            largest = other > largest ? other : largest;
            is_nan |= __shfl_xor_sync(kFullWarp, int(is_nan), offset) != 0;
        }
        usable = !is_nan && largest > -A(INFINITY) && largest < A(INFINITY);
    }

    // p = exp(v - largest) over the entries of `entries`, 0 elsewhere; returns their sum over the
    // group, in all its lanes. In double: these are few numbers, and expf and float division are
    // off by several roundings.
    __device__ __forceinline__ double exponentials(unsigned entries, double (&p)[PerLane]) const {
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            p[j] = entries >> j & 1 ? double(v[j]) - double(largest) : -double(INFINITY);
        }
        if constexpr (PerLane <= 4) {
#pragma unroll
            for (int j = 0; j < PerLane; ++j) p[j] = exp(p[j]);
        } else {
            // Through shared memory (each thread its own words), so that a loop that is not
            // unrolled can index them: unrolled, 32 copies of exp are slow to compile.
            __shared__ double stage[PerLane * kThreads];
#pragma unroll
            for (int j = 0; j < PerLane; ++j) stage[j * kThreads + threadIdx.x] = p[j];
#pragma unroll 1
            for (int j = 0; j < PerLane; ++j) {
                stage[j * kThreads + threadIdx.x] = exp(stage[j * kThreads + threadIdx.x]);
            }
#pragma unroll
            for (int j = 0; j < PerLane; ++j) p[j] = stage[j * kThreads + threadIdx.x];
        }
        double sum = 0;
#pragma unroll
        for (int j = 0; j < PerLane; ++j) sum += p[j];
        return group_sum<Lanes>(sum);
    }
};

}  // namespace
}  // namespace flexmore::cuda
