"""Grouped GEMM: rows sorted by expert times their expert's full-size weight.

Kernels: Triton on a GPU (one launch for weights at equal distances in one storage, such as a
stacked one, else one a weight), one aten product an expert on a CPU. Cost: 2*N*O*I operations;
each weight read once a tile of rows.
Maths: reference/grouped_gemm.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..checks import FLOATS, check_tensor
from ..library import define
from ..ragged import RoutingPlan
from ..slow_paths import contiguous

_kernels = "grouped_gemm"


def grouped_gemm(x: Tensor, weight: Tensor | Sequence[Tensor], plan: RoutingPlan) -> Tensor:
    """Multiply each row by its expert's weight: out[n] = W_e x[n] for the rows n of expert e.

    Args:
        x: (N, I) rows sorted by expert, any float dtype.
        weight: (E, O, I), or E tensors of (O, I); x's dtype. Contiguous ones are read in place.
        plan: from `make_plan`.

    Returns: (N, O) in x's dtype, accumulated in float32 (float64 for float64); the tail of empty
    slots is zero. Raises ValueError or TypeError naming the argument.
    Deterministic. No host sync on CUDA. Differentiable in x and weight; an expert without rows gets
    a zero gradient. Source: MegaBlocks (arXiv 2211.15841), without its padding.
    """
    device = plan.row_to_slot.device
    check_tensor("x", x, (plan.num_rows, "I"), FLOATS, device)
    inner = x.shape[1]
    if isinstance(weight, Tensor):
        check_tensor("weight", weight, (plan.num_experts, "O", inner), (x.dtype,), device)
        weights = list(weight.unbind(0))
    else:
        weights = list(weight)
        if len(weights) != plan.num_experts:
            raise ValueError(
                f"weight: got {len(weights)} tensors; accepted: {plan.num_experts}, one an expert"
            )
        for e, matrix in enumerate(weights):
            outer = "O" if e == 0 else weights[0].shape[0]
            check_tensor(f"weight[{e}]", matrix, (outer, inner), (x.dtype,), device)
    return torch.ops.flexmore.grouped_gemm(x, weights, plan.row_offsets)


def _grouped_gemm(x, weights, row_offsets):
    out = x.new_zeros((x.shape[0], weights[0].shape[0]))
    kernels = backend.kernels(_kernels, x)
    kernels.grouped_gemm(contiguous("x", x), _contiguous(weights), row_offsets, False, out)
    return out


def _grouped_gemm_fake(x, weights, row_offsets):
    return x.new_empty((x.shape[0], weights[0].shape[0]))


def _grouped_gemm_backward(dy, x, weights, row_offsets, needs):
    kernels = backend.kernels(_kernels, x)
    dy = dy.contiguous()
    dx = x.new_empty(0)
    if needs[0]:
        dx = x.new_zeros(x.shape)
        kernels.grouped_gemm(dy, _contiguous(weights), row_offsets, True, dx)
    wanted = [e for e, need in enumerate(needs[1:]) if need]
    dweights = [x.new_empty(0) for _ in weights]
    grads = kernels.grouped_gemm_dweight(dy, x.contiguous(), row_offsets, wanted)
    for e, grad in zip(wanted, grads, strict=True):
        dweights[e] = grad
    return [dx, *dweights]


def _grouped_gemm_backward_fake(dy, x, weights, row_offsets, needs):
    like = [x, *weights]
    return [t.new_empty(t.shape if need else (0,)) for t, need in zip(like, needs, strict=True)]


def _contiguous(weights: Sequence[Tensor]) -> list[Tensor]:
    return [contiguous("weight", weight) for weight in weights]


def _setup_grouped_gemm(ctx, inputs, output):
    x, weights, row_offsets = inputs
    ctx.save_for_backward(x, row_offsets, *weights)


def _backward_grouped_gemm(ctx, dy):
    x, row_offsets, *weights = ctx.saved_tensors
    needs = [ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    grads = torch.ops.flexmore.grouped_gemm_backward(dy, x, weights, row_offsets, needs)
    dx, *dweights = (grad if need else None for grad, need in zip(grads, needs, strict=True))
    return dx, dweights, None


define(
    "grouped_gemm(Tensor x, Tensor[] weights, Tensor row_offsets) -> Tensor",
    _grouped_gemm,
    _grouped_gemm_fake,
    backward=_backward_grouped_gemm,
    setup_context=_setup_grouped_gemm,
)
define(
    "grouped_gemm_backward(Tensor dy, Tensor x, Tensor[] weights, Tensor row_offsets, bool[] needs)"
    " -> Tensor[]",
    _grouped_gemm_backward,
    _grouped_gemm_backward_fake,
)
