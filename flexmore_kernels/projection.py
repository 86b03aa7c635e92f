"""One projection (gate, up or down) of all E experts: which are full-size, which are low-rank.

The kernels' view of a layer's weights, and of their gradients: `Projection` also holds, in the same
places, the gradients or the booleans that say which are needed. `flatten` and `unflatten` turn
three of them into what an op's schema can carry, a flat list of tensors and a list of ints.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .ragged import joined, rank_offsets
from .slow_paths import warn_once

RANK_MULTIPLE = 16
"""Packed factors are padded to multiples of this, the depth of a tensor core's product."""

FULL = -1
"""Layout entry of an expert with a full-size weight; 0 means no delta, r > 0 a rank."""


class Shared(NamedTuple):
    """What experts besides 0 use of the base."""

    hidden: bool  # G and U
    down: bool


def shared_of(layouts: Sequence[Sequence[int]]) -> Shared:
    """By the layouts of gate, up and down."""
    gate, up, down = ([kind != FULL for kind in layout[1:]] for layout in layouts)
    return Shared(any(gate + up), any(down))


def padded_rank(rank: int, multiple: int = RANK_MULTIPLE) -> int:
    """The rank rounded up to a multiple."""
    return -(-rank // multiple) * multiple


def _kept(function: Callable) -> Callable:
    """An lru_cache, since a layer of 512 experts asks for its ranks dozens of times a call; but not
    for torch.compile, which does not trace through one.
    """
    kept = functools.lru_cache(maxsize=1024)(function)
    return lambda *args: (function if torch.compiler.is_compiling() else kept)(*args)


@_kept
def _ranks(layout: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(max(entry, 0) for entry in layout)


@_kept
def _padded(layout: tuple[int, ...], multiple: int) -> tuple[int, ...]:
    return tuple(padded_rank(max(entry, 0), multiple) for entry in layout)


class Projection(NamedTuple):
    """W_e = full[e] if given, else full[0] + b_e a_e, else (no factors) full[0].

    full: E entries, (out, in) or None. layout: E ints, `FULL`, 0 or the rank. factors: one pair
    (a (r, in), b (out, r)) for each expert with a rank, in order; or, stacked, a single pair
    (a (R, in), b (out, R)).
    """

    full: tuple[Any, ...]
    factors: tuple[tuple[Any, Any], ...]
    layout: tuple[int, ...]
    stacked: bool

    @property
    def ranks(self) -> tuple[int, ...]:
        """E ranks, 0 for experts without factors."""
        return _ranks(self.layout)

    @property
    def extra_full(self) -> list[Any]:
        """The full-size weights of experts 1.., None elsewhere."""
        return [None, *self.full[1:]]

    @property
    def has_extra_full(self) -> bool:
        """Whether an expert besides the base is full-size."""
        return FULL in self.layout[1:]

    @property
    def tensors(self) -> list[Any]:
        """The entries that are there, in the order of `flatten`."""
        full = [weight for weight, kind in zip(self.full, self.layout, strict=True) if kind == FULL]
        return full + [side for pair in self.factors for side in pair]

    def like(self, entries: Sequence[Any]) -> Projection:
        """A projection of the same layout with other entries, given in the order of `tensors`."""
        entries = iter(entries)
        full = tuple(next(entries) if kind == FULL else None for kind in self.layout)
        factors = tuple((next(entries), next(entries)) for _ in self.factors)
        return Projection(full, factors, self.layout, self.stacked)

    def without(self, experts: Sequence[int]) -> Projection:
        """The same, but these experts (not 0) have no delta; views of factors, unstacked."""
        if not any(self.layout[e] for e in experts):
            return self
        left = [e not in experts or e == 0 for e in range(len(self.layout))]
        pairs = zip(self.factor_pairs(), left, strict=True)
        return Projection(
            tuple(w if keep else None for w, keep in zip(self.full, left, strict=True)),
            tuple(pair for pair, keep in pairs if pair is not None and keep),
            tuple(kind if keep else 0 for kind, keep in zip(self.layout, left, strict=True)),
            False,
        )

    def factor_pairs(self) -> list[tuple[Any, Any] | None]:
        """Each expert's own (a, b), or None; views of the stacked ones."""
        if not self.stacked:
            pairs = iter(self.factors)
            return [next(pairs) if rank else None for rank in self.ranks]
        ((a, b),) = self.factors
        offsets = rank_offsets(self.ranks)
        return [
            (a[start : start + rank], b[:, start : start + rank]) if rank else None
            for start, rank in zip(offsets, self.ranks, strict=False)
        ]

    def need_pairs(self) -> list[tuple[bool, bool] | None]:
        """Of a projection of booleans: each expert's (a, b) or None; if stacked, the stack's."""
        return [self.factors[0]] * len(self.layout) if self.stacked else self.factor_pairs()

    def factor_needs(self) -> tuple[list[bool], list[bool]]:
        """Of a projection of booleans: those of each a, and those of each b."""
        if not any(self.ranks):
            return [], []
        return [a for a, _ in self.factors], [b for _, b in self.factors]

    def padded_ranks(self, multiple: int) -> tuple[int, ...]:
        """The ranks rounded up to a multiple."""
        return _padded(self.layout, multiple)

    def pack_a(self, multiple: int) -> Tensor:
        """All of a as (R, in), each rank padded with zeros to a multiple."""
        return self._pack(0, multiple)

    def pack_b(self, multiple: int) -> Tensor:
        """All of b as (out, R), padded alike."""
        return self._pack(1, multiple)

    def _pack(self, which: int, multiple: int) -> Tensor:
        base = self.full[0]
        size = base.shape[1 - which]

        def zeros(rank: int) -> Tensor:
            return base.new_zeros((size, rank) if which else (rank, size))

        if not any(self.ranks):
            return zeros(0)
        if self.stacked:
            if self.padded_ranks(multiple) == self.ranks:
                return self.factors[0][which]
            warn_once(
                "padded factors",
                f"Stacked factors are copied and padded at each call, since not all ranks are "
                f"multiples of {multiple}; those that are, are read in place.",
            )
        parts = []
        most = max(-rank % multiple for rank in self.ranks)
        filler = zeros(most) if most else None
        for pair in self.factor_pairs():
            if pair is None:
                continue
            parts.append(pair[which])
            padding = -pair[0].shape[0] % multiple
            if padding:
                parts.append(filler.narrow(which, 0, padding))
        return joined(parts, which)

    def unpack(self, da: Tensor | None, db: Tensor | None, multiple: int) -> list[tuple]:
        """Packed gradients of a (R, in) and of b, transposed (R, out), as those of `factors`."""
        offsets = rank_offsets(self.padded_ranks(multiple))
        spans = [(start, rank) for start, rank in zip(offsets, self.ranks, strict=False) if rank]

        def rows(grad: Tensor | None) -> list[Tensor | None]:
            if grad is None:
                return [None] * len(spans)
            return [grad[start : start + rank] for start, rank in spans]

        rows_a, rows_b = rows(da), rows(db)
        if self.stacked:
            return [
                (
                    None if da is None else torch.cat(rows_a),
                    None if db is None else torch.cat(rows_b).T,
                )
            ]
        return [(a, None if b is None else b.T) for a, b in zip(rows_a, rows_b, strict=True)]


def flatten(projections: Sequence[Projection]) -> tuple[list[Tensor], list[int]]:
    """(tensors, layout) of the projections, one after the other."""
    tensors = [tensor for projection in projections for tensor in projection.tensors]
    return tensors, [kind for projection in projections for kind in projection.layout]


def unflatten(
    entries: Sequence[Any], layout: Sequence[int], stacked: Sequence[bool]
) -> list[Projection]:
    """The projections whose entries `flatten` listed."""
    num_experts = len(layout) // len(stacked)
    projections, start = [], 0
    for index, is_stacked in enumerate(stacked):
        kinds = tuple(layout[index * num_experts : (index + 1) * num_experts])
        num_pairs = 1 if is_stacked else sum(kind > 0 for kind in kinds)
        shape = Projection((None,) * num_experts, ((None, None),) * num_pairs, kinds, is_stacked)
        count = kinds.count(FULL) + 2 * num_pairs
        projections.append(shape.like(entries[start : start + count]))
        start += count
    return projections
