"""README's table of times, from the records: the last one of each shape, size, dtype and device.

python -m benchmarks.tables            # print it
python -m benchmarks.tables --write    # put it into README.md, between the two markers
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import bench

README = bench.ROOT.parent / "README.md"
BEGIN, END = "<!-- times: begin -->", "<!-- times: end -->"
COLUMNS = {
    "ours, layer": "ours, with its router",
    "ours, experts": "ours, given the routing",
    "fair eager, by index": "fair eager, by index",
    "fair eager, every expert, compiled": "fair eager, every expert, compiled",
    "published": "the published way",
}
FLOORS = ("dense FFN compiled", "dense FFN")


def latest(path: Path) -> list[dict[str, Any]]:
    """The last record of each shape, number of tokens, dtype and device, in the file's order."""
    found: dict[tuple, dict[str, Any]] = {}
    for line in path.read_text().splitlines():
        record = json.loads(line)
        key = tuple(record[name] for name in ("shape", "tokens", "dtype", "device"))
        found.pop(key, None)
        found[key] = record
    return list(found.values())


def row(record: dict[str, Any], name: str) -> str | None:
    """One line: what was timed, our time, and every candidate over the dense FFN."""
    times = record.get(name)
    if not times:
        return None
    floor = next(times[candidate] for candidate in FLOORS if candidate in times)
    what = name.removesuffix("_ms").replace("_", " + ")
    cells = [
        f"`{record['shape']}`, T = {record['tokens']}, {record['dtype']}, {what}",
        f"{record['device']}, {record['commit']}",
        f"{floor:.2f} ms",
        *(f"{times[key] / floor:.2f}" if key in times else "" for key in COLUMNS),
    ]
    return "| " + " | ".join(cells) + " |"


def table(records: list[dict[str, Any]]) -> str:
    """Markdown; every number but the dense FFN's time is a multiple of it, of the same run."""
    head = ["shape", "device, commit", "one dense FFN", *COLUMNS.values()]
    lines = ["| " + " | ".join(head) + " |", "| " + " | ".join("---" for _ in head) + " |"]
    rows = (row(r, name) for r in records for name in ("forward_ms", "forward_backward_ms"))
    return "\n".join([*lines, *(line for line in rows if line)])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="into README.md")
    given = parser.parse_args()
    text = table(latest(bench.ROOT / "results" / "experts.jsonl"))
    if not given.write:
        print(text)
        return 0
    before, _, rest = README.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    fresh = README.with_suffix(".new")
    fresh.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")
    fresh.replace(README)
    return 0


if __name__ == "__main__":
    sys.exit(main())
