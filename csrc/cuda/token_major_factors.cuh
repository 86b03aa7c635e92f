// The kernels of token_major_factors.cu: what a block computes. Compiled for sm_90a alone.
#pragma once

#include "token_major_factors_gather.cuh"

namespace flexmore::cuda {
namespace factor_grads_impl {

// d = a b^T over Depth summed columns.
template <class T, int Depth>
__device__ __forceinline__ void product_of_held(float (&d)[kRows / 2],
                                                const uint32_t (&a)[Depth / 16][4], uint64_t b) {
    from_registers<T, false, false>(d, a[0], b);
#pragma unroll
    for (int k = 1; k < Depth / 16; ++k)
        from_registers<T, true, false>(d, a[k], b + k * kNextColumns);
}

// A thread's part of a factor, as left operand of 64 columns; zero past the rank and the width.
template <class T, int Depth>
__device__ void load_factor(uint32_t (&a)[Depth / 16][4], const Factor& f, int column,
                            int64_t width, bool halved) {
    const int lane = threadIdx.x % 32;
    const auto element = [&](int c, int r) {
        const float x =
            c < width && r < f.rank
                ? to_acc(*reinterpret_cast<const T*>(f.data + c * f.along_width + r * f.along_rank))
                : 0.0f;
        return halved ? 0.5f * x : x;
    };
#pragma unroll
    for (int k = 0; k < Depth / 16; ++k) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
            const int c = column + lane / 4 + i % 2 * 8;
            const int r = 16 * k + i / 2 * 8 + lane % 4 * 2;
            a[k][i] = pack<T>(element(c, r), element(c, r + 1));
        }
    }
}

// Of one element: from the products g (of a halved B_g if kDoubled, which is exact), u and dh
// (times p) dg (twice it if kDoubled), du and h.
template <class T>
__device__ __forceinline__ void through(float& g, float& u, float& dh, float base_g, float base_u,
                                        float base_dh, float p) {
    const float w = fmaf(p, base_dh, dh), v = u + base_u;
    const float half = kDoubled<T> ? fmaf(0.5f, base_g, g) : 0.5f * (g + base_g);
    float silu, slope;
    silu_and_slope<T>(half, silu, slope);
    g = gate_grad<T>(w * v, slope), u = w * silu, dh = silu * v;
}

// Stores the gradients of a warpgroup's columns.
template <class T, int Depth>
__device__ void store_grads(const FactorGrads& m, int which, int column,
                            const float (&sums)[3][Depth / 2]) {
    const int lane = threadIdx.x % 32, e = m.expert[which];
    const int ranks[3] = {m.experts.gate_rank[e], m.experts.up_rank[e], m.experts.down_rank[e]};
#pragma unroll
    for (int side = 0; side < 3; ++side) {
        if (!(m.wanted[which] >> side & 1)) continue;
        const float scale = side == 0 ? kSingle<T> : 1.0f;
        T* out = static_cast<T*>(m.grads[side]);
#pragma unroll
        for (int j = 0; j < Depth / 8; ++j) {
            const int rank = 8 * j + lane % 4 * 2, at = m.grad_at[which][side] + rank;
            if (rank >= ranks[side]) continue;
#pragma unroll
            for (int i = 0; i < 2; ++i) {
                const int64_t c = column + lane / 4 + 8 * i;
                if (c >= m.width) continue;
                const float x = scale * sums[side][4 * j + 2 * i];
                const float y = scale * sums[side][4 * j + 2 * i + 1];
                if (side < 2) {
                    *reinterpret_cast<uint32_t*>(out + c * m.grad_width[side] + at) = pack<T>(x, y);
                } else {
                    out[at * m.width + c] = from_acc<T>(x);
                    out[(at + 1) * m.width + c] = from_acc<T>(y);
                }
            }
        }
    }
}

