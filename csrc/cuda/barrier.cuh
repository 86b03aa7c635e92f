// Barriers in shared memory whose phases alternate, for rings of copies: PTX ISA, mbarrier. For
// sm_80 and up.
#pragma once

#include <cstdint>

namespace flexmore::cuda {

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// A barrier of `count` arrivals in 8 bytes of shared memory; its phases alternate parity.
struct Barrier {
    uint64_t word;

    __device__ __forceinline__ void init(int count) {
        asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(this)),
                     "r"(count));
    }
    __device__ __forceinline__ void arrive() {
        asm volatile(
            "{\n"
            ".reg .b64 state;\n"
            "mbarrier.arrive.shared::cta.b64 state, [%0];\n"
            "}\n" ::"r"(shared_address(this))
            : "memory");
    }
    // Arrives when this thread's copies by cp.async up to now are done.
    __device__ __forceinline__ void arrive_after_copies() {
        asm volatile(
            "cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(shared_address(this))
            : "memory");
    }
    // Arrives, and the phase waits for so many bytes of bulk copies besides (sm_90).
    __device__ __forceinline__ void arrive_expecting(int bytes) {
        asm volatile(
            "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(this)),
            "r"(bytes)
            : "memory");
    }
    __device__ __forceinline__ void wait(int parity) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
#define FM_WAIT "mbarrier.try_wait"
#else
#define FM_WAIT "mbarrier.test_wait"
#endif
        asm volatile(
            "{\n"
            ".reg .pred done;\n"
            "again:\n" FM_WAIT
            ".parity.shared::cta.b64 done, [%0], %1;\n"
            "@!done bra again;\n"
            "}\n" ::"r"(shared_address(this)),
            "r"(parity)
            : "memory");
#undef FM_WAIT
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

}  // namespace flexmore::cuda
