// Rows of many experts, formed and summed per token in one persistent kernel. Included by
// expert_major.cu only, which says what it computes and why it is made so.
#pragma once

#include "expert_major_rows.cuh"

namespace flexmore::cuda {
namespace {

constexpr int kSlab = kSweepSlab, kParts = kSlab / 32;

struct Side {                        // a projection's factors of all experts
    const void* matrix;              // b (out, R); of the down projection in `mix` a (R, in)
    const int32_t *ranks, *offsets;  // (E,), (E + 1,), on the rank axis
    int64_t stride;                  // elements from one row of the matrix to the next
};

struct Sweep {
    const int32_t *row_to_slot, *slot_to_row, *row_offsets;
    const float* weights;       // (T, K)
    const void *gate, *up, *z;  // mix: (T, F), (T, F), (N, 2 R)
    const float* base;          // add: (T, D)
    Side sides[3];              // mix: gate, up, down; add: down
    float* planes;              // (groups, N, R): A_d h, written by mix and summed by add
    void *ring, *out;           // (groups, slots, N, kSlab), (T, width)
    uint32_t* counters;         // (groups, 2, steps), zero
    int64_t num_rows;
    int num_tokens, first_token, last_token, top_k, num_experts, width;
    int num_planes, groups, slots, tiles_per_warp, staged_experts;
};

// 16 rows of one expert, which a warp keeps for the whole sweep.
template <int Rank, bool IsMix>
struct OwnTile {
    int32_t token[kTileRows];
    int32_t expert, row, live, place;         // place: of its factors' stage, or -1
    uint4 z[IsMix ? 2 : 1][Rank / 16][32];    // left operands, a lane's at its index
    float4 shrunk[IsMix ? Rank / 8 : 1][32];  // A_d h, the same
};
struct StagedExpert {
    int32_t expert, rank[3], offset[3], unused;
};

template <int Rank, bool IsMix>
constexpr int kStageBytes = (IsMix ? 3 : 1) * kSlab * Rank * 2;
constexpr int kFetchBytes = kTileRows * kSlab * 2 * 2;  // G and U of a tile

// Where word i (16 bytes) of a slab's factors lies: in the stage they are in the order of use.
template <class T, int Rank>
__device__ __forceinline__ const T* factor_word(const Side& s, bool by_column, int rank, int offset,
                                                int i, int column, int width) {
    const T* matrix = static_cast<const T*>(s.matrix);
    if (by_column) {
        const int q = i % 4, n = i / 4 % 8, r = 8 * (i / 32 % (Rank / 8)) + n;
        const int c = column + 32 * (i / 4 / Rank) + 8 * q;
        return r < rank && c < width ? matrix + (offset + r) * s.stride + c : nullptr;
    }
    const int half = i % 2, n = i / 2 % 8, k = 16 * (i / 16 % (Rank / 16)), t = i / Rank;
    const int f = column + 32 * (t / 4) + 8 * (n / 2) + 2 * (t % 4) + n % 2;
    return f < width && k < rank ? matrix + f * s.stride + offset + k + 8 * half : nullptr;
}

// An expert's factors of 32 columns, as a lane's operands.
template <class T, int Rank, bool IsMix>
struct Operands {
    static constexpr int kSteps = Rank / 16, kWords = kSlab * Rank / 8;  // words a side
    uint32_t gate[4][kSteps][2], up[IsMix ? 4 : 1][kSteps][2], down[IsMix ? Rank / 8 : 1][2][2];

