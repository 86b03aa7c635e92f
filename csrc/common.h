// What all ops share: the stable tensor type, allocation, and checks of what Python hands over.
//
// Only headers of the LibTorch stable ABI are used (torch/csrc/stable, torch/headeronly), with
// TORCH_TARGET_VERSION at 2.11, so one binary serves torch 2.11 and later.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>

namespace flexmore {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline torch::headeronly::IntHeaderOnlyArrayRef shape(std::initializer_list<int64_t> sizes) {
    return {sizes.begin(), sizes.size()};
}

// What an allocation made, or an error in the words of torch's allocators, which callers that retry
// with less look for: across the stable ABI, the error itself says only where it was met.
template <class Allocate>
Tensor allocated(const Tensor& like, std::initializer_list<int64_t> sizes, const Allocate& make) {
    try {
        return make();
    } catch (const std::exception&) {
        std::ostringstream result;
        for (const int64_t size : sizes) result << (result.tellp() ? ", " : "") << size;
        const char* failed =
            like.is_cuda() ? "CUDA out of memory." : "DefaultCPUAllocator: can't allocate memory.";
        throw std::runtime_error(std::string(failed) + " Tried to allocate a result of shape (" +
                                 result.str() + ")");
    }
}

// Uninitialised and zeroed tensors on the device of `like`.
inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return allocated(like, sizes,
                     [&] { return torch::stable::new_empty(like, shape(sizes), dtype); });
}
inline Tensor zeros(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
    return allocated(like, sizes,
                     [&] { return torch::stable::new_zeros(like, shape(sizes), dtype); });
}

