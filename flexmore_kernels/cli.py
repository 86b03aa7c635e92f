"""The command line, `flexmore <command>`: each parses, calls one function, says what failed.

demo     run a checkpoint's MoE layers, check each against the reference, compare times
bench    a layer beside one dense FFN; --explain: which way each expert takes, floors, shares
inspect  what a checkpoint directory holds, checked, without loading it
env      versions, devices, what was built, which kernels run each op and why not the others
"""

from __future__ import annotations

import argparse
import json
import sys
import warnings
from collections.abc import Sequence

FAILED, MISUSED = 1, 2
DTYPES = ("float32", "bfloat16", "float16", "float64")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; return its exit code: 0, 1 when a check or a timed call failed or the
    memory did not suffice, 2 for bad input.
    """
    arguments = _parser().parse_args(argv)
    try:
        return arguments.run(arguments)
    except (ValueError, TypeError, OSError) as error:
        print(f"flexmore {arguments.command}: {error}", file=sys.stderr)
        return MISUSED
    except RuntimeError as error:
        words = _failure(error)
        if words is None:
            raise
        print(f"flexmore {arguments.command}: {words}", file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _failure(error: RuntimeError) -> str | None:
    """One line for a failure to be expected: what failed, what to do about it; None for others."""
    import torch

    from .timing import CallFailed

    named = isinstance(error, CallFailed)
    cause = error.__cause__ if named and error.__cause__ is not None else error
    during = f" while the {error.name} was timed" if named else ""
    lines = str(cause).strip().splitlines()
    first = lines[0] if lines else "it gave no reason"
    if isinstance(cause, torch.OutOfMemoryError) or "DefaultCPUAllocator" in str(cause):
        return f"out of memory{during} ({first}): take fewer --tokens or smaller sizes"
    if named:
        kind = type(cause).__name__
        return f"{kind}{during}: {first}; `flexmore env` prints what a bug report needs"
    return None


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="flexmore", description="Kernels for FlexMoRE: run, check, inspect."
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    demo = commands.add_parser("demo", help="run and check a checkpoint's MoE layers")
    demo.add_argument(
        "checkpoint", nargs="?", metavar="CHECKPOINT_DIR", help="default: one is made"
    )
    demo.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    demo.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    demo.add_argument("--tokens", type=_positive, help="default: 4096 on cuda, else 256")
    demo.add_argument("--seed", type=int, default=0)
    demo.add_argument(
        "--break", dest="break_it", action="store_true", help="swap two experts: must fail"
    )
    demo.set_defaults(run=_demo)

    bench = commands.add_parser(
        "bench", help="a layer beside one dense FFN; --explain: why it takes what it takes"
    )
    bench.add_argument("shape", nargs="?", help="default: flexolmo_6x64 on cuda, else small")
    bench.add_argument("--list", action="store_true", help="the shapes by name")
    bench.add_argument(
        "--hidden",
        type=_positive,
        metavar="D",
        help="D of a shape of your own (with the next three)",
    )
    bench.add_argument(
        "--intermediate", type=_positive, metavar="F", help="F, the width of an expert's FFN"
    )
    bench.add_argument(
        "--top-k", type=_positive, metavar="K", help="experts that a token is sent to"
    )
    bench.add_argument(
        "--ranks", nargs="+", metavar="R",
        help="of the experts beside the base: 64x6 16 0 for six of 64, one of 16, a full-size one",
    )  # fmt: skip
    bench.add_argument(
        "--tokens", type=_positive, nargs="+", metavar="T", help="T to time (default: the shape's)"
    )
    bench.add_argument("--device", choices=("cpu", "cuda"), help="default: cuda where there is one")
    bench.add_argument("--dtype", choices=DTYPES, help="default: bfloat16 on cuda, else float32")
    bench.add_argument(
        "--prepare", action="store_true", help="time the layer after layer.prepare()"
    )
    bench.add_argument(
        "--explain", action="store_true", help="routes, ways, floors, stages, kernels"
    )
    bench.add_argument("--json", action="store_true", help="the same for programs")
    bench.set_defaults(run=_bench)

    inspect = commands.add_parser("inspect", help="what a checkpoint directory holds")
    inspect.add_argument("checkpoint", metavar="CHECKPOINT_DIR")
    inspect.set_defaults(run=_inspect)

    env = commands.add_parser("env", help="versions, devices, kernels: for a bug report")
    env.add_argument("--json", action="store_true", help="the same for programs")
    env.set_defaults(run=_env)
    return parser


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"got {number}; accepted: an integer >= 1")
    return number


def _demo(arguments: argparse.Namespace) -> int:
    import torch

    from . import demo

    return demo.run(
        arguments.checkpoint,
        device=arguments.device,
        dtype=getattr(torch, arguments.dtype) if arguments.dtype else None,
        tokens=arguments.tokens,
        break_it=arguments.break_it,
        seed=arguments.seed,
    )


def _bench(arguments: argparse.Namespace) -> int:
    import torch

    from . import backend, explain, explain_text
    from .shapes import SHAPES, parse

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


def _inspect(arguments: argparse.Namespace) -> int:
    from .checkpoint_layout import read_layout

    layout = read_layout(arguments.checkpoint)
    config = layout.config
    print(
        f"{layout.directory}: {len(layout.shapes)} tensors in {len(set(layout.files.values()))} "
        f"files, all there\n{config['num_hidden_layers']} layers, D = {config['hidden_size']}, "
        f"F = {config['intermediate_size']}, top-{config['num_experts_per_tok']} of "
        f"{config['num_experts']} experts{', with expert bias' if layout.expert_bias else ''}"
    )
    previous = None
    for layer, ranks in enumerate(layout.layer_ranks):
        if ranks != previous:
            print(f"  from layer {layer}: ranks {', '.join(map(str, ranks))}  (0: full-size)")
        previous = ranks
    for note in layout.notes:
        print(f"  note: {note}")
    return 0


def _env(arguments: argparse.Namespace) -> int:
    from . import environment, environment_text

    found = environment.report()
    print(json.dumps(found, indent=1) if arguments.json else environment_text.as_text(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
