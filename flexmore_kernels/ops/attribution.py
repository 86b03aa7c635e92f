"""Attribution: rows and routing weight of each expert, for each request of a batch.

Kernels: Triton on a GPU, one launch; else plain PyTorch. Cost: T K ids and weights are read, T*K*12
bytes, and at most 2 T*K integers added in memory. Maths: reference/attribution.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .. import backend
from .._aten.attribution import UNITS
from ..checks import check_ids, check_int, check_tensor, checks_values
from ..library import define

_kernels = "attribution"
LARGEST_WEIGHT = 2.0**20


def attribute(
    indices: Tensor,
    weights: Tensor,
    num_requests: int,
    num_experts: int,
    *,
    request: Tensor | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Count, for each request b, the rows of each expert e, and sum their routing weights.

        rows_be = number of slots of b's tokens with index e;   weight_sum_be = sum of their weights

    A row is a token that goes through an expert: a slot (token, expert) of the routing.

    Args:
        indices: (T, K) int64, distinct ids within a token; an id outside [0, E) is an empty slot. A
            shared expert's slot counts as every other. On the CPU and inside `validation()` ids
            above E, below 0 or repeated raise.
        weights: (T, K) float32 or float64, as `topk_route` gives them; at most 2^20 in magnitude.
        num_requests: B, from 1. Request b has tokens b T/B to (b + 1) T/B - 1, as in a flattened
            batch (B, S), so B divides T.
        num_experts: E, from 1 to 1024.
        request: (T,) int64 or int32, where a packed batch's tokens belong; outside [0, B): nowhere.
        counted: bool, T entries in any shape: False at padding and at what does not count.

    Returns: rows (B, E) int64 and weight_sum (B, E) float64. Each weight is rounded to a multiple
    of 2^-32, which float32 weights from 2^-9 on are anyway, and the sum, below 2^31, is of
    integers: the same bits on every device, in every order, in one call or in parts.
    Raises ValueError or TypeError naming the argument; weights, too, are looked at on the CPU and
    inside `validation()`, elsewhere those out of range give sums without a meaning.
    Deterministic. Not differentiable: nothing flows to weights. No host sync; a CUDA graph can
    capture it. To add up over calls: `flexmore_kernels.attribution.Attribution`.
    """
    check_tensor("indices", indices, ("T", "K"), (torch.int64,))
    check_tensor("weights", weights, indices.shape, (torch.float32, torch.float64), indices.device)
    B = check_int("num_requests", num_requests, 1)
    E = check_int("num_experts", num_experts, 1, 1024)
    T, K = indices.shape
    if K == 0:
        raise ValueError("indices: got no slots a token; accepted: (T, K) with K >= 1")
    if request is not None:
        check_tensor("request", request, (T,), (torch.int64, torch.int32), indices.device)
    elif T % B:
        raise ValueError(
            f"num_requests: got {B} for {T} tokens; accepted: a divisor, or with `request` any"
        )
    if counted is not None:
        check_tensor("counted", counted, None, (torch.bool,), indices.device)
        if counted.numel() != T:
            raise ValueError(
                f"counted: got shape {tuple(counted.shape)}; accepted: {T} entries in any shape"
            )
    if checks_values(indices):
        _check_values(indices, weights, E)
    rows, units = indices.new_zeros(2, B, E)
    attribute_(rows, units, None, indices, weights, request=request, counted=counted)
    return rows, weight_sum(units)


def attribute_(
    rows: Tensor,
    units: Tensor,
    tokens: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    *,
    request: Tensor | None = None,
    counted: Tensor | None = None,
) -> None:
    """As `attribute`, added in place to rows and units (B, E), weights in units of 2^-32, and to
    tokens (B,) the tokens that count; all int64 and contiguous. Checks nothing: for every step.
    """
    if counted is not None:
        counted = counted.reshape(-1)
    torch.ops.flexmore.attribute_(rows, units, tokens, indices, weights.detach(), request, counted)


def weight_sum(units: Tensor) -> Tensor:
    """Units of 2^-32 as float64."""
    return units.to(torch.float64) / UNITS


def _check_values(indices: Tensor, weights: Tensor, num_experts: int) -> None:
    check_ids("indices", indices, num_experts)
    wrong = ~(weights.abs() <= LARGEST_WEIGHT) & (indices < num_experts)
    if bool(wrong.any()):
        token, slot = (int(i) for i in wrong.nonzero()[0])
        raise ValueError(
            f"weights: got {float(weights[token, slot])} at [{token}, {slot}]; accepted: numbers "
            "up to 2^20 in magnitude"
        )


def _attribute_(rows, units, tokens, indices, weights, request, counted) -> None:
    if indices.numel() == 0 or rows.numel() == 0:
        return
    given = [None if x is None else x.contiguous() for x in (indices, weights, request, counted)]
    backend.kernels(_kernels, indices).attribute_(rows, units, tokens, *given)


def _attribute_fake(rows, units, tokens, indices, weights, request, counted) -> None:
    return None


define(
    "attribute_(Tensor(a!) rows, Tensor(b!) units, Tensor(c!)? tokens, Tensor indices,"
    " Tensor weights, Tensor? request, Tensor? counted) -> ()",
    _attribute_,
    _attribute_fake,
)
