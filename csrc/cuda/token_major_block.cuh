// What the roles of token_major.cuh share: how a block is cut, its shared memory, arithmetic of
// pairs.
#pragma once

#include "hopper.cuh"

namespace flexmore::cuda {
namespace token_mix_impl {

constexpr int kTokens = 64;  // of a block
constexpr int kMaxLowRank = 6;
constexpr int kMaxSet = 8;

// How a largest rank of 16, 32 or 64 is cut: columns of a chunk, expanding warpgroups, and
// registers a thread of these and of the shrinking one. With rows from outside, kAhead of a token's
// wait in registers for their use, and fewer experts are summed here.
template <int Rank, bool Rows>
struct Cut;
template <bool Rows>
struct Cut<16, Rows> {
    static constexpr int kColumns = 32, kExpanding = 3, kAhead = 1;
    static constexpr int kExpand = Rows ? 128 : 120, kShrink = Rows ? 72 : 96;
};
template <bool Rows>
struct Cut<32, Rows> {
    static constexpr int kColumns = 32, kExpanding = 2, kAhead = 2;
    static constexpr int kExpand = 168, kShrink = 152;
};
template <bool Rows>
struct Cut<64, Rows> {
    static constexpr int kColumns = 32, kExpanding = 2, kAhead = 2;
    static constexpr int kExpand = Rows ? 144 : 128, kShrink = Rows ? 200 : 232;
};
template <bool Rows>
constexpr int kMostLowRank = Rows ? kMaxLowRank - 1 : kMaxLowRank;
template <int Rank>
constexpr int kThreads = (Cut<Rank, false>::kExpanding + 2) * kWarpgroup;
constexpr int kCopyRegisters = 24;

// Registers a thread at launch. A block's warpgroups share what it got then: who asks for more than
// the others gave waits forever.
template <int Rank>
constexpr int kLaunchRegisters = 65536 / kThreads<Rank> / 8 * 8;
template <int Rank, bool Rows, class C = Cut<Rank, Rows>>
constexpr bool kRegistersFit = kCopyRegisters + C::kExpanding * C::kExpand + C::kShrink <=
                               (C::kExpanding + 2) * kLaunchRegisters<Rank>;
static_assert(kRegistersFit<16, false> && kRegistersFit<32, false> && kRegistersFit<64, false>);
static_assert(kRegistersFit<16, true> && kRegistersFit<32, true> && kRegistersFit<64, true>);

// Column of a chunk that column n of a matrix product stands for: so a thread's are contiguous.
template <int Columns>
__host__ __device__ __forceinline__ constexpr int column_of(int n) {
    return Columns / 4 * (n % 8 / 2) + n / 8 * 2 + n % 2;
}

struct Experts {
    // Of each expert: its place in the packed factors, or -1 if it has no delta; the ranks that are
    // computed, 16, 32 or 64 and at most Rank; its columns of s and of s_down, and their number:
    // multiples of 16, at most that.
    int place[kMaxSet], depth[kMaxSet];
    int gate_at[kMaxSet], gate_rank[kMaxSet];
    int up_at[kMaxSet], up_rank[kMaxSet];
    int down_at[kMaxSet], down_rank[kMaxSet];
};

struct Mix {
    const void *gate, *up, *s, *factors;
    const float* weights;
    const int32_t *token_order, *expert_to_row, *row_to_slot;
    const void* rows;          // (N, F), h of experts that are not among these; may be null
    const int32_t* row_slots;  // (T, K), the rows of a token there or -1
    void* mixed;
    float* s_down;  // (planes, T, R_d)
    int64_t num_tokens, width, s_width, down_width;
    int num_experts, top_k;
    int num_chunks, chunks_per_block;  // multiples of Cut's kExpanding
    Experts experts;
};

template <int Rank, bool Rows>
struct Shared {
    using Cut = token_mix_impl::Cut<Rank, Rows>;
    static constexpr int kRank = Rank, kColumns = Cut::kColumns, kExpanding = Cut::kExpanding;
    static constexpr int kStages = 4 * kExpanding;       // of factors
    static constexpr int kHidden = 2 * kExpanding;       // h tiles between expanding and shrinking
    static constexpr int kFactor = kColumns * Rank * 2;  // bytes of one of B_g, B_u, A_d, at most
    alignas(128) unsigned char s[kMaxLowRank][2][kTokens * Rank * 2];
    alignas(128) unsigned char stage[kStages][3 * kFactor];
    alignas(128) unsigned char hidden[kHidden][kTokens * kColumns * 2];
    float weight[kMaxLowRank][kTokens];  // 0 where not chosen; then `chosen` has no bit
    float base_weight[kTokens];          // of the experts without a delta
    int token[kTokens];                  // -1 past the end
    int chosen[kTokens];                 // bits: chosen entries of `present`; bit 31: base_weight
    int row[kMaxSet][kTokens];           // a token's entries of `row_slots`, from the first on; -1
    float row_weight[kMaxSet][kTokens];  // 0 where there is none
    int present[kMaxLowRank], depth[kMaxLowRank], num_present, num_rows, set;
    Barrier stage_full[kStages], stage_empty[kStages], hidden_full[kHidden], hidden_empty[kHidden];
};

// bfloat16's sigmoid is formed by tanh of g / 2, and dg twice, which is exact: then a sum of these
// is halved.
template <class T>
constexpr bool kDoubled = std::is_same_v<T, __nv_bfloat16>;
template <class T>
constexpr float kSingle = kDoubled<T> ? 0.5f : 1.0f;

// From half of g: silu(g), and silu'(g) or, if kDoubled, 2 silu'(g) - 1.
template <class T>
__device__ __forceinline__ void silu_and_slope(float half, float& silu, float& slope) {
    if constexpr (kDoubled<T>) {
        float t;
        asm("tanh.approx.f32 %0, %1;" : "=f"(t) : "f"(half));
        silu = fmaf(half, t, half);
        slope = t + fmaf(-silu, t, silu);
    } else {
        const float share = sigmoid_of_half<T>(half);
        silu = 2 * half * share;
        slope = fmaf(silu, 1 - share, share);
    }
}
// dg (twice it if kDoubled) from dh u and that slope.
template <class T>
__device__ __forceinline__ float gate_grad(float product, float slope) {
    return kDoubled<T> ? fmaf(product, slope, product) : product * slope;
}

// x, or 0 where the mask is 0: selected, not multiplied, since Inf and NaN of experts that were not
// chosen must not reach a sum; by bits, since the compiler branches around a conditional's sigmoid.
__device__ __forceinline__ float selected(float x, uint32_t mask) {
    return __uint_as_float(__float_as_uint(x) & mask);
}

}  // namespace token_mix_impl
}  // namespace flexmore::cuda
