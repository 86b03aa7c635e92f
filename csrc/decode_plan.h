// How the kernels for few tokens (cuda/experts.cu) share the weights among their thread blocks:
// plain arithmetic, without CUDA or torch, so that tests can check it for any size without a GPU.
//
// The down projection's weights are cut into units, a block of rows by a chunk of columns; units
// lie in line and each thread block takes neighbours, equal cost each. It depends on the layer and
// the device alone, not on the tokens: a token gets the same bits in any company.
#pragma once

#include "launch.h"

namespace flexmore::cuda::decode {

constexpr int kMaxExperts = 16;
constexpr int kMaxBlocks = 256;  // thread blocks of a launch, at most one a multiprocessor
constexpr int kChunk = 64;       // columns of a chunk: 128 bytes of a weight's row
constexpr int kStages = 4;       // chunks in a product's ring of shared memory
constexpr int kMaxRows = 128;    // of a block of a product
// What a unit costs, in rows: its own, but no less than its way from memory takes, of which the
// ring hides three quarters; its tokens; and, of an expert's, that parts are summed at the end.
constexpr int kLeastCost = 120;
constexpr int kTokensCost = 16;
constexpr int kSumCost = 24;

// Where block `block` of so many starts: rows, cut as evenly as can be. (In 32 bits: 64-bit
// divisions are slow, and these products stay below 2^31.)
FM_HOST_DEVICE int block_start(int rows, int blocks, int block) {
    return int(unsigned(rows) * unsigned(block) / unsigned(blocks));
}

// Rows of weights that share their right operand, cut into blocks.
struct Group {
    int rows, blocks, first_unit, first_row;
    int expert;  // whose factor it is; -1: of the base, or of all
};

// Thread block i of `grid` takes the units [start[i], start[i + 1]), at least one.
struct Work {
    int width, chunks, num_groups, tile_rows, total_rows, grid;
    int parts;       // the most thread blocks that share a block of rows
    int low_blocks;  // blocks of rows of experts' factors
    Group groups[kMaxExperts + 1];
    int start[kMaxBlocks + 1];

    // The thread block that has the unit.
    FM_HOST_DEVICE int owner(int unit) const {
        int low = 0, high = grid - 1;
        while (low < high) {
            const int middle = (low + high + 1) / 2;
            if (start[middle] <= unit) {
                low = middle;
            } else {
                high = middle - 1;
            }
        }
        return low;
    }
    // How many thread blocks share the block of rows that starts at `unit`.
    FM_HOST_DEVICE int sharers(int unit) const {
        return owner(unit + chunks - 1) - owner(unit) + 1;
    }
};

// An expansion: rows of a block at most (of gate and of up, or of down); chunks in its ring of
// shared memory, in pairs, which are copied and waited for together; and the bytes of a row of gate
// and up, in floats, where registers do not hold them.
constexpr int expand_rows(bool down) { return down ? 32 : 96; }
constexpr int expand_pairs(int tokens) { return tokens < 32 ? 4 : 3; }
constexpr int expand_slots(int tokens) { return 2 * expand_pairs(tokens); }
constexpr int base_row_bytes(int tokens) { return tokens < 32 ? 0 : 2 * 4 * (tokens + 8); }

// How the rows of an expansion are cut: thread block i takes per_block blocks from i * per_block
// on.
struct Cut {
    int rows, blocks, per_block, tile_rows;

    FM_HOST_DEVICE int grid() const { return (blocks + per_block - 1) / per_block; }
    int bytes(bool down, int tokens) const {
        return expand_slots(tokens) * (tile_rows + tokens) * 128 +
               (down ? 0 : tile_rows * base_row_bytes(tokens));
    }
};

inline int round_up(int64_t value, int to) { return int(ceil_div(value, to) * to); }

// The shared memory of a thread block of a product, and of an expansion: one of down's fits beside
// one of a product on a multiprocessor of `shared` bytes, two of a product do not, so that no
// multiprocessor gets two of them while another has none. The rest is what kernels declare and the
// system's.
inline int product_bytes(int shared) { return (shared / 100 * 55 - 1280) / 128 * 128; }
inline int expand_bytes(bool down, int shared) {
    return (shared - (down ? shared / 100 * 55 : 0) - 7168) / 128 * 128;
}

// Weight rows of a block so that `slots` of its chunks, with as many rows for tokens, fit, and
// `more` bytes a row.
inline int most_rows(int bytes, int slots, int tokens, int most, int more = 0) {
    const int rows = (bytes - slots * tokens * 128) / (slots * 128 + more);
    return std::max(16, std::min(most, rows / 16 * 16));
}

// The base's rows and those of each expert's factor (ranks, 0 for none), each with its own right
// operand; columns are shared so that all thread blocks have as much to do.
inline void plan_product(Work& work, int rows, int width, const int* ranks, int num_experts,
                         int processors, int bytes) {
    const int most = most_rows(bytes, kStages, 64, kMaxRows);
    work.width = width;
    work.chunks = int(ceil_div(width, kChunk));
    int64_t costs[kMaxExperts + 2] = {0};
    int unit_cost[kMaxExperts + 1], unit = 0, row = 0, tallest = 0;
    const auto add = [&](int group_rows, int expert) {
        const int blocks = int(ceil_div(group_rows, most)), g = work.num_groups++;
        const int block_rows = int(ceil_div(group_rows, blocks));
        work.groups[g] = {group_rows, blocks, unit, row, expert};
        unit_cost[g] = std::max(block_rows, kLeastCost) + kTokensCost + (expert < 0 ? 0 : kSumCost);
        costs[g + 1] = costs[g] + int64_t(blocks) * work.chunks * unit_cost[g];
        unit += blocks * work.chunks;
        row += group_rows;
        tallest = std::max(tallest, block_rows);
        if (expert >= 0) work.low_blocks += blocks;
    };
    work.num_groups = work.low_blocks = 0;
    add(rows, -1);
    for (int e = 0; e < num_experts; ++e)
        if (ranks[e]) add(ranks[e], e);
    work.total_rows = row;
    const int64_t total = costs[work.num_groups];
    for (int i = 0, g = 0; i < processors; ++i) {
        const int64_t cost = total * i / processors;
        while (g + 1 < work.num_groups && cost >= costs[g + 1]) ++g;
        work.start[i] = std::min(
            unit, work.groups[g].first_unit + int(ceil_div(cost - costs[g], unit_cost[g])));
    }
    work.start[processors] = unit;
    // None is empty: the parts of a sum are those of neighbouring thread blocks.
    work.grid = int(std::unique(work.start, work.start + processors + 1) - work.start) - 1;
    work.parts = 1;
    for (int i = 0; i < unit; i += work.chunks) work.parts = std::max(work.parts, work.sharers(i));
    work.tile_rows = round_up(tallest, 16);
}

inline void plan_cut(Cut& cut, bool down, int rows, int processors, int shared, int tokens) {
    const int bytes = expand_bytes(down, shared);
    const bool fills = rows >= 16 * processors;
    const int most = most_rows(bytes, expand_slots(tokens), tokens, expand_rows(down),
                               down ? 0 : base_row_bytes(tokens));
    cut.rows = rows;
    cut.per_block = fills ? int(ceil_div(rows, int64_t(processors) * most)) : 1;
    cut.blocks = fills ? processors * cut.per_block : int(ceil_div(rows, 16));
    cut.tile_rows = round_up(ceil_div(rows, cut.blocks), 16);
}

}  // namespace flexmore::cuda::decode
