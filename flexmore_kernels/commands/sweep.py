"""Many rank choices of one checkpoint with one decomposition of each matrix: a checkpoint each, and
their sizes and errors beside one another.
"""

from __future__ import annotations

import argparse

from .convert import RULES, add_work, work_arguments

NAME, HELP = "sweep", "a checkpoint for each of many rank choices"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a flex_olmo or flexmore checkpoint")
    parser.add_argument("directory", metavar="OUT", help="gets a directory for each choice")
    parser.add_argument("--ranks", nargs="+", default=[], metavar="R", help="fixed ranks")
    parser.add_argument("--rules", nargs="+", default=[], metavar="RULE", help=RULES)
    add_work(parser)
    parser.add_argument("--json", action="store_true", help="the table for programs")


def run(arguments: argparse.Namespace) -> int:
    import json

    from ..conversion import sweep

    rules = [*arguments.ranks, *arguments.rules]
    if not rules:
        raise ValueError("--ranks, --rules: got neither; accepted: at least one choice")
    reports = sweep.sweep_checkpoints(
        arguments.source, arguments.directory, rules, **work_arguments(arguments)
    )
    if arguments.json:
        print(json.dumps(sweep.summary(reports), indent=1))
    else:
        print(sweep.as_text(reports))
    return 0
