// Gradients of few low-rank experts' factors on Hopper, token-major, by recomputation: with G, U,
// dmixed, S and Q as in token_major_backward.cu,
//
//   dB_g,e = sum over e's tokens dg^T S_g,e,  dB_u,e = du^T S_u,e,  dA_d,e = (p_e Q_e)^T h
//
// where g, u, dh, and from them h, dg, du, are formed anew and never leave a multiprocessor.
// Mathematics: reference/experts.py.
//
// A block has an expert and 128 columns, and loops over the expert's tokens in steps of 32; three
// warpgroups: one copies rows of G, U and dmixed and the step's S_g, S_u, p Q, which a small kernel
// has gathered; two hold 64 columns each, of these B_g, B_u and the three sums in registers.
// Everything is transposed, columns by tokens: g^T = B_g S_g^T comes from the tensor
// cores as dg^T goes to them. The blocks of the same columns run side by side, one an expert, and
// walk through the tokens alike, so that L2 serves all but the first. Where blocks are few, an
// expert's tokens are cut in parts, which are summed in order.
//
// Floors at T=16384, F=11008, 5 of 7 experts, six of rank 64, bf16, H100: tensor cores 0.59 TFLOP,
// 0.75 ms; from L2 4.6 GB of G, U and dmixed, 2.3 GB of S and Q, 1.25 ms; shared memory 0.75 ms;
// arithmetic, about 20 instructions an element, 0.55 ms; memory 1.1 GB, 0.36 ms. Measured: 1.42 ms.
#include <tuple>

#include "token_major_factors.cuh"

namespace flexmore::cuda {
namespace {

using namespace factor_grads_impl;

// Into how many parts the rows are cut so that the blocks fill their waves well.
int count_parts(int64_t items, int64_t rows, int multiprocessors) {
    int best = 1;
    double best_cost = 1e300;
    for (int parts = 1; parts <= 8 && (parts == 1 || rows >= parts * 8 * kRows); ++parts) {
        const double waves = double(ceil_div(items * parts, multiprocessors));
        const double cost = waves / parts + 0.01 * parts;
        if (cost < best_cost) best_cost = cost, best = parts;
    }
    return best;
}

template <class T>
void launch(FactorGrads& m, int64_t num_rows, int64_t num_experts, const Tensor& like) {
    const cudaStream_t stream = current_stream(like);
    const int64_t items = int64_t(m.count) * m.num_chunks;
    int depth = 16;
    for (int i = 0; i < m.count; ++i) depth = std::max(depth, m.experts.depth[m.expert[i]]);
    m.tile_stride = tile_bytes(depth);
    const int64_t steps = num_rows / kRows + m.count;  // at most
    const Tensor tiles = empty(like, {steps * m.tile_stride / 2}, like.scalar_type());
    const Tensor tokens = empty(like, {steps * kRows}, ScalarType::Int);
    m.tiles = static_cast<unsigned char*>(tiles.mutable_data_ptr());
    m.tokens = mutable_data<int>(tokens);
    const int all = multiprocessors(like.get_device_index());
    m.parts = count_parts(items, num_rows / num_experts, all);
    Tensor planes;
    if (m.parts > 1) {
        planes = empty(like, {m.parts * items * kConsumers * (3 * kMostRank / 2) * kWarpgroup},
                       ScalarType::Float);
        m.planes = mutable_data<float>(planes);
    }
    factor_grads_gather_kernel<T><<<grid_size(steps), 256, 0, stream>>>(m);
    check_launch("token_factor_grads: gather");
    const auto kernel = factor_grads_kernel<T>;
    const int shared = sizeof(SharedFactors);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
               "token_factor_grads: shared memory");
    kernel<<<grid_size(items * m.parts), factor_grads_impl::kThreads, shared, stream>>>(m);
    check_launch("token_factor_grads");
    if (m.parts > 1) {
        factor_grads_sum_kernel<T><<<grid_size(items), kConsumers * kWarpgroup, 0, stream>>>(m);
        check_launch("token_factor_grads: sum");
    }
}

// dB_g (F, R_g), dB_u (F, R_u), dA_d (R_d, F), each expert's rank padded to a multiple of 16.
// wanted: of each expert kWantGate + kWantUp + kWantDown; the others' are not written.
std::tuple<Tensor, Tensor, Tensor> token_factor_grads(Tensor dmixed_TF, Tensor gate_TF,
                                                      Tensor up_TF, Tensor weights_TK,
                                                      Tensor row_offsets, Tensor row_to_slot_N,
                                                      Tensor s_TR, Tensor q_TR, Tensors b_gate,
                                                      Tensors b_up, Tensors a_down, Ints gate_ranks,
                                                      Ints up_ranks, Ints down_ranks, Ints wanted) {
    const OnDevice guard(gate_TF);
    const int64_t T = gate_TF.size(0), F = gate_TF.size(1), E = gate_ranks.size();
    const ScalarType dtype = gate_TF.scalar_type();
    const BackwardGiven given{dmixed_TF, gate_TF, up_TF, weights_TK, row_to_slot_N, s_TR, q_TR};
    given.check("token_factor_grads", E);
    check_tensor(row_offsets, "row_offsets", 1, ScalarType::Int);
    check_size(row_offsets, "row_offsets", 0, E + 1);
    check_same_device(gate_TF, {&row_offsets});
    STD_TORCH_CHECK(int64_t(wanted.size()) == E, "token_factor_grads: an entry for each expert");
    FactorGrads m{};
    const Widths widths = fill_experts(m.experts, m.factors, gate_TF, {&b_gate, &b_up, &a_down},
                                       {&gate_ranks, &up_ranks, &down_ranks}, kMaxLowRank);
    given.fill(m, widths);
    int64_t sums[3] = {};
    for (int64_t e = 0; e < E; ++e) {
        const int own[3] = {m.experts.gate_rank[e], m.experts.up_rank[e], m.experts.down_rank[e]};
        int bits = 0, at[3];
        for (int side = 0; side < 3; ++side) {
            at[side] = int(sums[side]);
            sums[side] += own[side];
            if (own[side] > 0) bits |= int(wanted[e]) & 1 << side;
        }
        if (!bits) continue;
        std::copy(at, at + 3, m.grad_at[m.count]);
        m.wanted[m.count] = bits;
        m.expert[m.count++] = int(e);
    }
    Tensor db_gate = empty(gate_TF, {F, sums[0]}, dtype),
           db_up = empty(gate_TF, {F, sums[1]}, dtype);
    Tensor da_down = empty(gate_TF, {sums[2], F}, dtype);
    if (m.count == 0 || F == 0) return {db_gate, db_up, da_down};
    const Tensor* grads[3] = {&db_gate, &db_up, &da_down};
    for (int side = 0; side < 3; ++side) {
        m.grads[side] = grads[side]->mutable_data_ptr();
        m.grad_width[side] = sums[side];
    }
    m.row_offsets = data<int32_t>(row_offsets);
    m.top_k = int(weights_TK.size(1));
    m.num_chunks = int(ceil_div(F, kColumns));
    if (dtype == ScalarType::Half) {
        launch<__half>(m, row_to_slot_N.size(0), E, gate_TF);
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "token_factor_grads: 16-bit floats only");
        launch<__nv_bfloat16>(m, row_to_slot_N.size(0), E, gate_TF);
    }
    return {db_gate, db_up, da_down};
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("token_factor_grads", TORCH_BOX(&flexmore::cuda::token_factor_grads));
}
