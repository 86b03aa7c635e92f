"""The ragged axis: one axis cut into E consecutive segments, some possibly empty.

Two such axes carry the whole library: the *rows per expert* (routed rows sorted by expert; change
with every batch, offsets live on the device) and the *rank per expert* (rank columns laid end to
end; fixed per layer, offsets are Python ints). `RoutingPlan` is what sorting found.

Worked example (asserted by tests/test_ragged.py): T = 5 tokens, E = 3 experts, K = 2, and ranks
2, 0, 3. The tokens chose

    indices = [[0, 2], [2, 1], [2, 3], [0, 1], [3, 3]]        # 3 = E marks an empty slot

A slot is a position t*K + k of `indices`; the ten slots 0..9 become N = T*K = 10 rows:

    row_offsets   = [0, 2, 4, 7]                 # expert 0 owns rows 0-1, 1 owns 2-3, 2 owns 4-6
    row_to_slot   = [0, 6, 3, 7, 1, 2, 4, -1, -1, -1]           # the tail belongs to no expert
    slot_to_row   = [[0, 4], [5, 2], [6, -1], [1, 3], [-1, -1]]
    expert_to_row = [[0, -1, 4], [-1, 2, 5], [-1, -1, 6], [1, 3, -1], [-1, -1, -1]]
    token_order   = [4, 3, 2, 0, 1]              # by expert set: {}, {0,1}, {2}, {0,2}, {1,2}

A tensor that is ragged in both axes, such as z = A_e x, holds for each row only the columns of its
expert: expert e's block is (row count, rank) row-major and the blocks lie end to end,

    ranks = (2, 0, 3), rank offsets = [0, 2, 2, 5]
    z block offsets = [0, 4, 4]                  # 2 rows x 2, 2 rows x 0, 3 rows x 3: 13 numbers
    packed_size(ranks, 5, 2) = 5 * (3 + 2) = 25  # what is allocated: no sync to learn the 13
"""

from __future__ import annotations

import concurrent.futures
import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

MAX_SET_EXPERTS = 8
"""Up to this many experts a plan also sorts the tokens by their set of experts."""


class Ragged(NamedTuple):
    """An axis cut into E segments; segment e is [offsets[e], offsets[e + 1]).

    offsets is a tuple of E + 1 ints (ranks) or an int32 tensor of shape (E + 1,) (rows).
    """

    offsets: tuple[int, ...] | Tensor

    @classmethod
    def from_sizes(cls, sizes: Sequence[int]) -> Ragged:
        """The axis whose segment e has sizes[e] entries."""
        return cls((0, *itertools.accumulate(int(size) for size in sizes)))

    @property
    def num_segments(self) -> int:
        return len(self.offsets) - 1

    @property
    def sizes(self) -> tuple[int, ...]:
        """Sizes as ints; reads the offsets on the host when they are a tensor."""
        offsets = self.offsets.tolist() if isinstance(self.offsets, Tensor) else self.offsets
        return tuple(b - a for a, b in itertools.pairwise(offsets))


class RoutingPlan(NamedTuple):
    """Where each routed slot goes when rows are sorted by expert. See the module's example.

    T tokens, K slots a token, N = T*K rows, E experts. Sizes depend on T, K and E alone.
    """

    indices: Tensor  # (T, K) int64, as given; an id outside [0, E) is an empty slot
    row_to_slot: Tensor  # (N,) int32, -1 past the last routed row
    slot_to_row: Tensor  # (T, K) int32, -1 for an empty slot
    row_offsets: Tensor  # (E + 1,) int32
    token_order: Tensor  # (T,) int32 for E <= MAX_SET_EXPERTS, else (0,)
    expert_to_row: Tensor  # (T, E) int32 for E <= MAX_SET_EXPERTS, else (0, 0)
    num_experts: int
    top_k: int

    @property
    def rows(self) -> Ragged:
        """The rows as a ragged axis of E segments."""
        return Ragged(self.row_offsets)

    @property
    def num_rows(self) -> int:
        """N = T*K, empty slots included."""
        return self.row_to_slot.shape[0]

    @property
    def num_tokens(self) -> int:
        return self.slot_to_row.shape[0]


