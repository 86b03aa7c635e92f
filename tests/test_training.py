"""A step of training: the gradients of exactly what is trained, the same bits on every run.

Traps covered: a frozen tensor that gets a gradient, or a trained one that gets none; micro-batches
of one token, which other kernels serve; an order of sums that depends on the threads; a second
derivative that is silently zero.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import pytest
import torch
from test_layer import make, twin

from flexmore_kernels import testing
from flexmore_kernels.testing import assert_accurate, assert_same

LOW, PAIR, MIXED = (0, 4, 4, 4), (0, 4), (0, 1, 2, 8, 16)


class Step(NamedTuple):
    """A line of the benchmarks of training, small; trains: "factors", "one" (expert 1) or "all"."""

    ranks: tuple
    top_k: int
    trains: str
    recompute: bool = False

    def wants(self, name: str) -> bool:
        factor = not name.endswith("_proj.weight")
        one = name.startswith("experts.1.")
        return {"factors": factor, "one": one, "all": True}[self.trains]


STEPS = {
    "factors_and_router": Step(LOW, 3, "factors"),
    "one_expert": Step(LOW, 3, "one"),
    "pair": Step(PAIR, 2, "one"),
    "pair_full_size": Step((0, 0), 2, "one"),
    "base_too": Step(LOW, 3, "all"),
    "mixed_ranks": Step(MIXED, 3, "factors"),
    "triples": Step((0, (2, 0, "full"), 3, ("full", 4, 0)), 2, "one"),
    "all_full_size": Step((0, 0, 0, 0), 3, "all"),
    "recompute": Step(LOW, 3, "factors", True),
    "router_alone": Step(LOW, 3, "factors"),
}
ROUTER = "gate.weight"


def wide(device: str) -> torch.dtype:
    """A layer takes float64 on a CPU alone."""
    return torch.float64 if device == "cpu" else torch.float32


def a_layer(step: Step = STEPS["factors_and_router"], device="cpu", dtype=None, **options):
    layer = make(step.ranks, step.top_k, device=device, dtype=dtype or wide(device), **options)
    layer.recompute = step.recompute
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_(step.wants(name))
    return layer


def batch(layer, tokens=40, dtype=None):
    weight = layer.gate.weight
    x = testing.make_x(tokens, layer.hidden_size, weight.device, dtype or weight.dtype)
    return x, torch.randn_like(x)


def backward(layer, x, dy, call=None):
    """y, dx and the gradients that there are, by name."""
    layer.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = layer(x) if call is None else call(x)
    y.backward(dy.to(y.dtype))
    named = layer.named_parameters()
    return {"y": y.detach(), "x": x.grad} | {n: p.grad for n, p in named if p.grad is not None}


def assert_right(found, layer, x, dy, parts=None):
    """Against the reference, by the accuracy rule: each tensor in float64; in float32 those of all
    weights together, each scaled alike, and the router's, small differences of large numbers, left
    to the ops' tests."""
    truth, same = (_reference(layer, x, dy, dtype, parts) for dtype in (torch.float64, None))
    if x.dtype == torch.float64:
        for name, value in found.items():
            assert_accurate(value, truth[name], name=name)
        return
    groups: dict[str, list] = {}
    for name in found.keys() - {ROUTER}:
        scale = 2.0 ** -math.frexp(truth[name].abs().max().item())[1]
        three = [grads[name].flatten() * scale for grads in (found, truth, same)]
        groups.setdefault(name if name in ("x", "y") else "weights", []).append(three)
    for name, group in groups.items():
        assert_accurate(*map(torch.cat, zip(*group, strict=True)), name=name)


def _reference(layer, x, dy, dtype, parts=None):
    """The reference's gradients of all of it, in `dtype` or the layer's own, over the parts."""
    copied = twin(copy.deepcopy(layer), dtype)
    for parameter in copied.parameters():
        parameter.requires_grad_()
    x, dy = (t.detach().to(dtype or t.dtype) for t in (x, dy))
    x.requires_grad_()
    ys = [copied(part) for part in x.split(parts or [len(x)])]
    for y, part in zip(ys, dy.split(parts or [len(dy)]), strict=True):
        y.backward(part)
    # An expert that got no token has no gradient there, and zeros here.
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad
             for n, p in copied.state_dict(keep_vars=True).items()}  # fmt: skip
    return {"y": torch.cat(ys).detach(), "x": x.grad} | grads


