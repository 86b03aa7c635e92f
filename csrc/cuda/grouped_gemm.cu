// Rows sorted by expert times each expert's own matrices, on Hopper. Mathematics:
// reference/grouped_gemm.py, reference/lowrank.py and, for the gated form, reference/experts.py.
//
//   plain   out = left_0 right_0^T + left_1 right_1^T, for the rows of an expert or all tokens
//   gated   out = silu(base_g + left_g right_g^T) * (base_u + left_u right_u^T), where a base is a
//           row of (T, F), the token's, or nothing, and so is a product
//
// For training the plain form takes bases too, and right operands that lie transposed, as a weight
// does for a gradient; the gated one keeps what the nonlinearity reads. These are kernels of their
// own, so that the others stay as small as they are.
//
// Floor: 2 n O I operations, at 790 TFLOP/s; the tile of 128 x 256 asks L2 for 48 KB (32 KB in
// pairs of blocks) and shared memory for 80 KB every 1024 cycles of the tensor cores. A sum with a
// base moves 4 n O bytes besides: at 3.0 TB/s that is more up to a depth of 527.
//
// A block stays on its multiprocessor and takes tiles of 128 rows and 256 columns in turn. One
// thread copies operands, 64 summed columns a stage, through tensor maps, in place; two warpgroups
// multiply 64 rows each, and are at different places of the ring, so that while one stores its tile
// or computes its gates, the other keeps the tensor cores busy. A gated tile is two products one
// after the other in the same registers, silu(g) waiting in 16 bits for u: that keeps the tile at
// 256 columns. Blocks in pairs own neighbouring rows and share the right operand by multicast. A
// transposed one is multiplied as it lies: boxes of 64 columns and 64 summed ones, the tensor cores
// told so; only its threads' columns are not neighbours then, and change places by shuffles.
#include <vector>

#include "grouped_gemm.cuh"

namespace flexmore::cuda {
namespace {

// Stores the rows where `row_of` says; `pair` gives columns (at, at + 1) of sum's order.
template <class T, class Pair, class RowOf>
__device__ __forceinline__ void store_rows(void* to, int64_t stride, const Problem& problem,
                                           const Mine& mine, int rows, Pair pair, RowOf row_of) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        T* out = static_cast<T*>(to) + row_of(i) * stride;
#pragma unroll
        for (int b = 0; b < 8; ++b) {
            uint32_t words[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) words[m] = pair(4 * (4 * b + m) + 2 * i, i);
            if (!problem.for_threads) exchange(words);
            const int column = mine.column + 32 * b;
            if (mine.row[i] < rows && column < problem.columns) {
                *reinterpret_cast<uint4*>(out + column) = {words[0], words[1], words[2], words[3]};
            }
        }
    }
}

template <class T, class Pair>
__device__ __forceinline__ void store(const Problems& p, const Problem& problem, const Mine& mine,
                                      int begin, int rows, Pair pair) {
    store_rows<T>(problem.out, problem.out_stride, problem, mine, rows, pair, [&](int i) {
        return int64_t(p.place == kSorted    ? begin + mine.row[i]
                       : p.place == kSegment ? mine.row[i]
                                             : mine.slot[i] / p.top_k);
    });
}
// Keeps what the nonlinearity reads of gate (0) or up (1), if it is wanted.
template <class T>
__device__ __forceinline__ void keep(const Problems& p, int which, const Problem& problem,
                                     const Tile& tile, const float (&sum)[128]) {
    if (p.kept[which] == nullptr) return;
    const Mine mine = find_mine(p, tile, false);
    store_rows<T>(
        p.kept[which], p.kept_stride[which], problem, mine, tile.rows,
        [&](int at, int) { return pack<T>(sum[at], sum[at + 1]); },
        [&](int i) { return int64_t(tile.begin + mine.row[i]); });
}

