"""What the benchmarks of single ops share: an op's price, its check, its kernels side by side.

Each bench_<stem>.py gives `prices(shape, tokens, device, dtype)`: what to run on which inputs, the
reference's result, the bytes and operations that must be. `price_all` gives a record of each;
`under_pytest` times one under pytest-benchmark.
"""

from __future__ import annotations

import functools
import gc
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from benchmarks import records
from benchmarks.problem import DTYPES
from benchmarks.shapes import SHAPES, SWEPT, Shape
from flexmore_kernels import backend, ops
from flexmore_kernels.ragged import RoutingPlan
from flexmore_kernels.testing import accuracy, tensors, to_float64, tree_map
from flexmore_kernels.timing import Call, CallFailed, Times, compare, copies_for

DEVICES = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
CHECKED_TOKENS = 256


class Price(NamedTuple):
    """An op on inputs: function(*inputs), what it must equal, what it must move and compute.

    truth: the reference's function, for inputs in any float dtype. part: what of the results is
    compared. plain: the same in plain PyTorch, timed beside ours. same: whose error in the inputs'
    dtype is allowed twice; the truth's, if not given.
    """

    op: str
    stem: str
    function: Callable[..., Any]
    inputs: tuple
    truth: Callable[..., Any]
    nbytes: float = 0
    flops: float = 0
    plain: Callable[..., Any] | None = None
    part: Callable[[Any], Any] = lambda result: result
    which: str = "forward"
    same: Callable[..., Any] | None = None

    @property
    def name(self) -> str:
        return self.op if self.which == "forward" else f"{self.op}, {self.which}"


Prices = Callable[[Shape, int, str, torch.dtype], list[Price]]


def kernels_of(stem: str, device: str) -> tuple[str, ...]:
    """Kernels that can run the stem; not the interpreter, whose times say nothing."""
    names = backend.available(stem, device)
    return tuple(name for name in names if not (device == "cpu" and name == "triton"))


def routed(shape: Shape, tokens: int, device: str) -> tuple[Tensor, Tensor, RoutingPlan]:
    """indices and weights (T, K) of random logits, and their plan."""
    torch.manual_seed(0)
    logits = torch.randn(tokens, len(shape.ranks), device=device)
    routing = ops.topk_route(logits, top_k=shape.top_k)
    return routing.indices, routing.weights, ops.make_plan(routing.indices, len(shape.ranks))


