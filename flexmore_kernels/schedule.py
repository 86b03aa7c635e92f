"""Which way each expert is computed, chosen from sizes alone: ranks, E, K, T, dtype, device.

Nothing here looks at a tensor, so a choice never waits for the device and is the same for each
routing of a shape. The forward asks `choose`, and `flexmore bench --explain` prints what it says.

Routes, of the whole forward:
    decode        few tokens, inference: the compiled library, bound by the bytes of the weights
    token-major   few experts: tokens stay in order, sums of small ranks are dense in them
    expert-major  many experts: rows sorted by expert
    loop          plain PyTorch, one expert after the other
Ways, of one expert:
    base     no delta of its own in gate and up (where `by_library`, nor in down): what the base
             computes for every token serves it
    fused    small ranks: expanded where the hidden sum is formed, no row of it is gathered
    grouped  larger ranks, or a down matrix alone: ragged products over its own rows
    full     a matrix of its own (full-size, or merged by `layer.prepare`): grouped GEMMs
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from .projection import FULL, shared_of
from .ragged import MAX_SET_EXPERTS

DECODE_TOKENS = 64
"""Up to this many tokens a forward is bound by reading the weights once."""

DECODE_EXPERTS = 16
"""The library's kernels for few tokens hold so many experts' pointers in their arguments."""

FUSED_RANK = 64
"""One block of rank columns: a step of the token-major kernels is one product a projection."""

SWEPT_RANK = 32
"""The library's kernels for many experts hold so many columns of a delta at a time."""

OWN_TOKENS = 512
"""From so many tokens on, experts that cannot be fused have rows of their own while others are
fused; with fewer, their rows do not fill large tiles, and all experts go one way."""

HOPPER_TOKENS = 1024
"""Fewer leave multiprocessors without one of the tiles of Hopper's grouped GEMM, 128 x 256, where
all tokens' rows are its one group."""


class Schedule(NamedTuple):
    """What `choose` decided; the module's text has the names."""

    route: str
    ways: tuple[str, ...]  # E
    dense_down: bool  # the down deltas as one product dense in tokens, not by rows
    own: tuple[int, ...] = ()  # experts whose rows are sorted while others' tokens stay in order
    by_library: bool = False  # decode, or the sweep over many experts: what the library fuses

    @property
    def all_fused(self) -> bool:
        """Whether no expert needs rows of gate and up of its own."""
        return self.route == "token-major" and not {"grouped", "full"} & set(self.ways)


def choose(
    layouts: Sequence[Sequence[int]],
    tokens: int,
    *,
    hidden: int,
    width: int,
    dtype: torch.dtype,
    kernels: Sequence[str] = ("triton",),
    decode: bool = True,
) -> Schedule:
    """The schedule of one forward.

    Args:
        layouts: of gate, up and down, an int an expert: `FULL`, 0 for no delta, or the rank.
        tokens, hidden, width: T, D, F.
        kernels: which can be used, of `backend.NAMES`; "native" is the library's on this GPU.
        decode: whether the kernels for few tokens may serve: not where a backward needs more than
            they keep, or where tensors do not lie as they read them.
    """
    few, many = decode and tokens <= DECODE_TOKENS, tokens >= OWN_TOKENS
    layouts, kernels = tuple(map(tuple, layouts)), tuple(kernels)
    how = _choose(layouts, few, many, hidden, width, dtype, kernels)
    for seen in _watching:
        seen.append(how)
    return how


_watching: list[list[Schedule]] = []


@contextlib.contextmanager
def watch() -> Iterator[list[Schedule]]:
    """Within, every choice is kept in the list: what forwards run, as they ask for it."""
    seen: list[Schedule] = []
    _watching.append(seen)
    try:
        yield seen
    finally:
        _watching.remove(seen)


@functools.lru_cache(maxsize=256)
def _choose(layouts, few, many, hidden, width, dtype, kernels) -> Schedule:
    gate, up, down = layouts
    by_set = len(gate) <= MAX_SET_EXPERTS
    fusable = (
        "native" in kernels
        and dtype in (torch.bfloat16, torch.float16)
        and not any(FULL in layout[1:] for layout in layouts)
        and hidden % 8 == 0
        and width % 8 == 0
    )
    if fusable and few and len(gate) <= DECODE_EXPERTS:
        return Schedule("decode", _fused_ways(layouts), False, by_library=True)
    if "triton" in kernels:
        route = "token-major" if by_set else "expert-major"
    else:
        route = "loop"
    if route == "token-major" and many and len(gate) > 1:
        ways = _mixed_ways(layouts)
        own = tuple(e for e, way in enumerate(ways) if way in ("grouped", "full"))
        return Schedule(route, ways, True, own)
    if route == "expert-major" and fusable and max(map(max, layouts)) <= SWEPT_RANK:
        return Schedule(route, _fused_ways(layouts), False, by_library=True)
    entries = list(zip(*layouts, strict=True))[1:]
    small = all(0 <= rank <= FUSED_RANK for own in entries for rank in own[:2])
    small = small and FULL not in down[1:]
    low_rank = "fused" if by_set and small and route != "loop" else "grouped"
    ways = ("base", *(_way(own, low_rank) for own in entries))
    return Schedule(route, ways, route != "loop" and by_set and FULL not in down[1:])


def _way(entries: tuple[int, int, int], low_rank: str) -> str:
    if FULL in entries[:2]:
        return "full"
    # A down matrix of its own reads rows of its own, be gate and up the base's.
    return low_rank if any(entries[:2]) or entries[2] == FULL else "base"


def _fused_ways(layouts: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    entries = list(zip(*layouts, strict=True))[1:]
    return ("base", *("fused" if any(own) else "base" for own in entries))


def _mixed_ways(layouts: tuple[tuple[int, ...], ...]) -> tuple[str, ...]:
    """Each expert by its own three entries; the base is full-size as others if none shares it."""
    ways = []
    for entries in list(zip(*layouts, strict=True))[1:]:
        small = "fused" if any(entries[:2]) else "base"
        large = "grouped" if max(entries) > FUSED_RANK else small
        ways.append("full" if FULL in entries else large)
    return ("base" if all(shared_of(layouts)) else "full", *ways)
