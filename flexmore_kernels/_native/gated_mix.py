"""Gated mix in the compiled library, CPU only: csrc/cpu/gated_mix.cpp; matrix products by aten."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .._aten import lowrank

_ops = torch.ops.flexmore_native


def gated_mix(
    gate_TF: Tensor,
    up_TF: Tensor,
    weights_TK: Tensor,
    plan,
    z_gate: Tensor,
    b_gate: Tensor,
    ranks_gate: Sequence[int],
    z_up: Tensor,
    b_up: Tensor,
    ranks_up: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """(mixed_TF, rows_NF): the weighted sum of each token's rows, and the rows."""
    acc, dtype = weights_TK.dtype, gate_TF.dtype
    # The pre-activations stay in acc: rounding them to 16 bits would be a second rounding.
    gate_NF = _expand(z_gate, b_gate, plan, ranks_gate, gate_TF, acc)
    up_NF = _expand(z_up, b_up, plan, ranks_up, up_TF, acc)
    mixed_TF, rows_NF = _ops.swiglu_mix(gate_NF, up_NF, weights_TK, plan.slot_to_row)
    return mixed_TF.to(dtype), rows_NF.to(dtype)


def _expand(z_P: Tensor, b_FR: Tensor, plan, ranks: Sequence[int], base_TF: Tensor, acc) -> Tensor:
    return lowrank.expand(
        z_P.to(acc),
        b_FR.to(acc),
        plan.row_offsets,
        ranks,
        plan.num_rows,
        base_TF.to(acc),
        plan.row_to_slot,
        plan.top_k,
        True,
    )


def swiglu_mix(
    gate_NF: Tensor, up_NF: Tensor, weights_TK: Tensor, slot_to_row: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from ready pre-activations, summed in slot order; tail rows are zero."""
    return _ops.swiglu_mix(gate_NF, up_NF, weights_TK, slot_to_row)


def swiglu_mix_backward(
    dmixed_TF: Tensor,
    drows_NF: Tensor | None,
    gate_NF: Tensor,
    up_NF: Tensor,
    weights_TK: Tensor,
    row_to_slot_N: Tensor,
    top_k: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(dgate_NF, dup_NF, dweights_N acc, rows_NF); tail rows are zero. Also for a block of rows."""
    return _ops.swiglu_mix_backward(
        dmixed_TF, drows_NF, gate_NF, up_NF, weights_TK, row_to_slot_N, top_k
    )


def swiglu_accumulate(
    mixed_TF: Tensor,
    gate_nF: Tensor,
    up_nF: Tensor,
    weights_TK: Tensor,
    row_to_slot_n: Tensor,
    top_k: int,
) -> Tensor:
    """Add w h to `mixed_TF` (acc) in place for the rows of one expert, and return h (n, F)."""
    return _ops.swiglu_accumulate(mixed_TF, gate_nF, up_nF, weights_TK, row_to_slot_n, top_k)
