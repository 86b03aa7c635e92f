// The tiles of grouped_gemm_dweight.cu: what a launch is given, the order of tiles, the copying
// thread's loop, and products of two operands that lie by columns.
#pragma once

#include "tensor_map.cuh"

namespace flexmore::cuda::weight_grad {

constexpr int kGroups = 2;  // warpgroups that multiply
constexpr int kBox = 64;    // columns of a box of kDepth rows: 128 bytes of each
constexpr int kBoxBytes = kBox * kDepth * 2;
constexpr int kHeight = kGroups * kBox, kWidth = 256;  // of a block's tile
constexpr int kBoxesAcross = kWidth / kBox;
constexpr int kBlocks = 2;  // of a cluster
constexpr int kStages = 4;
constexpr int kThreads = (1 + kGroups) * kWarpgroup;
constexpr int kGroup = 8;  // row tiles that share their columns' operands in L2
constexpr int kMaxProblems = 32;

// out (height, width) = left^T right, summed over the rows of an expert or, with -1, over all.
struct Problem {
    CUtensorMap left, right;
    void* out;
    float* planes;  // (parts, height, width) that are summed later, or null
    int64_t out_stride;
    int expert, rows, height, width;
    bool left_sorted, right_sorted;  // the expert's rows begin at its first sorted row, not at 0
    bool beside;  // the two blocks' tiles lie side by side, not one below the other
};
struct Problems {
    Problem problem[kMaxProblems];
    int first[kMaxProblems + 1];  // tile of each
    const int32_t* row_offsets;
    int count, parts;
};

struct Shared {
    alignas(1024) unsigned char left[kStages][kGroups * kBoxBytes];
    alignas(1024) unsigned char right[kStages][kBoxesAcross * kBoxBytes];
    Barrier full[kStages], empty[kStages];
    int begin[kMaxProblems], rows[kMaxProblems];
};

FM_HOST_DEVICE int tiles_down(int height, bool beside) {
    const int tile = beside ? kHeight : kBlocks * kHeight;
    return (height + tile - 1) / tile;
}
FM_HOST_DEVICE int tiles_across(int width, bool beside) {
    const int tile = beside ? kBlocks * kWidth : kWidth;
    return (width + tile - 1) / tile;
}

// A block's tile: `steps` times kDepth rows from row `first` of the expert's, of which the last
// step has `last`.
struct Tile {
    int problem, part, row, column, first, steps, last;
};

// Tile `index` of the cluster; a problem's parts one after the other, and in a part down kGroup row
// tiles before the next column.
__device__ inline Tile find(const Problems& p, const Shared& sh, int index) {
    int q = 0;
    while (index >= p.first[q + 1]) ++q;
    index -= p.first[q];
    const Problem& problem = p.problem[q];
    const int across = tiles_across(problem.width, problem.beside);
    const int down = tiles_down(problem.height, problem.beside);
    const int part = index / (across * down);
    index -= part * across * down;
    const int group = index / (kGroup * across) * kGroup, rest = index % (kGroup * across);
    const int size = min(kGroup, down - group);
    int row = group + rest % size, column = rest / size;
    (problem.beside ? column : row) *= kBlocks;
    (problem.beside ? column : row) += block_in_cluster();
    const int all = (sh.rows[q] + kDepth - 1) / kDepth, each = (all + p.parts - 1) / p.parts;
    const int begin = min(part * each, all), end = min(begin + each, all);
    return {q,
            part,
            row * kHeight,
            column * kWidth,
            begin * kDepth,
            end - begin,
            min(kDepth, sh.rows[q] - (end - 1) * kDepth)};
}

// Copies the operands of all tiles. Boxes outside the result are left out: what lies there in
// shared memory only reaches numbers that are not stored.
__device__ inline void copy_operands(const Problems& p, Shared& sh, int cluster, int clusters) {
    const int block = block_in_cluster();
    Ring<kStages> ring;
    for (int index = cluster; index < p.first[p.count]; index += clusters) {
        const Tile tile = find(p, sh, index);
        const Problem& problem = p.problem[tile.problem];
        const auto boxes = [](int size, int at, int most) {
            return max(0, min(most, (size - at + kBox - 1) / kBox));
        };
        const int down = boxes(problem.height, tile.row, kGroups);
        const int across = boxes(problem.width, tile.column, kBoxesAcross);
        int left_row = tile.first + (problem.left_sorted ? sh.begin[tile.problem] : 0);
        int right_row = tile.first + (problem.right_sorted ? sh.begin[tile.problem] : 0);
        for (int step = 0; step < tile.steps; ++step) {
            sh.empty[ring.slot].wait(ring.parity ^ 1);
            Barrier* full = &sh.full[ring.slot];
            full->arrive_expecting((down + across) * kBoxBytes);
            for (int i = 0; i < down; ++i) {
                copy_box<1>(sh.left[ring.slot] + i * kBoxBytes, problem.left, tile.row + i * kBox,
                            left_row, false, full);
            }
            for (int i = 0; i < across; ++i) {
                void* to = sh.right[ring.slot] + i * kBoxBytes;
                const int column = tile.column + i * kBox;
                if (problem.beside) {
                    copy_box<1>(to, problem.right, column, right_row, false, full);
                } else if (i / (kBoxesAcross / kBlocks) == block) {
                    copy_box<kBlocks>(to, problem.right, column, right_row, false, full);
                }
            }
            left_row += kDepth, right_row += kDepth;
            ring.next();
        }
    }
}

// Describes an operand of boxes one after the other, each of kDepth summed rows of 128 bytes as
// tensor maps write them, swizzled. The next 16 summed rows are kNextRows bytes on.
__device__ __forceinline__ uint64_t operand_by_columns(uint32_t address) {
    return uint64_t((address & 0x3FFFF) >> 4) | uint64_t(kBoxBytes >> 4) << 16 |
           uint64_t(1024 >> 4) << 32 | uint64_t(1) << 62;
}
constexpr int kNextRows = 16 * 128;

// d (64 x N) += a^T (64 x 16) b (16 x N); where d's elements are: as `product` of hopper.cuh.
#define FM_8(i)                                                                                 \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define FM_32(i) FM_8(i), FM_8(i + 8), FM_8(i + 16), FM_8(i + 24)
#define FM_BY_COLUMNS(N, TYPE, NAMES, A, B, ...)                                                  \
    asm volatile(                                                                                 \
        "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                            \
        "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES "}, " A ", " B \
        ", add, 1, 1, 1, 1;\n}\n"                                                                 \
        : __VA_ARGS__                                                                             \
        : "l"(a), "l"(b))
#define FM_BY_COLUMNS_OF_TYPE(N, NAMES, A, B, ...)          \
    if constexpr (std::is_same_v<T, __half>) {              \
        FM_BY_COLUMNS(N, "f16", NAMES, A, B, __VA_ARGS__);  \
    } else {                                                \
        FM_BY_COLUMNS(N, "bf16", NAMES, A, B, __VA_ARGS__); \
    }
template <class T>
__device__ __forceinline__ void add_by_columns(float (&d)[32], uint64_t a, uint64_t b) {
    FM_BY_COLUMNS_OF_TYPE(64,
                          "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"
                          "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
                          "%32", "%33", FM_32(0))
}
template <class T>
__device__ __forceinline__ void add_by_columns(float (&d)[64], uint64_t a, uint64_t b) {
    FM_BY_COLUMNS_OF_TYPE(128,
                          "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"
                          "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,"
                          "%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
                          "%56,%57,%58,%59,%60,%61,%62,%63",
                          "%64", "%65", FM_32(0), FM_32(32))
}
template <class T>
__device__ __forceinline__ void add_by_columns(float (&d)[128], uint64_t a, uint64_t b) {
    FM_BY_COLUMNS_OF_TYPE(256,
                          "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,"
                          "%20,%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,"
                          "%38,%39,%40,%41,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,"
                          "%56,%57,%58,%59,%60,%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,"
                          "%74,%75,%76,%77,%78,%79,%80,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,"
                          "%92,%93,%94,%95,%96,%97,%98,%99,%100,%101,%102,%103,%104,%105,%106,%107,"
                          "%108,%109,%110,%111,%112,%113,%114,%115,%116,%117,%118,%119,%120,%121,"
                          "%122,%123,%124,%125,%126,%127",
                          "%128", "%129", FM_32(0), FM_32(32), FM_32(64), FM_32(96))
}
#undef FM_8
#undef FM_32
#undef FM_BY_COLUMNS
#undef FM_BY_COLUMNS_OF_TYPE

// Writes zeros over the rows from `live` on of this warpgroup's box of left and of all of right:
// they are another expert's, or memory that nobody wrote, where even 0 * x can be NaN. Both
// warpgroups clear what they share, so neither waits for the other, and where one has
// begun to multiply, the other writes zeros over zeros.
template <int Boxes>
__device__ __forceinline__ void clear_foreign(unsigned char* left, unsigned char* right, int live) {
    const int thread = threadIdx.x % kWarpgroup;
    for (int at = live * 128 + thread * 16; at < kBoxBytes; at += kWarpgroup * 16) {
        *reinterpret_cast<uint4*>(left + at) = uint4{};
#pragma unroll
        for (int i = 0; i < Boxes; ++i) {
            *reinterpret_cast<uint4*>(right + i * kBoxBytes + at) = uint4{};
        }
    }
    fence_async_proxy();
    asm volatile("bar.sync %0, %1;" ::"r"(threadIdx.x / kWarpgroup), "n"(kWarpgroup) : "memory");
}

// sum = left^T right over the tile's rows.
template <class T, int Size>
__device__ __forceinline__ void multiply(Shared& sh, Ring<kStages>& ring, const Tile& tile,
                                         float (&sum)[Size]) {
    const int group = threadIdx.x / kWarpgroup - 1;
#pragma unroll
    for (int i = 0; i < Size; ++i) sum[i] = 0;
    Barrier* before = nullptr;
#pragma unroll 1
    for (int step = 0; step < tile.steps; ++step) {
        sh.full[ring.slot].wait(ring.parity);
        unsigned char* left = sh.left[ring.slot] + group * kBoxBytes;
        unsigned char* right = sh.right[ring.slot];
        if (step == tile.steps - 1 && tile.last < kDepth) {
            clear_foreign<2 * Size / kBox>(left, right, tile.last);
        }
        products_begin();
#pragma unroll
        for (int k = 0; k < kDepth / 16; ++k) {
            add_by_columns<T>(sum, operand_by_columns(shared_address(left) + k * kNextRows),
                              operand_by_columns(shared_address(right) + k * kNextRows));
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

}  // namespace flexmore::cuda::weight_grad