// silu(base_0 + product_0) * (base_1 + product_1). Half of the first base is loaded while the first
// product runs; the second product starts from its base. More loads ahead do not fit in registers.
template <class T, bool Training>
__device__ void compute_gated(const Problems& p, Shared& sh, int cluster, int clusters) {
    Ring<kStages> ring;
    int slot[2] = {};
#pragma unroll 1
    for (int index = cluster; index < sh.first[p.count]; index += clusters) {
        const Tile tile = find(p, sh, index);
        const Problem& problem = p.problem[tile.problem];
        const void* const base[2] = {problem.product[0].base, problem.product[1].base};
        const bool based = base[0] || base[1];
        Mine mine = find_mine(p, tile, based && index == cluster);
        if (index != cluster) mine.slot[0] = slot[0], mine.slot[1] = slot[1];
        Loaded loaded[2];
        const auto load = [&](int which, int i) {
            load_base<T>(loaded[i], base[which], mine.slot[i], p.top_k, mine.column,
                         problem.columns);
        };
        // The four threads of a row ask L2 for its four lines, before they are needed.
        const int line = min(tile.column + threadIdx.x % 4 * 64, problem.columns - 8);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const int64_t at = int64_t(mine.slot[i] / p.top_k) * problem.columns + line;
            if (base[0] && i == 1) prefetch_l2(static_cast<const T*>(base[0]) + at);
            if (base[1]) prefetch_l2(static_cast<const T*>(base[1]) + at);
        }
        if (base[0]) load(0, 0);
        float sum[128];
        uint32_t gate[64];
        clear(sum);
        multiply<T>(sh, ring, problem.product[0].steps, sum);
        if (base[0]) {
            load(0, 1);
            add_base<T, 0>(sum, loaded[0], problem.for_threads);
            add_base<T, 1>(sum, loaded[1], problem.for_threads);
        }
        if constexpr (Training) keep<T>(p, 0, problem, tile, sum);
#pragma unroll
        for (int i = 0; i < 64; ++i) {
            gate[i] = pack<T>(silu_for<T>(sum[2 * i]), silu_for<T>(sum[2 * i + 1]));
        }
        clear(sum);
        if (base[1]) {
            load(1, 0);
            add_base<T, 0>(sum, loaded[0], problem.for_threads);
            load(1, 1);
            add_base<T, 1>(sum, loaded[1], problem.for_threads);
        }
        multiply<T>(sh, ring, problem.product[1].steps, sum);
        if constexpr (Training) keep<T>(p, 1, problem, tile, sum);
        if (index + clusters < sh.first[p.count]) {
            const Mine next = find_mine(p, find(p, sh, index + clusters), true);
            slot[0] = next.slot[0], slot[1] = next.slot[1];
        }
        const Mine here = find_mine(p, tile, false);
        store<T>(p, problem, here, tile.begin, tile.rows, [&](int at, int) {
            const float2 g = unpack<T>(gate[at / 2]);
            return pack<T>(g.x * sum[at], g.y * sum[at + 1]);
        });
    }
}

// (product_0 + product_1) times the row's weight.
template <class T>
__device__ void compute_sum(const Problems& p, Shared& sh, int cluster, int clusters) {
    Ring<kStages> ring;
#pragma unroll 1
    for (int index = cluster; index < sh.first[p.count]; index += clusters) {
        const Tile tile = find(p, sh, index);
        const Problem& problem = p.problem[tile.problem];
        float sum[128];
        clear(sum);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            multiply<T>(sh, ring, problem.product[i].steps, sum);
        }
        const Mine mine = find_mine(p, tile, p.place == kToken);
        float weight[2] = {1, 1};
        if (p.weights) {
#pragma unroll
            for (int i = 0; i < 2; ++i) weight[i] = p.weights[mine.slot[i]];
        }
        store<T>(p, problem, mine, tile.begin, tile.rows, [&](int at, int i) {
            return pack<T>(weight[i] * sum[at], weight[i] * sum[at + 1]);
        });
    }
}

// Training's sums: (base_0 + product_0 + base_1 + product_1) times the row's weight. The first base
// is on its way while the tile before is stored and the products run.
template <class T>
__device__ void compute_training_sum(const Problems& p, Shared& sh, int cluster, int clusters) {
    Ring<kStages> ring;
    int slot[2], next_slot[2] = {};
    Loaded loaded[2];
    const auto load = [&](const Tile& tile, int which) {
        const Problem& problem = p.problem[tile.problem];
        const void* base = problem.product[which].base;
        if (base == nullptr) return;
        const int column = find_mine(p, tile, false).column;
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            load_base<T>(loaded[i], base, slot[i], p.top_k, column, problem.columns);
        }
    };
    if (cluster < sh.first[p.count]) {
        const Tile tile = find(p, sh, cluster);
        find_slots(p, tile, slot);
        load(tile, 0);
    }
