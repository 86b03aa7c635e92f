"""Permutation: copy every token to the rows of its experts, and sum the rows back into tokens.

    permute     x_n = x_t,  t = row_to_slot[n] // K              tail rows: 0
    unpermute   y_t = sum_k w_tk x_{slot_to_row[t, k]}           empty slots: 0;  w = 1 if not given

Gradient. With w = 1 the two are adjoint:

    permute     dx_t = sum_k dx_{slot_to_row[t, k]}              (an unpermute)
    unpermute   dx_n = w_n dy_t,   dw_tk = <x_{slot_to_row[t, k]}, dy_t>

with w_n the weight of row n's slot.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .routing import RoutingPlan


def permute(x: Tensor, plan: RoutingPlan) -> Tensor:
    """(T, D) -> (N, D): row n is a copy of its token."""
    slot_N = plan.row_to_slot.long()
    x_ND = x[slot_N.clamp(min=0) // plan.top_k]
    return x_ND.masked_fill((slot_N < 0)[:, None], 0)


def unpermute(x: Tensor, plan: RoutingPlan, weights: Tensor | None = None) -> Tensor:
    """(N, D) -> (T, D): the sum of each token's rows, weighted by `weights` (T, K), in acc, rounded
    once to x's dtype.
    """
    row_TK = plan.slot_to_row.long()
    x_TKD = x[row_TK.clamp(min=0)].to(torch.promote_types(x.dtype, torch.float32))
    if weights is not None:
        x_TKD = x_TKD * weights[..., None]
    return x_TKD.masked_fill((row_TK < 0)[..., None], 0).sum(1).to(x.dtype)