// Where a warpgroup's sums of a part are in the planes; a thread's are kWarpgroup apart.
template <int Depth>
__device__ __forceinline__ float* plane_of(const FactorGrads& m, int part, int item, int group) {
    const int64_t items = int64_t(m.count) * m.num_chunks;
    const int64_t at = (part * items + item) * kConsumers + group;
    return m.planes + at * (3 * kMostRank / 2 * kWarpgroup) + threadIdx.x % kWarpgroup;
}

template <class T, int Depth>
__device__ void consume(const FactorGrads& m, SharedFactors& sh, const Item& item, int group) {
    constexpr int kSide = kRows * Depth * 2;  // bytes of S_g, S_u or Q
    const int lane = threadIdx.x % 32, warp = threadIdx.x % kWarpgroup / 32;
    const int mine = group * 64 + warp * 16;  // this warp's columns of the chunk
    const Factor* factors = m.factors.of[m.experts.place[m.expert[item.which]]];
    // B_g and B_u stay in registers: read from shared memory by every product, a left operand of 64
    // columns would cost twice what the right one does. A_d does not fit besides.
    uint32_t b_gate[Depth / 16][4], b_up[Depth / 16][4];
    const int column = item.chunk * kColumns + mine;
    load_factor<T, Depth>(b_gate, factors[0], column, m.width, kDoubled<T>);
    load_factor<T, Depth>(b_up, factors[1], column, m.width, false);
    {
        uint32_t a_down[Depth / 16][4];
        load_factor<T, Depth>(a_down, factors[2], column, m.width, false);
#pragma unroll
        for (int i = 0; i < Depth / 4; ++i) {
            const int row = warp * 16 + lane / 4 + i % 2 * 8;
            *reinterpret_cast<uint32_t*>(sh.factor[group] + operand_offset(row, i / 2, Depth) +
                                         lane % 4 * 4) = a_down[i / 4][i % 4];
        }
    }
    fence_async_proxy();
    asm volatile("bar.sync %0, %1;" ::"r"(1 + group), "n"(kWarpgroup) : "memory");
    const uint64_t a_down = operand(shared_address(sh.factor[group]), Depth);
    float sums[3][Depth / 2] = {};
    // Blocks of 8 tokens x 8 columns: two of tokens, of each two of columns.
    const uint32_t blocks = shared_address(sh.base) + (lane / 16 * 8 + lane % 8) * kPitch +
                            (mine + lane / 8 % 2 * 8) * 2;
    const uint32_t tiles = shared_address(sh.tile);
    Ring<kStages> ring;
    Barrier* before = nullptr;
#pragma unroll 1
    for (int step = item.begin; step < item.end; ++step) {
        float g[kRows / 2], u[kRows / 2], dh[kRows / 2];
        sh.full[ring.slot].wait(ring.parity);
        const uint32_t tile = tiles + ring.slot * sizeof(sh.tile[0]);
        const uint64_t s = operand(tile, Depth), across = operand_across(tile, Depth);
        products_begin();
        product_of_held<T, Depth>(g, b_gate, s);
        product_of_held<T, Depth>(u, b_up, s + kSide / 16);
        product<T, false, Depth>(dh, a_down, s + 2 * (kSide / 16));
        products_commit();
        const uint32_t base = blocks + ring.slot * sizeof(sh.base[0]);
        const auto* weights =
            reinterpret_cast<const float2*>(sh.tile[ring.slot] + operands_bytes(Depth)) + lane % 4;
        products_wait<0>(g);
        settle(u);
        settle(dh);
        if (before) before->arrive();
        before = &sh.empty[ring.slot];
#pragma unroll
        for (int k = 0; k < kRows / 16; ++k) {
            uint32_t words[3][4], packed[3][4];
#pragma unroll
            for (int from = 0; from < 3; ++from) {
                uint32_t (&w)[4] = words[from];
                load_columns<true>(w[0], w[1], w[2], w[3], base + (from * kRows + 16 * k) * kPitch);
            }
#pragma unroll
            for (int i = 0; i < 4; ++i) {  // as the words: i / 2 of tokens, i % 2 of columns
                const int at = 8 * k + 2 * i;
                const float2 p = weights[8 * k + i / 2 * 4];
                const float2 x = unpack<T>(words[0][i]), y = unpack<T>(words[1][i]);
                const float2 z = unpack<T>(words[2][i]);
                through<T>(g[at], u[at], dh[at], x.x, y.x, z.x, p.x);
                through<T>(g[at + 1], u[at + 1], dh[at + 1], x.y, y.y, z.y, p.y);
                packed[0][i] = pack<T>(g[at], g[at + 1]);
                packed[1][i] = pack<T>(u[at], u[at + 1]);
                packed[2][i] = pack<T>(dh[at], dh[at + 1]);
            }
            products_begin();
#pragma unroll
            for (int side = 0; side < 3; ++side) {
                from_registers<T, true, true>(
                    sums[side], packed[side],
                    across + (side * kSide + k * (2 * Depth / 8 * 128)) / 16);
            }
            products_commit();
        }
        ring.next();
    }
    products_wait<0>(sums[0]);
    settle(sums[1]);
    settle(sums[2]);
    if (m.parts == 1) {
        store_grads<T, Depth>(m, item.which, column, sums);
        return;
    }
    float* plane = plane_of<Depth>(m, item.part, item.chunk * m.count + item.which, group);
#pragma unroll
    for (int i = 0; i < 3 * Depth / 2; ++i)
        plane[i * kWarpgroup] = sums[i / (Depth / 2)][i % (Depth / 2)];
}