    static __device__ __forceinline__ void set(uint32_t (&to)[2], uint2 v) {
        to[0] = v.x;
        to[1] = v.y;
    }
    // word(side, i, half): a half of 16 bytes.
    template <class Word>
    __device__ __forceinline__ void fill(int part, int lane, const Word& word) {
#pragma unroll
        for (int t = 0; t < 4; ++t) {
#pragma unroll
            for (int k = 0; k < kSteps; ++k) {
                const int i = ((part * 4 + t) * kSteps + k) * 16 + lane / 2;
                set(gate[t][k], word(0, i, lane % 2));
                if constexpr (IsMix) set(up[t][k], word(1, i, lane % 2));
            }
        }
        if constexpr (IsMix) {
#pragma unroll
            for (int r = 0; r < Rank / 8; ++r) {
                const int i = (part * (Rank / 8) + r) * 32 + lane;
                set(down[r][0], word(2, i, 0));
                set(down[r][1], word(2, i, 1));
            }
        }
    }
    __device__ __forceinline__ void load(const Sweep& p, const OwnTile<Rank, IsMix>& tile,
                                         const char* stage, int column, int part, int lane) {
        if (tile.place >= 0) {
            stage += tile.place * kStageBytes<Rank, IsMix>;
            fill(part, lane, [&](int side, int i, int half) {
                return *reinterpret_cast<const uint2*>(stage + (side * kWords + i) * 16 + half * 8);
            });
        } else {  // more experts than there is room for
            fill(part, lane, [&](int side, int i, int half) {
                const Side& s = p.sides[side];
                const T* word = factor_word<T, Rank>(s, side == 2, s.ranks[tile.expert],
                                                     s.offsets[tile.expert], i, column, p.width);
                return word ? *reinterpret_cast<const uint2*>(word + 4 * half) : make_uint2(0, 0);
            });
        }
    }
};

// The copies of G and U that run ahead, whole lines of a row at a time: eight lanes copy its 128
// bytes to where the lanes that use them look.
template <class T, int Rank, int Depth, bool IsMix>
struct Fetch {
    uint4* stages;  // (Depth, 8, 32) of this warp
    const OwnTile<Rank, IsMix>* tiles;
    int count, slabs;
    int tile, slab, stage;

    __device__ __forceinline__ void next(const Sweep& p, int lane) {
        if constexpr (IsMix) {
            __syncwarp();  // all have read what was in the stage
            if (count && slab < slabs) {
                const int c = slab * kSlab + 8 * (lane % 8);
                const bool inside = c < p.width;
                uint4* to = stages + stage * 256 + lane % 8 / 4 * 128 + lane / 8 * 4 + lane % 4;
#pragma unroll
                for (int j = 0; j < kTileRows / 4; ++j) {  // rows 4 j .. 4 j + 3
                    const int64_t at =
                        int64_t(tiles[tile].token[4 * j + lane / 8]) * p.width + (inside ? c : 0);
                    uint4* place = to + j / 2 * 32 + j % 2 * 16;
                    copy_words(place, static_cast<const T*>(p.gate) + at, inside);
                    copy_words(place + 64, static_cast<const T*>(p.up) + at, inside);
                }
                if (++tile == count) tile = 0, slab += p.groups;
            }
            stage = stage + 1 == Depth ? 0 : stage + 1;
        }
        commit_copies();
    }
};

// Word t of four.
__device__ __forceinline__ uint32_t word_of(const uint4& v, int t) {
    return t == 0 ? v.x : t == 1 ? v.y : t == 2 ? v.z : v.w;
}

// Rows of a tile, in 32 columns: from the operands and the lane's G and U (low and high rows of
// each) to 16 bits, stored at `out` and kept in h as the left operand of the next product.
template <class T, int Rank, bool IsMix>
__device__ __forceinline__ void form_rows(const OwnTile<Rank, IsMix>& tile,
                                          const Operands<T, Rank, IsMix>& f, const uint4* fetched,
                                          T* out, uint32_t (&h)[2][4], int lane) {
    uint4 in[4];
    if constexpr (IsMix) {
#pragma unroll
        for (int j = 0; j < 4; ++j) in[j] = fetched[j * 32];
    }
#pragma unroll
    for (int t = 0; t < 4; ++t) {
        float g[4] = {}, u[4] = {};
        if constexpr (IsMix) {
#pragma unroll
            for (int half = 0; half < 2; ++half) {
                const float2 gate = unpack<T>(word_of(in[half], t));
                const float2 up = unpack<T>(word_of(in[2 + half], t));
                g[2 * half] = gate.x, g[2 * half + 1] = gate.y;
                u[2 * half] = up.x, u[2 * half + 1] = up.y;
            }
        }
#pragma unroll
        for (int k = 0; k < Rank / 16; ++k) {
            mma<T>(g, tile.z[0][k][lane], f.gate[t][k]);
            if constexpr (IsMix) mma<T>(u, tile.z[IsMix][k][lane], f.up[t][k]);
        }
        if constexpr (IsMix) {
#pragma unroll
            for (int j = 0; j < 4; ++j) g[j] = silu_flushed(g[j]) * u[j];
        }
        h[0][t] = pack<T>(g[0], g[1]);
        h[1][t] = pack<T>(g[2], g[3]);
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
        if (lane / 4 + 8 * half < tile.live) {
            *reinterpret_cast<uint4*>(out + 8 * kSlab * half) =
                make_uint4(h[half][0], h[half][1], h[half][2], h[half][3]);
        }
    }
}

// All rows of a warp, in one slab.
template <class T, int Rank, int Depth, bool IsMix>
__device__ __forceinline__ void expand(const Sweep& p, OwnTile<Rank, IsMix>* tiles, int count,
                                       int column, T* slot, const char* factors,
                                       Fetch<T, Rank, Depth, IsMix>& fetch, int& stage, int lane) {
    constexpr bool kHeld = Rank == 16;  // operands of the whole slab fit in registers
    Operands<T, Rank, IsMix> operands[kHeld ? kParts : 1];
    int expert = -1;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
        OwnTile<Rank, IsMix>& tile = tiles[i];
        fetch.next(p, lane);
        if (kHeld && tile.expert != expert) {
            expert = tile.expert;
#pragma unroll
            for (int part = 0; part < kParts; ++part) {
                operands[kHeld ? part : 0].load(p, tile, factors, column, part, lane);
            }
        }
        if constexpr (IsMix) {
            wait_copies<Depth - 1>();
            __syncwarp();
        }
        float shrunk[IsMix ? Rank / 8 : 1][4];
        if constexpr (IsMix) {
#pragma unroll
            for (int r = 0; r < Rank / 8; ++r) {
                const float4 v = tile.shrunk[r][lane];
                shrunk[r][0] = v.x, shrunk[r][1] = v.y, shrunk[r][2] = v.z, shrunk[r][3] = v.w;
            }
        }
        T* out = slot + int64_t(tile.row + lane / 4) * kSlab + 8 * (lane % 4);
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
            auto& f = operands[kHeld ? part : 0];
            if constexpr (!kHeld) f.load(p, tile, factors, column, part, lane);
            uint32_t h[2][4];
            form_rows<T, Rank, IsMix>(tile, f, fetch.stages + stage * 256 + part * 128 + lane,
                                      out + 32 * part, h, lane);
            if constexpr (IsMix) {
                const uint4 first = make_uint4(h[0][0], h[1][0], h[0][1], h[1][1]);
                const uint4 second = make_uint4(h[0][2], h[1][2], h[0][3], h[1][3]);
#pragma unroll
                for (int r = 0; r < Rank / 8; ++r) {
                    mma<T>(shrunk[r], first, f.down[r][0]);
                    mma<T>(shrunk[r], second, f.down[r][1]);
                }
            }
        }
        if constexpr (IsMix) {
#pragma unroll
            for (int r = 0; r < Rank / 8; ++r) {
                tile.shrunk[r][lane] =
                    make_float4(shrunk[r][0], shrunk[r][1], shrunk[r][2], shrunk[r][3]);
            }
            stage = stage + 1 == Depth ? 0 : stage + 1;
        }
    }
}

