"""Shrink and expand in aten: one matrix product per expert that has rows and a rank. Maths:
reference/lowrank.py.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ..ragged import rank_offsets


def blocks(row_offsets: Tensor, ranks: Sequence[int]) -> Iterator[tuple[slice, slice, slice, int]]:
    """For each expert with rows and a rank: its rows, its ranks, its packed range, and its rank
    r_e.
    """
    offsets = row_offsets.tolist()
    rank_start = packed_start = 0
    for e, r in enumerate(ranks):
        rows = slice(offsets[e], offsets[e + 1])
        packed_stop = packed_start + (rows.stop - rows.start) * r
        if packed_stop > packed_start:
            yield rows, slice(rank_start, rank_start + r), slice(packed_start, packed_stop), r
        rank_start, packed_start = rank_start + r, packed_stop


def _rows(x: Tensor, rows: slice, row_to_slot: Tensor | None, top_k: int, gather: bool) -> Tensor:
    return x.index_select(0, row_to_slot[rows] // top_k) if gather else x[rows]


def shrink(
    x: Tensor,
    a_RI: Tensor,
    row_offsets: Tensor,
    ranks: Sequence[int],
    row_to_slot: Tensor | None,
    top_k: int,
    size: int,
    gather: bool = False,
    weights: Tensor | None = None,
) -> Tensor:
    """z_P of length `size`: w_n A_e x_n packed; the unused end is zero."""
    z_P = x.new_zeros(size)
    for rows, rank, packed, r in blocks(row_offsets, ranks):
        x_nI, z_nr = _rows(x, rows, row_to_slot, top_k, gather), z_P[packed].view(-1, r)
        if weights is None:
            torch.mm(x_nI, a_RI[rank].t(), out=z_nr)
        else:
            # The weight is applied before the only rounding.
            w_n1 = weights.flatten()[row_to_slot[rows].long(), None]
            z_nr.copy_((x_nI.to(weights.dtype) @ a_RI[rank].t().to(weights.dtype)) * w_n1)
    return z_P


def expand(
    z_P: Tensor,
    b_OR: Tensor,
    row_offsets: Tensor,
    ranks: Sequence[int],
    num_rows: int,
    base: Tensor | None = None,
    row_to_slot: Tensor | None = None,
    top_k: int = 1,
    gather: bool = False,
) -> Tensor:
    """y_NO: base_n + B_e z_n in one accumulator; tail rows are zero, rank 0 leaves base_n."""
    y_NO = z_P.new_zeros(num_rows, b_OR.shape[0])
    if base is not None:
        used = slice(0, int(row_offsets[-1]))
        y_NO[used] = _rows(base, used, row_to_slot, top_k, gather)
    for rows, rank, packed, r in blocks(row_offsets, ranks):
        y_NO[rows].addmm_(z_P[packed].view(-1, r), b_OR[:, rank].t())
    return y_NO


def factor_grad(
    z_P: Tensor,
    x: Tensor,
    row_offsets: Tensor,
    ranks: Sequence[int],
    row_to_slot: Tensor | None,
    top_k: int,
    gather: bool = False,
    wanted: Sequence[int] | None = None,
) -> Tensor:
    """(R, I): the sum over each expert's rows of z_n x_n^T; zeros for an expert without rows.

    With `wanted`, only the rows of these experts are computed, the others are zero.
    """
    grad_RI = x.new_zeros(sum(ranks), x.shape[1])
    offsets = rank_offsets(ranks)
    some = None if wanted is None else {offsets[e] for e in wanted}
    for rows, rank, packed, r in blocks(row_offsets, ranks):
        if some is not None and rank.start not in some:
            continue
        x_nI = _rows(x, rows, row_to_slot, top_k, gather)
        torch.mm(z_P[packed].view(-1, r).t(), x_nI, out=grad_RI[rank])
    return grad_RI
