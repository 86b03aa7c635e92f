"""What the command prints: each record in full when it is taken, then all of them in short."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from benchmarks import aims, figure

SHORT = {
    "ours, layer": "layer",
    "ours, experts": "experts",
    "fair eager, by index": "fair",
    "fair eager, every expert, compiled": "fair, c.",
    "published": "publ.",
    "Hugging Face grouped_mm": "HF g_mm",
    "torch grouped_mm": "g_mm",
}


def name(record: dict[str, Any]) -> str:
    """What was measured."""
    what = "" if record["op"] == "layer" else f"{record['op']}, "
    which = record["pass"].replace("forward", "fwd").replace("backward", "bwd")
    return f"{what}{which}, {record['shape']}, T={record['tokens']}"


def full(record: dict[str, Any]) -> str:
    """A record as a table: milliseconds, spread, shares of the roofs, error over allowed."""
    lines = [
        "",
        f"{name(record):<46}{'ms':>9}{'p20':>9}{'p80':>9}{'copy':>6}{'matmul':>8}{'error':>7}  how",
    ]
    for candidate, found in record["results"].items():
        if "ms" not in found:
            lines.append(f"  {candidate:<44}  {found['not_run'][:60]}")
            continue
        ratios = [found[key] for key in ("error_ratio", "gradient_error_ratio") if key in found]
        error = max(math.inf if ratio is None else ratio for ratio in ratios)
        shares = (found.get("share_of_copy"), found.get("share_of_matmul"))
        copy, matmul = (f"{share:.0%}" if share else "" for share in shares)
        times = "".join(f"{found[key]:>9.4g}" for key in ("ms", "p20", "p80"))
        how = f"{found['how']} x{found['rounds']}"
        lines.append(f"  {candidate:<44}{times}{copy:>6}{matmul:>8}{error:>7.2f}  {how}")
    return "\n".join(lines)


def short(records: Sequence[dict[str, Any]]) -> str:
    """A line a record. Layers: one dense FFN in milliseconds, and multiples of it."""
    layers = [r for r in records if r["op"] == "layer" and figure.floor(r)]
    lines = []
    if layers:
        head = "".join(f"{words:>9}" for words in ("dense ms", *SHORT.values()))
        lines.append(f"{'times one dense FFN (c.: compiled)':<44}{head}")
    for record in layers:
        least = figure.floor(record)
        times = [record["results"].get(candidate, {}).get("ms") for candidate in SHORT]
        cells = "".join(f"{ms / least:>9.2f}" if ms else f"{'':>9}" for ms in times)
        step = aims.step_ratio(record)
        last = f"  layer {step:.2f} forwards, keeps {aims.saved(record)} KB a token" if step else ""
        lines.append(f"{name(record):<44}{least:>9.4g}{cells}{last}")
    for record in records:
        cells = []
        for candidate, found in record["results"].items():
            if record["op"] != "layer" and "ms" in found:
                copy, matmul = found.get("share_of_copy", 0), found.get("share_of_matmul", 0)
                share = f"{copy:.0%} copy" if copy >= matmul else f"{matmul:.0%} matmul"
                cells.append(f"{candidate} {found['ms'] * 1e3:.4g} us {share}")
        if cells:
            lines.append(f"{name(record):<64}{'; '.join(cells)}")
    return "\n".join(lines)


def wrong(records: Sequence[dict[str, Any]]) -> list[str]:
    """Ours that failed the check or could not run, which is a failure of the whole command."""
    return [
        f"{name(record)}: {candidate}: {found['not_run']}"
        for record in records
        for candidate, found in record["results"].items()
        if "not_run" in found
        and (candidate.startswith("ours") or record["op"] != "layer")
        and candidate != "torch"
        and found["not_run"] != "no time left"
    ]
