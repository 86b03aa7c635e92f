// The tiles of grouped_gemm.cu: what a launch is given, the order of tiles, the copying thread's
// loop, a product, and a warpgroup's result in registers.
#pragma once

#include "tensor_map.cuh"

namespace flexmore::cuda {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kRows = kGroups * 64, kColumns = 256;
constexpr int kBlocks = 2;  // of a cluster
constexpr int kStages = 4;
constexpr int kThreads = (1 + kGroups) * kWarpgroup;
constexpr int kGroup = 8;  // row tiles that share their columns' operands in L2
constexpr int kMaxProblems = 16;

// Where row i of an expert's segment is: at its sorted row, at i, or at its token's.
enum Place : int { kSorted = 0, kSegment = 1, kToken = 2 };

struct Product {
    CUtensorMap left, right;
    const void* base;
    int steps;        // of kDepth
    int place;        // of the left operand's rows
    bool transposed;  // the right operand lies so, which only training's kernels look at
};
struct Problem {
    Product product[2];
    void* out;
    int64_t out_stride;
    int expert, rows, columns;  // expert -1: all of `rows`
    bool for_threads;           // the order of the right operands' rows
};
struct Problems {
    Problem problem[kMaxProblems];
    const int32_t *row_offsets, *row_to_slot;
    const float* weights;  // a slot's, of the result; or null
    int count, top_k, place;
    void* kept[2];  // where training's gated kernel keeps what the nonlinearity reads; or null
    int64_t kept_stride[2];
};

struct Shared {
    alignas(1024) unsigned char left[kStages][kRows * kDepth * 2];
    alignas(1024) unsigned char right[kStages][kColumns * kDepth * 2];
    Barrier full[kStages], empty[kStages];
    int first[kMaxProblems + 1], begin[kMaxProblems], rows[kMaxProblems];
};
constexpr int kStageBytes = (kRows + kColumns) * kDepth * 2;

// A tile of the cluster: rows [row, row + kBlocks kRows) of a segment that begins at `begin`.
struct Tile {
    int problem, begin, rows, row, column;
};

// Tile `index`; a problem's tiles go down `group` row tiles before they go to the next column.
__device__ Tile find(const Problems& p, const Shared& sh, int index) {
    int q = 0;
    while (index >= sh.first[q + 1]) ++q;
    index -= sh.first[q];
    const int across = (p.problem[q].columns + kColumns - 1) / kColumns;
    const int down = (sh.rows[q] + kBlocks * kRows - 1) / (kBlocks * kRows);
    const int group = index / (kGroup * across) * kGroup, rest = index % (kGroup * across);
    const int size = min(kGroup, down - group);
    return {q, sh.begin[q], sh.rows[q], (group + rest % size) * kBlocks * kRows,
            rest / size * kColumns};
}

template <bool Training>
__device__ void copy_operands(const Problems& p, Shared& sh, int cluster, int clusters) {
    const int block = block_in_cluster();
    Ring<kStages> ring;
    for (int index = cluster; index < sh.first[p.count]; index += clusters) {
        const Tile tile = find(p, sh, index);
        const int row = tile.row + block * kRows;
        const bool for_threads = p.problem[tile.problem].for_threads;
        for (int i = 0; i < 2; ++i) {
            const Product& product = p.problem[tile.problem].product[i];
            const int left_row = row + (product.place == kSorted ? tile.begin : 0);
            for (int step = 0; step < product.steps; ++step) {
                sh.empty[ring.slot].wait(ring.parity ^ 1);
                Barrier* full = &sh.full[ring.slot];
                full->arrive_expecting(kStageBytes);
                copy_box<1>(sh.left[ring.slot], product.left, step * kDepth, left_row, false, full);
                constexpr int kPart = kColumns / kBlocks;
                unsigned char* right = sh.right[ring.slot] + block * kPart * kDepth * 2;
                const int column = tile.column + block * kPart;
                if (Training && product.transposed) {
                    for (int i = 0; i < kPart; i += 64) {
                        copy_box<kBlocks>(right + i * kDepth * 2, product.right, column + i,
                                          step * kDepth, false, full);
                    }
                } else {
                    copy_box<kBlocks>(right, product.right, step * kDepth, column, for_threads,
                                      full);
                }
                ring.next();
            }
        }
    }
}

__device__ __forceinline__ void clear(float (&sum)[128]) {
#pragma unroll
    for (int i = 0; i < 128; ++i) sum[i] = 0;
}

// sum += the next `steps` stages' left right^T.
template <class T, bool Transposed = false>
__device__ __forceinline__ void multiply(Shared& sh, Ring<kStages>& ring, int steps,
                                         float (&sum)[128]) {
    const int group = threadIdx.x / kWarpgroup - 1;
    Barrier* before = nullptr;
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        sh.full[ring.slot].wait(ring.parity);
        const uint32_t left = shared_address(sh.left[ring.slot]) + group * 64 * kDepth * 2;
        const uint32_t right = shared_address(sh.right[ring.slot]);
        products_begin();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
            large_product<T, Transposed>(sum, swizzled_operand(left + 32 * k),
                                         Transposed ? swizzled_transposed(right + 2048 * k)
                                                    : swizzled_operand(right + 32 * k));
        }
        products_commit();
        asm volatile("wgmma.wait_group.sync.aligned 1;" ::: "memory");  // one step stays on its way
        if (before) release<kBlocks>(before);
        before = &sh.empty[ring.slot];
        ring.next();
    }
    products_wait<0>(sum);
    if (before) release<kBlocks>(before);
}

