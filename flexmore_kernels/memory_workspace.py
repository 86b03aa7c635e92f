"""Bytes that one MoE layer needs while it runs on a GPU, beyond its input and its weights.

T tokens, N = T K routed rows, w bytes a number, a = max(4, w) bytes where sums are kept; R_P the
sum of the ranks of projection P, each rounded up to 16, of the experts that are fused, r of those
that have rows of their own. What the kernels allocate (_triton/experts.py, own_rows.py,
experts_backward.py), which way by `schedule.choose`:

    forward, all      G, U: 2 T F w;  packed factors (D + F) (R_g + R_u + R_d) w;  y: T D w
      token-major     mixed T F w, s T (R_g + R_u + R_d) w;
                      without Hopper's kernels: rows of h, N F w, and W_d mixed, T D a
      own rows        h: N F w;  then the larger of  x by rows N D w and z T r w,  and of
                      full-size experts' y by rows N D w and, if an expert shares W_d,
                      mixed T F w, s, W_d mixed T D a
      expert-major    mixed T F w, h N F w, z and the deltas N D w; with full-size experts gate and
                      up by rows too, 2 N F w
    backward          gate, up, h, and the gradients of all three, by rows: 6 N F w;  of G and U
                      2 T F w;  of x T D (w + a), and by rows N D w where an expert has a delta
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import schedule
from .checkpoint_config import as_triple
from .projection import FULL, padded_rank, shared_of


class LayerSizes(NamedTuple):
    """One MoE layer: `ranks` as `FlexMoRE(expert_ranks=)` takes them."""

    hidden: int
    width: int
    ranks: Sequence
    top_k: int
    dtype: torch.dtype

    @property
    def layouts(self) -> list[tuple[int, ...]]:
        """Of gate, up and down, an int an expert: FULL, 0 or the rank."""
        triples = [as_triple(entry) for entry in self.ranks]
        return [
            tuple(FULL if triple[i] == "full" else triple[i] for triple in triples)
            for i in range(3)
        ]

    @property
    def bytes(self) -> tuple[int, int]:
        """w and a."""
        return self.dtype.itemsize, max(4, self.dtype.itemsize)

    @property
    def shares_hidden(self) -> bool:
        """Whether G and U are computed, and saved for the backward."""
        return len(self.ranks) == 1 or shared_of(self.layouts).hidden


def forward_bytes(layer: LayerSizes, tokens: int, hopper: bool = False) -> int:
    """The most that a forward of this layer allocates at a time, y and G and U included.

    hopper: the compiled library's kernels for an H100 run where they can.
    """
    (w, a), layouts = layer.bytes, layer.layouts
    T, D, F = tokens, layer.hidden, layer.width
    N = T * layer.top_k
    names = ("native", "triton") if hopper else ("triton",)
    how = schedule.choose(
        layouts, T, hidden=D, width=F, dtype=layer.dtype, kernels=names, decode=hopper
    )
    if how.route == "decode":
        return T * (D + layer.top_k * F) * a
    own = set(how.own)
    padded = [[padded_rank(max(r, 0)) for r in layout] for layout in layouts]
    ranks = [sum(r for e, r in enumerate(rows) if e not in own) for rows in padded]
    s = T * sum(ranks) * w
    packed = (D + F) * sum(ranks) * w
    bases = 2 * T * F * w if layer.shares_hidden else 0
    y, mixed, base_y = T * D * w, T * F * w, T * D * a
    if how.own:
        extra = any(FULL in layout for layout in layouts)
        z = T * sum(rows[e] for rows in padded[:2] for e in own) * w
        s_own = T * sum(padded[2]) * w
        first = N * D * w + z
        second = y + (N * D * w if extra else 0)
        second += mixed + s + s_own + base_y if shared_of(layouts).down else 0
        return bases + packed + N * F * w + max(first, second)
    rows = N * F * w
    if how.all_fused:
        needs_rows = 0 if hopper or not ranks[2] else rows + base_y
        return bases + packed + mixed + s + y + needs_rows
    if how.by_library:
        return bases + packed + mixed + base_y + y + N * max(padded[2], default=0) * w
    full = 2 * rows if "full" in how.ways else 0
    return bases + packed + mixed + rows + full + N * D * w + base_y + y


def backward_bytes(layer: LayerSizes, tokens: int, trains_base: bool) -> int:
    """The most that a backward of this layer allocates at a time, beyond dy and what was saved.

    trains_base: whether the full-size weights get gradients (those themselves not counted).
    """
    (w, a), layouts = layer.bytes, layer.layouts
    T, D, F = tokens, layer.hidden, layer.width
    N = T * layer.top_k
    low_rank = any(r > 0 for layout in layouts for r in layout)
    extra_full = any(FULL in layout[1:] for layout in layouts)
    packed = (D + F) * sum(padded_rank(max(r, 0)) for layout in layouts for r in layout) * w
    recomputed = 0 if layer.shares_hidden else 2 * T * F * w
    own_rows = N * D * w * (int(low_rank) + int(extra_full))
    mixed = T * F * w if trains_base else 0
    return 6 * N * F * w + 2 * T * F * w + T * D * (w + a) + packed + recomputed + own_rows + mixed
