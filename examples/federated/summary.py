"""Writes a finished study's page and table again, from its numbers alone.

    python examples/federated/summary.py docs/federated

DIR has results.json; page.html is made of it, and, where README.md has the markers, the table of
claims between them.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path

from claims import in_words, judge
from page import write_page

from flexmore_kernels.checkpoint_writer import write_text

BEGIN, END = "<!-- claims: begin -->", "<!-- claims: end -->"


def table(results: Mapping) -> str:
    """The claims in Markdown: what was expected, what came out, the verdict."""
    head = ("", "claim", "source", "they say", "expected", "result [95 % interval]", "verdict")
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for one in judge(results):
        p = one.prediction
        found = in_words(one.estimate, p.unit) if one.estimate else "not measured"
        outside = ", outside what was expected" if one.inside is False else ""
        expected = f"{p.low:g} to {p.high:g} {p.unit}; {p.verdict}".replace("-", "−")
        cells = (p.key, p.statement, p.source, p.theirs, expected, found,
                 f"**{one.verdict}**{outside}")  # fmt: skip
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(directory: str) -> int:
    folder = Path(directory)
    results = json.loads((folder / "results.json").read_text())
    write_page(results, folder / "page.html")
    readme = folder / "README.md"
    if readme.exists() and BEGIN in (text := readme.read_text()):
        before, _, rest = text.partition(BEGIN)
        after = rest.partition(END)[2]
        write_text(readme, f"{before}{BEGIN}\n{table(results)}\n{END}{after}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
