"""Tables and the figure of times, from the records: the last one of each key.

python -m benchmarks.tables            # print all tables
python -m benchmarks.tables --write    # README.md's part, docs/kernels.md's, all of results/
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks import aims, figure, model_tables, records
from benchmarks.shapes import SHAPES
from benchmarks.training import FORWARD, STEP

README = records.ROOT.parent / "README.md"
FIGURE = records.RESULTS / "layer.svg"
PAGE = records.RESULTS / "README.md"
KERNELS = records.ROOT.parent / "docs" / "kernels.md"
TIMES, TRAINING = "times", "training"
"""What is generated, by the name in the markers around it."""
COLUMNS = {
    "ours, layer": "ours, with its router",
    "ours, experts": "ours, given the routing",
    "fair eager, by index": "fair eager, by index",
    "fair eager, every expert, compiled": "fair eager, compiled",
    "published": "published way",
    "Hugging Face grouped_mm": "Hugging Face grouped_mm",
    "torch grouped_mm": "torch grouped_mm",
}


NO_OPS = ("experts", "generation", "conversion", "routers")
"""Benchmarks with tables of their own."""
IN_README = ("small", "flexolmo_6x64", "flexolmo_6x16", "flexolmo_mixed", "flexolmo_large",
             "flexolmo_full", "experts_512")  # fmt: skip
"""The shapes whose rows README shows, each on the device that it is for; results/ has all."""


def layer_row(record: dict[str, Any]) -> str:
    """What was timed, one dense FFN, and every candidate as a multiple of it."""
    least, results = figure.floor(record), record["results"]
    times = (results.get(name, {}).get("ms") for name in COLUMNS)
    cells = [
        f"`{record['shape']}`, T = {record['tokens']}, {record['dtype']}, {record['pass']}",
        f"{least:.3g} ms",
        *(f"{ms / least:.2f}" if ms else "" for ms in times),
        f"{record['device']}, {record['commit']}",
    ]
    return "| " + " | ".join(cells) + " |"


def layers(found: Sequence[dict[str, Any]]) -> str:
    """Markdown; every number but the dense FFN's time is a multiple of it, of the same run."""
    head = ["layer", "one dense FFN", *COLUMNS.values(), "device, commit"]
    rows = [
        layer_row(record)
        for record in found
        if record["benchmark"] == "experts" and figure.floor(record)
        and record["tokens"] == SHAPES[record["shape"]].tokens
    ]  # fmt: skip
    return "\n".join(["| " + " | ".join(head) + " |", "|" + " --- |" * len(head), *rows])


def ops(found: Sequence[dict[str, Any]]) -> str:
    """Markdown; single ops on a GPU, with the share of the roof that bounds them."""
    lines = []
    for record in found:
        if record["benchmark"] in NO_OPS or record["driver"] is None:
            continue
        cells = []
        for kernels, result in record["results"].items():
            if "ms" in result:
                shares = [
                    (result.get("share_of_copy"), "copy"),
                    (result.get("share_of_matmul"), "matmul"),
                ]
                share, roof = max((s, r) for s, r in shares if s)
                ms = result["ms"]
                time = f"{ms:.3g} ms" if ms >= 1 else f"{ms * 1e3:.4g} us"
                cells.append(f"{kernels} {time} ({share:.0%} of {roof})")
        lines.append(
            f"| `{record['op']}`, {record['pass']} | `{record['shape']}`, T = {record['tokens']} | "
            f"{'; '.join(cells)} | {record['device']}, {record['commit']} |"
        )
    head = "| op | sizes | time, and share of the measured roof | device, commit |"
    return "\n".join([head, "| --- | --- | --- | --- |", *lines]) if lines else ""


def block(found: Sequence[dict[str, Any]]) -> str:
    """All that stands between the markers in README."""
    swept = figure.sweep(found)
    image = (
        f"![time over the number of tokens]({FIGURE.relative_to(README.parent)})" if swept else ""
    )
    shown = [
        record
        for record in found
        if record["shape"] in IN_README
        and (record["benchmark"] != "experts" or record["pass"] in (FORWARD, STEP))
        and (record["shape"] == "small") == (record["driver"] is None)
    ]
    models = [table(shown) for table in model_tables.TABLES]
    return "\n\n".join(part for part in (image, layers(shown), *models) if part)


def page(found: Sequence[dict[str, Any]]) -> str:
    """The page beside the records: all layers, all ops."""
    head = (
        "# Times\n\nMade from the records in this folder by `python -m benchmarks.tables --write`; "
        "../README.md says\nhow they are taken. Layers are in multiples of one dense FFN of the "
        "base's size, of the same run."
    )
    models = [table(found) for table in model_tables.TABLES]
    return "\n\n".join(part for part in (head, layers(found), *models, ops(found)) if part) + "\n"


def _markers(name: str) -> tuple[str, str]:
    return f"<!-- {name}: begin -->", f"<!-- {name}: end -->"


def between(path: Path, name: str = TIMES) -> str:
    """What stands between the markers."""
    begin, end = _markers(name)
    return path.read_text().partition(begin)[2].partition(end)[0].strip()


def fill(path: Path, text: str, name: str = TIMES) -> None:
    """Put the text between the markers."""
    begin, end = _markers(name)
    before, found, rest = path.read_text().partition(begin)
    if not found:
        raise ValueError(f"{path}: got no {begin}; accepted: a page that has it")
    write(path, f"{before}{begin}\n{text}\n{end}{rest.partition(end)[2]}")


def write(path: Path, text: str) -> None:
    """Replace the file at once."""
    fresh = path.with_suffix(".new")
    fresh.write_text(text)
    fresh.replace(path)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="into README.md, docs/ and results/")
    given = parser.parse_args()
    found = records.latest()
    if not given.write:
        print(page(found))
        return 0
    fill(README, block(found))
    fill(KERNELS, aims.table(found))
    fill(KERNELS, aims.table(found, aims.TRAINING), TRAINING)
    write(PAGE, page(found))
    swept = figure.sweep(found)
    if swept:
        write(FIGURE, figure.svg(swept))
    return 0


if __name__ == "__main__":
    sys.exit(main())
