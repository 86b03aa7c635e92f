"""One matrix of an expert at another rank: cut, grown, made full-size, or made of a full-size one.

    cut      the best of rank r of B A:  B = Q_b R_b,  A^T = Q_a R_a,  svd(R_b R_a^T), float64;
             pieces by singular value, each split evenly over a and b, as `conversion.svd` does
    grown    B A to the bit: rows of A more, Kaiming, so that they can learn; columns of B, zero
    dense    W_0 + B A, rounded once
    factored the best of rank r of W - W_0

What was cut is nested: the first rows of A and columns of B are the best of each smaller rank.
Source: FlexMoRE (arXiv 2602.08818); the SVD of a product by QRs: Golub and Van Loan, section 8.6.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .checkpoint_config import as_triple
from .checkpoint_forms import dense_weight
from .checks import check_int, check_one_of
from .conversion.svd import METHODS, Decomposition, decompose, factor_pair
from .members import Entry, entry_rank


def parse_rank(rank: Any, limit: int) -> tuple:
    """A rank for one expert, an entry of `expert_ranks`, as a triple of "full", 0 or a rank.

    An int 0 is full-size, as there; in a triple 0 is no delta. Raises ValueError or TypeError.
    """
    if not isinstance(rank, (list, tuple)):
        return as_triple(check_int("rank", rank, 0, limit))
    if len(rank) != 3:
        raise ValueError(f"rank: got {rank!r}; accepted: one rank, or three (gate, up, down)")
    for part in rank:
        if isinstance(part, str) and part != "full":
            raise ValueError(f'rank: got {part!r}; accepted: a rank, 0 for no delta, or "full"')
    return tuple(
        part if isinstance(part, str) else check_int(f"rank[{i}]", part, 0, limit)
        for i, part in enumerate(rank)
    )


def reranked(
    entry: Entry,
    base: Tensor,
    rank: int | str,
    *,
    dtype: torch.dtype | None = None,
    method: str = "exact",
    generator: torch.Generator | None = None,
) -> Entry:
    """The entry at this rank: a matrix (out, in), a pair a (r, in), b (out, r), or None.

    Args:
        entry: what there is: a full-size matrix, a pair, or None for the base's own.
        base: W_0 (out, in) of the projection.
        rank: 1 to min(out, in), 0 for None, or "full". A pair's own rank orders its pieces by
            singular value: B A stays to rounding. A full-size matrix's "full" is itself.
        dtype: of new factors; default: the pair's, or the base's.
        method: of the SVD of W - W_0, see `conversion.svd.decompose`.
        generator: of the rows that a grown A gets, on the CPU; None is torch's own.

    Deterministic, but for None's generator. Raises ValueError naming the argument.
    """
    check_one_of("method", method, METHODS)
    if rank == entry_rank(entry) and not isinstance(entry, tuple):
        return entry
    if rank == 0:
        return None
    if rank == "full":
        return dense_weight(base, entry)
    if isinstance(entry, Tensor):
        delta = entry.double() - base.double()
        found = decompose(delta, rank=rank, method=method)
        return factor_pair(found, rank, dtype or base.dtype)
    if entry is None:
        kind = dtype or base.dtype
        entry = (
            base.new_empty(0, base.shape[1], dtype=kind),
            base.new_empty(base.shape[0], 0, dtype=kind),
        )
    a, b = entry
    if rank > a.shape[0]:
        return _grown(a, b, rank, generator)
    return factor_pair(product_svd(a, b), rank, dtype or a.dtype)


def product_svd(a: Tensor, b: Tensor) -> Decomposition:
    """b a of a (r, in) and b (out, r) as a sum of r pieces, largest first, float64.

    An r x r problem between two QRs: right to a few eps of |b| |a|. r is at most min(out, in).
    """
    q_b, r_b = torch.linalg.qr(b.double())
    q_a, r_a = torch.linalg.qr(a.double().T)
    found = decompose(r_b @ r_a.T)
    return found._replace(u=q_b @ found.u, vt=found.vt @ q_a.T)


def _grown(
    a: Tensor, b: Tensor, rank: int, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    more, width = rank - a.shape[0], a.shape[1]
    # Kaiming uniform, as storage.init_a: bound 1 / sqrt(in). Drawn on the CPU in float32, so that
    # the numbers do not depend on the device.
    bound = width**-0.5
    rows = torch.empty(more, width).uniform_(-bound, bound, generator=generator)
    return torch.cat([a, rows.to(a)]), torch.cat([b, b.new_zeros(b.shape[0], more)], 1)
