// Routing and the plan on the CPU. Mathematics: reference/routing.py.
#include <cmath>
#include <limits>
#include <numeric>
#include <utility>
#include <vector>

#include "cpu.h"

namespace flexmore::cpu {
namespace {

// A (T, E) mask with any strides (an expanded one has stride 0), or none: everything is allowed.
struct Mask {
    const bool* data = nullptr;
    int64_t stride_t = 0, stride_e = 0;

    explicit Mask(const OptionalTensor& mask) {
        if (!mask) return;
        data = static_cast<const bool*>(mask->const_data_ptr());
        stride_t = mask->stride(0);
        stride_e = mask->stride(1);
    }
    bool operator()(int64_t t, int64_t e) const {
        return !data || data[t * stride_t + e * stride_e];
    }
};

// min(bias, 0) per expert, expert 0 without one; zeros when there is no bias.
template <class Acc>
std::vector<Acc> expert_bias(const OptionalTensor& bias, int64_t E) {
    std::vector<Acc> out(E, Acc(0));
    if (!bias) return out;
    dispatch(bias->scalar_type(), [&](auto tag) {
        const auto* b = data<decltype(tag)>(*bias);
        for (int64_t e = 1; e < E; ++e) out[e] = std::min<Acc>(to_acc(b[e - 1]), Acc(0));
    });
    return out;
}

// One token's softmax over its allowed experts, in two steps: biased logits, then exponentials. The
// latter in double: these are few numbers, and the float expf and division are off by several
// roundings.
template <class Acc>
struct Softmax {
    std::vector<Acc> v;        // biased logits
    std::vector<double> p;     // probabilities, 0 where excluded
    std::vector<int32_t> ids;  // the allowed experts, ascending
    Acc largest;

    // Without a finite largest logit (NaN, inf, or nothing allowed) there is no softmax: false.
    template <class T>
    bool load(const T* logits, const std::vector<Acc>& bias, const Mask& mask, int64_t t) {
        const int64_t E = bias.size();
        v.resize(E);
        ids.clear();
        largest = -std::numeric_limits<Acc>::infinity();
        bool is_nan = false;
        for (int64_t e = 0; e < E; ++e) {
            if (!mask(t, e)) continue;
            v[e] = to_acc(logits[e]) + bias[e];
            ids.push_back(static_cast<int32_t>(e));
            largest = std::max(largest, v[e]);
            is_nan |= std::isnan(v[e]);
        }
        return !is_nan && std::isfinite(largest);
    }
    // p over the experts [first, last) of ids.
    template <class Iterator>
    void normalize(Iterator first, Iterator last) {
        p.assign(v.size(), 0);
        double sum = 0;
        for (Iterator e = first; e != last; ++e) {
            sum += p[*e] = std::exp(double(v[*e]) - double(largest));
        }
        for (Iterator e = first; e != last; ++e) p[*e] /= sum;
    }
    // sigma(v) in place of p; renormalised, each times exp(-min(largest, 0)), which cancels, so
    // that the largest does not underflow.
    template <class Iterator>
    void sigmoids(Iterator first, Iterator last, bool renormalize) {
        p.assign(v.size(), 0);
        const double shift = renormalize ? std::min(double(largest), 0.0) : 0.0;
        double sum = 0;
        for (Iterator e = first; e != last; ++e) {
            const double x = v[*e];
            sum += p[*e] = std::exp(std::min(x, 0.0) - shift) / (1 + std::exp(-std::abs(x)));
        }
        for (Iterator e = first; renormalize && e != last; ++e) p[*e] /= sum;
    }
    // 1 - sigma(v), without cancellation.
    double slope(int32_t e) const { return 1 / (1 + std::exp(double(v[e]))); }
};

std::tuple<Tensor, Tensor> topk_route(Tensor logits_TE, OptionalTensor bias, OptionalTensor mask,
                                      int64_t top_k, bool norm_topk_prob, int64_t code) {
    const Scoring scoring = scoring_of(code);
    check_topk_route(logits_TE, bias, mask, top_k);
    const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = top_k;
    const ScalarType dtype = logits_TE.scalar_type();
    Tensor weights_TK = zeros(logits_TE, {T, K}, acc_dtype(dtype));
    Tensor indices_TK = empty(logits_TE, {T, K}, ScalarType::Long);
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        using Acc = typename AccOf<Elem>::type;
        const std::vector<Acc> bias_E = expert_bias<Acc>(bias, E);
        const Mask allowed(mask);
        const Elem* logits = data<Elem>(logits_TE);
        Acc* weights = mutable_data<Acc>(weights_TK);
        int64_t* indices = mutable_data<int64_t>(indices_TK);
        const auto route = [&](Softmax<Acc>& token, int64_t t) {
            std::fill_n(indices + t * K, K, E);
            if (!token.load(logits + t * E, bias_E, allowed, t)) return;
            const auto& v = token.v;
            const auto before = [&](int32_t a, int32_t b) {
                return v[a] > v[b] || (v[a] == v[b] && a < b);
            };
            const int64_t chosen = std::min<int64_t>(K, token.ids.size());
            const auto first = token.ids.begin(), last = first + chosen;
            std::partial_sort(first, last, token.ids.end(), before);
            if (scoring == Scoring::softmax) {
                token.normalize(first, norm_topk_prob ? last : token.ids.end());
            } else if (scoring == Scoring::sigmoid) {
                token.sigmoids(first, last, norm_topk_prob);
            } else {
                token.p.assign(E, norm_topk_prob ? 1.0 / double(chosen) : 1.0);
            }
            for (int64_t k = 0; k < chosen; ++k) {
                indices[t * K + k] = token.ids[k];
                weights[t * K + k] = static_cast<Acc>(token.p[token.ids[k]]);
            }
        };
        const int64_t grain = std::max<int64_t>(1, 4096 / E);
        torch::stable::parallel_for(0, T, grain, [&](int64_t begin, int64_t end) {
            Softmax<Acc> token;
            for (int64_t t = begin; t < end; ++t) route(token, t);
        });
    });
    return {weights_TK, indices_TK};
}

