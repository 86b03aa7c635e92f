"""Takes the benchmarks and keeps records: correctness before timing, progress on stderr, a
short table last.

    python -m benchmarks.run --quick              # main shape, decode, short ops: 2.5 minutes
    python -m benchmarks.run --all                # all named shapes: 9 minutes on an H100
    python -m benchmarks.run --aims               # of these, what docs/kernels.md shows: 4 minutes
    python -m benchmarks.run --training           # and its table of training: 5 minutes
    python -m benchmarks.run --shape flexolmo_mixed --tokens 64 4096 --backward
    python -m benchmarks.run --op permutation     # the ops of one file, or part of an op's name

A group, one shape at one number of tokens or one file of ops, is begun only if its time is left; a
record is written as soon as it is taken, so an interrupt or a time limit loses one group at most.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import aims, bench, bench_experts, printed, records, training
from benchmarks.candidates import CANDIDATES, PEERS
from benchmarks.problem import DTYPES
from benchmarks.shapes import SHAPES, SWEEP, SWEPT
from benchmarks.training import FORWARD, STEP

STEMS = ("routing", "attribution", "permutation", "gated_mix", "lowrank", "grouped_gemm")
ALL = tuple(CANDIDATES)
PLAIN = tuple(
    name
    for name in ALL
    if name not in (*PEERS, "Hugging Face eager", "fair eager, by index, compiled")
)
"""Without the slow to compile, and two that others stand for: by index, a compiler finds nothing to
do, and Hugging Face's loop is what its grouped_mm replaces. The main shape has all."""
FEW = tuple(name for name in PLAIN if not name.endswith("expert, compiled"))
OURS = ("ours, layer", "ours, experts", "dense FFN compiled")
SHOWN = (
    *OURS, "fair eager, by index", "fair eager, every expert, compiled", "published",
    "torch grouped_mm", "Hugging Face eager", "Hugging Face grouped_mm",
)  # fmt: skip
"""What README's table and figure show: records that these go into have no fewer."""
STEPS = ("ours, layer", "dense FFN forward", "dense FFN compiled", "fair eager, by index")
"""Of a step of training: all ratios are to one dense FFN's forward."""
TRAINED = (*OURS, *STEPS[1:2], *STEPS[3:], "fair eager, every expert, compiled", "published")
LONGEST = (*FEW, "Hugging Face eager", *PEERS)
"""Of full-size experts, with libraries that need a minute to compile."""


class Group(NamedTuple):
    """What is measured together, and about how many seconds that takes on an H100."""

    shape: str
    tokens: int
    expected_s: float
    names: tuple[str, ...] = ()  # of candidates; none: the ops of `stem`
    which: str = FORWARD  # of training.PASSES
    stem: str = ""
    op: str = ""  # part of the names of the ops that are wanted; none: all

    def __str__(self) -> str:
        what = f"ops of {self.stem}" if self.stem else "layer"
        which = "" if self.which == FORWARD else f", {self.which}"
        return f"{what}, {self.shape}, T = {self.tokens}{which}"


def layer(
    shape: str, tokens: int, names: tuple[str, ...], expected_s: float, which: str = FORWARD
) -> Group:
    return Group(shape, tokens, expected_s, names, which)


def quick() -> list[Group]:
    """The main shape, ops that only a figure of their own judges, a step of training, decode."""
    full = SHAPES[SWEPT].tokens
    return [
        layer(SWEPT, full, SHOWN, 50),
        Group(SWEPT, full, 25, stem="routing"),
        Group(SWEPT, full, 10, stem="attribution"),
        Group(SWEPT, full, 10, stem="permutation"),
        layer(SWEPT, full, TRAINED, 35, STEP),
        layer(SWEPT, 8, (*OURS, "fair eager, by index", "Hugging Face grouped_mm"), 15),
    ]


