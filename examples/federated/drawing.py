"""What the study's pictures are drawn with: colours for light and dark, marks, text, axes.

Drawn by hand, so that a page needs no other package and the same numbers give the same bytes.
Colours are classes that `style` fills, once for each scheme. A picture is as wide as a phone, so
that its text never shrinks: pages lay several side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

WIDTH = 360
INK, FAINT, PAGE, CARD, GRID = "ink", "faint", "page", "card", "grid"
COLOURS = {  # name: on light, on dark
    INK: ("#1b1b1b", "#eeeeee"),
    FAINT: ("#5c5c5c", "#a8b0b8"),
    PAGE: ("#f6f7f9", "#0d1117"),
    CARD: ("#ffffff", "#161b22"),
    GRID: ("#dddddd", "#30363d"),
    "c0": ("#0b5cad", "#6db8ff"),
    "c1": ("#a0307a", "#f090cc"),
    "c2": ("#2e7d32", "#7fd084"),
    "c3": ("#8a5a00", "#e0b060"),
    "c4": ("#6a6a6a", "#b0b0b0"),
}
SHADE = 0.5
"""The most of a colour in a map's cell: ink stays readable on it, in light and in dark."""
_MARKS = ("circle", "square", "diamond", "triangle", "cross")
_EM = 0.6  # of the size, a character's width at most, on average over a word


def style() -> str:
    """The pictures' style sheet: variables for both schemes, and the classes that use them."""

    def variables(which: int) -> str:
        return "".join(f"--{name}:{pair[which]};" for name, pair in COLOURS.items())

    series = "".join(
        f".l{i}{{stroke:var(--c{i})}}.f{i}{{fill:var(--c{i})}}" for i in range(len(_MARKS))
    )
    return (
        f":root{{color-scheme:light dark;{variables(0)}}}"
        f"@media(prefers-color-scheme:dark){{:root{{{variables(1)}}}}}"
        "svg{display:block;width:100%;height:auto}"
        "svg text{font:11px system-ui,sans-serif;fill:var(--ink)}"
        "svg .name{font-size:13px;font-weight:600}svg .faint{fill:var(--faint)}"
        "svg .end{text-anchor:end}svg .middle{text-anchor:middle}"
        "svg .grid{stroke:var(--grid)}svg .axis{stroke:var(--ink)}"
        "svg .line{fill:none;stroke-width:2}svg .band{fill-opacity:.16}"
        "svg .dash{stroke-dasharray:6 4;stroke-width:1.6}" + series
    )


def mark(kind: int, x: float, y: float, classes: str, size: float, inside: str = "") -> str:
    """A shape for each colour, so that colour is never alone."""
    shapes = {
        "circle": f"M{x - size:.1f} {y:.1f}a{size} {size} 0 1 0 {2 * size} 0"
        f"a{size} {size} 0 1 0 {-2 * size} 0z",
        "square": f"M{x - size:.1f} {y - size:.1f}h{2 * size}v{2 * size}h{-2 * size}z",
        "diamond": f"M{x:.1f} {y - 1.3 * size:.1f}l{1.3 * size} {1.3 * size}"
        f"l{-1.3 * size} {1.3 * size}l{-1.3 * size} {-1.3 * size}z",
        "triangle": f"M{x:.1f} {y - 1.2 * size:.1f}l{1.2 * size} {2.2 * size}h{-2.4 * size}z",
        "cross": f"M{x - size:.1f} {y - 1:.1f}h{2 * size}v2h{-2 * size}z",
    }
    return f'<path class="{classes}" d="{shapes[_MARKS[kind % len(_MARKS)]]}">{inside}</path>'


def legend_of(entries: Sequence[tuple[str, int, bool]], y: int, shapes: bool = True):
    """(parts, where the plot may begin) of names in rows that wrap; dashed: a level's.
    shapes: as `mark` has them; else squares, as of bars."""
    parts, x = [], 8.0
    for words, colour, dashed in entries:
        wide = 22 + width_of(words) + 10
        if x > 8 and x + wide > WIDTH:
            x, y = 8.0, y + 16
        if dashed:
            parts.append(line(x, y + 4, x + 16, y + 4, f"dash l{colour}"))
        else:
            parts.append(mark(colour if shapes else 1, x + 8, y + 4, f"f{colour}", 4))
        parts.append(text(x + 22, y + 8, words, ""))
        x += wide
    return parts, y + 20 if entries else y


def ticks_of(values: Sequence[float]) -> tuple[float, float, list[float]]:
    """(low, high, ticks) of an axis: about five round steps that hold all the values."""
    low, high = (min(values), max(values)) if values else (0.0, 1.0)
    if high - low < 1e-12 * max(abs(low), abs(high), 1e-3):
        low, high = low - 0.5, high + 0.5
    rough = (high - low) / 5
    size = 10 ** math.floor(math.log10(rough))
    step = next(size * m for m in (1, 2, 5, 10) if size * m >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    ticks = [i * step for i in range(first, last + 1)]
    return ticks[0], ticks[-1], ticks


def share(value: float, low: float, high: float) -> float:
    """Where a value lies between two, 0 to 1; in the middle when they are equal."""
    return (value - low) / (high - low) if high > low else 0.5


def width_of(words: str, size: float = 11) -> float:
    """Of a text, from above."""
    return _EM * size * len(words)


def line(x1: float, y1: float, x2: float, y2: float, classes: str) -> str:
    """From one place to another."""
    return (
        f'<line class="{classes}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
    )  # fmt: skip


def text(x: float, y: float, words: str, classes: str, more: str = "") -> str:
    """Words at a place; classes: "end", "middle", "name", "faint", or none."""
    about = f' class="{classes}"' if classes else ""
    more = f" {more}" if more else ""
    return f'<text{about} x="{x:.1f}" y="{y:.1f}"{more}>{escape(words)}</text>'


def svg(height: float, parts: Sequence[str], said: str, width: int = WIDTH) -> str:
    """The picture; said: what a screen reader says of it."""
    height = math.ceil(height)
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width * 1.25:.0f}px" role="img" '
        f'aria-label="{escape(said)}">' + "\n".join(parts) + "</svg>"
    )
