// What the launchers of token_major.cu and token_major_backward.cu share: the experts' columns, the
// factors as the kernels read them, how columns are cut among blocks.
#pragma once

#include <array>
#include <vector>

#include "token_major_block.cuh"

namespace flexmore::cuda {
namespace token_mix_impl {

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

// Across: A_d's rows are the chunk's columns too, and its ranks are summed.
template <int Rank, int kColumns, bool Across>
__global__ void __launch_bounds__(256)
    token_mix_pack_kernel(const __grid_constant__ Factors factors, int64_t width,
                          uint4* __restrict__ out) {
    const int chunk = blockIdx.x, num_chunks = gridDim.x, place = blockIdx.y, side = blockIdx.z;
    const Factor& f = factors.of[place][side];
    const bool is_down = side == 2 && !Across;
    const int ranks = factors.depth[place], size = kColumns * ranks / 8;
    const int depth = is_down ? kColumns : ranks, groups = depth / 8;
    out += (int64_t(place) * num_chunks + chunk) * (3 * kColumns * Rank / 8) + side * size;
    for (int i = threadIdx.x; i < size; i += blockDim.x) {
        // Of a matrix whose neighbours are columns, columns are read side by side.
        const bool by_column = Across && side == 2;
        const int row = by_column ? i % kColumns : i / groups;
        const int group = by_column ? i / kColumns : i % groups;
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

inline Factor factor(const Tensor& t, int width_dim) {
    const int64_t along_width = t.stride(width_dim), along_rank = t.stride(1 - width_dim);
    const int rank = int(t.size(1 - width_dim));
    const bool wide = along_rank == 1 && rank % 8 == 0 && along_width % 8 == 0 &&
                      reinterpret_cast<uintptr_t>(t.const_data_ptr()) % 16 == 0;
    return {static_cast<const uint16_t*>(t.const_data_ptr()), along_width, along_rank, rank, wide};
}

// Into how many parts the columns are cut so that the blocks fill their waves well: about half a
// block's time is lost at the end, and a block's start costs as much as 6 chunks of 64 columns.
inline int count_planes(int64_t tiles, int64_t width, int multiprocessors) {
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

using Ints = std::vector<int64_t>;
using Tensors = std::vector<Tensor>;

inline int64_t padded(int64_t rank) { return ceil_div(rank, 16) * 16; }

// Columns of s and of s_down (or q), the largest rank, the experts that have one.
struct Widths {
    int64_t s = 0, down = 0, largest = 0;
    int num_low_rank = 0;
};

// From the ranks of gate, up and down, an entry an expert, and the factors B_g, B_u, A_d of those
// that have one.
inline Widths fill_experts(Experts& x, Factors& factors, const Tensor& gate_TF,
                           const std::array<const Tensors*, 3>& lists,
                           const std::array<const Ints*, 3>& ranks, int most_low_rank) {
    const int64_t F = gate_TF.size(1);
    const size_t E = ranks[0]->size();
    for (const Ints* ints : ranks)
        STD_TORCH_CHECK(ints->size() == E && E <= kMaxSet, "token_mix: an entry for each expert");
    Widths widths;
    size_t next[3] = {};
    const auto put = [&](int e, int side, int64_t rank) {
        if (rank == 0) return;
        STD_TORCH_CHECK(next[side] < lists[side]->size(), "token_mix: a factor is missing");
        const Tensor& t = (*lists[side])[next[side]++];
        const int width_dim = side == 2;
        STD_TORCH_CHECK(t.dim() == 2 && t.scalar_type() == gate_TF.scalar_type() &&
                            t.size(width_dim) == F && t.size(1 - width_dim) == rank,
                        "token_mix: a factor has another dtype or shape than its rank says");
        check_same_device(gate_TF, {&t});
        factors.of[x.place[e]][side] = factor(t, width_dim);
    };
    for (int e = 0; e < int(E); ++e) {
        const int64_t own[3] = {(*ranks[0])[e], (*ranks[1])[e], (*ranks[2])[e]};
        const int64_t most = std::max({own[0], own[1], own[2]});
        x.place[e] = most > 0 ? widths.num_low_rank : -1;
        if (x.place[e] >= 0) {
            STD_TORCH_CHECK(widths.num_low_rank < most_low_rank, "token_mix: at most ",
                            most_low_rank, " low-rank experts");
            x.depth[e] = most <= 16 ? 16 : most <= 32 ? 32 : 64;
            factors.depth[widths.num_low_rank++] = x.depth[e];
            widths.largest = std::max(widths.largest, most);
        }
        x.gate_at[e] = int(widths.s), x.gate_rank[e] = int(padded(own[0]));
        x.down_at[e] = int(widths.down), x.down_rank[e] = int(padded(own[2]));
        widths.s += x.gate_rank[e], widths.down += x.down_rank[e];
        for (int side = 0; side < 3; ++side) put(e, side, own[side]);
    }
    for (int e = 0; e < int(E); ++e) {
        x.up_at[e] = int(widths.s), x.up_rank[e] = int(padded((*ranks[1])[e]));
        widths.s += x.up_rank[e];
    }
    STD_TORCH_CHECK(widths.largest <= 64, "token_mix: ranks up to 64, got ", widths.largest);
    return widths;
}

// What the kernels of the backward are given: checks, and their common arguments.
struct BackwardGiven {
    const Tensor &dmixed_TF, &gate_TF, &up_TF, &weights_TK, &row_to_slot_N, &s_TR, &q_TR;

    void check(const char* op, int64_t num_experts) const {
        const int64_t T = gate_TF.size(0), F = gate_TF.size(1);
        const ScalarType dtype = gate_TF.scalar_type();
        check_tensor(gate_TF, "gate", 2, dtype);
        const std::pair<const Tensor*, const char*> wide[] = {{&up_TF, "up"},
                                                              {&dmixed_TF, "dmixed"}};
        for (const auto& [t, name] : wide) {
            check_tensor(*t, name, 2, dtype);
            check_size(*t, name, 0, T);
            check_size(*t, name, 1, F);
        }
        check_tensor(weights_TK, "weights", 2, ScalarType::Float);
        check_tensor(row_to_slot_N, "row_to_slot", 1, ScalarType::Int);
        check_tensor(s_TR, "s", 2, dtype);
        check_tensor(q_TR, "q", 2, dtype);
        check_size(s_TR, "s", 0, T);
        check_size(q_TR, "q", 0, T);
        check_same_device(gate_TF, {&up_TF, &dmixed_TF, &weights_TK, &row_to_slot_N, &s_TR, &q_TR});
        STD_TORCH_CHECK(num_experts <= kMaxSet && F % 16 == 0 && F < (1 << 30), op, ": at most ",
                        kMaxSet, " experts and a width that is a multiple of 16; got ", num_experts,
                        " and ", F);
        STD_TORCH_CHECK(T * (F / 8) < int64_t(1) << 32, op, ": too many tokens: ", T);
    }

    template <class M>
    void fill(M& m, const Widths& widths) const {
        check_size(s_TR, "s", 1, widths.s);
        check_size(q_TR, "q", 1, widths.down);
        m.gate = gate_TF.const_data_ptr();
        m.up = up_TF.const_data_ptr();
        m.dmixed = dmixed_TF.const_data_ptr();
        m.s = s_TR.const_data_ptr();
        m.q = q_TR.const_data_ptr();
        m.weights = data<float>(weights_TK);
        m.row_to_slot = data<int32_t>(row_to_slot_N);
        m.width = gate_TF.size(1), m.s_width = widths.s, m.q_width = widths.down;
    }
};

}  // namespace token_mix_impl
}  // namespace flexmore::cuda
