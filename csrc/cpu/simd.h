// Vectors of the width that this translation unit is compiled for, on the compiler's generic
// vector types: one source for SSE2, AVX2, AVX-512 and NEON. Included by rows.cpp only. All names
// have internal linkage and only freestanding headers are used; rows.h says why.
#pragma once

#include <cfloat>
#include <cstdint>

#include "rows.h"

#define FM_INLINE inline __attribute__((always_inline))

namespace flexmore::rows {
namespace {

#if defined(__AVX512F__)
constexpr int kBytes = 64;
#elif defined(__AVX2__)
constexpr int kBytes = 32;
#else
constexpr int kBytes = 16;
#endif

typedef float vf32 __attribute__((vector_size(kBytes)));
typedef int32_t vi32 __attribute__((vector_size(kBytes)));
typedef uint32_t vu32 __attribute__((vector_size(kBytes)));
typedef uint16_t vu16 __attribute__((vector_size(kBytes / 2)));
typedef double vf64 __attribute__((vector_size(kBytes)));
typedef int64_t vi64 __attribute__((vector_size(kBytes)));

template <class Acc>
struct VecOf {
    using type = vf32;
};
template <>
struct VecOf<double> {
    using type = vf64;
};
template <class Acc>
using Vec = typename VecOf<Acc>::type;
template <class Acc>
constexpr int kLanes = kBytes / int(sizeof(Acc));

// How many lanes of a vector exist in memory: all of them, or the first `count` (the row's end).
struct Whole {};
struct Part {
    int count;
};

template <class V, class T>
FM_INLINE V raw_load(const T* p, Whole) {
    V v;
    __builtin_memcpy(&v, p, sizeof(V));
    return v;
}
template <class V, class T>
FM_INLINE V raw_load(const T* p, Part part) {
    V v = {};
    __builtin_memcpy(&v, p, sizeof(T) * part.count);
    return v;
}
template <class V, class T>
FM_INLINE void raw_store(T* p, V v, Whole) {
    __builtin_memcpy(p, &v, sizeof(V));
}
template <class V, class T>
FM_INLINE void raw_store(T* p, V v, Part part) {
    __builtin_memcpy(p, &v, sizeof(T) * part.count);
}

FM_INLINE vf32 splat(float x) { return x - vf32{}; }
FM_INLINE vf64 splat(double x) { return x - vf64{}; }

// Lanes that do not exist load as zero.
template <class Extent>
FM_INLINE vf32 load(const float* p, Extent n) {
    return raw_load<vf32>(p, n);
}
template <class Extent>
FM_INLINE vf64 load(const double* p, Extent n) {
    return raw_load<vf64>(p, n);
}
template <class Extent>
FM_INLINE vf32 load(const BFloat16* p, Extent n) {
    return (vf32)(__builtin_convertvector(raw_load<vu16>(p, n), vu32) << 16);
}
// IEEE half to single: a normal number by moving the exponent's bias with one multiplication
// (which also carries inf and NaN), a subnormal by subtracting the bit that the trick adds.
template <class Extent>
FM_INLINE vf32 load(const Half* p, Extent n) {
    const vu32 w = __builtin_convertvector(raw_load<vu16>(p, n), vu32) << 16;
    const vu32 sign = w & 0x80000000u;
    const vu32 twice = w + w;
    const vf32 normal = (vf32)((twice >> 4) + (0xE0u << 23)) * 0x1.0p-112f;
    const vf32 subnormal = (vf32)((twice >> 17) | (126u << 23)) - 0.5f;
    return (vf32)(sign | (twice < (1u << 27) ? (vu32)subnormal : (vu32)normal));
}

template <class Extent>
FM_INLINE void store(float* p, vf32 v, Extent n) {
    raw_store(p, v, n);
}
template <class Extent>
FM_INLINE void store(double* p, vf64 v, Extent n) {
    raw_store(p, v, n);
}
// Round to nearest even; a NaN stays a NaN (the carry could turn its mantissa into inf).
template <class Extent>
FM_INLINE void store(BFloat16* p, vf32 v, Extent n) {
    const vu32 w = (vu32)v;
    const vu32 rounded = (w + 0x7FFFu + ((w >> 16) & 1u)) >> 16;
    const vu32 bits = v == v ? rounded : (w >> 16) | 0x40u;
    raw_store(p, __builtin_convertvector(bits, vu16), n);
}
// Round to nearest even through one addition whose exponent puts the half's last bit at the
// single's last bit; out of range overflows to inf in the first multiplication.
template <class Extent>
FM_INLINE void store(Half* p, vf32 v, Extent n) {
    const vu32 w = (vu32)v;
    const vu32 twice = w + w;
    const vf32 magnitude = (vf32)(w & 0x7FFFFFFFu);
    vu32 bias = twice & 0xFF000000u;
    bias = bias < 0x71000000u ? vu32{} + 0x71000000u : bias;
    const vf32 base = (vf32)((bias >> 1) + 0x07800000u) + (magnitude * 0x1.0p+112f) * 0x1.0p-110f;
    const vu32 bits = (vu32)base;
    const vu32 finite = ((bits >> 13) & 0x7C00u) + (bits & 0xFFFu);
    const vu32 half = ((w & 0x80000000u) >> 16) | (twice > 0xFF000000u ? vu32{} + 0x7E00u : finite);
    raw_store(p, __builtin_convertvector(half, vu16), n);
}

// The sum of the lanes, in lane order: the same bits on every run.
template <class V>
FM_INLINE auto sum_lanes(V v) {
    auto total = v[0];
    for (int i = 1; i < int(sizeof(V) / sizeof(v[0])); ++i) total += v[i];
    return total;
}

// exp(x) for x <= 0 (NaN gives NaN), within 1 ulp; 0 where the result would be subnormal.
// x = n ln 2 + r, |r| <= ln 2 / 2: n by adding 1.5 * 2^23, whose last bit is worth 1, and exp(r) by
// the Cephes minimax polynomial.
FM_INLINE vf32 exp_nonpositive(vf32 x) {
    const vf32 shift = splat(12582912.0f);
    const vf32 shifted = x * 1.44269504088896341f + shift;
    const vf32 n = shifted - shift;
    vf32 r = x - n * 0.693359375f;
    r = r - n * -2.12194440e-4f;
    vf32 p = splat(1.9875691500e-4f);
    p = p * r + 1.3981999507e-3f;
    p = p * r + 8.3334519073e-3f;
    p = p * r + 4.1665795894e-2f;
    p = p * r + 1.6666665459e-1f;
    p = p * r + 5.0000001201e-1f;
    p = p * (r * r) + r + 1.0f;
    const vf32 scale = (vf32)(((vi32)shifted - (vi32)shift + 127) << 23);
    return x < -87.336544f ? vf32{} : p * scale;
}

// The same in double; the polynomial is the Taylor series, whose remainder 4e-18 is below an ulp.
FM_INLINE vf64 exp_nonpositive(vf64 x) {
    constexpr double kInverseFactorials[] = {
        1.0 / 479001600, 1.0 / 39916800, 1.0 / 3628800, 1.0 / 362880, 1.0 / 40320, 1.0 / 5040,
        1.0 / 720,       1.0 / 120,      1.0 / 24,      1.0 / 6,      1.0 / 2};
    const vf64 shift = splat(6755399441055744.0);
    const vf64 shifted = x * 1.4426950408889634074 + shift;
    const vf64 n = shifted - shift;
    vf64 r = x - n * 6.93145751953125e-1;
    r = r - n * 1.42860682030941723212e-6;
    vf64 p = splat(1.0 / 6227020800.0);
    for (double c : kInverseFactorials) p = p * r + c;
    p = p * (r * r) + r + 1.0;
    const vf64 scale = (vf64)(((vi64)shifted - (vi64)shift + 1023) << 52);
    return x < -708.39641853226408 ? vf64{} : p * scale;
}

FM_INLINE vf32 negative_magnitude(vf32 x) { return (vf32)((vu32)x | 0x80000000u); }
FM_INLINE vf64 negative_magnitude(vf64 x) { return (vf64)((vi64)x | INT64_MIN); }
FM_INLINE float largest(vf32) { return FLT_MAX; }
FM_INLINE double largest(vf64) { return DBL_MAX; }
// Limits that let a NaN through.
template <class V, class Acc>
FM_INLINE V at_least(V x, Acc limit) {
    return x < limit ? splat(limit) : x;
}
template <class V, class Acc>
FM_INLINE V at_most(V x, Acc limit) {
    return x > limit ? splat(limit) : x;
}

// s = sigmoid(x) and 1 - s, each to full relative accuracy for every x up to +-inf, and
// x s = silu(x), which is 0 and not NaN at -inf.
template <class V>
struct Sigmoid {
    V s, complement, silu;
};
template <class V>
FM_INLINE Sigmoid<V> sigmoid(V x) {
    const V e = exp_nonpositive(negative_magnitude(x));
    const V big = 1 / (1 + e);
    const V small = e * big;
    const V s = x >= 0 ? big : small;
    return {s, x >= 0 ? small : big, at_least(x, -largest(x)) * s};
}

// d silu / dx = s + silu (1 - s), which is 1 at +inf.
template <class V>
FM_INLINE V silu_slope(const Sigmoid<V>& g) {
    return g.s + at_most(g.silu, largest(g.silu)) * g.complement;
}

}  // namespace
}  // namespace flexmore::rows
