// The op library `flexmore_native`: schemas, facts about the build, and the module that Python
// imports. Kernels register themselves from cpu/*.cpp and cuda/*.cu. The public, differentiable ops
// (`flexmore::*`) are defined in Python and call these.
#include <Python.h>

#include <string>

#include "common.h"
#include "cpu/rows.h"

#if !defined(FM_CUDA_ARCHS)
#define FM_CUDA_ARCHS ""
#endif

namespace flexmore {

// Whether this binary has code for the device; defined in cuda/routing.cu.
bool cuda_runs_on(int64_t device);

namespace {

std::string vector_width() { return rows::table().name; }
bool use_vector_width(std::string name) { return rows::use(name.c_str()); }
std::string cuda_archs() { return FM_CUDA_ARCHS; }
#if !defined(FM_WITH_CUDA)
bool no_cuda(int64_t) { return false; }
#endif

}  // namespace
}  // namespace flexmore

STABLE_TORCH_LIBRARY(flexmore_native, m) {
    m.def("vector_width() -> str");
    m.def("use_vector_width(str name) -> bool");
    m.def("cuda_archs() -> str");
    m.def("cuda_runs_on(int device) -> bool");

    m.def(
        "topk_route(Tensor logits, Tensor? bias, Tensor? mask, int top_k, bool norm_topk_prob,"
        " int scoring) -> (Tensor, Tensor)");
    m.def(
        "topk_route_linear(Tensor x, Tensor weight, Tensor? bias, Tensor? mask, int top_k,"
        " bool norm_topk_prob, int scoring) -> (Tensor, Tensor, Tensor)");
    m.def(
        "topk_route_backward(Tensor dweights, Tensor logits, Tensor? bias, Tensor? mask,"
        " Tensor indices, bool norm_topk_prob, int scoring) -> Tensor");
    m.def(
        "make_plan(Tensor indices, int num_experts, bool by_set)"
        " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");

    m.def(
        "shrink_rows(Tensor x, Tensor row_to_slot, Tensor row_offsets, int top_k, Tensor a_gate,"
        " Tensor ranks_gate, Tensor offsets_gate, Tensor a_up, Tensor ranks_up, Tensor offsets_up,"
        " int rank) -> Tensor");
    m.def(
        "mix_rows(Tensor gate, Tensor up, Tensor weights, Tensor row_to_slot, Tensor slot_to_row,"
        " Tensor row_offsets, Tensor z, Tensor b_gate, Tensor ranks_gate, Tensor offsets_gate,"
        " Tensor b_up, Tensor ranks_up, Tensor offsets_up, Tensor a_down, Tensor ranks_down,"
        " Tensor offsets_down) -> (Tensor, Tensor)");
    m.def(
        "add_rows(Tensor base, Tensor weights, Tensor row_to_slot, Tensor slot_to_row,"
        " Tensor row_offsets, Tensor planes, Tensor b, Tensor ranks, Tensor offsets) -> Tensor");

    m.def("permute(Tensor x, Tensor row_to_slot, Tensor slot_to_row) -> Tensor");
    m.def("unpermute(Tensor x, Tensor slot_to_row, Tensor? weights, Tensor? base) -> Tensor");
    m.def(
        "unpermute_backward(Tensor dy, Tensor x, Tensor row_to_slot, Tensor weights)"
        " -> (Tensor, Tensor)");

    m.def(
        "experts_decode(Tensor x, Tensor indices, Tensor weights, Tensor[] tensors, int[] layout)"
        " -> Tensor");

    m.def(
        "token_mix(Tensor gate, Tensor up, Tensor weights, Tensor token_order,"
        " Tensor expert_to_row, Tensor row_to_slot, Tensor s, Tensor[] b_gate, Tensor[] b_up,"
        " Tensor[] a_down, int[] gate_ranks, int[] up_ranks, int[] down_ranks, Tensor? rows,"
        " Tensor? row_slots) -> (Tensor, Tensor)");
    m.def(
        "token_mix_backward(Tensor dmixed, Tensor gate, Tensor up, Tensor weights,"
        " Tensor token_order, Tensor expert_to_row, Tensor row_to_slot, Tensor s, Tensor q,"
        " Tensor[] b_gate, Tensor[] b_up, Tensor[] a_down, int[] gate_ranks, int[] up_ranks,"
        " int[] down_ranks) -> (Tensor, Tensor, Tensor)");
    m.def(
        "token_factor_grads(Tensor dmixed, Tensor gate, Tensor up, Tensor weights,"
        " Tensor row_offsets, Tensor row_to_slot, Tensor s, Tensor q, Tensor[] b_gate,"
        " Tensor[] b_up, Tensor[] a_down, int[] gate_ranks, int[] up_ranks, int[] down_ranks,"
        " int[] wanted) -> (Tensor, Tensor, Tensor)");
    m.def(
        "token_input_grads(Tensor dmixed, Tensor gate, Tensor up, Tensor weights,"
        " Tensor row_offsets, Tensor row_to_slot, Tensor s, Tensor q, Tensor[] b_gate,"
        " Tensor[] b_up, Tensor[] a_down, int[] gate_ranks, int[] up_ranks, int[] down_ranks)"
        " -> Tensor");
    m.def(
        "swiglu_mix(Tensor gate, Tensor up, Tensor weights, Tensor slot_to_row)"
        " -> (Tensor, Tensor)");
    m.def(
        "swiglu_mix_backward(Tensor dmixed, Tensor? drows, Tensor gate, Tensor up, Tensor weights,"
        " Tensor row_to_slot, int top_k) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def(
        "swiglu_accumulate(Tensor(a!) mixed, Tensor gate, Tensor up, Tensor weights,"
        " Tensor row_to_slot, int top_k) -> Tensor");

    m.def(
        "grouped_gemm(Tensor[] left, Tensor[] right, Tensor[] base, Tensor(a!)[] out,"
        " int[] experts, int[] places, Tensor row_offsets, Tensor row_to_slot, Tensor? weights,"
        " int top_k, int place, bool gated, Tensor(b!)? kept_gate, Tensor(c!)? kept_up) -> ()");
    m.def(
        "grouped_gemm_dweight(Tensor[] left, Tensor[] right, Tensor(a!)[] out, int[] experts,"
        " int[] left_sorted, int[] right_sorted, Tensor row_offsets, int num_rows, int parts)"
        " -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CompositeExplicitAutograd, m) {
    m.impl("vector_width", TORCH_BOX(&flexmore::vector_width));
    m.impl("use_vector_width", TORCH_BOX(&flexmore::use_vector_width));
    m.impl("cuda_archs", TORCH_BOX(&flexmore::cuda_archs));
#if defined(FM_WITH_CUDA)
    m.impl("cuda_runs_on", TORCH_BOX(&flexmore::cuda_runs_on));
#else
    m.impl("cuda_runs_on", TORCH_BOX(&flexmore::no_cuda));
#endif
}

// Importing flexmore_kernels._C loads the library, whose static objects register the ops.
extern "C" __attribute__((visibility("default"))) PyObject* PyInit__C() {
    static PyModuleDef module = {PyModuleDef_HEAD_INIT,
                                 "_C",
                                 "Registers torch.ops.flexmore_native.",
                                 0,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr,
                                 nullptr};
    return PyModule_Create(&module);
}
