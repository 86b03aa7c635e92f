// Permutation on CUDA. Mathematics: reference/permutation.py.
//
// All three kernels move bytes; s is the element size, 8 bytes an accumulator in double else 4.
//   permute             reads T D s + 8 N, writes N D s
//   unpermute           reads N D s + 8 N (+ T D of the base), writes T D s;   2 N D flops
//   unpermute_backward  reads 2 N D s + 8 N (dy mostly from L2), writes N D s; 3 N D flops
// At D=4096, N=81920 (16384 tokens, 5 of 7 experts), bf16, 3.0 TB/s: 0.27, 0.27 and 0.49 ms (the
// last with dy from memory once: 0.49; N times: 0.67).
// Accesses are 16 bytes where pointers and the row length allow it, else one element. Indices are
// 64-bit. No atomics: each output is written by one thread, sums are in a fixed order.
#include <tuple>

#include "common.cuh"

namespace flexmore::cuda {
namespace {

// ---- permute: a copy, so elements are just words of 16, 8, 4 or 2 bytes.

constexpr int kWordsPerThread = 2;

// One block per token and per kWordsPerThread * blockDim.x words of it: reads them once, writes
// them to the rows of the token's slots. Row by row instead, a token comes back once for each of
// its experts, long after it left the L2 cache. The tail, as many rows as there are empty slots, is
// zeroed by the blocks whose slots have the tail's row numbers.
template <class Word>
__global__ void __launch_bounds__(kMaxThreads)
    permute_kernel(const Word* __restrict__ x, const int32_t* __restrict__ row_to_slot,
                   const int32_t* __restrict__ slot_to_row, int top_k, int64_t words,
                   Word* __restrict__ out) {
    const int64_t t = blockIdx.x;
    const int64_t first = int64_t(blockIdx.y) * kWordsPerThread * blockDim.x + threadIdx.x;
    Word word[kWordsPerThread];
#pragma unroll
    for (int j = 0; j < kWordsPerThread; ++j) {
        const int64_t i = first + int64_t(j) * blockDim.x;
        word[j] = i < words ? x[t * words + i] : Word{};
    }
    for (int64_t slot = t * top_k; slot < (t + 1) * top_k; ++slot) {
        const int32_t row = slot_to_row[slot];
        const bool in_tail = row_to_slot[slot] < 0;
#pragma unroll
        for (int j = 0; j < kWordsPerThread; ++j) {
            const int64_t i = first + int64_t(j) * blockDim.x;
            if (i < words && row >= 0) out[row * words + i] = word[j];
            if (i < words && in_tail) out[slot * words + i] = Word{};
        }
    }
}

template <class Word>
void launch_permute(const Tensor& x_TD, const Tensor& row_to_slot_N, const Tensor& slot_to_row_TK,
                    int64_t row_bytes, const Tensor& x_ND) {
    const int64_t words = row_bytes / int64_t(sizeof(Word));
    const auto [threads, columns] = row_launch(words, kWordsPerThread);
    STD_TORCH_CHECK(columns <= 65535, "rows of ", row_bytes, " bytes are too long");
    const dim3 grid(grid_size(x_TD.size(0)), static_cast<unsigned>(columns));
    permute_kernel<Word><<<grid, threads, 0, current_stream(x_TD)>>>(
        data<Word>(x_TD), data<int32_t>(row_to_slot_N), data<int32_t>(slot_to_row_TK),
        static_cast<int>(slot_to_row_TK.size(1)), words, mutable_data<Word>(x_ND));
    check_launch("permute");
}

Tensor permute(Tensor x_TD, Tensor row_to_slot_N, Tensor slot_to_row_TK) {
    check_permute(x_TD, row_to_slot_N, slot_to_row_TK);
    check_same_device(x_TD, {&row_to_slot_N, &slot_to_row_TK});
    const OnDevice guard(x_TD);
    const int64_t N = row_to_slot_N.size(0), D = x_TD.size(1);
    Tensor x_ND = empty(x_TD, {N, D}, x_TD.scalar_type());
    if (N == 0 || D == 0) return x_ND;
    dispatch(x_TD.scalar_type(), [&](auto tag) {
        const int64_t bytes = D * int64_t(sizeof(tag));
        const auto fits = [&](int64_t width) {
            return aligned(x_TD.const_data_ptr(), bytes, width) &&
                   aligned(x_ND.const_data_ptr(), bytes, width);
        };
        if (fits(16)) {
            launch_permute<uint4>(x_TD, row_to_slot_N, slot_to_row_TK, bytes, x_ND);
        } else if (fits(8)) {
            launch_permute<uint64_t>(x_TD, row_to_slot_N, slot_to_row_TK, bytes, x_ND);
        } else if (fits(4)) {
            launch_permute<uint32_t>(x_TD, row_to_slot_N, slot_to_row_TK, bytes, x_ND);
        } else {
            launch_permute<uint16_t>(x_TD, row_to_slot_N, slot_to_row_TK, bytes, x_ND);
        }
    });
    return x_ND;
}

// ---- unpermute

// Rows loaded before the first is used: that many independent 16-byte loads a thread in flight.
constexpr int kRowsInFlight = 4;

// One block per token and per blockDim.x * V columns of it. B: the base's element type.
template <class T, class B, int V>
__global__ void __launch_bounds__(kMaxThreads)
    unpermute_kernel(const T* __restrict__ x, const int32_t* __restrict__ slot_to_row,
                     const Acc<T>* __restrict__ weights, const B* __restrict__ base, int top_k,
                     int64_t width, T* __restrict__ y) {
    const int64_t t = blockIdx.x;
    const int64_t column = (int64_t(blockIdx.y) * blockDim.x + threadIdx.x) * V;
    if (column >= width) return;
    Acc<T> sum[V] = {};
    if (base) {
        const Pack<B, V> b = load_pack<V>(base + t * width + column);
#pragma unroll
        for (int i = 0; i < V; ++i) sum[i] = to_acc(b.v[i]);
    }
    for (int first = 0; first < top_k; first += kRowsInFlight) {
        Pack<T, V> pack[kRowsInFlight];
        Acc<T> w[kRowsInFlight];
#pragma unroll
        for (int j = 0; j < kRowsInFlight; ++j) {
            const int64_t slot = t * top_k + first + j;
            const int64_t row = first + j < top_k ? slot_to_row[slot] : -1;
            pack[j] = Pack<T, V>{};
            w[j] = 0;
            if (row >= 0) {
                pack[j] = load_pack<V>(x + row * width + column);
                w[j] = weights ? weights[slot] : Acc<T>(1);
            }
        }
#pragma unroll
        for (int j = 0; j < kRowsInFlight; ++j) {
#pragma unroll
            for (int i = 0; i < V; ++i) sum[i] += w[j] * to_acc(pack[j].v[i]);
        }
    }
    Pack<T, V> out;
#pragma unroll
    for (int i = 0; i < V; ++i) out.v[i] = from_acc<T>(sum[i]);
    store_pack<V>(y + t * width + column, out);
}

template <class T, class B, int V>
void launch_unpermute(const Tensor& x_ND, const Tensor& slot_to_row_TK,
                      const OptionalTensor& weights_TK, const OptionalTensor& base_TD,
                      const Tensor& y_TD) {
    const int64_t T_ = y_TD.size(0), width = y_TD.size(1);
    const auto [threads, columns] = row_launch(width / V, 1);
    STD_TORCH_CHECK(columns <= 65535, "rows of ", width, " elements are too long");
    const dim3 grid(grid_size(T_), static_cast<unsigned>(columns));
    unpermute_kernel<T, B, V><<<grid, threads, 0, current_stream(x_ND)>>>(
        data<T>(x_ND), data<int32_t>(slot_to_row_TK), data<Acc<T>>(weights_TK), data<B>(base_TD),
        static_cast<int>(slot_to_row_TK.size(1)), width, mutable_data<T>(y_TD));
    check_launch("unpermute");
}

Tensor unpermute(Tensor x_ND, Tensor slot_to_row_TK, OptionalTensor weights_TK,
                 OptionalTensor base_TD) {
    check_unpermute(x_ND, slot_to_row_TK, weights_TK, base_TD);
    check_same_device(x_ND, {&slot_to_row_TK, pointer(weights_TK), pointer(base_TD)});
    const OnDevice guard(x_ND);
    const int64_t T = slot_to_row_TK.size(0), D = x_ND.size(1);
    const ScalarType dtype = x_ND.scalar_type();
    Tensor y_TD = empty(x_ND, {T, D}, dtype);
    if (T == 0 || D == 0) return y_TD;
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        constexpr int V = 16 / sizeof(Elem);
        const int64_t bytes = D * int64_t(sizeof(Elem));
        const bool wide = aligned(x_ND.const_data_ptr(), bytes, 16) &&
                          aligned(y_TD.const_data_ptr(), bytes, 16) &&
                          (!base_TD || aligned(base_TD->const_data_ptr(), bytes, 16));
        const bool base_is_acc = base_TD && base_TD->scalar_type() == acc_dtype(dtype);
        const auto launch = [&](auto base_tag) {
            using Base = decltype(base_tag);
            if (wide) {
                launch_unpermute<Elem, Base, V>(x_ND, slot_to_row_TK, weights_TK, base_TD, y_TD);
            } else {
                launch_unpermute<Elem, Base, 1>(x_ND, slot_to_row_TK, weights_TK, base_TD, y_TD);
            }
        };
        if (base_is_acc) {
            launch(Acc<Elem>{});
        } else {
            launch(Elem{});
        }
    });
    return y_TD;
}

