"""Times a layer by its router, and a model with and without attribution.

    python -m benchmarks.routers               # two minutes on an H100
    python -m benchmarks.routers --device cpu

All candidates of a layer compute five experts a token with the same experts' weights: a linear
router; Nexus's, its rows kept or projected at each call; and the base shared, outside the softmax,
beside four routed. The projected rows are those of the linear router's size. Ratios to linear.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

import flexmore_kernels as fk
import reference
from benchmarks import decoders, printed, records
from benchmarks.generation import ROUNDS, in_turn, milliseconds
from benchmarks.problem import DTYPES
from benchmarks.run import Progress
from benchmarks.shapes import SHAPES, Shape
from flexmore_kernels.storage import PROJECTIONS
from flexmore_kernels.testing import accuracy, tree_map
from flexmore_kernels.timing import compare

LINEAR, KEPT, PROJECTED, SHARED = "linear", "projected, kept", "projected", "linear, base shared"
PLAIN, ATTRIBUTED = "without", "attributed"
TOKENS = (1, 16, 4096, 16384)
EMBEDDING = 1024
"""Width of the domain embeddings, as of common sentence encoders."""


def layers(shape: Shape, device: str, dtype: torch.dtype) -> dict[str, fk.FlexMoRE]:
    """The candidates; all share the experts' parameters."""
    kind: dict[str, Any] = {"device": device, "dtype": dtype}
    sizes = (shape.hidden, shape.intermediate, shape.ranks)
    linear = fk.FlexMoRE(*sizes, shape.top_k, **kind)
    with torch.no_grad():
        for name, parameter in linear.named_parameters():
            if name.endswith("_b.weight"):
                parameter.normal_(std=0.02)
    projector = {"router": "projected", "domain_embedding_size": EMBEDDING}
    others = {
        KEPT: fk.FlexMoRE(*sizes, shape.top_k, **projector, device="meta", dtype=dtype),
        SHARED: fk.FlexMoRE(
            *sizes, shape.top_k - 1, shared_expert=True, device="meta", dtype=dtype
        ),
    }
    for layer in others.values():
        layer.experts = linear.experts
        layer.gate = layer.gate.to_empty(device=device)
        layer.gate.reset_parameters()
    others[KEPT].gate.domain_embeddings.normal_(std=EMBEDDING**-0.5)
    others[PROJECTED] = copy.copy(others[KEPT])
    others[PROJECTED]._modules = dict(others[KEPT]._modules, gate=copy.deepcopy(others[KEPT].gate))
    others[KEPT].gate.keep(True)
    return {LINEAR: linear, **others}


@torch.no_grad()
def errors(found: dict[str, fk.FlexMoRE], shape: Shape, device: str, dtype) -> dict[str, float]:
    """Each candidate's error over what is allowed, given its routing; ValueError where kept or
    projected rows route otherwise than a linear router with these rows, to the bit."""
    x = torch.randn(128, shape.hidden, device=device, dtype=dtype)
    ratios, outputs = {}, {}
    for name, layer in found.items():
        y, routing = outputs[name] = layer(x, return_routing=True)
        weights = [layer.experts.projection(projection) for projection in PROJECTIONS]
        truth, same = (
            reference.experts(
                *(x.to(wide), routing.indices, routing.weights.to(acc)),
                *tree_map(lambda t, wide=wide: t.to(wide), weights),
            )
            for wide, acc in ((torch.float64, torch.float64), (dtype, torch.float32))
        )
        ratios[name] = accuracy(y, truth, same).ratio
    x_rows = found[KEPT].gate.rows()
    twin = fk.ops.topk_route(x, x_rows, top_k=shape.top_k)
    for name in (KEPT, PROJECTED):
        routing = outputs[name][1]
        if not all(map(torch.equal, routing, twin)):
            raise ValueError(f"{name}: routes otherwise than a linear router with the same rows")
    return ratios


