"""Gated mix: the middle of the layer. Base and low-rank parts are added, gated, weighted and summed
over the experts.

For the row n = (t, e), with the base pre-activations g_t, u_t of its token and its packed z (see
lowrank):

    g_n = g_t + Bg_e zg_n       u_n = u_t + Bu_e zu_n       silu(g) = g s,  s = 1 / (1 + exp(-g))
    h_n = silu(g_n) * u_n                            rows, (N, F), unweighted; tail rows: 0
    m_t = sum_k w_tk h_{slot_to_row[t, k]}           mixed, (T, F)

Gradient, from dm (mixed) and the direct dh (rows):

    dw_tk = <dm_t, h_n>           dh_n' = w_tk dm_t + dh_n
    du_n = dh_n' silu(g_n)        dg_n = dh_n' u_n (s + g_n s (1 - s))
    dg_t, du_t: their sums over the rows of t;  zg, zu, Bg, Bu from dg_n, du_n as in expand
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .lowrank import expand
from .permutation import permute, unpermute
from .routing import RoutingPlan


def gated_mix(
    gate: Tensor,
    up: Tensor,
    weights: Tensor,
    plan: RoutingPlan,
    z_gate: Tensor,
    b_gate: Tensor,
    ranks_gate: Sequence[int],
    z_up: Tensor,
    b_up: Tensor,
    ranks_up: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """gate, up (T, F), weights (T, K), z_* (P,), b_* (F, R) -> (mixed (T, F), rows (N, F))."""
    acc = torch.promote_types(gate.dtype, torch.float32)
    g_NF = permute(gate.to(acc), plan) + expand(z_gate.to(acc), b_gate.to(acc), plan, ranks_gate)
    u_NF = permute(up.to(acc), plan) + expand(z_up.to(acc), b_up.to(acc), plan, ranks_up)
    h_NF = F.silu(g_NF) * u_NF
    return unpermute(h_NF, plan, weights).to(gate.dtype), h_NF.to(gate.dtype)
