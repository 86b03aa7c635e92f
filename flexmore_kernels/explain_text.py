"""The report of `explain.run` as text: which way each expert takes, floors, times."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

WAYS = {
    "base": "the base's own matrices",
    "fused": "its delta is added where the hidden sum is formed",
    "grouped": "its delta by products over its own rows",
    "full": "a matrix of its own, over its own rows",
}
FUSED_BY_LIBRARY = "its delta is added by the library, in the pass over all experts"
ROUTES = {
    "decode": "few tokens: one pass over the weights",
    "token-major": "few experts: tokens stay in order",
    "expert-major": "many experts: rows sorted by expert",
    "loop": "plain PyTorch, expert by expert",
}
KERNELS_SHOWN = 12


def as_text(report: dict[str, Any]) -> str:
    """The report for people."""
    roofs = report["roofs"]
    groups = [(rank, len(list(same))) for rank, same in itertools.groupby(report["ranks"])]
    ranks = ", ".join(f"{count} x {rank or 'full-size'}" for rank, count in groups)
    lines = [
        f"{report['shape']}: D = {report['hidden']}, F = {report['intermediate']}, top-"
        f"{report['top_k']} of {len(report['ranks'])} (ranks {ranks}), {report['dtype']}",
        f"{report['device']}: copies {_size(roofs['copy_tb_s'] * 1e12)}/s, multiplies "
        f"{_scaled(roofs['matmul_tflop_s'] * 1e12)}FLOP/s in {roofs['matmul_dtype']}",
        *([report["prepared"]] if report["prepared"] else []),
    ]
    for one in report["tokens"]:
        if "stages" in one:
            lines += ["", *_explained(one)]
    heads = ("tokens", "layer", "p20-p80", "floor", "share", report["dense"], "ratio", "its floor")
    rows = [
        (
            str(one["tokens"]),
            _time(one["layer"]["ms"]),
            f"{_time(one['layer']['p20'])}-{_time(one['layer']['p80'])}",
            _time(one["layer"]["floor_ms"]),
            f"{one['layer']['share']:.0%}",
            _time(one["dense"]["ms"]),
            f"{one['ratio']:.2f}",
            f"{one['floor_ratio']:.2f}",
        )
        for one in report["tokens"]
    ]
    return "\n".join([*lines, "", *_table(heads, rows)])


def _explained(one: dict[str, Any]) -> list[str]:
    """One number of tokens in full."""
    parts = [_experts(one), _stages(one), _kernels(one)]
    down = "one product dense in tokens" if one["dense_down"] else "by rows"
    whole = one["route"] == "loop" or one["by_library"]
    what = ROUTES.get(one["route"], "") + ("" if whole else f"; deltas of down: {down}")
    lines = [f"T = {one['tokens']}, route {one['route']} ({what})", *_served(one["served"])]
    return lines + [line for part in parts if part for line in ("", *part)]


def _served(served: dict[str, str]) -> list[str]:
    """Whose kernels, and of what, where not of all."""
    parts: dict[str, list[str]] = {}
    for part, name in served.items():
        parts.setdefault(name, []).append(part)
    names = [
        name + ("" if own == ["all"] else f" ({', '.join(own)})") for name, own in parts.items()
    ]
    return [f"kernels: {'; '.join(names)}"] if names else []


def _experts(one: dict[str, Any]) -> list[str]:
    rows, ways = [], WAYS | ({"fused": FUSED_BY_LIBRARY} if one["by_library"] else {})
    for (ranks, way), same in itertools.groupby(one["experts"], lambda e: (e["ranks"], e["way"])):
        group = list(same)
        counts = [expert["rows"] for expert in group]
        names = _span(group[0]["expert"], group[-1]["expert"])
        rows.append((names, ranks, _span(min(counts), max(counts)), way, ways.get(way, "")))
    heads = ("expert", "rank", f"rows ({one['expected_rows']:.0f} expected)", "way", "")
    return _table(heads, rows, left=(3, 4))


def _stages(one: dict[str, Any]) -> list[str]:
    def row(name: str, stage: dict[str, Any]) -> tuple[str, ...]:
        size, count = _size(stage["nbytes"]), _scaled(stage["flops"])
        return name, size, count, _time(stage["floor_ms"]), stage["bound"]

    total = sum(stage["floor_ms"] for stage in one["stages"])
    rows = [row(stage["name"], stage) for stage in one["stages"]]
    rows.append(("one after the other", "", "", _time(total), ""))
    rows.append(row("all at once", one["layer"]))
    return _table(("stage", "bytes", "operations", "floor", "bound by"), rows, left=(0, 4))


def _kernels(one: dict[str, Any]) -> list[str]:
    if not one["kernels"]:
        return []
    total = sum(kernel["us"] for kernel in one["kernels"])
    rows = []
    for kernel in one["kernels"][:KERNELS_SHOWN]:
        name = kernel["kernel"].removeprefix("void ").replace("(anonymous namespace)::", "")
        name = name.split("(")[0].replace("flexmore::cuda::", "")
        name = name if len(name) <= 60 else f"{name[:57]}..."
        us, calls = kernel["us"], f"{kernel['calls']:.3g}"
        rows.append((name, calls, _time(us / 1e3), f"{us / total:.0%}"))
    return _table(("kernel", "launches", "time", "share"), rows, left=(0,))


def _span(first: int, last: int) -> str:
    return str(first) if first == last else f"{first}-{last}"


def _time(ms: float) -> str:
    return f"{ms:.4g} ms" if ms >= 1 else f"{ms * 1e3:.4g} us"


def _size(nbytes: float) -> str:
    return f"{_scaled(nbytes)}B"


def _scaled(value: float) -> str:
    """Three digits and a prefix: 1.23 G, ending in a space where there is no prefix."""
    for prefix in ("", "k", "M", "G", "T"):
        if value < 999.5:
            return f"{value:.3g} {prefix}"
        value /= 1000
    return f"{value:.3g} P"


def _table(
    heads: Sequence[str], rows: Sequence[Sequence[str]], left: Sequence[int] = ()
) -> list[str]:
    """Columns right-aligned, but for those in `left`."""
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    return [
        "  ".join(
            cell.ljust(width) if i in left else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in (heads, *rows)
    ]
