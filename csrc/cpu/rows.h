// Row kernels of the CPU backend: the arithmetic on one token's or one row's vector.
//
// rows.cpp is compiled once per vector width (baseline, AVX2 + FMA, AVX-512) into one Table each;
// dispatch.cpp picks a Table when the library is loaded. This header is all that the two sides
// share and must stay free of inline functions and of library headers: code that a wide
// translation unit emitted for a shared inline function could otherwise be the copy the linker
// keeps, and would fault on a machine without that instruction set.
#pragma once

#include <cstdint>

namespace flexmore::rows {

struct BFloat16 {
    uint16_t bits;
};
struct Half {
    uint16_t bits;
};

// The accumulator of an element type: double for double, float for the rest.
template <class T>
struct AccOf {
    using type = float;
};
template <>
struct AccOf<double> {
    using type = double;
};

// Row indices may be -1 (an empty slot); such an entry is skipped. Rows are contiguous, row n
// starting at n * width. Inputs and outputs never alias unless said.
template <class T>
struct Kernels {
    using Acc = typename AccOf<T>::type;

    // out = base + sum over k of weights[k] * x[rows[k]]; weights null: ones; base null: zeros.
    // base holds accumulators (base_is_acc) or elements.
    void (*weighted_sum)(const T* x, const int32_t* rows, const Acc* weights, int64_t count,
                         int64_t width, const void* base, bool base_is_acc, T* out);
    // dx = weight * dy; returns <x, dy>.
    Acc (*scale_and_dot)(const T* dy, const T* x, Acc weight, int64_t width, T* dx);
    // For each of the token's rows: h = silu(gate) * up; mixed = the sum of weights[k] * h.
    void (*swiglu_mix)(const T* gate, const T* up, const int32_t* rows, const Acc* weights,
                       int64_t count, int64_t width, T* mixed, T* h);
    // The same for one row, adding to mixed in place.
    void (*swiglu_accumulate)(const T* gate, const T* up, Acc weight, int64_t width, Acc* mixed,
                              T* h);
    // The adjoint for one row, drow null: zeros; returns <dmixed, h>.
    Acc (*swiglu_backward)(const T* dmixed, const T* drow, const T* gate, const T* up, Acc weight,
                           int64_t width, T* dgate, T* dup, T* h);
};

struct Table {
    const char* name;
    Kernels<float> f32;
    Kernels<double> f64;
    Kernels<BFloat16> bf16;
    Kernels<Half> f16;
};

extern const Table table_baseline;
extern const Table table_avx2;
extern const Table table_avx512;

// The Table in use: the widest one that this processor can run, until use() says otherwise.
const Table& table();
// Uses the Table of this name from now on, in all threads; false if it cannot run here.
bool use(const char* name);

}  // namespace flexmore::rows
