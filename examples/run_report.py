"""What a run tells while it trains: a bar with loss, speed and time left; the curve of its losses.

The curve is written by hand as SVG, so that no other package is needed.
"""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

from flexmore_kernels.checkpoint_writer import write_text

EVERY_S = 2.0
_BAR = 24
_POINTS = 1000  # of a drawn stage, each the mean of its steps
_COLOURS = (("#c9b6dc", "#721f81"), ("#fbd0b8", "#d1495b"))  # each step, running mean


class Bar:
    """A line on stderr, at most every two seconds; on a terminal, over the one before."""

    def __init__(self, name: str, done: int, total: int, tokens: int) -> None:
        self._name, self._total, self._tokens = name, total, tokens
        self._begin_step, self._done = done, done
        self._begin, self._last = time.monotonic(), -math.inf

    def step(self, loss: Tensor) -> None:
        """One more step is done; its loss is read, and so waited for, only when it is shown."""
        self._done += 1
        now = time.monotonic()
        if now - self._last < EVERY_S and self._done < self._total:
            return
        value = float(loss)
        self._last = now = time.monotonic()
        a_step = (now - self._begin) / (self._done - self._begin_step)
        left = a_step * (self._total - self._done)
        full = _BAR * self._done // self._total
        again = sys.stderr.isatty()
        print(
            "\r" if again else "",
            f"{self._name} [{'#' * full}{'.' * (_BAR - full)}] {self._done}/{self._total}  ",
            f"loss {value:.4f}  {self._tokens / a_step:,.0f} tokens/s  {left:.0f} s left ",
            sep="",
            end="" if again and self._done < self._total else "\n",
            file=sys.stderr,
            flush=True,
        )


def write_curves(folder: Path, names: Sequence[str], losses: Sequence[Sequence[float]]) -> None:
    """loss.jsonl, a line a step, and loss.svg: of each stage its name and its losses so far."""
    lines = [
        json.dumps({"stage": name, "step": step, "loss": loss})
        for name, stage in zip(names, losses, strict=True)
        for step, loss in enumerate(stage, start=1)
    ]
    write_text(folder / "loss.jsonl", "".join(f"{line}\n" for line in lines))
    write_text(folder / "loss.svg", draw(names, losses))


def draw(names: Sequence[str], losses: Sequence[Sequence[float]]) -> str:
    """Loss over steps as SVG text, stage after stage: pale as it is, dark its running mean."""
    width, height, left, top = 720, 320, 60, 40
    every = [loss for stage in losses for loss in stage] or [0.0]
    low, high = min(every), max(every)
    if low == high:
        low, high = low - 0.5, high + 0.5
    steps = max(len(every), 1)
    parts = []
    for tick in range(5):
        y = top + height * (1 - tick / 4)
        parts.append(f'<path d="M{left} {y:.1f}h{width}" stroke="#dddddd"/>')
        parts.append(_text(left - 8, y + 4, f"{low + (high - low) * tick / 4:.3g}", "end"))
    begin = 0
    for number, (name, stage) in enumerate(zip(names, losses, strict=True)):
        if not stage:
            continue
        x = left + width * begin / steps
        parts.append(_text(x + 4, top - 8, f"{name}, {len(stage)} steps, last {stage[-1]:.4g}"))
        if begin:
            parts.append(
                f'<path d="M{x:.1f} {top}v{height}" stroke="#222222" stroke-dasharray="3"/>'
            )
        for values, colour in zip((stage, _smoothed(stage)), _COLOURS[number % 2], strict=True):
            points = " ".join(
                f"{left + width * (begin + place) / steps:.1f},"
                f"{top + height * (high - value) / (high - low):.1f}"
                for place, value in _thinned(values)
            )
            parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}"/>')
        begin += len(stage)
    parts.append(_text(left, top + height + 20, "0"))
    parts.append(_text(left + width, top + height + 20, f"{steps} steps", "end"))
    parts.append(_text(left - 44, top - 8, "loss"))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{left + width + 20}" '
        f'height="{top + height + 34}" font-family="sans-serif" font-size="12">\n'
        '<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _smoothed(values: Sequence[float]) -> list[float]:
    """The mean over about the last twentieth, with weights that decay."""
    keep = 1 - 1 / max(1, len(values) // 20)
    found, weight, total = [], 0.0, 0.0
    for value in values:
        weight, total = keep * weight + 1, keep * total + value
        found.append(total / weight)
    return found


def _thinned(values: Sequence[float]) -> list[tuple[float, float]]:
    """(place, value) of at most `_POINTS` points."""
    size = -(-len(values) // _POINTS)
    groups = (values[i : i + size] for i in range(0, len(values), size))
    return [(i * size + (len(g) + 1) / 2, sum(g) / len(g)) for i, g in enumerate(groups)]


def _text(x: float, y: float, text: str, anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="#222222">{text}</text>'
