// x against the rows of W_gate, W_up and every A_gate, A_up; or mixed, p_e h_e against the rows of
// W_down and every A_down: weights stream once through a ring of shared memory, rows of weights are
// the rows of the tensor cores' products, tokens the columns.
#pragma once

#include "decode.cuh"

namespace flexmore::cuda {
namespace decode {

// Walks over the units of a thread block; units of experts that no token chose are passed over.
struct Units {
    const Work* work;
    unsigned active;
    int unit, last, group, block, chunk;
    int first, count;  // rows of the block

    __device__ Units(const Work& of, unsigned active_experts)
        : work(&of),
          active(active_experts),
          unit(of.start[blockIdx.x]),
          last(of.start[blockIdx.x + 1]),
          group(0) {
        while (group + 1 < of.num_groups && unit >= of.groups[group + 1].first_unit) ++group;
        const int local = unit - of.groups[group].first_unit;
        block = local / of.chunks;
        chunk = local % of.chunks;
        pass_over();
    }
    __device__ bool done() const { return unit >= last; }
    // Whether another block begins.
    __device__ bool next() {
        ++unit;
        if (++chunk < work->chunks) return false;
        chunk = 0;
        if (++block == work->groups[group].blocks) {
            block = 0;
            ++group;
        }
        pass_over();
        return true;
    }
    __device__ bool ends_block() const { return chunk + 1 == work->chunks || unit + 1 == last; }

  private:
    __device__ void pass_over() {
        while (group < work->num_groups && unit < last) {
            const Group& g = work->groups[group];
            if (g.expert < 0 || (active >> g.expert & 1)) {
                first = block_start(g.rows, g.blocks, block);
                count = block_start(g.rows, g.blocks, block + 1) - first;
                return;
            }
            unit = g.first_unit + g.blocks * work->chunks;
            block = chunk = 0;
            ++group;
        }
    }
};

// Where row `row` of a group starts. A row that is not needed, its expert not chosen, is another's:
// one that is read anyway, so that it costs no memory traffic.
template <class T, bool kIn>
__device__ __forceinline__ const char* row_start(const Problem& p, const Group& group, int row,
                                                 unsigned active) {
    if constexpr (kIn) {
        const int64_t bytes = int64_t(p.D) * sizeof(T);
        if (row < p.F) return p.base[0] + row * bytes;
        if (row < 2 * p.F) return p.base[1] + (row - p.F) * bytes;
        const int r = row - 2 * p.F;
        for (int side = 0; side < 2; ++side) {
            for (int e = 0; e < p.E; ++e) {
                const Pair& pair = p.pairs[side][e];
                if ((active >> e & 1) && r >= pair.first && r < pair.first + pair.rank)
                    return pair.a + (r - pair.first) * bytes;
            }
        }
        return p.base[1];
    } else {
        const int64_t bytes = int64_t(p.F) * sizeof(T);
        return (group.expert < 0 ? p.base[2] : p.pairs[2][group.expert].a) + row * bytes;
    }
}

template <class T, int TP, bool kIn>
struct Product {
    static constexpr int kTiles = TP / 8;
    static constexpr int kPerWarp = (kMaxRows / 16 + kWarps - 1) / kWarps;
    static constexpr int kRowsAtOnce = kThreads / 8;

    static constexpr int kRowsOfThread = kMaxRows / kRowsAtOnce;

    const Problem& p;
    const Work& work;
    uint32_t ring, tokens_at, stage_bytes;
    uint32_t copy_lane, copy_tokens_lane, weights_lane, tokens_lane;  // in a stage
    // Of the block that is copied, this thread's words of the next chunk:
    const char* rows[kRowsOfThread];
    const char* operand;

    __device__ Product(const Problem& problem, const Work& units, char* shared)
        : p(problem),
          work(units),
          tokens_at(units.tile_rows * 128),
          stage_bytes((units.tile_rows + TP) * 128) {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, thread = threadIdx.x;
        ring = kept(shared_address(shared));
        copy_lane = kept(swizzled(thread / 8, thread % 8));
        copy_tokens_lane =
            kept(tokens_at + (kIn ? swizzled(thread / 8, thread % 8)
                                  : swizzled_tokens<TP>(thread / kTiles, thread % kTiles)));
        weights_lane = kept(warp * 2048 + swizzled(lane % 16, lane / 16));
        tokens_lane = kept(tokens_at + token_lane<TP, kTiles, !kIn>(0, lane));
    }

