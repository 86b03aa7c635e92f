// The middle of a layer of many experts, and its down deltas, row by row. Mathematics:
// reference/gated_mix.py, reference/lowrank.py.
//
//   mix_rows   h = silu(G + B_g z_g) (U + B_u z_u) of every row; mixed = sum of p h; A_d h
//   add_rows   y = base + sum of p B_d (A_d h)
//
// Floors at T=16384, F=5504, 512 experts of rank 16, top-8 (N = 131,072 rows), bf16, on an H100:
// G and U in, mixed out and the factors once: 0.8 GB, 0.27 ms of memory at 3.0 TB/s. But G and U
// are read once for each of a token's experts (4 bytes an element of h), and rows h are written and
// read (4 bytes): 6.2 GB through L2, 1.1 ms at 5.5 TB/s, if the rows stay there; 0.96 ms more of
// memory if they do not. Special functions: 0.4 ms.
//
// So that they do, one block on each multiprocessor sweeps the columns in slabs of 64, all blocks
// together. A warp keeps some tiles of 16 rows for the whole sweep, with z and the growing A_d h in
// shared memory: z is read once, A_d h written once, sums in a fixed order. Rows h pass through a
// ring of three slabs. Some warps form rows, others sum up the rows of the slab before: each waits
// for counters of slabs, and does not disturb the other. Factors are staged a slab ahead, G and U
// are copied two tiles ahead. Products are mma.sync, so that this serves compute capability 8.0 on.
// What it computes one after the other: several passes over the tokens, where the ring would not
// fit in L2, and several groups of blocks with slabs of their own, where rows are few.
#include <tuple>

#include "expert_major_sweep.cuh"

