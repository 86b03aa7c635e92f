"""The study's pictures as SVG text: curves, bars, maps, and a claim's interval."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import NamedTuple

from drawing import SHADE, WIDTH, legend_of, line, mark, share, svg, text, ticks_of, width_of


class Point(NamedTuple):
    """A value at x with its interval; low and high nan: none."""

    x: float
    y: float
    low: float = math.nan
    high: float = math.nan


class Series(NamedTuple):
    """Points of one name. fit: a smooth curve to draw through them, in place of a broken line;
    apart: points that no line leads to."""

    name: str
    points: Sequence[Point]
    colour: int
    fit: Sequence[tuple[float, float]] = ()
    apart: Sequence[Point] = ()


class Level(NamedTuple):
    """A horizontal line over the whole width, with its interval as a band."""

    name: str
    y: float
    colour: int
    low: float = math.nan
    high: float = math.nan


class Bar(NamedTuple):
    """A bar from zero with its interval; said: the number in words, beside it."""

    value: float
    low: float
    high: float
    said: str
    colour: int


def curves(
    name: str,
    series: Sequence[Series],
    *,
    x_name: str,
    y_name: str,
    x_ticks: Mapping[float, str],
    levels: Sequence[Level] = (),
    said: str = "",
) -> str:
    """Series over x, with bands and level lines; x_ticks: what stands at which x."""
    left, right, bottom, tall = 44, 10, 40, 170
    legend, top = legend_of([(s.name, s.colour, False) for s in series]
                          + [(v.name, v.colour, True) for v in levels], 44)  # fmt: skip
    points = [p for s in series for p in (*s.points, *s.apart)]
    values = [v for p in points for v in (p.y, p.low, p.high)]
    values += [v for level in levels for v in (level.y, level.low, level.high)]
    values += [y for s in series for _, y in s.fit]
    low, high, ticks = ticks_of([v for v in values if math.isfinite(v)])
    xs = [*x_ticks, *(p.x for p in points)]
    first, last = min(xs), max(xs)

    def x(value: float) -> float:
        return left + 8 + (WIDTH - left - right - 16) * share(value, first, last)

    def y(value: float) -> float:
        return top + tall * (1 - share(value, low, high))

    parts = [text(8, 18, name, "name"), text(8, 34, y_name, "faint"), *legend]
    for tick in ticks:
        parts.append(line(left, y(tick), WIDTH - right, y(tick), "grid"))
        parts.append(text(left - 6, y(tick) + 4, number(tick, ticks), "faint end"))
    room = (WIDTH - left - right) / max(len(x_ticks), 1)
    widest = max((width_of(t) for t in x_ticks.values()), default=0)
    every = max(1, math.ceil((widest + 6) / room))
    for i, (value, words) in enumerate(x_ticks.items()):
        if i % every == 0:
            parts.append(text(x(value), top + tall + 16, words, "faint middle"))
    parts.append(text(WIDTH - right, top + tall + 32, x_name, "faint end"))
    for level in levels:
        if math.isfinite(level.low):
            height = y(level.low) - y(level.high)
            parts.append(
                f'<rect class="band f{level.colour}" x="{left}" y="{y(level.high):.1f}" '
                f'width="{WIDTH - left - right}" height="{height:.1f}"/>'
            )
        parts.append(line(left, y(level.y), WIDTH - right, y(level.y), f"dash l{level.colour}"))
    for s in series:
        parts += _one(s, x, y)
    return svg(top + tall + bottom, parts, said or name)


def bars(name: str, rows: Sequence[tuple[str, Sequence[Bar]]], *, unit: str, legend=()) -> str:
    """Rows of horizontal bars from zero; unit: what they measure; legend: names by colour."""
    thick, gap = 13, 12
    left = 14 + max((width_of(label) for label, _ in rows), default=0)
    said_width = max((width_of(bar.said) for _, found in rows for bar in found), default=0)
    right = WIDTH - said_width - 14
    entries, top = legend_of(
        [(words, i, False) for i, words in enumerate(legend)], 44, shapes=False
    )
    values = [0.0, *(v for _, found in rows for b in found for v in (b.value, b.low, b.high))]
    values = [v for v in values if math.isfinite(v)]
    low, high = min(values), max(values)

    def x(value: float) -> float:
        return left + (right - left) * share(value, low, high if high > low else low + 1)

    parts = [text(8, 18, name, "name"), text(8, 34, unit, "faint"), *entries]
    y = top + 6
    for label, found in rows:
        parts.append(text(8, y + thick * len(found) / 2 + 4, label, ""))
        for bar in found:
            begin, end = sorted((x(0), x(bar.value)))
            parts.append(
                f'<rect class="f{bar.colour}" x="{begin:.1f}" y="{y + 1:.1f}" '
                f'width="{max(end - begin, 1):.1f}" height="{thick - 2}" rx="2"/>'
            )
            if math.isfinite(bar.low):
                middle = y + thick / 2
                parts.append(line(x(bar.low), middle, x(bar.high), middle, "axis"))
                parts += [line(x(v), middle - 3, x(v), middle + 3, "axis")
                          for v in (bar.low, bar.high)]  # fmt: skip
            parts.append(text(WIDTH - 8, y + thick - 2, bar.said, "end"))
            y += thick
        y += gap
    parts.append(line(x(0), top, x(0), y - gap + 6, "grid"))
    return svg(y, parts, name)


def heat(
    name: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    unit: str,
    written: str,
    marked: Sequence[tuple[int, int]] = (),
) -> str:
    """A map of numbers: blue above zero, magenta below, the more the further from it.

    written: how a number is written ("{:.0f}"); marked: cells (row, column) with a frame. nan is
    an empty cell.
    """
    left = 14 + max(map(width_of, rows), default=0)
    cell = (WIDTH - left - 8) / max(len(columns), 1)
    tall = 26
    steep = max(map(width_of, columns), default=0) > cell - 4
    rise = max(map(width_of, columns), default=0) * math.sin(math.radians(60)) if steep else 0
    top = 46 + math.ceil(rise) + 16
    most = max((abs(v) for row in values for v in row if math.isfinite(v)), default=0) or 1
    parts = [text(8, 18, name, "name"), text(8, 34, unit, "faint")]
    for j, column in enumerate(columns):
        x = left + cell * (j + 0.5)
        if steep:
            # Towards the left, so that the last one stays inside.
            turn = f'transform="rotate(60 {x:.1f} {top - 6})"'
            parts.append(text(x, top - 6, column, "end", turn))
        else:
            parts.append(text(x, top - 6, column, "middle"))
    for i, row in enumerate(rows):
        y = top + tall * i
        parts.append(text(left - 6, y + tall / 2 + 4, row, "end"))
        for j, value in enumerate(values[i]):
            x = left + cell * j
            frame = ' class="axis" stroke-width="1.5"' if (i, j) in marked else ""
            known = math.isfinite(value)
            colour = "f0" if value >= 0 or not known else "f1"
            shade = SHADE * min(abs(value) / most, 1) if known else 0
            parts.append(
                f'<g{frame}><rect class="{colour}" x="{x + 1:.1f}" y="{y + 1}" '
                f'width="{cell - 2:.1f}" height="{tall - 2}" fill-opacity="{shade:.3f}"/></g>'
            )
            words = signed(written.format(value)) if known else "–"
            if width_of(words) > cell - 2:
                words = signed(f"{value:.0f}")
            parts.append(text(x + cell / 2, y + tall / 2 + 4, words, "middle"))
    return svg(top + tall * len(rows) + 8, parts, name)


def strip(value: float, low: float, high: float, threshold: float, said: str) -> str:
    """A claim's interval on a line, and its threshold as an upright one."""
    width, tall = 120, 24
    known = [v for v in (value, low, high) if math.isfinite(v)]
    ends = [*known, threshold]
    begin, end = min(ends), max(ends)
    pad = 0.12 * (end - begin) or 1.0

    def x(v: float) -> float:
        return 4 + (width - 8) * share(v, begin - pad, end + pad)

    parts = [line(x(threshold), 2, x(threshold), tall - 2, "dash l4")]
    if len(known) == 3:
        parts.append(line(x(low), tall / 2, x(high), tall / 2, "line l0"))
    parts.append(mark(0, x(value), tall / 2, "f0", 4))
    return svg(tall, parts, said, width)


