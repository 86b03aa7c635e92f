"""Price of a layer: ours beside the same mathematics in plain PyTorch, other libraries, and one
dense FFN of the base's size, the floor.

`python -m benchmarks.run` takes these with all candidates and keeps records; run through pytest,
this file times ours and a few others at one shape.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch

from benchmarks import bench, records
from benchmarks.candidates import CANDIDATES, Candidate, with_backward
from benchmarks.problem import CHECKED_ROWS, DTYPES, Problem
from benchmarks.shapes import SHAPES, SWEPT
from benchmarks.training import FORWARD, PASSES, gradient_error, saved_kb_a_token
from flexmore_kernels.testing import accuracy
from flexmore_kernels.timing import CACHES, Call, CallFailed, Interrupted, Times, compare, l2_bytes

LONGEST_S = 60.0
"""For building and checking one candidate, torch.compile included."""


def price(
    shape_name: str,
    tokens: int,
    names: Iterable[str],
    *,
    device: str,
    dtype: torch.dtype | None = None,
    passes: Iterable[str] = (FORWARD,),
    context: dict[str, Any],
    say: Callable[[str], None],
    write: Callable[[dict[str, Any]], Any],
    seconds: float = 30.0,
    deadline: float = float("inf"),
) -> None:
    """Check and time candidates at one shape; one record, given to `write`, for each pass.

    Args:
        names: of CANDIDATES. What cannot run is in the record with its reason.
        passes: of PASSES.
        context: environment and roofs of the run.
        seconds: about what the timed rounds of one pass may take; deadline: when, by
            time.monotonic(), to build no further candidate.
    """
    shape, dtype = SHAPES[shape_name], dtype or DTYPES[device]
    say("drawing weights")
    problem = Problem(shape, tokens, device, dtype)
    say("the reference in float64")
    for what in ("experts", "dense"):
        problem.truth(what)
    for which in passes:
        problem.train(PASSES[which])
        calls, results = _build(problem, names, which, say, deadline)
        say(f"timing {len(calls)} candidates side by side")
        clocks, times = records.Clocks(device), {}
        try:
            times = _time(problem, calls, results, which, seconds, clocks)
        except Interrupted as interrupt:
            times = interrupt.times
            raise
        finally:
            for name, found in times.items():
                one = CANDIDATES[name]
                work = problem.work(FORWARD if one.only_forward else which, one.what)
                results[name] |= records.result(found, context["roofs"], *work)
            nbytes, flops = problem.work(which)
            write({
                "benchmark": "experts", "op": "layer", "shape": shape_name, **shape._asdict(),
                "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "pass": which,
                **context, "clocks": clocks.seen(), "bytes": nbytes, "flops": flops,
                "results": results,
            })  # fmt: skip
        del calls
        torch._dynamo.reset()
        _free(device)


def _build(
    problem: Problem, names: Iterable[str], which: str, say: Callable[[str], None], deadline: float
) -> tuple[dict[str, Call], dict[str, dict[str, Any]]]:
    """Calls that may be timed, and for every name what is known of it already."""
    calls, results = {}, {}
    for name in names:
        candidate = CANDIDATES[name]
        left = deadline - time.monotonic()
        why = candidate.fits(problem)
        if not why and _steps(candidate, which) and _trains(problem, candidate) is None:
            why = "no backward that compares"
        if not why and left < 5:
            why = "no time left"
        if why:
            results[name] = {"not_run": why}
            continue
        say(f"building and checking {name}")
        try:
            with records.time_limit(min(LONGEST_S, left)):
                calls[name], results[name] = _first(problem, name, which)
        except ImportError as error:
            results[name] = {"not_run": f"not installed: {error}"}
        except Exception as error:
            results[name] = {"not_run": in_words(error)}
        if name not in calls:
            _free(problem.device)
        elif name.startswith("ours") and _wrong(results[name]):
            results[name]["not_run"] = "WRONG"
            del calls[name]
    return calls, results


def _steps(candidate: Candidate, which: str) -> bool:
    """Whether it does a backward in this pass."""
    return which != FORWARD and not candidate.only_forward


def _trains(problem: Problem, candidate: Candidate) -> list[torch.Tensor] | None:
    return candidate.trains(problem) if candidate.trains else None


def _wrong(result: dict[str, Any]) -> bool:
    ratios = [result[name] for name in ("error_ratio", "gradient_error_ratio") if name in result]
    return any(ratio is None or ratio > 1 for ratio in ratios)


def _first(problem: Problem, name: str, which: str) -> tuple[Call, dict[str, Any]]:
    """Make the candidate, check its first rows, and see what its first call and memory are.

    Ours' gradients are checked too; what is kept for them is seen where nothing is compiled, which
    would compile anew for it.
    """
    begin = time.perf_counter()
    candidate = CANDIDATES[name]
    call = candidate.make(problem)
    forward, more = not _steps(candidate, which), {}
    truth, same = problem.truth(candidate.what)
    with torch.set_grad_enabled(not forward):
        ratio = accuracy(call()[:CHECKED_ROWS].detach(), truth, same).ratio
        if not forward:
            if name.startswith("ours"):
                given = (candidate.what, call, candidate.trains(problem), CHECKED_ROWS)
                more["gradient_error_ratio"] = records.short(gradient_error(problem, *given))
            if not name.endswith("compiled"):
                more["saved_kb_a_token"] = records.short(saved_kb_a_token(problem, call))
            call = with_backward(problem, candidate, call)
            call()
    first_s = time.perf_counter() - begin
    result = {"error_ratio": records.short(ratio), **more, "first_s": round(first_s, 2)}
    if problem.device == "cuda":
        _free(problem.device)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(not forward):
            call()
        torch.cuda.synchronize()
        result["peak_mb"] = round((torch.cuda.max_memory_allocated() - held) / 1e6, 1)
    return call, result


def _time(
    problem: Problem,
    calls: dict[str, Call],
    results: dict[str, dict[str, Any]],
    which: str,
    seconds: float,
    clocks: records.Clocks,
) -> dict[str, Times]:
    """Side by side; a candidate that fails now, for want of memory say, leaves the rest."""
    base = sum(weight.nbytes for weight in problem.base)
    forward = which == FORWARD
    while calls:
        try:
            with torch.set_grad_enabled(not forward):
                return compare(
                    calls, problem.device, rounds=30, budget_s=seconds,
                    graphs=forward and base >= CACHES * l2_bytes(problem.device),
                    each_round=clocks.look,
                )  # fmt: skip
        except CallFailed as failed:
            results[failed.name]["not_run"] = in_words(failed.__cause__)
            calls = {name: call for name, call in calls.items() if name != failed.name}
        _free(problem.device)
    return {}


def in_words(error: BaseException | None) -> str:
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def _free(device: str) -> None:
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


@pytest.mark.parametrize(
    "name", ("ours, layer", "ours, experts", "fair eager, by index", "dense FFN")
)
@pytest.mark.parametrize("device", bench.DEVICES)
def bench_experts(benchmark, device, name):
    shape = SHAPES[SWEPT if device == "cuda" else "small"]
    problem = Problem(shape, shape.tokens, device, DTYPES[device])
    calls, results = _build(problem, [name], FORWARD, lambda _: None, float("inf"))
    assert name in calls, results[name]
    bench.pedantic(benchmark, calls[name], device, *problem.work())