namespace flexmore::cuda {
namespace {

// Barriers of the warps that form rows, and of those that sum them up.
template <int Id, int Warps>
__device__ __forceinline__ void barrier() {
    asm volatile("bar.sync %0, %1;" ::"n"(Id), "n"(32 * Warps) : "memory");
}
// Says that this block is done with a slab: what its threads wrote before the last barrier is seen
// by who reads the counter.
__device__ __forceinline__ void arrive(uint32_t* counter) {
    asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ void wait_for(const uint32_t* counter, uint32_t blocks) {
    uint32_t seen;
    do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(seen) : "l"(counter) : "memory");
    } while (seen < blocks);
}

template <class T, int Rank, int Formers, int Summers, int Depth, bool IsMix>
__global__ void __launch_bounds__(32 * (Formers + Summers), 1)
    sweep_kernel(const __grid_constant__ Sweep p) {
    using Own = OwnTile<Rank, IsMix>;
    constexpr int kSides = IsMix ? 3 : 1, kStage = kStageBytes<Rank, IsMix>;
    extern __shared__ __align__(16) char shared[];
    const int E = p.num_experts, lane = threadIdx.x % 32, w = threadIdx.x / 32;
    const bool forms = w < Formers;
    // Two slabs' factors, whose they are, own tiles, then what runs ahead or, before, tables.
    char* stages = shared;
    auto* staged = reinterpret_cast<StagedExpert*>(stages + 2 * p.staged_experts * kStage);
    Own* tiles = reinterpret_cast<Own*>(staged + p.staged_experts) + w * p.tiles_per_warp;
    char* ahead = reinterpret_cast<char*>(reinterpret_cast<Own*>(staged + p.staged_experts) +
                                          Formers * p.tiles_per_warp);
    int32_t* first_tile = reinterpret_cast<int32_t*>(ahead);
    int32_t *begins = first_tile + E + 1, *counts = begins + E, *places = counts + E;
    __shared__ int32_t num_staged;

    // An expert's rows ascend by token: those of this pass are a part of them.
    for (int e = threadIdx.x; e < E; e += blockDim.x) {
        const int begin = p.row_offsets[e], end = p.row_offsets[e + 1];
        begins[e] = first_row_of(p.row_to_slot, begin, end, int64_t(p.first_token) * p.top_k);
        counts[e] = first_row_of(p.row_to_slot, begins[e], end, int64_t(p.last_token) * p.top_k) -
                    begins[e];
    }
    __syncthreads();
    find_tiles([&](int e) { return counts[e]; }, E, kTileRows, first_tile);
    const int group = blockIdx.x % p.groups, member = blockIdx.x / p.groups;
    const int members = gridDim.x / p.groups;
    const auto share = [&](int64_t all, int i, int parts) { return int(all * i / parts); };
    const int begin = share(first_tile[E], member * Formers + w, members * Formers);
    const int count =
        forms ? share(first_tile[E], member * Formers + w + 1, members * Formers) - begin : 0;
    for (int i = 0; i < count; ++i) {
        const int e = expert_of(begin + i, first_tile, E);
        const int at = (begin + i - first_tile[e]) * kTileRows;
        const Tile tile{e, begins[e] + at, min(counts[e] - at, kTileRows)};
        open_tile<T, Rank, IsMix>(p, tiles[i], tile, lane);
    }
    if (threadIdx.x == 0) {  // the experts of this block's tiles, as many as there is room for
        const int stop = share(first_tile[E], member + 1, members);
        int e = share(first_tile[E], member, members), n = 0;
        for (e = e < stop ? expert_of(e, first_tile, E) : E; e < E && first_tile[e] < stop; ++e) {
            places[e] = n < p.staged_experts ? n : -1;
            if (!counts[e] || n == p.staged_experts) continue;
            staged[n].expert = e;
#pragma unroll
            for (int side = 0; side < kSides; ++side) {
                staged[n].rank[side] = p.sides[side].ranks[e];
                staged[n].offset[side] = p.sides[side].offsets[e];
            }
            ++n;
        }
        num_staged = n;
    }
    __syncthreads();
    for (int i = lane; i < count; i += 32) tiles[i].place = places[tiles[i].expert];
    __syncthreads();

    const int slabs = (p.width + kSlab - 1) / kSlab;
    const int steps = (slabs - group + p.groups - 1) / p.groups;
    uint32_t* formed = p.counters + group * 2 * ((slabs + p.groups - 1) / p.groups);
    uint32_t* summed = formed + (slabs + p.groups - 1) / p.groups;
    T* ring = static_cast<T*>(p.ring) + int64_t(group) * p.slots * p.num_rows * kSlab;
    const auto slot = [&](int step) { return ring + step % p.slots * p.num_rows * kSlab; };

    if (!forms) {
        const int64_t tokens = p.last_token - p.first_token;
        const int s = member * Summers + w - Formers, all = members * Summers;
        const int64_t first = p.first_token + tokens * s / all;
        const int64_t last = p.first_token + tokens * (s + 1) / all;
        for (int i = 0; i < steps; ++i) {
            if (w == Formers && lane == 0) wait_for(formed + i, members);
            barrier<2, Summers>();
            combine<T, IsMix>(p, first, last, (group + i * p.groups) * kSlab, slot(i), lane);
            barrier<2, Summers>();
            if (w == Formers && lane == 0) arrive(summed + i);
        }
        return;
    }

    // Copies the factors of a slab: of a row of b all experts' at a time, which are neighbours.
    const auto stage = [&](int step) {
        constexpr int kWords = kSlab * Rank / 8, kOfRow = Rank / 8;
        if (step >= steps) return;
        char* to = stages + step % 2 * p.staged_experts * kStage;
        const int column = (group + step * p.groups) * kSlab;
        const auto copy = [&](int n, int side, int word, const T* from, bool exists) {
            const void* some = p.sides[side].ranks;
            copy_words(to + ((n * kSides + side) * kWords + word) * 16, exists ? from : some,
                       exists);
        };
#pragma unroll
        for (int side = 0; side < (IsMix ? 2 : 1); ++side) {
            const Side& s = p.sides[side];
            for (int f = w; f < kSlab; f += Formers) {
                const T* row = static_cast<const T*>(s.matrix) + (column + f) * s.stride;
                const int t = f / 32 * 4 + f % 8 / 2, place = f % 32 / 8 * 2 + f % 2;
                for (int i = lane; i < num_staged * kOfRow; i += 32) {
                    const int n = i / kOfRow, k = i % kOfRow;
                    const int word = ((t * kOfRow / 2 + k / 2) * 8 + place) * 2 + k % 2;
                    copy(n, side, word, row + staged[n].offset[side] + 8 * k,
                         column + f < p.width && 8 * k < staged[n].rank[side]);
                }
            }
        }
        if constexpr (IsMix) {
            const Side& s = p.sides[2];
            for (int n = 0; n < num_staged; ++n) {
                for (int i = threadIdx.x; i < kWords; i += 32 * Formers) {
                    const int r = i / 8, c = i % 8;
                    const int word = ((c / 4 * kOfRow + r / 8) * 8 + r % 8) * 4 + c % 4;
                    copy(n, 2, word,
                         static_cast<const T*>(s.matrix) + (staged[n].offset[2] + r) * s.stride +
                             column + 8 * c,
                         r < staged[n].rank[2] && column + 8 * c < p.width);
                }
            }
        }
    };
    Fetch<T, Rank, Depth, IsMix> fetch{
        reinterpret_cast<uint4*>(ahead) + w * Depth * 256, tiles, count, slabs, 0, group, 0};
    int fetched = 0;
    stage(0);
    for (int i = 0; i < Depth - 1; ++i) fetch.next(p, lane);
    for (int i = 0; i < steps; ++i) {
        // What was staged is here: copies end in order, and if as many tiles as run ahead have been
        // fetched and waited for since.
        if (!IsMix || i == 0 || count < Depth) wait_copies<0>();
        if (threadIdx.x == 0 && i >= p.slots) wait_for(summed + i - p.slots, members);
        barrier<1, Formers>();
        if (threadIdx.x == 0 && i > 0) arrive(formed + i - 1);
        stage(i + 1);  // ends with the next tile's copies
        if (!count) commit_copies();
        expand<T, Rank, Depth, IsMix>(p, tiles, count, (group + i * p.groups) * kSlab, slot(i),
                                      stages + i % 2 * p.staged_experts * kStage, fetch, fetched,
                                      lane);
    }
    barrier<1, Formers>();
    if (threadIdx.x == 0) arrive(formed + steps - 1);
    if constexpr (IsMix) {
        float* plane = p.planes + group * p.num_rows * Rank;
        for (int i = 0; i < count; ++i) write_shrunk<Rank>(tiles[i], plane, lane);
    }
}

template <class T, int Rank, bool IsMix>
void launch(Sweep& p, const Tensor& like) {
    // As many warps as registers allow; without the nonlinearity, sums are most of the work.
    constexpr int kFormers = IsMix ? 8 : 4, kSummers = IsMix ? 4 : 12, kDepth = 2;
    using Own = OwnTile<Rank, IsMix>;
    const auto kernel = sweep_kernel<T, Rank, kFormers, kSummers, kDepth, IsMix>;
    const int device = like.get_device_index(), blocks = multiprocessors(device);
    const SweepLaunch launch =
        sweep_launch({p.num_tokens, p.top_k, p.num_experts, p.width, blocks, kFormers,
                      attribute(device, cudaDevAttrMaxSharedMemoryPerBlockOptin) - 256,
                      attribute(device, cudaDevAttrL2CacheSize), int64_t(sizeof(Own)),
                      int64_t(2 * kStageBytes<Rank, IsMix> + sizeof(StagedExpert)),
                      IsMix ? kFormers * kDepth * kFetchBytes : 0, p.groups});
    const int64_t counters = 2 * p.groups * launch.steps;
    Tensor ring = empty(like, {p.groups * launch.slots, p.num_rows, kSlab}, like.scalar_type());
    Tensor zero = zeros(like, {launch.passes * counters}, ScalarType::Int);
    p.ring = ring.mutable_data_ptr();
    p.slots = static_cast<int>(launch.slots);
    p.tiles_per_warp = static_cast<int>(launch.tiles_per_warp);
    p.staged_experts = static_cast<int>(launch.staged_experts);
    allow_shared_memory(kernel, "sweep");
    for (int64_t pass = 0; pass < launch.passes; ++pass) {
        p.first_token = static_cast<int>(p.num_tokens * pass / launch.passes);
        p.last_token = static_cast<int>(p.num_tokens * (pass + 1) / launch.passes);
        p.counters = reinterpret_cast<uint32_t*>(mutable_data<int32_t>(zero)) + pass * counters;
        launch_together(kernel, blocks / p.groups * p.groups, 32 * (kFormers + kSummers),
                        launch.shared_bytes, current_stream(like), p);
    }
}

Side side(const Tensor& matrix, const Tensor& ranks, const Tensor& offsets) {
    return {matrix.const_data_ptr(), data<int32_t>(ranks), data<int32_t>(offsets),
            matrix.stride(0)};
}

Sweep sweep_of(const Tensor& weights, const Tensor& row_to_slot, const Tensor& slot_to_row,
               const Tensor& row_offsets, int64_t width) {
    check_tensor(weights, "weights", 2, ScalarType::Float);
    check_tensor(row_to_slot, "row_to_slot", 1, ScalarType::Int);
    check_tensor(slot_to_row, "slot_to_row", 2, ScalarType::Int);
    check_size(row_to_slot, "row_to_slot", 0, slot_to_row.numel());
    check_int32_range(width, "the number of columns");
    Sweep p{};
    p.row_to_slot = data<int32_t>(row_to_slot);
    p.slot_to_row = data<int32_t>(slot_to_row);
    p.row_offsets = data<int32_t>(row_offsets);
    p.weights = data<float>(weights);
    p.num_rows = row_to_slot.size(0);
    p.num_tokens = static_cast<int>(slot_to_row.size(0));
    p.top_k = static_cast<int>(slot_to_row.size(1));
    p.num_experts = static_cast<int>(row_offsets.size(0) - 1);
    p.width = static_cast<int>(width);
    p.groups = static_cast<int>(sweep_groups(p.num_tokens, p.top_k, p.num_experts, width,
                                             multiprocessors(weights.get_device_index())));
    return p;
}

std::tuple<Tensor, Tensor> mix_rows(Tensor gate, Tensor up, Tensor weights, Tensor row_to_slot,
                                    Tensor slot_to_row, Tensor row_offsets, Tensor z, Tensor b_gate,
                                    Tensor ranks_gate, Tensor offsets_gate, Tensor b_up,
                                    Tensor ranks_up, Tensor offsets_up, Tensor a_down,
                                    Tensor ranks_down, Tensor offsets_down) {
    check_same_device(gate, {&up, &weights, &row_to_slot, &slot_to_row, &row_offsets, &z, &b_gate,
                             &b_up, &a_down});
    const OnDevice guard(gate);
    const int64_t T = gate.size(0), F = gate.size(1), R = z.size(1) / 2;
    Sweep p = sweep_of(weights, row_to_slot, slot_to_row, row_offsets, F);
    Tensor mixed = empty(gate, {T, F}, gate.scalar_type());
    Tensor planes = empty(gate, {p.groups, p.num_rows, R}, ScalarType::Float);
    if (mixed.numel() == 0) return {mixed, planes};
    p.gate = gate.const_data_ptr();
    p.up = up.const_data_ptr();
    p.z = z.const_data_ptr();
    p.sides[0] = side(b_gate, ranks_gate, offsets_gate);
    p.sides[1] = side(b_up, ranks_up, offsets_up);
    p.sides[2] = side(a_down, ranks_down, offsets_down);
    p.planes = mutable_data<float>(planes);
    p.out = mixed.mutable_data_ptr();
    by_type_and_rank(gate, R, [&]<class E, int Rank>(E, std::integral_constant<int, Rank>) {
        launch<E, Rank, true>(p, gate);
    });
    return {mixed, planes};
}

Tensor add_rows(Tensor base, Tensor weights, Tensor row_to_slot, Tensor slot_to_row,
                Tensor row_offsets, Tensor planes, Tensor b, Tensor ranks, Tensor offsets) {
    check_tensor(base, "base", 2, ScalarType::Float);
    check_tensor(planes, "planes", 3, ScalarType::Float);
    check_same_device(base, {&weights, &row_to_slot, &slot_to_row, &row_offsets, &planes, &b});
    const OnDevice guard(base);
    const int64_t T = base.size(0), D = base.size(1);
    Sweep p = sweep_of(weights, row_to_slot, slot_to_row, row_offsets, D);
    Tensor y = empty(b, {T, D}, b.scalar_type());
    if (y.numel() == 0) return y;
    p.base = data<float>(base);
    p.sides[0] = side(b, ranks, offsets);
    p.planes = mutable_data<float>(planes);
    p.num_planes = static_cast<int>(planes.size(0));
    p.out = y.mutable_data_ptr();
    by_type_and_rank(b, planes.size(2),
                     [&]<class E, int Rank>(E, std::integral_constant<int, Rank>) {
                         launch<E, Rank, false>(p, b);
                     });
    return y;
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("mix_rows", TORCH_BOX(&flexmore::cuda::mix_rows));
    m.impl("add_rows", TORCH_BOX(&flexmore::cuda::add_rows));
}
