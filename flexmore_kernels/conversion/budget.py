"""A budget of parameters or bytes, spent where it lowers the error most.

    minimise   sum over matrices m of e_m(r_m),   e_m(r) = sum_{i > r} s_{m,i}^2,   e_m("full") = 0
    such that  sum of cost(r_m) <= budget,   cost(r) = r (D + F),   cost("full") = D F,   r_m >= 1

Every projection has the same D + F and D F, so all ranks have one price. Hence, given which
matrices are full-size, the best is exact and simple: the largest s^2 of all others together, as
many as can be paid (s descend, so these are each matrix's first). Ranks end below D F / (D + F),
where full-size costs no more and has no error.

Which are full-size: on the concave hull of a matrix's gain over its cost, the last piece goes from
the rank that minimises m = e(r) / (D F - r (D + F)) to full-size, and m is its gain a parameter.
With f matrices full-size, those of the largest m, the choice by one price of error (all pieces of a
higher gain) is the best at its own cost, whatever that is (Everett 1963). Bisection finds the
largest f whose cost is within the budget. The remaining piece is indivisible: f - 1, f and f + 1
are all completed with ranks, and the least error wins. Without it the result is optimal; in any
case its error is above the optimum by at most that one piece's gain.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

Key = tuple[int, int, str]
Ranks = dict[Key, int | str]


def spend(
    spectra: Mapping[Key, Tensor],
    sizes: tuple[int, int],
    budget: int,
    *,
    other: int = 0,
    itemsize: int = 1,
    unit: str = "params",
) -> Ranks:
    """Ranks or "full" of the least sum of squared errors within the budget.

    Args:
        spectra: all singular values of each matrix, descending.
        sizes: hidden_size D and intermediate_size F.
        budget, other: what may be spent, and what of it is spent already; in parameters, or, with
            `itemsize` bytes for each parameter, in bytes. `unit` is what an error message calls it.

    Raises ValueError when even rank 1 everywhere costs more, with the least budget there is.
    """
    D, F = sizes
    rank_cost, full_cost = (D + F) * itemsize, D * F * itemsize
    most = (D * F - 1) // (D + F)  # ranks above cost as much as full-size
    least = len(spectra) * (rank_cost if most else full_cost)
    left = budget - other - least
    if left < 0:
        raise ValueError(
            f"rule: {unit}:{budget} cannot be met: rank 1 in all {len(spectra)} matrices is {least}"
            f" {unit}, beside {other} for the rest; the least is {unit}:{other + least}"
        )
    if not most:
        return dict.fromkeys(spectra, "full")
    gains, errors = _gains(spectra, min(sizes), most)
    costs = full_cost - rank_cost * torch.arange(1, most + 1, dtype=torch.float64)
    slopes = (errors / costs).min(1).values
    order = slopes.argsort(descending=True, stable=True)
    useful = int((slopes > 0).sum())

    def cost_by_price(count: int) -> int:
        """What is spent when `count` matrices are full-size, and ranks of at least their gain."""
        price = slopes[order[count - 1]] * rank_cost
        ranks = int((gains[order[count:]] >= price).sum())
        return count * (full_cost - rank_cost) + ranks * rank_cost

    low, high = 0, useful
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if cost_by_price(middle) <= left else (low, middle - 1)
    best, found = None, None
    for count in range(max(0, low - 1), min(useful, low + 1) + 1):
        payable = (left - count * (full_cost - rank_cost)) // rank_cost
        if payable < 0:
            continue
        ranks = _largest(gains, order[:count], payable)
        remaining = errors.gather(1, (ranks - 1)[:, None])[:, 0]
        remaining[order[:count]] = 0
        if best is None or float(remaining.sum()) < best:
            best, found = float(remaining.sum()), (set(order[:count].tolist()), ranks.tolist())
    full, ranks = found
    return {key: "full" if i in full else ranks[i] for i, key in enumerate(spectra)}


def _gains(spectra: Mapping[Key, Tensor], width: int, most: int) -> tuple[Tensor, Tensor]:
    """s_i^2 for i = 2 .. most (M, most - 1), and the errors of ranks 1 .. most (M, most)."""
    squares = torch.zeros(len(spectra), width, dtype=torch.float64)
    for row, s in zip(squares, spectra.values(), strict=True):
        row[: len(s)] = s.detach().cpu().double().square()
    tails = squares.flip(1).cumsum(1).flip(1)
    tails = torch.cat([tails, torch.zeros(len(spectra), 1, dtype=torch.float64)], 1)
    return squares[:, 1:most].contiguous(), tails[:, 1 : most + 1].contiguous()


def _largest(gains: Tensor, full: Tensor, count: int) -> Tensor:
    """Ranks (M,): 1, and as many more as a matrix has of the `count` largest positive gains."""
    open_gains = gains.clone()
    open_gains[full] = 0
    flat = open_gains.flatten()
    chosen = flat.argsort(descending=True, stable=True)[: min(count, int((flat > 0).sum()))]
    width = max(1, gains.shape[1])
    return 1 + torch.bincount(chosen // width, minlength=len(gains))
