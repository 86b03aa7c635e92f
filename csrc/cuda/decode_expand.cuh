// From G, U, A x to mixed and p_e h_e: B_gate, B_up are read once for all tokens. Or, kDown, from
// the parts of W_down mixed and s_down to y, reading B_down once.
//
// A thread block has some rows of B. It walks over the factors of the chosen experts by chunks of
// columns, two chunks between barriers, through a ring of shared memory. What it walks over is a
// table in shared memory, made while the kernel before still runs.
#pragma once

#include "decode.cuh"

namespace flexmore::cuda {
namespace decode {

// A factor b of a chosen expert, in the order in which they are multiplied.
struct Factor {
    const char* b;
    const char* s;  // its right operand: (rank, TP)
    int row_bytes, rank;
    short width, expert;
    short side;       // 0 gate, 1 up, 2 down
    short completes;  // whether it is the expert's last
};

// Columns of a chunk with their padding by zeros: 16, 32 or 64.
__device__ __forceinline__ int padded(int columns) {
    return columns > 32 ? 64 : columns > 16 ? 32 : 16;
}

__device__ __forceinline__ float swiglu(float gate, float up) { return silu(gate) * up; }

template <class T, int TP, bool kDown>
struct Expand {
    static constexpr int kBlockThreads = kDown ? 256 : 384;
    static constexpr int kBlockWarps = kBlockThreads / 32;
    static constexpr int kTiles = TP / 8;
    // A warp has a tile of rows and so many tiles of tokens.
    static constexpr int kUnitTiles = kDown ? (kTiles + 3) / 4 : (kTiles + 1) / 2;
    static constexpr int kUnitsAcross = kTiles / kUnitTiles;
    static constexpr int kRows = expand_rows(kDown);
    static constexpr int kPairs = expand_pairs(kDown, TP);
    static constexpr int kSlots = expand_slots(kDown, TP);
    using Sums = float[kUnitTiles][4];
    static_assert(kRows / 16 * kUnitsAcross <= kBlockWarps);

    const Problem& p;
    const Cut& cut;
    const Factor* factors;  // shared
    int num_factors;
    int first, count;  // rows
    uint32_t ring, tokens_at, slot_bytes;

    __device__ Expand(const Problem& problem, char* shared, const Factor* table)
        : p(problem),
          cut(kDown ? problem.cut_down : problem.cut_in),
          factors(table),
          ring(shared_address(shared)),
          tokens_at(cut.tile_rows * 128),
          slot_bytes((cut.tile_rows + TP) * 128) {}

