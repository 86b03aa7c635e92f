// What Hopper's kernels share: barriers in shared memory, bulk copies, matrix products of a
// warpgroup. PTX ISA, sections on mbarrier, cp.async.bulk and wgmma. Compiled for sm_90a alone.
#pragma once

#include "common.cuh"

namespace flexmore::cuda {

constexpr int kWarpgroup = 128;

// A value that all threads of a warp have, told to the compiler: branches on it do not diverge,
// which matrix products require.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(kFullWarp, x, 0); }

// A barrier of `count` arrivals in 8 bytes of shared memory; its phases alternate parity.
struct Barrier {
    uint64_t word;

    __device__ __forceinline__ void init(int count) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                     "r"(count));
    }
    __device__ __forceinline__ void arrive() {
        asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(shared_address(this))
                     : "memory");
    }
    // Arrives, and the phase waits for so many bytes of bulk copies besides.
    __device__ __forceinline__ void arrive_expecting(int bytes) {
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
            "r"(bytes)
            : "memory");
    }
    __device__ __forceinline__ void wait(int parity) {
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n"
            "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(shared_address(this)),
            "r"(parity)
            : "memory");
    }
};

// Which of `Slots` ring entries is next, and the parity of its barrier's phase. Who takes every
// Stride-th entry starts at one of the first.
template <int Slots, int Stride = 1>
struct Ring {
    int slot = 0, parity = 0;

    __device__ __forceinline__ void next() {
        slot += Stride;
        if (slot >= Slots) {
            slot -= Slots;
            parity ^= 1;
        }
    }
};

// Makes barriers' initial state visible to bulk copies, and this thread's stores to shared memory
// to copies and matrix products that are issued after the next barrier.
__device__ __forceinline__ void fence_barrier_init() {
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
__device__ __forceinline__ void fence_async_proxy() {
    asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}

// Copies `bytes` (a multiple of 16, both ends aligned to 16) and counts them on the barrier.
__device__ __forceinline__ void copy_bulk(void* to, const void* from, int bytes, Barrier* barrier) {
    asm volatile(
        "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::
            "r"(shared_address(to)),
        "l"(__cvta_generic_to_global(from)), "r"(bytes), "r"(shared_address(barrier))
        : "memory");
}

// The barrier's phase waits for all cp.async copies that this thread began; the arrival is one of
// its count.
__device__ __forceinline__ void arrive_after_copies(Barrier* barrier) {
    asm volatile(
        "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(barrier))
        : "memory");
}

// 16 bytes that are read once: not kept in L1, and issued here, not where they are first used.
__device__ __forceinline__ uint4 load_once(const void* from) {
    uint4 words;
    asm volatile("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words.x), "=r"(words.y), "=r"(words.z), "=r"(words.w)
                 : "l"(__cvta_generic_to_global(from)));
    return words;
}

// Stores four 8 x 8 blocks of 16-bit elements; lane l gives the address of row l % 8 of block l /
// 8, and two elements of each block, of row l / 4, columns l % 4 * 2 and the next.
__device__ __forceinline__ void store_blocks(uint32_t address, uint32_t a, uint32_t b, uint32_t c,
                                             uint32_t d) {
    asm volatile(
        "stmatrix.sync.aligned.m8n8.x4.shared::cta.b16 [%0], {%1, %2, %3, %4};" ::"r"(address),
        "r"(a), "r"(b), "r"(c), "r"(d)
        : "memory");
}

template <int Registers>
__device__ __forceinline__ void fewer_registers() {
    asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(Registers));
}
template <int Registers>
__device__ __forceinline__ void more_registers() {
    asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(Registers));
}

// ---- Matrix operands in shared memory: 8 x 8 blocks of 128 contiguous bytes (8 rows of 16 bytes),
// the blocks of a band of 8 rows one after the other along the summed dimension.

// Byte offset of the 16 bytes at (row, 8 * group) of an operand of `depth` summed columns.
__host__ __device__ __forceinline__ constexpr int operand_offset(int row, int group, int depth) {
    return (row / 8 * (depth / 8) + group) * 128 + row % 8 * 16;
}

// Describes the operand at an address; the next 16 summed columns are kNextColumns further on.
__device__ __forceinline__ uint64_t operand(uint32_t address, int depth) {
    const uint64_t along = 128 >> 4, across = (depth / 8 * 128) >> 4;
    return uint64_t(address >> 4) | along << 16 | across << 32;
}
constexpr int kNextColumns = 256 >> 4;

// An operand in shared memory whose 8 x 8 blocks lie as operand_offset says, read across: its
// columns are what the product keeps, its rows are summed.
__device__ __forceinline__ uint64_t operand_across(uint32_t address, int depth) {
    const uint64_t along = (depth / 8 * 128) >> 4, across = 128 >> 4;
    return uint64_t(address >> 4) | along << 16 | across << 32;
}

__device__ __forceinline__ void products_begin() {
    asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}
__device__ __forceinline__ void products_commit() {
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
// The values are computed here, not after the waits that follow.
template <int Size>
__device__ __forceinline__ void settle(float (&d)[Size]) {
#pragma unroll
    for (int i = 0; i < Size; ++i) asm volatile("" : "+f"(d[i])::"memory");
}
// Waits until at most `Left` committed groups are on their way; then d may be used.
template <int Left, int Size>
__device__ __forceinline__ void products_wait(float (&d)[Size]) {
    asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(Left) : "memory");
    settle(d);
}

