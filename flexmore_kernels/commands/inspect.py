"""What a checkpoint directory holds, checked, without loading it: kind, sizes, ranks by layer."""

from __future__ import annotations

import argparse
import json

from . import progress

NAME, HELP = "inspect", "what a checkpoint directory holds"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("checkpoint", metavar="CHECKPOINT_DIR")
    parser.add_argument(
        "--numerical-rank",
        action="store_true",
        help="find the ranks of experts that were truncated and then stored full-size (reads them)",
    )
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="of --numerical-rank; default: cuda if there"
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(arguments: argparse.Namespace) -> int:
    from .. import backend, checkpoint_report
    from ..checkpoint_layout import read_layout

    layout = read_layout(arguments.checkpoint)
    found = checkpoint_report.report(layout)
    if arguments.numerical_rank:
        device = backend.device_or_default(arguments.device)
        ranks = checkpoint_report.numerical_ranks(layout, device, progress(NAME))
        found["numerical_ranks"] = ranks
    print(json.dumps(found, indent=1) if arguments.json else checkpoint_report.as_text(found))
    return 0
