"""What the forward of experts keeps for its backward, beside x and the routing.

    G, U = x W_g^T, x W_u^T       unless `recompute`: where an expert uses the base's gate and up
    A x, of gate and up           unless `recompute`: where all experts are few, of small ranks
    p A_d h, of all experts       where a factor B of down is trained, of few experts
    sum_e p_e h_e                 unless `recompute`: where the base's down matrix is trained, of
                                  few experts
    rows of W_g,e x and W_u,e x   unless `recompute`: where experts besides the base are full-size,
                                  since these products would cost a third of the forward again

All but the last are a row a token, however many experts a token has. `recompute` keeps x and the
third, a number a token and unit of rank, which stand for a product with rows of h.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import Tensor

from . import schedule
from .projection import FULL, RANK_MULTIPLE, Projection, padded_rank, shared_of
from .ragged import MAX_SET_EXPERTS


class Kept(NamedTuple):
    """The tensors (as `Keeps`, whether they are kept); None, or empty, where they are not."""

    gate: Any = None  # (T, F)
    up: Any = None  # (T, F)
    s_down: Any = None  # (T, R) in x's dtype, of each expert padded to RANK_MULTIPLE
    mixed: Any = None  # (T, F)
    rows_gate: Any = None  # (N, F), sorted rows
    rows_up: Any = None  # (N, F)
    s: Any = None  # (T, R_gate + R_up)


def keeps(sides: Sequence[Projection], recompute: bool) -> Kept:
    """Which tensors a forward is to keep, by who needs a gradient."""
    down = sides[2]
    trains_b = any(b.requires_grad for _, b in down.factors)
    layouts = [side.layout for side in sides]
    return flags(layouts, trains_b, down.full[0].requires_grad, recompute)


def flags(
    layouts: Sequence[Sequence[int]], trains_b: bool, trains_down: bool, recompute: bool
) -> Kept:
    """The same by the layouts of gate, up and down, and whether a factor B of down, and the base's
    down matrix, are trained."""
    gate, up, down = layouts
    few, shared = 1 < len(gate) <= MAX_SET_EXPERTS, shared_of(layouts)
    kinds = (*gate[1:], *up[1:], *down[1:])
    bases = not recompute and (len(gate) == 1 or shared.hidden)
    sums = few and trains_b and FULL not in down[1:] and max(down[1:]) > 0
    mixed = few and trains_down and shared.down and not recompute
    rows = not recompute and FULL in (*gate[1:], *up[1:])
    small = few and FULL not in kinds and max(*gate, *up) > 0 and max(kinds) <= schedule.FUSED_RANK
    return Kept(bases, bases, sums, mixed, rows, rows, small and not recompute)


def possible(flags: Sequence[bool], ragged: bool) -> Kept:
    """What is kept of it; ragged: whether the kernels are those over ragged rows, for others keep
    G and U alone."""
    return Kept(*(flag and (ragged or index < 2) for index, flag in enumerate(flags)))


def shapes(flags: Kept, tokens: int, top_k: int, width: int, layout: Sequence[int]) -> Kept:
    """The sizes of what is kept, (0, 0) for the rest; layout: of gate, up and down."""
    down = len(layout) // 3 * 2
    ranks = [padded_rank(max(kind, 0), RANK_MULTIPLE) for kind in layout]
    wide, rows = (tokens, width), (tokens * top_k, width)
    sums, s = (tokens, sum(ranks[down:])), (tokens, sum(ranks[:down]))
    full = Kept(wide, wide, sums, wide, rows, rows, s)
    return Kept(*(size if flag else (0, 0) for size, flag in zip(full, flags, strict=True)))


def given(tensors: Sequence[Tensor]) -> Kept:
    """What an op was handed: None for the empty ones."""
    return Kept(*(tensor if tensor.shape[1] else None for tensor in tensors))
