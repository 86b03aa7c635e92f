"""A checkpoint with one expert more; the others keep every bit."""

from __future__ import annotations

import argparse

from . import add_compat, describe, progress
from .member_arguments import add_newcomer, newcomer

NAME, HELP = "add", "a checkpoint with one expert more"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a mixture's checkpoint")
    add_newcomer(parser)
    parser.add_argument(
        "--merge-shared", metavar="DIR",
        help="the expert's dense model: its other weights join SRC's with weight 1 / (n + 1)",
    )  # fmt: skip
    add_compat(parser)


def run(arguments: argparse.Namespace) -> int:
    from .. import checkpoint_members

    expert, router = newcomer(arguments)
    layout = checkpoint_members.add(
        arguments.source,
        expert,
        arguments.out,
        merge_shared=arguments.merge_shared,
        compat=arguments.compat,
        say=progress(NAME),
        **router,
    )
    print(describe(layout))
    return 0
