// Gradients of matrices that multiply rows sorted by expert, on Hopper: for several experts and
// matrices at once out (M, N) = left^T right, summed over the expert's rows, or over all.
// Mathematics: reference/grouped_gemm.py and, for factors, reference/lowrank.py.
//
// Floors: 2 n M N operations for n rows, at 790 TFLOP/s; 2 n (M + N) bytes of memory, which are
// what counts where M or N is a rank below about 512. A block's tile of 128 x 256 asks L2 for 48 KB
// (32 KB in pairs of blocks) and shared memory for 80 KB every 1024 cycles of the tensor cores.
// Measured on an H100: 690 TFLOP/s for seven matrices of 11008 x 4096, 2.8 to 2.95 TB/s for ranks
// to 128. Four boxes take the copying thread 1330 cycles, without copies a step takes 1025: large
// results wait for it.
//
// A block stays on its multiprocessor and takes tiles in turn. One thread copies boxes of 64 rows
// and 64 columns through tensor maps, in place; rows are what is summed over, so both operands lie
// by columns in shared memory, which a product of 16-bit floats can read. Two warpgroups multiply
// 64 rows of the result each, 64, 128 or 256 columns as there are. Blocks in pairs own neighbouring
// rows and share the right operand by multicast or, of a result of at most 128 rows, neighbouring
// columns. An expert's rows end anywhere: of the last 64 the others' are overwritten with zeros in
// shared memory.
//
// A result of few tiles leaves multiprocessors idle: its rows are cut into parts, a fixed number,
// whose sums in float32 a second kernel adds up in order.
#include <vector>

#include "grouped_gemm_dweight.cuh"

namespace flexmore::cuda {
namespace weight_grad {
namespace {

// Among the four threads that share a row of a product's result: words[m] of thread q and words[q]
// of thread m change places. So 4 pairs of columns, 8 apart, become 8 columns in a row.
__device__ __forceinline__ void gather_columns(uint32_t (&words)[4]) {
#pragma unroll
    for (int bit = 1; bit <= 2; bit *= 2) {
        const bool set = threadIdx.x & bit;
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            if (m & bit) continue;
            const uint32_t sent = set ? words[m] : words[m + bit];
            const uint32_t other = __shfl_xor_sync(kFullWarp, sent, bit);
            (set ? words[m] : words[m + bit]) = other;
        }
    }
}

template <class T, int Size>
__device__ __forceinline__ void store(const Problems& p, const Tile& tile, float (&sum)[Size]) {
    const Problem& problem = p.problem[tile.problem];
    const int lane = threadIdx.x % 32;
    const int first = tile.row + (threadIdx.x - kWarpgroup) / 32 * 16 + lane / 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = first + 8 * i;
        if (problem.planes) {
            float* plane =
                problem.planes + (int64_t(tile.part) * problem.height + row) * problem.width;
#pragma unroll
            for (int j = 0; j < Size / 4; ++j) {
                const int column = tile.column + 8 * j + lane % 4 * 2;
                if (row < problem.height && column < problem.width) {
                    *reinterpret_cast<float2*>(plane + column) = {sum[4 * j + 2 * i],
                                                                  sum[4 * j + 2 * i + 1]};
                }
            }
            continue;
        }
        T* out = static_cast<T*>(problem.out) + row * problem.out_stride;
#pragma unroll
        for (int b = 0; b < Size / 16; ++b) {
            uint32_t words[4];
#pragma unroll
            for (int m = 0; m < 4; ++m) {
                const int at = 4 * (4 * b + m) + 2 * i;
                words[m] = pack<T>(sum[at], sum[at + 1]);
            }
            gather_columns(words);
            const int column = tile.column + 32 * b + lane % 4 * 8;
            if (row < problem.height && column < problem.width) {
                *reinterpret_cast<uint4*>(out + column) = {words[0], words[1], words[2], words[3]};
            }
        }
    }
}

template <class T, int Width>
__device__ __forceinline__ void compute_tile(const Problems& p, Shared& sh, Ring<kStages>& ring,
                                             const Tile& tile) {
    float sum[Width / 2];
    multiply<T>(sh, ring, tile, sum);
    store<T>(p, tile, sum);
}

template <class T>
__device__ void compute(const Problems& p, Shared& sh, int cluster, int clusters) {
    const int group = uniform(threadIdx.x / kWarpgroup) - 1;
    Ring<kStages> ring;
#pragma unroll 1
    for (int index = cluster; index < p.first[p.count]; index += clusters) {
        const Tile tile = find(p, sh, index);
        const Problem& problem = p.problem[tile.problem];
        const int columns = problem.width - tile.column;
        if (columns <= 0 || tile.row + group * kBox >= problem.height) {
            for (int step = 0; step < tile.steps; ++step) {  // nothing of the result is here
                sh.full[ring.slot].wait(ring.parity);
                release<kBlocks>(&sh.empty[ring.slot]);
                ring.next();
            }
        } else if (columns <= 64) {
            compute_tile<T, 64>(p, sh, ring, tile);
        } else if (columns <= 128) {
            compute_tile<T, 128>(p, sh, ring, tile);
        } else {
            compute_tile<T, 256>(p, sh, ring, tile);
        }
    }
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    grouped_gemm_dweight_kernel(const __grid_constant__ Problems p) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(1024) unsigned char raw[];
    Shared& sh = *reinterpret_cast<Shared*>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            sh.full[i].init(1);
            sh.empty[i].init(kBlocks * kGroups * kWarpgroup / 32);
        }
        fence_barrier_init();
    }
    for (int q = threadIdx.x; q < p.count; q += kThreads) {
        const Problem& problem = p.problem[q];
        const bool all = problem.expert < 0;
        sh.begin[q] = all ? 0 : p.row_offsets[problem.expert];
        sh.rows[q] = all ? problem.rows : p.row_offsets[problem.expert + 1] - sh.begin[q];
    }
    cluster_sync();
    const int cluster = blockIdx.x / kBlocks, clusters = gridDim.x / kBlocks;
    if (threadIdx.x < kWarpgroup) {
        fewer_registers<40>();
        if (threadIdx.x == 0) copy_operands(p, sh, cluster, clusters);
    } else {
        more_registers<232>();
        compute<T>(p, sh, cluster, clusters);
    }
    cluster_sync();  // no arrival at a block that is gone