#pragma unroll 1
    for (int index = cluster; index < sh.first[p.count]; index += clusters) {
        const Tile tile = find(p, sh, index);
        const Problem& problem = p.problem[tile.problem];
        const bool last = index + clusters >= sh.first[p.count];
        if (!last) find_slots(p, find(p, sh, index + clusters), next_slot);
        float sum[128];
        clear(sum);
#pragma unroll 1
        for (int i = 0; i < 2; ++i) {
            const Product& product = problem.product[i];
            if (uniform(product.transposed)) {
                multiply<T, true>(sh, ring, product.steps, sum);
            } else {
                multiply<T>(sh, ring, product.steps, sum);
            }
        }
#pragma unroll 1
        for (int which = 0; which < 2; ++which) {
            if (problem.product[which].base == nullptr) break;
            if (which > 0) load(tile, which);
            settle(loaded);
            add_base<T, 0>(sum, loaded[0], problem.for_threads);
            add_base<T, 1>(sum, loaded[1], problem.for_threads);
        }
        float weight[2] = {1, 1};
        if (p.weights) {
#pragma unroll
            for (int i = 0; i < 2; ++i) weight[i] = p.weights[slot[i]];
        }
        Mine mine = find_mine(p, tile, false);
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            mine.slot[i] = slot[i];
            slot[i] = next_slot[i];
        }
        if (!last) load(find(p, sh, index + clusters), 0);
        store<T>(p, problem, mine, tile.begin, tile.rows, [&](int at, int i) {
            return pack<T>(weight[i] * sum[at], weight[i] * sum[at + 1]);
        });
    }
}

template <class T, bool Gated, bool Training>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_kernel(const __grid_constant__ Problems p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) unsigned char raw[];
    Shared& sh = *reinterpret_cast<Shared*>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            sh.full[i].init(1);
            sh.empty[i].init(kBlocks * kGroups * kWarpgroup / 32);
        }
        fence_barrier_init();
        int total = 0;
        for (int q = 0; q < p.count; ++q) {
            const Problem& problem = p.problem[q];
            sh.first[q] = total;
            const bool all = problem.expert < 0;
            sh.begin[q] = all ? 0 : p.row_offsets[problem.expert];
            sh.rows[q] = all ? problem.rows : p.row_offsets[problem.expert + 1] - sh.begin[q];
            total += (sh.rows[q] + kBlocks * kRows - 1) / (kBlocks * kRows) *
                     ((problem.columns + kColumns - 1) / kColumns);
        }
        sh.first[p.count] = total;
    }
    cluster_sync();
    const int cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks;
    if (threadIdx.x < kWarpgroup) {
        fewer_registers<Gated ? 24 : 40>();
        if (threadIdx.x == 0) copy_operands<Training>(p, sh, cluster, clusters);
    } else {
        more_registers<Gated ? 240 : 232>();
        if constexpr (Gated) {
            compute_gated<T, Training>(p, sh, cluster, clusters);
        } else if constexpr (Training) {
            compute_training_sum<T>(p, sh, cluster, clusters);
        } else {
            compute_sum<T>(p, sh, cluster, clusters);
        }
    }
    cluster_sync();  // no arrival at a block that is gone
#endif
}

template <class T, bool Gated, bool Training>
void launch(const Problems& p, int blocks, cudaStream_t stream) {
    launch_clusters(grouped_gemm_kernel<T, Gated, Training>, kBlocks,
                    unsigned(blocks / kBlocks * kBlocks), kThreads, sizeof(Shared), stream,
                    "grouped_gemm", p);
}

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

bool lies_transposed(const Tensor& right) { return right.numel() > 0 && right.stride(1) != 1; }
// Whether boxes can have the rows in the threads' order; a missing operand in any.
bool in_order(const Tensor& right) { return right.size(0) % 32 == 0 && !lies_transposed(right); }

