"""Experts: the whole mixture of a FlexMoRE layer as one op with one backward.

Kernels: csrc/cuda/experts.cu for up to 64 tokens without a gradient; else _triton/experts.py, which
composes ragged kernels and those of the compiled library without a host sync (GPU), and
_aten/experts.py, which loops over the experts (CPU). In all, the base is computed once per token,
forward and backward, whatever the number of selected experts, and nothing is computed for tensors
that need no gradient.
Cost: 6*T*D*F for the base and 2*(D + F) operations for each unit of rank of each routed row.
Maths: reference/experts.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .. import backend, schedule
from ..checks import (
    FLOATS,
    check_ids,
    check_one_of,
    check_ranks,
    check_tensor,
    check_weights,
    checks_values,
)
from ..kept import Kept, given, keeps, possible, shapes
from ..library import define
from ..projection import FULL, Projection, flatten, unflatten
from ..ragged import StackedFactors
from ..slow_paths import contiguous

_kernels = "experts"

Weights = Sequence[Tensor | tuple[Tensor, Tensor] | None] | StackedFactors


def experts(
    x: Tensor,
    indices: Tensor | None,
    weights: Tensor | None,
    gate: Weights,
    up: Weights,
    down: Weights,
    *,
    counts: Tensor | None = None,
    recompute: bool = False,
) -> Tensor:
    """Apply each token's experts and sum them: y_t = sum_k weights[t, k] E_{indices[t, k]}(x_t).

    E_e(x) = Wd_e (silu(Wg_e x) * (Wu_e x)), where each of expert e's three weights is full-size,
    or the base's (expert 0's) plus b_e a_e, or just the base's. All experts that share the base pay
    for it once: y = W_d (sum_e p_e h_e) + sum_e B_d (p_e A_d h_e).

    Args:
        x: (T, D), any float dtype.
        indices: (T, K) int64 or int32, distinct ids within a token; an id outside [0, E) is an
            empty slot. None when `counts` is given.
        weights: (T, K) float32 (float64 for float64 x).
        gate, up, down: a sequence of E entries, each a full-size weight (F, D), for down (D, F);
            a pair of factors (a (r, in), b (out, r)); or None for no delta. Entry 0, the base, is
            full-size. Or `StackedFactors`, for many experts. All in x's dtype. Full-size weights
            are read where they lie; factors may be copied side by side at each call.
        counts: (E,) int, the form for callers that dispatch themselves: x is (N, D), rows sorted by
            expert, `counts` rows each; rows past their sum get zeros. `weights` is (N,) or None for
            1. Each row is an output: y_n = weights[n] E_e(x_n).
        recompute: keep for the backward only x, the routing and, where a factor B of down is
            trained, a number a token and unit of rank, not G = x W_g^T and U = x W_u^T, (T, F)
            each, nor what else kept.py lists; it computes them again, 4 T D F operations, to the
            same bits.

    Returns: (T, D) in x's dtype. Base and delta are added before rounding, in float32 (float64).
    Raises ValueError or TypeError naming the argument; ids out of range or repeated within a token
    raise on the CPU and inside `validation()`, elsewhere ids out of range are skipped.
    Deterministic. No host sync on CUDA. Differentiable in x, weights and every weight tensor.
    Source: FlexMoRE (arXiv 2602.08818); that its base can be shared follows from linearity.
    """
    check_tensor("x", x, ("N" if counts is not None else "T", "D"), FLOATS)
    check_one_of("recompute", recompute, (False, True))
    sides = [
        _projection(name, given) for name, given in (("gate", gate), ("up", up), ("down", down))
    ]
    num_experts = len(sides[0].full)
    for name, side in zip(("gate", "up", "down"), sides, strict=True):
        if side.full[0] is None:
            raise ValueError(f"{name}[0]: got no full-size weight; accepted: the base's weight")
    width = sides[0].full[0].shape[0]
    for name, side in zip(("gate", "up", "down"), sides, strict=True):
        _check_projection(name, side, num_experts, width, x)
    if counts is not None:
        indices, weights = _sorted_rows(x, indices, weights, counts, num_experts)
    else:
        check_tensor("indices", indices, (x.shape[0], "K"), (torch.int64, torch.int32), x.device)
        check_weights("weights", weights, indices.shape, x)
    tensors, layout = flatten(sides)
    saves = torch.is_grad_enabled() and any(
        tensor.requires_grad for tensor in (x, weights, *tensors)
    )
    flags = [False] * len(Kept._fields)
    if saves:
        flags = list(keeps(sides, recompute))
    return torch.ops.flexmore.experts(
        *(x, indices.to(torch.int64), weights),
        *(tensors, layout, [s.stacked for s in sides], saves, flags),
    )[0]


def _projection(name: str, given: Weights) -> Projection:
    if isinstance(given, StackedFactors):
        full, ranks = tuple(given.full), check_ranks(f"{name}.ranks", given.ranks, len(given.full))
        layout = tuple(
            FULL if weight is not None else rank for weight, rank in zip(full, ranks, strict=True)
        )
        if any(kind == FULL and rank for kind, rank in zip(layout, ranks, strict=True)):
            raise ValueError(f"{name}.ranks: got a rank for a full-size expert; accepted: 0 there")
        return Projection(full, ((given.a, given.b),), layout, True)
    if isinstance(given, Tensor) or not isinstance(given, Sequence) or not len(given):
        raise TypeError(
            f"{name}: got {type(given).__name__}; accepted: a sequence of E weights, pairs (a, b) "
            "or None, or StackedFactors"
        )
    full, factors, layout = [], [], []
    for e, entry in enumerate(given):
        if isinstance(entry, (tuple, list)) and len(entry) == 2:
            a = entry[0]
            if not isinstance(a, Tensor) or a.dim() != 2:
                check_tensor(f"{name}[{e}][0]", a, ("r", "in"))
            if not a.shape[0]:
                raise ValueError(f"{name}[{e}]: got factors of rank 0; accepted: from 1, or None")
            full.append(None)
            factors.append(tuple(entry))
            layout.append(a.shape[0])
        elif entry is None or isinstance(entry, Tensor):
            full.append(entry)
            layout.append(0 if entry is None else FULL)
        else:
            raise TypeError(
                f"{name}[{e}]: got {type(entry).__name__}; accepted: a tensor, a pair (a, b), None"
            )
    return Projection(tuple(full), tuple(factors), tuple(layout), False)


def _is_like(value: object, shape: tuple[int, int], x: Tensor) -> bool:
    """Whether `check_tensor` would pass; quick, for there are many and nearly all do."""
    return (
        isinstance(value, Tensor)
        and value.dtype == x.dtype
        and value.shape == shape
        and value.device == x.device
    )


def _check_projection(name: str, side: Projection, num_experts: int, width: int, x: Tensor) -> None:
    hidden = x.shape[1]
    outer, inner = (hidden, width) if name == "down" else (width, hidden)
    if len(side.full) != num_experts:
        raise ValueError(
            f"{name}: got {len(side.full)} entries; accepted: {num_experts}, as many as gate has"
        )
    for e, weight in enumerate(side.full):
        if weight is not None and not _is_like(weight, (outer, inner), x):
            check_tensor(f"{name}[{e}]", weight, (outer, inner), (x.dtype,), x.device)
    ranks = [sum(side.ranks)] if side.stacked else [rank for rank in side.ranks if rank]
    for index, ((a, b), rank) in enumerate(zip(side.factors, ranks, strict=True)):
        if _is_like(a, (rank, inner), x) and _is_like(b, (outer, rank), x):
            continue
        label = name if side.stacked else f"{name} factors {index}"
        check_tensor(f"{label}.a", a, (rank, inner), (x.dtype,), x.device)
        check_tensor(f"{label}.b", b, (outer, rank), (x.dtype,), x.device)


def _sorted_rows(x, indices, weights, counts, num_experts) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert are the top-1 case: ids by position, past the counts the id E."""
    if indices is not None:
        raise ValueError("indices: got a tensor beside counts; accepted: None")
    check_tensor("counts", counts, (num_experts,), (torch.int64, torch.int32), x.device)
    if checks_values(counts):
        total = int(counts.sum())
        if bool((counts < 0).any()) or total > x.shape[0]:
            raise ValueError(
                f"counts: got {total} rows, the least count {int(counts.min())}; accepted: counts "
                f">= 0 of at most {x.shape[0]} rows together"
            )
    ends = counts.to(torch.int64).cumsum(0)
    rows = torch.arange(x.shape[0], device=x.device)
    indices = torch.searchsorted(ends, rows, right=True).unsqueeze(1)
    if weights is None:
        acc = torch.promote_types(x.dtype, torch.float32)
        return indices, torch.ones((x.shape[0], 1), dtype=acc, device=x.device)
    check_weights("weights", weights, (x.shape[0],), x)
    return indices, weights.unsqueeze(1)


