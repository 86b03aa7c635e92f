"""The options of train_expert.py, and what of them is no option."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence

import torch

from flexmore_kernels import backend

# Of the decoder that is made where no --checkpoint is given.
SIZES = {"hidden_size": 128, "intermediate_size": 352, "layers": 4, "heads": 4}
_LEAST = {"rank": 1, "steps": 0, "router_steps": 0, "batch": 1, "length": 1, "warmup": 0,
          "top_k": 1, "seed": 0, "save_every": 1} | dict.fromkeys(SIZES, 1)  # fmt: skip
# What the result does not depend on.
_FREE = ("out", "save_every", "recompute")


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options, checked; ValueError names one that is wrong."""
    parser = argparse.ArgumentParser(
        description="Train a low-rank expert on a text beside a frozen model, then its router.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("text", help="what the expert learns")
    add("out", help="directory of this run: checkpoints, loss.svg, loss.jsonl, then the model")
    add("--checkpoint", metavar="DIR", help="a FlexMoRE or FlexOlmo; else a small decoder is made")
    add("--rank", type=int, default=16, help="of the new expert")
    add("--steps", type=int, default=300, help="of the expert; 0: no new one, the router alone")
    add("--router-steps", type=int, default=100, help="of the router; 0: it is not tuned")
    add("--router-text", metavar="TEXT", help="what the router is tuned on, else the expert's")
    add("--batch", type=int, default=8, help="sequences a step")
    add("--length", type=int, default=128, help="tokens a sequence")
    add("--learning-rate", type=float, default=2e-3)
    add("--router-learning-rate", type=float, default=2e-3)
    add("--schedule", choices=("cosine", "constant"), default="cosine")
    add("--warmup", type=int, default=0, help="steps with a smaller rate, in both stages")
    add("--clip", type=float, default=1.0, help="largest norm of the gradient")
    add("--z-loss", type=float, default=1e-3, help="its share, in both stages")
    add("--balance", type=float, default=1e-2, help="load-balancing loss's share, of the router")
    add("--top-k", type=int, help="experts a token, when the router is tuned and after")
    add("--seed", type=int, default=0)
    add("--save-every", type=int, default=50, metavar="STEPS")
    add("--device", choices=("cpu", "cuda"), help="cuda where there is one")
    add("--dtype", choices=("float32", "bfloat16", "float64"), help="bfloat16 on cuda")
    add("--recompute", action="store_true", help="keep less for the backward, compute it again")
    for name, value in SIZES.items():
        add(_option(name), type=int, help=f"of the decoder that is made ({value})")
    options = parser.parse_args(arguments)
    _check(options)
    return options


def settings(options: argparse.Namespace) -> dict:
    """What the result depends on, by the names that errors use."""
    given = {name: value for name, value in vars(options).items() if name not in _FREE}
    return {"text" if name == "text" else _option(name): given[name] for name in given}


def _option(name: str) -> str:
    return "--" + name.replace("_", "-")


def _check(options: argparse.Namespace) -> None:
    for name, least in _LEAST.items():
        value = getattr(options, name)
        if value is not None and value < least:
            raise ValueError(f"{_option(name)}: got {value}; accepted: an integer >= {least}")
    for name in ("learning_rate", "router_learning_rate", "clip", "z_loss", "balance"):
        value, zero = getattr(options, name), name in ("z_loss", "balance")
        if not math.isfinite(value) or value < 0 or (value == 0 and not zero):
            accepted = "a number >= 0" if zero else "a number > 0"
            raise ValueError(f"{_option(name)}: got {value}; accepted: {accepted}")
    if options.steps == options.router_steps == 0:
        raise ValueError("--steps: got 0 and --router-steps 0; accepted: one of them above 0")
    if options.steps == 0 and options.checkpoint is None:
        raise ValueError("--steps: got 0 without --checkpoint; accepted: 0 with a mixture's")
    for name, value in SIZES.items():
        given = getattr(options, name)
        if options.checkpoint is None:
            setattr(options, name, value if given is None else given)
        elif given is not None:
            raise ValueError(
                f"{_option(name)}: got {given} with --checkpoint, which has its "
                "own sizes; accepted: one of the two"
            )
    if options.checkpoint is None and options.hidden_size % (2 * options.heads):
        raise ValueError(
            f"--heads: got {options.heads}; accepted: what --hidden-size, {options.hidden_size}, "
            "can be divided by, into even parts"
        )
    options.device = backend.device_or_default(options.device)
    if options.dtype is None:
        options.dtype = "bfloat16" if options.device == "cuda" else "float32"
    if options.dtype == "float64" and options.device == "cuda":
        raise ValueError("--dtype: got float64 on cuda; accepted: float32, bfloat16")


def machine(options: argparse.Namespace) -> dict:
    """What the last bits may depend on besides the settings."""
    if options.device == "cuda":
        device = torch.cuda.get_device_name()
    else:
        device = f"{torch.get_num_threads()} CPU threads"
    return {"torch": torch.__version__, "device": device}
