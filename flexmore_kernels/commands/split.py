"""A checkpoint of two experts, the base and one more, for each expert of one."""

from __future__ import annotations

import argparse

from . import add_compat, describe, progress

NAME, HELP = "split", "a checkpoint of the base and one expert, for each expert"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("out", metavar="DST", help="directory for DST/expert-1 and on")
    add_compat(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint_edit import split
    from ..checkpoint_layout import read_layout

    say = progress(NAME)
    for directory in split(arguments.source, arguments.out, compat=arguments.compat, say=say):
        print(describe(read_layout(directory)))
    return 0
