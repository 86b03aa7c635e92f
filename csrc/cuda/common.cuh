// What the CUDA kernels share: the current stream, launch checks, dtypes, and vectors of elements.
//
// This file and the .cu files are compiled against any build of torch, also a CPU one, and the
// resulting library loads beside either: the one CUDA function of torch that is called is a weak
// symbol, and the CUDA runtime is linked statically.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../common.h"
#include "../launch.h"

extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace flexmore::cuda {

constexpr unsigned kFullWarp = 0xFFFFFFFFu;

inline void check_cuda(cudaError_t error, const char* what) {
    STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}
inline void check_launch(const char* kernel) { check_cuda(cudaGetLastError(), kernel); }

inline int attribute(int device, cudaDeviceAttr which) {
    int value = 0;
    check_cuda(cudaDeviceGetAttribute(&value, which, device), "cudaDeviceGetAttribute");
    return value;
}
inline int multiprocessors(int device) { return attribute(device, cudaDevAttrMultiProcessorCount); }

// Launches the kernel with an attribute, or with none.
template <class Kernel, class... Args>
void launch_with(cudaLaunchAttribute* with, Kernel kernel, dim3 grid, int threads, size_t shared,
                 cudaStream_t stream, const char* name, const Args&... args) {
    cudaLaunchConfig_t config{};
    config.gridDim = grid;
    config.blockDim = dim3(threads);
    config.dynamicSmemBytes = shared;
    config.stream = stream;
    config.attrs = with;
    config.numAttrs = with != nullptr;
    check_cuda(cudaLaunchKernelEx(&config, kernel, args...), name);
}

// Lets a kernel be launched with as much dynamic shared memory as a block can have: always the
// same, since the limit is the kernel's own, whichever thread launches it with how many bytes.
template <class Kernel>
void allow_shared_memory(Kernel kernel, const char* name) {
    cudaFuncAttributes fixed{};
    int device = 0;
    check_cuda(cudaGetDevice(&device), name);
    check_cuda(cudaFuncGetAttributes(&fixed, kernel), name);
    const int most = attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin);
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                    most - int(fixed.sharedSizeBytes)),
               name);
}

// Launches blocks that may wait for each other: all run at the same time, or the launch fails.
template <class... Args>
void launch_together(void (*kernel)(Args...), int blocks, int threads, size_t shared,
                     cudaStream_t stream, Args... args) {
    cudaLaunchAttribute together{};
    together.id = cudaLaunchAttributeCooperative;
    together.val.cooperative = 1;
    launch_with(&together, kernel, unsigned(blocks), threads, shared, stream,
                "a launch of blocks that wait", args...);
}

// Launches clusters of `size` blocks, neighbours along x, of `shared` bytes each.
template <class Kernel, class... Args>
void launch_clusters(Kernel kernel, int size, dim3 grid, int threads, int shared,
                     cudaStream_t stream, const char* name, const Args&... args) {
    check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared),
               name);
    cudaLaunchAttribute cluster{};
    cluster.id = cudaLaunchAttributeClusterDimension;
    cluster.val.clusterDim.x = unsigned(size);
    cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
    launch_with(&cluster, kernel, grid, threads, size_t(shared), stream, name, args...);
}

// Makes the tensor's device current while it lives. The statically linked CUDA runtime is told
// besides torch's: it takes over the thread's context, but may meet a thread that has none yet.
class OnDevice {
  public:
    explicit OnDevice(const Tensor& t) : OnDevice(t.get_device_index()) {}
    explicit OnDevice(int32_t index) : guard_(index) {
        check_cuda(cudaSetDevice(index), "cudaSetDevice");
    }

  private:
    torch::stable::accelerator::DeviceGuard guard_;
};

// torch's current stream of the tensor's device. Call under OnDevice.
inline cudaStream_t current_stream(const Tensor& t) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "this torch has no CUDA: aoti_torch_get_current_cuda_stream is missing");
    void* stream = nullptr;
    const AOTITorchError error = aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream);
    STD_TORCH_CHECK(error == TORCH_SUCCESS, "cannot get torch's current CUDA stream");
    return static_cast<cudaStream_t>(stream);
}

inline void check_same_device(const Tensor& t, std::initializer_list<const Tensor*> others) {
    for (const Tensor* other : others) {
        STD_TORCH_CHECK(
            !other || (other->is_cuda() && other->get_device_index() == t.get_device_index()),
            "all tensors must be on the same CUDA device");
    }
}
inline const Tensor* pointer(const OptionalTensor& t) { return t ? &*t : nullptr; }

// Calls f(T{}) with the element type of `dtype`.
template <class F>
void dispatch(ScalarType dtype, F&& f) {
    switch (dtype) {
        case ScalarType::Float:
            return f(float{});
        case ScalarType::Double:
            return f(double{});
        case ScalarType::BFloat16:
            return f(__nv_bfloat16{});
        case ScalarType::Half:
            return f(__half{});
        default:
            STD_TORCH_CHECK(false, "dtype ", torch::headeronly::toString(dtype),
                            " is not supported; accepted: float32, float64, bfloat16, float16");
    }
}

