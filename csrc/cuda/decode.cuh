// The layer for a few tokens: what its kernels share. The design: experts.cu.
#pragma once

#include "../decode_plan.h"
#include "mma.cuh"

namespace flexmore::cuda {
namespace decode {

// Chunks of weights that the product asks for, into L2, while the kernel before still runs, besides
// those that fill its ring.
constexpr int kPrefetch = 4;

// One projection of one low-rank expert: a (rank, in), b (out, rank) of row stride ld.
struct Pair {
    const char* a;
    const char* b;
    int rank, ld;
    int width;  // bytes that b's rows can be copied by: 2, 4, 8 (copied by 4) or 16
    int first;  // its first row among all experts' of the projection (gate and up count as one)
};

struct Problem {
    const char* x;           // (T, D)
    const int64_t* indices;  // (T, K)
    const float* weights;    // (T, K)
    const char* base[3];     // gate, up (F, D), down (D, F)
    Pair pairs[3][kMaxExperts];
    int T, D, F, K, E, ranks_in, num_counters;
    Cut cut_in, cut_down;
    // Between the kernels, tokens padded to TP: a row a feature.
    char* s_in;     // (ranks_in, TP): A_gate x, A_up x
    char* mixed;    // (F, TP): sum of p_e h_e
    char* hidden;   // (E, F, TP): p_e h_e
    float* planes;  // (planes, D + ranks_down, TP): parts of W_d mixed and A_d p_e h_e
    char* s_down;   // (ranks_down, TP)
    int* counters;  // parts that are there of each block of A_d
    char* y;        // (T, D)
};

// The experts that tokens chose, T K slots dealt to the threads of a block, and their weights if
// asked for. The first ones are loaded where this is made: ahead of copies, for which later loads
// would have to wait.
template <int Threads, bool kWeights = false>
struct Choices {
    static constexpr int kAhead = 2;
    const Problem& p;
    int64_t expert[kAhead];
    float weight[kAhead];

    __device__ explicit Choices(const Problem& problem) : p(problem) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int slot = threadIdx.x + i * Threads;
            expert[i] = slot < p.T * p.K ? __ldcg(p.indices + slot) : -1;
            weight[i] = kWeights && slot < p.T * p.K ? __ldcg(p.weights + slot) : 0;
        }
    }
    // f(slot, expert, weight)
    template <class F>
    __device__ void for_each(const F& f) const {
        const auto call = [&](int slot, int64_t e, float w) {
            if (e >= 0 && e < p.E) f(slot, int(e), w);
        };
#pragma unroll
        for (int i = 0; i < kAhead; ++i) call(threadIdx.x + i * Threads, expert[i], weight[i]);
        for (int slot = threadIdx.x + kAhead * Threads; slot < p.T * p.K; slot += Threads)
            call(slot, __ldcg(p.indices + slot), kWeights ? __ldcg(p.weights + slot) : 0);
    }
    // Bit e: some token chose expert e. All threads call it; synchronises.
    __device__ unsigned active(unsigned* shared) const {
        if (threadIdx.x == 0) *shared = 0;
        __syncthreads();
        unsigned mine = 0;
        for_each([&](int, int e, float) { mine |= 1u << e; });
        mine = __reduce_or_sync(kFullWarp, mine);
        if (threadIdx.x % 32 == 0 && mine) atomicOr(shared, mine);
        __syncthreads();
        return *shared;
    }
};

// The value, in a way that it stays in a register and is not computed anew at each use.
__device__ __forceinline__ uint32_t kept(uint32_t value) {
    asm volatile("" : "+r"(value));
    return value;
}

// As `pack`, by a conversion for each: these kernels' instructions then come in a better order.
template <class T>
__device__ __forceinline__ uint32_t pack_pair(float a, float b) {
    Pack<T, 2> pack{{from_acc<T>(a), from_acc<T>(b)}};
    return *reinterpret_cast<uint32_t*>(&pack);
}

// 16-byte words of a row of 128 bytes, so that 8 rows' words at one place lie in different banks.
__device__ __forceinline__ uint32_t swizzled(int row, int word) {
    return row * 128 + ((word ^ (row & 7)) << 4);
}
// The same for rows of TP elements of 16 bits, TP 8 to 64.
template <int TP>
__device__ __forceinline__ uint32_t swizzled_tokens(int row, int word) {
    constexpr int kWords = TP / 8;
    constexpr int kRows = 8 / kWords;  // in 128 bytes
    return row * TP * 2 + ((word ^ (row / kRows % kWords)) << 4);
}

// Where a lane reads right operands of a step of 16 columns k, for tiles of 8 tokens from
// `first_tile` on: from rows by token (k in 128 bytes) or, Transposed, rows by k.
template <int TP, int Tiles, bool Transposed>
__device__ __forceinline__ uint32_t token_lane(int first_tile, int lane) {
    const int half = lane / 8 % 2, tile = first_tile + (Tiles == 1 ? 0 : lane / 16);
    return Transposed ? swizzled_tokens<TP>(half * 8 + lane % 8, tile)
                      : swizzled(tile * 8 + lane % 8, half);
}
// Those operands of step `step`; `from` is the chunk's address plus token_lane. A step is two words
// of a row by token, and two tiles are two words of a row by k: the swizzle is an exclusive or.
template <int TP, int Tiles, bool Transposed>
__device__ __forceinline__ void load_tokens(uint32_t (&b)[Tiles][2], uint32_t from, int step) {
    from = Transposed ? from + step * 16 * TP * 2 : from ^ (step << 5);
    if constexpr (Tiles == 1) {
        load_columns<Transposed>(b[0][0], b[0][1], from);
    } else {
#pragma unroll
        for (int n = 0; n < Tiles; n += 2) {
            load_columns<Transposed>(b[n][0], b[n][1], b[n + 1][0], b[n + 1][1],
                                     Transposed ? from ^ (n << 4) : from + n * 1024);
        }
    }
}

}  // namespace decode
}  // namespace flexmore::cuda
