"""The rank of an expert that was truncated and then stored dense: W = round(W_0 + B A).

Rounding adds noise, so W - W_0 has full rank, and its singular values fall from those of B A to a
floor. Rounding errors of many entries are as independent numbers of variance v = spacing^2 / 12,
whose largest singular value is, up to fluctuations of a few percent,

    edge = sqrt(largest sum of v over a row) + sqrt(largest sum of v over a column)

(Bandeira and van Handel 2016, theorem 1.1; for equal variances Bai and Yin's limit).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..checks import FLOATS, check_one_of, check_tensor
from .singular_rows import scaled, singular_norms, wide

_MARGIN = 1.25
"""Of the edge: what is above is no noise."""
_GAP = 2.0
"""Factor between the last of the signal and the first of the noise; less is no gap."""


def numerical_rank(
    difference: Tensor, dtype: torch.dtype, base: Tensor | None = None
) -> int | None:
    """The rank of B A in W = round(W_0 + B A), or None where no gap shows one.

    Args:
        difference: W - W_0 (out, in), taken in float64 or float32.
        dtype: what W was rounded to.
        base: W_0. Without it the size of the weights, and so of their rounding, is not known: the
            rank is then where the widest gap is, if what is below it is like noise.

    None: no singular value is below the floor, or those above it reach down to it with no gap of
    a factor 2, or (without a base) what is below is not like noise of equal variances. 0: no
    singular value is above it. Raises ValueError or TypeError naming the argument.
    """
    check_tensor("difference", difference, ("out", "in"), FLOATS)
    check_one_of("dtype", dtype, FLOATS)
    if base is not None:
        check_tensor("base", base, difference.shape, FLOATS, difference.device)
    matrix, scale = scaled("difference", difference)
    s = singular_norms(wide(matrix)) * scale
    if float(s[0]) == 0.0:
        return 0
    if base is not None:
        floor = _MARGIN * _edge(base.detach().double() + difference.detach().double(), dtype)
        rank = int((s > floor).sum())
    else:
        rank = _widest_gap(s)
        floor = _MARGIN * _fitted_edge(s[rank:], difference.shape, rank)
        if float(s[rank]) > floor:
            return None
    if rank == len(s) or (rank and float(s[rank - 1]) < _GAP * float(s[rank])):
        return None
    return rank


def _edge(stored: Tensor, dtype: torch.dtype) -> float:
    """The largest singular value of the rounding of these weights to `dtype`."""
    kind = torch.finfo(dtype)
    # The spacing at w in [2^(e-1), 2^e) is eps 2^(e-1), and that of the smallest normal below it.
    exponent = torch.frexp(stored.abs().clamp_min(kind.tiny))[1].double() - 1
    variance = (kind.eps * torch.exp2(exponent)).square() / 12
    return math.sqrt(variance.sum(0).max()) + math.sqrt(variance.sum(1).max())


def _widest_gap(s: Tensor) -> int:
    """How many singular values are above the widest gap; at least an eighth of them are below."""
    most = max(1, len(s) - max(1, len(s) // 8))
    below = s[1 : most + 1].clamp_min(s[0] * torch.finfo(torch.float64).eps)
    return int((s[:most] / below).argmax()) + 1


def _fitted_edge(noise: Tensor, shape: torch.Size, rank: int) -> float:
    """The edge of noise of one variance, with the variance that these values have."""
    rows, columns = shape[0] - rank, shape[1] - rank
    deviation = float(noise.norm()) / math.sqrt(rows * columns)
    return deviation * (math.sqrt(rows) + math.sqrt(columns))
