"""Tables of whole models and of conversion, from the records: parts of benchmarks.tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

OURS, DENSE, THEIRS = "ours", "dense FFN", "Hugging Face"
HEAD = (
    "whole model", "ours", "tokens a second", "of those with a dense FFN",
    "Hugging Face, full-size experts", "ours is faster", "device, commit",
)  # fmt: skip


def generation(found: Sequence[dict[str, Any]]) -> str:
    """Markdown; a line for each thing that was asked of the models on a GPU."""
    rows = []
    for record in found:
        if record["benchmark"] != "generation" or record["driver"] is None:
            continue
        times = {name: one["ms"] for name, one in record["results"].items() if "ms" in one}
        if OURS not in times:
            continue
        ours, dense = times[OURS], times.get(DENSE)
        theirs = sorted((ms, name) for name, ms in times.items() if name.startswith(THEIRS))
        names = [
            f"{_milliseconds(ms)} {name.removeprefix(THEIRS).strip() or 'as it runs'}"
            for ms, name in theirs
        ]
        cells = (
            _what(record),
            _milliseconds(ours),
            f"{record['tokens'] / ours * 1e3:,.0f}",
            f"{dense / ours:.2f}" if dense else "",
            "; ".join(names),
            ", ".join(f"{ms / ours:.1f} x" for ms, _ in theirs),
            f"{record['device']}, {record['commit']}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    head = "| " + " | ".join(HEAD) + " |"
    return "\n".join([head, "|" + " --- |" * len(HEAD), *rows]) if rows else ""


def conversion(found: Sequence[dict[str, Any]]) -> str:
    """Markdown; a line a layer that was converted on a GPU."""
    head = "| conversion of a layer | exact | randomised | device, commit |"
    rows = []
    for record in found:
        if record["benchmark"] != "conversion" or record["driver"] is None:
            continue
        cells = [
            f"{len(record['ranks']) - 1} experts, {record['matrices']} matrices of "
            f"{record['hidden']} x {record['intermediate']}, to rank {max(record['ranks'])}"
        ]
        for method in ("exact", "randomized"):
            result = record["results"].get(method, {})
            cells.append(f"{result['ms'] / 1e3:.2f} s" if "ms" in result else "")
        cells.append(f"{record['device']}, {record['commit']}")
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join([head, "| --- | --- | --- | --- |", *rows]) if rows else ""


def _what(record: dict[str, Any]) -> str:
    work = record["model"]
    if record["op"] == "prefill":
        requests, length = work["prompts"]
        return f"a prompt, {requests} x {length}"
    requests = "1 request" if record["tokens"] == 1 else f"{record['tokens']} requests"
    how = "a step" if record["op"] == "decode" else f"`generate`, each of {work['new_tokens']}"
    return f"{how}, {requests}, after {work['context']}"


def _milliseconds(ms: float) -> str:
    return f"{ms:.3g} ms"


def routers(found: Sequence[dict[str, Any]]) -> str:
    """Markdown; a line for each number of tokens that a layer or model was timed at on a GPU: each
    candidate's time, as a multiple of the first one's."""
    rows = []
    for record in found:
        if record["benchmark"] != "routers" or record["driver"] is None:
            continue
        (first, base), *others = ((name, one["ms"]) for name, one in record["results"].items())
        what = {"router": "a layer"}.get(record["op"], record["op"].partition(",")[0])
        cells = (
            f"{what}, T = {record['tokens']}",
            f"{first} {_milliseconds(base)}",
            ", ".join(f"{name} {ms / base:.3f}" for name, ms in others),
            f"{record['device']}, {record['commit']}",
        )
        rows.append("| " + " | ".join(cells) + " |")
    head = "| routers, attribution | time | multiples of it | device, commit |"
    return "\n".join([head, "| --- | --- | --- | --- |", *rows]) if rows else ""


TABLES = (generation, conversion, routers)