def with_backward(
    forward: Price,
    wrt: Sequence[int],
    *,
    nbytes: float = 0,
    flops: float = 0,
    same: Callable[..., Any] | None = None,
) -> Price:
    """The price of forward and backward: the gradients of the first result in inputs `wrt`."""

    def both(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(dy: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
            given = list(inputs)
            # In one thread, the one whose launches a graph records.
            one_thread = torch.autograd.grad_mode.set_multithreading_enabled(False)
            with torch.enable_grad(), one_thread:
                for index in wrt:
                    given[index] = given[index].detach().requires_grad_()
                out = forward.part(function(*given))
                out = out if isinstance(out, Tensor) else out[0]
                return torch.autograd.grad(out, [given[index] for index in wrt], dy)

        return run

    with torch.no_grad():
        out = forward.part(forward.function(*forward.inputs))
    out = out if isinstance(out, Tensor) else out[0]
    return Price(
        forward.op, forward.stem, both(forward.function),
        (torch.randn_like(out), *forward.inputs), both(forward.truth), nbytes, flops,
        which="forward + backward", same=both(same) if same else None,
    )  # fmt: skip


def price_all(
    prices: Prices,
    shape_name: str,
    tokens: int,
    *,
    device: str,
    context: dict[str, Any],
    say: Callable[[str], None],
    seconds: float = 2.0,
    op: str = "",
) -> Iterator[dict[str, Any]]:
    """A record for each op of a file whose name has `op` in it."""
    shape, dtype = SHAPES[shape_name], DTYPES[device]
    some = prices(shape, min(tokens, CHECKED_TOKENS), device, dtype)
    for small, one in zip(some, prices(shape, tokens, device, dtype), strict=True):
        if op not in one.name:
            continue
        say(one.name)
        clocks = records.Clocks(device)
        inputs = _copies(one.inputs, device)
        results = _checked(small, device)
        calls = {
            kernels: [functools.partial(_run(one, kernels), *given) for given in inputs]
            for kernels, result in results.items()
            if "not_run" not in result
        }
        for kernels, found in _compare(calls, results, device, seconds, clocks).items():
            results[kernels] |= records.result(found, context["roofs"], one.nbytes, one.flops)
        yield {
            "benchmark": one.stem, "op": one.op, "shape": shape_name, **shape._asdict(),
            "tokens": tokens, "dtype": str(dtype).removeprefix("torch."), "pass": one.which,
            **context, "clocks": clocks.seen(), "bytes": one.nbytes, "flops": one.flops,
            "inputs_in_turn": len(inputs), "results": results,
        }  # fmt: skip


def _checked(price: Price, device: str) -> dict[str, dict[str, Any]]:
    """For each set of kernels, and the plain form, the error over what is allowed."""
    results: dict[str, dict[str, Any]] = {}
    for kernels in kernels_of(price.stem, device) + (("torch",) if price.plain else ()):
        try:
            ratio = _check(_run(price, kernels), price)
        except Exception as error:
            results[kernels] = {"not_run": f"{type(error).__name__}: {str(error)[:160]}"}
            continue
        results[kernels] = {"error_ratio": records.short(ratio)}
        if kernels != "torch" and not ratio <= 1:
            results[kernels]["not_run"] = "WRONG"
    return results


def _find(prices: Sequence[Price], name: str) -> Price:
    return next(price for price in prices if price.name == name)


def _run(price: Price, name: str) -> Callable[..., Any]:
    if name == "torch":
        return price.plain

    def run(*inputs: Any) -> Any:
        with backend.use(name):
            return price.function(*inputs)

    return run


def _copies(inputs: tuple, device: str) -> list[tuple]:
    """The inputs, and as many copies as take turns with them so that the cache is cold."""
    count = copies_for(sum(tensor.nbytes for tensor in tensors(inputs)), device)
    return [inputs, *(tree_map(Tensor.clone, inputs) for _ in range(count - 1))]


def _check(run: Callable[..., Any], price: Price) -> float:
    """The largest error over what is allowed, of all results that are compared."""
    wide = price.truth(*to_float64(price.inputs))
    found = (run(*price.inputs), (price.same or price.truth)(*price.inputs), wide)
    parts = zip(*(tensors(price.part(result)) for result in found), strict=True)
    return max(_ratio(*part) for part in parts)


def _ratio(out: Tensor, same: Tensor, exact: Tensor) -> float:
    if not out.is_floating_point():
        return 0.0 if torch.equal(out, same) else float("inf")
    return accuracy(out, exact, same).ratio


def _compare(
    candidates: dict[str, list[Call]],
    results: dict[str, dict[str, Any]],
    device: str,
    seconds: float,
    clocks: records.Clocks,
) -> dict[str, Times]:
    while candidates:
        try:
            return compare(
                candidates, device, rounds=50, budget_s=seconds, graphs=True, each_round=clocks.look
            )
        except CallFailed as failed:
            results[failed.name]["not_run"] = str(failed)[:160]
            candidates = {name: calls for name, calls in candidates.items() if name != failed.name}
        gc.collect()
    return {}


def parameters(stem: str, prices: Prices) -> list:
    """(op, kernels, device) of everything that runs this stem here, as pytest parameters."""
    shape = SHAPES["tiny"]
    names = [price.name for price in prices(shape, 4, "cpu", torch.float32)]
    return [
        pytest.param(name, kernels, device, id=f"{name}-{device}-{kernels}".replace(" ", "_"))
        for name in names
        for device in DEVICES
        for kernels in kernels_of(stem, device)
    ]


def under_pytest(benchmark: Any, prices: Prices, name: str, kernels: str, device: str) -> None:
    """Check, then time, one op with one set of kernels."""
    shape = SHAPES[SWEPT if device == "cuda" else "small"]
    some = _find(prices(shape, CHECKED_TOKENS, device, DTYPES[device]), name)
    ratio = _check(_run(some, kernels), some)
    assert ratio <= 1, f"{name}: {ratio:.3g} times the allowed error"
    one = _find(prices(shape, shape.tokens, device, DTYPES[device]), name)
    inputs = _copies(one.inputs, device)
    calls = [functools.partial(_run(one, kernels), *given) for given in inputs]
    pedantic(benchmark, calls, device, one.nbytes, one.flops)


def pedantic(
    benchmark: Any, calls: Call | list[Call], device: str, nbytes: float, flops: float
) -> None:
    """Time under pytest-benchmark.

    Its own figure is wall time, waiting for the device included; extra_info holds the device's
    milliseconds, and TB/s and TFLOP/s from the bytes and operations that must be.
    """
    first = calls[0] if isinstance(calls, list) else calls

    def waited() -> None:
        first()
        if device == "cuda":
            torch.cuda.synchronize()

    with torch.no_grad():
        times = compare({"call": calls}, device, graphs=isinstance(calls, list))["call"]
        benchmark.pedantic(waited, rounds=5, warmup_rounds=1)
    benchmark.extra_info.update(times._asdict())
    if nbytes:
        benchmark.extra_info["TB/s"] = nbytes / times.ms / 1e9
    if flops:
        benchmark.extra_info["TFLOP/s"] = flops / times.ms / 1e9