class StackedFactors(NamedTuple):
    """One projection of all E experts with the low-rank factors stacked, for many experts.

    full: E entries, a full-size weight (out, in) or None; entry 0, the base, is required.
    a (R, in) and b (out, R) hold the experts' factors end to end, expert e in rows (columns)
    [offset_e, offset_e + ranks[e]); ranks has E ints, 0 where an expert has no factors.
    """

    full: tuple[Tensor | None, ...]
    a: Tensor
    b: Tensor
    ranks: tuple[int, ...]


def rank_offsets(ranks: Sequence[int]) -> tuple[int, ...]:
    """E + 1 offsets of the rank axis: the exclusive prefix sum of ranks, then their total R."""
    return (0, *itertools.accumulate(ranks))


def packed_size(ranks: Sequence[int], num_tokens: int, top_k: int) -> int:
    """Length that holds z for any routing: T * (sum of the K largest ranks).

    A token's experts are distinct, so no token needs more than the K largest ranks together.
    """
    return num_tokens * sum(sorted(ranks, reverse=True)[:top_k])


def joined(parts: Sequence[Tensor], dim: int) -> Tensor:
    """The matrices side by side; a view where they lie so in one storage, else a copy."""
    first, place = parts[0], parts[0].storage_offset()
    storage = first.untyped_storage().data_ptr()
    for part in parts:
        apart = part.storage_offset() != place or part.untyped_storage().data_ptr() != storage
        if apart or part.stride() != first.stride():
            return torch.cat(tuple(parts), dim)
        place += part.shape[dim] * first.stride(dim)
    size = list(first.shape)
    size[dim] = sum(part.shape[dim] for part in parts)
    return first.as_strided(size, first.stride(), first.storage_offset())


def rows_to_slots(values: Tensor, slot_to_row: Tensor) -> Tensor:
    """A number a row (N,) as a number a slot (T, K); 0 for empty slots."""
    if values.shape[0] == 0:
        return values.new_zeros(slot_to_row.shape)
    return torch.where(slot_to_row >= 0, values[slot_to_row.clamp(min=0).long()], 0)


# For good: a captured graph may read a table that nobody else uses any more. In another thread:
# what this one allocates while torch.compile warms up a CUDA graph belongs to the graph.
@functools.cache
def device_constant(
    values: tuple, device: torch.device, dtype: torch.dtype = torch.int32
) -> Tensor:
    """A small tensor of numbers that a layer fixes, made once a device."""
    with concurrent.futures.ThreadPoolExecutor(1) as apart:
        return apart.submit(torch.tensor, values, dtype=dtype, device=device).result()


def ranks_tensor(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """ranks, or other ints a layer fixes for its experts, as int32 on the device, made once."""
    return device_constant(tuple(ranks), device)


def rank_offsets_tensor(ranks: tuple[int, ...], device: torch.device) -> Tensor:
    """rank_offsets as an int32 tensor (E + 1,) on the device, made once per (ranks, device)."""
    return device_constant(rank_offsets(ranks), device)


SORTED, SEGMENT, TOKEN = 0, 1, 2
"""Where row i of an expert's segment is: at its sorted row, at i, at its token's row."""


class Term(NamedTuple):
    """left right^T + base for the rows of an expert; each part may be missing."""

    left: Tensor | None = None  # (rows, depth)
    # (width, depth), or a sum's the transposed view of (depth, width), which is read as it lies;
    # what it lacks of left's depth or out's width is 0
    right: Tensor | None = None
    base: Tensor | None = None  # (T, width), added by token
    place: int = SORTED  # of left's rows, not TOKEN


class RowProducts(NamedTuple):
    """Work on the rows of one expert (-1: on all rows), which goes to `out`."""

    expert: int
    out: Tensor
    first: Term
    second: Term = Term()


class RowGrads(NamedTuple):
    """out = left^T right, summed over the rows of one expert (-1: over all rows)."""

    expert: int
    out: Tensor  # (M, N), its rows may be apart
    left: Tensor  # (rows, M)
    right: Tensor  # (rows, N)
    left_place: int = SORTED  # of left's rows, not TOKEN
    right_place: int = SORTED