template <class T>
__global__ void __launch_bounds__(kThreads, 1)
    factor_grads_kernel(const __grid_constant__ FactorGrads m) {
#if defined(__CUDA_ARCH_FEAT_SM90_ALL)
    extern __shared__ __align__(128) unsigned char raw[];
    SharedFactors& sh = *reinterpret_cast<SharedFactors*>(raw);
    if (threadIdx.x == 0) {
        for (int i = 0; i < kStages; ++i) {
            sh.full[i].init(kWarpgroup + 1);
            sh.empty[i].init(kConsumers * kWarpgroup);
        }
        fence_barrier_init();
    }
    __syncthreads();
    const Item item = find_item(m);
    const int role = uniform(threadIdx.x / kWarpgroup);
    if (role == kConsumers) {
        fewer_registers<kProduceRegisters>();
        produce(m, sh, item);
    } else {
        more_registers<kConsumeRegisters>();
        const int depth = m.experts.depth[m.expert[item.which]];
        if (depth == 64) {
            consume<T, 64>(m, sh, item, role);
        } else if (depth == 32) {
            consume<T, 32>(m, sh, item, role);
        } else {
            consume<T, 16>(m, sh, item, role);
        }
    }
#endif
}

// The sum over the parts, in order, by the threads that hold them.
template <class T, int Depth>
__device__ void sum_planes(const FactorGrads& m, int item, int group) {
    float sums[3][Depth / 2] = {};
    for (int part = 0; part < m.parts; ++part) {
        const float* plane = plane_of<Depth>(m, part, item, group);
#pragma unroll
        for (int i = 0; i < 3 * Depth / 2; ++i)
            sums[i / (Depth / 2)][i % (Depth / 2)] += plane[i * kWarpgroup];
    }
    const int warp = threadIdx.x % kWarpgroup / 32;
    store_grads<T, Depth>(m, item % m.count, item / m.count * kColumns + group * 64 + warp * 16,
                          sums);
}
template <class T>
__global__ void __launch_bounds__(kConsumers* kWarpgroup)
    factor_grads_sum_kernel(const __grid_constant__ FactorGrads m) {
    const int item = blockIdx.x, group = threadIdx.x / kWarpgroup;
    const int depth = m.experts.depth[m.expert[item % m.count]];
    if (depth == 64) {
        sum_planes<T, 64>(m, item, group);
    } else if (depth == 32) {
        sum_planes<T, 32>(m, item, group);
    } else {
        sum_planes<T, 16>(m, item, group);
    }
}

}  // namespace factor_grads_impl
}  // namespace flexmore::cuda
