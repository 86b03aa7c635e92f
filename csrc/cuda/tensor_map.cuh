// What Hopper's large tiles need besides hopper.cuh: tensor maps and the copies that use them,
// pairs of blocks, and products of 64 x 256 from operands in the 128-byte swizzled layout.
#pragma once

#include <cuda.h>

#include "hopper.cuh"

namespace flexmore::cuda {

constexpr int kDepth = 64;  // summed columns of a tile in shared memory: 128 bytes of a row

// A (rows, columns) matrix of 16-bit elements whose rows are `stride` elements apart, copied in
// boxes of `box` rows and kDepth columns; what lies outside reads as zero.
//
// Among 32 rows a box may have them in another order, `for_threads`: row 8 q + 2 m + i of the
// matrix is row 8 m + 2 q + i of the box. As the right operand of a product they are its columns,
// and each thread, q of its row's four, then has 8 neighbouring ones. The rows must be a multiple
// of 32.
inline CUtensorMap tensor_map(const void* data, ScalarType dtype, int64_t rows, int64_t columns,
                              int64_t stride, int box, bool for_threads) {
    using Encode =
        CUresult (*)(CUtensorMap*, CUtensorMapDataType, cuuint32_t, void*, const cuuint64_t*,
                     const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                     CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill);
    static const Encode encode = [] {
        void* found = nullptr;
        cudaDriverEntryPointQueryResult result;
#if CUDART_VERSION >= 12050
        check_cuda(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                                    cudaEnableDefault, &result),
                   "cuTensorMapEncodeTiled");
#else
        check_cuda(
            cudaGetDriverEntryPoint("cuTensorMapEncodeTiled", &found, cudaEnableDefault, &result),
            "cuTensorMapEncodeTiled");
#endif
        STD_TORCH_CHECK(result == cudaDriverEntryPointSuccess, "cuTensorMapEncodeTiled is missing");
        return reinterpret_cast<Encode>(found);
    }();
    const cuuint64_t row = cuuint64_t(stride) * 2, width = cuuint64_t(columns);
    const cuuint64_t plain_sizes[5] = {width, cuuint64_t(rows), 1, 1, 1};
    const cuuint64_t plain_strides[4] = {row, row, row, row};
    const cuuint32_t plain_box[5] = {kDepth, cuuint32_t(box), 1, 1, 1};
    const cuuint64_t sizes[5] = {width, 2, 4, 4, cuuint64_t(rows / 32)};
    const cuuint64_t strides[4] = {row, 8 * row, 2 * row, 32 * row};  // of i, q, m, 32 rows
    const cuuint32_t boxes[5] = {kDepth, 2, 4, 4, cuuint32_t(box / 32)};
    const cuuint32_t steps[5] = {1, 1, 1, 1, 1};
    CUtensorMap map;
    const CUresult error =
        encode(&map,
               dtype == ScalarType::Half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16
                                         : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16,
               5, const_cast<void*>(data), for_threads ? sizes : plain_sizes,
               for_threads ? strides : plain_strides, for_threads ? boxes : plain_box, steps,
               CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    STD_TORCH_CHECK(error == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error ", int(error), " for ",
                    rows, " x ", columns, ", stride ", stride);
    return map;
}

// Copies the map's box at (row, column) and counts its bytes on the barrier; with Blocks > 1 into
// the same place of every block of the cluster, on each one's barrier.
template <int Blocks>
__device__ __forceinline__ void copy_box(void* to, const CUtensorMap& map, int column, int row,
                                         bool for_threads, Barrier* barrier) {
    const int plain = for_threads ? 0 : row, thirties = for_threads ? row / 32 : 0;
    if constexpr (Blocks == 1) {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes "
            "[%0], [%1, {%3, %4, 0, 0, %5}], [%2];" ::"r"(shared_address(to)),
            "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column),
            "r"(plain), "r"(thirties)
            : "memory");
    } else {
        asm volatile(
            "cp.async.bulk.tensor.5d.shared::cluster.global.mbarrier::complete_tx::bytes"
            ".multicast::cluster [%0], [%1, {%3, %4, 0, 0, %5}], [%2], %6;" ::"r"(
                shared_address(to)),
            "l"(reinterpret_cast<uint64_t>(&map)), "r"(shared_address(barrier)), "r"(column),
            "r"(plain), "r"(thirties), "h"(uint16_t((1 << Blocks) - 1))
            : "memory");
    }
}