// ---- unpermute_backward

constexpr int kRowsPerBlock = 8;  // one warp each

template <class T, int V>
__global__ void __launch_bounds__(32 * kRowsPerBlock)
    unpermute_backward_kernel(const T* __restrict__ dy, const T* __restrict__ x,
                              const int32_t* __restrict__ row_to_slot,
                              const Acc<T>* __restrict__ weights, int top_k, int64_t num_rows,
                              int64_t width, T* __restrict__ dx, Acc<T>* __restrict__ dweights) {
    const int64_t n = int64_t(blockIdx.x) * kRowsPerBlock + threadIdx.x / 32;
    const int lane = threadIdx.x % 32;
    if (n >= num_rows) return;  // the whole warp
    const int32_t slot = row_to_slot[n];
    dx += n * width;
    if (slot < 0) {
        for (int64_t i = lane * V; i < width; i += 32 * V) store_pack<V>(dx + i, Pack<T, V>{});
        return;
    }
    x += n * width;
    dy += int64_t(slot / top_k) * width;
    const Acc<T> w = weights[slot];
    Acc<T> dot = 0;
#pragma unroll 4
    for (int64_t i = lane * V; i < width; i += 32 * V) {
        const Pack<T, V> g = load_pack<V>(dy + i), h = load_pack<V>(x + i);
        Pack<T, V> out;
#pragma unroll
        for (int j = 0; j < V; ++j) {
            dot += to_acc(g.v[j]) * to_acc(h.v[j]);
            out.v[j] = from_acc<T>(w * to_acc(g.v[j]));
        }
        store_pack<V>(dx + i, out);
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) {
        dot += __shfl_xor_sync(kFullWarp, dot, offset);
    }
    if (lane == 0) dweights[slot] = dot;
}

