// From x and s = A x to mixed = sum p_e h_e and every p_e h_e that A_down needs, with
// h_e = SwiGLU(W_gate x + B_gate s, W_up x + B_up s): W_gate, W_up and each B are read once for all
// tokens, and what they give stays in the thread block.
//
// A thread block has rows of W_gate and W_up, and the same of each B: the chunks of all these go
// through one ring of shared memory, so that memory is never idle. s is needed from the first B on
// only: the kernel before, which makes it, runs beside this one until then.
#pragma once

#include "decode_expand.cuh"

namespace flexmore::cuda {
namespace decode {

template <class T, int TP>
struct Hidden : Expand<T, TP, false> {
    using Base = Expand<T, TP, false>;
    using Base::kBlockThreads, Base::kPairs, Base::kRows, Base::kRowsAtOnce, Base::kUnitTiles;
    using Base::p, Base::first, Base::count, Base::ring, Base::slot_bytes, Base::tokens_at;
    using typename Base::Sums;

    // A bound that leaves registers for the kernel before and, but with many tokens, the one after.
    static constexpr int kBoundThreads = TP < 32 ? 768 : TP == 32 ? 608 : 512;

    int chunk, chunks;      // the base's chunk that is copied next, and how many it has
    const char* rows[2];    // this thread's words of it, in the first of its rows
    const char* operand;    // and of x
    const int* num_listed;  // couples; shared
    bool waited;            // for s

    __device__ Hidden(const Problem& problem, char* shared, const Couple* table, const int* size)
        : Base(problem, shared, table),
          chunks((problem.D + kChunk - 1) / kChunk),
          num_listed(size),
          waited(false) {}

