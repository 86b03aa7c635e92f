"""Times the conversion of one layer's full-size experts to low-rank ones, exact and randomised.

    python -m benchmarks.conversion                 # six experts of FlexOlmo-7x7B's width, on a GPU
    python -m benchmarks.conversion --device cpu    # the `small` shape

What is timed is what `flexmore convert` does between reading a layer and writing it, by the same
function: differences in float64, their decompositions, factors rounded to bfloat16 on the host, and
the errors that its report shows; all matrices, by the wall clock. Two things are checked before:

    exact         |delta - b a|_F = sqrt(sum of the dropped s_i^2), s by an eigenproblem of its own
    randomised    no more than that and its own stated bound

for one expert's three matrices, in float64; factors rounded are those in float64, rounded.
`error_ratio` is the excess over what is allowed: rounding, and the bound.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import records
from benchmarks.problem import normal
from benchmarks.shapes import SHAPES, SWEPT, Shape
from flexmore_kernels.checkpoint_layout import PROJECTIONS, Layout
from flexmore_kernels.conversion.convert import make_layer
from flexmore_kernels.conversion.matrices import Key, SourceLayer, keys_of
from flexmore_kernels.conversion.svd import (
    METHODS,
    decompose,
    error,
    factor_pair,
    singular_values,
)
from flexmore_kernels.conversion.work import Work
from flexmore_kernels.progress import Progress
from flexmore_kernels.testing import FLOAT64_SLACK
from flexmore_kernels.timing import Times

DTYPE = torch.bfloat16
SHARE = 0.05
"""Norm of a delta over the public expert's."""
FALLS = (0.5, 1.0)
"""Singular values fall about as i^-p, with p from the first expert's to the last's."""
ROUNDS = 5
CONVERTED = tuple(name for name, shape in SHAPES.items() if all(shape.ranks[1:]))
"""Shapes with a rank for every expert beside the base."""


class Ranks(NamedTuple):
    """What `make_layer` asks of a target: its ranks, stored as the source is."""

    ranks: Mapping[Key, int]
    dtype: torch.dtype | None = None
    compat: bool = False

    def rank_of(self, key: Key, spectrum: Any) -> int:
        return self.ranks[key]


class Layer:
    """A layer of full-size experts, drawn on the device; each is to get its rank of the shape."""

    def __init__(self, shape: Shape, device: str) -> None:
        count = len(shape.ranks)
        config = {
            "hidden_size": shape.hidden, "intermediate_size": shape.intermediate,
            "num_experts": count,
        }  # fmt: skip
        entries = (0, *["full"] * (count - 1))
        self.layout = Layout(Path(), config, "flexmore", {}, {}, {}, (entries,), False, ())
        self.device = torch.device(device)
        self.target = Ranks({key: shape.ranks[key.expert] for key in keys_of(self.layout, 0)})
        self.tensors = draw(shape, device)

    def source(self) -> SourceLayer:
        return SourceLayer(self.layout, 0, self.device, dict(self.tensors))

    def convert(self, method: str, say: Callable[[str], None] | None) -> tuple[dict, list[dict]]:
        """The low-rank layer's tensors, and of each matrix what the report says of it."""
        work = Work(self.layout, method, self.device, None, None, lambda key: None)
        progress = Progress(len(self.target.ranks), say)
        (tensors,), (matrices,) = make_layer(work, [self.target], self.source(), {}, progress)
        return tensors, matrices

    def nbytes(self) -> int:
        """That must be read and written: all experts, and the factors."""
        D, F = self.layout.config["hidden_size"], self.layout.config["intermediate_size"]
        factors = sum(rank * (D + F) for rank in self.target.ranks.values())
        return sum(t.nbytes for t in self.tensors.values()) + factors * DTYPE.itemsize


def draw(shape: Shape, device: str) -> dict[str, Tensor]:
    """The public expert, and each other one: it and a delta whose singular values fall off. What
    rounding to bfloat16 adds is there as in a trained one.
    """
    torch.manual_seed(0)
    D, F, count = shape.hidden, shape.intermediate, len(shape.ranks) - 1
    kind: dict[str, Any] = {"device": device, "dtype": torch.float32}
    numbers = 1 + torch.arange(min(D, F), **kind)
    tensors = {}
    for projection in PROJECTIONS:
        out, width = (D, F) if projection == "down" else (F, D)
        base = normal(out, width, **kind, scale=1 / math.sqrt(width))
        tensors[f"experts.0.{projection}_proj.weight"] = base.to(DTYPE)
        for expert, power in enumerate(torch.linspace(*FALLS, count).tolist(), start=1):
            left = normal(out, min(D, F), **kind) * numbers**-power
            delta = left @ normal(min(D, F), width, **kind)
            delta *= SHARE * base.norm() / delta.norm()
            tensors[f"experts.{expert}.{projection}_proj.weight"] = (base + delta).to(DTYPE)
    return tensors


