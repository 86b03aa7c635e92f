"""Gradients of one projection's weights as a backward finds them, expert by expert or packed."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from ..projection import RANK_MULTIPLE, Projection
from ..ragged import joined

A, B = 0, 1


class Gradients:
    """full: of full-size weights, by expert. Of factors: `put`, `put_packed`."""

    def __init__(self, side: Projection, needs: Projection) -> None:
        self.side, self.needs = side, needs
        self.full: dict[int, Tensor] = {}
        self._factors: tuple[dict[int, Tensor], dict[int, Tensor]] = {}, {}

    def wants(self, which: int) -> list[bool]:
        """Of each expert, whether its factor A (0) or B (1) needs a gradient."""
        pairs = zip(self.side.ranks, self.needs.need_pairs(), strict=True)
        return [bool(rank) and pair[which] for rank, pair in pairs]

    def wants_any(self, which: int) -> bool:
        return any(self.wants(which))

    def put(self, which: int, expert: int, grad: Tensor) -> None:
        """Of one expert: a (r, in) or b (out, r), or padded to more ranks."""
        self._factors[which][expert] = grad.narrow(which, 0, self.side.ranks[expert])

    def columns(self, which: int, packed: Tensor) -> tuple[Tensor, list[int]]:
        """Of columns by expert, ranks padded, those whose factor is wanted; and of whom."""
        padded, wanted = self.side.padded_ranks(RANK_MULTIPLE), self.wants(which)
        experts = [e for e in range(len(padded)) if wanted[e]]
        parts = packed.split(padded, 1)
        return joined([parts[e] for e in experts], 1) if experts else packed[:, :0], experts

    def put_packed(self, which: int, grad: Tensor | None, experts: Sequence[int]) -> None:
        """Of `experts` in this order: a (R, in) or b (out, R), ranks padded."""
        if grad is None:
            return
        padded, wanted, first = self.side.padded_ranks(RANK_MULTIPLE), self.wants(which), 0
        all_wanted = all(wanted[e] for e in experts if padded[e])
        for e in experts:
            if wanted[e]:
                own = grad.narrow(which, first, padded[e])
                # A view of rows would keep the memory of all for as long as the gradient lives.
                self.put(which, e, own if all_wanted else own.clone())
            first += padded[e]

    def collect(self) -> Projection:
        """As a projection of gradients; None where none was found."""
        side = self.side
        full = tuple(self.full.get(e) for e in range(len(side.layout)))
        experts = [e for e, rank in enumerate(side.ranks) if rank]
        columns = [[own.get(e) for e in experts] for own in self._factors]
        if side.stacked:
            columns = [[_joined(parts, axis)] for axis, parts in enumerate(columns)]
        return Projection(full, tuple(itertools.zip_longest(*columns)), side.layout, side.stacked)


def _joined(parts: list[Tensor | None], axis: int) -> Tensor | None:
    return None if not parts or parts[0] is None else torch.cat(parts, axis)
