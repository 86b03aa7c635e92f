"""What the forward, and a step of training, is to reach, beside what the records say: for
docs/kernels.md.

Floors, and what to reach, were set before the work, from bytes and operations at the rates that
were measured on this GPU. A missed one stays in the table; the page says what bounds it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from benchmarks.figure import floor
from benchmarks.training import ALL, FORWARD, ONE, RECOMPUTE, STEP

Record = dict[str, Any]
DEVICE = "H100"
OURS = "ours, layer"
DENSE_FORWARD = "dense FFN forward"
PEFT = "PEFT LoRA on a dense FFN"
HUGGING_FACE = ("Hugging Face eager", "Hugging Face grouped_mm")
COMPILED = "fair eager, every expert, compiled"


def _ms(record: Record, name: str = OURS) -> float | None:
    return record["results"].get(name, {}).get("ms")


def ratio(record: Record) -> float | None:
    """The layer in dense FFNs of the same run."""
    ours, dense = _ms(record), floor(record)
    return ours / dense if ours and dense else None


def microseconds(record: Record) -> float | None:
    """The layer, replayed from a CUDA graph."""
    ms = _ms(record)
    return ms * 1e3 if ms and record["results"][OURS]["how"] == "graph" else None


def tflops(record: Record) -> float | None:
    return record["results"].get(OURS, {}).get("tflop_s")


def kernels(record: Record) -> float | None:
    """An op of the compiled library, in microseconds."""
    ms = _ms(record, "native")
    return ms * 1e3 if ms else None


def over_hugging_face(record: Record) -> float | None:
    """How many times faster than the better of its two paths, which are given the routing."""
    theirs = [ms for name in HUGGING_FACE if (ms := _ms(record, name))]
    return min(theirs) / _ms(record) if theirs and _ms(record) else None


def over_compiled(record: Record) -> float | None:
    """How many times faster than fair eager under torch.compile."""
    theirs = _ms(record, COMPILED)
    return theirs / _ms(record) if theirs and _ms(record) else None


def step_ratio(record: Record, name: str = OURS) -> float | None:
    """Forward and backward, in dense FFNs' forwards of the same run."""
    ms, dense = _ms(record, name), _ms(record, DENSE_FORWARD)
    return ms / dense if ms and dense else None


def peft_ratio(record: Record) -> float | None:
    """The same of a LoRA by PEFT."""
    return step_ratio(record, PEFT)


def saved(record: Record) -> float | None:
    """What the layer keeps for its backward, in 1000 bytes a token."""
    return record["results"].get(OURS, {}).get("saved_kb_a_token")


class Aim(NamedTuple):
    """A line: floor, what to reach and what to aim at are in the unit of `value`; None: not set,
    and without `reach` the line is for comparison. `device`: part of its name, "CPU" any."""

    case: str
    shape: str
    tokens: int
    value: Callable[[Record], float | None]
    floor: float | None
    reach: float | None
    aim: float | None
    digits: int = 2
    op: str = "layer"
    more_is_better: bool = False
    which: str = FORWARD
    device: str = DEVICE
    dtype: str = "bfloat16"


LONG = 16384
AIMS = (
    Aim("T=16384, ranks 6 x 16", "flexolmo_6x16", LONG, ratio, 1.02, 1.17, 1.07),
    Aim("T=16384, ranks 6 x 64", "flexolmo_6x64", LONG, ratio, 1.09, 1.28, 1.15),
    Aim("T=16384, ranks 1, 4, 8, 64, 256, 2048", "flexolmo_mixed", LONG, ratio, 1.57, 1.88, 1.70),
    Aim("T=16384, ranks 64, 64, 256, 512, 2048, 16", "flexolmo_large", LONG, ratio,
        1.71, 2.05, 1.85),
    Aim("T=16384, 2 of 2, rank 64", "flexolmo_k2_of_2", LONG, ratio, 1.02, 1.15, 1.06),
    Aim("T=16384, 4 of 7, ranks 6 x 64", "flexolmo_k4", LONG, ratio, 1.07, 1.25, 1.13),
    Aim("T=16384, 7 of 7, ranks 6 x 64", "flexolmo_k7", LONG, ratio, 1.13, 1.34, 1.20),
    Aim("T=4096, ranks 6 x 64", "flexolmo_6x64", 4096, ratio, 1.09, 1.38, 1.22),
    Aim("T=1, ranks 6 x 64, graph replay, us", "flexolmo_6x64", 1, microseconds, 98, 130, 112, 0),
    Aim("T=16, ranks 6 x 64, graph replay, us", "flexolmo_6x64", 16, microseconds,
        102, 135, 117, 0),
    Aim("T=64, ranks 6 x 64, graph replay, us", "flexolmo_6x64", 64, microseconds,
        102, 140, 120, 0),
    Aim("T=16384, all full-size, TFLOP/s", "flexolmo_full", LONG, tflops, 767, 590, 640, 0,
        more_is_better=True),
    Aim("T=16384, E=512, rank 16, top-8", "experts_512", LONG, ratio, 1.3, 1.7, 1.45),
    Aim("routing + plan from logits, T=16384, E=7 top-5, us", "flexolmo_6x64", LONG, kernels,
        None, 20, 12, 1, "topk_route and make_plan"),
    Aim("routing + plan from logits, T=16384, E=256 top-8, us", "flexolmo_6x64", LONG, kernels,
        None, 35, 20, 1, "topk_route and make_plan E=256 k=8"),
    Aim("faster than Hugging Face's better path, T=16384, 6 x 64", "flexolmo_6x64", LONG,
        over_hugging_face, None, 4.8, None, 1, more_is_better=True),
    Aim("the same, T=16", "flexolmo_6x64", 16, over_hugging_face, None, 6, None, 1,
        more_is_better=True),
    Aim("the same, T=64", "flexolmo_6x64", 64, over_hugging_face, None, 6, None, 1,
        more_is_better=True),
    Aim("faster than compiled fair eager, T=16384, 6 x 64", "flexolmo_6x64", LONG,
        over_compiled, None, 2.3, None, 1, more_is_better=True),
)  # fmt: skip


