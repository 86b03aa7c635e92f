// The middle of a layer on Hopper, token-major: from G, U (T, F) and S = A x (T, R) of all tokens,
//
//   mixed (T, F) = sum_e p_e h_e,   h_e = silu(G + S_g,e B_g,e^T) * (U + S_u,e B_u,e^T)
//   s_down (T, R_d) = p_e h_e A_d,e^T, zero where the token did not choose e
//
// h_e exists on the chip alone. To mixed, rows of h that other kernels left in memory (experts
// whose ranks are larger) are added on the way. Mathematics: reference/gated_mix.py and
// reference/lowrank.py.
//
// A block (token_major.cuh) owns 64 tokens of like expert sets and a part of the columns. It walks
// over groups of chunks of 32 columns, a chunk for each expanding warpgroup, within each over the
// experts that some of its tokens chose, and there over the group. Its warpgroups:
//   copying        one thread: bulk copies of the step's B_g, B_u, A_d, packed as they are read
//   expanding (2; 3 at rank 16)  one chunk of the group each: g, u in registers from G, U and two
//                  products; h; its share of mixed, in registers
//   shrinking      s_down of every expert in registers, one product a step with h from shared
//                  memory
// Sums are in a fixed order; each output has one writer. Column parts make planes of s_down, which
// sum_planes adds in order.
//
// Floors at T=16384, F=11008, 5 of 7 experts, six of rank 64, bf16, H100: memory 1.1 GB, 0.36 ms;
// tensor cores 297 GFLOP, 0.39 ms; special functions, one tanh an element of h: 0.24 ms; shared
// memory, 96 KB for 64 tokens, one expert, 64 columns: 0.66 ms. The last is the bound. Rank 16:
// memory 0.36, shared memory 0.22, instructions about 0.35 ms.
#include <tuple>
#include <vector>

#include "token_major.cuh"
#include "token_major_pack.cuh"