def _experts(x, indices, weights, tensors, layout, stacked, saves, flags):
    if checks_values(indices):
        check_ids("indices", indices, len(layout) // 3)
    x, weights = contiguous("x", x), weights.contiguous()
    sides = unflatten(tensors, layout, stacked)
    y, kept, wanted = None, Kept(), _possible(flags, x)
    if not saves and 0 < x.shape[0] <= schedule.DECODE_TOKENS:
        y = _decode(x, indices, weights, sides)
    if y is None:
        kernels = backend.kernels(_kernels, x)
        y, kept = kernels.forward(x, indices, weights, sides, wanted)
    outputs = zip(kept, wanted, strict=True)
    return y, *(x.new_empty((0, 0)) if t is None or not want else t for t, want in outputs)


def _possible(flags, x: Tensor) -> Kept:
    known = backend.available(_kernels, x.device)  # none for "meta"
    return possible(flags, bool(known) and backend.chosen(_kernels, x.device) == "triton")


def _decode(x, indices, weights, sides) -> Tensor | None:
    """y by the library's kernels for few tokens; None where they do not serve."""
    kernels = backend.library(_kernels, x)
    if kernels is None:
        return None
    how = schedule.choose(
        [side.layout for side in sides],
        x.shape[0],
        hidden=x.shape[1],
        width=sides[0].full[0].shape[0],
        dtype=x.dtype,
        kernels=("native",),
    )
    if how.route != "decode" or not kernels.decode_serves(x, sides):
        return None
    return kernels.decode(x, indices.contiguous(), weights, sides)


def _experts_fake(x, indices, weights, tensors, layout, stacked, saves, flags):
    sizes = shapes(_possible(flags, x), *indices.shape, tensors[0].shape[0], layout)
    return x.new_empty(x.shape), *(x.new_empty(size) for size in sizes)


def _experts_backward(dy, x, indices, weights, kept, tensors, layout, stacked, needs):
    x, sides, kept = x.contiguous(), unflatten(tensors, layout, stacked), given(kept)
    dx, dweights, sides = backend.kernels(_kernels, x).backward(
        *(dy.contiguous(), x, indices, weights.contiguous(), kept, sides),
        *(needs[:2], unflatten(needs[2:], layout, stacked)),
    )
    grads = [dx, dweights, *(grad for side in sides for grad in side.tensors)]
    like = (x, weights, *tensors)
    return [
        _gradient(grad, tensor) if need else x.new_empty(0)
        for grad, tensor, need in zip(grads, like, needs, strict=True)
    ]


def _gradient(grad: Tensor | None, of: Tensor) -> Tensor:
    """Contiguous; None, of what nothing depends on, such as factors of no rank, is zero."""
    return of.new_zeros(of.shape) if grad is None else grad.contiguous()


def _experts_backward_fake(dy, x, indices, weights, kept, tensors, layout, stacked, needs):
    like = (x, weights, *tensors)
    return [
        tensor.new_empty(tensor.shape if need else (0,))
        for tensor, need in zip(like, needs, strict=True)
    ]


def _setup_experts(ctx, inputs, output):
    x, indices, weights, tensors, ctx.layout, ctx.stacked, *_ = inputs
    ctx.save_for_backward(x, indices, weights, *output[1:], *tensors)
    ctx.set_materialize_grads(False)


def _backward_experts(ctx, dy, *_):
    x, indices, weights, *saved = ctx.saved_tensors
    kept, tensors = saved[: len(Kept._fields)], saved[len(Kept._fields) :]
    nones = (None,) * 4
    if dy is None:
        return None, None, None, [None] * len(tensors), *nones
    needs = [ctx.needs_input_grad[0], ctx.needs_input_grad[2], *ctx.needs_input_grad[3]]
    grads = torch.ops.flexmore.experts_backward(
        dy, x, indices, weights, kept, tensors, ctx.layout, ctx.stacked, needs
    )
    grads = [grad if need else None for grad, need in zip(grads, needs, strict=True)]
    return grads[0], None, grads[1], grads[2:], *nones


define(
    "experts(Tensor x, Tensor indices, Tensor weights, Tensor[] tensors, int[] layout,"
    " bool[] stacked, bool saves, bool[] flags) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,"
    " Tensor, Tensor)",
    _experts,
    _experts_fake,
    backward=_backward_experts,
    setup_context=_setup_experts,
)
define(
    "experts_backward(Tensor dy, Tensor x, Tensor indices, Tensor weights, Tensor[] kept,"
    " Tensor[] tensors, int[] layout, bool[] stacked, bool[] needs) -> Tensor[]",
    _experts_backward,
    _experts_backward_fake,
)