#endif
}

struct Sum {
    const float* planes;
    void* out;
    int64_t out_stride;
    int height, width;
};
struct Sums {
    Sum sum[kMaxProblems];
    int parts;
};
constexpr int kSumThreads = 256;

// out = the planes' sum in order; a thread adds 8 columns.
template <class T>
__global__ void __launch_bounds__(kSumThreads)
    grouped_gemm_dweight_sum_kernel(const __grid_constant__ Sums p) {
    const Sum& s = p.sum[blockIdx.y];
    const int64_t size = int64_t(s.height) * s.width;
    const int64_t at = (int64_t(blockIdx.x) * kSumThreads + threadIdx.x) * 8;
    if (at >= size) return;
    float sum[8] = {};
#pragma unroll 4
    for (int part = 0; part < p.parts; ++part) {
        const auto* plane = reinterpret_cast<const float4*>(s.planes + part * size + at);
        const float4 low = plane[0], high = plane[1];
        sum[0] += low.x, sum[1] += low.y, sum[2] += low.z, sum[3] += low.w;
        sum[4] += high.x, sum[5] += high.y, sum[6] += high.z, sum[7] += high.w;
    }
    T* out = static_cast<T*>(s.out) + at / s.width * s.out_stride + at % s.width;
    *reinterpret_cast<uint4*>(out) = {pack<T>(sum[0], sum[1]), pack<T>(sum[2], sum[3]),
                                      pack<T>(sum[4], sum[5]), pack<T>(sum[6], sum[7])};
}

template <class T>
void launch(const Problems& p, int clusters, cudaStream_t stream) {
    launch_clusters(grouped_gemm_dweight_kernel<T>, kBlocks,
                    unsigned(std::min(clusters, p.first[p.count]) * kBlocks), kThreads,
                    sizeof(Shared), stream, "grouped_gemm_dweight", p);
    if (p.parts == 1) return;
    Sums sums{};
    sums.parts = p.parts;
    int64_t most = 0;
    for (int q = 0; q < p.count; ++q) {
        const Problem& problem = p.problem[q];
        sums.sum[q] = {problem.planes, problem.out, problem.out_stride, problem.height,
                       problem.width};
        most = std::max(most, int64_t(problem.height) * problem.width);
    }
    const dim3 grid(unsigned(ceil_div(most, 8 * kSumThreads)), unsigned(p.count));
    grouped_gemm_dweight_sum_kernel<T><<<grid, kSumThreads, 0, stream>>>(sums);
    check_launch("grouped_gemm_dweight: sum");
}

// Into how many parts rows are cut: what takes the fewest cycles by a rough count of turns of the
// clusters at 1024 a step, of the operands' bytes from memory, and of the planes', which L2 holds
// for the most part. `rows`: of an expert, about, since the counts are on the device.
int count_parts(const Problems& p, int clusters, int64_t rows) {
    const int64_t steps = std::max<int64_t>(1, ceil_div(rows, kDepth)), tiles = p.first[p.count];
    int64_t lines = 0, numbers = 0;
    for (int q = 0; q < p.count; ++q) {
        lines += p.problem[q].height + p.problem[q].width;
        numbers += int64_t(p.problem[q].height) * p.problem[q].width;
    }
    constexpr int64_t kMost = 16, kMemory = 1750, kPlanes = 1400, kSecondKernel = 8000;
    int best = 1;
    int64_t fewest = INT64_MAX;
    for (int64_t parts = 1; parts <= std::min(kMost, ceil_div(steps, 4)); ++parts) {
        const int64_t turns = ceil_div(tiles * parts, clusters) * ceil_div(steps, parts) * 1024;
        const int64_t read = lines * steps * kDepth * 2 / kMemory;
        const int64_t sums = parts == 1 ? 0 : kSecondKernel + numbers * 8 * parts / kPlanes;
        if (std::max(turns, read) + sums < fewest) {
            fewest = std::max(turns, read) + sums;
            best = int(parts);
        }
    }
    return best;
}

