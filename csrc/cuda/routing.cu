// Top-k routing on CUDA. Mathematics: reference/routing.py. The plan: plan.cuh.
//
// Floors: forward reads T E s and writes 12 T K bytes; backward reads T E s + 12 T K and writes
// 4 T E. At T=16384, E=7, K=5, bf16: 1.2 MB and 1.7 MB, below a microsecond of memory time, so both
// are launches: one each. Work: about (K + 10)(E / lanes + 10) instructions a lane; E exponentials.
//
// A group of 8 or 32 lanes serves a token, lane l holding experts l, l + lanes, ... in registers.
// Reductions are butterflies of shuffles: a fixed order, no atomics, no block barrier.
#include <cfloat>
#include <cmath>
#include <tuple>

#include "common.cuh"
#include "plan.cuh"

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
};

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
                        v[j] += b < 0 ? b : A(0);
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

template <class A, int Lanes, int PerLane>
__global__ void __launch_bounds__(kThreads)
    topk_route_kernel(Inputs in, A* __restrict__ weights, int64_t* __restrict__ indices) {
    const int lane = threadIdx.x % Lanes;
    const int64_t group = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / Lanes;
    // Shuffles need every lane of the warp: groups past the end repeat the last token, unwritten.
    const bool exists = group < in.num_tokens;
    const int64_t t = exists ? group : in.num_tokens - 1;
    const Token<A, Lanes, PerLane> token(in, t, lane);
    unsigned open = token.usable ? token.allowed : 0;
    const int64_t slots = t * in.top_k;
    for (int k = 0; k < in.top_k; ++k) {
        // The largest open entry, of equal ones the first: an expert id past all marks "none".
        A best = -A(INFINITY);
        int best_e = INT32_MAX;
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            const bool better = (open >> j & 1) && (token.v[j] > best || best_e == INT32_MAX);
            best = better ? token.v[j] : best;
            best_e = better ? lane + j * Lanes : best_e;
        }
#pragma unroll
        for (int offset = Lanes / 2; offset > 0; offset /= 2) {
            const A other = __shfl_xor_sync(kFullWarp, best, offset);
            const int other_e = __shfl_xor_sync(kFullWarp, best_e, offset);
            const bool better = other > best || (other == best && other_e < best_e);
            best = better ? other : best;
            best_e = better ? other_e : best_e;
        }
        const bool found = best_e != INT32_MAX;
        if (found && best_e % Lanes == lane) open &= ~(1u << best_e / Lanes);
        // Lane k % Lanes keeps slot k, for now with its logit: it alone reads it again below.
        if (exists && k % Lanes == lane) {
            weights[slots + k] = best;
            indices[slots + k] = found ? best_e : in.num_experts;
        }
    }
    const unsigned chosen = token.allowed & ~open;
    double p[PerLane];
    const double sum = token.exponentials(in.norm_topk_prob ? chosen : token.allowed, p);
    if (!exists) return;
    for (int k = lane; k < in.top_k; k += Lanes) {
        const bool found = indices[slots + k] < in.num_experts;
        const A v = found ? weights[slots + k] : token.largest;
        weights[slots + k] = found ? A(exp(double(v) - double(token.largest)) / sum) : A(0);
    }
}

// dlogits_e = p_e (d_e - sum p d), p over the allowed experts or, renormalised, over the selected.
template <class A, int Lanes, int PerLane>
__global__ void __launch_bounds__(kThreads)
    topk_route_backward_kernel(Inputs in, const A* __restrict__ dweights,
                               const int64_t* __restrict__ indices, A* __restrict__ dlogits) {
    const int lane = threadIdx.x % Lanes;
    const int64_t group = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / Lanes;
    const bool exists = group < in.num_tokens;
    const int64_t t = exists ? group : in.num_tokens - 1;
    const Token<A, Lanes, PerLane> token(in, t, lane);
    A d[PerLane] = {};
    unsigned chosen = 0;
    for (int k = 0; k < in.top_k; ++k) {
        const int64_t e = indices[t * in.top_k + k];
        const A dw = dweights[t * in.top_k + k];
#pragma unroll
        for (int j = 0; j < PerLane; ++j) {
            const bool mine = e == lane + j * Lanes && e < in.num_experts;
            d[j] = mine ? dw : d[j];
            chosen |= unsigned(mine) << j;
        }
    }
    const unsigned entries = in.norm_topk_prob ? chosen & token.allowed : token.allowed;
    double p[PerLane];
    const double sum = token.exponentials(token.usable ? entries : 0, p);
    const double scale = sum > 0 ? 1 / sum : 0;
    double mean = 0;
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
        p[j] *= scale;
        mean += p[j] * d[j];
    }
    mean = group_sum<Lanes>(mean);
    if (!exists) return;
