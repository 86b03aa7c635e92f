// The middle of a layer's backward on Hopper, token-major: from the saved G, U (T, F), dmixed =
// W_d^T dy, S = A x (T, R) and Q = B_d^T dy (T, R_d) of all tokens,
//
//   g = G + S_g,e B_g,e^T,  u = U + S_u,e B_u,e^T,  h = silu(g) u,  dh = dmixed + Q_e A_d,e
//   dp_e = <dh, h>;  du = p_e dh silu(g),  dg = p_e dh u silu'(g)
//   dgate, dup (T, F): dg and du summed over a token's experts
//
// What factors and their gradients need of dg, du and h, token_major_shrink.cu and
// token_major_factors.cu form again. Mathematics: reference/experts.py.
//
// A block (token_major_backward.cuh) is cut as the forward's: 64 tokens of like expert sets, a part
// of the columns; one thread copies the factors of a step, three warpgroups hold a chunk of 32
// columns each, three products a step. dp is summed in shared memory, by one writer in a fixed
// order, and over the parts of the columns by planes.
//
// Floors at T=16384, F=11008, 5 of 7 experts, six of rank 64, bf16, H100: memory 1.8 GB, 0.6 ms;
// tensor cores 0.45 TFLOP, 0.57 ms; shared memory 0.6 ms; 23 instructions an element, 0.8 ms.
// Measured 1.86 ms.
#include <tuple>

#include "token_major_backward.cuh"
#include "token_major_pack.cuh"

namespace flexmore::cuda {
namespace {

using namespace token_mix_impl;

struct Call {
    MixBackward mix;
    Factors factors;
    int num_low_rank, multiprocessors;
    Tensor gate_TF, dots;
    cudaStream_t stream;
};

template <class T, int Rank>
void launch(Call& call) {
    constexpr int kColumns = CutBackward::kColumns, kExpanding = CutBackward::kExpanding;
    MixBackward& m = call.mix;
    const int64_t groups = ceil_div(m.width, kExpanding * kColumns);  // of chunks
    const int64_t tiles = ceil_div(m.num_tokens, kTokens);
    const int64_t per_block = ceil_div(groups, count_planes(tiles, m.width, call.multiprocessors));
    const int64_t num_planes = ceil_div(groups, per_block);
    m.num_chunks = int(groups * kExpanding);
    m.chunks_per_block = int(per_block * kExpanding);
    // Rows of no expert are in no block: they stay zero.
    call.dots = empty(call.gate_TF, {num_planes, m.num_rows}, ScalarType::Float);
    m.dots = mutable_data<float>(call.dots);
    check_cuda(cudaMemsetAsync(m.dots, 0, num_planes * m.num_rows * sizeof(float), call.stream),
               "token_mix_backward: zeros");
    const Tensor packed =
        empty(call.gate_TF, {call.num_low_rank, m.num_chunks, 3 * kColumns * Rank},
              call.gate_TF.scalar_type());
    m.factors = packed.const_data_ptr();
    if (call.num_low_rank > 0) {
        token_mix_pack_kernel<Rank, kColumns, true>
            <<<dim3(m.num_chunks, call.num_low_rank, 3), 256, 0, call.stream>>>(
                call.factors, m.width, mutable_data<uint4>(packed));
        check_launch("token_mix_backward: pack");
    }
    const auto kernel = token_mix_backward_kernel<T, Rank>;
    const int shared = sizeof(SharedBackward<Rank>);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
               "token_mix_backward: shared memory");
    kernel<<<dim3(grid_size(tiles), unsigned(num_planes)), CutBackward::kThreads, shared,
             call.stream>>>(m);
    check_launch("token_mix_backward");
}

// dgate, dup (T, F) and dp's planes (P, N).
std::tuple<Tensor, Tensor, Tensor> token_mix_backward(
    Tensor dmixed_TF, Tensor gate_TF, Tensor up_TF, Tensor weights_TK, Tensor token_order_T,
    Tensor expert_to_row_TE, Tensor row_to_slot_N, Tensor s_TR, Tensor q_TR, Tensors b_gate,
    Tensors b_up, Tensors a_down, Ints gate_ranks, Ints up_ranks, Ints down_ranks) {
    const OnDevice guard(gate_TF);
    const int64_t T = gate_TF.size(0), F = gate_TF.size(1), E = expert_to_row_TE.size(1);
    const int64_t N = row_to_slot_N.size(0);
    const ScalarType dtype = gate_TF.scalar_type();
    const BackwardGiven given{dmixed_TF, gate_TF, up_TF, weights_TK, row_to_slot_N, s_TR, q_TR};
    given.check("token_mix_backward", E);
    check_tensor(token_order_T, "token_order", 1, ScalarType::Int);
    check_tensor(expert_to_row_TE, "expert_to_row", 2, ScalarType::Int);
    check_same_device(gate_TF, {&token_order_T, &expert_to_row_TE});
    STD_TORCH_CHECK(int64_t(gate_ranks.size()) == E,
                    "token_mix_backward: an entry for each expert");
    Call call{};
    MixBackward& m = call.mix;
    const Widths widths = fill_experts(m.experts, call.factors, gate_TF, {&b_gate, &b_up, &a_down},
                                       {&gate_ranks, &up_ranks, &down_ranks}, kMaxLowRank);
    given.fill(m, widths);
    call.num_low_rank = widths.num_low_rank;
    call.gate_TF = gate_TF;
    Tensor dgate_TF = empty(gate_TF, {T, F}, dtype), dup_TF = empty(gate_TF, {T, F}, dtype);
    if (T == 0) return {dgate_TF, dup_TF, empty(gate_TF, {0, N}, ScalarType::Float)};
    m.token_order = data<int32_t>(token_order_T);
    m.expert_to_row = data<int32_t>(expert_to_row_TE);
    m.dgate = dgate_TF.mutable_data_ptr();
    m.dup = dup_TF.mutable_data_ptr();
    m.num_tokens = T, m.num_rows = N;
    m.num_experts = int(E);
    call.multiprocessors = multiprocessors(gate_TF.get_device_index());
    call.stream = current_stream(gate_TF);
    const auto go = [&](auto tag) {
        using Elem = decltype(tag);
        if (widths.largest <= 16) return launch<Elem, 16>(call);
        if (widths.largest <= 32) return launch<Elem, 32>(call);
        launch<Elem, 64>(call);
    };
    if (dtype == ScalarType::Half) {
        go(__half{});
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "token_mix_backward: 16-bit floats only");
        go(__nv_bfloat16{});
    }
    return {dgate_TF, dup_TF, call.dots};
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("token_mix_backward", TORCH_BOX(&flexmore::cuda::token_mix_backward));
}