using Tensors = std::vector<Tensor>;
using Ints = std::vector<int64_t>;

// out[q] = left[q]^T right[q] over the rows of experts[q], or all if that is -1. sorted: of each
// left, then of each right operand, whether its rows are sorted ones. parts: 0 to choose.
void grouped_gemm_dweight(Tensors left, Tensors right, Tensors out, Ints experts, Ints left_sorted,
                          Ints right_sorted, Tensor row_offsets, int64_t num_rows, int64_t parts) {
    const size_t count = experts.size();
    STD_TORCH_CHECK(count <= kMaxProblems && out.size() == count && left.size() == count &&
                        right.size() == count && left_sorted.size() == count &&
                        right_sorted.size() == count && parts >= 0,
                    "grouped_gemm_dweight: lists of wrong lengths");
    const Tensor& like = out.at(0);
    const OnDevice guard(like);
    const ScalarType dtype = like.scalar_type();
    Problems p{};
    p.row_offsets = data<int32_t>(row_offsets);
    p.count = int(count);
    const int64_t num_experts = row_offsets.size(0) - 1;
    int64_t usual_rows = ceil_div(num_rows, std::max<int64_t>(num_experts, 1)), numbers = 0;
    for (int q = 0; q < p.count; ++q) {
        const Tensor &l = left[q], &r = right[q], &o = out[q];
        for (const Tensor* t : {&l, &r, &o}) {
            STD_TORCH_CHECK(t->dim() == 2 && t->scalar_type() == dtype && t->stride(1) == 1 &&
                                t->stride(0) % 8 == 0 && t->size(1) % 8 == 0 &&
                                t->size(0) < (1 << 30) && aligned(t->const_data_ptr(), 0, 16),
                            "grouped_gemm_dweight: a matrix that cannot be copied in boxes");
        }
        STD_TORCH_CHECK(o.size(0) == l.size(1) && o.size(1) == r.size(1) &&
                            experts[q] < num_experts && (experts[q] >= 0 || l.size(0) == r.size(0)),
                        "grouped_gemm_dweight: sizes that do not fit, of problem ", q);
        Problem& problem = p.problem[q];
        problem.out = o.mutable_data_ptr();
        problem.out_stride = o.stride(0);
        problem.height = int(o.size(0));
        problem.width = int(o.size(1));
        problem.expert = int(experts[q]);
        problem.rows = int(l.size(0));
        problem.left_sorted = left_sorted[q];
        problem.right_sorted = right_sorted[q];
        problem.beside = problem.height <= kHeight;
        if (problem.expert < 0) usual_rows = std::max<int64_t>(usual_rows, problem.rows);
        if (l.numel() == 0 || r.numel() == 0) {  // no row, and no map of none
            problem.expert = -1;
            problem.rows = 0;
        } else {
            problem.left = tensor_map(l.const_data_ptr(), dtype, l.size(0), l.size(1), l.stride(0),
                                      kDepth, false);
            problem.right = tensor_map(r.const_data_ptr(), dtype, r.size(0), r.size(1), r.stride(0),
                                       kDepth, false);
        }
        const int64_t tiles = int64_t(tiles_down(problem.height, problem.beside)) *
                              tiles_across(problem.width, problem.beside);
        p.first[q + 1] = int(p.first[q] + tiles);
        numbers += int64_t(problem.height) * problem.width;
    }
    if (numbers == 0) return;
    const int clusters = multiprocessors(like.get_device_index()) / kBlocks;
    p.parts = parts > 0 ? int(parts) : count_parts(p, clusters, usual_rows);
    Tensor planes;
    if (p.parts > 1) {
        planes = empty(like, {p.parts * numbers}, ScalarType::Float);
        float* next = mutable_data<float>(planes);
        for (int q = 0; q < p.count; ++q) {
            Problem& problem = p.problem[q];
            problem.planes = next;
            next += int64_t(p.parts) * problem.height * problem.width;
            p.first[q + 1] = p.first[q] + p.parts * tiles_down(problem.height, problem.beside) *
                                              tiles_across(problem.width, problem.beside);
        }
    }
    const cudaStream_t stream = current_stream(like);
    if (dtype == ScalarType::Half) {
        launch<__half>(p, clusters, stream);
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::BFloat16, "grouped_gemm_dweight: 16-bit floats only");
        launch<__nv_bfloat16>(p, clusters, stream);
    }
}

}  // namespace
}  // namespace weight_grad
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("grouped_gemm_dweight", TORCH_BOX(&flexmore::cuda::weight_grad::grouped_gemm_dweight));
}