@pytest.mark.parametrize("name", STEPS)
def test_gradients_of_exactly_what_is_trained(name, device, kernels):
    step = STEPS[name]
    layer = a_layer(step, device)
    if name == "router_alone":
        for key, parameter in layer.named_parameters():
            parameter.requires_grad_(key == ROUTER)
    x, dy = batch(layer)
    found = backward(layer, x, dy)
    trained = {key for key, parameter in layer.named_parameters() if parameter.requires_grad}
    assert found.keys() - {"x", "y"} == trained
    assert_right(found, layer, x, dy)


@pytest.mark.parametrize("name", ["base_too", "mixed_ranks", "triples", "all_full_size"])
def test_the_backward_is_the_adjoint_of_the_derivative(name, device):
    """<dy, J v> by the reference's forward derivative is <J^T dy, v>; what the rule allows of a
    gradient allows, by Cauchy and Schwarz, so much of its product with v."""
    layer = a_layer(STEPS[name]._replace(trains="all"), device)
    x, dy = batch(layer)
    grads = backward(layer, x, dy)
    truth, same = (_reference(layer, x, dy, dtype) for dtype in (torch.float64, None))
    names = [key for key in grads if key != "y"]
    v = {key: torch.randn_like(truth[key]) for key in names}
    exact = twin(copy.deepcopy(layer), torch.float64)
    point = exact.state_dict() | {"x": x.double()}

    def function(at):
        weights = {key: value for key, value in at.items() if key != "x"}
        return torch.func.functional_call(exact, weights, (at["x"],))

    order = {key: point[key] for key in names}
    _, along = torch.func.jvp(function, (order,), (v,))
    forward = (dy.double() * along).sum().item()
    back = sum((grads[key].double() * v[key]).sum().item() for key in names)
    allowed = sum(
        testing.accuracy(grads[key], truth[key], same[key]).allowed_frobenius * v[key].norm().item()
        for key in names
    )
    assert abs(forward - back) <= allowed < 1e-3 * dy.double().norm() * along.norm()


@pytest.mark.parametrize("name", ["factors_and_router", "base_too", "all_full_size"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_training_is_the_same_bits_on_every_run(name, dtype, device):
    start = a_layer(STEPS[name], device, dtype)
    steps = [batch(start, tokens) for tokens in (40, 1, 130)]

    def train(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        layer = copy.deepcopy(start)
        optimizer = torch.optim.AdamW([p for p in layer.parameters() if p.requires_grad], lr=0.01)
        try:
            for x, dy in steps:
                found = backward(layer, x, dy)
                optimizer.step()
        finally:
            torch.set_num_threads(before)
        return found | layer.state_dict()

    first = train(1)
    assert not torch.equal(first["gate.weight"], start.gate.weight)
    for threads in (1, 2):
        again = train(threads)
        assert again.keys() == first.keys()
        for key, value in first.items():
            assert_same(again[key], value, name=key)


@pytest.mark.parametrize("name", ["factors_and_router", "pair_full_size", "base_too"])
def test_micro_batches_add_up_to_one_batch(name, device):
    layer, parts = a_layer(STEPS[name], device), [17, 1, 70]
    x, dy = batch(layer, sum(parts))
    layer.zero_grad(set_to_none=True)
    leaf = x.clone().requires_grad_()
    ys = [layer(part) for part in leaf.split(parts)]
    for y, part in zip(ys, dy.split(parts), strict=True):
        y.backward(part)
    named = layer.named_parameters()
    found = {"y": torch.cat(ys).detach(), "x": leaf.grad}
    found |= {key: p.grad for key, p in named if p.grad is not None}
    assert_right(found, layer, x, dy, parts)
    assert_right(found, layer, x, dy)


@pytest.mark.parametrize("wanted", ["x", ROUTER, "experts.1.up_proj_a.weight"])
def test_a_second_derivative_is_refused(wanted, device):
    layer = a_layer(device=device)
    x, _ = batch(layer)
    x.requires_grad_()
    tensor = x if wanted == "x" else layer.get_parameter(wanted)
    (grad,) = torch.autograd.grad(layer(x).square().sum(), tensor, create_graph=True)
    with pytest.raises(NotImplementedError, match="differentiable once, not twice"):
        grad.square().sum().backward()
