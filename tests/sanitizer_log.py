"""Reads a log of compute-sanitizer: `python tests/sanitizer_log.py initcheck LOG`.

Prints how many errors count, and exits with 1 if any does, or if the log has no end. All count but
reads of unwritten memory by kernels of libraries, such as cuBLAS reading past a row in vectors: of
initcheck's reports, those count that name a kernel of ours, which all have flexmore in their names.
They cannot be left out when running, since initcheck has to see libraries write what ours read.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

OURS = "flexmore"
PRINT_LIMIT = 20_000  # that of sanitize.sh; a log of more errors than that is not whole


def errors(tool: str, log: str) -> int | None:
    """The number of errors that count; None if the log does not tell."""
    summary = re.search(r"^=+ (?:ERROR|RACECHECK) SUMMARY: (\d+) (?:error|hazard)", log, re.M)
    if summary is None:
        return None
    total = int(summary[1])
    if tool != "initcheck" or total == 0:
        return total
    if total > PRINT_LIMIT:
        return None
    reports = re.findall(r"^=+ (?!ERROR SUMMARY)\S.*(?:\n=+     \S.*)*", log, re.M)
    library = [r for r in reports if r.split(" ", 1)[1].startswith("Uninit") and OURS not in r]
    return total - len(library)


def main(tool: str, path: str) -> int:
    log = Path(path)
    found = errors(tool, log.read_text(errors="replace")) if log.exists() else None
    print("unknown" if found is None else found)
    return int(found != 0)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
