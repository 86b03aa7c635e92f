// Permutation on the CPU. Mathematics: reference/permutation.py.
#include <cstring>
#include <utility>

#include "cpu.h"

namespace flexmore::cpu {
namespace {

Tensor permute(Tensor x_TD, Tensor row_to_slot_N, Tensor slot_to_row_TK) {
    check_permute(x_TD, row_to_slot_N, slot_to_row_TK);
    const int64_t D = x_TD.size(1), N = row_to_slot_N.size(0), K = slot_to_row_TK.size(1);
    Tensor x_ND = empty(x_TD, {N, D}, x_TD.scalar_type());
    const int32_t* row_to_slot = data<int32_t>(row_to_slot_N);
    dispatch(x_TD.scalar_type(), [&](auto tag) {
        using Elem = decltype(tag);
        const Elem* x = data<Elem>(x_TD);
        Elem* out = mutable_data<Elem>(x_ND);
        for_rows(N, D, [&](int64_t n) {
            const int64_t slot = row_to_slot[n];
            if (slot < 0) {
                std::memset(out + n * D, 0, sizeof(Elem) * D);
            } else {
                std::memcpy(out + n * D, x + slot / K * D, sizeof(Elem) * D);
            }
        });
    });
    return x_ND;
}

Tensor unpermute(Tensor x_ND, Tensor slot_to_row_TK, OptionalTensor weights_TK,
                 OptionalTensor base_TD) {
    check_unpermute(x_ND, slot_to_row_TK, weights_TK, base_TD);
    const int64_t T = slot_to_row_TK.size(0), K = slot_to_row_TK.size(1), D = x_ND.size(1);
    const ScalarType dtype = x_ND.scalar_type();
    const bool base_is_acc = base_TD && base_TD->scalar_type() == acc_dtype(dtype);
    Tensor y_TD = empty(x_ND, {T, D}, dtype);
    const int32_t* slot_to_row = data<int32_t>(slot_to_row_TK);
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        using Acc = typename AccOf<Elem>::type;
        const Elem* x = data<Elem>(x_ND);
        const Acc* weights = data<Acc>(weights_TK);
        const char* base = data<char>(base_TD);
        const int64_t base_row = D * (base_is_acc ? sizeof(Acc) : sizeof(Elem));
        Elem* y = mutable_data<Elem>(y_TD);
        const auto weighted_sum = kernels(tag).weighted_sum;
        for_rows(T, (K + 1) * D, [&](int64_t t) {
            weighted_sum(x, slot_to_row + t * K, weights ? weights + t * K : nullptr, K, D,
                         base ? base + t * base_row : nullptr, base_is_acc, y + t * D);
        });
    });
    return y_TD;
}

std::tuple<Tensor, Tensor> unpermute_backward(Tensor dy_TD, Tensor x_ND, Tensor row_to_slot_N,
                                              Tensor weights_TK) {
    check_unpermute_backward(dy_TD, x_ND, row_to_slot_N, weights_TK);
    const int64_t N = x_ND.size(0), D = x_ND.size(1), K = weights_TK.size(1);
    const ScalarType dtype = x_ND.scalar_type();
    Tensor dx_ND = empty(x_ND, {N, D}, dtype);
    Tensor dweights_TK = zeros(weights_TK, {weights_TK.size(0), K}, acc_dtype(dtype));
    const int32_t* row_to_slot = data<int32_t>(row_to_slot_N);
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        using Acc = typename AccOf<Elem>::type;
        const Elem *dy = data<Elem>(dy_TD), *x = data<Elem>(x_ND);
        const Acc* weights = data<Acc>(weights_TK);
        Elem* dx = mutable_data<Elem>(dx_ND);
        Acc* dweights = mutable_data<Acc>(dweights_TK);
        const auto scale_and_dot = kernels(tag).scale_and_dot;
        for_rows(N, 3 * D, [&](int64_t n) {
            const int64_t slot = row_to_slot[n];
            if (slot < 0) {
                std::memset(static_cast<void*>(dx + n * D), 0, sizeof(Elem) * D);
                return;
            }
            dweights[slot] =
                scale_and_dot(dy + slot / K * D, x + n * D, weights[slot], D, dx + n * D);
        });
    });
    return {dx_ND, dweights_TK};
}

}  // namespace
}  // namespace flexmore::cpu

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CPU, m) {
    m.impl("permute", TORCH_BOX(&flexmore::cpu::permute));
    m.impl("unpermute", TORCH_BOX(&flexmore::cpu::unpermute));
    m.impl("unpermute_backward", TORCH_BOX(&flexmore::cpu::unpermute_backward));
}
