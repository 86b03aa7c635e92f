"""The figure in README, drawn from the records: a layer's time over T, in dense FFNs of its base's
size.

An SVG without a library: it is small, the same bits from the same records, and has one set of
colours for light pages and one for dark ones.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from benchmarks.shapes import SWEEP

FLOORS = ("dense FFN compiled", "dense FFN")
SERIES = {  # candidate: words, colour on light, on dark
    "Hugging Face eager": ("Hugging Face, eager", "#8a5a00", "#e0b060"),
    "Hugging Face grouped_mm": ("Hugging Face, grouped_mm", "#b8860b", "#ffd27f"),
    "published": ("the published way", "#a0307a", "#f090cc"),
    "fair eager, by index": ("fair eager, by index", "#6a6a6a", "#b0b0b0"),
    "fair eager, every expert, compiled": ("fair eager, compiled", "#2e7d32", "#7fd084"),
    "ours, layer": ("ours, with its router", "#0b5cad", "#6db8ff"),
}
WIDTH, HEIGHT = 860, 460
LEFT, RIGHT, TOP, BOTTOM = 62, 236, 56, 78
LEGEND = (
    "Filled: replayed from a CUDA graph. Hollow: called one by one; what waits for the device pays "
    "for the host too."
)
FEW = 3
"""Fewer numbers of tokens than this make no line."""


def sweep(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The forward records of the shape, dtype, device and commit with the most T of SWEEP, by T."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for record in records:
        whole = record["benchmark"] == "experts" and record["pass"] == "forward" and floor(record)
        if whole and record["tokens"] in SWEEP:
            key = record["shape"], record["dtype"], record["device"], record["commit"]
            groups.setdefault(key, []).append(record)
    best = max(groups.values(), key=len, default=[])
    return sorted(best, key=lambda record: record["tokens"]) if len(best) >= FEW else []


def floor(record: dict[str, Any]) -> float | None:
    """Milliseconds of one dense FFN in the same run."""
    found = (record["results"].get(name, {}).get("ms") for name in FLOORS)
    return next((ms for ms in found if ms), None)


def svg(records: Sequence[dict[str, Any]]) -> str:
    """The figure of a sweep's records, as text."""
    multiples = [
        found["ms"] / floor(record)
        for record in records
        for name, found in record["results"].items()
        if name in SERIES and "ms" in found
    ]
    low = 0.9 * min(1.0, *multiples)
    high = 1.15 * max(1.5, *multiples)

    def x(index: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (index + 0.5) / len(records)

    def y(multiple: float) -> float:
        part = math.log(multiple / low) / math.log(high / low)
        return HEIGHT - BOTTOM - part * (HEIGHT - TOP - BOTTOM)

    first = records[0]
    body = [
        _text(
            LEFT,
            22,
            f"A layer's forward, in dense FFNs of its base's size: {first['shape']}",
            "title",
        ),
        _text(LEFT, 42, _where(records), "small"),
    ]
    for tick in (1, 1.5, 2, 3, 5, 7, 10, 15, 20, 30, 50, 100, 200):
        if low <= tick <= high:
            kind = "floor" if tick == 1 else "grid"
            at = f'y1="{y(tick):.1f}" y2="{y(tick):.1f}"'
            body.append(f'<line class="{kind}" x1="{LEFT}" x2="{WIDTH - RIGHT}" {at}/>')
            body.append(_text(LEFT - 8, y(tick) + 4, f"{tick:g}", "small end"))
    for index, record in enumerate(records):
        body.append(_text(x(index), HEIGHT - BOTTOM + 20, f"{record['tokens']:,}", "small middle"))
        body.append(
            _text(x(index), HEIGHT - BOTTOM + 38, f"{floor(record):.3g} ms", "faint middle")
        )
    body.append(_text(WIDTH - RIGHT + 14, HEIGHT - BOTTOM + 20, "tokens", "small"))
    body.append(
        _text(WIDTH - RIGHT + 14, HEIGHT - BOTTOM + 38, "one dense FFN (the line at 1)", "faint")
    )
    body.append(_text(LEFT, HEIGHT - 12, LEGEND, "faint"))
    ends = []
    for number, name in enumerate(SERIES):
        points = [
            (x(index), y(found["ms"] / floor(record)), found["how"] == "graph")
            for index, record in enumerate(records)
            if "ms" in (found := record["results"].get(name, {}))
        ]
        if not points:
            continue
        path = " ".join(f"{a:.1f},{b:.1f}" for a, b, _ in points)
        body.append(f'<polyline class="s{number}" points="{path}"/>')
        for a, b, filled in points:
            kind = "filled" if filled else "hollow"
            body.append(f'<circle class="s{number} {kind}" cx="{a:.1f}" cy="{b:.1f}" r="3.6"/>')
        ends.append((points[-1][1], number, name))
    for height, (_, number, name) in zip(
        _apart([e[0] for e in sorted(ends)]), sorted(ends), strict=True
    ):
        body.append(_text(WIDTH - RIGHT + 14, height + 4, SERIES[name][0], f"t{number}"))
    return _document(body)


def _where(records: Sequence[dict[str, Any]]) -> str:
    first = records[0]
    commits = ", ".join(dict.fromkeys(str(record["commit"]) for record in records))
    mixture = f"top-{first['top_k']} of {len(first['ranks'])}"
    return f"{first['device']}, {first['dtype']}, {mixture}, commit {commits}"


def _apart(heights: Sequence[float], least: float = 16) -> list[float]:
    """Sorted heights, moved down as little as keeps labels from overlapping, then up again."""
    placed: list[float] = []
    for height in heights:
        placed.append(max(height, placed[-1] + least) if placed else height)
    over = max(0.0, placed[-1] - (HEIGHT - BOTTOM)) if placed else 0.0
    return [height - over for height in placed]


def _text(x: float, y: float, words: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(words)}</text>'


def _document(body: list[str]) -> str:
    def colours(which: int) -> str:
        return "".join(
            f".s{n}{{stroke:{words[which]};fill:{words[which]}}}.t{n}{{fill:{words[which]}}}"
            for n, words in enumerate(SERIES.values())
        )

    style = (
        "text{font:13px system-ui,sans-serif;fill:#1b1b1b}.title{font-size:15px;font-weight:600}"
        ".small{font-size:12px}.faint{font-size:11px;fill:#666}.end{text-anchor:end}"
        ".middle{text-anchor:middle}.page{fill:#fff}.grid{stroke:#ddd}.floor{stroke:#1b1b1b}"
        "polyline{stroke-width:2}" + colours(1) + "polyline{fill:none!important}"
        ".hollow{fill:#fff;stroke-width:1.6}"
        "@media(prefers-color-scheme:dark){text{fill:#eee}.faint{fill:#aaa}.page{fill:#0d1117}"
        ".grid{stroke:#30363d}.floor{stroke:#eee}" + colours(2) + ".hollow{fill:#0d1117}}"
    )
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" role="img">',
        f"<style>{style}</style>",
        f'<rect class="page" width="{WIDTH}" height="{HEIGHT}"/>',
        *body,
        "</svg>\n",
    ])  # fmt: skip
