// Top-k routing on CUDA. Mathematics: reference/routing.py. The plan: plan.cuh.
//
// Floors: forward reads T E s and writes 12 T K bytes; backward reads T E s + 12 T K and writes
// 4 T E. At T=16384, E=7, K=5, bf16: 1.2 MB and 1.7 MB, below a microsecond of memory time, so both
// are launches: one each. Work: about (K + 10)(E / lanes + 10) instructions a lane; E exponentials.
// 16-bit logits of more than 8 experts without a bias: topk.cuh.
//
// A group of 8 or 32 lanes serves a token, lane l holding experts l, l + lanes, ... in registers.
// Reductions are butterflies of shuffles: a fixed order, no atomics, no block barrier.
#include <cmath>
#include <tuple>

#include "common.cuh"
#include "plan.cuh"
#include "token.cuh"
#include "topk.cuh"

namespace flexmore::cuda {
namespace {

// Sigmoid or unit weights of one token's slots, over the logits that its lanes have kept there.
template <class A, int Lanes>
__device__ __forceinline__ void score_slots(const Inputs& in, bool exists, int64_t slots, int lane,
                                            double largest, A* weights, const int64_t* indices) {
    const double shift = in.norm_topk_prob ? fmin(largest, 0.0) : 0;
    const auto score = [&](int k) -> double {
        if (indices[slots + k] >= in.num_experts) return 0;
        return score_of(in, weights[slots + k], shift);
    };
    double sum = 0;
    if (exists && in.norm_topk_prob) {
        for (int k = lane; k < in.top_k; k += Lanes) sum += score(k);
    }
    sum = group_sum<Lanes>(sum);
    if (!exists) return;
    const double divisor = sum > 0 ? sum : 1;
    for (int k = lane; k < in.top_k; k += Lanes) weights[slots + k] = A(score(k) / divisor);
}

// The largest entry of a group's lanes, of equal ones the one of the lowest expert, in all lanes.
template <int Lanes, class A>
__device__ __forceinline__ void best_of_group(A& best, int& best_e) {
    if constexpr (Lanes == 32 && sizeof(A) == 4) {
        // As integers of the same order, which a warp reduces in one instruction.
        const unsigned key = sorted_bits(best);
        const unsigned largest = __reduce_max_sync(kFullWarp, key);
        best_e = int(__reduce_min_sync(kFullWarp, key == largest ? unsigned(best_e) : INT32_MAX));
        best = number_of(largest);
    } else {
#pragma unroll
        for (int offset = Lanes / 2; offset > 0; offset /= 2) {
            const A other = __shfl_xor_sync(kFullWarp, best, offset);
            const int other_e = __shfl_xor_sync(kFullWarp, best_e, offset);
            const bool better = other > best || (other == best && other_e < best_e);
            best = better ? other : best;
            best_e = better ? other_e : best_e;
        }
    }
}

// IsSoftmax or not is a matter of compilation, so that neither pays for the other's registers.
template <class A, int Lanes, int PerLane, bool IsSoftmax>
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
        best_of_group<Lanes>(best, best_e);
        const bool found = best_e != INT32_MAX;
        if (found && best_e % Lanes == lane) open &= ~(1u << best_e / Lanes);
        // Lane k % Lanes keeps slot k, for now with its logit: it alone reads it again below.
        if (exists && k % Lanes == lane) {
            weights[slots + k] = best;
            indices[slots + k] = found ? best_e : in.num_experts;
        }
    }
    if constexpr (!IsSoftmax) {
        score_slots<A, Lanes>(in, exists, slots, lane, double(token.largest), weights, indices);
    } else {
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

// Of sigmoid weights w over the selected: dlogits_e = w_e (1 - sigma(v_e)) (d_e - sum w d), the sum
// there only if they were renormalised; elsewhere zero. The slots say all: no mask is read, and of
// the logits only the selected are.
template <class A, int Lanes>
__global__ void __launch_bounds__(kThreads)
    sigmoid_backward_kernel(Inputs in, const A* __restrict__ dweights,
                            const int64_t* __restrict__ indices, A* __restrict__ dlogits) {
    const int lane = threadIdx.x % Lanes;
    const int64_t group = (int64_t(blockIdx.x) * kThreads + threadIdx.x) / Lanes;
    const bool exists = group < in.num_tokens;
    const int64_t t = exists ? group : in.num_tokens - 1;
    const int64_t slots = t * in.top_k;
    const auto routed = [&](int64_t e) { return e >= 0 && e < in.num_experts; };
    const auto logit = [&](int64_t e) {
        double v = 0;
        with_dtype(in.logits, in.logits_dtype,
                   [&](const auto* logits) { v = A(to_acc(logits[t * in.num_experts + e])); });
        if (in.bias && e > 0) {
            with_dtype(in.bias, in.bias_dtype, [&](const auto* bias) {
                const A b = A(to_acc(bias[e - 1]));
                v = A(v) + (b > 0 ? A(0) : b);
            });
        }
        return v;
    };
    double shift = 0, sum = 1, mean = 0;
    if (in.norm_topk_prob) {
        shift = -double(INFINITY);
        for (int k = lane; k < in.top_k; k += Lanes) {
            const int64_t e = indices[slots + k];
            if (routed(e)) shift = fmax(shift, logit(e));
        }
#pragma unroll
        for (int offset = Lanes / 2; offset > 0; offset /= 2)
            shift = fmax(shift, __shfl_xor_sync(kFullWarp, shift, offset));
        shift = fmin(shift, 0.0);
        sum = 0;
        for (int k = lane; k < in.top_k; k += Lanes) {
            const int64_t e = indices[slots + k];
            if (!routed(e)) continue;
            const double score = shifted_sigmoid(logit(e), shift);
            sum += score;
            mean += score * dweights[slots + k];
        }
        sum = group_sum<Lanes>(sum);
        mean = group_sum<Lanes>(mean) / (sum > 0 ? sum : 1);
    }
    if (exists) {
        for (int e = lane; e < in.num_experts; e += Lanes) dlogits[t * in.num_experts + e] = A(0);
    }
    __syncwarp();  // the zeros come first, whichever lane writes an expert
    if (!exists) return;
    for (int k = lane; k < in.top_k; k += Lanes) {
        const int64_t e = indices[slots + k];
        if (!routed(e)) continue;
        const double v = logit(e);
        const double w = shifted_sigmoid(v, shift) / sum;
        const double slope = 1 / (1 + exp(v));
        dlogits[t * in.num_experts + e] = A(w * slope * (dweights[slots + k] - mean));
    }
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
    } else if (in.num_experts <= 256) {
        is_double ? f(double{}, Int<32>{}, Int<8>{}) : f(float{}, Int<32>{}, Int<8>{});
    } else {
        is_double ? f(double{}, Int<32>{}, Int<32>{}) : f(float{}, Int<32>{}, Int<32>{});
    }
}

std::tuple<Tensor, Tensor> topk_route(Tensor logits_TE, OptionalTensor bias, OptionalTensor mask,
                                      int64_t top_k, bool norm_topk_prob, int64_t code) {
    const Scoring scoring = scoring_of(code);
    check_topk_route(logits_TE, bias, mask, top_k);
    check_same_device(logits_TE, {pointer(bias), pointer(mask)});
    const OnDevice guard(logits_TE);
    const int64_t T = logits_TE.size(0);
    const ScalarType dtype = logits_TE.scalar_type();
    Tensor weights_TK = empty(logits_TE, {T, top_k}, acc_dtype(dtype));
    Tensor indices_TK = empty(logits_TE, {T, top_k}, ScalarType::Long);
    if (T == 0) return {weights_TK, indices_TK};
    const Inputs in = make_inputs(logits_TE, bias, mask, top_k, norm_topk_prob, scoring);
    const cudaStream_t stream = current_stream(logits_TE);
    if (keys_serve(in)) {
        launch_topk_keys(in, mutable_data<float>(weights_TK), mutable_data<int64_t>(indices_TK),
                         stream);
        return {weights_TK, indices_TK};
    }
    for_kernel(in, [&]<class A, int Lanes, int PerLane>(A, Int<Lanes>, Int<PerLane>) {
        const unsigned grid = grid_size(ceil_div(T, kThreads / Lanes));
        const auto kernel = scoring == Scoring::softmax
                                ? topk_route_kernel<A, Lanes, PerLane, true>
                                : topk_route_kernel<A, Lanes, PerLane, false>;
        kernel<<<grid, kThreads, 0, stream>>>(in, mutable_data<A>(weights_TK),
                                              mutable_data<int64_t>(indices_TK));
        check_launch("topk_route");
    });
    return {weights_TK, indices_TK};
}

Tensor topk_route_backward(Tensor dweights_TK, Tensor logits_TE, OptionalTensor bias,
                           OptionalTensor mask, Tensor indices_TK, bool norm_topk_prob,
                           int64_t code) {
    const Scoring scoring = scoring_of(code, Scoring::sigmoid);
    const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = indices_TK.size(1);
    const ScalarType dtype = logits_TE.scalar_type();
    check_topk_route_backward(dweights_TK, logits_TE, bias, mask, indices_TK);
    check_same_device(logits_TE, {&dweights_TK, pointer(bias), pointer(mask), &indices_TK});
    const OnDevice guard(logits_TE);
    Tensor dlogits_TE = empty(logits_TE, {T, E}, acc_dtype(dtype));
    if (T == 0) return dlogits_TE;
    const Inputs in = make_inputs(logits_TE, bias, mask, K, norm_topk_prob, scoring);
    const cudaStream_t stream = current_stream(logits_TE);
    for_kernel(in, [&]<class A, int Lanes, int PerLane>(A, Int<Lanes>, Int<PerLane>) {
        const unsigned grid = grid_size(ceil_div(T, kThreads / Lanes));
        const auto kernel = scoring == Scoring::sigmoid
                                ? sigmoid_backward_kernel<A, Lanes>
                                : topk_route_backward_kernel<A, Lanes, PerLane>;
        kernel<<<grid, kThreads, 0, stream>>>(in, data<A>(dweights_TK), data<int64_t>(indices_TK),
                                              mutable_data<A>(dlogits_TE));
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
    const bool runs = cudaSetDevice(index) == cudaSuccess &&
                      cudaFuncGetAttributes(
                          &attributes, cuda::topk_route_kernel<float, 8, 1, true>) == cudaSuccess;
    cudaGetLastError();  // "no kernel image" or "driver too old" is the answer, not a later error
    return runs;
}

}  // namespace flexmore

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("topk_route", TORCH_BOX(&flexmore::cuda::topk_route));
    m.impl("topk_route_backward", TORCH_BOX(&flexmore::cuda::topk_route_backward));
    m.impl("make_plan", TORCH_BOX(&flexmore::cuda::make_plan));
}
