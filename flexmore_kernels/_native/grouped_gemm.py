"""Products of rows by expert on Hopper in the compiled library: csrc/cuda/grouped_gemm*.cu.

For 16-bit floats, with hidden and intermediate sizes that are multiples of 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ragged import SORTED, RoutingPlan, RowGrads, RowProducts

_ops = torch.ops.flexmore_native

MAX_GRADS = 32  # of one launch


def serves(hidden: int, width: int) -> bool:
    """Whether these are sizes whose rows tensor maps can describe."""
    return hidden % 8 == 0 and width % 8 == 0


def sum_rows(
    work: Sequence[RowProducts],
    plan: RoutingPlan,
    weights: Tensor | None = None,
    place: int = SORTED,
) -> None:
    """out = first + second, times the slot's weight, at the place."""
    _launch(work, plan, weights, place)


def gated_rows(
    work: Sequence[RowProducts], plan: RoutingPlan, kept: tuple[Tensor, Tensor] | None = None
) -> None:
    """out = silu(first) * second, at the sorted rows; kept (two (N, F)): first and second too."""
    _launch(work, plan, None, SORTED, True, kept or (None, None))


def weight_grads(work: Sequence[RowGrads], plan: RoutingPlan, parts: int = 0) -> None:
    """out = left^T right over the rows of the expert; sizes are multiples of 8.

    parts: into how many the rows are cut, whose sums are added up in order; 0: as many as pay.
    """
    for first in range(0, len(work), MAX_GRADS):
        some = work[first : first + MAX_GRADS]
        _ops.grouped_gemm_dweight(
            [_operand(item.left) for item in some],
            [_operand(item.right) for item in some],
            [item.out for item in some],
            [item.expert for item in some],
            [int(item.left_place == SORTED) for item in some],
            [int(item.right_place == SORTED) for item in some],
            plan.row_offsets,
            plan.num_rows,
            parts,
        )


def _launch(
    work, plan: RoutingPlan, weights, place: int, gated: bool = False, kept=(None, None)
) -> None:
    none = work[0].out.new_empty(0)
    terms = [term for item in work for term in (item.first, item.second)]
    _ops.grouped_gemm(
        [none if term.left is None else _operand(term.left) for term in terms],
        [none if term.right is None else _operand(term.right, not gated) for term in terms],
        [none if term.base is None else _operand(term.base) for term in terms],
        [item.out for item in work],
        [item.expert for item in work],
        [term.place for term in terms],
        plan.row_offsets,
        plan.row_to_slot,
        weights,
        plan.top_k,
        place,
        gated,
        *kept,
    )


def _operand(t: Tensor, may_be_transposed: bool = False) -> Tensor:
    """t as tensor maps can describe it: rows, or if it may be columns, at multiples of 16 bytes."""
    if may_be_transposed and t.stride(0) == 1 and t.stride(1) % 8 == 0 and t.data_ptr() % 16 == 0:
        return t
    if t.shape[1] % 8:
        return torch.nn.functional.pad(t, (0, -t.shape[1] % 8))
    if t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16:
        return t.clone(memory_format=torch.contiguous_format)
    return t
