"""Gradients of one projection's weights as a backward finds them, expert by expert or packed."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..projection import RANK_MULTIPLE, Projection

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

    def put_packed(self, which: int, grad: Tensor | None, experts=None) -> None:
        """Of all experts, or of `experts` in this order: a (R, in) or b (out, R), ranks padded."""
        if grad is None:
            return
        padded, first = self.side.padded_ranks(RANK_MULTIPLE), 0
        for e in range(len(padded)) if experts is None else experts:
            if self.wants(which)[e]:
                self.put(which, e, grad.narrow(which, first, padded[e]))
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
