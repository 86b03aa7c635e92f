"""A checkpoint with one expert at another rank: cut to the best of it, grown, or full-size."""

from __future__ import annotations

import argparse

from . import add_compat, describe, progress
from .member_arguments import member, rank

NAME, HELP = "rerank", "a checkpoint with an expert at another rank"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a mixture's checkpoint")
    parser.add_argument("expert", metavar="E", type=member)
    parser.add_argument(
        "rank", metavar="R", type=rank, help="0 or full for full-size; or gate,up,down, as 8,0,full"
    )
    parser.add_argument("out", metavar="DST", help="directory of the new checkpoint")
    parser.add_argument(
        "--method", choices=("exact", "randomized"), default="exact",
        help="of the SVD of a full-size expert; randomized is faster at small ranks",
    )  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of the rows that a larger rank adds")
    add_compat(parser)


def run(arguments: argparse.Namespace) -> int:
    from .. import checkpoint_members

    layout = checkpoint_members.rerank(
        arguments.source,
        arguments.expert,
        arguments.rank,
        arguments.out,
        method=arguments.method,
        seed=arguments.seed,
        compat=arguments.compat,
        say=progress(NAME),
    )
    print(describe(layout))
    return 0
