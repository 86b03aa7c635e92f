// Mixed, p_e h_e against the rows of W_down and every A_down: weights stream once through a ring of
// shared memory, rows of weights are the rows of the tensor cores' products, tokens the columns.
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

template <class T, int TP>
struct Product {
    static constexpr int kBlockThreads = 256;
    // A bound that leaves registers for the kernels before and after.
    static constexpr int kBoundThreads = TP == 32 ? 576 : 512;
    // With many tokens two warps share rows: that is the least to read from shared memory.
    static constexpr int kAcross = TP == 64 ? 2 : 1;
    static constexpr int kTiles = TP / 8 / kAcross;  // of tokens, of a warp
    static constexpr int kRowWarps = kBlockThreads / 32 / kAcross;
    static constexpr int kPerWarp = (kMaxRows / 16 + kRowWarps - 1) / kRowWarps;  // tiles of rows
    static constexpr int kRowsAtOnce = kBlockThreads / 8;
    static constexpr int kRowsOfThread = kMaxRows / kRowsAtOnce;
    static constexpr int kWords = TP / 8;  // of a row of tokens
    using Sums = float[kPerWarp][kTiles][4];

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
        const int lane = threadIdx.x % 32, thread = threadIdx.x;
        ring = kept(shared_address(shared));
        copy_lane = kept(swizzled(thread / 8, thread % 8));
        copy_tokens_lane = kept(tokens_at + swizzled_tokens<TP>(thread / kWords, thread % kWords));
        weights_lane = kept(row_tile() * 2048 + swizzled(lane % 16, lane / 16));
        tokens_lane = kept(tokens_at + token_lane<TP, kTiles, true>(token_tile(), lane));
    }

    __device__ const char* row_start(const Group& group, int row) const {
        return (group.expert < 0 ? p.base[2] : p.pairs[2][group.expert].a) +
               row * int64_t(p.F) * sizeof(T);
    }
    __device__ void begin_block(const Units& at) {
        const Group& group = work.groups[at.group];
        const int thread = threadIdx.x;
#pragma unroll
        for (int i = 0; i < kRowsOfThread; ++i) {
            const int row = min(thread / 8 + i * kRowsAtOnce, at.count - 1);
            rows[i] =
                row_start(group, at.first + row) + (at.chunk * kChunk + thread % 8 * 8) * sizeof(T);
        }
        operand =
            group.expert < 0 ? p.mixed : p.hidden + int64_t(group.expert) * p.F * TP * sizeof(T);
        operand += int64_t(at.chunk) * (kChunk * TP * sizeof(T)) + thread * 16;
    }
    // Copies the chunk's weights, its tokens, or both, into the stage at `to`, and goes on to the
    // next chunk of the block.
    __device__ void copy(const Units& at, uint32_t to, bool weights, bool tokens) {
        const int thread = threadIdx.x;
        if (weights) {
            const bool inside = at.chunk * kChunk + thread % 8 * 8 < work.width;
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
            for (int i = 0; i < TP * 8; i += kBlockThreads) {
                if (TP * 8 < kBlockThreads && thread >= TP * 8) break;
                const bool valid = at.chunk * kChunk + (thread + i) / kWords < work.width;
                copy_async<16>(to + copy_tokens_lane + i * 16, operand + i * 16, valid);
            }
        }
        operand += kChunk * TP * sizeof(T);
    }
    __device__ int row_tile() const { return threadIdx.x / 32 / kAcross; }
    __device__ int token_tile() const { return threadIdx.x / 32 % kAcross * kTiles; }
    // Adds the product of a stage of so many tiles of rows.
    __device__ void multiply(Sums& c, uint32_t from, int tiles) const {
        if (row_tile() >= tiles) return;
        const uint32_t weights = from + weights_lane, tokens = from + tokens_lane;
        // So many steps' fragments at once as registers hold: their latencies overlap.
        constexpr int kAtOnce = TP <= 16 ? 4 : 2;
#pragma unroll
        for (int first = 0; first < kChunk / 16; first += kAtOnce) {
            uint32_t b[kAtOnce][kTiles][2];
#pragma unroll
            for (int i = 0; i < kAtOnce; ++i)
                load_tokens<TP, kTiles, true>(b[i], tokens, first + i);
#pragma unroll
            for (int j = 0; j < kPerWarp; ++j) {
                if (j && row_tile() + j * kRowWarps >= tiles) break;
                uint32_t a[kAtOnce][4];
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i)
                    load_matrices(a[i], (weights ^ ((first + i) << 5)) + j * kRowWarps * 2048);
#pragma unroll
                for (int i = 0; i < kAtOnce; ++i)
#pragma unroll
                    for (int n = 0; n < kTiles; ++n) mma<T>(c[j][n], a[i], b[i][n]);
            }
        }
    }
    // Writes this thread block's part of the block's sums.
    __device__ void store(const Sums& c, const Units& at) const {
        const int lane = threadIdx.x % 32;
        const Group& g = work.groups[at.group];
        const int part = int(blockIdx.x) - work.owner(g.first_unit + at.block * work.chunks);
        float* plane = p.planes + (int64_t(part) * work.total_rows + g.first_row) * TP;
#pragma unroll
        for (int j = 0; j < kPerWarp; ++j) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const int local = (row_tile() + j * kRowWarps) * 16 + half * 8 + lane / 4;
                const int64_t row = at.first + local;
                if (local >= at.count) continue;
#pragma unroll
                for (int n = 0; n < kTiles; ++n) {
                    const int t = (token_tile() + n) * 8 + lane % 4 * 2;
                    *reinterpret_cast<float2*>(plane + row * TP + t) = {c[j][n][half * 2],
                                                                        c[j][n][half * 2 + 1]};
                }
            }
        }
        if (g.expert >= 0) sum_parts(at);
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
        const float* planes = p.planes + from;
        const int64_t plane = int64_t(work.total_rows) * TP;
        for (int i = threadIdx.x * 4; i < at.count * TP; i += kBlockThreads * 4) {
            float sum[4] = {};
            constexpr int kAtOnce = 8;
            for (int first = 0; first < parts; first += kAtOnce) {
                float4 some[kAtOnce];
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
                    if (first + j < parts)
                        some[j] = __ldcg(
                            reinterpret_cast<const float4*>(planes + (first + j) * plane + i));
                }
#pragma unroll
                for (int j = 0; j < kAtOnce; ++j) {
                    if (first + j >= parts) break;
                    sum[0] += some[j].x;
                    sum[1] += some[j].y;
                    sum[2] += some[j].z;
                    sum[3] += some[j].w;
                }
            }
            *reinterpret_cast<uint2*>(p.s_down + (to + i) * sizeof(T)) = {
                pack_pair<T>(sum[0], sum[1]), pack_pair<T>(sum[2], sum[3])};
        }
    }
    // Asks for the next chunks of the block's rows, into L2.
    __device__ void prefetch(const Units& at) const {
        const int column = at.chunk * kChunk;
        const int columns = min(kPrefetch * kChunk, work.width - column);
        for (int i = threadIdx.x; i < at.count; i += kBlockThreads)
            prefetch_l2(row_start(work.groups[at.group], at.first + i) + column * sizeof(T),
                        columns * int(sizeof(T)));
    }
};

