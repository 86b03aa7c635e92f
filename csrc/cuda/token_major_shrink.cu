// Gradients of the shrunk inputs of few low-rank experts on Hopper, token-major, by recomputation:
// with G, U, dmixed, S and Q as in token_major_backward.cu,
//
//   ds_g,e = dg B_g,e,  ds_u,e = du B_u,e  of every token of e
//
// where g, u, dh, and from them dg and du, are formed anew and never leave a multiprocessor.
// Mathematics: reference/experts.py.
//
// A block has 192 rows of an expert, 64 a warpgroup, and goes through all columns in chunks of 32:
// a fourth warpgroup copies the rows of G, U and dmixed, which the sums begin with, and the chunk's
// factors. dg and du go from registers to the tensor cores; the factors' chunk that g and u were
// formed with is read across. A row's weight is a factor of its result and comes last. The blocks
// of the same tokens run side by side, one an expert, and walk through the columns alike, so that
// L2 serves all but the first. Where blocks are few, the columns are cut in planes, which are
// summed in order.
//
// Floors at T=16384, F=11008, 5 of 7 experts, six of rank 64, bf16, H100: tensor cores 0.49 TFLOP,
// 0.63 ms; from L2 4.6 GB of G, U and dmixed, 1.5 GB of factors, 1.1 ms; shared memory 0.8 ms;
// arithmetic, about 14 instructions an element, 0.4 ms; memory 1.1 GB, 0.36 ms.
#include "token_major_pack.cuh"
#include "token_major_shrink.cuh"

namespace flexmore::cuda {
namespace {

using namespace token_shrink_impl;

// Into how many planes the columns are cut so that the blocks fill their waves well.
int count_shrink_planes(double tiles, int chunks, int multiprocessors) {
    int best = 1;
    double best_cost = 1e300;
    for (int planes = 1; planes <= 16 && (planes == 1 || planes * 16 <= chunks); ++planes) {
        const double waves = double(int64_t(tiles * planes) / multiprocessors + 1);
        const double storing = planes > 1 ? 0.025 * planes * tiles / multiprocessors : 0;
        const double cost = waves / planes + storing;
        if (cost < best_cost) best_cost = cost, best = planes;
    }
    return best;
}

template <int Rank>
void pack_factors(const Shrink& m, const Factors& factors, int places, uint4* out,
                  cudaStream_t stream) {
    token_mix_pack_kernel<Rank, kColumns, true>
        <<<dim3(m.num_chunks, places, 3), 256, 0, stream>>>(factors, m.width, out);
    check_launch("token_input_grads: pack");
}

template <class T>
void launch(Shrink& m, const Factors& factors, const Widths& widths, int64_t num_rows,
            int64_t num_experts, const Tensor& like) {
    const cudaStream_t stream = current_stream(like);
    m.most_depth = widths.largest <= 16 ? 16 : widths.largest <= 32 ? 32 : 64;
    const int places = widths.num_low_rank;
    const Tensor packed =
        empty(like, {places, m.num_chunks, 3 * kColumns * m.most_depth}, like.scalar_type());
    m.factors = static_cast<const unsigned char*>(packed.const_data_ptr());
    uint4* out = mutable_data<uint4>(packed);
    if (m.most_depth == 16) {
        pack_factors<16>(m, factors, places, out, stream);
    } else if (m.most_depth == 32) {
        pack_factors<32>(m, factors, places, out, stream);
    } else {
        pack_factors<64>(m, factors, places, out, stream);
    }
    const int64_t tiles = num_rows / kRows + m.count;  // at most
    const double expected = double(num_rows) * m.count / num_experts / kRows + 0.5 * m.count;
    const int planes =
        count_shrink_planes(expected, m.num_chunks, multiprocessors(like.get_device_index()));
    m.chunks_per_block = int(ceil_div(m.num_chunks, planes));
    m.num_planes = int(ceil_div(m.num_chunks, m.chunks_per_block));
    Tensor sums;
    if (m.num_planes > 1) {
        sums = empty(like, {m.num_planes * tiles * kConsumers * kMostRank * kWarpgroup},
                     ScalarType::Float);
        m.planes = mutable_data<float>(sums);
    }
    const auto kernel = token_shrink_kernel<T>;
    const int shared = sizeof(SharedShrink);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
               "token_input_grads: shared memory");
    kernel<<<dim3(grid_size(tiles), unsigned(m.num_planes)), token_shrink_impl::kThreads, shared,
             stream>>>(m);
    check_launch("token_input_grads");
    if (m.num_planes > 1) {
        token_shrink_sum_kernel<T><<<grid_size(tiles), kConsumers * kWarpgroup, 0, stream>>>(m);
        check_launch("token_input_grads: sum");
    }
}

// ds (T, R_gate + R_up), columns as s's, 0 where a token did not choose the expert.
Tensor token_input_grads(Tensor dmixed_TF, Tensor gate_TF, Tensor up_TF, Tensor weights_TK,
                         Tensor row_offsets, Tensor row_to_slot_N, Tensor s_TR, Tensor q_TR,
                         Tensors b_gate, Tensors b_up, Tensors a_down, Ints gate_ranks,
                         Ints up_ranks, Ints down_ranks) {
    const OnDevice guard(gate_TF);
    const int64_t T = gate_TF.size(0), F = gate_TF.size(1), E = gate_ranks.size();
    const int64_t N = row_to_slot_N.size(0);
    const ScalarType dtype = gate_TF.scalar_type();
    const BackwardGiven given{dmixed_TF, gate_TF, up_TF, weights_TK, row_to_slot_N, s_TR, q_TR};
    given.check("token_input_grads", E);
    check_tensor(row_offsets, "row_offsets", 1, ScalarType::Int);
    check_size(row_offsets, "row_offsets", 0, E + 1);
    check_same_device(gate_TF, {&row_offsets});
    STD_TORCH_CHECK(N / kRows < (1 << 16) - kMaxLowRank, "token_input_grads: too many tokens: ", T);
    Shrink m{};
    Factors factors{};
    const Widths widths = fill_experts(m.experts, factors, gate_TF, {&b_gate, &b_up, &a_down},
                                       {&gate_ranks, &up_ranks, &down_ranks}, kMaxLowRank);
    given.fill(m, widths);
    for (int e = 0; e < int(E); ++e)
        if (m.experts.gate_rank[e] + m.experts.up_rank[e] > 0) m.expert[m.count++] = e;
    Tensor ds_TR = empty(gate_TF, {T, widths.s}, dtype);
    if (m.count == 0 || T == 0) return ds_TR;
    m.ds = ds_TR.mutable_data_ptr();
    check_cuda(cudaMemsetAsync(m.ds, 0, T * widths.s * 2, current_stream(gate_TF)),
               "token_input_grads: zeros");
    if (N == 0 || F == 0) return ds_TR;
    m.row_offsets = data<int32_t>(row_offsets);
    m.top_k = int(weights_TK.size(1));
    m.num_chunks = int(ceil_div(F, kColumns));
    if (dtype == ScalarType::Half) {
        launch<__half>(m, factors, widths, N, E, gate_TF);
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "token_input_grads: 16-bit floats only");
        launch<__nv_bfloat16>(m, factors, widths, N, E, gate_TF);
    }
    return ds_TR;
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("token_input_grads", TORCH_BOX(&flexmore::cuda::token_input_grads));
}
