"""Price of the experts, against what plain PyTorch does and against one dense FFN, the floor.

    python -m benchmarks.bench_experts --shape flexolmo_6x64 --tokens 16384 --dtype bfloat16

Forward: 6 T D F operations for the base, 2 r (D + F) for each projection of a routed row; a dense
FFN of the same size is 6 T D F. No B is zero (zeros run faster). The first rows of every candidate
are checked against the float64 reference before anything is timed. --backward: forward and
backward with the base frozen; router, factors and x get gradients, a dense FFN's x alone.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

import reference
from benchmarks import bench
from benchmarks.shapes import SHAPES, Shape
from flexmore_kernels import FlexMoRE, baselines, ops
from flexmore_kernels.checkpoint import expert_weights
from flexmore_kernels.testing import accuracy, make_weight, make_x, to_float64
from flexmore_kernels.timing import median_ms

CHECKED_ROWS = 256
FLOOR = "dense FFN compiled"


class Problem(NamedTuple):
    """A layer and what goes in: its tensors, and the routing that the layer chose."""

    layer: FlexMoRE
    router: Tensor
    weights: tuple[list, list, list]
    x: Tensor
    indices: Tensor
    gates: Tensor
    dy: Tensor
    top_k: int


def problem(shape: Shape, tokens: int, device: str, dtype: torch.dtype) -> Problem:
    torch.manual_seed(0)
    sizes = shape.hidden, shape.intermediate, shape.ranks, shape.top_k
    layer = FlexMoRE(*sizes, device=device, dtype=dtype)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            scale = 0.5 if name.endswith(("_b.weight", "_b")) else 1.0
            parameter.copy_(scale * make_weight(*parameter.shape, device, dtype))
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(not name.endswith("_proj.weight"))
    held = {
        name: parameter.detach() for name, parameter in layer.state_dict(keep_vars=True).items()
    }
    if layer.num_experts <= 64:
        held = dict(layer.named_parameters())
    x = make_x(tokens, shape.hidden, device, dtype)
    with torch.no_grad():
        _, routing = layer(x, return_routing=True)
    return Problem(
        layer, layer.gate.weight, expert_weights(held, shape.ranks), x.requires_grad_(),
        routing.indices, routing.weights.detach().requires_grad_(),
        make_x(tokens, shape.hidden, device, dtype), shape.top_k,
    )  # fmt: skip


def forwards(p: Problem, compiled: bool) -> dict[str, Callable[[], Tensor]]:
    """Name -> forward. Those that route do so as in `layer`; `experts` is given the routing."""
    base = [entries[0] for entries in p.weights]
    mixes = {
        "fair eager, by index": baselines.fair_eager,
        "fair eager, every expert": baselines.every_expert,
        "published": baselines.published,
    }
    found: dict[str, Callable[[], Tensor]] = {
        "ours, layer": lambda: p.layer(p.x),
        "ours, experts": lambda: ops.experts(p.x, p.indices, p.gates, *p.weights),
    }
    for name, mix in mixes.items():
        found[name] = lambda mix=mix: mix(p.x, p.indices, p.gates, *p.weights)
        if compiled and name != "published":
            fast = torch.compile(mix)
            found[f"{name}, compiled"] = lambda f=fast: f(p.x, p.indices, p.gates, *p.weights)
    found["dense FFN"] = lambda: baselines.dense_ffn(p.x, *base)
    if compiled:
        fast_dense = torch.compile(baselines.dense_ffn)
        found[FLOOR] = lambda: fast_dense(p.x, *base)
    return found


def trainable(p: Problem, name: str) -> list[Tensor]:
    """What gets a gradient in a candidate's backward."""
    if name.startswith("dense"):
        return [p.x]
    if name == "ours, layer":
        return [p.x, *(q for q in p.layer.parameters() if q.requires_grad)]
    factors = [t for entries in p.weights for e in entries if isinstance(e, tuple) for t in e]
    return [p.x, p.gates, *(t for t in factors if t.requires_grad)]


def with_backward(p: Problem, name: str, forward: Callable[[], Tensor]) -> Callable[[], Any]:
    inputs = trainable(p, name)
    return lambda: torch.autograd.grad(forward(), inputs, p.dy, allow_unused=True)


