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

namespace flexmore::cuda {
namespace {

using namespace token_mix_impl;

// ---- The factors in the order in which the steps read them: for each expert and chunk B_g, B_u
// (rows: the chunk's columns) and A_d (rows: ranks), as operands of the expert's own depth; zero
// past the rank and the width.

struct Factor {
    const uint16_t* data;
    int64_t along_width, along_rank;  // strides, in elements
    int rank, wide;                   // wide: eight ranks of a column are read at once
};
struct Factors {
    Factor of[kMaxLowRank][3];  // gate, up, down of each place
    int depth[kMaxLowRank];
};

template <int Rank>
__global__ void __launch_bounds__(256)
    token_mix_pack_kernel(const __grid_constant__ Factors factors, int64_t width,
                          uint4* __restrict__ out) {
    constexpr int kColumns = Cut<Rank, false>::kColumns;
    const int chunk = blockIdx.x, num_chunks = gridDim.x, place = blockIdx.y, side = blockIdx.z;
    const Factor& f = factors.of[place][side];
    const bool is_down = side == 2;
    const int ranks = factors.depth[place], size = kColumns * ranks / 8;
    const int depth = is_down ? kColumns : ranks, groups = depth / 8;
    out += (int64_t(place) * num_chunks + chunk) * (3 * kColumns * Rank / 8) + side * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        const int row = i / groups, group = i % groups;
        union {
            uint16_t element[8];
            uint4 words;
        } eight{};
#pragma unroll
        for (int j = 0; j < 8; ++j) {
            const int k = 8 * group + j, r = is_down ? row : k;
            const int64_t column =
                int64_t(chunk) * kColumns + column_of<kColumns>(is_down ? k : row);
            if (column >= width) continue;
            const uint16_t* from = f.data + column * f.along_width + r * f.along_rank;
            if (!is_down && f.wide) {
                if (k < f.rank) eight.words = *reinterpret_cast<const uint4*>(from);
                break;
            }
            if (r < f.rank) eight.element[j] = *from;
        }
        out[operand_offset(row, group, depth) / 16] = eight.words;
    }
}

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

Factor factor(const Tensor& t, int width_dim) {
    const int64_t along_width = t.stride(width_dim), along_rank = t.stride(1 - width_dim);
    const int rank = int(t.size(1 - width_dim));
    const bool wide = along_rank == 1 && rank % 8 == 0 && along_width % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    return {static_cast<const uint16_t*>(t.const_data_ptr()), along_width, along_rank, rank, wide};
}

// Into how many parts the columns are cut so that the blocks fill their waves well: about half a
// block's time is lost at the end, and a block's start costs as much as 6 chunks of 64 columns.
int count_planes(int64_t tiles, int64_t width, int multiprocessors) {
    const double chunks = double(width) / 64;
    int best = 1;
    double best_cost = 1e300;
    for (int planes = 1; planes <= 16 && planes * 4 <= chunks; ++planes) {
        const double waves = double(tiles) * planes / multiprocessors;
        const double cost = std::max(1.0, waves + 0.5) * (chunks / planes + 6);
        if (cost < best_cost * 0.999) best_cost = cost, best = planes;
    }
    return best;
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
        token_mix_pack_kernel<Rank>
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

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

int64_t padded(int64_t rank) { return ceil_div(rank, 16) * 16; }

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
    for (const Ints* ints : {&gate_ranks, &up_ranks, &down_ranks}) {
        STD_TORCH_CHECK(int64_t(ints->size()) == E, "token_mix: an entry for each expert");
    }
    Call call{};
    Mix& m = call.mix;
    const int most_low_rank = rows_NF ? kMostLowRank<true> : kMostLowRank<false>;
    int64_t s_width = 0, down_width = 0, largest = 0;
    size_t next[3] = {};
    const Tensors* lists[3] = {&b_gate, &b_up, &a_down};
    const auto put = [&](int e, int side, int64_t rank) {
        if (rank == 0) return;
        STD_TORCH_CHECK(next[side] < lists[side]->size(), "token_mix: a factor is missing");
        const Tensor& t = (*lists[side])[next[side]++];
        const int width_dim = side == 2;
        STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == dtype && t.size(width_dim) == F &&
                            t.size(1 - width_dim) == rank,
                        "token_mix: a factor has another dtype or shape than its rank says");
        check_same_device(gate_TF, {&t});
        call.factors.of[m.experts.place[e]][side] = factor(t, width_dim);
    };
    for (int e = 0; e < E; ++e) {
        Experts& x = m.experts;
        const int64_t most = std::max({gate_ranks[e], up_ranks[e], down_ranks[e]});
        x.place[e] = most > 0 ? call.num_low_rank : -1;
        if (x.place[e] >= 0) {
            STD_TORCH_CHECK(call.num_low_rank < most_low_rank, "token_mix: at most ", most_low_rank,
                            " low-rank experts");
            x.depth[e] = most <= 16 ? 16 : most <= 32 ? 32 : 64;
            call.factors.depth[call.num_low_rank++] = x.depth[e];
            largest = std::max(largest, most);
        }
        x.gate_at[e] = int(s_width), x.gate_rank[e] = int(padded(gate_ranks[e]));
        x.down_at[e] = int(down_width), x.down_rank[e] = int(padded(down_ranks[e]));
        s_width += x.gate_rank[e], down_width += x.down_rank[e];
        put(e, 0, gate_ranks[e]);
        put(e, 1, up_ranks[e]);
        put(e, 2, down_ranks[e]);
    }
    for (int e = 0; e < E; ++e) {
        m.experts.up_at[e] = int(s_width), m.experts.up_rank[e] = int(padded(up_ranks[e]));
        s_width += m.experts.up_rank[e];
    }
    check_size(s_TR, "s", 1, s_width);
    STD_TORCH_CHECK(largest <= 64, "token_mix: ranks up to 64, got ", largest);
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
