"""Named layer shapes, each with the reason it is measured."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one layer; `tokens` is what a benchmark takes unless told otherwise."""

    why: str
    hidden: int
    intermediate: int
    ranks: tuple[int, ...]
    top_k: int
    tokens: int


def _flexolmo(why: str, *ranks: int, top_k: int = 5) -> Shape:
    """A layer of FlexOlmo-7x7B's width: its base, and experts of these ranks beside it."""
    return Shape(why, 4096, 11008, (0, *ranks), top_k, 16384)


SHAPES = {
    "flexolmo_6x64": _flexolmo("usual ranks: the shape that is swept", *[64] * 6),
    "flexolmo_6x16": _flexolmo("small ranks: how much a delta costs at least", *[16] * 6),
    "flexolmo_mixed": _flexolmo("a published mixture: ranks 1 to 2048", 1, 4, 8, 64, 256, 2048),
    "flexolmo_large": _flexolmo("large ranks: the deltas weigh most", 64, 64, 256, 512, 2048, 16),
    "flexolmo_full": _flexolmo("all experts full-size: nothing is shared", *[0] * 6),
    "flexolmo_k2_of_2": _flexolmo("a base and one expert, both always on: a LoRA", 64, top_k=2),
    "flexolmo_full_k2": _flexolmo("the same, full-size: FlexOlmo's own training", 0, top_k=2),
    "flexolmo_k4": _flexolmo("4 of 7: a fifth fewer rows than 5 of 7", *[64] * 6, top_k=4),
    "flexolmo_k7": _flexolmo("7 of 7: no routing, every expert on every token", *[64] * 6, top_k=7),
    "experts_64": Shape("as many as get a parameter each", 2048, 5504, (0, *[16] * 63), 8, 16384),
    "experts_512": Shape("stacked factors, few rows each", 2048, 5504, (0, *[16] * 511), 8, 16384),
    "small": Shape("what two CPU cores do at once", 1024, 2752, (0, *[16] * 6), 5, 512),
    "tiny": Shape("a second on any machine", 128, 352, (0, 1, 4, 16), 2, 64),
}  # fmt: skip


def parse(
    name: str,
    hidden: int | None,
    intermediate: int | None,
    ranks: Sequence[str] | None,
    top_k: int | None,
) -> tuple[str, Shape]:
    """A named shape, with these numbers in place of its own; ranks as text, "64x6" for six of 64.

    Rank 0 is a full-size expert; the base is not among `ranks`.
    """
    if name not in SHAPES:
        raise ValueError(f"shape: got {name!r}; accepted: {', '.join(SHAPES)}")
    shape = SHAPES[name]
    changes: dict = {"hidden": hidden, "intermediate": intermediate, "top_k": top_k}
    changes = {key: value for key, value in changes.items() if value is not None}
    if ranks is not None:
        changes["ranks"] = (0, *(rank for text in ranks for rank in _repeated(text)))
        changes.setdefault("top_k", min(shape.top_k, len(changes["ranks"])))
    return ("your shape" if changes else name), shape._replace(**changes)


def _repeated(text: str) -> list[int]:
    rank, times, count = text.partition("x")
    try:
        repeats = int(count) if times else 1
        if repeats >= 1:
            return [int(rank)] * repeats
    except ValueError:
        pass
    raise ValueError(
        f'--ranks: got {text!r}; accepted: a rank, or "64x6" for six of 64, the count >= 1'
    )