// With p the softmax over the allowed experts, or over the selected ones when the weights were
// renormalised (the same function), and d the gradient of the weights, 0 off the selection:
//   dlogits_e = p_e (d_e - sum over e' of p_e' d_e')
// With p the sigmoids of the selected, the sum is subtracted if they were renormalised, and what is
// left is multiplied by 1 - sigma(v_e).
Tensor topk_route_backward(Tensor dweights_TK, Tensor logits_TE, OptionalTensor bias,
                           OptionalTensor mask, Tensor indices_TK, bool norm_topk_prob,
                           int64_t code) {
    const bool sigmoid = scoring_of(code, Scoring::sigmoid) == Scoring::sigmoid;
    const bool selected_alone = norm_topk_prob || sigmoid;
    const int64_t T = logits_TE.size(0), E = logits_TE.size(1), K = indices_TK.size(1);
    check_topk_route_backward(dweights_TK, logits_TE, bias, mask, indices_TK);
    const ScalarType dtype = logits_TE.scalar_type();
    Tensor dlogits_TE = zeros(logits_TE, {T, E}, acc_dtype(dtype));
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        using Acc = typename AccOf<Elem>::type;
        const std::vector<Acc> bias_E = expert_bias<Acc>(bias, E);
        const Mask allowed(mask);
        const Elem* logits = data<Elem>(logits_TE);
        const Acc* dweights = data<Acc>(dweights_TK);
        const int64_t* indices = data<int64_t>(indices_TK);
        Acc* dlogits = mutable_data<Acc>(dlogits_TE);
        const auto token_backward = [&](Softmax<Acc>& token, int64_t t) {
            if (!token.load(logits + t * E, bias_E, allowed, t)) return;
            Acc* d = dlogits + t * E;
            if (selected_alone) token.ids.clear();
            for (int64_t k = 0; k < K; ++k) {
                const int64_t e = indices[t * K + k];
                if (e < 0 || e >= E) continue;
                d[e] = dweights[t * K + k];
                if (selected_alone) token.ids.push_back(static_cast<int32_t>(e));
            }
            const auto first = token.ids.begin(), last = token.ids.end();
            if (sigmoid) {
                token.sigmoids(first, last, norm_topk_prob);
            } else {
                token.normalize(first, last);
            }
            double mean = 0;
            for (const int32_t e : token.ids) mean += token.p[e] * d[e];
            if (sigmoid && !norm_topk_prob) mean = 0;
            for (const int32_t e : token.ids) {
                const double dp = d[e] - mean;
                d[e] = static_cast<Acc>(token.p[e] * (sigmoid ? dp * token.slope(e) : dp));
            }
        };
        const int64_t grain = std::max<int64_t>(1, 4096 / E);
        torch::stable::parallel_for(0, T, grain, [&](int64_t begin, int64_t end) {
            Softmax<Acc> token;
            for (int64_t t = begin; t < end; ++t) token_backward(token, t);
        });
    });
    return dlogits_TE;
}

