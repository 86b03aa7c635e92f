"""Run a checkpoint's MoE layers, check each against the reference, compare times."""

from __future__ import annotations

import argparse

from . import add_device, positive

NAME, HELP = "demo", "run and check a checkpoint's MoE layers"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT_DIR", help="default: one is made"
    )
    add_device(parser)
    parser.add_argument("--tokens", type=positive, help="default: 4096 on cuda, else 256")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--break", dest="break_it", action="store_true", help="swap two experts: must fail"
    )


def run(arguments: argparse.Namespace) -> int:
    import torch

    from .. import demo

    return demo.run(
        arguments.checkpoint,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        tokens=arguments.tokens,
        break_it=arguments.break_it,
        seed=arguments.seed,
    )
