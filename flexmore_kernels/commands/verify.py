"""Two checkpoints' outputs, layer by layer before the post-norm, then the logits; exit code 1 when
an error is above the tolerance."""

from __future__ import annotations

import argparse
import json
import sys

from . import DTYPES, FAILED, positive

NAME, HELP = "verify", "compare two checkpoints' outputs, layer by layer"


def add(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", metavar="CHECKPOINT_A", help="what is right")
    parser.add_argument("b", metavar="CHECKPOINT_B", help="what is compared with it")
    parser.add_argument("--tolerance", type=float, metavar="E", help="of |a - b| / |a| "
                        "(default: 1e-5; 1e-10 in float64)")  # fmt: skip
    parser.add_argument("--tokens", type=positive, default=64, metavar="T", help="random ids")
    parser.add_argument("--seed", type=int, default=0, help="of the random ids")
    parser.add_argument("--ids", type=_numbers, metavar="I,I,...", help="these ids instead")
    for side in "ab":
        parser.add_argument(
            f"--experts-{side}",
            type=_numbers,
            metavar="E,E,...",
            help=f"{side} may use these alone",
        )
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="computed in this")
    parser.add_argument("--json", action="store_true", help="the report for programs")


def run(arguments: argparse.Namespace) -> int:
    import torch

    from ..verification import verify

    rows = verify(
        arguments.a,
        arguments.b,
        None if arguments.ids is None else torch.tensor([arguments.ids]),
        tokens=arguments.tokens,
        seed=arguments.seed,
        experts_a=arguments.experts_a,
        experts_b=arguments.experts_b,
        dtype=getattr(torch, arguments.dtype),
        device=arguments.device,
        tolerance=arguments.tolerance,
        say=lambda text: print(f"flexmore {NAME}: {text}", file=sys.stderr, flush=True),
    )
    failed = [row for row in rows if not row.ok]
    if arguments.json:
        listed = [{**row._asdict(), "ok": row.ok} for row in rows]
        print(json.dumps({"ok": not failed, "rows": listed}, indent=1))
        return FAILED if failed else 0
    print(f"{'':<10}{'error':>10}{'worst token':>13}")
    for row in rows:
        mark = "" if row.ok else f"  above {row.tolerance:g}"
        print(f"{row.name:<10}{row.error:>10.2e}{row.worst:>13.2e} ({row.token}){mark}")
    first = f": {failed[0].name} is the first of {len(failed)} above it" if failed else ""
    print(f"{'FAIL' if failed else 'PASS'} at {rows[0].tolerance:g}{first}")
    return FAILED if failed else 0


def _numbers(text: str) -> list[int]:
    """ "0,2,5" as numbers."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"got {text!r}; accepted: 0,2,5") from error
