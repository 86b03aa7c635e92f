"""Attribution in plain PyTorch: sums of integers by index. What: reference/attribution.py."""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = 2.0**32
"""Units of a weight of 1."""


def attribute_(
    rows: Tensor,
    units: Tensor,
    tokens: Tensor | None,
    indices: Tensor,
    weights: Tensor,
    request: Tensor | None,
    counted: Tensor | None,
) -> None:
    """Adds to rows and units (B, E), and to tokens (B,), all int64; T and B are at least 1."""
    (B, E), T = rows.shape, indices.shape[0]
    live = (indices >= 0) & (indices < E)
    if request is None:
        request = torch.arange(B, device=rows.device)[:, None].expand(B, T // B).reshape(T)
    else:
        inside = (request >= 0) & (request < B)
        counted = inside if counted is None else counted & inside
    if counted is not None:
        live &= counted[:, None]
        request = request.masked_fill(~counted, 0)
    # What does not count adds 0 to the first place: sizes do not depend on the ids.
    place = torch.where(live, indices + (request * E)[:, None], 0).view(-1)
    rows.view(-1).index_add_(0, place, live.view(-1).to(torch.int64))
    whole = weights.to(torch.float64).mul(UNITS).add_(0.5).floor_().to(torch.int64)
    units.view(-1).index_add_(0, place, torch.where(live, whole, 0).view(-1))
    if tokens is not None:
        one = torch.ones_like(request) if counted is None else counted
        tokens.index_add_(0, request, one.to(tokens.dtype))
