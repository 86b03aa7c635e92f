"""Bytes that one MoE layer needs while it runs on a GPU, beyond its input and its weights.

T tokens, N = T K routed rows, w bytes a number, a = max(4, w) bytes where sums are kept; R_P the
sum of the ranks of projection P, each rounded up to 16, of the experts that are fused, r of those
that have rows of their own. What the kernels allocate (_triton/experts.py, own_rows.py,
token_backward.py, experts_backward.py), which way by `schedule.choose`:

    forward, all      G, U: 2 T F w;  packed factors (D + F) (R_g + R_u + R_d) w;  y: T D w
      token-major     mixed T F w, s T (R_g + R_u + R_d) w;
                      without Hopper's kernels: rows of h, N F w, and W_d mixed, T D a
      own rows        h: N F w;  then the larger of  x by rows N D w and z T r w,  and of
                      full-size experts' y by rows N D w and, if an expert shares W_d,
                      mixed T F w, s, W_d mixed T D a
      expert-major    mixed T F w, h N F w, z and the deltas N D w; with full-size experts gate and
                      up by rows too, 2 N F w
    backward, few       dmixed, of G and U: 3 T F w;  s, q and ds: T (2 R_g + 2 R_u + R_d) w;  of x
                      2 T D w;  packed factors twice, with their gradients;  what of the forward was
                      not saved (kept.py)
      without Hopper  rows of gate's, up's gradient and of h: 3 N F w
      own rows        h and the gradients of gate and up by rows: 3 N F w, and with gate and up
                      themselves, where they were not saved, 5 N F w;  x and dy by rows 2 N D w, of
                      full-size experts dx too N D w;  z, q and ds of their ranks: T 5 r w
    backward, many      gate, up, h, and the gradients of all three, by rows: 6 N F w;  of G and U
                      2 T F w;  of x T D (w + a), and by rows N D w where an expert has a delta;
                      G and U, 2 T F w, where they were not saved
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from . import kept, schedule
from .checkpoint_config import as_triple
from .projection import FULL, padded_rank, shared_of
from .ragged import MAX_SET_EXPERTS


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


def kept_bytes(
    layer: LayerSizes, tokens: int, trains_base: bool, recompute: bool = False, gpu: bool = True
) -> int:
    """What a forward keeps beside x and the routing, all factors being trained; see kept.py.

    gpu: on a CPU it is G and U alone.
    """
    flags = kept.possible(kept.flags(layer.layouts, True, trains_base, recompute), gpu)
    layout = [kind for side in layer.layouts for kind in side]
    sizes = kept.shapes(flags, tokens, layer.top_k, layer.width, layout)
    return sum(rows * columns for rows, columns in sizes) * layer.dtype.itemsize


def backward_bytes(
    layer: LayerSizes, tokens: int, trains_base: bool, recompute: bool = False, hopper: bool = False
) -> int:
    """The most that a backward of this layer allocates at a time, beyond dy and what was saved.

    trains_base: whether the full-size weights get gradients (those themselves not counted).
    recompute: only x was saved. hopper: as in `forward_bytes`.
    """
    (w, a), layouts = layer.bytes, layer.layouts
    T, D, F = tokens, layer.hidden, layer.width
    N = T * layer.top_k
    kinds = [kind for layout in layouts for kind in layout[1:]]
    padded = [padded_rank(max(kind, 0)) for layout in layouts for kind in layout]
    E, packed = len(layouts[0]), (D + F) * sum(padded) * w
    again = kept_bytes(layer, T, trains_base) - kept_bytes(layer, T, trains_base, recompute)
    how = schedule.choose(layouts, T, hidden=D, width=F, dtype=layer.dtype, decode=False)
    low_rank, extra_full = any(kind > 0 for kind in kinds), FULL in kinds
    small = not extra_full and max(kinds, default=0) <= schedule.FUSED_RANK
    if 1 < E <= MAX_SET_EXPERTS and (small or how.own):
        shared = shared_of(layouts)
        by_token = (2 * shared.hidden + shared.down) * T * F * w
        columns = T * (2 * sum(padded[: 2 * E]) + sum(padded[2 * E :])) * w
        rows = 0 if hopper or 0 in how.own or not low_rank else 3 * N * F * w
        if how.own:
            # gate and up by rows; where any is full-size they were saved, or are in `again`.
            inputs = 0 if FULL in (*layouts[0][1:], *layouts[1][1:]) else 2
            rows = max(rows, (3 + inputs) * N * F * w + (2 + extra_full) * N * D * w)
        return by_token + columns + rows + 2 * T * D * w + 2 * packed + again
    own_rows = N * D * w * (int(low_rank) + int(extra_full))
    mixed = T * F * w if trains_base else 0
    dx = T * D * (w + a)
    return 6 * N * F * w + 2 * T * F * w + dx + packed + again + own_rows + mixed