#pragma unroll
    for (int j = 0; j < PerLane; ++j) {
        const int e = lane + j * Lanes;
        if (e < in.num_experts) dlogits[t * in.num_experts + e] = A(p[j] * (d[j] - mean));
    }
}

Inputs make_inputs(const Tensor& logits_TE, const OptionalTensor& bias, const OptionalTensor& mask,
                   int64_t top_k, bool norm_topk_prob) {
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
    return in;
}

// Calls f(A{}, lanes a token, experts a lane), the sizes as types.
template <int Value>
struct Int {};
template <class F>
void for_kernel(const Inputs& in, F&& f) {
    const bool is_double = in.logits_dtype == ScalarType::Double;
    if (in.num_experts <= 8 && !is_double) {
        f(float{}, Int<8>{}, Int<1>{});
    } else if (in.num_experts <= 128) {
        is_double ? f(double{}, Int<32>{}, Int<4>{}) : f(float{}, Int<32>{}, Int<4>{});
    } else {
        is_double ? f(double{}, Int<32>{}, Int<32>{}) : f(float{}, Int<32>{}, Int<32>{});
    }
}

std::tuple<Tensor, Tensor> topk_route(Tensor logits_TE, OptionalTensor bias, OptionalTensor mask,
                                      int64_t top_k, bool norm_topk_prob) {
    check_topk_route(logits_TE, bias, mask, top_k);
    check_same_device(logits_TE, {pointer(bias), pointer(mask)});
    const OnDevice guard(logits_TE);
    const int64_t T = logits_TE.size(0);
    const ScalarType dtype = logits_TE.scalar_type();
    Tensor weights_TK = empty(logits_TE, {T, top_k}, acc_dtype(dtype));
    Tensor indices_TK = empty(logits_TE, {T, top_k}, ScalarType::Long);
    if (T == 0) return {weights_TK, indices_TK};
    const Inputs in = make_inputs(logits_TE, bias, mask, top_k, norm_topk_prob);
    const cudaStream_t stream = current_stream(logits_TE);
    for_kernel(in, [&]<class A, int Lanes, int PerLane>(A, Int<Lanes>, Int<PerLane>) {
        const unsigned grid = grid_size(ceil_div(T, kThreads / Lanes));
        topk_route_kernel<A, Lanes, PerLane><<<grid, kThreads, 0, stream>>>(
            in, mutable_data<A>(weights_TK), mutable_data<int64_t>(indices_TK));
        check_launch("topk_route");
    });
    return {weights_TK, indices_TK};
}

Tensor topk_route_backward(Tensor dweights_TK, Tensor logits_TE, OptionalTensor bias,
                           OptionalTensor mask, Tensor indices_TK, bool norm_topk_prob) {
    const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = indices_TK.size(1);
    const ScalarType dtype = logits_TE.scalar_type();
    check_topk_route_backward(dweights_TK, logits_TE, bias, mask, indices_TK);
    check_same_device(logits_TE, {&dweights_TK, pointer(bias), pointer(mask), &indices_TK});
    const OnDevice guard(logits_TE);
    Tensor dlogits_TE = empty(logits_TE, {T, E}, acc_dtype(dtype));
    if (T == 0) return dlogits_TE;
    const Inputs in = make_inputs(logits_TE, bias, mask, K, norm_topk_prob);
    const cudaStream_t stream = current_stream(logits_TE);
    for_kernel(in, [&]<class A, int Lanes, int PerLane>(A, Int<Lanes>, Int<PerLane>) {
        const unsigned grid = grid_size(ceil_div(T, kThreads / Lanes));
        topk_route_backward_kernel<A, Lanes, PerLane><<<grid, kThreads, 0, stream>>>(
            in, data<A>(dweights_TK), data<int64_t>(indices_TK), mutable_data<A>(dlogits_TE));
        check_launch("topk_route_backward");
    });
    return dlogits_TE;
}

}  // namespace
}  // namespace flexmore::cuda

namespace flexmore {

// Asked once per process and device; the answer for one kernel is that of all.
bool cuda_runs_on(int64_t device) {
    const int32_t index = static_cast<int32_t>(device);
    const torch::stable::accelerator::DeviceGuard guard(index);
    cudaFuncAttributes attributes;
    const bool runs =
        cudaSetDevice(index) == cudaSuccess &&
        cudaFuncGetAttributes(&attributes, cuda::topk_route_kernel<float, 8, 1>) == cudaSuccess;
    cudaGetLastError();  // "no kernel image" or "driver too old" is the answer, not a later error
    return runs;
}

}  // namespace flexmore

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("topk_route", TORCH_BOX(&flexmore::cuda::topk_route));
    m.impl("topk_route_backward", TORCH_BOX(&flexmore::cuda::topk_route_backward));
    m.impl("make_plan", TORCH_BOX(&flexmore::cuda::make_plan));
}
