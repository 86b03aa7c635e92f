// The row kernels of rows.h. CMake compiles this file once per vector width, with FM_TABLE and
// FM_NAME set and the instruction set enabled by compiler flags.
#include "rows.h"

#include "simd.h"

namespace flexmore::rows {
namespace {

// Columns handled at a time where several rows are summed: the accumulators (4 KB, 8 KB in double)
// stay in the first-level cache while rows stream through one after another.
constexpr int64_t kBlock = 1024;

template <class Acc, class Body>
FM_INLINE void for_vectors(int64_t width, Body body) {
    constexpr int lanes = kLanes<Acc>;
    int64_t i = 0;
    for (; i + lanes <= width; i += lanes) body(i, Whole{});
    if (i < width) body(i, Part{int(width - i)});
}

FM_INLINE int64_t shorter(int64_t a, int64_t b) { return a < b ? a : b; }

template <class T, class B>
FM_INLINE void weighted_sum_from(const T* x, const int32_t* rows,
                                 const typename AccOf<T>::type* weights, int64_t count,
                                 int64_t width, const B* base, T* out) {
    using Acc = typename AccOf<T>::type;
    alignas(64) Acc sum[kBlock];
    for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t block = shorter(kBlock, width - start);
        for_vectors<Acc>(block, [&](int64_t i, auto n) __attribute__((always_inline)) {
            store(sum + i, base ? load(base + start + i, n) : Vec<Acc>{}, n);
        });
        for (int64_t k = 0; k < count; ++k) {
            if (rows[k] < 0) continue;
            const T* row = x + rows[k] * width + start;
            const Acc w = weights ? weights[k] : Acc(1);
            for_vectors<Acc>(block, [&](int64_t i, auto n) __attribute__((always_inline)) {
                store(sum + i, load(sum + i, n) + w * load(row + i, n), n);
            });
        }
        for_vectors<Acc>(block, [&](int64_t i, auto n) __attribute__((always_inline)) {
            store(out + start + i, load(sum + i, n), n);
        });
    }
}

template <class T>
void weighted_sum(const T* x, const int32_t* rows, const typename AccOf<T>::type* weights,
                  int64_t count, int64_t width, const void* base, bool base_is_acc, T* out) {
    using Acc = typename AccOf<T>::type;
    if (base_is_acc) {
        weighted_sum_from(x, rows, weights, count, width, static_cast<const Acc*>(base), out);
    } else {
        weighted_sum_from(x, rows, weights, count, width, static_cast<const T*>(base), out);
    }
}

template <class T>
typename AccOf<T>::type scale_and_dot(const T* dy, const T* x, typename AccOf<T>::type weight,
                                      int64_t width, T* dx) {
    using Acc = typename AccOf<T>::type;
    Vec<Acc> dot = {};
    for_vectors<Acc>(width, [&](int64_t i, auto n) __attribute__((always_inline)) {
        const Vec<Acc> g = load(dy + i, n);
        dot += g * load(x + i, n);
        store(dx + i, weight * g, n);
    });
    return sum_lanes(dot);
}

template <class T>
void swiglu_accumulate(const T* gate, const T* up, typename AccOf<T>::type weight, int64_t width,
                       typename AccOf<T>::type* mixed, T* h) {
    using Acc = typename AccOf<T>::type;
    for_vectors<Acc>(width, [&](int64_t i, auto n) __attribute__((always_inline)) {
        const auto g = sigmoid(load(gate + i, n));
        const Vec<Acc> value = g.silu * load(up + i, n);
        store(mixed + i, load(mixed + i, n) + weight * value, n);
        store(h + i, value, n);
    });
}

template <class T>
void swiglu_mix(const T* gate, const T* up, const int32_t* rows,
                const typename AccOf<T>::type* weights, int64_t count, int64_t width, T* mixed,
                T* h) {
    using Acc = typename AccOf<T>::type;
    alignas(64) Acc sum[kBlock];
    for (int64_t start = 0; start < width; start += kBlock) {
        const int64_t block = shorter(kBlock, width - start);
        for (int64_t i = 0; i < block; ++i) sum[i] = 0;
        for (int64_t k = 0; k < count; ++k) {
            if (rows[k] < 0) continue;
            const int64_t at = rows[k] * width + start;
            swiglu_accumulate(gate + at, up + at, weights[k], block, sum, h + at);
        }
        for_vectors<Acc>(block, [&](int64_t i, auto n) __attribute__((always_inline)) {
            store(mixed + start + i, load(sum + i, n), n);
        });
    }
}

template <class T>
typename AccOf<T>::type swiglu_backward(const T* dmixed, const T* drow, const T* gate, const T* up,
                                        typename AccOf<T>::type weight, int64_t width, T* dgate,
                                        T* dup, T* h) {
    using Acc = typename AccOf<T>::type;
    Vec<Acc> dot = {};
    for_vectors<Acc>(width, [&](int64_t i, auto n) __attribute__((always_inline)) {
        const auto g = sigmoid(load(gate + i, n));
        const Vec<Acc> u = load(up + i, n);
        const Vec<Acc> dm = load(dmixed + i, n);
        const Vec<Acc> value = g.silu * u;
        dot += dm * value;
        const Vec<Acc> dh = weight * dm + (drow ? load(drow + i, n) : Vec<Acc>{});
        store(dup + i, dh * g.silu, n);
        store(dgate + i, dh * u * silu_slope(g), n);
        store(h + i, value, n);
    });
    return sum_lanes(dot);
}

template <class T>
constexpr Kernels<T> kernels() {
    return {weighted_sum<T>, scale_and_dot<T>, swiglu_mix<T>, swiglu_accumulate<T>,
            swiglu_backward<T>};
}

}  // namespace

extern const Table FM_TABLE;
const Table FM_TABLE = {FM_NAME, kernels<float>(), kernels<double>(), kernels<BFloat16>(),
                        kernels<Half>()};

}  // namespace flexmore::rows