template <class T, int TP>
__global__ void __launch_bounds__(Product<T, TP>::kBoundThreads, 1)
    decode_product_kernel(const __grid_constant__ Problem p, const __grid_constant__ Work work) {
    using Parts = Product<T, TP>;
    extern __shared__ __align__(128) char shared[];
    __shared__ unsigned shared_active;
    launch_dependents();
    const Choices<Parts::kBlockThreads> choices(p);
    Parts product(p, work, shared);
    constexpr int kAhead = kStages - 1;
    const uint32_t end = product.ring + kStages * product.stage_bytes;
    Units copied(work, ~0u);
    const auto copy = [&](uint32_t to, bool weights, bool tokens) {
        if (copied.done()) return;
        product.copy(copied, to, weights, tokens);
        if (copied.next() && !copied.done()) product.begin_block(copied);
    };
    const auto fill = [&](bool weights, bool tokens) {
        if (!copied.done()) product.begin_block(copied);
        for (int stage = 0; stage < kAhead; ++stage)
            copy(product.ring + stage * product.stage_bytes, weights, tokens);
        commit_copies();
    };
    // Of the base alone the first chunks are known whoever is chosen: they are on their way early.
    const bool is_base = copied.unit + kAhead <= work.groups[0].blocks * work.chunks;
    if (is_base) fill(true, false);
    Units ready(work, choices.active(&shared_active));
    if (!is_base) {
        copied = ready;
        fill(true, false);
    }
    // With fewer tokens this is too early: the kernel before would drive them out again.
    if (TP == 64 && !copied.done() && work.groups[copied.group].expert < 0)
        product.prefetch(copied);
    wait_for_previous();
    copied = ready;
    fill(false, true);
    wait_copies<0>();
    typename Parts::Sums c = {};
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
