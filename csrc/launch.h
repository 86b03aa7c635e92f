// How the CUDA kernels are cut into blocks: plain arithmetic, without CUDA or torch, so that
// tests/test_launch.py can check it for any size without a GPU (host.cpp hands it to Python).
#pragma once

#include <algorithm>
#include <cstdint>

#if defined(__CUDACC__)
#define FM_HOST_DEVICE __host__ __device__ inline
#else
#define FM_HOST_DEVICE inline
#endif

namespace flexmore::cuda {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// ---- the plan (plan.cuh): slots are sorted by expert, tokens by expert set if by_set.

constexpr int64_t kOneBlockSlots = 4096;
constexpr int64_t kChunkSlots = 512;  // per block, at least
constexpr int64_t kMaxChunks = 128;
constexpr int64_t kMaxCounts = 32768;  // (padded keys, chunks)
constexpr int kMaxKeys = 1024;
constexpr int kMaxSetExperts = 8;

// By reference: a kernel then reads num_experts from its parameters only where it needs it.
FM_HOST_DEVICE int num_sets(const int& num_experts, const bool& by_set) {
    return by_set ? 1 << num_experts : 0;
}
FM_HOST_DEVICE int max_keys(const int& num_experts, const bool& by_set) {
    return num_experts > num_sets(num_experts, by_set) ? num_experts
                                                       : num_sets(num_experts, by_set);
}
// Counts of chunks are read four keys at a time.
FM_HOST_DEVICE int padded_keys(int num_keys) { return (num_keys + 3) / 4 * 4; }
// How many threads share the sum over the chunks of four keys.
FM_HOST_DEVICE int threads_per_quad(int threads, int num_keys) {
    const int quads = padded_keys(num_keys) / 4;
    return threads > quads ? threads / quads : 1;
}
// Of these two sums of each key.
FM_HOST_DEVICE int scratch_size(int threads, int num_keys) {
    return 2 * threads_per_quad(threads, num_keys) * padded_keys(num_keys);
}

struct PlanLaunch {
    bool one_block;        // or several, which wait for each other
    int64_t chunk_tokens;  // of a block; the last one's may be fewer
    int num_chunks;        // blocks
    int warps;             // of a block
    int64_t shared_bytes;  // of a block
    int64_t counts;        // int32 numbers of workspace: (padded keys, chunks)
};

// top_k >= 1; 1 <= num_experts <= kMaxKeys, and <= kMaxSetExperts if by_set. max_blocks: the blocks
// that surely run at a time.
inline PlanLaunch plan_launch(int64_t tokens, int64_t top_k, int num_experts, bool by_set,
                              int max_blocks) {
    const int keys = max_keys(num_experts, by_set), sets = num_sets(num_experts, by_set);
    PlanLaunch launch{};
    launch.one_block = tokens * top_k <= kOneBlockSlots || max_blocks < 2;
    // A counter per warp and key: at most 32 KB of shared memory.
    launch.warps = keys > 256 ? 8 : launch.one_block ? 32 : 16;
    const int scratch = launch.one_block ? 0 : scratch_size(32 * launch.warps, keys);
    launch.shared_bytes = int64_t(sizeof(int32_t)) *
                          (int64_t(launch.warps) * (num_experts + sets) + keys + 1 + scratch);
    if (launch.one_block) {
        launch.chunk_tokens = tokens;
        launch.num_chunks = 1;
        return launch;
    }
    const int64_t counted = padded_keys(num_experts) + padded_keys(sets);
    const int64_t max_chunks = std::min({kMaxChunks, kMaxCounts / counted, int64_t(max_blocks)});
    launch.chunk_tokens = std::max(ceil_div(tokens, max_chunks), ceil_div(kChunkSlots, top_k));
    launch.num_chunks = static_cast<int>(ceil_div(tokens, launch.chunk_tokens));
    launch.counts = counted * launch.num_chunks;
    return launch;
}

// ---- permute and unpermute (permutation.cu): a block moves a part of one token's row.

constexpr int kMaxThreads = 256;

struct RowLaunch {
    int threads;      // of a block: whole warps, no more than the row can use
    int64_t columns;  // blocks side by side that a row takes
};

// words >= 1: accesses that a row takes; per_thread: those of one thread.
inline RowLaunch row_launch(int64_t words, int64_t per_thread) {
    const int64_t wanted = ceil_div(ceil_div(words, per_thread), 32) * 32;
    const int threads = static_cast<int>(std::min<int64_t>(kMaxThreads, wanted));
    return {threads, ceil_div(words, per_thread * threads)};
}

// ---- many experts: rows are formed and summed in slabs of columns (expert_major.cu).

constexpr int kSweepSlab = 64;      // columns
constexpr int64_t kSweepSlots = 3;  // slabs of rows that are kept

// The most tiles of 16 rows that so many rows of so many experts make.
inline int64_t sweep_tiles(int64_t rows, int64_t num_experts) {
    const int64_t busy = std::min(rows, num_experts);
    return busy + (rows - busy) / 16;
}

// Into how many groups of blocks, each with slabs of its own: one where there are as many tiles as
// half the warps that form rows.
inline int64_t sweep_groups(int64_t tokens, int64_t top_k, int64_t num_experts, int64_t width,
                            int64_t blocks) {
    const int64_t tiles = sweep_tiles(tokens * top_k, num_experts);
    const int64_t wanted = 16 * blocks / std::max<int64_t>(tiles, 1);
    return std::max<int64_t>(1, std::min({wanted, ceil_div(width, kSweepSlab), blocks}));
}

struct SweepSize {
    int64_t tokens, top_k, num_experts, width;
    int64_t blocks, formers;             // multiprocessors; warps of a block that form rows
    int64_t most_shared, l2;             // bytes: of a block, of the cache
    int64_t tile, staged_expert, ahead;  // bytes of shared memory: each, each, in all
    int64_t groups;
};
struct SweepLaunch {
    int64_t passes, steps, slots, tiles_per_warp, staged_experts, shared_bytes;
};

inline SweepLaunch sweep_launch(const SweepSize& s) {
    SweepLaunch launch{};
    launch.steps = ceil_div(ceil_div(s.width, kSweepSlab), s.groups);
    launch.slots = std::min(kSweepSlots, launch.steps);
    // The ring fits in half the cache, unless experts then have less than a tile.
    const int64_t rows = s.tokens * s.top_k, row_bytes = launch.slots * kSweepSlab * 2 * s.groups;
    const int64_t fitting = ceil_div(rows * row_bytes, s.l2 / 2);
    launch.passes = std::max<int64_t>(1, std::min(fitting, rows / (16 * s.num_experts)));
    const int64_t warps = s.blocks / s.groups * s.formers;
    const int64_t tables = 4 * (4 * s.num_experts + 1);
    while (true) {
        const int64_t tiles =
            sweep_tiles(ceil_div(s.tokens, launch.passes) * s.top_k, s.num_experts);
        launch.tiles_per_warp = ceil_div(tiles, warps);
        launch.shared_bytes =
            std::max(s.ahead, tables) + s.formers * launch.tiles_per_warp * s.tile;
        if (launch.shared_bytes <= s.most_shared || launch.passes >= s.tokens) break;
        ++launch.passes;
    }
    launch.staged_experts = std::min((s.most_shared - launch.shared_bytes) / s.staged_expert,
                                     std::min(s.num_experts, s.formers * launch.tiles_per_warp));
    launch.staged_experts = std::max<int64_t>(launch.staged_experts, 0);
    launch.shared_bytes += launch.staged_experts * s.staged_expert;
    return launch;
}

}  // namespace flexmore::cuda