    __device__ void begin_block(int block) {
        Base::begin_block(block);
        const int row = threadIdx.x / 8, byte = threadIdx.x % 8 * 16;
        const int64_t row_bytes = int64_t(p.D) * sizeof(T);
        rows[0] = p.base[0] + (first + row) * row_bytes + byte;
        rows[1] = p.base[1] + (first + row) * row_bytes + byte;
        operand = p.x + row * row_bytes + byte;
        chunk = this->at = this->column = 0;
    }
    // Copies the base's next chunk to the pair of slots, x to the first of them; after the last one
    // the chunks of the couples.
    __device__ void copy_next(int pair) {
        if (chunk == chunks) {
            if (!waited) wait_for_previous();
            waited = true;
            this->num_couples = *num_listed;
            this->copy_pair(pair, true, true);
            return;
        }
        const int row = threadIdx.x / 8;
        const bool inside = chunk * kChunk + int(threadIdx.x) % 8 * 8 < p.D;
        const uint32_t to = ring + 2 * pair * slot_bytes + this->copy_lane;
        const int64_t step = int64_t(kRowsAtOnce) * p.D * sizeof(T);
#pragma unroll
        for (int i = 0; i < kRows / kRowsAtOnce; ++i) {
            if (row + i * kRowsAtOnce < count) {
                const uint32_t at = to + i * kRowsAtOnce * 128;
                copy_async<16>(at, rows[0] + i * step, inside);
                copy_async<16>(at + slot_bytes, rows[1] + i * step, inside);
            }
        }
#pragma unroll
        for (int i = 0; i < TP; i += kRowsAtOnce) {
            if (row + i < TP) {
                const bool valid = inside && row + i < p.T;
                copy_async<16>(to + tokens_at + i * 128,
                               valid ? operand + i / kRowsAtOnce * step : p.x, valid);
            }
        }
        rows[0] += kChunk * sizeof(T);
        rows[1] += kChunk * sizeof(T);
        operand += kChunk * sizeof(T);
        ++chunk;
    }
    // Adds both products of a pair of slots, their right operands in one slot or in both, as rows
    // by token or, Transposed, rows by column.
    template <bool Transposed>
    __device__ void multiply_both(Sums& gate, Sums& up, int pair) const {
        if (this->row_tile() * 16 >= count) return;
        const uint32_t from = ring + 2 * pair * slot_bytes, weights = from + this->weights_lane;
        const uint32_t tokens =
            from + (Transposed ? this->tokens_lane
                               : tokens_at + token_lane<TP, kUnitTiles, false>(
                                                 this->token_tile(), int(threadIdx.x) % 32));
        // So many steps' fragments at once as registers hold: their latencies overlap.
        constexpr int kAtOnce = kUnitTiles > 2 ? 1 : Transposed ? 2 : 4;
#pragma unroll
        for (int begin = 0; begin < kChunk / 16; begin += kAtOnce) {
            uint32_t a[kAtOnce][4], b[kAtOnce][4], x[kAtOnce][kUnitTiles][2];
            [[maybe_unused]] uint32_t y[Transposed ? kAtOnce : 1][kUnitTiles][2];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                load_matrices(a[i], weights ^ ((begin + i) << 5));
                load_matrices(b[i], (weights + slot_bytes) ^ ((begin + i) << 5));
                load_tokens<TP, kUnitTiles, Transposed>(x[i], tokens, begin + i);
                if constexpr (Transposed)
                    load_tokens<TP, kUnitTiles, true>(y[i], tokens + slot_bytes, begin + i);
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
#pragma unroll
                for (int n = 0; n < kUnitTiles; ++n) {
                    mma<T>(gate[n], a[i], x[i][n]);
                    mma<T>(up[n], b[i], Transposed ? y[i][n] : x[i][n]);
                }
            }
        }
    }
    // The same of a step of a couple, of so many columns that are left of its factors.
    __device__ void multiply_step(Sums& gate, Sums& up, int pair, int left, int left_up) const {
        if (kUnitTiles <= 2 && min(left, left_up) > kChunk / 2) {
            multiply_both<true>(gate, up, pair);
        } else {
            this->multiply(gate, 2 * pair, left);
            this->multiply(up, 2 * pair + 1, left_up);
        }
    }
};

// What experts start from: G and U, in registers or, with many tokens, in shared memory.
template <class T, int TP>
struct BaseSums {
    using Parts = Hidden<T, TP>;
    using Sums = typename Parts::Sums;
    static constexpr bool kShared = base_row_bytes(TP) > 0;
    static constexpr int kStride = TP + 8;  // floats: rows in different banks
    float* shared;
    Sums sums[kShared ? 1 : 2];

