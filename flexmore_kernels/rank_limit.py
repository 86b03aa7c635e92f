"""Rank as a dial: a call may use fewer ranks of an expert than it has, without a copy.

    W_e = W_0 + B_e[:, :r] A_e[:r]          r = min(rank, limit)

The first r rows of A and columns of B are views. They are the best that rank r can do where the
factors are nested, ordered by what they carry, as those of a decomposition are (`flexmore convert`,
`rerank_expert`). A limit of 0 leaves the base's own matrix. Source: FlexMoRE (arXiv 2602.08818),
whose experts of lower rank are the first singular triples of those of higher.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checkpoint_config import as_triple
from .checks import check_int
from .ragged import StackedFactors, rank_offsets

Limits = tuple[int | None, ...]


def check_rank_limit(rank_limit: Any, largest: Sequence[int]) -> Limits | None:
    """`rank_limit` as E entries, None where nothing limits; None if that is everywhere.

    largest: of each expert its largest rank, 0 if it has no factors. Raises TypeError or ValueError
    for another number of entries, one above the rank, or one for an expert without factors.
    """
    if rank_limit is None:
        return None
    count = len(largest)
    if isinstance(rank_limit, (str, bytes, Tensor)) or not isinstance(rank_limit, Sequence):
        raise TypeError(
            f"rank_limit: got {rank_limit!r}; accepted: {count} entries, one an expert, each None "
            "or a rank"
        )
    if len(rank_limit) != count:
        raise ValueError(f"rank_limit: got {len(rank_limit)} entries; accepted: {count}")
    found: list[int | None] = []
    for expert, (limit, rank) in enumerate(zip(rank_limit, largest, strict=True)):
        if limit is not None and not rank:
            raise ValueError(
                f"rank_limit[{expert}]: got {limit!r}; accepted: None, for an expert without "
                "factors"
            )
        found.append(limit if limit is None else check_int(f"rank_limit[{expert}]", limit, 0, rank))
    return tuple(found) if any(limit is not None for limit in found) else None


def largest_ranks_of(expert_ranks: Sequence) -> list[int]:
    """Of each entry of `expert_ranks` the largest rank, 0 without factors."""
    triples = map(as_triple, expert_ranks)
    # A list: a compiler does not know max with a default.
    return [max([0, *(kind for kind in triple if kind != "full")]) for triple in triples]


def limited(weights: Sequence[Any], limits: Limits) -> list[list[Any]]:
    """gate, up and down, as `ops.experts` takes them, of the first ranks alone: views."""
    return [
        [_first(entry, limit) for entry, limit in zip(_entries(side), limits, strict=True)]
        for side in weights
    ]


def _first(entry: Any, limit: int | None) -> Any:
    if limit is None or not isinstance(entry, tuple) or entry[0].shape[0] <= limit:
        return entry
    a, b = entry
    return (a[:limit], b[:, :limit]) if limit else None


def _entries(side: Any) -> list[Any]:
    if not isinstance(side, StackedFactors):
        return list(side)
    offsets = rank_offsets(side.ranks)
    return [
        (side.a[start : start + rank], side.b[:, start : start + rank]) if rank else full
        for full, start, rank in zip(side.full, offsets, side.ranks, strict=False)
    ]


def fitted(limits: Limits, expert_ranks: Sequence) -> Limits:
    """The limits for one layer, some of whose experts may have fewer ranks, or none."""
    largest = largest_ranks_of(expert_ranks)
    return tuple(
        None if limit is None or limit >= rank else limit
        for limit, rank in zip(limits, largest, strict=True)
    )


class RequestGroup(NamedTuple):
    """Requests of one limit; rows: their places in the batch, None where all have it."""

    limits: Limits | None
    rows: Tensor | None


class RequestLimits:
    """The limits of the requests of a batch, grouped: a layer runs once for each group.

    Args:
        rank_limit: E entries for all requests, or a sequence of B of them, each E entries or None.
        largest: of each expert its largest rank in any layer. batch: B. device: the model's.

    Raises as `check_rank_limit`, naming the request.
    """

    def __init__(self, rank_limit: Any, largest: Sequence[int], batch: int, device) -> None:
        nested = isinstance(rank_limit, Sequence) and any(
            isinstance(entry, Sequence) and not isinstance(entry, str) for entry in rank_limit
        )
        if nested and len(rank_limit) != batch:
            raise ValueError(
                f"rank_limit: got {len(rank_limit)} requests' limits; accepted: {batch}"
            )
        each = rank_limit if nested else [rank_limit]
        self.each = tuple(check_rank_limit(one, largest) for one in each) * (1 if nested else batch)
        by_limits: dict[Limits | None, list[int]] = {}
        for row, limits in enumerate(self.each):
            by_limits.setdefault(limits, []).append(row)
        by_limits = by_limits or {None: []}  # no request: the layer runs on nothing
        one = len(by_limits) == 1
        self.groups = [
            RequestGroup(limits, None if one else torch.tensor(rows, device=device))
            for limits, rows in by_limits.items()
        ]
        order = [row for rows in by_limits.values() for row in rows]
        places = [order.index(row) for row in range(batch)]
        self._places = None if one else torch.tensor(places, device=device)

    def run(
        self,
        layer: Callable,
        h: Tensor,
        mask: Tensor | None,
        expert_ranks: Sequence,
        return_routing: bool,
    ) -> Any:
        """layer(h (B, S, D), ...) with each request's own limit; with its routing if asked."""
        found = []
        for limits, rows in self.groups:
            own_mask = mask
            if rows is not None and mask is not None and mask.dim() > 1:
                own_mask = mask[rows]
            found.append(
                layer(
                    h if rows is None else h[rows],
                    expert_mask=own_mask,
                    rank_limit=None if limits is None else fitted(limits, expert_ranks),
                    return_routing=return_routing,
                )
            )
        if self._places is None:
            return found[0]
        if not return_routing:
            return torch.cat(found)[self._places]
        routings = [routing for _, routing in found]
        whole = (torch.cat(parts)[self._places] for parts in zip(*routings, strict=True))
        return torch.cat([y for y, _ in found])[self._places], type(routings[0])(*whole)
