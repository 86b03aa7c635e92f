"""Pictures of conversions as SVG text: ranks and errors by layer and matrix; error over size.

Drawn by hand, so that no other package is needed and a report always gives the same bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

from ..checkpoint_layout import PROJECTIONS

if TYPE_CHECKING:
    from .report import Matrix

# Dark to light at even steps of lightness, so that it reads in grey too; full size is no number.
_RAMP = ("#2c115f", "#721f81", "#b73779", "#f1605d", "#feb078", "#fcfdbf")
_FULL, _NONE, _INK = "#9ecae1", "#ffffff", "#222222"
_SUFFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


def draw(title: str, line: str, matrices: Sequence[Matrix]) -> str:
    """Two maps, a row a layer and a column a matrix of each expert: rank, and relative error."""
    layers = sorted({m.layer for m in matrices})
    columns = sorted({(m.expert, PROJECTIONS.index(m.projection)) for m in matrices})
    cell = max(5, min(18, 520 // max(len(columns), 1)))
    tall = max(6, min(18, 620 // max(len(layers), 1)))
    width, height = cell * len(columns), tall * len(layers)
    ranks = [m.rank for m in matrices if not isinstance(m.rank, str) and m.rank > 0]
    low, high = (min(ranks), max(ranks)) if ranks else (1, 1)

    def by_rank(m: Matrix) -> str:
        if m.rank == "full":
            return _FULL
        if m.rank == 0:
            return _NONE
        return _colour(1 - _share(math.log(m.rank), math.log(low), math.log(high)))

    def by_error(m: Matrix) -> str:
        return _colour(1 - min(m.error / m.norm, 1.0)) if m.norm else _colour(1.0)

    left, top = 60, 98
    second = left + max(width, 250) + 70
    parts = [_text(16, 26, title, 15), _text(16, 46, line, 12)]
    panels: list[tuple[int, str, Callable[[Matrix], str]]] = [
        (left, "rank, by layer and expert", by_rank),
        (second, "relative error, by layer and expert", by_error),
    ]
    for x, name, colour in panels:
        parts.append(_text(x, top - 22, name, 12))
        parts += _map(x, top, cell, tall, layers, columns, matrices, colour)
    base = top + height + 40
    parts += _scale(left, base, str(low), str(high))
    for x, colour, name in ((left, _FULL, "full size"), (left + 90, _NONE, "no difference")):
        parts.append(
            f'<rect x="{x}" y="{base + 34}" width="12" height="12" fill="{colour}" '
            f'stroke="{_INK}" stroke-width="0.6"/>'
        )
        parts.append(_text(x + 18, base + 44, name, 11))
    parts += _scale(second, base, "0", "1")
    return _svg(second + max(width, 250) + 24, base + 60, parts)


def draw_choices(title: str, points: Sequence[tuple[str, float, float]]) -> str:
    """Relative error over the bytes of the checkpoint; points are (name, bytes, error)."""
    width, height, left, top = 520, 320, 70, 60
    low, high = 0.95 * min(p[1] for p in points), 1.05 * max(p[1] for p in points)
    ceiling = 1.1 * max(p[2] for p in points) or 1.0
    parts = [_text(16, 26, title, 15), _text(left, top - 12, "relative error", 12)]
    for step in range(5):
        y, x = top + height * (1 - step / 4), left + width * step / 4
        parts.append(
            f'<line x1="{left}" y1="{y:.1f}" x2="{left + width}" y2="{y:.1f}" stroke="#dddddd"/>'
        )
        parts.append(_text(left - 8, y + 4, f"{ceiling * step / 4:.2g}", 11, "end"))
        size = f"{scaled(low + (high - low) * step / 4, 3)}B"
        parts.append(_text(x, top + height + 20, size, 11, "middle"))
    parts.append(_text(left + width, top + height + 42, "size of the checkpoint", 12, "end"))
    for name, size, error in points:
        x, y = left + width * _share(size, low, high), top + height * (1 - error / ceiling)
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" fill="{_RAMP[1]}"/>')
        anchor, shift = ("end", -7) if x > left + width * 0.8 else ("start", 7)
        parts.append(_text(x + shift, y - 7, name, 11, anchor))
    return _svg(left + width + 40, top + height + 60, parts)


def scaled(number: float, digits: int = 4) -> str:
    """33.27 G, 814 M, 96 k."""
    for size, suffix in _SUFFIXES:
        if number >= size:
            return f"{number / size:.{digits}g} {suffix}"
    return f"{number:.{digits}g} "


def _map(x, y, cell, tall, layers, columns, matrices, colour) -> list[str]:
    row_of = {layer: i for i, layer in enumerate(layers)}
    column_of = {column: i for i, column in enumerate(columns)}
    parts = []
    for m in matrices:
        left = x + cell * column_of[m.expert, PROJECTIONS.index(m.projection)]
        error = f"{m.error / m.norm:.4g}" if m.norm else "0"
        said = f"layer {m.layer}, expert {m.expert}, {m.projection}: rank {m.rank}, error {error}"
        parts.append(
            f'<rect x="{left}" y="{y + tall * row_of[m.layer]}" width="{cell}" height="{tall}" '
            f'fill="{colour(m)}"><title>{said}</title></rect>'
        )
    every = -(-len(layers) * 12 // max(tall * len(layers), 1))
    for layer in layers[:: max(every, 1)]:
        parts.append(_text(x - 6, y + tall * (row_of[layer] + 0.5) + 4, str(layer), 10, "end"))
    bottom = y + tall * len(layers)
    experts = sorted({expert for expert, _ in columns})
    for expert in experts:
        own = [i for (e, _), i in column_of.items() if e == expert]
        left, right = x + cell * min(own), x + cell * (max(own) + 1)
        parts.append(
            f'<rect x="{left}" y="{y}" width="{right - left}" height="{bottom - y}" fill="none" '
            f'stroke="{_INK}" stroke-width="0.6"/>'
        )
        if right - left >= 12:
            parts.append(_text((left + right) / 2, y - 4, str(expert), 10, "middle"))
        if cell >= 8:
            for (_, projection), i in ((c, i) for c, i in column_of.items() if c[0] == expert):
                letter = PROJECTIONS[projection][0]
                parts.append(_text(x + cell * (i + 0.5), bottom + 12, letter, 9, "middle"))
    return parts


def _scale(x: int, y: int, low: str, high: str) -> list[str]:
    """The ramp from `low` (light) to `high` (dark)."""
    steps = 24
    parts = [
        f'<rect x="{x + 5 * i}" y="{y}" width="5" height="10" '
        f'fill="{_colour(1 - i / (steps - 1))}"/>'
        for i in range(steps)
    ]
    parts.append(_text(x, y + 24, low, 11))
    return [*parts, _text(x + 5 * steps, y + 24, high, 11, "end")]


def _share(value: float, low: float, high: float) -> float:
    """Where a value lies between two, 0 to 1; at the end when they are equal."""
    return (value - low) / (high - low) if high > low else 1.0


def _colour(share: float) -> str:
    """Of the ramp: 0 dark, 1 light."""
    place = min(max(share, 0.0), 1.0) * (len(_RAMP) - 1)
    first = min(int(place), len(_RAMP) - 2)
    ends = [[int(_RAMP[first + i][j : j + 2], 16) for j in (1, 3, 5)] for i in (0, 1)]
    mixed = (round(a + (b - a) * (place - first)) for a, b in zip(*ends, strict=True))
    return "#{:02x}{:02x}{:02x}".format(*mixed)


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" text-anchor="{anchor}" '
        f'fill="{_INK}">{escape(text)}</text>'
    )


def _svg(width: float, height: float, parts: Sequence[str]) -> str:
    width, height = math.ceil(width), math.ceil(height)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        f'viewBox="0 0 {width} {height}" font-family="sans-serif">\n'
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>\n' + "\n".join(parts)
        + "\n</svg>\n"
    )  # fmt: skip
