"""The layer in every dtype that it takes: half precision, wider factors and routers, autocast.

Traps covered: routing of half-precision logits (given it, the accuracy rule holds for the rest),
float32 factors beside a bfloat16 base, autocast that would recast what an op calls inside itself.
"""

from __future__ import annotations

import pytest
import torch
from test_layer import make, twin

import flexmore_kernels as fk
import reference
from flexmore_kernels import testing
from flexmore_kernels.testing import assert_accurate


def assert_logits(logits, x, layer):
    wide, same = (
        (x.to(d) @ layer.gate.weight.to(d).T).detach() for d in (torch.float64, logits.dtype)
    )
    assert_accurate(logits, wide, same, name="logits")


def sides(layer, dtype):
    """Gate, up and down of a reference layer, as `reference.experts` takes them."""
    return [[e.projection(name, dtype) for e in layer.experts] for name in fk.storage.PROJECTIONS]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_layer_given_its_routing(dtype, device, kernels):
    if kernels == "triton" and device == "cpu" and dtype != torch.float32:
        pytest.skip("the interpreter computes float32 and float64 only")
    layer = make(dtype=dtype, device=device)
    x = testing.make_x(64, 16, device, dtype)
    y, routing = layer(x, return_routing=True)
    assert_logits(routing.logits, x, layer)
    again = reference.topk_route(routing.logits, top_k=3)
    assert torch.equal(routing.indices, again.indices) and routing.weights.dtype == torch.float32
    wide, plain = twin(layer, torch.float64), twin(layer)
    given = [routing.indices, routing.weights.double()]
    truth = reference.experts(x.double(), *given, *sides(wide, torch.float64))
    same = reference.experts(x, routing.indices, routing.weights, *sides(plain, dtype))
    assert_accurate(y, truth.detach(), same.detach())


@pytest.mark.parametrize("autocast", [False, True])
def test_layer_router_dtype(autocast, device):
    dtype = None if autocast else torch.bfloat16
    layer = make(dtype=dtype, device=device, router_dtype=torch.float32)
    x = testing.make_x(33, 16, device, torch.bfloat16)
    with torch.autocast(device, torch.bfloat16, enabled=autocast):
        y, routing = layer(x, return_routing=True)
    assert y.dtype == torch.bfloat16 and routing.logits.dtype == torch.float32
    assert_logits(routing.logits, x, layer)


def test_layer_factors_in_float32(device):
    layer = make(dtype=torch.bfloat16, device=device)
    exact = twin(layer)
    for name, parameter in layer.named_parameters():
        if "_proj_" in name or name.startswith("gate."):
            parameter.data = parameter.data.float()
    x = testing.make_x(20, 16, device, torch.bfloat16)
    y = layer(x)
    y.sum().backward()
    assert y.dtype == torch.bfloat16
    assert layer.experts[1].up_proj_a.weight.grad.dtype == torch.float32
    testing.assert_same(y, make(dtype=torch.bfloat16, device=device)(x))
    assert_accurate(y, exact.double()(x.double()).detach(), twin(layer)(x).detach())


def test_ops_compute_as_they_are_told_under_autocast(device, kernels):
    layer, x = make(device=device), testing.make_x(20, 16, device)

    def run():
        routing = fk.ops.topk_route(x, layer.gate.weight, top_k=2)
        weights = [layer.experts.projection(name) for name in fk.storage.PROJECTIONS]
        return fk.ops.experts(x, routing.indices, routing.weights, *weights)

    with torch.autocast(device, torch.bfloat16):
        y = run()
    testing.assert_same(y, run())


@pytest.mark.parametrize("wide", [torch.float32, torch.bfloat16], ids=str)
def test_layer_autocast(wide, device):
    layer = make(device=device, dtype=wide)
    x = testing.make_x(20, 16, device)
    with torch.autocast(device, torch.bfloat16):
        y, routing = layer(x, return_routing=True)
    y.float().sum().backward()
    assert y.dtype == routing.logits.dtype == torch.bfloat16
    assert all(p.grad is not None and p.grad.dtype == wide for p in layer.parameters())
    testing.assert_same(y, layer.to(torch.bfloat16)(x.bfloat16()))
