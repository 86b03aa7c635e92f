"""A checkpoint with another expert in an expert's place; the others keep every bit."""

from __future__ import annotations

import argparse

from . import add_compat, describe, progress
from .member_arguments import add_newcomer, member, newcomer

NAME, HELP = "replace", "a checkpoint with another expert in an expert's place"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a mixture's checkpoint")
    parser.add_argument("old", metavar="E", type=member, help="the expert that goes")
    add_newcomer(parser)
    add_compat(parser)


def run(arguments: argparse.Namespace) -> int:
    from .. import checkpoint_members

    expert, router = newcomer(arguments)
    layout = checkpoint_members.replace(
        arguments.source,
        arguments.old,
        expert,
        arguments.out,
        compat=arguments.compat,
        say=progress(NAME),
        **router,
    )
    print(describe(layout))
    return 0
