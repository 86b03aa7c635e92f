"""The difference of an expert to the public one as a sum of rank-one pieces, largest first.

    delta (out, in) = W_e - W_0 ~ u diag(s) vt,    a = s^(1/2) vt (r, in),    b = u s^(1/2) (out, r)

The first r pieces are the best of rank r (Eckart and Young), so one decomposition serves every
rank. What rank r drops has the Frobenius norm sqrt(sum of s_i^2 over i > r). How it is computed,
and how exactly: `singular_rows`. Source: FlexMoRE (arXiv 2602.08818) and its authors' converter,
which split symmetrically and have no alpha; weighting by inputs: SVD-LLM (arXiv 2403.07378).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..checks import FLOATS, check_int, check_one_of, check_tensor
from .numerical_rank import numerical_rank
from .singular_rows import cut_rows, exact_rows, randomized_rows, scaled, singular_norms, wide

__all__ = [
    "METHODS", "Decomposition", "decompose", "error", "factor_pair", "numerical_rank",
    "singular_values",
]  # fmt: skip

METHODS = ("exact", "randomized")
_DAMPING, _MOST_DAMPING = 2.0**-26, 2.0**-10
"""What an input that never occurred counts, of the mean input: the root of float64's eps, or, where
a moment of few inputs was rounded and so has eigenvalues below zero, as much as makes up for it."""


class Decomposition(NamedTuple):
    """u (out, q), s (q,) descending, vt (q, in): float64, on delta's device.

    delta = u diag(s) vt but for rounding and what is dropped. Columns of u are orthonormal and so
    are rows of vt whose s is above rounding; where s is 0, one of them is 0 too. With a second
    moment S of the inputs, the same holds of delta S^(1/2), and vt has been multiplied by S^(-1/2).

    dropped: Frobenius norm of what is in none of the q pieces (weighted by S, as s is).
    bound: for every rank r <= q, what r drops is at most this much larger than the least that any
        rank-r factors can drop; 0 for the exact method.
    """

    u: Tensor
    s: Tensor
    vt: Tensor
    dropped: float
    bound: float


def decompose(
    delta: Tensor,
    *,
    rank: int | None = None,
    method: str = "exact",
    second_moment: Tensor | None = None,
    generator: torch.Generator | None = None,
) -> Decomposition:
    """The largest `rank` pieces of delta (out, in), or all min(out, in).

    Args:
        delta: (out, in), any float dtype; all is computed in float64 on its device. It is
            W_e - W_0 with both in float64: a difference taken in bfloat16 has lost the small.
        rank: 1 to min(out, in); the exact method's None keeps all.
        method: "exact", or "randomized", which needs a rank and is faster by far where that is
            small.
        second_moment: E[x x^T] (in, in) or its diagonal (in,) of the inputs x: minimises
            E |(delta - b a) x|^2 instead of |delta - b a|_F^2.
        generator: of the random numbers; None is a fixed seed, so that two runs give one result.

    With S = L L^T the weighted problem is the plain one for delta L, and vt L^-1 goes with delta.
    S gets 2^-26 of its mean diagonal on the diagonal (more, up to 2^-10, where its rounding asks
    for it), so that L^-1 exists when texts do not show all of the inputs' directions.

    Raises ValueError or TypeError naming the argument; a NaN or Inf in delta is a ValueError.
    """
    check_one_of("method", method, METHODS)
    matrix, weight, unweight, scale = _prepare(delta, second_moment)
    most = min(delta.shape)
    if rank is not None:
        check_int("rank", rank, 1, most)
    elif method == "randomized":
        raise ValueError(f'rank: got None with method "randomized"; accepted: 1 to {most}')
    tall = delta.shape[0] > delta.shape[1]
    matrix = wide(weight(matrix))
    if method == "randomized":
        found = randomized_rows(matrix, rank, generator)
    else:
        found = exact_rows(matrix)
        found = found if rank is None else cut_rows(found, rank)
    one = torch.where(found.norms > 0, found.norms, 1.0)
    unit = found.rows / one[:, None]
    u, vt = (unit.T, found.q.T) if tall else (found.q, unit)
    s = found.norms * scale
    return Decomposition(u, s, unweight(vt), found.outside * scale, found.bound * scale)


def singular_values(delta: Tensor, second_moment: Tensor | None = None) -> Tensor:
    """s (min(out, in),) of `decompose`, descending, float64, without vectors, so faster.

    Right to the relative error 2^-20, or to a few eps s_1 where some are far smaller than others.
    """
    matrix, weight, _, scale = _prepare(delta, second_moment)
    return singular_norms(wide(weight(matrix))) * scale


def error(decomposition: Decomposition, rank: int) -> float:
    """Frobenius norm of delta - b a for the factors of this rank (0: of delta), weighted as s is.

    Right to rounding, for the randomised method too.
    """
    check_int("rank", rank, 0, decomposition.s.shape[0])
    return math.hypot(float(decomposition.s[rank:].norm()), decomposition.dropped)


def factor_pair(
    decomposition: Decomposition, rank: int, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """a (rank, in) and b (out, rank) with b a = the first `rank` pieces; no alpha.

    Row i of a and column i of b have equal norms, s_i^(1/2) where nothing is weighted. Those of a
    smaller rank are the first of a larger one, bit by bit.
    """
    u, s, vt, _, _ = decomposition
    check_int("rank", rank, 1, s.shape[0])
    check_one_of("dtype", dtype, FLOATS)
    left, right = u[:, :rank].norm(dim=0), vt[:rank].norm(dim=1)
    # Each to norm 1, then the root of the piece's norm to both; a piece that is zero stays zero.
    root = (s[:rank] * left * right).sqrt()
    to_b = torch.where(left > 0, root / left, 0.0)
    to_a = torch.where(right > 0, root / right, 0.0)
    a, b = vt[:rank] * to_a[:, None], u[:, :rank] * to_b
    return a.to(dtype).contiguous(), b.to(dtype).contiguous()


def _prepare(
    delta: Tensor, second_moment: Tensor | None
) -> tuple[Tensor, Callable, Callable, float]:
    """Checked delta / scale in float64, how to weight it, how to take that from vt, and scale."""
    check_tensor("delta", delta, ("out", "in"), FLOATS)
    matrix, scale = scaled("delta", delta)
    if second_moment is None:
        return matrix, lambda m: m, lambda vt: vt, scale
    root = _root(second_moment, delta)
    if root.dim() == 1:
        return matrix, lambda m: m * root, lambda vt: vt / root, scale
    solve = torch.linalg.solve_triangular
    return matrix, lambda m: m @ root, lambda vt: solve(root, vt, upper=False, left=False), scale


def _root(second_moment: Tensor, delta: Tensor) -> Tensor:
    """L (in, in) lower, or the diagonal (in,), with L L^T the damped second moment."""
    width = delta.shape[1]
    diagonal = isinstance(second_moment, Tensor) and second_moment.dim() == 1
    shape = (width,) if diagonal else (width, width)
    check_tensor("second_moment", second_moment, shape, FLOATS, delta.device)
    moment = second_moment.detach().double()
    entries = moment if diagonal else moment.diagonal()
    mean = float(entries.mean())
    if not bool(moment.isfinite().all()) or float(entries.min()) < 0 or mean == 0:
        raise ValueError(
            "second_moment: accepted: finite numbers, none below 0 on the diagonal, not all 0"
        )
    if diagonal:
        return (moment + _DAMPING * mean).sqrt()
    moment = (moment + moment.T) / 2
    share = _DAMPING
    while share <= _MOST_DAMPING:
        damped = moment.clone()
        damped.diagonal().add_(share * mean)
        root, fault = torch.linalg.cholesky_ex(damped)
        if not int(fault):
            return root
        share *= 16
    raise ValueError("second_moment: is not positive semidefinite; accepted: a mean of x x^T")
