"""What a conversion did: ranks, sizes and errors of every matrix, as a table, as JSON, drawn.

The errors are measured on what was stored, factors in their dtype and all:

    error = |delta - b a|_F        delta = W_e - W_0 of the source, in float64
    output_error^2 = tr(R M R^T)   R = delta - b a, M = E[x x^T] of the matrix's inputs x

so `output_error` is the root mean square of what the outputs are off, where activation statistics
were given. `dropped` is what the singular values alone say, the norm of those that were left out
(of the weighted matrix where there are statistics); it differs from the measured error by the
rounding of the factors.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from ..checkpoint_layout import PROJECTIONS
from .picture import draw, scaled

REPORT_FILE, PICTURE_FILE = "report.json", "report.svg"
_WIDTH = 118


@dataclass(frozen=True)
class Matrix:
    """One projection of one expert of one layer after conversion.

    rank: of the factors, 0 for no delta, or "full". norm: |delta|_F. error, dropped: see above.
    bound: how far `dropped` may be off (of a randomised decomposition), at most.
    output_norm, output_error: root mean squares over the statistics' inputs, None without them.
    numerical_rank: of a delta found to be low-rank up to the rounding of its storage, else None.
    parameters, bytes: as stored.
    """

    layer: int
    expert: int
    projection: str
    rank: int | str
    norm: float
    error: float
    dropped: float
    bound: float
    output_norm: float | None
    output_error: float | None
    numerical_rank: int | None
    parameters: int
    bytes: int


@dataclass(frozen=True)
class Size:
    """Of a whole checkpoint."""

    parameters: int
    bytes: int

    def __str__(self) -> str:
        return f"{scaled(self.parameters)} parameters, {scaled(self.bytes)}B"


@dataclass(frozen=True)
class Report:
    """What one conversion did. `settings`: rule, method, device and the rest, as given."""

    source: str
    directory: str
    fingerprint: str
    settings: dict[str, Any]
    before: Size
    after: Size
    matrices: tuple[Matrix, ...]
    notes: tuple[str, ...]
    seconds: float

    def relative_error(self, **where: Any) -> float:
        """sqrt(sum error^2 / sum norm^2) over the matrices that match, as `layer=3, expert=1`."""
        return relative((m.error, m.norm) for m in self.select(**where))

    def relative_output_error(self, **where: Any) -> float | None:
        """The same of the outputs' root mean squares, over the matrices whose inputs are known;
        None where none are.
        """
        pairs = [
            (m.output_error, m.output_norm)
            for m in self.select(**where)
            if m.output_error is not None and m.output_norm is not None
        ]
        return relative(pairs) if pairs else None

    def select(self, **where: Any) -> list[Matrix]:
        """The matrices whose fields are these."""
        return [m for m in self.matrices if all(getattr(m, k) == v for k, v in where.items())]

    @property
    def layers(self) -> list[int]:
        return sorted({m.layer for m in self.matrices})

    @property
    def experts(self) -> list[int]:
        return sorted({m.expert for m in self.matrices})

    def as_dict(self) -> dict[str, Any]:
        """For JSON: everything, and the relative errors of experts and of the whole."""
        found = asdict(self)
        found["relative_error"] = self.relative_error()
        found["experts"] = [
            {"expert": e, "relative_error": self.relative_error(expert=e)} for e in self.experts
        ]
        return found

    def as_text(self) -> str:
        """The table on the screen."""
        settings = ", ".join(f"{k} {v}" for k, v in self.settings.items() if v not in (None, False))
        lines = [
            self.directory,
            settings,
            f"before: {self.before}; after: {self.after}; {self.seconds:.3g} s",
            f"relative error of all differences to the public expert: {self.relative_error():.4g}",
            "",
            *_expert_table(self),
            "",
            *_layer_table(self),
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def files(self) -> dict[str, str]:
        """report.json and report.svg: name and text."""
        return {
            REPORT_FILE: json.dumps(self.as_dict(), indent=1) + "\n",
            PICTURE_FILE: draw(*_heading(self), self.matrices),
        }


def read_report(directory: str | os.PathLike) -> Report:
    """The report that a conversion left in its directory; ValueError when it is none."""
    path = Path(directory) / REPORT_FILE
    try:
        found = json.loads(path.read_text())
        fields = {name: found[name] for name in Report.__dataclass_fields__}
        fields["before"], fields["after"] = Size(**found["before"]), Size(**found["after"])
        fields["matrices"] = tuple(Matrix(**m) for m in found["matrices"])
        fields["notes"] = tuple(found["notes"])
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}: not a report of a conversion ({error!r})") from error
    return Report(**fields)


def relative(pairs: Iterable[tuple[float, float]]) -> float:
    """sqrt(sum error^2 / sum norm^2) of (error, norm); 0 where there is no difference at all."""
    errors, norms = zip(*pairs, strict=True)
    norm = math.hypot(*norms)
    return math.hypot(*errors) / norm if norm else 0.0


def rank_span(ranks: Sequence[int | str]) -> str:
    """16, 16-64, full, 16-64+full: what ranks a group of matrices has."""
    numbers = sorted({r for r in ranks if not isinstance(r, str)})
    words = []
    if numbers:
        words = [str(numbers[0]) if len(numbers) == 1 else f"{numbers[0]}-{numbers[-1]}"]
    return "+".join([*words, *(["full"] if "full" in ranks else [])])


def _heading(report: Report) -> tuple[str, str]:
    name = Path(report.directory).name
    return f"{name}: {report.settings['rank']}", f"{report.after} (before: {report.before})"


def _expert_table(report: Report) -> list[str]:
    weighted = report.relative_output_error() is not None
    head = ("expert", "gate", "up", "down", "parameters", "bytes", "error")
    rows = [(*head, "of outputs") if weighted else head]
    for expert in report.experts:
        own = report.select(expert=expert)
        row = [str(expert)]
        row += [rank_span([m.rank for m in own if m.projection == p]) for p in PROJECTIONS]
        row += [scaled(sum(m.parameters for m in own)), f"{scaled(sum(m.bytes for m in own))}B"]
        row.append(f"{report.relative_error(expert=expert):.4f}")
        if weighted:
            outputs = report.relative_output_error(expert=expert)
            row.append("" if outputs is None else f"{outputs:.4f}")
        rows.append(tuple(row))
    return aligned(rows)


def _layer_table(report: Report) -> list[str]:
    """A line a layer: each expert's ranks and error, where they fit on the screen."""
    cells = [("layer", *(f"expert {e}" for e in report.experts))]
    for layer in report.layers:
        row = [str(layer)]
        for expert in report.experts:
            own = report.select(layer=layer, expert=expert)
            ranks = [str(m.rank) for m in own]
            same = ranks[0] if len(set(ranks)) == 1 else "/".join(ranks)
            row.append(f"{same}  {report.relative_error(layer=layer, expert=expert):.3f}")
        cells.append(tuple(row))
    lines = aligned(cells)
    if max(map(len, lines)) <= _WIDTH:
        return lines
    spans = [("layer", "gate", "up", "down", "error")]
    for layer in report.layers:
        own = report.select(layer=layer)
        ranks = [rank_span([m.rank for m in own if m.projection == p]) for p in PROJECTIONS]
        spans.append((str(layer), *ranks, f"{report.relative_error(layer=layer):.3f}"))
    return aligned(spans)


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines, each column as wide as its widest."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)).rstrip()
        for row in rows
    ]
