"""The command line, `flexmore <command>`: parses, runs the command, says what failed.

Each command is a module of `commands/`.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from .commands import (
    FAILED,
    activations,
    add,
    bench,
    convert,
    demo,
    densify,
    drop,
    embed,
    env,
    export_adapter,
    export_expert,
    generate,
    import_adapters,
    inspect,
    list_experts,
    merge,
    plan,
    replace,
    rerank,
    router,
    split,
    sweep,
    tag,
    upcycle,
    verify,
)

COMMANDS = (
    demo, generate, inspect, verify,
    convert, sweep, activations,
    merge, split, drop, densify, import_adapters, export_adapter,
    add, replace, rerank, list_experts, tag, export_expert, upcycle,
    embed, router,
    plan, bench, env,
)  # fmt: skip
MISUSED = 2


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
        prog="flexmore", description="Kernels for FlexMoRE: convert, run, check."
    )
    added = parser.add_subparsers(dest="command", required=True, metavar="command")
    for command in COMMANDS:
        one = added.add_parser(command.NAME, help=command.HELP, description=command.__doc__)
        command.add(one)
        one.set_defaults(run=command.run)
    return parser


if __name__ == "__main__":
    sys.exit(main())
