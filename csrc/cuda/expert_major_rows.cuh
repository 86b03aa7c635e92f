// What the expert-major kernels share: tiles of 16 rows of one expert, and products of such tiles
// by mma.sync, m16n8k16, whose operands come straight from memory.
//
// A lane of a warp is (g, q) = (lane / 4, lane % 4). Of a product's 16 x 8 result it holds rows g
// and g + 8, columns 2q and 2q + 1. Which columns of memory these are is ours to choose, and so is
// the order of the summed ones, as long as both operands agree. So that a lane moves 16 contiguous
// bytes, four products side by side make 32 columns, of which the lane holds 8q .. 8q + 7; and of
// 16 summed ones it holds 4q .. 4q + 3.
#pragma once

#include <cstdint>

#include "mma.cuh"

namespace flexmore::cuda {
namespace {

constexpr int kTileRows = 16;

// 16 bytes that another block has written in this launch: L1 is not asked. After the counter that
// says so was read; volatile keeps that order.
__device__ __forceinline__ uint4 load_from_l2(const void* p) {
    uint4 v;
    asm volatile("ld.global.cg.v4.u32 {%0,%1,%2,%3}, [%4];"
                 : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
                 : "l"(p)
                 : "memory");
    return v;
}

// Copies 16 bytes to shared memory in the background, or zeros; 16-byte aligned both.
__device__ __forceinline__ void copy_words(void* to, const void* from, bool exists) {
    copy_async<16, false>(shared_address(to), from, exists);
}

// One expert's tiles of 16 rows, numbered over all experts.
struct Tile {
    int expert, row, live;  // its first row, and how many of its 16 rows exist
};

// first_tile[e] = number of tiles of the experts before e, e = 0 .. E. By all threads of the block.
template <class Count>
__device__ void find_tiles(const Count& count_of, int E, int rows_per_tile, int32_t* first_tile) {
    __shared__ int32_t warp_sums[32];
    const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
    int32_t running = 0;
    for (int base = 0; base < E; base += blockDim.x) {
        const int e = base + threadIdx.x;
        int32_t inclusive = 0;
        if (e < E) {
            inclusive = (count_of(e) + rows_per_tile - 1) / rows_per_tile;
        }
        const int32_t own = inclusive;
#pragma unroll
        for (int offset = 1; offset < 32; offset *= 2) {
            const int32_t below = __shfl_up_sync(kFullWarp, inclusive, offset);
            if (lane >= offset) inclusive += below;
        }
        if (lane == 31) warp_sums[warp] = inclusive;
        __syncthreads();
        int32_t before = running, all = 0;
        for (int w = 0; w < warps; ++w) {
            before += w < warp ? warp_sums[w] : 0;
            all += warp_sums[w];
        }
        if (e < E) first_tile[e] = before + inclusive - own;
        running += all;
        __syncthreads();
    }
    if (threadIdx.x == 0) first_tile[E] = running;
    __syncthreads();
}

// The expert of a tile, from first_tile as find_tiles left it; tile < first_tile[E].
__device__ __forceinline__ int expert_of(int tile, const int32_t* first_tile, int E) {
    int low = 0, high = E;  // first_tile[low] <= tile < first_tile[high]
    while (high - low > 1) {
        const int middle = (low + high) / 2;
        (first_tile[middle] <= tile ? low : high) = middle;
    }
    return low;
}

// The first of an expert's rows [begin, end), which ascend by slot, whose slot is at least `slot`.
__device__ __forceinline__ int first_row_of(const int32_t* row_to_slot, int begin, int end,
                                            int64_t slot) {
    while (begin < end) {
        const int middle = begin + (end - begin) / 2;
        if (row_to_slot[middle] < slot) {
            begin = middle + 1;
        } else {
            end = middle;
        }
    }
    return begin;
}

// Calls f(T{}, R as a type) for 16-bit floats like t's and R, which is 16 or 32.
template <class F>
void by_type_and_rank(const Tensor& t, int64_t rank, const F& f) {
    const auto by_rank = [&](auto tag) {
        if (rank == 16) return f(tag, std::integral_constant<int, 16>{});
        STD_TORCH_CHECK(rank == 32, "the columns of z must be 16 or 32, got ", rank);
        f(tag, std::integral_constant<int, 32>{});
    };
    if (t.scalar_type() == ScalarType::BFloat16) return by_rank(__nv_bfloat16{});
    STD_TORCH_CHECK(t.scalar_type() == ScalarType::Half, "only 16-bit floats are supported");
    by_rank(__half{});
}

}  // namespace
}  // namespace flexmore::cuda
