// The kernels of token_major_shrink.cu: what a block computes. Compiled for sm_90a alone.
#pragma once

#include "token_major_shrink_gather.cuh"

namespace flexmore::cuda {
namespace token_shrink_impl {

// Of one element, from g, u and dh: dg (twice it if kDoubled) and du, both before the weight.
template <class T>
__device__ __forceinline__ void through(float& g, float& u, float dh) {
    float silu, slope;
    silu_and_slope<T>(0.5f * g, silu, slope);
    g = gate_grad<T>(dh * u, slope), u = dh * silu;
}

// Stores a warpgroup's rows of ds.
template <class T, int Depth>
__device__ __forceinline__ void store_rows(const Shrink& m, int e, const int (&tokens)[2],
                                           const float (&weights)[2],
                                           const float (&sums)[2][Depth / 2]) {
    const int lane = threadIdx.x % 32;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        if (tokens[i] < 0) continue;
        T* out = static_cast<T*>(m.ds) + tokens[i] * m.s_width;
#pragma unroll
        for (int side = 0; side < 2; ++side) {
            const int at = side == 0 ? m.experts.gate_at[e] : m.experts.up_at[e];
            const int rank = side == 0 ? m.experts.gate_rank[e] : m.experts.up_rank[e];
            const float scale = side == 0 ? kSingle<T> * weights[i] : weights[i];
#pragma unroll
            for (int j = 0; j < Depth / 8; ++j) {
                const int column = 8 * j + lane % 4 * 2;
                if (column >= rank) continue;
                const float* two = sums[side] + 4 * j + 2 * i;
                *reinterpret_cast<uint32_t*>(out + at + column) =
                    pack<T>(scale * two[0], scale * two[1]);
            }
        }
    }
}

// Where a thread's sums of a plane are; they are kWarpgroup apart.
__device__ __forceinline__ float* plane_of(const Shrink& m, int plane, int group) {
    const int64_t tile = int64_t(plane) * gridDim.x + blockIdx.x;
    return m.planes + (tile * kConsumers + group) * (kMostRank * kWarpgroup) +
           threadIdx.x % kWarpgroup;
}

// A thread's two rows of the block's.
__device__ __forceinline__ int row_of(int group, int i) {
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
    return group * 64 + warp * 16 + lane / 4 + 8 * i;
}

// A warpgroup: 64 rows, all columns of the block.
template <class T, int Depth>
__device__ void consume(const Shrink& m, SharedShrink& sh, const Tile& tile, int group, int begin,
                        int end) {
    constexpr int kSize = kColumns / 2, kSide = kRows * Depth * 2 / 16;
    constexpr int kFactor = kColumns * Depth * 2 / 16;
    const int lane = threadIdx.x % 32;
    const uint64_t s = operand(shared_address(sh.s) + group * (64 * Depth * 2), Depth);
    // A product's columns stand for others (column_of), so that a thread's are 8 neighbours.
    const unsigned char* base = sh.base[0][0] + row_of(group, 0) * kPitch + lane % 4 * 16;
    const uint32_t factors = shared_address(sh.factor);
    float sums[2][Depth / 2] = {};
    Ring<kStages> ring;
    Barrier* before = nullptr;
#pragma unroll 1
    for (int chunk = begin; chunk < end; ++chunk) {
        float values[3][kSize];  // g, u, dh: begun with G, U, dmixed
        sh.base_full[ring.slot].wait(ring.parity);
#pragma unroll
        for (int from = 0; from < 3; ++from) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const uint4 words = *reinterpret_cast<const uint4*>(
                    base + ring.slot * int(sizeof(sh.base[0])) + (from * kRows + 8 * i) * kPitch);
                const uint32_t pairs[4] = {words.x, words.y, words.z, words.w};
#pragma unroll
                for (int j = 0; j < 4; ++j) {
                    const float2 two = unpack<T>(pairs[j]);
                    values[from][4 * j + 2 * i] = two.x;
                    values[from][4 * j + 2 * i + 1] = two.y;
                }
            }
            settle(values[from]);
        }
        sh.base_empty[ring.slot].arrive();
        sh.factor_full[ring.slot].wait(ring.parity);
        const uint32_t factor = factors + ring.slot * sizeof(sh.factor[0]);
        const uint64_t b = operand(factor, Depth), across = operand_across(factor, Depth);
        products_begin();
#pragma unroll
        for (int side = 0; side < 3; ++side)
            product<T, true, Depth>(values[side], s + side * kSide, b + side * kFactor);
        products_commit();
        products_wait<0>(values[0]);
        settle(values[1]);
        settle(values[2]);
        if (before && lane == 0) before->arrive();
        before = &sh.factor_empty[ring.slot];
#pragma unroll
        for (int k = 0; k < kColumns / 16; ++k) {
            uint32_t packed[2][4];
#pragma unroll
            for (int i = 0; i < 4; ++i) {
                const int at = 8 * k + 2 * i;
                float (&g)[kSize] = values[0], (&u)[kSize] = values[1], (&dh)[kSize] = values[2];
                through<T>(g[at], u[at], dh[at]);
                through<T>(g[at + 1], u[at + 1], dh[at + 1]);
                packed[0][i] = pack<T>(g[at], g[at + 1]);
                packed[1][i] = pack<T>(u[at], u[at + 1]);
            }
            products_begin();
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                from_registers<T, true, true>(sums[side], packed[side],
                                              across + side * kFactor + k * (Depth / 4 * 128 / 16));
            }
            products_commit();
        }
        ring.next();
    }
    products_wait<0>(sums[0]);
    settle(sums[1]);
    if (m.num_planes == 1) {
        const int rows[2] = {row_of(group, 0), row_of(group, 1)};
        const int tokens[2] = {sh.token[rows[0]], sh.token[rows[1]]};
        const float weights[2] = {sh.weight[rows[0]], sh.weight[rows[1]]};
        store_rows<T, Depth>(m, tile.expert, tokens, weights, sums);
        return;
    }
    float* plane = plane_of(m, blockIdx.y, group);
