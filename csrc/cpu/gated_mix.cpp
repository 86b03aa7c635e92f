// The gated mix on the CPU, from ready pre-activations. Mathematics: reference/gated_mix.py.
#include <cstring>
#include <utility>

#include "cpu.h"

namespace flexmore::cpu {
namespace {

void check_pair(const Tensor& gate, const Tensor& up, const Tensor& weights_TK) {
    check_tensor(gate, "gate", 2, gate.scalar_type());
    check_tensor(up, "up", 2, gate.scalar_type());
    check_size(up, "up", 0, gate.size(0));
    check_size(up, "up", 1, gate.size(1));
    check_tensor(weights_TK, "weights", 2, acc_dtype(gate.scalar_type()));
}

std::tuple<Tensor, Tensor> swiglu_mix(Tensor gate_NF, Tensor up_NF, Tensor weights_TK,
                                      Tensor slot_to_row_TK) {
    check_pair(gate_NF, up_NF, weights_TK);
    check_tensor(slot_to_row_TK, "slot_to_row", 2, ScalarType::Int);
    const int64_t N = gate_NF.size(0), F = gate_NF.size(1);
    const int64_t T = slot_to_row_TK.size(0), K = slot_to_row_TK.size(1);
    check_size(weights_TK, "weights", 0, T);
    check_size(weights_TK, "weights", 1, K);
    Tensor mixed_TF = empty(gate_NF, {T, F}, gate_NF.scalar_type());
    Tensor rows_NF = empty(gate_NF, {N, F}, gate_NF.scalar_type());
    const int32_t* slot_to_row = data<int32_t>(slot_to_row_TK);
    const int64_t routed =
        std::count_if(slot_to_row, slot_to_row + T * K, [](int32_t row) { return row >= 0; });
    dispatch(gate_NF.scalar_type(), [&](auto tag) {
        using Elem = decltype(tag);
        using Acc = typename AccOf<Elem>::type;
        const Elem *gate = data<Elem>(gate_NF), *up = data<Elem>(up_NF);
        const Acc* weights = data<Acc>(weights_TK);
        Elem *mixed = mutable_data<Elem>(mixed_TF), *h = mutable_data<Elem>(rows_NF);
        const auto kernel = kernels(tag).swiglu_mix;
        // Rows are sorted with the routed ones first: the tail is all that no slot names.
        std::memset(static_cast<void*>(h + routed * F), 0, sizeof(Elem) * (N - routed) * F);
        for_rows(T, 4 * K * F, [&](int64_t t) {
            kernel(gate, up, slot_to_row + t * K, weights + t * K, K, F, mixed + t * F, h);
        });
    });
    return {mixed_TF, rows_NF};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> swiglu_mix_backward(
    Tensor dmixed_TF, OptionalTensor drows_NF, Tensor gate_NF, Tensor up_NF, Tensor weights_TK,
    Tensor row_to_slot_N, int64_t top_k) {
    check_pair(gate_NF, up_NF, weights_TK);
    const ScalarType dtype = gate_NF.scalar_type();
    const int64_t N = gate_NF.size(0), F = gate_NF.size(1), K = top_k;
    check_tensor(dmixed_TF, "dmixed", 2, dtype);
    check_size(dmixed_TF, "dmixed", 0, weights_TK.size(0));
    check_size(dmixed_TF, "dmixed", 1, F);
    check_tensor(row_to_slot_N, "row_to_slot", 1, ScalarType::Int);
    check_size(row_to_slot_N, "row_to_slot", 0, N);
    check_size(weights_TK, "weights", 1, K);
    if (drows_NF) {
        check_tensor(*drows_NF, "drows", 2, dtype);
        check_size(*drows_NF, "drows", 0, N);
        check_size(*drows_NF, "drows", 1, F);
    }
    Tensor dgate_NF = empty(gate_NF, {N, F}, dtype), dup_NF = empty(gate_NF, {N, F}, dtype);
    Tensor rows_NF = empty(gate_NF, {N, F}, dtype);
    Tensor dweights_N = empty(gate_NF, {N}, acc_dtype(dtype));
    const int32_t* row_to_slot = data<int32_t>(row_to_slot_N);
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        using Acc = typename AccOf<Elem>::type;
        const Elem *dmixed = data<Elem>(dmixed_TF), *drows = data<Elem>(drows_NF);
        const Elem *gate = data<Elem>(gate_NF), *up = data<Elem>(up_NF);
        const Acc* weights = data<Acc>(weights_TK);
        Elem *dgate = mutable_data<Elem>(dgate_NF), *dup = mutable_data<Elem>(dup_NF);
        Elem* h = mutable_data<Elem>(rows_NF);
        Acc* dweights = mutable_data<Acc>(dweights_N);
        const auto kernel = kernels(tag).swiglu_backward;
        for_rows(N, 8 * F, [&](int64_t n) {
            const int64_t slot = row_to_slot[n], at = n * F;
            if (slot < 0) {
                dweights[n] = 0;
                for (Elem* out : {dgate, dup, h}) {
                    std::memset(static_cast<void*>(out + at), 0, sizeof(Elem) * F);
                }
                return;
            }
            dweights[n] = kernel(dmixed + slot / K * F, drows ? drows + at : nullptr, gate + at,
                                 up + at, weights[slot], F, dgate + at, dup + at, h + at);
        });
    });
    return {dgate_NF, dup_NF, dweights_N, rows_NF};
}

// The rows are one expert's, so their tokens are distinct and rows can run in parallel.
Tensor swiglu_accumulate(Tensor mixed_TF, Tensor gate_nF, Tensor up_nF, Tensor weights_TK,
                         Tensor row_to_slot_n, int64_t top_k) {
    check_pair(gate_nF, up_nF, weights_TK);
    const ScalarType dtype = gate_nF.scalar_type();
    const int64_t n = gate_nF.size(0), F = gate_nF.size(1), K = top_k;
    check_tensor(mixed_TF, "mixed", 2, acc_dtype(dtype));
    check_size(mixed_TF, "mixed", 0, weights_TK.size(0));
    check_size(mixed_TF, "mixed", 1, F);
    check_tensor(row_to_slot_n, "row_to_slot", 1, ScalarType::Int);
    check_size(row_to_slot_n, "row_to_slot", 0, n);
    check_size(weights_TK, "weights", 1, K);
    Tensor rows_nF = empty(gate_nF, {n, F}, dtype);
    const int32_t* row_to_slot = data<int32_t>(row_to_slot_n);
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        using Acc = typename AccOf<Elem>::type;
        const Elem *gate = data<Elem>(gate_nF), *up = data<Elem>(up_nF);
        const Acc* weights = data<Acc>(weights_TK);
        Acc* mixed = mutable_data<Acc>(mixed_TF);
        Elem* h = mutable_data<Elem>(rows_nF);
        const auto kernel = kernels(tag).swiglu_accumulate;
        for_rows(n, 4 * F, [&](int64_t row) {
            const int64_t slot = row_to_slot[row], at = row * F;
            if (slot < 0) {
                std::memset(static_cast<void*>(h + at), 0, sizeof(Elem) * F);
                return;
            }
            kernel(gate + at, up + at, weights[slot], F, mixed + slot / K * F, h + at);
        });
    });
    return rows_nF;
}

}  // namespace
}  // namespace flexmore::cpu

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CPU, m) {
    m.impl("swiglu_mix", TORCH_BOX(&flexmore::cpu::swiglu_mix));
    m.impl("swiglu_mix_backward", TORCH_BOX(&flexmore::cpu::swiglu_mix_backward));
    m.impl("swiglu_accumulate", TORCH_BOX(&flexmore::cpu::swiglu_accumulate));
}
