"""Grouped GEMM: every routed row times the matrix of its own expert.

    y_n = W_e x_n              for the rows n of expert e; tail rows: 0

Gradient:

    dx_n = W_e^T dy_n,    dW_e = sum over the rows n of e of dy_n x_n^T
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .routing import RoutingPlan


def grouped_gemm(x: Tensor, weight: Tensor | Sequence[Tensor], plan: RoutingPlan) -> Tensor:
    """(N, I) -> (N, O) with weight (E, O, I), or a sequence of E matrices (O, I)."""
    offsets = plan.row_offsets.tolist()
    y = [x[offsets[e] : offsets[e + 1]] @ weight[e].t() for e in range(plan.num_experts)]
    tail = x.new_zeros(x.shape[0] - offsets[-1], weight[0].shape[0])
    return torch.cat([*y, tail])