// The accumulator dtype: float64 for float64, float32 for every other.
inline ScalarType acc_dtype(ScalarType dtype) {
    return dtype == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The ops are internal: Python has checked what users give. These checks keep a wrong call from
// reading out of bounds.
inline void check_tensor(const Tensor& t, const char* name, int64_t dim, ScalarType dtype) {
    STD_TORCH_CHECK(t.dim() == dim, name, " must have ", dim, " dimensions, got ", t.dim());
    STD_TORCH_CHECK(t.scalar_type() == dtype, name, " has dtype ",
                    torch::headeronly::toString(t.scalar_type()), ", expected ",
                    torch::headeronly::toString(dtype));
    STD_TORCH_CHECK(t.is_contiguous(), name, " must be contiguous");
}
inline void check_size(const Tensor& t, const char* name, int64_t dim, int64_t size) {
    STD_TORCH_CHECK(t.size(dim) == size, name, " has size ", t.size(dim), " in dimension ", dim,
                    ", expected ", size);
}
inline void check_int32_range(int64_t value, const char* name) {
    STD_TORCH_CHECK(value >= 0 && value <= INT32_MAX, name, " must fit in 32 bits, got ", value);
}

// What a selected expert's weight is made of; the numbers are those of _native/routing.py.
enum class Scoring : int { softmax = 0, sigmoid = 1, unit = 2 };

inline Scoring scoring_of(int64_t code, Scoring last = Scoring::unit) {
    STD_TORCH_CHECK(code >= 0 && code <= int64_t(last), "scoring must be in [0, ", int64_t(last),
                    "], got ", code);
    return static_cast<Scoring>(code);
}

// Checks of the arguments that the CPU and CUDA forms of an op share; each returns nothing and
// throws std::runtime_error.
inline void check_topk_route(const Tensor& logits_TE, const OptionalTensor& bias,
                             const OptionalTensor& mask, int64_t top_k) {
    const int64_t T = logits_TE.size(0), E = logits_TE.size(1);
    check_tensor(logits_TE, "logits", 2, logits_TE.scalar_type());
    STD_TORCH_CHECK(top_k >= 1 && top_k <= E, "top_k must be in [1, ", E, "], got ", top_k);
    if (bias) {
        STD_TORCH_CHECK(bias->dim() == 1 && bias->is_contiguous(), "bias must be contiguous, 1-D");
        check_size(*bias, "bias", 0, E - 1);
    }
    if (mask) {
        STD_TORCH_CHECK(mask->dim() == 2 && mask->scalar_type() == ScalarType::Bool,
                        "mask must be a 2-D bool tensor");
        check_size(*mask, "mask", 0, T);
        check_size(*mask, "mask", 1, E);
    }
}
inline void check_topk_route_backward(const Tensor& dweights_TK, const Tensor& logits_TE,
                                      const OptionalTensor& bias, const OptionalTensor& mask,
                                      const Tensor& indices_TK) {
    check_tensor(dweights_TK, "dweights", 2, acc_dtype(logits_TE.scalar_type()));
    check_tensor(indices_TK, "indices", 2, ScalarType::Long);
    check_topk_route(logits_TE, bias, mask, indices_TK.size(1));
    for (const int64_t dim : {0, 1}) check_size(dweights_TK, "dweights", dim, indices_TK.size(dim));
    check_size(indices_TK, "indices", 0, logits_TE.size(0));
}
inline void check_make_plan(const Tensor& indices_TK, int64_t num_experts, bool by_set) {
    check_tensor(indices_TK, "indices", 2, ScalarType::Long);
    check_int32_range(indices_TK.numel(), "the number of slots");
    STD_TORCH_CHECK(indices_TK.size(1) >= 1, "indices must have at least one slot a token");
    STD_TORCH_CHECK(num_experts >= 1 && (!by_set || num_experts <= 8),
                    "num_experts must be positive, and at most 8 to sort by expert set; got ",
                    num_experts);
}
inline void check_permute(const Tensor& x_TD, const Tensor& row_to_slot_N,
                          const Tensor& slot_to_row_TK) {
    check_tensor(x_TD, "x", 2, x_TD.scalar_type());
    check_tensor(row_to_slot_N, "row_to_slot", 1, ScalarType::Int);
    check_tensor(slot_to_row_TK, "slot_to_row", 2, ScalarType::Int);
    STD_TORCH_CHECK(slot_to_row_TK.size(1) >= 1, "slot_to_row must have a slot a token");
    check_size(slot_to_row_TK, "slot_to_row", 0, x_TD.size(0));
    check_size(row_to_slot_N, "row_to_slot", 0, slot_to_row_TK.numel());
}
inline void check_unpermute(const Tensor& x_ND, const Tensor& slot_to_row_TK,
                            const OptionalTensor& weights_TK, const OptionalTensor& base_TD) {
    const ScalarType dtype = x_ND.scalar_type();
    const int64_t T = slot_to_row_TK.size(0), K = slot_to_row_TK.size(1);
    check_tensor(x_ND, "x", 2, dtype);
    check_tensor(slot_to_row_TK, "slot_to_row", 2, ScalarType::Int);
    if (weights_TK) {
        check_tensor(*weights_TK, "weights", 2, acc_dtype(dtype));
        check_size(*weights_TK, "weights", 0, T);
        check_size(*weights_TK, "weights", 1, K);
    }
    if (base_TD) {
        const bool is_acc = base_TD->scalar_type() == acc_dtype(dtype);
        check_tensor(*base_TD, "base", 2, is_acc ? acc_dtype(dtype) : dtype);
        check_size(*base_TD, "base", 0, T);
        check_size(*base_TD, "base", 1, x_ND.size(1));
    }
}
inline void check_unpermute_backward(const Tensor& dy_TD, const Tensor& x_ND,
                                     const Tensor& row_to_slot_N, const Tensor& weights_TK) {
    check_tensor(x_ND, "x", 2, x_ND.scalar_type());
    check_tensor(dy_TD, "dy", 2, x_ND.scalar_type());
    check_tensor(row_to_slot_N, "row_to_slot", 1, ScalarType::Int);
    check_tensor(weights_TK, "weights", 2, acc_dtype(x_ND.scalar_type()));
    check_size(dy_TD, "dy", 0, weights_TK.size(0));
    check_size(dy_TD, "dy", 1, x_ND.size(1));
    check_size(row_to_slot_N, "row_to_slot", 0, x_ND.size(0));
}

}  // namespace flexmore