    __device__ BaseSums(const Parts& work, char* memory)
        : shared(reinterpret_cast<float*>(memory + Parts::kSlots * work.slot_bytes)) {}
    __device__ float* at(const Parts& work, int which, int row, int t) const {
        return shared + (which * work.cut.tile_rows + row) * kStride + t;
    }
    __device__ void keep(const Parts& work, int which, const Sums& from) {
        work.for_all([&](int, int t, int row, int n, int i) {
            if constexpr (kShared) {
                *reinterpret_cast<float2*>(at(work, which, row, t)) = {from[n][i], from[n][i + 1]};
            } else {
                sums[which][n][i] = from[n][i];
                sums[which][n][i + 1] = from[n][i + 1];
            }
        });
    }
    __device__ void start(const Parts& work, int which, Sums& to) const {
        work.for_all([&](int, int t, int row, int n, int i) {
            if constexpr (kShared) {
                const float2 pair = *reinterpret_cast<const float2*>(at(work, which, row, t));
                to[n][i] = pair.x;
                to[n][i + 1] = pair.y;
            } else {
                to[n][i] = sums[which][n][i];
                to[n][i + 1] = sums[which][n][i + 1];
            }
        });
    }
};

template <class T, int TP>
__global__ void __launch_bounds__(Hidden<T, TP>::kBoundThreads, 1)
    decode_hidden_kernel(const __grid_constant__ Problem p) {
    using Parts = Hidden<T, TP>;
    constexpr int kBlockThreads = Parts::kBlockThreads, kPairs = Parts::kPairs;
    extern __shared__ __align__(128) char shared[];
    __shared__ Couple couples[kMaxExperts];
    __shared__ alignas(8) float weights[kMaxExperts * TP];  // p_e of each token
    __shared__ unsigned shared_active;
    __shared__ int num_couples;
    launch_dependents();
    const Choices<kBlockThreads, true> choices(p);
    for (int i = threadIdx.x; i < p.E * TP; i += kBlockThreads) weights[i] = 0;
    Parts work(p, shared, couples, &num_couples);
    unsigned active = 0;
    const int first_block = blockIdx.x * work.cut.per_block;
    for (int block = first_block; block < work.end_block(first_block); ++block) {
        const bool is_first = block == first_block;
        if (!is_first) __syncthreads();
        work.begin_block(block);
        int filled = 0;
        for (; filled < min(kPairs - 1, work.chunks); ++filled) {
            work.copy_next(filled);
            commit_copies();
        }
        // What couples there are is found out when memory is busy, once the ring has been filled.
        const auto list_couples = [&] {
            active = choices.active(&shared_active);
            // Of distinct ids each sum has one addend, and one thread.
            choices.for_each(
                [&](int slot, int e, float weight) { weights[e * TP + slot / p.K] += weight; });
            work.make_table(couples, &num_couples, active);
            __syncthreads();
        };
        const bool has_time = work.chunks > 2 * kPairs;
        if (is_first && !has_time) list_couples();
        for (; filled < kPairs - 1; ++filled) {
            work.copy_next(filled);
            commit_copies();
        }
        typename Parts::Sums gate = {}, up = {};
        int pair = 0;
        for (int i = 0; i < work.chunks; ++i) {
            wait_copies<kPairs - 2>();
            __syncthreads();
            work.copy_next(pair == 0 ? kPairs - 1 : pair - 1);
            commit_copies();
            if (i == 0 && is_first && has_time) list_couples();
            work.template multiply_both<false>(gate, up, pair);
            pair = pair + 1 == kPairs ? 0 : pair + 1;
        }
        BaseSums<T, TP> base(work, shared);
        base.keep(work, 0, gate);
        base.keep(work, 1, up);
        typename Parts::Sums sums = {};
        // Adds p_e h_e of an expert whose deltas are complete; the next one starts from the base.
        const auto add_hidden = [&](int e) {
            const bool keeps = p.pairs[2][e].rank > 0;
            char* hidden = p.hidden + int64_t(e) * p.F * TP * sizeof(T);
            work.for_all([&](int offset, int t, int row, int n, int i) {
                const float2 w = *reinterpret_cast<const float2*>(weights + e * TP + t);
                // Selected, not multiplied by 0: what was not routed here may be infinite.
                const float a = w.x != 0 ? w.x * (silu_for<T>(gate[n][i]) * up[n][i]) : 0;
                const float b = w.y != 0 ? w.y * (silu_for<T>(gate[n][i + 1]) * up[n][i + 1]) : 0;
                sums[n][i] += a;
                sums[n][i + 1] += b;
                if (keeps && row < work.count)
                    *reinterpret_cast<uint32_t*>(hidden + offset * sizeof(T)) = pack_pair<T>(a, b);
            });
            base.start(work, 0, gate);
            base.start(work, 1, up);
        };
        for (int e = 0; e < p.E; ++e)
            if ((active >> e & 1) && p.pairs[0][e].rank + p.pairs[1][e].rank == 0) add_hidden(e);
        work.for_steps(pair, [&](int slots, const Couple& couple, int column) {
            work.multiply_step(gate, up, slots, couple.of[0].rank - column,
                               couple.of[1].rank - column);
            if (column + kChunk >= couple.rank()) add_hidden(couple.expert);
        });
        wait_copies<0>();
        work.for_pairs([&](int offset, int, int, int n, int i) {
            *reinterpret_cast<uint32_t*>(p.mixed + offset * sizeof(T)) =
                pack_pair<T>(sums[n][i], sums[n][i + 1]);
        });
    }
}

}  // namespace decode
}  // namespace flexmore::cuda
