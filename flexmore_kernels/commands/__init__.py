"""Commands of `flexmore`, a module each: `NAME`, `HELP`, `add(parser)` for its arguments, and
`run(arguments)`, which does it and returns the exit code. They import what they need when they
run, so that `flexmore --help` is quick.
"""

from __future__ import annotations

import argparse

FAILED = 1
DTYPES = ("float32", "bfloat16", "float16", "float64")


def positive(text: str) -> int:
    """An argument's integer >= 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; accepted: an integer >= 1")
    return number


def add_device(parser: argparse.ArgumentParser) -> None:
    """--device and --dtype."""
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    parser.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
