"""A layer beside one dense FFN; --explain: which way each expert takes, floors, shares."""

from __future__ import annotations

import argparse
import json
import sys
import warnings

from . import add_device, positive

NAME = "bench"
HELP = "a layer beside one dense FFN; --explain: why it takes what it takes"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shape", nargs="?", help="default: flexolmo_6x64 on cuda, else small")
    parser.add_argument("--list", action="store_true", help="the shapes by name")
    parser.add_argument(
        "--hidden",
        type=positive,
        metavar="D",
        help="D of a shape of your own (with the next three)",
    )
    parser.add_argument(
        "--intermediate", type=positive, metavar="F", help="F, the width of an expert's FFN"
    )
    parser.add_argument(
        "--top-k", type=positive, metavar="K", help="experts that a token is sent to"
    )
    parser.add_argument(
        "--ranks", nargs="+", metavar="R",
        help="of the experts beside the base: 64x6 16 0 for six of 64, one of 16, a full-size one",
    )  # fmt: skip
    parser.add_argument(
        "--tokens", type=positive, nargs="+", metavar="T", help="T to time (default: the shape's)"
    )
    add_device(parser)
    parser.add_argument(
        "--prepare", action="store_true", help="time the layer after layer.prepare()"
    )
    parser.add_argument(
        "--explain", action="store_true", help="routes, ways, floors, stages, kernels"
    )
    parser.add_argument("--json", action="store_true", help="the same for programs")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import backend, explain, explain_text
    from ..shapes import SHAPES, parse

    if arguments.list:
        for name, shape in SHAPES.items():
            print(f"{name:<18}{shape.why}")
        return 0
    device = backend.device_or_default(arguments.device)
    name, shape = parse(
        arguments.shape or ("flexolmo_6x64" if device == "cuda" else "small"),
        arguments.hidden, arguments.intermediate, arguments.ranks, arguments.top_k,
    )  # fmt: skip
    dtype = arguments.dtype or ("bfloat16" if device == "cuda" else "float32")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype")
        report = explain.run(
            name,
            shape,
            arguments.tokens or [shape.tokens],
            device=device,
            dtype=getattr(torch, dtype),
            explain=arguments.explain,
            merge="auto" if arguments.prepare else False,
            say=lambda text: print(f"flexmore bench: {text}", file=sys.stderr, flush=True),
        )
    print(json.dumps(report, indent=1) if arguments.json else explain_text.as_text(report))
    return 0