#pragma unroll
    for (int i = 0; i < Depth; ++i) plane[i * kWarpgroup] = sums[i / (Depth / 2)][i % (Depth / 2)];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    token_shrink_kernel(const __grid_constant__ Shrink m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) unsigned char raw[];
    SharedShrink& sh = *reinterpret_cast<SharedShrink*>(raw);
    const Tile tile = find_tile(m);
    if (tile.rows <= 0) return;
    gather<T>(m, sh, tile);
    const int begin = blockIdx.y * m.chunks_per_block;
    const int end = min(begin + m.chunks_per_block, m.num_chunks);
    const int role = uniform(threadIdx.x / kWarpgroup);
    if (role == kConsumers) {
        fewer_registers<kProduceRegisters>();
        const int thread = threadIdx.x % kWarpgroup - 32;
        if (thread >= 0) {
            copy_base(m, sh, thread, begin, end);
        } else if (thread == -32) {
            copy_factors(m, sh, tile.expert, begin, end);
        }
    } else {
        more_registers<kConsumeRegisters>();
        const int depth = m.experts.depth[tile.expert];
        if (depth == 64) {
            consume<T, 64>(m, sh, tile, role, begin, end);
        } else if (depth == 32) {
            consume<T, 32>(m, sh, tile, role, begin, end);
        } else {
            consume<T, 16>(m, sh, tile, role, begin, end);
        }
    }
#endif
}

// The sum over the planes, in order, by the threads that hold them.
template <class T, int Depth>
__device__ void sum_planes(const Shrink& m, const Tile& tile, int group) {
    float sums[2][Depth / 2] = {};
    for (int p = 0; p < m.num_planes; ++p) {
        const float* plane = plane_of(m, p, group);
#pragma unroll
        for (int i = 0; i < Depth; ++i)
            sums[i / (Depth / 2)][i % (Depth / 2)] += plane[i * kWarpgroup];
    }
    int tokens[2];
    float weights[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
        const int row = row_of(group, i);
        const int slot = row < tile.rows ? m.row_to_slot[tile.begin + row] : -1;
        tokens[i] = slot < 0 ? -1 : slot / m.top_k;
        weights[i] = slot < 0 ? 0.0f : m.weights[slot];
    }
    store_rows<T, Depth>(m, tile.expert, tokens, weights, sums);
}
template <class T>
__global__ void __launch_bounds__(kConsumers* kWarpgroup)
    token_shrink_sum_kernel(const __grid_constant__ Shrink m) {
    const Tile tile = find_tile(m);
    if (tile.rows <= 0) return;
    const int group = threadIdx.x / kWarpgroup, depth = m.experts.depth[tile.expert];
    if (depth == 64) {
        sum_planes<T, 64>(m, tile, group);
    } else if (depth == 32) {
        sum_planes<T, 32>(m, tile, group);
    } else {
        sum_planes<T, 16>(m, tile, group);
    }
}

}  // namespace token_shrink_impl
}  // namespace flexmore::cuda