    __device__ void begin_block(const Units& at) {
        const Group& group = work.groups[at.group];
        const int thread = threadIdx.x;
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            const int row = min(thread / 8 + i * kRowsAtOnce, at.count - 1);
            rows[i] = row_start<T, kIn>(p, group, at.first + row, at.active) +
                      (at.chunk * kChunk + thread % 8 * 8) * sizeof(T);
        }
        if constexpr (kIn) {
            operand = p.x + (int64_t(thread / 8) * p.D + at.chunk * kChunk + thread % 8 * 8) *
                                int64_t(sizeof(T));
        } else {
            operand = group.expert < 0 ? p.mixed
                                       : p.hidden + int64_t(group.expert) * p.F * TP * sizeof(T);
            operand += int64_t(at.chunk) * (kChunk * TP * sizeof(T)) + thread * 16;
        }
    }
    // Copies the chunk's weights, its tokens, or both, into the stage at `to`, and goes on to the
    // next chunk of the block.
    __device__ void copy(const Units& at, uint32_t to, bool weights, bool tokens) {
        const int thread = threadIdx.x, column = at.chunk * kChunk + thread % 8 * 8;
        if (weights) {
            const bool inside = column < work.width;
#pragma unroll
            for (int i = 0; i < kRowsOfThread; ++i) {
                if (thread / 8 + i * kRowsAtOnce < at.count)
                    copy_async<16>(to + copy_lane + i * kRowsAtOnce * 128, rows[i], inside);
            }
        }
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) rows[i] += kChunk * sizeof(T);
        if (tokens) {
#pragma unroll
            for (int i = 0; i < TP * 8; i += kThreads) {
                if (TP * 8 < kThreads && thread >= TP * 8) break;
                const bool valid = kIn ? thread / 8 + i / 8 < p.T && column < work.width
                                       : at.chunk * kChunk + (thread + i) / kTiles < work.width;
                const char* from =
                    operand + (kIn ? int64_t(i / 8) * p.D * int64_t(sizeof(T)) : int64_t(i) * 16);
                copy_async<16>(to + copy_tokens_lane + i * 16, from, valid);
            }
        }
        operand += kIn ? kChunk * sizeof(T) : kChunk * TP * sizeof(T);
    }
    __device__ void multiply(float (&c)[kPerWarp][kTiles][4], uint32_t from, int tiles) const {
        const int warp = threadIdx.x / 32;
        if (warp >= tiles) return;
        const bool both = warp + kWarps < tiles;
        const uint32_t weights = from + weights_lane, tokens = from + tokens_lane;
        // So many steps' fragments at once as registers hold: their latencies overlap.
        constexpr int kAtOnce = TP <= 16 ? 4 : TP == 32 ? 2 : 1;
#pragma unroll
        for (int first = 0; first < kChunk / 16; first += kAtOnce) {
            uint32_t b[kAtOnce][kTiles][2], a[kAtOnce][4];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i) {
                load_tokens<TP, kTiles, !kIn>(b[i], tokens, first + i);
                load_matrices(a[i], weights ^ ((first + i) << 5));
            }
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int n = 0; n < kTiles; ++n) mma<T>(c[0][n], a[i], b[i][n]);
            if (!both) continue;
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                load_matrices(a[i], (weights ^ ((first + i) << 5)) + kWarps * 2048);
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                for (int n = 0; n < kTiles; ++n) mma<T>(c[1][n], a[i], b[i][n]);
        }
    }
    // Writes the block's sums, or this thread block's part of them.
    __device__ void store(const float (&c)[kPerWarp][kTiles][4], const Units& at) const {
        const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
        const Group& g = work.groups[at.group];
        float* plane = nullptr;
        if constexpr (!kIn) {
            const int part = int(blockIdx.x) - work.owner(g.first_unit + at.block * work.chunks);
            plane = p.planes + (int64_t(part) * work.total_rows + g.first_row) * TP;
        }
#pragma unroll
        for (int j = 0; j < kPerWarp; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int local = (warp + j * kWarps) * 16 + half * 8 + lane / 4;
                const int64_t row = at.first + local;
                if (local >= at.count) continue;
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    const float2 pair{c[j][n][half * 2], c[j][n][half * 2 + 1]};
                    const int t = n * 8 + lane % 4 * 2;
                    if constexpr (!kIn) {
                        *reinterpret_cast<float2*>(plane + row * TP + t) = pair;
                    } else if (row < 2 * p.F) {
                        *reinterpret_cast<float2*>(p.base_in + row * TP + t) = pair;
                    } else {
                        *reinterpret_cast<uint32_t*>(p.s_in +
                                                     ((row - 2 * p.F) * TP + t) * sizeof(T)) =
                            pack_pair<T>(pair.x, pair.y);
                    }
                }
            }
        }
        if constexpr (!kIn) {
            if (g.expert >= 0) sum_parts(at);
        }
    }
    // Of a block of A_down: whoever writes the last part sums all of them, in their order.
    __device__ void sum_parts(const Units& at) const {
        __shared__ bool is_last;
        const Group& g = work.groups[at.group];
        const int unit = g.first_unit + at.block * work.chunks;
        const int parts = work.sharers(unit);
        __threadfence();
        __syncthreads();
        if (threadIdx.x == 0) {
            int counter = at.block;
            for (int i = 1; i < at.group; ++i) counter += work.groups[i].blocks;
            is_last = atomicAdd(p.counters + counter, 1) == parts - 1;
        }
        __syncthreads();
        if (!is_last) return;
        __threadfence();
        const int64_t from = (int64_t(g.first_row) + at.first) * TP;
        const int64_t to = (int64_t(p.pairs[2][g.expert].first) + at.first) * TP;
        for (int i = threadIdx.x * 2; i < at.count * TP; i += kThreads * 2) {
            float2 sum{0, 0};
            for (int part = 0; part < parts; ++part) {
                const float2 one = __ldcg(reinterpret_cast<const float2*>(
                    p.planes + int64_t(part) * work.total_rows * TP + from + i));
                sum.x += one.x;
                sum.y += one.y;
            }
            *reinterpret_cast<uint32_t*>(p.s_down + (to + i) * sizeof(T)) =
                pack_pair<T>(sum.x, sum.y);
        }
    }
    // Asks for `chunks` chunks of the block's rows from `chunk` on, into L2.
    __device__ void prefetch(const Units& at, int chunk, int chunks) const {
        const Group& group = work.groups[at.group];
        chunks = min(chunks, work.chunks - chunk);
        for (int i = threadIdx.x; i < at.count * chunks; i += kThreads) {
            const int row = at.first + i / chunks;
            if (kIn && row >= 2 * p.F) continue;
            prefetch_l2(row_start<T, kIn>(p, group, row, at.active) + (chunk + i % chunks) * 128);
        }
    }
};