std::tuple<Tensor, Tensor> unpermute_backward(Tensor dy_TD, Tensor x_ND, Tensor row_to_slot_N,
                                              Tensor weights_TK) {
    check_unpermute_backward(dy_TD, x_ND, row_to_slot_N, weights_TK);
    check_same_device(x_ND, {&dy_TD, &row_to_slot_N, &weights_TK});
    const OnDevice guard(x_ND);
    const int64_t N = x_ND.size(0), D = x_ND.size(1), T = weights_TK.size(0);
    const int64_t K = weights_TK.size(1);
    const ScalarType dtype = x_ND.scalar_type();
    Tensor dx_ND = empty(x_ND, {N, D}, dtype);
    Tensor dweights_TK = zeros(weights_TK, {T, K}, acc_dtype(dtype));
    if (N == 0) return {dx_ND, dweights_TK};
    dispatch(dtype, [&](auto tag) {
        using Elem = decltype(tag);
        constexpr int V = 16 / sizeof(Elem);
        const int64_t bytes = D * int64_t(sizeof(Elem));
        const bool wide = aligned(x_ND.const_data_ptr(), bytes, 16) &&
                          aligned(dy_TD.const_data_ptr(), bytes, 16) &&
                          aligned(dx_ND.const_data_ptr(), bytes, 16);
        const auto kernel =
            wide ? unpermute_backward_kernel<Elem, V> : unpermute_backward_kernel<Elem, 1>;
        const unsigned grid = grid_size(ceil_div(N, kRowsPerBlock));
        kernel<<<grid, 32 * kRowsPerBlock, 0, current_stream(x_ND)>>>(
            data<Elem>(dy_TD), data<Elem>(x_ND), data<int32_t>(row_to_slot_N),
            data<Acc<Elem>>(weights_TK), static_cast<int>(K), N, D, mutable_data<Elem>(dx_ND),
            mutable_data<Acc<Elem>>(dweights_TK));
        check_launch("unpermute_backward");
    });
    return {dx_ND, dweights_TK};
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("permute", TORCH_BOX(&flexmore::cuda::permute));
    m.impl("unpermute", TORCH_BOX(&flexmore::cuda::unpermute));
    m.impl("unpermute_backward", TORCH_BOX(&flexmore::cuda::unpermute_backward));
}
