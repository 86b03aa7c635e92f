"""Many conversions of one checkpoint by different rules, with one decomposition of each matrix.

Singular factors are nested: those of a smaller rank are the first of a larger one's. Each choice
becomes a whole checkpoint in a directory of its own, named by its rule.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from ..checkpoint_layout import Layout
from ..checkpoint_writer import write_text
from .convert import check_rule, fingerprint_of, open_target, run
from .picture import draw_choices, scaled
from .recover import AnyRule, read_rule
from .report import REPORT_FILE, Report, aligned, rank_span, read_report
from .spectra import Say, forget
from .targets import Target
from .work import prepare

SWEEP_FILE, CURVE_FILE = "sweep.json", "sweep.svg"


def sweep_checkpoints(
    source: str | os.PathLike | Layout,
    directory: str | os.PathLike,
    rules: Sequence[str | int | AnyRule],
    *,
    method: str = "exact",
    device: str | None = None,
    dtype: torch.dtype | None = None,
    activations: str | os.PathLike | None = None,
    compat: bool = False,
    say: Say | None = None,
) -> list[Report]:
    """Convert a checkpoint by each of the rules; see `convert_checkpoint` for the arguments.

    directory: gets a directory for each rule (`name_of`), sweep.json and sweep.svg. What a call
    that was killed has finished is kept, and what it has begun is taken up.

    Raises ValueError for a rule that is there twice, or a directory in which other work is.
    """
    parsed = [read_rule(rule) for rule in rules]
    names = [name_of(rule) for rule in parsed]
    if not parsed or len(set(names)) < len(names):
        raise ValueError(f"rules: got {list(rules)!r}; accepted: one or more, each once")
    directory = Path(directory)
    work = prepare(source, method, device, dtype, activations)
    for rule in parsed:
        check_rule(work, rule)
    done: dict[str, Report] = {}
    with ExitStack() as stack:
        targets = []
        for name, rule in zip(names, parsed, strict=True):
            if (directory / name / REPORT_FILE).is_file():
                report = read_report(directory / name)
                if report.fingerprint == fingerprint_of(work, rule, compat):
                    done[name] = report
                    continue
            try:
                targets.append(open_target(stack, work, directory / name, rule, compat))
            except ValueError:
                _take_back(targets)
                raise
        made = iter(run(work, targets, directory / "sweep", say))
    reports = [done[name] if name in done else next(made) for name in names]
    write_text(directory / SWEEP_FILE, json.dumps(summary(reports), indent=1) + "\n")
    points = [(r.settings["rank"], float(r.after.bytes), r.relative_error()) for r in reports]
    title = f"{work.layout.directory.name}: {scaled(reports[0].before.bytes)}B before"
    write_text(directory / CURVE_FILE, draw_choices(title, points))
    return reports


def _take_back(targets: Sequence[Target]) -> None:
    """Remove the folders of targets of which nothing is written yet."""
    for target in targets:
        if not target.writer.facts:
            forget(target.writer.folder)


def name_of(rule: AnyRule) -> str:
    """The directory of a rule: energy:0.95 is energy-0.95, and a rank r rank-r."""
    text = f"rank-{int(rule.text)}" if rule.text.isdigit() else rule.text
    return re.sub(r"[^\w.+]+", "-", text)


def summary(reports: Sequence[Report]) -> list[dict[str, Any]]:
    """For JSON: of each choice its directory, sizes and errors."""
    return [
        {
            "rank": report.settings["rank"],
            "directory": report.directory,
            "parameters": report.after.parameters,
            "bytes": report.after.bytes,
            "relative_error": report.relative_error(),
            "relative_output_error": report.relative_output_error(),
            "experts": [report.relative_error(expert=e) for e in report.experts],
        }
        for report in reports
    ]


def as_text(reports: Sequence[Report]) -> str:
    """The table on the screen: a line a choice."""
    rows = [("rule", "ranks", "parameters", "bytes", "error", "of outputs")]
    for report in reports:
        outputs = report.relative_output_error()
        rows.append(
            (
                report.settings["rank"],
                rank_span([m.rank for m in report.matrices]),
                scaled(report.after.parameters),
                f"{scaled(report.after.bytes)}B",
                f"{report.relative_error():.4f}",
                "" if outputs is None else f"{outputs:.4f}",
            )
        )
    if not any(row[-1] for row in rows[1:]):
        rows = [row[:-1] for row in rows]
    return "\n".join(aligned(rows))