// d (64 x N, N / 2 registers a thread) = a (64 x 16) b (N x 16)^T, or += if Add. Thread t of the
// warpgroup holds, for j < N / 8, rows t / 32 * 16 + t % 32 / 4 (d[4 j], d[4 j + 1]) and 8 below
// (d[4 j + 2], d[4 j + 3]), columns 8 j + t % 4 * 2 and the next.
#define FM_REGISTERS_8(i)                                                                       \
    "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), \
        "+f"(d[i + 6]), "+f"(d[i + 7])
#define FM_PRODUCT(N, TYPE, NAMES, A, B, ONE, ...)                                          \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ONE                                \
                 ", 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES \
                 "}, " A ", " B ", add, 1, 1, 0, 0;\n}\n"                                   \
                 : __VA_ARGS__                                                              \
                 : "l"(a), "l"(b), "n"(int(Add)))
#define FM_PRODUCT_OF_TYPE(N, NAMES, A, B, ONE, ...)          \
    if constexpr (std::is_same_v<T, __half>) {                \
        FM_PRODUCT(N, "f16", NAMES, A, B, ONE, __VA_ARGS__);  \
    } else {                                                  \
        FM_PRODUCT(N, "bf16", NAMES, A, B, ONE, __VA_ARGS__); \
    }
template <class T, bool Add>
__device__ __forceinline__ void product_step(float (&d)[8], uint64_t a, uint64_t b) {
    FM_PRODUCT_OF_TYPE(16, "%0,%1,%2,%3,%4,%5,%6,%7", "%8", "%9", "%10", FM_REGISTERS_8(0))
}
template <class T, bool Add>
__device__ __forceinline__ void product_step(float (&d)[16], uint64_t a, uint64_t b) {
    FM_PRODUCT_OF_TYPE(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "%16", "%17",
                       "%18", FM_REGISTERS_8(0), FM_REGISTERS_8(8))
}
template <class T, bool Add>
__device__ __forceinline__ void product_step(float (&d)[32], uint64_t a, uint64_t b) {
    FM_PRODUCT_OF_TYPE(64,
                       "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,"
                       "%21,%22,%23,%24,%25,%26,%27,%28,%29,%30,%31",
                       "%32", "%33", "%34", FM_REGISTERS_8(0), FM_REGISTERS_8(8),
                       FM_REGISTERS_8(16), FM_REGISTERS_8(24))
}
// d = or += a b^T over Depth summed columns.
template <class T, bool Add, int Depth, int Size>
__device__ __forceinline__ void product(float (&d)[Size], uint64_t a, uint64_t b) {
    product_step<T, Add>(d, a, b);
#pragma unroll
    for (int k = 1; k < Depth / 16; ++k) {
        product_step<T, true>(d, a + k * kNextColumns, b + k * kNextColumns);
    }
}
#undef FM_PRODUCT
#undef FM_PRODUCT_OF_TYPE

// d (64 x N) = or += a (64 x 16, registers) b (N x 16)^T, which lies N-major if Across.
#define FM_FROM_REGISTERS(N, TYPE, NAMES, A, B, ONE, ACROSS, ...)                           \
    asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " ONE                                \
                 ", 0;\n"                                                                   \
                 "wgmma.mma_async.sync.aligned.m64n" #N "k16.f32." TYPE "." TYPE " {" NAMES \
                 "}, " A ", " B ", add, 1, 1, " ACROSS ";\n}\n"                             \
                 : __VA_ARGS__                                                              \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "n"(int(Add)),       \
                   "n"(int(Across)))
#define FM_OF_TYPE(N, NAMES, A, B, ONE, ACROSS, ...)                         \
    if constexpr (std::is_same_v<T, __half>) {                               \
        FM_FROM_REGISTERS(N, "f16", NAMES, A, B, ONE, ACROSS, __VA_ARGS__);  \
    } else {                                                                 \
        FM_FROM_REGISTERS(N, "bf16", NAMES, A, B, ONE, ACROSS, __VA_ARGS__); \
    }
template <class T, bool Add, bool Across>
__device__ __forceinline__ void from_registers(float (&d)[8], const uint32_t (&a)[4], uint64_t b) {
    FM_OF_TYPE(16, "%0,%1,%2,%3,%4,%5,%6,%7", "{%8,%9,%10,%11}", "%12", "%13", "%14",
               FM_REGISTERS_8(0))
}
template <class T, bool Add, bool Across>
__device__ __forceinline__ void from_registers(float (&d)[16], const uint32_t (&a)[4], uint64_t b) {
    FM_OF_TYPE(32, "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15", "{%16,%17,%18,%19}",
               "%20", "%21", "%22", FM_REGISTERS_8(0), FM_REGISTERS_8(8))
}
template <class T, bool Add, bool Across>
__device__ __forceinline__ void from_registers(float (&d)[32], const uint32_t (&a)[4], uint64_t b) {
    FM_OF_TYPE(64,
               "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,%22,"
               "%23,%24,%25,%26,%27,%28,%29,%30,%31",
               "{%32,%33,%34,%35}", "%36", "%37", "%38", FM_REGISTERS_8(0), FM_REGISTERS_8(8),
               FM_REGISTERS_8(16), FM_REGISTERS_8(24))
}
#undef FM_FROM_REGISTERS
#undef FM_OF_TYPE
#undef FM_REGISTERS_8

}  // namespace flexmore::cuda
