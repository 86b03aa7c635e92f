// z of every row of many experts, gate's and up's together: z_n = [A_g x | A_u x], x the row's
// token. Mathematics: reference/lowrank.py.
//
// Floors at T=16384, D=2048, 512 experts of rank 16, top-8 (N = 131,072 rows), bf16, on an H100:
// x 67 MB and the factors 67 MB once: 45 us of memory at 3.0 TB/s; but x is read once for each of a
// token's experts, 0.54 GB through L2, and half the factors again: 0.12 ms at 5.5 TB/s. Measured
// 0.18 ms; a gather and a product for each projection took 0.52.
//
// A block has 128 rows of one expert and 32 or 64 columns of z. What it multiplies comes by
// cp.async, two steps of 64 columns ahead, whole lines at a time.
#include "expert_major_rows.cuh"

namespace flexmore::cuda {
namespace {

struct Factor {
    const void* a;                   // (R, D)
    const int32_t *ranks, *offsets;  // (E,), (E + 1,), on the rank axis
};
struct Shrink {
    const void* x;  // (T, D)
    const int32_t *row_to_slot, *row_offsets;
    Factor gate, up;
    void* z;  // (N, 2 R)
    int top_k, num_experts, width;
};

constexpr int kWarps = 8, kAhead = 3, kBlockRows = kWarps * kTileRows;
constexpr int kRowBytes = kTileRows * 64 * 2;  // a warp's part of x, of one step

// Bytes of a step: x, then both factors.
template <int Rank>
constexpr int kStepBytes = kWarps * kRowBytes + 2 * Rank * 64 * 2;

template <class T, int Rank>
__global__ void __launch_bounds__(32 * kWarps)
    shrink_rows_kernel(const __grid_constant__ Shrink p) {
    constexpr int kColumns = 2 * Rank / 8;                  // of eight
    constexpr int kCopies = kColumns * 64 / (32 * kWarps);  // of 16 bytes of factors, a thread
    extern __shared__ __align__(16) char shared[];
    int32_t* first_tile = reinterpret_cast<int32_t*>(shared);
    const auto count = [&](int e) { return p.row_offsets[e + 1] - p.row_offsets[e]; };
    find_tiles(count, p.num_experts, kBlockRows, first_tile);
    if (int(blockIdx.x) >= first_tile[p.num_experts]) return;
    const int expert = expert_of(blockIdx.x, first_tile, p.num_experts);
    const int begin = (int(blockIdx.x) - first_tile[expert]) * kBlockRows;
    const int row = p.row_offsets[expert] + begin, live = min(count(expert) - begin, kBlockRows);
    __syncthreads();  // the tables' place is used again

    const int lane = threadIdx.x % 32, g = lane / 4, q = lane % 4, w = threadIdx.x / 32;
    // Eight lanes copy a row's 128 bytes to where the lanes that use them look.
    const int c8 = lane % 8, r4 = lane / 8;
    const T* x[4];  // of rows r4, r4 + 4, ...
#pragma unroll
    for (int j = 0; j < 4; ++j) {
        const int at = min(w * kTileRows + 4 * j + r4, live - 1);
        x[j] = static_cast<const T*>(p.x) + int64_t(p.row_to_slot[row + at] / p.top_k) * p.width;
    }
    // Copy j of this thread: 8 columns of one row of a factor, or none.
    const T* a[kCopies];
#pragma unroll
    for (int j = 0; j < kCopies; ++j) {
        const int all = 4 * (w + j * kWarps) + r4;  // row of gate's factor, then of up's
        const Factor& f = all < Rank ? p.gate : p.up;
        const int r = all % Rank;
        a[j] = r < f.ranks[expert]
                   ? static_cast<const T*>(f.a) + int64_t(f.offsets[expert] + r) * p.width
                   : nullptr;
    }
    const int steps = (p.width + 63) / 64;
    const auto fetch = [&](int step) {
        if (step < steps) {
            char* stage = shared + step % kAhead * kStepBytes<Rank>;
            const int c = 64 * step + 8 * c8, part = c8 / 4;
            const bool inside = c < p.width;
            const int place = r4 * 4 + c8 % 4;
            uint4* to = reinterpret_cast<uint4*>(stage + w * kRowBytes) + part * 64 + place;
#pragma unroll
            for (int j = 0; j < 4; ++j) {
                copy_words(to + j * 16, x[j] + (inside ? c : 0), inside);
            }
            uint4* factors = reinterpret_cast<uint4*>(stage + kWarps * kRowBytes);
#pragma unroll
            for (int j = 0; j < kCopies; ++j) {
                const int first = 4 * (w + j * kWarps);
                const bool exists = a[j] && inside;
                copy_words(factors + part * kColumns * 32 + first * 4 + place,
                           exists ? a[j] + c : x[0], exists);
            }
        }
        commit_copies();
    };
    float acc[kColumns][4] = {};
#pragma unroll
    for (int i = 0; i < kAhead - 1; ++i) fetch(i);
#pragma unroll 1
    for (int step = 0; step < steps; ++step) {
        wait_copies<kAhead - 2>();
        __syncthreads();
        fetch(step + kAhead - 1);
        const char* stage = shared + step % kAhead * kStepBytes<Rank>;
        const uint4* own = reinterpret_cast<const uint4*>(stage + w * kRowBytes) + lane;
        const uint4* factors = reinterpret_cast<const uint4*>(stage + kWarps * kRowBytes) + lane;
#pragma unroll
        for (int part = 0; part < 2; ++part) {
            const uint4 low = own[part * 64], high = own[part * 64 + 32];
            const uint4 first = make_uint4(low.x, high.x, low.y, high.y);
            const uint4 second = make_uint4(low.z, high.z, low.w, high.w);
#pragma unroll
            for (int n = 0; n < kColumns; ++n) {
                const uint4 b = factors[(part * kColumns + n) * 32];
                mma<T>(acc[n], first, {b.x, b.y});
                mma<T>(acc[n], second, {b.z, b.w});
            }
        }
    }
    const int at = w * kTileRows + g;
    T* z = static_cast<T*>(p.z) + int64_t(row + at) * 2 * Rank + 2 * q;
#pragma unroll
    for (int n = 0; n < kColumns; ++n) {
        if (at < live) *reinterpret_cast<uint32_t*>(z + 8 * n) = pack<T>(acc[n][0], acc[n][1]);
        if (at + 8 < live) {
            *reinterpret_cast<uint32_t*>(z + 16 * Rank + 8 * n) = pack<T>(acc[n][2], acc[n][3]);
        }
    }
}

template <class T, int Rank>
void launch(const Shrink& p, int64_t num_rows, cudaStream_t stream) {
    const int64_t busy = std::min<int64_t>(num_rows, p.num_experts);
    const int tables = 4 * (p.num_experts + 1), bytes = std::max(tables, kAhead * kStepBytes<Rank>);
    const auto kernel = shrink_rows_kernel<T, Rank>;
    allow_shared_memory(kernel, "shrink_rows");
    const unsigned grid = grid_size(busy + (num_rows - busy) / kBlockRows);
    kernel<<<grid, 32 * kWarps, bytes, stream>>>(p);
    check_launch("shrink_rows");
}

Factor factor(const Tensor& a, const Tensor& ranks, const Tensor& offsets) {
    return {a.const_data_ptr(), data<int32_t>(ranks), data<int32_t>(offsets)};
}

Tensor shrink_rows(Tensor x, Tensor row_to_slot, Tensor row_offsets, int64_t top_k, Tensor a_gate,
                   Tensor ranks_gate, Tensor offsets_gate, Tensor a_up, Tensor ranks_up,
                   Tensor offsets_up, int64_t rank) {
    check_tensor(x, "x", 2, x.scalar_type());
    check_tensor(row_to_slot, "row_to_slot", 1, ScalarType::Int);
    check_same_device(x, {&row_to_slot, &row_offsets, &a_gate, &ranks_gate, &offsets_gate, &a_up,
                          &ranks_up, &offsets_up});
    const OnDevice guard(x);
    const int64_t N = row_to_slot.size(0);
    Tensor z = empty(x, {N, 2 * rank}, x.scalar_type());
    if (N == 0) return z;
    const Shrink p{x.const_data_ptr(),
                   data<int32_t>(row_to_slot),
                   data<int32_t>(row_offsets),
                   factor(a_gate, ranks_gate, offsets_gate),
                   factor(a_up, ranks_up, offsets_up),
                   z.mutable_data_ptr(),
                   static_cast<int>(top_k),
                   static_cast<int>(row_offsets.size(0) - 1),
                   static_cast<int>(x.size(1))};
    by_type_and_rank(x, rank, [&]<class T, int Rank>(T, std::integral_constant<int, Rank>) {
        launch<T, Rank>(p, N, current_stream(x));
    });
    return z;
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("shrink_rows", TORCH_BOX(&flexmore::cuda::shrink_rows));
}
