"""A checkpoint without some of its experts: what it computes with them excluded, and smaller."""

from __future__ import annotations

import argparse

from . import add_compat, describe, experts, progress

NAME, HELP = "drop", "a checkpoint without some of its experts"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("out", metavar="DST", help="directory of the new one")
    parser.add_argument(
        "--experts",
        type=experts,
        required=True,
        metavar="E,E",
        help="those to leave out, as 2,5 or math,law",
    )
    add_compat(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint_edit import drop

    layout = drop(
        arguments.source,
        arguments.experts,
        arguments.out,
        compat=arguments.compat,
        say=progress(NAME),
    )
    print(describe(layout))
    return 0
