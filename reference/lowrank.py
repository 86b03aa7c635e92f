"""The two halves of a low-rank matrix B_e A_e, for rows sorted by expert, each expert with a rank
r_e of its own.

    shrink      z_n = A_e x_n            packed, one row after the other; then zeros
    expand      y_n = B_e z_n            tail rows: 0;  r_e = 0: 0

`a` (R, I) holds the A_e one below the other and `b` (O, R) the B_e side by side, both in the order
of the experts. z is flat, of length T * (sum of the K largest ranks): a token's experts are
distinct, so that the rows always fit.

Gradient:

    shrink      dx_n = A_e^T dz_n          dA_e = sum over the rows n of e of dz_n x_n^T
    expand      dz_n = B_e^T dy_n          dB_e = sum over the rows n of e of dy_n z_n^T
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from .routing import RoutingPlan


def shrink(x: Tensor, a: Tensor, plan: RoutingPlan, ranks: Sequence[int]) -> Tensor:
    """(N, I) -> (P,): every routed row times its expert's A, packed."""
    offsets = plan.row_offsets.tolist()
    blocks = [
        (x[offsets[e] : offsets[e + 1]] @ a_e.t()).flatten()
        for e, a_e in enumerate(a.split(list(ranks)))
    ]
    z = torch.cat(blocks)
    size = plan.indices.shape[0] * sum(sorted(ranks, reverse=True)[: plan.top_k])
    return F.pad(z, (0, size - z.numel()))


def expand(z: Tensor, b: Tensor, plan: RoutingPlan, ranks: Sequence[int]) -> Tensor:
    """(P,) -> (N, O): every packed row times its expert's B."""
    offsets = plan.row_offsets.tolist()
    y, start = [], 0
    for e, b_e in enumerate(b.split(list(ranks), dim=1)):
        rows = offsets[e + 1] - offsets[e]
        z_e = z[start : start + rows * ranks[e]].reshape(rows, ranks[e])
        y.append(z_e @ b_e.t())
        start += z_e.numel()
    tail = z.new_zeros(plan.row_to_slot.shape[0] - offsets[-1], b.shape[0])
    return torch.cat([*y, tail])