    // One lane a factor: those of chosen experts, without gaps.
    __device__ void make_table(Factor* table, int* size, unsigned active) {
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            const int e = kDown ? lane : lane / 2, side = kDown ? 2 : lane % 2;
            const Pair& pair = p.pairs[side][min(e, kMaxExperts - 1)];
            const bool listed = e < p.E && (active >> e & 1) && pair.rank > 0;
            const unsigned all = __ballot_sync(kFullWarp, listed);
            if (listed) {
                const bool up_follows = !kDown && side == 0 && (all >> lane >> 1 & 1);
                const char* s = kDown ? p.s_down : p.s_in;
                table[__popc(all & ((1u << lane) - 1))] = {pair.b,
                                                           s + int64_t(pair.first) * TP * sizeof(T),
                                                           pair.ld * int(sizeof(T)),
                                                           pair.rank,
                                                           short(pair.width),
                                                           short(e),
                                                           short(side),
                                                           short(!up_follows)};
            }
            if (lane == 0) *size = __popc(all);
        }
        __syncthreads();
        num_factors = *size;
    }
    __device__ void begin_block(int block) {
        first = block_start(cut.rows, cut.blocks, block);
        count = block_start(cut.rows, cut.blocks, block + 1) - first;
    }
    template <int Width>
    __device__ void copy_rows(const Factor& factor, int column, uint32_t to) const {
        const int columns = min(kChunk, factor.rank - column);
        const int words = padded(columns) * int(sizeof(T)) / Width;  // a power of two
        const int shift = 31 - __clz(words);
        const int byte = (threadIdx.x & (words - 1)) * Width;
        const bool valid = byte < columns * int(sizeof(T));
        const int step = kBlockThreads >> shift;
        int row = threadIdx.x >> shift;
        const char* source = factor.b + (valid ? column * int(sizeof(T)) + byte : 0) +
                             int64_t(first + row) * factor.row_bytes;
        const int64_t stride = int64_t(step) * factor.row_bytes;
        for (; row < count; row += step, source += stride) {
            const uint32_t target = to + swizzled(row, byte / 16) + byte % 16;
            if constexpr (Width >= 4) {
                copy_async<Width>(target, source, valid);
            } else {
                const unsigned short value =
                    valid ? *reinterpret_cast<const unsigned short*>(source) : 0;
                asm volatile("st.shared.b16 [%0], %1;" ::"r"(target), "h"(value) : "memory");
            }
        }
    }
    __device__ void copy_weights(const Factor& factor, int column, int slot) const {
        const uint32_t to = ring + slot * slot_bytes;
        if (factor.width == 16) {
            copy_rows<16>(factor, column, to);
        } else if (factor.width >= 4) {
            copy_rows<4>(factor, column, to);
        } else {
            copy_rows<2>(factor, column, to);
        }
    }
    __device__ void copy_tokens(const Factor& factor, int column, int slot) const {
        const int columns = min(kChunk, factor.rank - column);
        const char* from = factor.s + int64_t(column) * TP * sizeof(T);
        const uint32_t to = ring + slot * slot_bytes + tokens_at;
        for (int i = threadIdx.x; i < padded(columns) * kTiles; i += kBlockThreads) {
            const int row = i / kTiles, word = i % kTiles;
            const bool valid = row < columns;
            copy_async<16>(to + swizzled_tokens<TP>(row, word), from + (valid ? i * 16 : 0), valid);
        }
    }
    __device__ int row_tile() const { return threadIdx.x / 32 / kUnitsAcross; }
    __device__ int token_tile() const { return threadIdx.x / 32 % kUnitsAcross * kUnitTiles; }
    __device__ void multiply(Sums& c, int slot, int columns) const {
        const int lane = threadIdx.x % 32, tile = row_tile();
        if (tile * 16 >= count) return;
        const uint32_t from = ring + slot * slot_bytes;
        const uint32_t weights = from + tile * 2048 + swizzled(lane % 16, lane / 16);
        const uint32_t tokens =
            from + tokens_at + token_lane<TP, kUnitTiles, true>(token_tile(), lane);
        const int steps = padded(columns) / 16;
        const auto one = [&](int step) {
            uint32_t a[4], b[kUnitTiles][2];
            load_matrices(a, weights ^ (step << 5));
            load_tokens<TP, kUnitTiles, true>(b, tokens, step);
#pragma unroll
            for (int n = 0; n < kUnitTiles; ++n) mma<T>(c[n], a, b[n]);
        };
        if (steps == kChunk / 16) {
#pragma unroll
            for (int step = 0; step < kChunk / 16; ++step) one(step);
        } else {
            for (int step = 0; step < steps; ++step) one(step);
        }
    }
    // f(offset of a pair of tokens in (rows, TP), first of them, row of the block, tile n, 0 or 2:
    // where the pair is in a sum). Offsets of a thread differ by constants.
    template <class F>
    __device__ void for_pairs(const F& f) const {
        const int lane = threadIdx.x % 32, row = row_tile() * 16 + lane / 4;
        const int token = token_tile() * 8 + lane % 4 * 2;
        const int offset = (first + row) * TP + token;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
            if (row + half * 8 >= count) continue;
#pragma unroll
            for (int n = 0; n < kUnitTiles; ++n)
                f(offset + half * 8 * TP + n * 8, token + n * 8, row + half * 8, n, half * 2);
        }
    }
};

