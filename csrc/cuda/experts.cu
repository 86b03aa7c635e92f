// The layer's forward for a few tokens (at most 64), in four launches.
//
//   shrink    s = A_gate x, A_up x
//   hidden    h_e = SwiGLU(W_gate x + B_gate s, W_up x + B_up s);  mixed = sum p_e h_e;  p_e h_e
//   product   parts of W_down mixed;  s_down = A_down p_e h_e
//   expand    y = W_down mixed + B_down s_down
#include <mutex>
#include <vector>

#include "decode_expand.cuh"
#include "decode_hidden.cuh"
#include "decode_product.cuh"
#include "decode_shrink.cuh"

namespace flexmore::cuda {
namespace {

using namespace decode;

struct Device {
    int processors = 0, shared = 0;
};
const Device& device_of(int index) {
    static Device devices[64];
    static std::once_flag known[64];
    STD_TORCH_CHECK(index >= 0 && index < 64, "no such device: ", index);
    std::call_once(known[index], [&] {
        devices[index] = {std::min(multiprocessors(index), kMaxBlocks),
                          attribute(index, cudaDevAttrMaxSharedMemoryPerMultiprocessor)};
    });
    return devices[index];
}

template <class T, int TP>
void run(Problem& p, const Tensor& x, Tensor& y) {
    using In = Hidden<T, TP>;
    using Down = Expand<T, TP, true>;
    const auto [processors, shared] = device_of(x.get_device_index());
    const int ring = product_bytes(shared);
    int ranks_down[kMaxExperts];
    for (int e = 0; e < p.E; ++e) ranks_down[e] = p.pairs[2][e].rank;
    Work work{};
    plan_product(work, p.D, p.F, ranks_down, p.E, processors, ring);
    plan_cut(p.cut_in, false, p.F, processors, shared, TP);
    plan_cut(p.cut_down, true, p.D, processors, shared, TP);
    p.num_counters = work.low_blocks;
    const ScalarType dtype = x.scalar_type();
    Tensor s_in = empty(x, {p.ranks_in, TP}, dtype);
    Tensor mixed = empty(x, {p.F, TP}, dtype);
    Tensor hidden = empty(x, {p.E, p.F, TP}, dtype);
    Tensor planes = empty(x, {work.parts, work.total_rows, TP}, ScalarType::Float);
    Tensor s_down = empty(x, {work.total_rows - p.D, TP}, dtype);
    Tensor counters = empty(x, {p.num_counters}, ScalarType::Int);
    p.s_in = mutable_data<char>(s_in);
    p.mixed = mutable_data<char>(mixed);
    p.hidden = mutable_data<char>(hidden);
    p.planes = mutable_data<float>(planes);
    p.s_down = mutable_data<char>(s_down);
    p.counters = mutable_data<int>(counters);
    p.y = mutable_data<char>(y);
    const int64_t tiles = ceil_div(p.ranks_in, Shrink<TP>::kRows);
    launch_after(decode_shrink_kernel<T, TP>,
                 unsigned(std::max<int64_t>(1, tiles * Shrink<TP>::kAcross)),
                 Shrink<TP>::kBlockThreads, 0, x, "decode_shrink", p);
    launch_after(decode_hidden_kernel<T, TP>, p.cut_in.grid(), In::kBlockThreads,
                 p.cut_in.bytes(false, TP), x, "decode_hidden", p);
    // Where its blocks find no place beside those of the kernel before, they must not come in twos.
    const int stages = kStages * (work.tile_rows + TP) * 128;
    const bool beside = TP < 64 && p.cut_in.bytes(false, TP) + stages + 7168 + 2048 <= shared;
    launch_after(decode_product_kernel<T, TP>, work.grid, Product<T, TP>::kBlockThreads,
                 beside ? stages : std::max(stages, ring), x, "decode_product", p, work);
    launch_after(decode_expand_kernel<T, TP>, p.cut_down.grid(), Down::kBlockThreads,
                 p.cut_down.bytes(true, TP), x, "decode_expand", p, work);
}

// layout: for gate, up and down E entries each, -1 full-size (expert 0 alone), 0 no delta, or the
// rank; tensors: for each projection the full-size matrix, then a and b of each low-rank expert.
Tensor experts_decode(Tensor x, Tensor indices, Tensor weights, std::vector<Tensor> tensors,
                      std::vector<int64_t> layout) {
    const ScalarType dtype = x.scalar_type();
    check_tensor(x, "x", 2, dtype);
    check_tensor(indices, "indices", 2, ScalarType::Long);
    check_tensor(weights, "weights", 2, ScalarType::Float);
    check_same_device(x, {&indices, &weights});
    Problem p{};
    p.T = int(x.size(0));
    p.D = int(x.size(1));
    p.K = int(indices.size(1));
    p.E = int(layout.size() / 3);
    STD_TORCH_CHECK(p.T >= 1 && p.T <= 64, "1 to 64 tokens, got ", p.T);
    STD_TORCH_CHECK(p.E >= 1 && p.E <= kMaxExperts, "1 to ", kMaxExperts, " experts, got ", p.E);
    check_size(indices, "indices", 0, p.T);
    check_size(weights, "weights", 0, p.T);
    check_size(weights, "weights", 1, p.K);
    const OnDevice guard(x);
    size_t next = 0;
    const auto take = [&](int64_t rows, int64_t columns) -> const Tensor& {
        STD_TORCH_CHECK(next < tensors.size(), "too few tensors");
        const Tensor& t = tensors[next++];
        STD_TORCH_CHECK(t.scalar_type() == dtype && t.dim() == 2 && t.is_cuda() &&
                            t.get_device_index() == x.get_device_index(),
                        "a weight's dtype, dimension or device is wrong");
        STD_TORCH_CHECK(t.stride(1) == 1 && t.size(0) == rows && (!columns || t.size(1) == columns),
                        "a weight's shape is wrong");
        return t;
    };
    const auto check16 = [&](const Tensor& t) {
        STD_TORCH_CHECK(
            aligned(t.const_data_ptr(), t.stride(0) * 2, 16) && t.stride(0) == t.size(1),
            "a weight's rows are not 16-byte aligned, end to end");
    };
    for (int side = 0; side < 3; ++side) {
        STD_TORCH_CHECK(layout[size_t(side) * p.E] == -1, "expert 0 must be full-size");
        if (side == 0) {
            STD_TORCH_CHECK(!tensors.empty(), "too few tensors");
            p.F = int(tensors[0].size(0));
        }
        const int64_t outer = side == 2 ? p.D : p.F, inner = side == 2 ? p.F : p.D;
        const Tensor& base = take(outer, inner);
        check16(base);
        p.base[side] = data<char>(base);
        int first = side == 1 ? p.ranks_in : 0;
        for (int e = 1; e < p.E; ++e) {
            const int64_t rank = layout[size_t(side) * p.E + e];
            STD_TORCH_CHECK(rank >= 0, "only expert 0 may be full-size");
            if (!rank) continue;
            const Tensor& a = take(rank, inner);
            const Tensor& b = take(outer, rank);
            check16(a);
            Pair& pair = p.pairs[side][e];
            pair = {data<char>(a), data<char>(b), int(rank), int(b.stride(0)), 16, first};
            while (pair.width > 2 &&
                   (!aligned(pair.b, b.stride(0) * 2, pair.width) || rank * 2 % pair.width))
                pair.width /= 2;
            first += int(rank);
        }
        if (side < 2) p.ranks_in = first;
    }
    STD_TORCH_CHECK(aligned(x.const_data_ptr(), 2 * p.D, 16) && p.F % 8 == 0,
                    "hidden and intermediate size must be multiples of 8");
    p.x = data<char>(x);
    p.indices = data<int64_t>(indices);
    p.weights = data<float>(weights);
    Tensor y = empty(x, {p.T, p.D}, dtype);
    const auto sized = [&]<class T>(T) {
        if (p.T <= 8) return run<T, 8>(p, x, y);
        if (p.T <= 16) return run<T, 16>(p, x, y);
        if (p.T <= 32) return run<T, 32>(p, x, y);
        return run<T, 64>(p, x, y);
    };
    if (dtype == ScalarType::BFloat16) {
        sized(__nv_bfloat16{});
    } else {
        STD_TORCH_CHECK(dtype == ScalarType::Half, "x must be bfloat16 or float16");
        sized(__half{});
    }
    return y;
}

}  // namespace
}  // namespace flexmore::cuda

STABLE_TORCH_LIBRARY_IMPL(flexmore_native, CUDA, m) {
    m.impl("experts_decode", TORCH_BOX(&flexmore::cuda::experts_decode));
}
