// Rows sorted by expert times each expert's own matrices, on Hopper. Mathematics:
// reference/grouped_gemm.py, reference/lowrank.py and, for the gated form, reference/experts.py.
//
//   plain   out = left_0 right_0^T + left_1 right_1^T, for the rows of an expert or all tokens
//   gated   out = silu(base_g + left_g right_g^T) * (base_u + left_u right_u^T), where a base is a
//           row of (T, F), the token's, or nothing, and so is a product
//
// Floor: 2 n O I operations, at 790 TFLOP/s; the tile of 128 x 256 asks L2 for 48 KB (32 KB in
// pairs of blocks) and shared memory for 80 KB every 1024 cycles of the tensor cores.
//
// A block stays on its multiprocessor and takes tiles of 128 rows and 256 columns in turn. One
// thread copies operands, 64 summed columns a stage, through tensor maps, in place; two warpgroups
// multiply 64 rows each, and are at different places of the ring, so that while one stores its tile
// or computes its gates, the other keeps the tensor cores busy. A gated tile is two products one
// after the other in the same registers, silu(g) waiting in 16 bits for u: that keeps the tile at
// 256 columns. Blocks in pairs own neighbouring rows and share the right operand by multicast.
#include <vector>

#include "grouped_gemm.cuh"

namespace flexmore::cuda {
namespace {

// Stores the rows; `pair` gives columns (at, at + 1) of sum's order.
template <class T, class Pair>
__device__ __forceinline__ void store(const Problems& p, const Problem& problem, const Mine& mine,
                                      int begin, int rows, Pair pair) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int64_t row = p.place == kSorted    ? begin + mine.row[i]
                            : p.place == kSegment ? mine.row[i]
                                                  : mine.slot[i] / p.top_k;
        T* out = static_cast<T*>(problem.out) + row * problem.out_stride;
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

// silu(base_0 + product_0) * (base_1 + product_1). Half of the first base is loaded while the first
// product runs; the second product starts from its base. More loads ahead do not fit in registers.
template <class T>
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

template <class T, bool Gated>
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
        if (threadIdx.x == 0) copy_operands(p, sh, cluster, clusters);
    } else {
        more_registers<Gated ? 240 : 232>();
        if constexpr (Gated) {
            compute_gated<T>(p, sh, cluster, clusters);
        } else {
            compute_sum<T>(p, sh, cluster, clusters);
        }
    }
    cluster_sync();  // no arrival at a block that is gone
#endif
}

template <class T, bool Gated>
void launch(const Problems& p, int blocks, cudaStream_t stream) {
    const auto kernel = grouped_gemm_kernel<T, Gated>;
    const int shared = sizeof(Shared);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
               "grouped_gemm: shared memory");
    cudaLaunchAttribute attribute;
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = kBlocks;
    attribute.val.clusterDim.y = attribute.val.clusterDim.z = 1;
    cudaLaunchConfig_t config{};
    config.gridDim = dim3(blocks / kBlocks * kBlocks);
    config.blockDim = dim3(kThreads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = &attribute;
    config.numAttrs = 1;
    check_cuda(cudaLaunchKernelEx(&config, kernel, p), "grouped_gemm");
}

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// Problem q is of expert experts[q], or of all rows if that is -1, and writes out[q]; its operands
// are entries 2 q and 2 q + 1 of the other lists, empty for none.
void grouped_gemm(Tensors left, Tensors right, Tensors base, Tensors out, Ints experts, Ints places,
                  Tensor row_offsets, Tensor row_to_slot_N, OptionalTensor weights_TK,
                  int64_t top_k, int64_t place, bool gated) {
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
    for (int q = 0; q < p.count; ++q) {
        Problem& problem = p.problem[q];
        problem.out = out[q].mutable_data_ptr();
        problem.out_stride = out[q].stride(0);
        problem.columns = int(out[q].size(1));
        problem.rows = int(out[q].size(0));
        problem.expert = int(experts[q]);
        problem.for_threads = right[2 * q].size(0) % 32 == 0 && right[2 * q + 1].size(0) % 32 == 0;
        for (int i = 0; i < 2; ++i) {
            Product& product = problem.product[i];
            const int at = 2 * q + i;
            const Tensor &l = left[at], &r = right[at], &b = base[at], &o = out[q];
            for (const Tensor* t : {&l, &r, &b, &o}) {
                STD_TORCH_CHECK(
                    t->numel() == 0 || (t->dim() == 2 && t->scalar_type() == dtype &&
                                        t->stride(1) == 1 && t->stride(0) % 8 == 0 &&
                                        t->size(1) % 8 == 0 && aligned(t->const_data_ptr(), 0, 16)),
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
            product.right = tensor_map(r.const_data_ptr(), dtype, r.size(0), r.size(1), r.stride(0),
                                       kColumns / kBlocks, problem.for_threads);
        }
    }
    const int blocks = multiprocessors(like.get_device_index());
    const cudaStream_t stream = current_stream(like);
    const auto go = [&](auto tag) {
        using Elem = decltype(tag);
        (gated ? launch<Elem, true> : launch<Elem, false>)(p, blocks, stream);
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