// Beside a block of a product a multiprocessor has registers for one of 80 each; with more tokens
// it is better to wait for the product's end than to spill.
template <class T, int TP, bool kDown>
__global__ void __launch_bounds__(Expand<T, TP, kDown>::kBlockThreads, kDown || TP <= 16 ? 2 : 1)
    decode_expand_kernel(const __grid_constant__ Problem p, const __grid_constant__ Work out) {
    using Parts = Expand<T, TP, kDown>;
    using Sums = typename Parts::Sums;
    constexpr int kBlockThreads = Parts::kBlockThreads, kPairs = Parts::kPairs;
    extern __shared__ __align__(128) char shared[];
    __shared__ Factor factors[2 * kMaxExperts];
    __shared__ float weights[kDown ? 1 : kMaxExperts * TP];        // p_e of each token
    __shared__ unsigned char num_parts[kDown ? Parts::kRows : 1];  // of a row's sum
    __shared__ unsigned shared_active;
    __shared__ int shared_size;
    launch_dependents();
    const unsigned active = active_experts<kBlockThreads>(p, &shared_active);
    Parts work(p, shared, factors);
    work.make_table(factors, &shared_size, active);
    const Cut& cut = work.cut;
    const int first_block = blockIdx.x * cut.per_block;
    work.begin_block(first_block);
    // The chunk that is copied next: of factor `at`, from column `column` on.
    int at = 0, column = 0;
    const auto copy_pair = [&](int pair, bool tokens, bool only_tokens) {
        for (int i = 0; i < 2 && at < work.num_factors; ++i) {
            const Factor& factor = factors[at];
            if (!only_tokens) work.copy_weights(factor, column, 2 * pair + i);
            if (tokens) work.copy_tokens(factor, column, 2 * pair + i);
            column += kChunk;
            if (column >= factor.rank) {
                column = 0;
                ++at;
            }
        }
    };
    const auto count_parts = [&] {
        const Group& g = out.groups[0];
        for (int i = threadIdx.x; i < work.count; i += kBlockThreads) {
            // The block that holds the row: block_start's inverse.
            const int unit =
                int((unsigned(work.first + i + 1) * g.blocks - 1) / unsigned(g.rows)) * out.chunks;
            num_parts[i] = static_cast<unsigned char>(out.sharers(unit));
        }
    };
    for (int pair = 0; pair < kPairs - 1; ++pair) copy_pair(pair, false, false);
    commit_copies();
    for (int next = at; next < work.num_factors; ++next) {
        const int lines = (factors[next].rank * int(sizeof(T)) + 127) / 128;
        for (int i = threadIdx.x; i < work.count * min(lines, 4); i += kBlockThreads)
            prefetch_l2(factors[next].b +
                        int64_t(work.first + i % work.count) * factors[next].row_bytes +
                        i / work.count * 128);
    }
    if constexpr (!kDown) {
        for (int i = threadIdx.x; i < p.E * TP; i += kBlockThreads) weights[i] = 0;
        __syncthreads();
        if (threadIdx.x < p.T) {
            for (int k = 0; k < p.K; ++k) {
                const int64_t e = __ldcg(p.indices + threadIdx.x * p.K + k);
                if (e >= 0 && e < p.E)
                    weights[e * TP + threadIdx.x] += __ldcg(p.weights + threadIdx.x * p.K + k);
            }
        }
    } else {
        count_parts();
    }
    wait_for_previous();
    for (int block = first_block; block < min(first_block + cut.per_block, cut.blocks); ++block) {
        const bool is_first = block == first_block;
        if (!is_first) {
            work.begin_block(block);
            __syncthreads();
            if constexpr (kDown) count_parts();
        }
        at = column = 0;
        for (int pair = 0; pair < kPairs - 1; ++pair) copy_pair(pair, true, is_first);
        commit_copies();
        __syncthreads();
        Sums sums = {}, gate = {}, up = {};
        // For few tokens the base's part stays in registers; for more it is read for each expert.
        constexpr bool kKeeps = !kDown && TP <= 16;
        [[maybe_unused]] Sums base_gate, base_up;
        const float* base_u = p.base_in + int64_t(p.F) * TP;
        const auto pair_at = [](const float* from, int offset) {
            return *reinterpret_cast<const float2*>(from + offset);
        };
        if constexpr (kKeeps) {
            work.for_pairs([&](int offset, int, int, int n, int i) {
                const float2 g = pair_at(p.base_in, offset), u = pair_at(base_u, offset);
                base_gate[n][i] = g.x;
                base_gate[n][i + 1] = g.y;
                base_up[n][i] = u.x;
                base_up[n][i + 1] = u.y;
            });
        }
        // Adds p_e h_e of an expert whose deltas are complete.
        const auto add_hidden = [&](int e) {
            const bool keeps = p.pairs[2][e].rank > 0;
            char* hidden = p.hidden + int64_t(e) * p.F * TP * sizeof(T);
            work.for_pairs([&](int offset, int t, int, int n, int i) {
                float2 g, u;
                if constexpr (kKeeps) {
                    g = {base_gate[n][i], base_gate[n][i + 1]};
                    u = {base_up[n][i], base_up[n][i + 1]};
                } else {
                    g = pair_at(p.base_in, offset);
                    u = pair_at(base_u, offset);
                }
                const float2 w = *reinterpret_cast<const float2*>(weights + e * TP + t);
                // Selected, not multiplied by 0: what was not routed here may be infinite.
                const float a = w.x != 0 ? w.x * swiglu(gate[n][i] + g.x, up[n][i] + u.x) : 0;
                const float b =
                    w.y != 0 ? w.y * swiglu(gate[n][i + 1] + g.y, up[n][i + 1] + u.y) : 0;
                sums[n][i] += a;
                sums[n][i + 1] += b;
                if (keeps)
                    *reinterpret_cast<uint32_t*>(hidden + offset * sizeof(T)) = pack_pair<T>(a, b);
                // Not all pairs' loads at once: registers are short.
                if constexpr (!kKeeps) asm volatile("" ::: "memory");
            });
#pragma unroll
            for (int n = 0; n < Parts::kUnitTiles; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i) gate[n][i] = up[n][i] = 0;
        };
        if constexpr (kDown) {
            work.for_pairs([&](int offset, int, int row, int n, int i) {
                const int parts = num_parts[row];
#pragma unroll 4
                for (int part = 0; part < parts; ++part) {
                    const float2 one =
                        pair_at(p.planes + int64_t(part) * out.total_rows * TP, offset);
                    sums[n][i] += one.x;
                    sums[n][i + 1] += one.y;
                }
            });
        } else {
            for (int e = 0; e < p.E; ++e)
                if ((active >> e & 1) && p.pairs[0][e].rank + p.pairs[1][e].rank == 0)
                    add_hidden(e);
        }
        int from = 0, from_column = 0;
        wait_copies<0>();
        for (int pair = 0; from < work.num_factors; pair = pair + 1 == kPairs ? 0 : pair + 1) {
            wait_copies<kPairs - 2>();
            __syncthreads();
            copy_pair(pair == 0 ? kPairs - 1 : pair - 1, true, false);
            commit_copies();
            for (int i = 0; i < 2 && from < work.num_factors; ++i) {
                const Factor& factor = factors[from];
                const int columns = min(kChunk, factor.rank - from_column);
                if constexpr (kDown) {
                    work.multiply(sums, 2 * pair + i, columns);
                } else if (factor.side == 0) {
                    work.multiply(gate, 2 * pair + i, columns);
                } else {
                    work.multiply(up, 2 * pair + i, columns);
                }
                from_column += kChunk;
                if (from_column < factor.rank) continue;
                from_column = 0;
                ++from;
                if constexpr (!kDown) {
                    if (factor.completes) add_hidden(factor.expert);
                }
            }
        }
        wait_copies<0>();
        work.for_pairs([&](int offset, int t, int row, int n, int i) {
            if constexpr (kDown) {
                T* y = reinterpret_cast<T*>(p.y) + work.first + row;
                if (t < p.T) y[int64_t(t) * p.D] = from_acc<T>(sums[n][i]);
                if (t + 1 < p.T) y[int64_t(t + 1) * p.D] = from_acc<T>(sums[n][i + 1]);
            } else {
                *reinterpret_cast<uint32_t*>(p.mixed + offset * sizeof(T)) =
                    pack_pair<T>(sums[n][i], sums[n][i + 1]);
            }
        });
    }
}

}  // namespace decode
}  // namespace flexmore::cuda