// Problem q is of expert experts[q], or of all rows if that is -1, and writes out[q]; its operands
// are entries 2 q and 2 q + 1 of the other lists, empty for none. A right operand lies transposed
// if its rows' entries are apart. kept_gate_NF and kept_up_NF: what the gated form keeps.
void grouped_gemm(Tensors left, Tensors right, Tensors base, Tensors out, Ints experts, Ints places,
                  Tensor row_offsets, Tensor row_to_slot_N, OptionalTensor weights_TK,
                  int64_t top_k, int64_t place, bool gated, OptionalTensor kept_gate_NF,
                  OptionalTensor kept_up_NF) {
    const Tensor& like = out.at(0);
    const OnDevice guard(like);
    const ScalarType dtype = like.scalar_type();
    const size_t entries = 2 * experts.size();
    STD_TORCH_CHECK(experts.size() <= kMaxProblems && out.size() == experts.size() &&
                        left.size() == entries && right.size() == entries &&
                        base.size() == entries && places.size() == entries,
                    "grouped_gemm: lists of wrong lengths");
    Problems p{};
    p.row_offsets = data<int32_t>(row_offsets);
    p.row_to_slot = data<int32_t>(row_to_slot_N);
    p.weights = data<float>(weights_TK);
    p.count = int(experts.size());
    p.top_k = int(top_k);
    p.place = int(place);
    bool training = kept_gate_NF || kept_up_NF;
    const Tensor* const kept[2] = {pointer(kept_gate_NF), pointer(kept_up_NF)};
    for (int i = 0; i < 2; ++i) {
        if (!kept[i]) continue;
        STD_TORCH_CHECK(gated && kept[i]->scalar_type() == dtype && kept[i]->stride(1) == 1 &&
                            kept[i]->stride(0) % 8 == 0 && kept[i]->size(1) == out[0].size(1) &&
                            aligned(kept[i]->const_data_ptr(), 0, 16),
                        "grouped_gemm: rows that cannot be kept");
        p.kept[i] = kept[i]->mutable_data_ptr();
        p.kept_stride[i] = kept[i]->stride(0);
    }
    for (int q = 0; q < p.count; ++q) {
        Problem& problem = p.problem[q];
        problem.out = out[q].mutable_data_ptr();
        problem.out_stride = out[q].stride(0);
        problem.columns = int(out[q].size(1));
        problem.rows = int(out[q].size(0));
        problem.expert = int(experts[q]);
        problem.for_threads = in_order(right[2 * q]) && in_order(right[2 * q + 1]);
        for (int i = 0; i < 2; ++i) {
            Product& product = problem.product[i];
            const int at = 2 * q + i;
            const Tensor &l = left[at], &r = right[at], &b = base[at], &o = out[q];
            product.transposed = !gated && lies_transposed(r);
            for (const Tensor* t : {&l, &r, &b, &o}) {
                const int along = t == &r && product.transposed ? 0 : 1;  // of entries in a row
                STD_TORCH_CHECK(
                    t->numel() == 0 ||
                        (t->dim() == 2 && t->scalar_type() == dtype && t->stride(along) == 1 &&
                         t->stride(1 - along) % 8 == 0 && (along == 0 || t->size(1) % 8 == 0) &&
                         aligned(t->const_data_ptr(), 0, 16)),
                    "grouped_gemm: an operand that cannot be copied in boxes");
            }
            STD_TORCH_CHECK(b.numel() == 0 || (b.is_contiguous() && b.size(1) == o.size(1)),
                            "grouped_gemm: a base must be as wide as the result");
            product.place = int(places[at]);
            product.base = b.numel() ? b.const_data_ptr() : nullptr;
            product.steps = l.numel() ? int(ceil_div(l.size(1), kDepth)) : 0;
            if (product.steps == 0) continue;
            product.left = tensor_map(l.const_data_ptr(), dtype, l.size(0), l.size(1), l.stride(0),
                                      kRows, false);
            product.right = product.transposed
                                ? tensor_map(r.const_data_ptr(), dtype, r.size(1), r.size(0),
                                             r.stride(1), kDepth, false)
                                : tensor_map(r.const_data_ptr(), dtype, r.size(0), r.size(1),
                                             r.stride(0), kColumns / kBlocks, problem.for_threads);
        }
        Product& first = problem.product[0];
        if (!gated && !first.base) std::swap(first.base, problem.product[1].base);
        training |= first.transposed || problem.product[1].transposed || (!gated && first.base);
    }
    const int blocks = multiprocessors(like.get_device_index());
    const cudaStream_t stream = current_stream(like);
    const auto go = [&](auto tag) {
        using Elem = decltype(tag);
        if (training) {
            (gated ? launch<Elem, true, true> : launch<Elem, false, true>)(p, blocks, stream);
        } else {
            (gated ? launch<Elem, true, false> : launch<Elem, false, false>)(p, blocks, stream);
        }
    };
    if (dtype == ScalarType::Half) {
        go(__half{});
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "grouped_gemm: 16-bit floats only");
        go(__nv_bfloat16{});
    }
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("grouped_gemm", TORCH_BOX(&flexmore::cuda::grouped_gemm));
}