def check(layer: Layer, method: str, expert: int = 1) -> float:
    """The largest excess of an expert's matrices' errors over what is allowed."""
    source, ratios = layer.source(), []
    for key in (Key(0, expert, projection) for projection in PROJECTIONS):
        rank, delta = layer.target.ranks[key], source.delta(key)
        found = decompose(delta, rank=rank, method=method)
        a, b = factor_pair(found, rank, torch.float64)
        best = float(singular_values(delta)[rank:].norm())
        stored = factor_pair(found, rank, DTYPE)
        if not all(torch.equal(x, y.to(DTYPE)) for x, y in zip(stored, (a, b), strict=True)):
            return math.inf
        off = float((delta - b @ a).norm())
        # Squares of norms are right to roundings of |delta|^2, so these are to that over the norm.
        rounding = FLOAT64_SLACK * float(delta.norm()) ** 2 / off
        ratios += [(best - off) / rounding, (off - best) / (found.bound + rounding)]
        ratios.append(abs(error(found, rank) - off) / rounding)
    return max(ratios)


def take(
    shape_name: str,
    device: str,
    context: dict[str, Any],
    say: Callable[[str], None],
    *,
    seconds: float,
    rounds: int = ROUNDS,
) -> dict[str, Any]:
    """One record: both methods checked, then timed in turns for about `seconds`, once at least."""
    say("drawing weights")
    layer, clocks = Layer(SHAPES[shape_name], device), records.Clocks(device)
    results: dict[str, dict[str, Any]] = {}
    for method in METHODS:
        say(f"{method}: checking one expert")
        begin = time.perf_counter()
        ratio = check(layer, method)
        results[method] = {"error_ratio": records.short(ratio)}
        results[method]["first_s"] = records.short(time.perf_counter() - begin)
        if not ratio <= 1:
            results[method]["not_run"] = "WRONG"
    samples: dict[str, list[float]] = {m: [] for m in METHODS if "not_run" not in results[m]}
    begin = time.perf_counter()
    for number in range(rounds):
        for method in random.Random(number).sample(list(samples), len(samples)):
            left = seconds - (time.perf_counter() - begin)
            if samples[method] and left < samples[method][-1] / 1e3:
                continue

            def tell(text: str, head: str = f"{method}, round {number + 1}") -> None:
                clocks.look()
                say(f"{head}: {text}")

            ms, more = _once(layer, method, tell)
            clocks.look()
            samples[method].append(ms)
            results[method] |= more
    for method, found in samples.items():
        roofs, nbytes = context["roofs"], layer.nbytes()
        results[method] |= records.result(Times.of(found, "wall"), roofs, nbytes, 0)
    return {
        "benchmark": "conversion", "op": "convert", "shape": shape_name,
        **SHAPES[shape_name]._asdict(), "tokens": 0, "dtype": str(DTYPE).removeprefix("torch."),
        "pass": "forward", **context, "clocks": clocks.seen(),
        "matrices": len(layer.target.ranks), "bytes": layer.nbytes(), "flops": 0,
        "results": results,
    }  # fmt: skip


def _once(layer: Layer, method: str, say: Callable[[str], None]) -> tuple[float, dict[str, Any]]:
    """Milliseconds of all matrices, and their errors and memory."""
    on_gpu, held = layer.device.type == "cuda", 0
    if on_gpu:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
    begin = time.perf_counter()
    _, matrices = layer.convert(method, say)
    if on_gpu:
        torch.cuda.synchronize()
    ms = (time.perf_counter() - begin) * 1e3
    more = {
        "relative_error": max(m["error"] / m["norm"] for m in matrices),
        "relative_bound": max(m["bound"] / m["norm"] for m in matrices),
    }
    if on_gpu:
        more["peak_mb"] = (torch.cuda.max_memory_allocated() - held) / 1e6
    return ms, {name: records.short(value) for name, value in more.items()}


def lines(record: dict[str, Any]) -> list[str]:
    """What the command prints: a line a method."""
    found = []
    for method, result in record["results"].items():
        if "ms" not in result:
            found.append(f"{method:<12}{result['not_run']}")
            continue
        spread = f"{result['p20'] / 1e3:.3g} to {result['p80'] / 1e3:.3g}"
        found.append(
            f"{method:<12}{result['ms'] / 1e3:.3g} s for {record['matrices']} matrices ({spread}, "
            f"{result['rounds']} rounds); relative error {result['relative_error']:.4g}, bound "
            f"{result['relative_bound']:.2g}; error over allowed {result['error_ratio']:.2g}"
        )
    return found


def main(words: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--shape", choices=CONVERTED, help=f"default: {SWEPT}; on a CPU: small")
    parser.add_argument("--seconds", type=float, default=150, help="for the timed rounds")
    parser.add_argument("--commit", help="to record, where the sources have no git history")
    parser.add_argument(
        "--results", type=Path, default=records.RESULTS, help="folder, or one .jsonl file"
    )
    given = parser.parse_args(words)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    shape = given.shape or (SWEPT if device == "cuda" else "small")
    begin = time.monotonic()

    def say(text: str) -> None:
        print(f"[{time.monotonic() - begin:4.0f} s] {text}", file=sys.stderr, flush=True)

    say("measuring a large copy and a large matrix product")
    context = {**records.environment(device, given.commit), "roofs": records.roofs(device)}
    record = take(shape, device, context, say, seconds=given.seconds)
    say(f"record in {records.append(record, given.results)}")
    print(f"{context['device']}, torch {context['torch']}, {context['commit']}: {shape}, {DTYPE}")
    print("\n".join(lines(record)))
    return 1 if any("not_run" in result for result in record["results"].values()) else 0


if __name__ == "__main__":
    sys.exit(main())
