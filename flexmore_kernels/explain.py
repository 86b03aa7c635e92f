"""`flexmore bench`: a layer beside one dense FFN, and with --explain why it takes what it takes.

The schedule that is printed is the one that the forward asked for while it was watched, whose
kernels do its parts is asked of the functions that choose them. Floors are those of floors.py, by
rates measured in the same run; rows are those of the routing that ran.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from . import backend, baselines, floors, schedule, timing
from .floors import Roofs, Stage, Work
from .layer import FlexMoRE
from .projection import FULL
from .ragged import StackedFactors
from .shapes import Shape
from .storage import PROJECTIONS

Say = Callable[[str], None]


def make_layer(shape: Shape, device: str, dtype: torch.dtype) -> FlexMoRE:
    """A layer of random weights, none zero: a GPU is faster on zeros."""
    sizes = shape.hidden, shape.intermediate, shape.ranks, shape.top_k
    layer = FlexMoRE(*sizes, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 0.5 if name.endswith(("_b.weight", "_b")) else 1.0
            width = max(shape.ranks) if name.endswith("_b") else parameter.shape[1]
            parameter.normal_(std=scale / math.sqrt(max(width, 1)))
    return layer.requires_grad_(False)


@torch.no_grad()
def run(
    name: str,
    shape: Shape,
    tokens: Sequence[int],
    *,
    device: str,
    dtype: torch.dtype,
    explain: bool = False,
    merge: Any = False,
    say: Say = lambda text: None,
) -> dict[str, Any]:
    """The report: where, the layer, and for each number of tokens what was measured.

    merge: False for a layer as it is, else what `prepare` takes.
    """
    torch.manual_seed(0)
    say("making the layer")
    layer = make_layer(shape, device, dtype)  # first: it refuses what it cannot be made of
    say("measuring copy and matmul of the device")
    roofs = floors.measure(device)
    prepared = None if merge is False else str(layer.prepare(merge=merge))
    dense, dense_name = _dense(layer, device, say)
    found = []
    for count in tokens:
        say(f"timing {count} tokens")
        found.append(_measure(layer, shape, count, roofs, dense, explain))
    return {
        "shape": name, "hidden": shape.hidden, "intermediate": shape.intermediate,
        "ranks": list(shape.ranks), "top_k": shape.top_k,
        "dtype": str(dtype).removeprefix("torch."), "device": _device_name(device),
        "roofs": roofs._asdict(), "prepared": prepared, "dense": dense_name, "tokens": found,
    }  # fmt: skip


def _device_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"


def _dense(layer: FlexMoRE, device: str, say: Say) -> tuple[Callable[[Tensor], Tensor], str]:
    """The dense FFN of the base's weights; on a GPU compiled, where that works."""
    base = [layer.experts.full(name)[0] for name in PROJECTIONS]

    def eager(x: Tensor) -> Tensor:
        return baselines.dense_ffn(x, *base)

    if torch.device(device).type != "cuda":
        return eager, "dense FFN"
    say("compiling the dense FFN")
    compiled = torch.compile(baselines.dense_ffn, dynamic=False)
    try:
        compiled(base[0].new_ones(16, base[0].shape[1]), *base)
    except Exception as error:
        say(f"torch.compile failed, so it runs eager: {type(error).__name__}")
        return eager, "dense FFN, eager"
    return (lambda x: compiled(x, *base)), "dense FFN, compiled"


def _measure(
    layer: FlexMoRE, shape: Shape, tokens: int, roofs: Roofs, dense: Callable, explain: bool
) -> dict[str, Any]:
    weight = layer.gate.weight
    x = torch.randn(tokens, shape.hidden, device=weight.device, dtype=weight.dtype)
    with schedule.watch() as seen:
        _, routing = layer(x, return_routing=True)
    rows = torch.bincount(routing.indices.flatten(), minlength=len(shape.ranks)).tolist()
    layouts = _layouts(layer, x)
    work = Work(layouts, rows, tokens, shape.hidden, shape.intermediate, weight.element_size())
    whole, plain = work.whole(), work.dense()
    dense(x)
    cold = whole.nbytes > timing.CACHES * timing.l2_bytes(weight.device)
    times = timing.compare(
        {"layer": lambda: layer(x), "dense": lambda: dense(x)}, weight.device, graphs=cold
    )
    found = {
        "tokens": tokens,
        "layer": _timed(times["layer"], whole, roofs),
        "dense": _timed(times["dense"], plain, roofs),
        "ratio": times["layer"].ms / times["dense"].ms,
        "floor_ratio": whole.floor_ms(roofs) / plain.floor_ms(roofs),
    }
    if explain:
        how = seen[-1] if seen else _chosen(layouts, work, weight)
        found["route"], found["dense_down"] = how.route, how.dense_down
        found["by_library"] = how.by_library
        on_hopper = backend.hopper_runs(weight.device, weight.dtype)
        found["served"] = served(
            how, layouts, tokens, shape.top_k, work.hidden, work.width, on_hopper
        )
        found["experts"] = [
            {"expert": e, "ranks": _ranks(kinds), "way": how.ways[e], "rows": rows[e]}
            for e, kinds in enumerate(zip(*layouts, strict=True))
        ]
        found["expected_rows"] = tokens * shape.top_k / len(rows)
        found["stages"] = [_floored(stage, roofs) for stage in work.stages()]
        found["kernels"] = _kernels(layer, x)
    return found


