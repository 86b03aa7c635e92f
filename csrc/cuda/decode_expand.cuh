// Expansions: what walks over the factors B of the chosen experts, two side by side, by chunks of
// columns, through a ring of shared memory. Here down's: from the parts of W_down mixed and s_down
// to y, reading B_down once. The one of gate and up, which makes h_e: decode_hidden.cuh.
//
// A thread block has some rows of B. What it walks over is a table in shared memory, made while the
// kernel before still runs.
#pragma once

#include "decode.cuh"

namespace flexmore::cuda {
namespace decode {

// A factor b of a chosen expert; of rank 0 where there is none.
struct Factor {
    const char* b;
    const char* s;  // its right operand: (rank, TP)
    int row_bytes, rank, width;
};

// What is copied and multiplied side by side, chunk by chunk: an expert's factors of gate and up,
// or those of two experts' down projections.
struct Couple {
    Factor of[2];
    int expert;

    __device__ int rank() const { return max(of[0].rank, of[1].rank); }
};

// Columns of a chunk with their padding by zeros: 16, 32 or 64.
__device__ __forceinline__ int padded(int columns) {
    return columns > 32 ? 64 : columns > 16 ? 32 : 16;
}

template <class T, int TP, bool kDown>
struct Expand {
    static constexpr int kBlockThreads = kDown ? 256 : 384;
    static constexpr int kBlockWarps = kBlockThreads / 32;
    static constexpr int kTiles = TP / 8;
    // A warp has a tile of rows and so many tiles of tokens.
    static constexpr int kUnitTiles = kDown ? (kTiles + 3) / 4 : (kTiles + 1) / 2;
    static constexpr int kUnitsAcross = kTiles / kUnitTiles;
    static constexpr int kRows = expand_rows(kDown);
    static constexpr int kRowsAtOnce = kBlockThreads / 8;  // that full chunks are copied by
    static constexpr int kPairs = expand_pairs(TP);
    static constexpr int kSlots = expand_slots(TP);
    using Sums = float[kUnitTiles][4];
    static_assert(kRows / 16 * kUnitsAcross <= kBlockWarps);
    static_assert(kRows % kRowsAtOnce == 0 && kRowsAtOnce % 8 == 0);

    const Problem& p;
    const Cut& cut;
    const Couple* couples;  // shared
    int num_couples;
    int first, count;  // rows
    int at, column;    // the chunks that are copied next: of couple `at`, from `column` on
    uint32_t ring, tokens_at, slot_bytes;
    uint32_t copy_lane, copy_tokens_lane, weights_lane, tokens_lane;  // in a slot

    __device__ Expand(const Problem& problem, char* shared, const Couple* table)
        : p(problem),
          cut(kDown ? problem.cut_down : problem.cut_in),
          couples(table),
          tokens_at(cut.tile_rows * 128),
          slot_bytes((cut.tile_rows + TP) * 128) {
        const int lane = threadIdx.x % 32, thread = threadIdx.x;
        ring = kept(shared_address(shared));
        copy_lane = kept(swizzled(thread / 8, thread % 8));
        copy_tokens_lane = kept(tokens_at + swizzled_tokens<TP>(thread / kTiles, thread % kTiles));
        weights_lane = kept(row_tile() * 2048 + swizzled(lane % 16, lane / 16));
        tokens_lane = kept(tokens_at + token_lane<TP, kUnitTiles, true>(token_tile(), lane));
    }

