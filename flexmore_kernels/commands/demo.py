"""Show the packaged mixture on its domains; then run a checkpoint's MoE layers, check each against
the reference, compare times."""

from __future__ import annotations

import argparse

from . import add_device, positive

NAME, HELP = "demo", "text of each domain, and which expert made it; MoE layers run and checked"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT_DIR", help="default: one is made"
    )
    add_device(parser)
    parser.add_argument("--tokens", type=positive, help="default: 4096 on cuda, else 256")
    parser.add_argument(
        "--checks", action="store_true", help="the checks of the layers alone, no text"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--break", dest="break_it", action="store_true", help="swap two experts: must fail"
    )


def run(arguments: argparse.Namespace) -> int:
    import sys

    import torch

    from .. import backend, demo, domains_demo

    device = backend.device_or_default(arguments.device)
    if arguments.checkpoint is None and not (arguments.checks or arguments.break_it):
        try:
            domains_demo.show(device=device, colour=sys.stdout.isatty())
        except ValueError as error:
            if domains_demo.TOKENIZERS not in str(error):
                raise
            print(f"flexmore demo: no text of the packaged mixture: {error}", file=sys.stderr)
    return demo.run(
        arguments.checkpoint,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        tokens=arguments.tokens,
        break_it=arguments.break_it,
        seed=arguments.seed,
    )
