"""One checkpoint of the experts of several whose shared tensors agree; nothing is trained."""

from __future__ import annotations

import argparse

from . import add_compat, describe, positive, progress

NAME, HELP = "merge", "one checkpoint of the experts of several"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sources", nargs="+", metavar="SRC", help="two or more checkpoints")
    parser.add_argument("out", metavar="DST", help="directory of the new one")
    parser.add_argument(
        "--shared", choices=("equal", "average"), default="equal",
        help="shared tensors must be the same bits (default), or their mean is taken",
    )  # fmt: skip
    parser.add_argument("--top-k", type=positive, help="experts a token; default: the first's")
    parser.add_argument(
        "--mixed", action="store_true", help="accept model types flexmore and flex_olmo together"
    )
    add_compat(parser)


def run(arguments: argparse.Namespace) -> int:
    from ..checkpoint_edit import merge

    layout = merge(
        arguments.sources,
        arguments.out,
        shared=arguments.shared,
        top_k=arguments.top_k,
        mixed=arguments.mixed,
        compat=arguments.compat,
        say=progress(NAME),
    )
    print(describe(layout))
    return 0
