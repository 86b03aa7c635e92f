// Tensor-core products of 16-bit fragments and what feeds them, for sm_80 and up: cp.async,
// ldmatrix, mma.sync m16n8k16, and Hopper's programmatic dependent launch (no-ops before sm_90).
#pragma once

#include "common.cuh"

namespace flexmore::cuda {

// Copies Bytes (4, 8 or 16) from global to shared memory in the background, zeros where not valid;
// of 16, L2 gets two lines at a time if Lines.
template <int Bytes, bool Lines = true>
__device__ __forceinline__ void copy_async(uint32_t to, const void* from, bool valid) {
    const int size = valid ? Bytes : 0;
    if constexpr (Bytes == 16 && !Lines) {
        asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(size)
                     : "memory");
    } else if constexpr (Bytes == 16) {
        asm volatile("cp.async.cg.shared.global.L2::256B [%0], [%1], 16, %2;" ::"r"(to), "l"(from),
                     "r"(size)
                     : "memory");
    } else {
        asm volatile("cp.async.ca.shared.global [%0], [%1], %3, %2;" ::"r"(to), "l"(from),
                     "r"(size), "n"(Bytes)
                     : "memory");
    }
}
__device__ __forceinline__ void commit_copies() {
    asm volatile("cp.async.commit_group;" ::: "memory");
}
template <int Pending>
__device__ __forceinline__ void wait_copies() {
    asm volatile("cp.async.wait_group %0;" ::"n"(Pending) : "memory");
}

// Matrices of 8 x 8 elements, a row of 16 bytes at each lane's address, as fragments.
__device__ __forceinline__ void load_matrices(uint32_t (&r)[4], uint32_t address) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                 : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
                 : "r"(address));
}
template <bool Transposed>
__device__ __forceinline__ void load_columns(uint32_t& a, uint32_t& b, uint32_t& c, uint32_t& d,
                                             uint32_t address) {
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                     : "r"(address));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(a), "=r"(b), "=r"(c), "=r"(d)
                     : "r"(address));
    }
}
template <bool Transposed>
__device__ __forceinline__ void load_columns(uint32_t& a, uint32_t& b, uint32_t address) {
    if constexpr (Transposed) {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                     : "=r"(a), "=r"(b)
                     : "r"(address));
    } else {
        asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                     : "=r"(a), "=r"(b)
                     : "r"(address));
    }
}

// c (16 x 8, float) += a (16 x 16) b (16 x 8)
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (std::is_same_v<T, __half>) {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, "
            "{%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};"
            : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}
template <class T>
__device__ __forceinline__ void mma(float (&c)[4], const uint4& a, const uint32_t (&b)[2]) {
    mma<T>(c, {a.x, a.y, a.z, a.w}, b);
}

// Programmatic dependent launch: the next kernel of the stream may start / the one before is done
// and what it wrote is seen.
__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
__device__ __forceinline__ void wait_for_previous() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Launches a kernel that may start while the one before it in the stream still runs (on Hopper and
// later). Each of its threads calls wait_for_previous() on every path, before it reads what that
// one wrote, or writes: that a kernel is done then means that all before it are. What reads earlier
// counts on the one before, which lets it start only after its own wait.
// All such kernels ask for the same division of the memory that L1 and shared memory are made of: a
// multiprocessor changes it only when it is empty.
template <class Kernel, class... Args>
void launch_after(Kernel kernel, unsigned grid, int threads, size_t shared, const Tensor& on,
                  const char* name, const Args&... args) {
    if (shared > 0) allow_shared_memory(kernel, name);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout,
                                    cudaSharedmemCarveoutMaxShared),
               name);
    const int major = attribute(on.get_device_index(), cudaDevAttrComputeCapabilityMajor);
    cudaLaunchAttribute early{};
    early.id = cudaLaunchAttributeProgrammaticStreamSerialization;
    early.val.programmaticStreamSerializationAllowed = 1;
    launch_with(major >= 9 ? &early : nullptr, kernel, grid, threads, shared, current_stream(on),
                name, args...);
}

}  // namespace flexmore::cuda
