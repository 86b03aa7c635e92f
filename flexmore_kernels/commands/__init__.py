"""Commands of `flexmore`, a module each: `NAME`, `HELP`, `add(parser)` for its arguments, and
`run(arguments)`, which does it and returns the exit code. They import what they need when they
run, so that `flexmore --help` is quick.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ..checkpoint_layout import Layout

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


def add_compat(parser: argparse.ArgumentParser) -> None:
    """--compat."""
    parser.add_argument(
        "--compat", action="store_true", help="one rank an expert, zero-padded: for plain readers"
    )


def experts(text: str) -> list[int | str]:
    """An argument's experts, as 2,5 or math,law."""
    parts = [part.strip() for part in text.split(",")]
    return [int(part) if part.isdecimal() else part for part in parts]


def progress(command: str) -> Callable[[str], None]:
    """Where a long command says how far it is: stderr, a line each time."""
    return lambda text: print(f"flexmore {command}: {text}", file=sys.stderr, flush=True)


def describe(layout: Layout) -> str:
    """A written checkpoint in one line."""
    config = layout.config
    return (
        f"{layout.directory}: {layout.kind}, top-{config['num_experts_per_tok']} of "
        f"{config['num_experts']} experts, {sum(p.nbytes for p in layout.parts.values()):,} bytes"
    )