namespace flexmore::cuda {
namespace {

using namespace token_mix_impl;

template <class T>
__global__ void __launch_bounds__(256)
    token_mix_sum_planes_kernel(const float4* __restrict__ planes, int num_planes, int64_t size,
                                uint2* __restrict__ out) {
    const int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    if (i >= size) return;
    float4 sum = planes[i];
    for (int p = 1; p < num_planes; ++p) {
        const float4 more = planes[p * size + i];
        sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
    }
    out[i] = {pack<T>(sum.x, sum.y), pack<T>(sum.z, sum.w)};
}

struct Call {
    Mix mix;
    Factors factors;
    int num_low_rank, multiprocessors;
    Tensor gate_TF, s_down_TR;
    cudaStream_t stream;
};

template <class T, int Rank, bool Rows>
void launch(Call& call) {
    using Cut = Cut<Rank, Rows>;
    constexpr int kColumns = Cut::kColumns, kExpanding = Cut::kExpanding;
    Mix& m = call.mix;
    const int64_t groups = ceil_div(m.width, kExpanding * kColumns);  // of chunks
    const int64_t tiles = ceil_div(m.num_tokens, kTokens);
    const int64_t per_block = ceil_div(groups, count_planes(tiles, m.width, call.multiprocessors));
    const int64_t num_planes = ceil_div(groups, per_block);
    m.num_chunks = int(groups * kExpanding);
    m.chunks_per_block = int(per_block * kExpanding);
    const Tensor planes =
        empty(call.gate_TF, {num_planes, m.num_tokens, m.down_width}, ScalarType::Float);
    const Tensor packed =
        empty(call.gate_TF, {call.num_low_rank, m.num_chunks, 3 * kColumns * Rank},
              call.gate_TF.scalar_type());
    m.s_down = mutable_data<float>(planes);
    m.factors = packed.const_data_ptr();
    if (call.num_low_rank > 0) {
        token_mix_pack_kernel<Rank, kColumns, false>
            <<<dim3(m.num_chunks, call.num_low_rank, 3), 256, 0, call.stream>>>(
                call.factors, m.width, mutable_data<uint4>(packed));
        check_launch("token_mix: pack");
    }
    const auto kernel = token_mix_kernel<T, Rank, Rows>;
    const int shared = sizeof(Shared<Rank, Rows>);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
               "token_mix: shared memory");
    kernel<<<dim3(grid_size(tiles), unsigned(num_planes)), kThreads<Rank>, shared, call.stream>>>(
        m);
    check_launch("token_mix");
    const int64_t size = m.num_tokens * m.down_width / 4;
    if (size > 0) {
        token_mix_sum_planes_kernel<T><<<grid_size(ceil_div(size, 256)), 256, 0, call.stream>>>(
            data<float4>(planes), int(num_planes), size, mutable_data<uint2>(call.s_down_TR));
        check_launch("token_mix: sum of planes");
    }
}

// s and s_down have the columns of one expert after the other's, each rank padded to 16; the
// factors are of the experts with a rank, in order, read where they lie.
std::tuple<Tensor, Tensor> token_mix(Tensor gate_TF, Tensor up_TF, Tensor weights_TK,
                                     Tensor token_order_T, Tensor expert_to_row_TE,
                                     Tensor row_to_slot_N, Tensor s_TR, Tensors b_gate,
                                     Tensors b_up, Tensors a_down, Ints gate_ranks, Ints up_ranks,
                                     Ints down_ranks, std::optional<Tensor> rows_NF,
                                     std::optional<Tensor> row_slots_TK) {
    const OnDevice guard(gate_TF);
    const int64_t T = gate_TF.size(0), F = gate_TF.size(1), E = expert_to_row_TE.size(1);
    const ScalarType dtype = gate_TF.scalar_type();
    check_tensor(gate_TF, "gate", 2, dtype);
    check_tensor(up_TF, "up", 2, dtype);
    check_size(up_TF, "up", 0, T);
    check_size(up_TF, "up", 1, F);
    check_tensor(weights_TK, "weights", 2, ScalarType::Float);
    check_tensor(token_order_T, "token_order", 1, ScalarType::Int);
    check_tensor(expert_to_row_TE, "expert_to_row", 2, ScalarType::Int);
    check_tensor(row_to_slot_N, "row_to_slot", 1, ScalarType::Int);
    check_tensor(s_TR, "s", 2, dtype);
    check_size(s_TR, "s", 0, T);
    check_same_device(
        gate_TF, {&up_TF, &weights_TK, &token_order_T, &expert_to_row_TE, &row_to_slot_N, &s_TR});
    STD_TORCH_CHECK(E <= kMaxSet && F % 16 == 0 && F < (1 << 30), "token_mix: at most ", kMaxSet,
                    " experts and a width that is a multiple of ", "16; got ", E, " and ", F);
    STD_TORCH_CHECK(rows_NF.has_value() == row_slots_TK.has_value(),
                    "token_mix: rows and row_slots go together");
    if (rows_NF) {
        check_tensor(*rows_NF, "rows", 2, dtype);
        check_size(*rows_NF, "rows", 1, F);
        check_tensor(*row_slots_TK, "row_slots", 2, ScalarType::Int);
        check_size(*row_slots_TK, "row_slots", 0, T);
        check_size(*row_slots_TK, "row_slots", 1, weights_TK.size(1));
        check_same_device(gate_TF, {&*rows_NF, &*row_slots_TK});
        STD_TORCH_CHECK(weights_TK.size(1) <= kMaxSet && rows_NF->size(0) > 0,
                        "token_mix: with rows, at most ", kMaxSet, " experts a token and ",
                        "at least a row");
    }
    Call call{};
    Mix& m = call.mix;
    const int most_low_rank = rows_NF ? kMostLowRank<true> : kMostLowRank<false>;
    const Widths widths = fill_experts(m.experts, call.factors, gate_TF, {&b_gate, &b_up, &a_down},
                                       {&gate_ranks, &up_ranks, &down_ranks}, most_low_rank);
    const int64_t s_width = widths.s, down_width = widths.down, largest = widths.largest;
    call.num_low_rank = widths.num_low_rank;
    check_size(s_TR, "s", 1, s_width);
    Tensor mixed_TF = empty(gate_TF, {T, F}, dtype);
    call.gate_TF = gate_TF;
    call.s_down_TR = empty(gate_TF, {T, down_width}, dtype);
    if (T == 0) return {mixed_TF, call.s_down_TR};
    m.gate = gate_TF.const_data_ptr();
    m.up = up_TF.const_data_ptr();
    m.s = s_TR.const_data_ptr();
    m.weights = data<float>(weights_TK);
    m.token_order = data<int32_t>(token_order_T);
    m.expert_to_row = data<int32_t>(expert_to_row_TE);
    m.row_to_slot = data<int32_t>(row_to_slot_N);
    if (rows_NF) {
        m.rows = rows_NF->const_data_ptr();
        m.row_slots = data<int32_t>(*row_slots_TK);
        m.top_k = int(weights_TK.size(1));
    }
    m.mixed = mixed_TF.mutable_data_ptr();
    m.num_tokens = T, m.width = F, m.s_width = s_width, m.down_width = down_width;
    m.num_experts = int(E);
    call.multiprocessors = multiprocessors(gate_TF.get_device_index());
    call.stream = current_stream(gate_TF);
    const auto go = [&](auto tag, auto with_rows) {
        using Elem = decltype(tag);
        constexpr bool kRows = decltype(with_rows)::value;
        if (largest <= 16) return launch<Elem, 16, kRows>(call);
        if (largest <= 32) return launch<Elem, 32, kRows>(call);
        launch<Elem, 64, kRows>(call);
    };
    const auto of = [&](auto tag) {
        rows_NF ? go(tag, std::true_type{}) : go(tag, std::false_type{});
    };
    if (dtype == ScalarType::Half) {
        of(__half{});
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "token_mix: 16-bit floats only");
        of(__nv_bfloat16{});
    }
    return {mixed_TF, call.s_down_TR};
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("token_mix", TORCH_BOX(&flexmore::cuda::token_mix));
}