def everything() -> list[Group]:
    """All named shapes, the most telling first: time may run out."""
    full, compiles = SHAPES[SWEPT].tokens, ("flexolmo_6x16", "flexolmo_mixed", "flexolmo_large")
    both = {True: (PLAIN, 25), False: (FEW, 15)}
    named = ((name, shape) for name, shape in SHAPES.items() if name not in (SWEPT, "tiny"))
    shapes = [layer(name, shape.tokens, *both[name in compiles]) for name, shape in named]
    sweep = [layer(SWEPT, tokens, SHOWN, 18) for tokens in SWEEP if tokens != full]
    return [
        layer(SWEPT, full, ALL, 60),
        Group(SWEPT, full, 25, stem="routing"),
        Group(SWEPT, full, 10, stem="attribution"),
        Group(SWEPT, full, 10, stem="permutation"),
        *shapes,
        *sweep,
        *(Group(SWEPT, full, 15, stem=stem) for stem in STEMS[3:]),
        layer(SWEPT, full, TRAINED, 35, STEP),
        layer("flexolmo_full", full, LONGEST, 75),
        layer("flexolmo_6x16", full, TRAINED, 30, STEP),
        layer("flexolmo_large", full, TRAINED, 30, STEP),
        layer("flexolmo_full", full, (*OURS, "torch grouped_mm", "published"), 20, STEP),
    ]


def training_steps() -> list[Group]:
    """The lines of docs/kernels.md about training, the most telling first."""
    T, pair = SHAPES[SWEPT].tokens, "flexolmo_k2_of_2"
    return [
        layer(SWEPT, T, TRAINED, 45, STEP),
        layer(SWEPT, T, STEPS, 25, training.ONE),
        layer(pair, T, (*STEPS, "PEFT LoRA on a dense FFN", "PEFT LoRA"), 35, training.ONE),
        layer("flexolmo_full_k2", T, STEPS, 30, training.ONE),
        layer(SWEPT, T, STEPS, 30, training.ALL),
        layer("flexolmo_mixed", T, (*STEPS, "ours, experts"), 35, STEP),
        layer("flexolmo_full", T, (*STEPS, "torch grouped_mm"), 35, training.ALL),
        layer(SWEPT, T, STEPS[:3], 20, training.RECOMPUTE),
    ]


def aimed_at() -> list[Group]:
    """Those of `everything` that have a line in docs/kernels.md, or a place in README's figure."""
    wanted = {(aim.shape, aim.tokens) for aim in aims.AIMS if aim.op == "layer"}
    wanted |= {(SWEPT, tokens) for tokens in SWEEP}
    layers = [
        group._replace(names=SHOWN, expected_s=min(group.expected_s, 40))
        if group.names == ALL
        else group
        for group in everything()
        if group.names not in ((), LONGEST)
        and group.which == FORWARD
        and (group.shape, group.tokens) in wanted
    ]
    ops = min((aim.op for aim in aims.AIMS if aim.op != "layer"), key=len)
    return [Group(SWEPT, SHAPES[SWEPT].tokens, 10, stem="routing", op=ops), *layers]


class Progress:
    """Lines on stderr with the time since the start and the time left."""

    def __init__(self, budget_s: float) -> None:
        self.begin, self.budget_s = time.monotonic(), budget_s
        self.deadline = self.begin + budget_s

    @property
    def left(self) -> float:
        return self.deadline - time.monotonic()

    def say(self, message: str) -> None:
        gone = time.monotonic() - self.begin
        print(f"[{gone:4.0f} of {self.budget_s:.0f} s] {message}", file=sys.stderr, flush=True)


def take(
    groups: list[Group],
    device: str,
    dtype: torch.dtype,
    progress: Progress,
    context: dict[str, Any],
    write: Callable[[dict[str, Any]], None],
    start: int = 1,
) -> list[str]:
    """Measure the groups from number `start` on; returns what was left out or failed, in words."""
    missing = []
    for number, group in list(enumerate(groups, 1))[start - 1 :]:
        title = f"{number}/{len(groups)} {group}"
        if number > start and progress.left < group.expected_s:
            missing.append(f"{title}: not begun, no time left")
            continue

        def say(message: str, title: str = title) -> None:
            progress.say(f"{title}: {message}")

        say(f"about {group.expected_s:.0f} s on an H100")
        try:
            _take_one(group, device, dtype, progress, context, write, say)
        except KeyboardInterrupt:
            missing.append(f"{group} and what follows: interrupted")
            break
        except Exception as error:
            missing.append(f"{group}: {type(error).__name__}: {str(error).strip()[:300]}")
            progress.say(missing[-1])
    return missing