template <class T>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

__device__ __forceinline__ float to_acc(float x) { return x; }
__device__ __forceinline__ double to_acc(double x) { return x; }
__device__ __forceinline__ float to_acc(__nv_bfloat16 x) { return __bfloat162float(x); }
__device__ __forceinline__ float to_acc(__half x) { return __half2float(x); }
template <class T>
__device__ __forceinline__ T from_acc(Acc<T> x) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return __float2bfloat16_rn(x);
    } else if constexpr (std::is_same_v<T, __half>) {
        return __float2half_rn(x);
    } else {
        return x;
    }
}

// V neighbouring elements, moved in accesses of up to 16 bytes.
template <class T, int V>
struct alignas(sizeof(T) * V < 16 ? sizeof(T) * V : 16) Pack {
    T v[V];
};
template <int V, class T>
__device__ __forceinline__ Pack<T, V> load_pack(const T* p) {
    return *reinterpret_cast<const Pack<T, V>*>(p);
}
template <int V, class T>
__device__ __forceinline__ void store_pack(T* p, const Pack<T, V>& pack) {
    *reinterpret_cast<Pack<T, V>*>(p) = pack;
}

// Two neighbouring 16-bit numbers of a word.
template <class T>
__device__ __forceinline__ float2 unpack(uint32_t word) {
    if constexpr (std::is_same_v<T, __half>) {
        return __half22float2(*reinterpret_cast<const __half2*>(&word));
    } else {
        return {__uint_as_float(word << 16), __uint_as_float(word & 0xFFFF0000u)};
    }
}
template <class T>
__device__ __forceinline__ uint32_t pack(float low, float high) {
    if constexpr (std::is_same_v<T, __half>) {
        const __half2 both = __floats2half2_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&both);
    } else {
        const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
        return *reinterpret_cast<const uint32_t*>(&both);
    }
}

// g sigmoid(g).
__device__ __forceinline__ float silu(float g) { return __fdividef(g, 1 + __expf(-g)); }
// The same where subnormal numbers count as 0, which saves instructions.
__device__ __forceinline__ float silu_flushed(float g) {
    float e, r;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(e) : "f"(g * -1.4426950408889634f));
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(1.0f + e));
    return g * r;
}
// The same from g / 2 by one special-function instruction: in error 2^-12 |g| at most, an eighth of
// a rounding to bfloat16.
__device__ __forceinline__ float silu_of_half(float half) {
    float t;
    asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
    return fmaf(half, t, half);
}
// sigmoid(g) from g / 2, for T as exact as that needs.
template <class T>
__device__ __forceinline__ float sigmoid_of_half(float half) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        float t;
        asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
        return fmaf(0.5f, t, 0.5f);
    } else {
        return __fdividef(1.0f, 1.0f + __expf(-2 * half));
    }
}
// g sigmoid(g), for T as exact as that needs.
template <class T>
__device__ __forceinline__ float silu_for(float g) {
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {
        return silu_of_half(0.5f * g);
    } else {
        return silu(g);
    }
}

__device__ __forceinline__ uint32_t shared_address(const void* p) {
    return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}
// Asks for a line of global memory, or on Hopper some of its sectors, into L2.
__device__ __forceinline__ void prefetch_l2(const void* p) {
    asm volatile("prefetch.global.L2 [%0];" ::"l"(p));
}
// Asks for `bytes` bytes, a multiple of 16 as their address is, into L2.
__device__ __forceinline__ void prefetch_l2(const void* from, int bytes) {
#if __CUDA_ARCH__ >= 900
    asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(from), "r"(bytes) : "memory");
#else
    for (int i = 0; i < bytes; i += 128) prefetch_l2(static_cast<const char*>(from) + i);
#endif
}

// Whether rows of `bytes` bytes that start at p can be accessed `width` bytes at a time.
inline bool aligned(const void* p, int64_t bytes, int64_t width) {
    return reinterpret_cast<uintptr_t>(p) % width == 0 && bytes % width == 0;
}

template <class T>
const T* data(const Tensor& t) {
    return static_cast<const T*>(t.const_data_ptr());
}
template <class T>
const T* data(const OptionalTensor& t) {
    return t ? data<T>(*t) : nullptr;
}
template <class T>
T* mutable_data(const Tensor& t) {
    return static_cast<T*>(t.mutable_data_ptr());
}

// A grid's first dimension; one block a row or a few, so 2^31 - 1 is far from reached.
inline unsigned grid_size(int64_t blocks) {
    check_int32_range(blocks, "the number of thread blocks");
    return static_cast<unsigned>(blocks);
}

}  // namespace flexmore::cuda