template <class T, int TP, bool kIn>
__global__ void __launch_bounds__(kThreads, 2)
    decode_product_kernel(const __grid_constant__ Problem p, const __grid_constant__ Work work) {
    using Parts = Product<T, TP, kIn>;
    extern __shared__ __align__(128) char shared[];
    __shared__ unsigned shared_active;
    Parts product(p, work, shared);
    constexpr int kAhead = kStages - 1;
    if constexpr (kIn) {
        // Into L2 only, where what another kernel may still write to a weight is seen.
        const Units at(work, ~0u);
        if (!at.done()) product.prefetch(at, 0, kPrefetch);
        wait_for_previous();
        launch_dependents();
        if (blockIdx.x == 0)
            for (int i = threadIdx.x; i < p.num_counters; i += kThreads) p.counters[i] = 0;
    } else {
        launch_dependents();
    }
    const unsigned active = active_experts<kThreads>(p, &shared_active);
    const uint32_t end = product.ring + kStages * product.stage_bytes;
    Units ready(work, active), copied(work, active);
    if (!copied.done()) product.begin_block(copied);
    const auto copy = [&](uint32_t to, bool weights, bool tokens) {
        if (copied.done()) return;
        product.copy(copied, to, weights, tokens);
        if (copied.next() && !copied.done()) product.begin_block(copied);
    };
    for (int stage = 0; stage < kAhead; ++stage) {
        copy(product.ring + stage * product.stage_bytes, true, kIn);
        commit_copies();
    }
    if constexpr (!kIn) {
        if (!copied.done()) product.prefetch(copied, copied.chunk, kPrefetch);
        wait_for_previous();
        copied = ready;
        if (!copied.done()) product.begin_block(copied);
        for (int stage = 0; stage < kAhead; ++stage)
            copy(product.ring + stage * product.stage_bytes, false, true);
        commit_copies();
        wait_copies<0>();
    }
    float c[Parts::kPerWarp][Parts::kTiles][4] = {};
    uint32_t from = product.ring, to = product.ring + kAhead * product.stage_bytes;
    while (!ready.done()) {
        wait_copies<kStages - 2>();
        __syncthreads();
        copy(to, true, true);
        commit_copies();
        product.multiply(c, from, (ready.count + 15) / 16);
        if (ready.ends_block()) {
            product.store(c, ready);
#pragma unroll
            for (int j = 0; j < Parts::kPerWarp; ++j)
#pragma unroll
                for (int n = 0; n < Parts::kTiles; ++n)
#pragma unroll
                    for (int i = 0; i < 4; ++i) c[j][n][i] = 0;
        }
        ready.next();
        to = from;
        from += product.stage_bytes;
        if (from == end) from = product.ring;
    }
}

}  // namespace decode
}  // namespace flexmore::cuda