    // One lane of the first warp a factor. Places are given by ranks alone: whose chunks alternate,
    // and so the order of a token's sum, does not depend on what others chose. Couples of which
    // nobody is chosen are left out.
    __device__ void make_table(Couple* table, int* size, unsigned active) {
        if (threadIdx.x < 32) {
            const int lane = threadIdx.x;
            const int e = kDown ? lane : lane / 2, side = kDown ? 2 : lane % 2;
            const Pair& pair = p.pairs[side][min(e, kMaxExperts - 1)];
            const bool has = e < p.E && pair.rank > 0, chosen = has && (active >> e & 1);
            unsigned placed = __ballot_sync(kFullWarp, has);
            // Gate and up go together, where one has no factor too; of an odd number the last
            // place is empty: a lane beyond all experts has it.
            if constexpr (!kDown) {
                placed |= (placed & 0x55555555u) << 1 | (placed >> 1 & 0x55555555u);
            } else if (__popc(placed) % 2) {
                placed |= 1u << kMaxExperts;
            }
            const int place = __popc(placed & ((1u << lane) - 1)), couple = place / 2;
            const unsigned kept = __reduce_or_sync(kFullWarp, chosen ? 1u << couple : 0u);
            if ((placed >> lane & 1) && (kept >> couple & 1)) {
                const char* s = kDown ? p.s_down : p.s_in;
                Couple& to = table[__popc(kept & ((1u << couple) - 1))];
                to.of[place % 2] = {pair.b, s + int64_t(pair.first) * TP * sizeof(T),
                                    pair.ld * int(sizeof(T)), chosen ? pair.rank : 0, pair.width};
                if (place % 2 == 0) to.expert = e;
            }
            if (lane == 0) *size = __popc(kept);
        }
    }
    __device__ int end_block(int first_block) const {
        return min(first_block + cut.per_block, cut.blocks);
    }
    __device__ void begin_block(int block) {
        first = block_start(cut.rows, cut.blocks, block);
        count = block_start(cut.rows, cut.blocks, block + 1) - first;
    }
    // Copies the next chunks of weights, their right operands, or both, to the pair of slots.
    __device__ void copy_pair(int pair, bool weights, bool tokens) {
        if (at == num_couples) return;
        const Couple& couple = couples[at];
#pragma unroll
        for (int i = 0; i < 2; ++i) {
            const uint32_t to = ring + (2 * pair + i) * slot_bytes;
            if (column >= couple.of[i].rank) continue;
            if (weights) copy_weights(couple.of[i], column, to);
            if (tokens) copy_tokens(couple.of[i], column, to);
        }
        column += kChunk;
        if (column >= couple.rank()) {
            column = 0;
            ++at;
        }
    }
    __device__ void fill_ring(bool weights, bool tokens) {
        at = column = 0;
        for (int pair = 0; pair < kPairs - 1; ++pair) copy_pair(pair, weights, tokens);
    }
    // f(pair of slots, couple, column) for the chunks of all couples, in order; the ring is filled,
    // with the first chunks in slots `pair`.
    template <class F>
    __device__ void for_steps(int pair, const F& f) {
        for (int c = 0; c < num_couples; ++c) {
            const Couple& couple = couples[c];
            for (int done = 0; done < couple.rank(); done += kChunk) {
                wait_copies<kPairs - 2>();
                __syncthreads();
                copy_pair(pair == 0 ? kPairs - 1 : pair - 1, true, true);
                commit_copies();
                f(pair, couple, done);
                pair = pair + 1 == kPairs ? 0 : pair + 1;
            }
        }
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
                    valid ? __ldcg(reinterpret_cast<const unsigned short*>(source)) : 0;
                asm volatile("st.shared.b16 [%0], %1;" ::"r"(target), "h"(value) : "memory");
            }
        }
    }
    __device__ void copy_weights(const Factor& factor, int column, uint32_t to) const {
        if (factor.width == 16 && factor.rank - column >= kChunk) {
            const int row = threadIdx.x / 8;
            const char* source = factor.b + int64_t(first + row) * factor.row_bytes +
                                 column * int(sizeof(T)) + threadIdx.x % 8 * 16;
#pragma unroll
            for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
                if (row + i * kRowsAtOnce < count)
                    copy_async<16>(to + copy_lane + i * kRowsAtOnce * 128, source, true);
                source += int64_t(kRowsAtOnce) * factor.row_bytes;
            }
        } else if (factor.width == 16) {
            copy_rows<16>(factor, column, to);
        } else if (factor.width >= 4) {
            copy_rows<4>(factor, column, to);
        } else {
            copy_rows<2>(factor, column, to);
        }
    }
    __device__ void copy_tokens(const Factor& factor, int column, uint32_t to) const {
        const int columns = min(kChunk, factor.rank - column);
        const int words = padded(columns) * kTiles;
        const char* from = factor.s + int64_t(column) * TP * sizeof(T);
#pragma unroll
        for (int i = 0; i < kChunk * kTiles; i += kBlockThreads) {
            const int word = threadIdx.x + i;
            const bool valid = word < columns * kTiles;
            if (word < words)
                copy_async<16>(to + copy_tokens_lane + i * 16, from + (valid ? word * 16 : 0),
                               valid);
        }
    }
    __device__ int row_tile() const { return threadIdx.x / 32 / kUnitsAcross; }
    __device__ int token_tile() const { return threadIdx.x / 32 % kUnitsAcross * kUnitTiles; }
    // Adds the product of a slot's chunk, of so many columns that are left of its factor.
    __device__ void multiply(Sums& c, int slot, int columns) const {
        if (columns <= 0 || row_tile() * 16 >= count) return;
        const uint32_t weights = ring + slot * slot_bytes + weights_lane;
        const uint32_t tokens = ring + slot * slot_bytes + tokens_lane;
        // So many steps' fragments at once as registers hold.
        constexpr int kAtOnce = kUnitTiles <= 2 ? 4 : 2;
        const auto some = [&]<int Steps>(std::integral_constant<int, Steps>, int begin) {
            uint32_t a[Steps][4], b[Steps][kUnitTiles][2];
#pragma unroll
            for (int i = 0; i < Steps; ++i) {
                load_matrices(a[i], weights ^ ((begin + i) << 5));
                load_tokens<TP, kUnitTiles, true>(b[i], tokens, begin + i);
            }
#pragma unroll
            for (int i = 0; i < Steps; ++i)
#pragma unroll
                for (int n = 0; n < kUnitTiles; ++n) mma<T>(c[n], a[i], b[i][n]);
        };
        if (columns > kChunk / 2) {
#pragma unroll
            for (int step = 0; step < kChunk / 16; step += kAtOnce)
                some(std::integral_constant<int, kAtOnce>{}, step);
        } else {
            for (int step = 0; step < padded(columns) / 16; ++step)
                some(std::integral_constant<int, 1>{}, step);
        }
    }
    // f(offset of a pair of tokens in (rows, TP), first of them, row of the block, tile n, 0 or 2:
    // where the pair is in a sum), also for the rows of a tile that the block does not have.
    // Offsets of a thread differ by constants.
    template <class F>
    __device__ void for_all(const F& f) const {
        if (row_tile() * 16 >= count) return;
        const int lane = threadIdx.x % 32, row = row_tile() * 16 + lane / 4;
        const int token = token_tile() * 8 + lane % 4 * 2;
        const int offset = (first + row) * TP + token;
#pragma unroll
        for (int half = 0; half < 2; ++half)
#pragma unroll
            for (int n = 0; n < kUnitTiles; ++n)
                f(offset + half * 8 * TP + n * 8, token + n * 8, row + half * 8, n, half * 2);
    }
    template <class F>
    __device__ void for_pairs(const F& f) const {
        for_all([&](int offset, int token, int row, int n, int i) {
            if (row < count) f(offset, token, row, n, i);
        });
    }
};