__device__ __forceinline__ int block_in_cluster() {
    uint32_t rank;
    asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
    return int(rank);
}
__device__ __forceinline__ void cluster_sync() {
    asm volatile(
        "barrier.cluster.arrive.release.aligned;\n"
        "barrier.cluster.wait.acquire.aligned;" ::
            : "memory");
}
// Arrives at the barrier in the same place of another block of the cluster, to say that what it
// guards was read: no fence, as .release.cluster would make, since nothing was written.
__device__ __forceinline__ void arrive_at(Barrier* barrier, int block) {
    asm volatile(
        "{\n"
        ".reg .b32 there;\n"
        "mapa.shared::cluster.u32 there, %0, %1;\n"
        "mbarrier.arrive.shared::cluster.b64 _, [there];\n"
        "}\n" ::"r"(shared_address(barrier)),
        "r"(block)
        : "memory");
}

// Of a warp: arrives there in each of the cluster's blocks.
template <int Blocks>
__device__ __forceinline__ void release(Barrier* barrier) {
    const int lane = threadIdx.x % 32;
    if (lane < Blocks) arrive_at(barrier, lane);
}

// An operand of rows of 128 bytes as tensor maps write it: 16-byte groups swizzled by the row's
// last three bits. Tiles start at multiples of 1024 bytes; column 16 k is 32 k bytes on.
__device__ __forceinline__ uint64_t swizzled_operand(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(1) << 16 | uint64_t(1024 >> 4) << 32 |
           uint64_t(1) << 62;
}

// The same of an operand that lies transposed, a summed column in 128 bytes of a row: boxes of 64
// of its entries and kDepth summed columns, one after the other; summed column 16 k is 2048 k bytes
// on.
__device__ __forceinline__ uint64_t swizzled_transposed(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(128 * kDepth >> 4) << 16 |
           uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}

// d (64 x 256) += a (64 x 16) b (256 x 16)^T; where d's elements are: as `product`. b may lie
// transposed.
#define FM_8(i)                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define FM_64(i)                                                                                \
    FM_8(i), FM_8(i + 8), FM_8(i + 16), FM_8(i + 24), FM_8(i + 32), FM_8(i + 40), FM_8(i + 48), \
        FM_8(i + 56)
#define FM_LARGE_PRODUCT(TYPE)                                                                     \
    asm volatile(                                                                                  \
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                             \
        "wgmma.mma_async.sync.aligned.m64n256k16.f32." TYPE "." TYPE                               \
        " {%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,%23," \
        "%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%41,%42,%43,%44,%45," \
        "%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67," \
        "%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89," \
        "%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,%108,"    \
        "%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,"    \
        "%126,%127}, %128, %129, add, 1, 1, 0, %130;\n}\n"                                         \
        : FM_64(0), FM_64(64)                                                                      \
        : "l"(a), "l"(b), "n"(int(Transposed)))
template <class T, bool Transposed = false>
__device__ __forceinline__ void large_product(float (&d)[128], uint64_t a, uint64_t b) {
    if constexpr (std::is_same_v<T, __half>) {
        FM_LARGE_PRODUCT("f16");
    } else {
        FM_LARGE_PRODUCT("bf16");
    }
}
#undef FM_8
#undef FM_64
#undef FM_LARGE_PRODUCT

}  // namespace flexmore::cuda