def _take_one(group, device, dtype, progress, context, write, say) -> None:
    if group.stem:
        module = importlib.import_module(f"benchmarks.bench_{group.stem}")
        found = bench.price_all(
            module.prices, group.shape, group.tokens, device=device, context=context, say=say,
            seconds=min(1.0, group.expected_s / 20), op=group.op,
        )  # fmt: skip
        for record in found:
            write(record)
        return
    bench_experts.price(
        group.shape, group.tokens, group.names, device=device, dtype=dtype, context=context,
        passes=(group.which,), say=say, write=write, seconds=min(8.0, group.expected_s / 5),
        deadline=progress.deadline,
    )  # fmt: skip


def chosen(given: argparse.Namespace, device: str) -> list[Group]:
    """The groups that the command line asks for."""
    default = SWEPT if device == "cuda" else "small"
    if given.op:
        stems, op = ((given.op,), "") if given.op in STEMS else (STEMS, given.op)
        names = given.shape or [default]
        return [
            Group(name, tokens, 20, stem=stem, op=op)
            for stem in stems for name in names for tokens in given.tokens or [SHAPES[name].tokens]
        ]  # fmt: skip
    named = given.quick or given.all or given.aims or given.training
    if given.shape or given.tokens or not named:
        passes = (FORWARD, STEP) if given.backward else (FORWARD,)
        return [
            layer(name, tokens, tuple(given.candidates or ALL), 60, which)
            for name in given.shape or [default]
            for tokens in given.tokens or [SHAPES[name].tokens] for which in passes
        ]  # fmt: skip
    sets = ((given.all, everything), (given.aims, aimed_at), (given.training, training_steps))
    groups = next((groups for wanted, groups in sets if wanted), quick)()
    if device == "cpu":
        # The wide shapes take minutes a candidate there: the small one stands for them all.
        least = SHAPES["small"].tokens
        moved = [g._replace(shape="small", tokens=min(g.tokens, least)) for g in groups]
        groups = list({str(group): group for group in reversed(moved)}.values())[::-1]
    return groups


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="the main shape, short ops: 2.5 minutes")
    size.add_argument("--all", action="store_true", help="all named shapes: 9 minutes")
    size.add_argument("--aims", action="store_true", help="what docs/kernels.md shows: 4 minutes")
    size.add_argument("--training", action="store_true", help="steps of training: 5 minutes")
    parser.add_argument("--shape", nargs="+", choices=SHAPES, help="layers of these shapes")
    parser.add_argument("--tokens", nargs="+", type=int, help="default: the shape's")
    parser.add_argument("--candidates", nargs="+", choices=CANDIDATES, metavar="NAME")
    parser.add_argument("--op", help=f"single ops instead: {', '.join(STEMS)}, or part of a name")
    parser.add_argument("--backward", action="store_true", help="forward + backward too")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument(
        "--seconds", type=float, help="budget; default 150, with --all, --aims, --training 530"
    )
    parser.add_argument("--start", type=int, default=1, help="number of the first group to take")
    parser.add_argument("--commit", help="to record, where the sources have no git history")
    parser.add_argument(
        "--results", type=Path, default=records.RESULTS,
        help="folder of records, or one .jsonl file for all",
    )  # fmt: skip
    given = parser.parse_args(words)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    long = given.all or given.aims or given.training
    progress = Progress(given.seconds or (530 if long else 150))
    groups = chosen(given, device)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    progress.say("measuring a large copy and a large matrix product")
    context = {**records.environment(device, given.commit), "roofs": records.roofs(device)}
    roofs = context["roofs"]
    head = (
        f"{context['device']}, torch {context['torch']}, triton {context['triton']}, "
        f"{context['commit']}: copy {roofs['copy_tb_s']} TB/s, matmul "
        f"{roofs['matmul_tflop_s']} TFLOP/s ({roofs['matmul_dtype']})"
    )
    print(head, flush=True)
    taken: list[dict[str, Any]] = []

    def write(record: dict[str, Any]) -> None:
        taken.append(record)
        records.append(record, given.results)
        print(printed.full(record), flush=True)

    dtype = getattr(torch, given.dtype) if given.dtype else DTYPES[device]
    missing = take(groups, device, dtype, progress, context, write, given.start)
    print(f"\n{head}\n{printed.short(taken)}")
    faults = printed.wrong(taken)
    for line in (*missing, *faults):
        print(f"MISSING: {line}")
    progress.say(f"{len(taken)} records in {given.results}")
    begun = [line for line in missing if "no time left" not in line]
    return 1 if faults or begun or not taken else 0


if __name__ == "__main__":
    sys.exit(main())