// y = W_down mixed + B_down s_down, the first as parts.
template <class T, int TP>
__global__ void __launch_bounds__(Expand<T, TP, true>::kBlockThreads, 2)
    decode_expand_kernel(const __grid_constant__ Problem p, const __grid_constant__ Work product) {
    using Parts = Expand<T, TP, true>;
    extern __shared__ __align__(128) char shared[];
    __shared__ Couple couples[kMaxExperts];
    __shared__ unsigned short num_parts[Parts::kRows];  // of a row's sum
    __shared__ unsigned shared_active;
    __shared__ int shared_size;
    launch_dependents();
    const Choices<Parts::kBlockThreads> choices(p);
    Parts work(p, shared, couples);
    work.make_table(couples, &shared_size, choices.active(&shared_active));
    __syncthreads();
    work.num_couples = shared_size;
    const auto count_parts = [&] {
        const Group& g = product.groups[0];
        for (int i = threadIdx.x; i < work.count; i += Parts::kBlockThreads) {
            // The block that holds the row: block_start's inverse.
            const int unit = int((unsigned(work.first + i + 1) * g.blocks - 1) / unsigned(g.rows)) *
                             product.chunks;
            num_parts[i] = static_cast<unsigned short>(product.sharers(unit));
        }
    };
    const int first_block = blockIdx.x * work.cut.per_block;
    work.begin_block(first_block);
    work.fill_ring(true, false);
    commit_copies();
    count_parts();
    wait_for_previous();
    for (int block = first_block; block < work.end_block(first_block); ++block) {
        const bool is_first = block == first_block;
        if (!is_first) {
            work.begin_block(block);
            __syncthreads();
            count_parts();
        }
        work.fill_ring(!is_first, true);
        commit_copies();
        __syncthreads();
        typename Parts::Sums sums = {};
        int parts = 0;  // the most of the thread's rows
        work.for_pairs(
            [&](int, int, int row, int, int) { parts = max(parts, int(num_parts[row])); });
        const int64_t plane = int64_t(product.total_rows) * TP;
        constexpr int kAtOnce = 4;
        for (int part = 0; part < parts; part += kAtOnce) {
            float2 some[kAtOnce][Parts::kUnitTiles][2];
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                work.for_pairs([&](int offset, int, int row, int n, int i) {
                    some[j][n][i / 2] = float2{0, 0};
                    if (part + j < num_parts[row])
                        some[j][n][i / 2] = *reinterpret_cast<const float2*>(
                            p.planes + (part + j) * plane + offset);
                });
            }
#pragma unroll
            for (int j = 0; j < kAtOnce; ++j) {
                work.for_pairs([&](int, int, int, int n, int i) {
                    sums[n][i] += some[j][n][i / 2].x;
                    sums[n][i + 1] += some[j][n][i / 2].y;
                });
            }
        }
        wait_copies<0>();
        work.for_steps(0, [&](int pair, const Couple& couple, int column) {
            work.multiply(sums, 2 * pair, couple.of[0].rank - column);
            work.multiply(sums, 2 * pair + 1, couple.of[1].rank - column);
        });
        wait_copies<0>();
        work.for_pairs([&](int, int t, int row, int n, int i) {
            T* y = reinterpret_cast<T*>(p.y) + work.first + row;
            if (t < p.T) y[int64_t(t) * p.D] = from_acc<T>(sums[n][i]);
            if (t + 1 < p.T) y[int64_t(t + 1) * p.D] = from_acc<T>(sums[n][i + 1]);
        });
    }
}

}  // namespace decode
}  // namespace flexmore::cuda
