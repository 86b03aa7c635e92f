"""A checkpoint with every expert full-size, W_0 + B A: a FlexOlmo, for what reads nothing else."""

from __future__ import annotations

import argparse

from . import describe, progress

NAME, HELP = "densify", "every expert full-size, as a FlexOlmo checkpoint"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC")
    parser.add_argument("out", metavar="DST", help="directory of the new one")
    parser.add_argument("--fused", action="store_true", help="write gate_up_proj and down_proj")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to compute; default: cuda if there is one"
    )


def run(arguments: argparse.Namespace) -> int:
    from .. import backend
    from ..checkpoint_edit import densify

    layout = densify(
        arguments.source,
        arguments.out,
        fused=arguments.fused,
        device=backend.device_or_default(arguments.device),
        say=progress(NAME),
    )
    print(describe(layout))
    return 0