def _layouts(layer: FlexMoRE, x: Tensor) -> list[tuple[int, ...]]:
    """What the forward computes with: of a prepared layer, the copies."""
    found = []
    for side in layer._expert_weights(x):
        if isinstance(side, StackedFactors):
            pairs = zip(side.full, side.ranks, strict=True)
            found.append(tuple(rank if full is None else FULL for full, rank in pairs))
            continue
        ranks = [entry[0].shape[0] if isinstance(entry, tuple) else 0 for entry in side]
        pairs = zip(side, ranks, strict=True)
        found.append(tuple(FULL if isinstance(e, Tensor) else rank for e, rank in pairs))
    return found


def _chosen(layouts, work: Work, weight: Tensor) -> schedule.Schedule:
    """Of kernels that do not ask: those of plain PyTorch have one way only."""
    return schedule.choose(
        layouts, work.tokens, hidden=work.hidden, width=work.width, dtype=weight.dtype,
        kernels=(backend.chosen("experts", weight.device),),
    )  # fmt: skip


def served(
    how: schedule.Schedule,
    layouts: Sequence[Sequence[int]],
    tokens: int,
    top_k: int,
    hidden: int,
    width: int,
    on_hopper: bool,
) -> dict[str, str]:
    """Part of the forward -> whose kernels it is, but for the base's products, which are cuBLAS's;
    nothing of the loop, whose route says it.

    By sizes alone, with the functions that the forward asks. on_hopper: whether the library's
    kernels for Hopper run (`backend.hopper_runs`).
    """
    if how.by_library:
        return {"all": "the library"}
    if how.route != "token-major":
        return {} if how.route == "loop" else {"all": "Triton"}
    from ._native import grouped_gemm, token_major
    from ._triton import own_rows

    name = lambda by_library: "the library" if on_hopper and by_library else "Triton"
    ranks = [[max(kind, 0) for kind in layout] for layout in layouts]
    in_order = [[0 if e in how.own else r for e, r in enumerate(side)] for side in ranks]
    rows = own_rows.added_to_hidden(layouts, how.own)
    grouped = grouped_gemm.serves(hidden, width)
    found = {}
    if how.all_fused or (how.own and 0 not in how.own):
        found["hidden sum"] = name(
            token_major.serves(tokens, width, in_order, top_k if rows else 0)
        )
    elif not how.own:
        found["hidden sum"] = name(False)
    if how.own:
        found["rows of their own"] = name(grouped)
    if any(ranks[2]):
        # Where rows with a down matrix of their own are added, too, cuBLAS forms the sum.
        dense = how.dense_down and len(rows) == len(how.own)
        by_cublas = bool(how.own) and not dense
        large = dense and grouped and tokens >= schedule.HOPPER_TOKENS
        found["deltas of down"] = "cuBLAS" if by_cublas else name(large)
    return found


def _ranks(kinds: tuple[int, ...]) -> str:
    names = ["full" if kind == FULL else str(kind) for kind in kinds]
    return names[0] if len(set(names)) == 1 else "/".join(names)


def _floored(stage: Stage, roofs: Roofs) -> dict[str, Any]:
    bound, ms = stage.bound(roofs), stage.floor_ms(roofs)
    return {**stage._asdict(), "floor_ms": ms, "bound": bound}


def _timed(times: timing.Times, stage: Stage, roofs: Roofs) -> dict[str, Any]:
    found = _floored(stage, roofs)
    return {**times._asdict(), **found, "share": found["floor_ms"] / times.ms}


def _kernels(layer: FlexMoRE, x: Tensor) -> list[dict[str, Any]]:
    """What ran on the GPU, longest first; nothing on a CPU."""
    if x.device.type != "cuda":
        return []
    from torch.profiler import ProfilerActivity, profile

    calls = 3
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(calls):
            layer(x)
        torch.cuda.synchronize()
    events = [event for event in seen.key_averages() if event.self_device_time_total > 0]
    events.sort(key=lambda event: -event.self_device_time_total)
    return [
        {"kernel": e.key, "us": e.self_device_time_total / calls, "calls": e.count / calls}
        for e in events
    ]
