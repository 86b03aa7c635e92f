"""Low-rank products, ragged in rows and in ranks: shrink to an expert's rank, expand from it.

Kernels: Triton on a GPU, one aten product an expert on a CPU. Ranks are never padded to the
largest. Cost: 2*P*I operations (expand: 2*P*O), P = sum over routed rows of their expert's rank;
x (or the output) moves once. Maths: reference/lowrank.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend
from ..checks import FLOATS, check_ranks, check_tensor
from ..library import define
from ..ragged import Ragged, RoutingPlan, packed_size
from ..slow_paths import contiguous

_kernels = "lowrank"


def shrink(x: Tensor, a: Tensor, plan: RoutingPlan, ranks: Ragged | Sequence[int]) -> Tensor:
    """Project each row to its expert's rank: z_n = A_e x_n for the rows n of expert e.

    Args:
        x: (N, I) rows sorted by expert, any float dtype.
        a: (R, I), the experts' A end to end, R = sum of ranks; x's dtype.
        plan: from `make_plan`.
        ranks: E ranks >= 0.

    Returns: z, flat, of `packed_size(ranks, T, K)` numbers in x's dtype: expert e's block of
    (row count, rank) row-major after those of the experts before it, then zeros (example in
    `flexmore_kernels.ragged`). Accumulated in float32 (float64).
    Raises ValueError or TypeError naming the argument.
    Deterministic. No host sync on CUDA. Differentiable in x and a.
    Source: the A half of LoRA (arXiv 2106.09685), as Punica's SGMV (2310.18547) batches it.
    """
    device = plan.row_to_slot.device
    ranks = check_ranks("ranks", ranks, plan.num_experts)
    check_tensor("x", x, (plan.num_rows, "I"), FLOATS, device)
    check_tensor("a", a, (sum(ranks), x.shape[1]), (x.dtype,), device)
    size = packed_size(ranks, plan.num_tokens, plan.top_k)
    return torch.ops.flexmore.shrink(x, a, plan.row_offsets, plan.row_to_slot, ranks, size)


def expand(z: Tensor, b: Tensor, plan: RoutingPlan, ranks: Ragged | Sequence[int]) -> Tensor:
    """Bring each row back from its expert's rank: out_n = B_e z_n for the rows n of expert e.

    Args:
        z: flat, of `packed_size(ranks, T, K)` numbers, laid out as `shrink` returns it.
        b: (O, R), the experts' B side by side; z's dtype.
        plan: from `make_plan`.
        ranks: E ranks >= 0.

    Returns: (N, O) in z's dtype; zero for experts of rank 0 and for the tail of empty slots.
    Accumulated in float32 (float64). Raises ValueError or TypeError naming the argument.
    Deterministic. No host sync on CUDA. Differentiable in z and b.
    Source: the B half of LoRA (arXiv 2106.09685), as Punica's SGMV (2310.18547) batches it.
    """
    device = plan.row_to_slot.device
    ranks = check_ranks("ranks", ranks, plan.num_experts)
    check_tensor("z", z, (packed_size(ranks, plan.num_tokens, plan.top_k),), FLOATS, device)
    check_tensor("b", b, ("O", sum(ranks)), (z.dtype,), device)
    return torch.ops.flexmore.expand(z, b, plan.row_offsets, plan.row_to_slot, ranks)


def _shrink(x, a, row_offsets, row_to_slot, ranks, size):
    kernels = backend.kernels(_kernels, x)
    return kernels.shrink(contiguous("x", x), a, row_offsets, tuple(ranks), row_to_slot, 1, size)


def _shrink_fake(x, a, row_offsets, row_to_slot, ranks, size):
    return x.new_empty((size,))


def _expand(z, b, row_offsets, row_to_slot, ranks):
    kernels = backend.kernels(_kernels, z)
    return kernels.expand(contiguous("z", z), b, row_offsets, tuple(ranks), row_to_slot.shape[0])


def _expand_fake(z, b, row_offsets, row_to_slot, ranks):
    return z.new_empty((row_to_slot.shape[0], b.shape[0]))


def _factor_grad(z, x, row_offsets, row_to_slot, ranks):
    kernels = backend.kernels(_kernels, x)
    return kernels.factor_grad(
        z.contiguous(), x.contiguous(), row_offsets, tuple(ranks), row_to_slot, 1
    )


def _factor_grad_fake(z, x, row_offsets, row_to_slot, ranks):
    return x.new_empty((sum(ranks), x.shape[1]))


def _setup_shrink(ctx, inputs, output):
    x, a, row_offsets, row_to_slot, ctx.ranks, _ = inputs
    ctx.save_for_backward(x, a, row_offsets, row_to_slot)


def _backward_shrink(ctx, dz):
    x, a, row_offsets, row_to_slot = ctx.saved_tensors
    maps = (row_offsets, row_to_slot, ctx.ranks)
    dz = dz.contiguous()
    dx = torch.ops.flexmore.expand(dz, a.T, *maps) if ctx.needs_input_grad[0] else None
    da = torch.ops.flexmore.factor_grad(dz, x, *maps) if ctx.needs_input_grad[1] else None
    return dx, da, None, None, None, None


def _setup_expand(ctx, inputs, output):
    z, b, row_offsets, row_to_slot, ctx.ranks = inputs
    ctx.save_for_backward(z, b, row_offsets, row_to_slot)


def _backward_expand(ctx, dy):
    z, b, row_offsets, row_to_slot = ctx.saved_tensors
    maps = (row_offsets, row_to_slot, ctx.ranks)
    dz, dy = None, dy.contiguous()
    if ctx.needs_input_grad[0]:
        dz = torch.ops.flexmore.shrink(dy, b.T, *maps, z.shape[0])
    db = torch.ops.flexmore.factor_grad(z, dy, *maps).T if ctx.needs_input_grad[1] else None
    return dz, db, None, None, None


define(
    "shrink(Tensor x, Tensor a, Tensor row_offsets, Tensor row_to_slot, int[] ranks, SymInt size)"
    " -> Tensor",
    _shrink,
    _shrink_fake,
    backward=_backward_shrink,
    setup_context=_setup_shrink,
)
define(
    "expand(Tensor z, Tensor b, Tensor row_offsets, Tensor row_to_slot, int[] ranks) -> Tensor",
    _expand,
    _expand_fake,
    backward=_backward_expand,
    setup_context=_setup_expand,
)
define(
    "factor_grad(Tensor z, Tensor x, Tensor row_offsets, Tensor row_to_slot, int[] ranks)"
    " -> Tensor",
    _factor_grad,
    _factor_grad_fake,
)