def number(value: float, among: Sequence[float] = ()) -> str:
    """Short, with as many digits as tell it from its neighbours."""
    steps = [b - a for a, b in zip(among, among[1:], strict=False)]
    digits = max(0, -math.floor(math.log10(min(steps)) + 1e-9)) if steps else 2
    return signed(f"{value:.{digits}f}")


def signed(words: str) -> str:
    """A number in words with a minus that is as wide as a plus; no minus before zero."""
    return words.replace("-", "−" if words.strip("-0.") else "")


def _one(s: Series, x, y) -> list[str]:
    whole = [p for p in s.points if math.isfinite(p.low)]
    parts = []
    if len(whole) > 1 and not s.fit:
        edge = [f"{x(p.x):.1f},{y(p.high):.1f}" for p in whole]
        edge += [f"{x(p.x):.1f},{y(p.low):.1f}" for p in reversed(whole)]
        parts.append(f'<polygon class="band f{s.colour}" points="{" ".join(edge)}"/>')
    elif s.fit:
        parts += [line(x(p.x), y(p.low), x(p.x), y(p.high), f"l{s.colour}") for p in whole]
    known = [p for p in s.apart if math.isfinite(p.low)]
    parts += [line(x(p.x), y(p.low), x(p.x), y(p.high), f"l{s.colour}") for p in known]
    path = s.fit or [(p.x, p.y) for p in s.points]
    if len(path) > 1:
        points = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in path)
        parts.append(f'<polyline class="line l{s.colour}" points="{points}"/>')
    for p in (*s.points, *s.apart):
        between = f" [{p.low:.4g}, {p.high:.4g}]" if math.isfinite(p.low) else ""
        title = f"<title>{escape(s.name)}: {p.y:.4g}{between}</title>"
        parts.append(mark(s.colour, x(p.x), y(p.y), f"f{s.colour}", 3.6, title))
    return parts
