"""The experts of a layer, one after the other, each with its own three matrices.

    E_e(x) = Wd_e (silu(Wg_e x) * (Wu_e x))
    y_t = sum_k w_tk E_{e_tk}(x_t)

A projection P of expert e > 0 is a full-size matrix W_P,e; or a pair (A, B), W_P,e = W_P,0 + B A,
added before the nonlinearity (no merged matrix is formed); or None, W_P,e = W_P,0. The kernels
compute the base once per token,

    y = Wd_0 (sum_e w_e h_e) + sum_e Bd_e (w_e Ad_e h_e),        h_e = silu(Wg_e x) * (Wu_e x),

which is the same by the linearity of Wd; this file does not use it, and is therefore a check of it.

Gradient, per row n = (t, e), dy_n = w_n dy_t:

    dw_n = <dy_t, E_e(x_t)>             dh = Wd_e^T dy_n
    du = dh silu(g)                     dg = dh u (s + g s (1 - s)),  s = 1 / (1 + exp(-g))
    dx_t = sum over its rows of Wg_e^T dg + Wu_e^T du
    dW_P,e = sum over the rows of e of (output gradient) (input)^T
    a pair gets dB = dW A^T and dA = B^T dW, and its dW, or that of a None, is added to W_P,0's
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


class StackedFactors(NamedTuple):
    """One projection of all experts, the low-rank factors stacked: a (R, in), b (out, R), `ranks` E
    ints.

    `full` has E entries, a full-size matrix or None; entry 0 is the base. A rank 0 without a full
    matrix: no delta.
    """

    full: Sequence[Tensor | None]
    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]


Weights = Sequence["Tensor | tuple[Tensor, Tensor] | None"] | StackedFactors


def _entries(projection: Weights) -> list[Tensor | tuple[Tensor, Tensor] | None]:
    """The projection as a list of E entries: matrix, pair or None."""
    if not hasattr(projection, "ranks"):
        return list(projection)
    ranks = list(projection.ranks)
    pairs = zip(projection.a.split(ranks), projection.b.split(ranks, dim=1), strict=True)
    return [w if w is not None else pair for w, pair in zip(projection.full, pairs, strict=True)]


def _project(x: Tensor, entries: Sequence[Tensor | tuple[Tensor, Tensor] | None], e: int) -> Tensor:
    if isinstance(entries[e], Tensor):
        return F.linear(x, entries[e])
    y = F.linear(x, entries[0])
    if entries[e] is None:
        return y
    a, b = entries[e]
    return y + F.linear(F.linear(x, a), b)


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
    """(T, D) -> (T, D) with indices, weights (T, K); ids outside [0, E) are skipped.

    With `counts` (E,) the rows of x (N, D) are sorted by expert already: indices is None, weights
    None or (N,), and the result is one row per row, (N, D); rows past the sum of the counts give 0.
    `recompute` is about the kernels' memory, and changes no number.
    """
    gate, up, down = _entries(gate), _entries(up), _entries(down)

    def expert(x, e):
        h = F.silu(_project(x, gate, e)) * _project(x, up, e)
        return _project(h, down, e)

    acc = torch.promote_types(x.dtype, torch.float32)
    if counts is not None:
        sizes = counts.tolist()
        tail = x.shape[0] - sum(sizes)
        *rows, _ = x.split([*sizes, tail])
        y = [expert(x_nD, e) for e, x_nD in enumerate(rows)]
        y_ND = torch.cat([*y, x.new_zeros(tail, x.shape[1])])
        return y_ND if weights is None else (y_ND.to(acc) * weights[:, None]).to(x.dtype)

    y_TD = torch.zeros_like(x, dtype=acc)
    for e in range(len(gate)):
        token, slot = torch.where(indices == e)
        y_nD = expert(x[token], e).to(acc) * weights[token, slot, None]
        y_TD = y_TD.index_add(0, token, y_nD.to(acc))
    return y_TD.to(x.dtype)