// Weighted sums of rows in one slab, for tokens [first, last): eight lanes a token, eight tokens
// and eight rows of each at a time.
template <class T, bool IsMix>
__device__ __forceinline__ void combine(const Sweep& p, int64_t first, int64_t last, int column,
                                        const T* slot, int lane) {
    constexpr int kFlight = 8, kBatch = 2, kLanes = kSlab / 8, kAtOnce = 32 / kLanes;
    const int c = column + lane % kLanes * 8;
    slot += lane % kLanes * 8;
#pragma unroll 1
    for (int64_t begin = first; begin < last; begin += kBatch * kAtOnce) {
        float sum[kBatch][8] = {};
#pragma unroll 1
        for (int k0 = 0; k0 < p.top_k; k0 += kFlight) {
            uint4 v[kBatch][kFlight];
            float w[kBatch][kFlight];
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
                const int64_t t = begin + b * kAtOnce + lane / kLanes;
#pragma unroll
                for (int k = 0; k < kFlight; ++k) {
                    const bool exists = t < last && c < p.width && k0 + k < p.top_k;
                    const int64_t at = t * p.top_k + k0 + k;
                    const int row = exists ? p.slot_to_row[at] : -1;
                    w[b][k] = row >= 0 ? p.weights[at] : 0;
                    v[b][k] = row >= 0 ? load_from_l2(slot + int64_t(row) * kSlab) : uint4{};
                }
            }
#pragma unroll
            for (int b = 0; b < kBatch; ++b) {
#pragma unroll
                for (int k = 0; k < kFlight; ++k) {
#pragma unroll
                    for (int j = 0; j < 4; ++j) {
                        const float2 x = unpack<T>(word_of(v[b][k], j));
                        sum[b][2 * j] = fmaf(w[b][k], x.x, sum[b][2 * j]);
                        sum[b][2 * j + 1] = fmaf(w[b][k], x.y, sum[b][2 * j + 1]);
                    }
                }
            }
        }
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
            const int64_t t = begin + b * kAtOnce + lane / kLanes;
            if (t >= last || c >= p.width) continue;
            if constexpr (!IsMix) {
#pragma unroll
                for (int j = 0; j < 8; j += 4) {
                    const float4 x =
                        __ldcs(reinterpret_cast<const float4*>(p.base + t * p.width + c + j));
                    sum[b][j] += x.x, sum[b][j + 1] += x.y;
                    sum[b][j + 2] += x.z, sum[b][j + 3] += x.w;
                }
            }
            const uint4 out =
                make_uint4(pack<T>(sum[b][0], sum[b][1]), pack<T>(sum[b][2], sum[b][3]),
                           pack<T>(sum[b][4], sum[b][5]), pack<T>(sum[b][6], sum[b][7]));
            __stcs(reinterpret_cast<uint4*>(static_cast<T*>(p.out) + t * p.width + c), out);
        }
    }
}

