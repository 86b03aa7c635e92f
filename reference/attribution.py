"""Attribution: how many rows each expert computed for each request, and how much they weighed.

    b_t            the request of token t: t // (T / B), or as given
    u(w)           floor(2^32 w + 1/2), the weight in whole units of 2^-32
    rows_be        the number of slots (t, k) with b_t = b and indices_tk = e
    weight_sum_be  2^-32 times the sum of u(w_tk) over these slots

both over the tokens that count: those that `counted` says, if it is given, of a request from 0 to
B - 1. Sums of integers are the same in any order, so they are defined to the bit. They say how much
of an output an owner's expert had a part in, as FlexOlmo (arXiv 2507.07024) lets owners ask.

No gradient.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = 2.0**32


def attribute(
    indices_TK: Tensor,
    weights_TK: Tensor,
    num_requests: int,
    num_experts: int,
    *,
    request: Tensor | None = None,
    counted: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """rows (B, E) int64 and weight_sum (B, E) float64."""
    T = indices_TK.shape[0]
    if request is None:
        request = torch.arange(T, device=indices_TK.device) // max(1, T // max(1, num_requests))
    if counted is not None:
        request = request.masked_fill(~counted.reshape(-1), -1)
    units_TK = torch.floor(weights_TK.double() * UNITS + 0.5).long()
    rows = torch.zeros(num_requests, num_experts, dtype=torch.int64, device=indices_TK.device)
    weight_sum = torch.zeros_like(rows, dtype=torch.float64)
    for b in range(num_requests):
        ids, units = indices_TK[request == b], units_TK[request == b]
        for e in range(num_experts):
            rows[b, e] = (ids == e).sum()
            weight_sum[b, e] = units[ids == e].sum().double() / UNITS
    return rows, weight_sum
