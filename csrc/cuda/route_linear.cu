// Top-k routing of a few tokens from x: the logits and the choice in one launch, a block a token.
//
// Floors: (T D + E D) s bytes, 0.2 MB at T=16, D=4096, E=7: this is latency. Each thread has all
// its loads under way at once; the next kernel of the stream starts beside this one where it knows
// how to wait for it (mma.cuh).
#include <tuple>

#include "mma.cuh"
#include "token.cuh"

namespace flexmore::cuda {
namespace {

constexpr int kRouteThreads = 256;
constexpr int kRouteWarps = kRouteThreads / 32;
constexpr int kAtOnce = 8;  // experts
constexpr int kMostExperts = 32;

template <class T>
__global__ void __launch_bounds__(kRouteThreads)
    route_linear_kernel(Inputs in, const T* x, const T* router, int width, T* logits,
                        float* __restrict__ weights, int64_t* __restrict__ indices) {
    __shared__ float partial[kRouteWarps][kMostExperts];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
    const int64_t t = blockIdx.x;
    launch_dependents();
    // Into L2 only, where what another kernel may still write is seen.
    const int64_t numel = int64_t(in.num_experts) * width;
    for (int64_t i = (t * kRouteThreads + threadIdx.x) * 64; i < numel;
         i += int64_t(gridDim.x) * kRouteThreads * 64)
        prefetch_l2(router + i, int(min(numel - i, int64_t(64))) * int(sizeof(T)));
    wait_for_previous();
    for (int first = 0; first < in.num_experts; first += kAtOnce) {
        float sums[kAtOnce] = {};
#pragma unroll 2
        for (int d = threadIdx.x * 8; d < width; d += kRouteThreads * 8) {
            const Pack<T, 8> a = load_pack<8>(x + t * width + d);
            Pack<T, 8> rows[kAtOnce];
#pragma unroll
            for (int e = 0; e < kAtOnce; ++e)
                rows[e] =
                    load_pack<8>(router + int64_t(min(first + e, in.num_experts - 1)) * width + d);
#pragma unroll
            for (int e = 0; e < kAtOnce; ++e)
#pragma unroll
                for (int i = 0; i < 8; ++i) sums[e] += to_acc(a.v[i]) * to_acc(rows[e].v[i]);
        }
#pragma unroll
        for (int e = 0; e < kAtOnce; ++e) {
            sums[e] = group_sum<32>(sums[e]);
            if (lane == 0) partial[warp][first + e] = sums[e];
        }
    }
    __syncthreads();
    if (warp > 0) return;
    if (lane < in.num_experts) {
        float sum = 0;
        for (int w = 0; w < kRouteWarps; ++w) sum += partial[w][lane];
        logits[t * in.num_experts + lane] = from_acc<T>(sum);
    }
    __syncwarp();
    const Token<float, 32, 1> token(in, t, lane);
    unsigned open = __ballot_sync(kFullWarp, token.usable && token.allowed);
    const unsigned allowed = __ballot_sync(kFullWarp, token.allowed);
    // Lane k keeps slot k: its expert, or E, and its logit.
    int slot_expert = in.num_experts;
    float slot_logit = 0;
    unsigned chosen = 0;
    for (int k = 0; k < in.top_k; ++k) {
        const unsigned order = sorted_bits(token.v[0]), key = open >> lane & 1 ? order : 0;
        const unsigned largest = __reduce_max_sync(kFullWarp, key);
        const unsigned ties = __ballot_sync(kFullWarp, (open >> lane & 1) && key == largest);
        if (!ties) break;
        const int best = __ffs(ties) - 1;
        const float logit = __shfl_sync(kFullWarp, token.v[0], best);
        open &= ~(1u << best);
        chosen |= 1u << best;
        if (lane == k) {
            slot_expert = best;
            slot_logit = logit;
        }
    }
    const bool found = slot_expert < in.num_experts;
    double weight = 0;
    if (in.scoring == Scoring::softmax) {
        const unsigned entries = in.norm_topk_prob ? chosen : allowed;
        double p[1];
        const double sum = token.exponentials(token.usable ? entries >> lane & 1 : 0, p);
        if (found) weight = exp(double(slot_logit) - double(token.largest)) / sum;
    } else {
        const double shift = in.norm_topk_prob ? fmin(double(token.largest), 0.0) : 0;
        if (found) weight = score_of(in, slot_logit, shift);
        if (in.norm_topk_prob) {
            const double sum = group_sum<32>(weight);
            weight /= sum > 0 ? sum : 1;
        }
    }
    if (lane < in.top_k) {
        weights[t * in.top_k + lane] = float(weight);
        indices[t * in.top_k + lane] = slot_expert;
    }
}

std::tuple<Tensor, Tensor, Tensor> topk_route_linear(Tensor x, Tensor router, OptionalTensor bias,
                                                     OptionalTensor mask, int64_t top_k,
                                                     bool norm_topk_prob, int64_t code) {
    const ScalarType dtype = x.scalar_type();
    check_tensor(x, "x", 2, dtype);
    check_tensor(router, "weight", 2, dtype);
    const int64_t T = x.size(0), D = x.size(1), E = router.size(0);
    check_size(router, "weight", 1, D);
    STD_TORCH_CHECK(E >= 1 && E <= kMostExperts, "1 to ", kMostExperts, " experts, got ", E);
    STD_TORCH_CHECK(D % 8 == 0, "the width must be a multiple of 8, got ", D);
    check_same_device(x, {&router, pointer(bias), pointer(mask)});
    const OnDevice guard(x);
    Tensor logits = empty(x, {T, E}, dtype);
    Tensor weights = empty(x, {T, top_k}, ScalarType::Float);
    Tensor indices = empty(x, {T, top_k}, ScalarType::Long);
    check_topk_route(logits, bias, mask, top_k);
    if (T == 0) return {logits, weights, indices};
    const Inputs in = make_inputs(logits, bias, mask, top_k, norm_topk_prob, scoring_of(code));
    const auto run = [&]<class A>(A) {
        const auto kernel = route_linear_kernel<A>;
        launch_after(kernel, grid_size(T), kRouteThreads, 0, x, "topk_route_linear", in, data<A>(x),
                     data<A>(router), int(D), mutable_data<A>(logits), mutable_data<float>(weights),
                     mutable_data<int64_t>(indices));
    };
    if (dtype == ScalarType::BFloat16) {
        run(__nv_bfloat16{});
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::Half, "x must be bfloat16 or float16");
        run(__half{});
    }
    return {logits, weights, indices};
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("topk_route_linear", TORCH_BOX(&flexmore::cuda::topk_route_linear));
}
