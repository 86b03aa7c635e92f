"""Named layer shapes, each with the reason it is measured."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    """Sizes of one layer; `tokens` is what a benchmark takes unless told otherwise."""

    why: str
    hidden: int
    intermediate: int
    ranks: tuple[int, ...]
    top_k: int
    tokens: int


SHAPES = {
    "flexolmo_6x16": Shape("FlexOlmo-7x7B, small ranks", 4096, 11008, (0, *[16] * 6), 5, 16384),
    "flexolmo_6x64": Shape("FlexOlmo-7x7B, usual ranks", 4096, 11008, (0, *[64] * 6), 5, 16384),
    "flexolmo_mixed": Shape(
        "one published mixture: ranks 1 to 2048", 4096, 11008, (0, 1, 4, 8, 64, 256, 2048), 5, 16384
    ),
    "flexolmo_full": Shape("all experts full-size", 4096, 11008, (0,) * 7, 5, 16384),
    "many_experts": Shape("128 experts, stacked factors", 2048, 5504, (0, *[16] * 127), 8, 4096),
    "cpu_small": Shape("what two CPU cores do at once", 1024, 2752, (0, *[16] * 6), 5, 512),
    "tiny": Shape("a second on any machine", 128, 352, (0, 1, 4, 16), 2, 64),
}
