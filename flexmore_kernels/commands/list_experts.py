"""The experts of a checkpoint: number, name, owner, licence, ranks, size; no weights are read."""

from __future__ import annotations

import argparse
import json

NAME, HELP = "experts", "the experts of a checkpoint: names, owners, ranks, sizes"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR")
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint_config import as_triple, in_words
    from ..checkpoint_members import list_experts

    members = list_experts(arguments.checkpoint)
    if arguments.json:
        print(json.dumps([member._asdict() for member in members], indent=1))
        return 0
    rows = [("", "name", "owner", "licence", "ranks", "MB", "")]
    for one in members:
        kinds = in_words(map(as_triple, one.layer_ranks))
        cells = (one.name, one.owner or "-", one.licence or "-", kinds, f"{one.nbytes / 1e6:,.2f}")
        rows.append((str(one.number), *cells, "shared" if one.shared else ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(map(str.ljust, row, widths)).rstrip())
    return 0