// Among the four threads that share a row of a product's result: words[m] of thread q and words[q]
// of thread m change places. So 4 pairs of columns, 8 apart, and 8 columns in a row are the same.
// Not needed where the right operand's rows came in the threads' order.
__device__ __forceinline__ void exchange(uint32_t (&words)[4]) {
    const bool odd = threadIdx.x & 1, upper = threadIdx.x & 2;
#pragma unroll
    for (int m = 0; m < 4; m += 2) {
        const uint32_t other = __shfl_xor_sync(kFullWarp, odd ? words[m] : words[m + 1], 1);
        (odd ? words[m] : words[m + 1]) = other;
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
        const uint32_t other = __shfl_xor_sync(kFullWarp, upper ? words[m] : words[m + 2], 2);
        (upper ? words[m] : words[m + 2]) = other;
    }
}

// What a thread holds of its warpgroup's 64 x 256: of 2 rows 8 times 32 columns, in pairs.
struct Mine {
    int row[2];  // of the segment
    int slot[2];
    int column;  // its first 8 of 32
};

__device__ __forceinline__ Mine find_mine(const Problems& p, const Tile& tile, bool needs_slot) {
    int thread;  // asked anew, not kept in a register
    asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
    const int lane = thread % 32, block = block_in_cluster();
    Mine mine;
    mine.column = tile.column + lane % 4 * 8;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        mine.row[i] = tile.row + block * kRows + (thread - kWarpgroup) / 32 * 16 + lane / 4 + 8 * i;
        mine.slot[i] =
            needs_slot && mine.row[i] < tile.rows ? p.row_to_slot[tile.begin + mine.row[i]] : 0;
    }
    return mine;
}

// The slots of a thread's rows; of all tokens' rows each token's first.
__device__ __forceinline__ void find_slots(const Problems& p, const Tile& tile, int (&slot)[2]) {
    const bool all = p.problem[tile.problem].expert < 0;
    const Mine mine = find_mine(p, tile, !all);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        slot[i] = all ? min(mine.row[i], tile.rows - 1) * p.top_k : mine.slot[i];
    }
}

// Of row I the token's row of a base, as many columns as a thread holds; what does not exist is
// anything.
using Loaded = uint4[8];
template <class T>
__device__ __forceinline__ void load_base(Loaded& words, const void* base, int slot, int top_k,
                                          int column, int columns) {
    const T* row = static_cast<const T*>(base) + int64_t(slot / top_k) * columns;
#pragma unroll
    for (int b = 0; b < 8; ++b) {
        words[b] = load_once(row + min(column + 32 * b, columns - 8));
    }
}
// They are unpacked after this, not where they arrive: that takes twice the registers.
__device__ __forceinline__ void settle(Loaded (&loaded)[2]) {
#pragma unroll
    for (int i = 0; i < 16; ++i) {
        uint4& words = loaded[i / 8][i % 8];
        asm volatile("" : "+r"(words.x), "+r"(words.y), "+r"(words.z), "+r"(words.w));
    }
}
template <class T, int I>
__device__ __forceinline__ void add_base(float (&sum)[128], const Loaded& loaded,
                                         bool for_threads) {
#pragma unroll
    for (int b = 0; b < 8; ++b) {
        uint32_t words[4] = {loaded[b].x, loaded[b].y, loaded[b].z, loaded[b].w};
        if (!for_threads) exchange(words);
#pragma unroll
        for (int m = 0; m < 4; ++m) {
            const float2 pair = unpack<T>(words[m]);
            const int at = 4 * (4 * b + m) + 2 * I;
            sum[at] += pair.x, sum[at + 1] += pair.y;
        }
    }
}

}  // namespace flexmore::cuda