@torch.no_grad()
def check(p: Problem, found: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Error over what is allowed, of each candidate's first rows; raises where ours is wrong."""
    some = slice(0, CHECKED_ROWS)
    given = (p.x[some], p.indices[some], p.gates[some], *p.weights)
    truth, same = reference.experts(*to_float64(given)), reference.experts(*given)
    ratios = {}
    for name, forward in found.items():
        if name.startswith("dense"):
            continue
        ratios[name] = accuracy(forward()[some], truth, same).ratio
        if name.startswith("ours") and not ratios[name] <= 1:
            raise SystemExit(f"{name}: {ratios[name]:.3g} times the allowed error; not timed")
    return ratios


def breakdown(call: Callable[[], Any], device: str, calls: int = 5) -> str:
    """Time per kernel of one call, from torch.profiler."""
    activity = torch.profiler.ProfilerActivity
    on_gpu = device == "cuda"
    call()
    with torch.profiler.profile(activities=[activity.CUDA if on_gpu else activity.CPU]) as profile:
        for _ in range(calls):
            call()
        if on_gpu:
            torch.cuda.synchronize()
    key = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    events = sorted(profile.key_averages(), key=lambda e: -getattr(e, key))[:30]
    lines = [
        f"{getattr(e, key) / calls / 1e3:10.4f} ms  x{e.count / calls:<5g} {e.key[:100]}"
        for e in events
    ]
    total = sum(getattr(e, key) for e in profile.key_averages()) / calls / 1e3
    return "\n".join([*lines, f"{total:10.4f} ms  in all"])


def table(times: dict[str, float], ratios: dict[str, float]) -> str:
    floor = next((times[name] for name in (FLOOR, "dense FFN") if name in times), None)
    lines = [f"{'':36}{'ms':>10}{'x dense':>10}{'error/allowed':>15}"]
    for name, ms in times.items():
        ratio = f"{ratios[name]:.2f}" if name in ratios else ""
        lines.append(f"{name:<36}{ms:>10.3f}{ms / floor:>10.2f}{ratio:>15}")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=SHAPES, default=None)
    parser.add_argument("--tokens", type=int, help="default: the shape's")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--backward", action="store_true", help="forward + backward too")
    parser.add_argument("--breakdown", action="store_true", help="our time per kernel too")
    parser.add_argument("--quick", action="store_true", help="nothing compiled, few rounds")
    parser.add_argument("--commit", help="to record, where the sources have no git history")
    parser.add_argument("--json", action="store_true", help="append to benchmarks/results/")
    given = parser.parse_args()
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = given.shape or ("flexolmo_6x64" if device == "cuda" else "cpu_small")
    shape = SHAPES[name]
    tokens = given.tokens or shape.tokens
    dtype = getattr(torch, given.dtype) if given.dtype else bench.DTYPES[device]
    p = problem(shape, tokens, device, dtype)
    found = forwards(p, compiled=not given.quick)
    ratios = check(p, found)
    limits = {"rounds": 5, "budget_s": 3.0} if given.quick else {"rounds": 30, "budget_s": 30.0}
    entry = {
        "benchmark": "experts", "shape": name, **shape._asdict(), "tokens": tokens,
        "dtype": str(dtype).removeprefix("torch."), **bench.environment(device, given.commit),
    }  # fmt: skip
    print(f"{name}: {shape.why}; T = {tokens}, {entry['dtype']}, {entry['device']}, "
          f"{entry['commit']}\nforward")  # fmt: skip
    with torch.no_grad():
        entry["forward_ms"] = median_ms(found, device, **limits)
    print(table(entry["forward_ms"], ratios))
    if given.backward:
        both = {n: with_backward(p, n, forward) for n, forward in found.items()}
        entry["forward_backward_ms"] = median_ms(both, device, **limits)
        print("forward + backward, base frozen")
        print(table(entry["forward_backward_ms"], {}))
    if given.breakdown:
        with torch.no_grad():
            print(f"forward, by kernel\n{breakdown(found['ours, experts'], device)}")
        if given.backward:
            both_ours = with_backward(p, "ours, experts", found["ours, experts"])
            print(f"forward + backward, by kernel\n{breakdown(both_ours, device)}")
    if given.json:
        path = bench.record("experts", entry)
        print(json.dumps(entry))
        print(f"appended to {path}", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