def record(
    op: str,
    ratios: dict[str, float],
    times: dict[str, Any],
    context: dict[str, Any],
    shape_name: str,
    tokens: int,
    dtype: torch.dtype,
    clocks: records.Clocks,
) -> dict[str, Any]:
    results = {name: records.result(times[name], context["roofs"], 0, 0) for name in ratios}
    for name, ratio in ratios.items():
        results[name]["error_ratio"] = records.short(ratio)
    return {
        "benchmark": "routers", "op": op, "shape": shape_name, **SHAPES[shape_name]._asdict(),
        "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "pass": "forward",
        **context, "clocks": clocks.seen(), "bytes": 0, "flops": 0, "results": results,
    }  # fmt: skip


@torch.no_grad()
def attributed(shape_name: str, device: str, dtype: torch.dtype, clocks: records.Clocks):
    """(op, tokens, times) of the model's prompt and decoding step, with and without attribution."""
    work = decoders.WORK[shape_name]
    model = decoders.ours(decoders.config_of(shape_name), device, dtype)
    model.prepare()
    ids = torch.randint(model.config.vocab_size, work.prompts, device=device)

    def counted(call: Callable[[], Any], batch: int) -> Callable[[], Any]:
        def run() -> Any:
            with model.attributing(batch):
                return call()

        return run

    prompt: Callable = functools.partial(decoders.prefill, model, ids)
    calls = {PLAIN: prompt, ATTRIBUTED: counted(prompt, len(ids))}
    times = compare(calls, device, budget_s=8.0, each_round=clocks.look)
    yield "prompt, attributed", ids.numel(), times
    for batch in work.batches:
        prompts = torch.randint(
            model.config.vocab_size, (batch, work.context), device=device
        )  # fmt: skip
        make = functools.partial(decoders.OurSteps, model, prompts, work.columns)
        steps = {}
        for name in (PLAIN, ATTRIBUTED):
            with model.attributing(batch) if name == ATTRIBUTED else contextlib.nullcontext():
                one = steps[name] = make()
                one.restart()
                for _ in range(work.steps):  # captures
                    one.step()

        def sample(name: str, steps=steps, batch=batch) -> float:
            steps[name].restart()
            with model.attributing(batch) if name == ATTRIBUTED else contextlib.nullcontext():
                steps[name].step()
                return milliseconds(steps[name].step, work.steps, device) / work.steps

        how = "events" if device == "cuda" else "wall"
        times = in_turn(steps, sample, work.steps, how, clocks, ROUNDS)
        yield "step, attributed", batch, times


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--shape", choices=SHAPES)
    parser.add_argument("--tokens", type=int, nargs="+")
    parser.add_argument("--device", choices=("cpu", "cuda"))
    parser.add_argument("--commit", help="to record, where the sources have no git history")
    parser.add_argument("--results", type=Path, default=records.RESULTS)
    given = parser.parse_args(words)
    device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = given.shape or ("flexolmo_6x64" if device == "cuda" else "small")
    shape, dtype, progress = SHAPES[name], DTYPES[device], Progress(120)
    progress.say("measuring a large copy and a large matrix product")
    context = {**records.environment(device, given.commit), "roofs": records.roofs(device)}
    torch.manual_seed(1)
    found, clocks = layers(shape, device, dtype), records.Clocks(device)
    ratios = errors(found, shape, device, dtype)
    if not max(ratios.values()) <= 1:
        raise ValueError(f"errors: got {ratios} times what is allowed; accepted: up to 1")
    for tokens in given.tokens or [n for n in TOKENS if device == "cuda" or n <= shape.tokens]:
        progress.say(f"layer, {name}, {tokens} tokens")
        x = torch.randn(tokens, shape.hidden, device=device, dtype=dtype)
        calls: dict[str, Callable] = {
            key: lambda layer=layer, x=x: layer(x) for key, layer in found.items()
        }
        with torch.inference_mode():
            times = compare(calls, device, budget_s=6.0, each_round=clocks.look)
        taken = record("router", ratios, times, context, name, tokens, dtype, clocks)
        records.append(taken, given.results)
        print(printed.full(taken), flush=True)
    for op, tokens, times in attributed(name, device, dtype, clocks):
        ones = dict.fromkeys(times, 0.0)  # the same model: nothing to compare
        taken = record(op, ones, times, context, name, tokens, dtype, clocks)
        records.append(taken, given.results)
        print(printed.full(taken), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
