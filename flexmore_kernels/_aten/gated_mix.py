"""Gated mix in aten: expert by expert, in acc; the rows of one expert are distinct tokens. Maths:
reference/gated_mix.py.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from . import lowrank


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
    acc, K = weights_TK.dtype, plan.top_k
    mixed_TF = torch.zeros_like(gate_TF, dtype=acc)
    rows_NF = gate_TF.new_zeros(plan.row_to_slot.shape[0], gate_TF.shape[1])
    offsets = plan.row_offsets.tolist()
    gate_of = {rows.start: rest for rows, *rest in lowrank.blocks(plan.row_offsets, ranks_gate)}
    up_of = {rows.start: rest for rows, *rest in lowrank.blocks(plan.row_offsets, ranks_up)}

    def pre_activation(base_TF, token_n, z_P, b_FR, block):
        y_nF = base_TF.index_select(0, token_n).to(acc)
        if block is None:
            return y_nF
        rank, packed, r = block
        return y_nF.addmm_(z_P[packed].view(-1, r).to(acc), b_FR[:, rank].t().to(acc))

    for start, stop in zip(offsets[:-1], offsets[1:], strict=True):
        if start == stop:
            continue
        slot_n = plan.row_to_slot[start:stop]
        token_n = slot_n // K
        g_nF = pre_activation(gate_TF, token_n, z_gate, b_gate, gate_of.get(start))
        u_nF = pre_activation(up_TF, token_n, z_up, b_up, up_of.get(start))
        h_nF = F.silu(g_nF, inplace=True).mul_(u_nF)
        rows_NF[start:stop] = h_nF
        mixed_TF.index_add_(0, token_n, h_nF * weights_TK.flatten()[slot_n.long(), None])
    return mixed_TF.to(gate_TF.dtype), rows_NF


def swiglu_mix(
    gate_NF: Tensor, up_NF: Tensor, weights_TK: Tensor, slot_to_row: Tensor
) -> tuple[Tensor, Tensor]:
    """The same from ready pre-activations, summed in slot order; tail rows are zero."""
    acc, (T, K) = weights_TK.dtype, slot_to_row.shape
    routed_N1 = torch.zeros(gate_NF.shape[0] + 1, 1, dtype=torch.bool, device=gate_NF.device)
    routed_N1[slot_to_row.long()] = True  # -1 marks the entry behind the last row
    tail_N1 = ~routed_N1[:-1]
    h_NF = F.silu(gate_NF.to(acc)).mul_(up_NF.to(acc)).masked_fill_(tail_N1, 0)
    mixed_TF = torch.zeros(T, gate_NF.shape[1], dtype=acc, device=gate_NF.device)
    if gate_NF.shape[0] > 0:
        for k in range(K):
            row_T = slot_to_row[:, k]
            h_kF = h_NF.index_select(0, row_T.clamp(min=0)) * weights_TK[:, k, None]
            mixed_TF += h_kF.masked_fill_((row_T < 0)[:, None], 0)
    return mixed_TF.to(gate_NF.dtype), h_NF.to(gate_NF.dtype)


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
    acc = weights_TK.dtype
    if gate_NF.shape[0] == 0:
        empty = torch.zeros_like(gate_NF)
        return empty, empty.clone(), weights_TK.new_zeros(0), empty.clone()
    tail_N1 = (row_to_slot_N < 0)[:, None]
    slot_N = row_to_slot_N.clamp(min=0).long()
    dmixed_NF = dmixed_TF.index_select(0, slot_N // top_k).to(acc).masked_fill_(tail_N1, 0)
    g_NF = gate_NF.to(acc).masked_fill(tail_N1, 0)
    u_NF = up_NF.to(acc).masked_fill(tail_N1, 0)
    s_NF = g_NF.sigmoid()
    silu_NF = g_NF * s_NF
    h_NF = silu_NF * u_NF
    dweights_N = (dmixed_NF * h_NF).sum(1)
    dh_NF = dmixed_NF.mul_(weights_TK.flatten()[slot_N, None])
    if drows_NF is not None:
        dh_NF += drows_NF.to(acc).masked_fill(tail_N1, 0)
    dup_NF = dh_NF * silu_NF
    # d silu / dg = s + g s (1 - s)
    dgate_NF = dh_NF.mul_(u_NF).mul_(s_NF + silu_NF * (1 - s_NF))
    dtype = gate_NF.dtype
    return dgate_NF.to(dtype), dup_NF.to(dtype), dweights_N, h_NF.to(dtype)


def swiglu_accumulate(
    mixed_TF: Tensor,
    gate_nF: Tensor,
    up_nF: Tensor,
    weights_TK: Tensor,
    row_to_slot_n: Tensor,
    top_k: int,
) -> Tensor:
    """Add w h to `mixed_TF` (acc) in place for the rows of one expert, and return h (n, F)."""
    acc = mixed_TF.dtype
    h_nF = F.silu(gate_nF.to(acc)).mul_(up_nF.to(acc))
    slot_n = row_to_slot_n.long()
    mixed_TF.index_add_(0, slot_n // top_k, h_nF * weights_TK.flatten()[slot_n, None])
    return h_nF.to(gate_nF.dtype)