// Fills a tile: rows, their tokens, and z as left operands.
template <class T, int Rank, bool IsMix>
__device__ __forceinline__ void open_tile(const Sweep& p, OwnTile<Rank, IsMix>& own,
                                          const Tile& tile, int lane) {
    const auto row_of = [&](int i) { return tile.row + (i < tile.live ? i : tile.live - 1); };
    if (lane == 0) own.expert = tile.expert, own.row = tile.row, own.live = tile.live;
    if (lane < kTileRows) own.token[lane] = p.row_to_slot[row_of(lane)] / p.top_k;
    const int64_t low = row_of(lane / 4), high = row_of(lane / 4 + 8);
#pragma unroll
    for (int k = 0; k < Rank / 16; ++k) {
        const int c = 16 * k + 4 * (lane % 4);
        if constexpr (IsMix) {
#pragma unroll
            for (int side = 0; side < 2; ++side) {
                const T* z = static_cast<const T*>(p.z) + side * Rank + c;
                const auto a = *reinterpret_cast<const uint2*>(z + low * 2 * Rank);
                const auto b = *reinterpret_cast<const uint2*>(z + high * 2 * Rank);
                own.z[side][k][lane] = make_uint4(a.x, b.x, a.y, b.y);
            }
        } else {
            float4 a{}, b{};
            for (int plane = 0; plane < p.num_planes; ++plane) {
                const float* z = p.planes + plane * p.num_rows * Rank + c;
                const float4 x = *reinterpret_cast<const float4*>(z + low * Rank);
                const float4 y = *reinterpret_cast<const float4*>(z + high * Rank);
                a.x += x.x, a.y += x.y, a.z += x.z, a.w += x.w;
                b.x += y.x, b.y += y.y, b.z += y.z, b.w += y.w;
            }
            own.z[0][k][lane] = make_uint4(pack<T>(a.x, a.y), pack<T>(b.x, b.y), pack<T>(a.z, a.w),
                                           pack<T>(b.z, b.w));
        }
    }
    if constexpr (IsMix) {
#pragma unroll
        for (int r = 0; r < Rank / 8; ++r) own.shrunk[r][lane] = make_float4(0, 0, 0, 0);
    }
}

template <int Rank>
__device__ __forceinline__ void write_shrunk(const OwnTile<Rank, true>& own, float* plane,
                                             int lane) {
    float* z = plane + int64_t(own.row + lane / 4) * Rank + 2 * (lane % 4);
#pragma unroll
    for (int r = 0; r < Rank / 8; ++r) {
        const float4 v = own.shrunk[r][lane];
        if (lane / 4 < own.live) *reinterpret_cast<float2*>(z + 8 * r) = make_float2(v.x, v.y);
        if (lane / 4 + 8 < own.live) {
            *reinterpret_cast<float2*>(z + 8 * Rank + 8 * r) = make_float2(v.z, v.w);
        }
    }
}

}  // namespace
}  // namespace flexmore::cuda
