"""Full-size experts to low-rank ones, by singular values of their differences to the public one.

Interrupted, the same command goes on where it was. DST appears when it is complete, report.json and
report.svg in it.
"""

from __future__ import annotations

import argparse

from . import DTYPES, progress

NAME, HELP = "convert", "full-size experts to low-rank ones"
RULES = (
    "a rank (obeyed as given), or fixed:64,32,.. one for each expert from 1; energy:0.95, the "
    "least ranks that keep this share of the squared singular values; naive, v01, v02, v02v02, "
    "v06, the authors' rules by entropy; params:2e9 or bytes:8GiB, the least error that a "
    "checkpoint of this size allows; numerical, the ranks of experts that were truncated and "
    "stored dense. All but the first leave a matrix as it is where factors of that rank would "
    "cost as much as a full-size one"
)


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", metavar="SRC", help="a flex_olmo or flexmore checkpoint")
    parser.add_argument("directory", metavar="DST", help="must not exist yet")
    parser.add_argument("--rank", required=True, metavar="RULE", help=RULES)
    add_work(parser)
    parser.add_argument("--json", action="store_true", help="the report for programs")


def add_work(parser: argparse.ArgumentParser) -> None:
    """What `convert` and `sweep` have in common."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument(
        "--method", choices=("exact", "randomized"), default="exact",
        help="of the singular vectors; randomized is faster where ranks are small",
    )  # fmt: skip
    parser.add_argument(
        "--activations", metavar="FILE",
        help="second moments of the inputs: makes the error of the outputs small",
    )  # fmt: skip
    parser.add_argument(
        "--compat", action="store_true",
        help="pad factors to one rank an expert, for the authors' reader",
    )  # fmt: skip
    parser.add_argument("--dtype", choices=DTYPES, help="of what is written; default: as stored")


def work_arguments(arguments: argparse.Namespace) -> dict:
    """The same as keyword arguments of `convert_checkpoint` and `sweep_checkpoints`."""
    import torch

    return {
        "method": arguments.method,
        "device": arguments.device,
        "dtype": getattr(torch, arguments.dtype) if arguments.dtype else None,
        "activations": arguments.activations,
        "compat": arguments.compat,
        "say": progress(arguments.command),
    }


def run(arguments: argparse.Namespace) -> int:
    import json

    from ..conversion.convert import convert_checkpoint

    report = convert_checkpoint(
        arguments.source, arguments.directory, arguments.rank, **work_arguments(arguments)
    )
    print(json.dumps(report.as_dict(), indent=1) if arguments.json else report.as_text())
    return 0