// A stable counting sort by expert, and one by expert set: two passes over the slots each. Serial:
// at 8 bytes a slot the whole of it costs less than starting the threads for most sizes.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> make_plan(Tensor indices_TK, int64_t num_experts,
                                                             bool by_set) {
    check_make_plan(indices_TK, num_experts, by_set);
    const int64_t T = indices_TK.size(0), K = indices_TK.size(1), N = T * K, E = num_experts;
    Tensor row_to_slot_N = empty(indices_TK, {N}, ScalarType::Int);
    Tensor slot_to_row_TK = empty(indices_TK, {T, K}, ScalarType::Int);
    Tensor row_offsets_E1 = zeros(indices_TK, {E + 1}, ScalarType::Int);
    Tensor token_order_T = empty(indices_TK, {by_set ? T : 0}, ScalarType::Int);
    Tensor expert_to_row_TE = empty(indices_TK, {by_set ? T : 0, by_set ? E : 0}, ScalarType::Int);
    const int64_t* indices = data<int64_t>(indices_TK);
    int32_t* row_to_slot = mutable_data<int32_t>(row_to_slot_N);
    int32_t* slot_to_row = mutable_data<int32_t>(slot_to_row_TK);
    int32_t* row_offsets = mutable_data<int32_t>(row_offsets_E1);
    const auto routed = [&](int64_t e) { return e >= 0 && e < E; };

    for (int64_t i = 0; i < N; ++i) {
        if (routed(indices[i])) ++row_offsets[indices[i] + 1];
    }
    std::partial_sum(row_offsets, row_offsets + E + 1, row_offsets);
    std::vector<int32_t> next(row_offsets, row_offsets + E);
    for (int64_t i = 0; i < N; ++i) {
        slot_to_row[i] = -1;
        if (!routed(indices[i])) continue;
        const int32_t row = next[indices[i]]++;
        slot_to_row[i] = row;
        row_to_slot[row] = static_cast<int32_t>(i);
    }
    std::fill(row_to_slot + row_offsets[E], row_to_slot + N, -1);

    if (by_set) {
        int32_t* token_order = mutable_data<int32_t>(token_order_T);
        int32_t* expert_to_row = mutable_data<int32_t>(expert_to_row_TE);
        std::fill_n(expert_to_row, T * E, -1);
        std::vector<int32_t> start((int64_t(1) << E) + 1, 0);
        std::vector<uint8_t> expert_set(T, 0);
        for (int64_t t = 0; t < T; ++t) {
            for (int64_t i = t * K; i < (t + 1) * K; ++i) {
                if (!routed(indices[i])) continue;
                expert_to_row[t * E + indices[i]] = slot_to_row[i];
                expert_set[t] |= uint8_t(1) << indices[i];
            }
            ++start[expert_set[t] + 1];
        }
        std::partial_sum(start.begin(), start.end(), start.begin());
        for (int64_t t = 0; t < T; ++t) token_order[start[expert_set[t]]++] = int32_t(t);
    }
    return {row_to_slot_N, slot_to_row_TK, row_offsets_E1, token_order_T, expert_to_row_TE};
}

}  // namespace
}  // namespace flexmore::cpu

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CPU, m) {
    m.impl("topk_route", TORCH_BOX(&flexmore::cpu::topk_route));
    m.impl("topk_route_backward", TORCH_BOX(&flexmore::cpu::topk_route_backward));
    m.impl("make_plan", TORCH_BOX(&flexmore::cpu::make_plan));
}