TRAINING = (
    Aim("frozen base, 6 x 64, all factors and router", "flexolmo_6x64", LONG, step_ratio,
        2.3, 3.0, 2.6, which=STEP),
    Aim("frozen base, 6 x 64, one expert alone", "flexolmo_6x64", LONG, step_ratio,
        2.2, 2.7, 2.4, which=ONE),
    Aim("2 of 2, frozen base, one expert of rank 64", "flexolmo_k2_of_2", LONG, step_ratio,
        2.1, 2.5, 2.25, which=ONE),
    Aim("beside it: PEFT's LoRA, r = 64, on a dense FFN", "flexolmo_k2_of_2", LONG, peft_ratio,
        None, None, None, which=ONE),
    Aim("2 of 2, frozen base, one full-size expert", "flexolmo_full_k2", LONG, step_ratio,
        5.0, 6.0, 5.4, which=ONE),
    Aim("base trained too, 6 x 64", "flexolmo_6x64", LONG, step_ratio, 3.3, 4.1, 3.7, which=ALL),
    Aim("frozen base, ranks 1, 4, 8, 64, 256, 2048", "flexolmo_mixed", LONG, step_ratio,
        4.0, 5.4, 4.6, which=STEP),
    Aim("all full-size and trained, top-5, TFLOP/s", "flexolmo_full", LONG, tflops,
        767, 480, 560, 0, more_is_better=True, which=ALL),
    Aim("kept for the backward, 6 x 64, KB a token", "flexolmo_6x64", LONG, saved,
        54.5, 58, 55, 1, which=STEP),
    Aim("the same with `recompute`", "flexolmo_6x64", LONG, saved, 8.2, 12, 9, 1, which=RECOMPUTE),
    Aim("6 x 64 with `recompute`", "flexolmo_6x64", LONG, step_ratio,
        None, 3.7, 3.3, which=RECOMPUTE),
    Aim("CPU, `small`, in dense FFNs' forward + backward", "small", 512, ratio,
        None, 1.8, None, which=STEP, device="CPU", dtype="float32"),
)  # fmt: skip
"""Of forward and backward; ratios are to one dense FFN's forward of the same run unless said."""


def table(found: Sequence[Record], aims: Sequence[Aim] = AIMS) -> str:
    """Markdown: a line each, with the last record that has it."""
    head = "| case | floor | reach | aim | measured | | device, commit |\n|" + " --- |" * 7
    return "\n".join([head, *(_line(aim, _record(aim, found)) for aim in aims)])


def _record(aim: Aim, found: Sequence[Record]) -> Record | None:
    for record in reversed(found):
        if (
            (record["op"], record["shape"], record["tokens"]) == (aim.op, aim.shape, aim.tokens)
            and (record["pass"], record["dtype"]) == (aim.which, aim.dtype)
            and _is_on(aim.device, record)
            and aim.value(record) is not None
        ):
            return record
    return None


def _is_on(device: str, record: Record) -> bool:
    return record["driver"] is None if device == "CPU" else device in record["device"]


def _line(aim: Aim, record: Record | None) -> str:
    def text(value: float | None) -> str:
        return "" if value is None else f"{value:.{aim.digits}f}"

    value, where, verdict = None, "", "not measured"
    if record is not None:
        value = aim.value(record)
        where = f"{record['device']}, {record['commit']}"
        sign = -1 if aim.more_is_better else 1
        verdict = "for comparison"
        if aim.reach is not None:
            verdict = "reached" if sign * value <= sign * aim.reach else "missed"
        if aim.aim is not None and sign * value <= sign * aim.aim:
            verdict = "aim reached"
    cells = (aim.case, text(aim.floor), text(aim.reach), text(aim.aim), text(value), verdict, where)
    return "| " + " | ".join(cells) + " |"
