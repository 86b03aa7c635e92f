// What the CPU ops share: the choice of element type, and loops over rows on torch's threads.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "../common.h"
#include "rows.h"

namespace flexmore::cpu {

using rows::AccOf;

// Calls f(T{}) with the element type of `dtype`.
template <class F>
auto dispatch(ScalarType dtype, F&& f) {
    switch (dtype) {
        case ScalarType::Float:
            return f(float{});
        case ScalarType::Double:
            return f(double{});
        case ScalarType::BFloat16:
            return f(rows::BFloat16{});
        case ScalarType::Half:
            return f(rows::Half{});
        default:
            STD_TORCH_CHECK(false, "dtype ", torch::headeronly::toString(dtype),
                            " is not supported; accepted: float32, float64, bfloat16, float16");
            __builtin_unreachable();
    }
}

// The row kernels of an element type, at this machine's vector width.
inline const rows::Kernels<float>& kernels(float) { return rows::table().f32; }
inline const rows::Kernels<double>& kernels(double) { return rows::table().f64; }
inline const rows::Kernels<rows::BFloat16>& kernels(rows::BFloat16) { return rows::table().bf16; }
inline const rows::Kernels<rows::Half>& kernels(rows::Half) { return rows::table().f16; }

inline float to_acc(float x) { return x; }
inline double to_acc(double x) { return x; }
inline float to_acc(rows::BFloat16 x) {
    using torch::headeronly::BFloat16;
    return static_cast<float>(BFloat16(x.bits, BFloat16::from_bits()));
}
inline float to_acc(rows::Half x) {
    using torch::headeronly::Half;
    return static_cast<float>(Half(x.bits, Half::from_bits()));
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

// f(row) for each row, in parallel where the rows together hold enough work for a second thread.
// Rows are independent, so the result does not depend on the number of threads. f must not throw.
template <class F>
void for_rows(int64_t rows, int64_t work_per_row, const F& f) {
    constexpr int64_t kWorkPerThread = 16384;
    const int64_t grain = std::max<int64_t>(1, kWorkPerThread / std::max<int64_t>(1, work_per_row));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
        for (int64_t row = begin; row < end; ++row) f(row);
    });
}

}  // namespace flexmore::cpu
