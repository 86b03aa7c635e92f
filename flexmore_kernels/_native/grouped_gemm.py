"""Products of rows by expert on Hopper in the compiled library: csrc/cuda/grouped_gemm.cu.

For 16-bit floats, with hidden and intermediate sizes that are multiples of 8.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..ragged import SORTED, RoutingPlan, RowProducts

_ops = torch.ops.flexmore_native


def serves(hidden: int, width: int) -> bool:
    """Whether these are sizes whose rows tensor maps can describe."""
    return hidden % 8 == 0 and width % 8 == 0


def sum_rows(
    work: Sequence[RowProducts],
    plan: RoutingPlan,
    weights: Tensor | None = None,
    place: int = SORTED,
) -> None:
    """out = first + second, times the slot's weight, at the place; bases are not served."""
    _launch(work, plan, weights, place, False)


def gated_rows(work: Sequence[RowProducts], plan: RoutingPlan) -> None:
    """out = silu(first) * second, at the sorted rows."""
    _launch(work, plan, None, SORTED, True)


def _launch(work, plan: RoutingPlan, weights, place: int, gated: bool) -> None:
    none = work[0].out.new_empty(0)
    terms = [term for item in work for term in (item.first, item.second)]
    _ops.grouped_gemm(
        [none if term.left is None else _operand(term.left) for term in terms],
        [none if term.right is None else _operand(term.right) for term in terms],
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
    )


def _operand(t: Tensor) -> Tensor:
    """t as tensor maps can describe it: rows at multiples of 16 bytes."""
    if t.shape[1] % 8:
        return torch.nn.functional.pad(t, (0, -t.shape[1] % 8))
    if t.stride(1) != 1 or t.stride(0) % 8 or t.data_ptr() % 16:
        return t.clone(memory_format=torch.contiguous_format)
    return t
