"""Permutation: tokens to rows sorted by expert, and rows back to tokens. The two are adjoint.

Kernels: the compiled library where it is there, else Triton on a GPU and aten on a CPU.
Cost: permute reads T*D and writes N*D numbers; unpermute reads N*D and writes T*D; the weighted
unpermute's gradient reads both and writes N*D. Maths: reference/permutation.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from ..checks import FLOATS, check_tensor, check_weights
from ..library import define
from ..ragged import RoutingPlan
from ..slow_paths import contiguous

_kernels = "permutation"


def permute(x: Tensor, plan: RoutingPlan) -> Tensor:
    """Copy each token's row to the rows of its experts: out[n] = x[row_to_slot[n] // K].

    Args:
        x: (T, D), any float dtype.
        plan: from `make_plan` of T tokens.

    Returns: (N, D) in x's dtype, rows sorted by expert; the tail of empty slots is zero.
    Raises ValueError or TypeError naming the argument.
    Deterministic. No host sync. Differentiable in x; the gradient is `unpermute` without weights.
    """
    check_tensor("x", x, (plan.num_tokens, "D"), FLOATS, plan.row_to_slot.device)
    return torch.ops.flexmore.permute(x, plan.row_to_slot, plan.slot_to_row)


def unpermute(x: Tensor, plan: RoutingPlan, weights: Tensor | None = None) -> Tensor:
    """Sum each token's rows: out[t] = sum_k weights[t, k] x[slot_to_row[t, k]].

    Args:
        x: (N, D) rows sorted by expert, any float dtype.
        plan: from `make_plan`.
        weights: (T, K) float32 (float64 for float64 x); None means 1.

    Returns: (T, D) in x's dtype, accumulated in float32 (float64) in the order of slots; empty
    slots add nothing. Raises ValueError or TypeError naming the argument.
    Deterministic. No host sync. Differentiable in x and weights.
    """
    device = plan.row_to_slot.device
    check_tensor("x", x, (plan.num_rows, "D"), FLOATS, device)
    if weights is not None:
        check_weights("weights", weights, (plan.num_tokens, plan.top_k), x)
    return torch.ops.flexmore.unpermute(x, plan.row_to_slot, plan.slot_to_row, weights)


def _permute(x, row_to_slot, slot_to_row):
    return backend.kernels(_kernels, x).permute(contiguous("x", x), row_to_slot, slot_to_row)


def _permute_fake(x, row_to_slot, slot_to_row):
    return x.new_empty((row_to_slot.shape[0], x.shape[1]))


def _unpermute(x, row_to_slot, slot_to_row, weights):
    kernels = backend.kernels(_kernels, x)
    weights = None if weights is None else weights.contiguous()
    return kernels.unpermute(contiguous("x", x), slot_to_row, weights, None)


def _unpermute_fake(x, row_to_slot, slot_to_row, weights):
    return x.new_empty((slot_to_row.shape[0], x.shape[1]))


def _unpermute_backward(dy, x, row_to_slot, weights):
    kernels = backend.kernels(_kernels, x)
    return kernels.unpermute_backward(
        dy.contiguous(), x.contiguous(), row_to_slot, weights.contiguous()
    )


def _unpermute_backward_fake(dy, x, row_to_slot, weights):
    return x.new_empty(x.shape), weights.new_empty(weights.shape)


def _setup_permute(ctx, inputs, output):
    ctx.save_for_backward(*inputs[1:])


def _backward_permute(ctx, dy):
    return torch.ops.flexmore.unpermute(dy.contiguous(), *ctx.saved_tensors, None), None, None


def _setup_unpermute(ctx, inputs, output):
    x, row_to_slot, slot_to_row, weights = inputs
    ctx.save_for_backward(None if weights is None else x, row_to_slot, slot_to_row, weights)


def _backward_unpermute(ctx, dy):
    x, row_to_slot, slot_to_row, weights = ctx.saved_tensors
    if weights is None:
        dx = torch.ops.flexmore.permute(dy.contiguous(), row_to_slot, slot_to_row)
        return dx, None, None, None
    dx, dweights = torch.ops.flexmore.unpermute_backward(dy, x, row_to_slot, weights)
    return dx, None, None, dweights


define(
    "permute(Tensor x, Tensor row_to_slot, Tensor slot_to_row) -> Tensor",
    _permute,
    _permute_fake,
    backward=_backward_permute,
    setup_context=_setup_permute,
)
define(
    "unpermute(Tensor x, Tensor row_to_slot, Tensor slot_to_row, Tensor? weights) -> Tensor",
    _unpermute,
    _unpermute_fake,
    backward=_backward_unpermute,
    setup_context=_setup_unpermute,
)
define(
    "unpermute_backward(Tensor dy, Tensor x, Tensor row_to_slot, Tensor weights)"
    " -> (Tensor, Tensor)",
    _unpermute_backward,
    _unpermute_backward_fake,
)
