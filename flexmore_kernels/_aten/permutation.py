"""Permutation in aten: gathers, and sums over the slots in slot order. Maths:
reference/permutation.py.
"""

from __future__ import annotations

import torch
from torch import Tensor


def permute(x_TD: Tensor, row_to_slot_N: Tensor, slot_to_row_TK: Tensor) -> Tensor:
    """x_ND; tail rows are zero."""
    if x_TD.shape[0] == 0:
        return x_TD.new_zeros(row_to_slot_N.shape[0], x_TD.shape[1])
    x_ND = x_TD.index_select(0, row_to_slot_N.clamp(min=0) // slot_to_row_TK.shape[1])
    return x_ND.masked_fill_((row_to_slot_N < 0)[:, None], 0)


def unpermute(
    x_ND: Tensor, slot_to_row_TK: Tensor, weights_TK: Tensor | None, base_TD: Tensor | None
) -> Tensor:
    """base + the weighted sum of each token's rows, in acc, rounded once to x's dtype."""
    T, K = slot_to_row_TK.shape
    acc = torch.promote_types(x_ND.dtype, torch.float32)
    if base_TD is None:
        y_TD = torch.zeros(T, x_ND.shape[1], dtype=acc, device=x_ND.device)
    else:
        y_TD = base_TD.to(acc, copy=True)
    if x_ND.shape[0] == 0:
        return y_TD.to(x_ND.dtype)
    for k in range(K):
        row_T = slot_to_row_TK[:, k]
        x_kD = x_ND.index_select(0, row_T.clamp(min=0)).to(acc)
        if weights_TK is not None:
            x_kD = x_kD * weights_TK[:, k, None]
        y_TD += x_kD.masked_fill_((row_T < 0)[:, None], 0)
    return y_TD.to(x_ND.dtype)


def unpermute_backward(
    dy_TD: Tensor, x_ND: Tensor, row_to_slot_N: Tensor, weights_TK: Tensor
) -> tuple[Tensor, Tensor]:
    """(dx_ND, dweights_TK acc); zero for tail rows and empty slots."""
    T, K = weights_TK.shape
    dweights = torch.zeros_like(weights_TK)
    if row_to_slot_N.shape[0] == 0:
        return torch.zeros_like(x_ND), dweights
    tail_N = row_to_slot_N < 0
    slot_N = row_to_slot_N.clamp(min=0).long()
    dy_ND = dy_TD.index_select(0, slot_N // K).to(weights_TK.dtype).masked_fill_(tail_N[:, None], 0)
    dweights_N = (dy_ND * x_ND.masked_fill(tail_N[:, None], 0)).sum(1)
    # Tail rows add a zero to slot 0.
    dweights.view(-1).index_add_(0, slot_N, dweights_N)
    dx_ND = dy_ND * weights_TK.flatten()[slot_N, None]
    return dx_ND.to(x_ND.dtype), dweights
