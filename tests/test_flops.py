"""Flops against numbers counted by hand, and what a profiler shows of a layer."""

from __future__ import annotations

import re
import subprocess
import sys

import pytest
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

import flexmore_kernels as fk
from flexmore_kernels import flops, ops
from flexmore_kernels.testing import make_pair, make_weight, make_x
from tests.common import some_plan

T, D, F = 10, 8, 12


def count(call) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def some_layer(ranks, top_k, **kwargs) -> fk.FlexMoRE:
    return fk.FlexMoRE(D, F, ranks, top_k, **kwargs)


ROUTER, BASE = 2 * T * D * 5, 6 * T * D * F
# Ranks 2, 3, (1, 0, "full") and a full-size expert beside the base; every token uses all five.
MIXED = (0, 2, 3, (1, 0, "full"), 0)
PER_UNIT = 2 * (D + F)
LOW_RANK = T * PER_UNIT * (3 * 2 + 3 * 3 + 1)
FULL = T * (1 + 3) * 2 * D * F


def test_forward_of_mixed_ranks():
    layer, x = some_layer(MIXED, 5), make_x(T, D)
    with torch.no_grad():
        assert count(lambda: layer(x)) == ROUTER + BASE + LOW_RANK + FULL


def test_backward_of_all():
    """For each product of the forward two: the gradients of both its factors."""
    layer, x = some_layer(MIXED, 5), make_x(T, D).requires_grad_()
    y = layer(x)
    assert count(lambda: y.sum().backward()) == 2 * (ROUTER + BASE + LOW_RANK + FULL)


def test_backward_of_factors_alone():
    """Base, full-size experts and the router frozen, and x without a gradient."""
    layer, x = some_layer(MIXED, 5), make_x(T, D)
    for name, parameter in layer.named_parameters():
        parameter.requires_grad_("_a." in name or "_b." in name)
    y = layer(x)
    dmixed = 2 * T * D * F
    # Down: both factors, and on to the hidden states. Gate and up: both, but nothing for x.
    down = T * 2 * PER_UNIT * (2 + 3)
    inward = T * (PER_UNIT + 2 * F) * (2 * 2 + 2 * 3 + 1)
    hidden_of_full = T * 2 * (2 * D * F)
    assert count(lambda: y.sum().backward()) == dmixed + down + inward + hidden_of_full


def test_the_base_is_counted_once():
    x, ranks = make_x(T, D), (0, 4, 4, 4)
    with torch.no_grad():
        one, three = (count(lambda k=k: some_layer(ranks, k)(x)) for k in (1, 3))
    assert three - one == T * 2 * 3 * 4 * PER_UNIT


def test_fewer_than_all_experts_is_a_bound():
    """The two dearest: the full-size one and rank 3."""
    with torch.no_grad():
        counted = count(lambda: some_layer((0, 1, 3, 0), 2)(make_x(T, D)))
    assert counted == 2 * T * D * 4 + BASE + T * (3 * 2 * D * F + 3 * 3 * PER_UNIT)


def test_stacked_factors_count_the_same():
    ranks = (0, 2, 0, 3)
    found = []
    for stacked in (False, True):
        layer, x = some_layer(ranks, 2, stacked_factors=stacked), make_x(T, D).requires_grad_()
        found.append((count(lambda: layer(x)), count(lambda: layer(x).sum().backward())))  # noqa: B023
    assert found[0] == found[1]


def test_ops_alone():
    plan = some_plan("cpu", tokens=T, experts=4, top_k=3)
    ranks, N = (0, 2, 3, 1), 3 * T
    P = T * (2 + 3 + 1)
    rows, a, b = make_x(N, D), make_weight(6, D), make_weight(F, 6)
    rows.requires_grad_(), a.requires_grad_()
    z = ops.shrink(rows, a, plan, ranks)
    assert count(lambda: ops.shrink(rows, a, plan, ranks)) == 2 * P * D
    assert count(lambda: z.sum().backward()) == 4 * P * D
    z = z.detach()
    assert count(lambda: ops.expand(z, b, plan, ranks)) == 2 * P * F
    weight = torch.randn(4, F, D, requires_grad=True)
    assert count(lambda: ops.grouped_gemm(rows, weight, plan)) == 2 * N * D * F
    y = ops.grouped_gemm(rows, weight, plan)
    assert count(lambda: y.sum().backward()) == 4 * N * D * F
    gate, up = (torch.randn(T, F, requires_grad=True) for _ in range(2))
    weights = torch.rand(T, 3)
    arguments = (gate, up, weights, plan, z, b, ranks, z, b, ranks)
    assert count(lambda: ops.gated_mix(*arguments)) == 2 * 2 * P * F
    mixed, _ = ops.gated_mix(*arguments)
    assert count(lambda: mixed.sum().backward()) == 2 * 2 * 2 * P * F
    x = make_x(T, D)
    assert count(lambda: ops.unpermute(ops.permute(x, plan), plan, weights)) == 0
    assert count(lambda: ops.topk_route(make_x(T, 4), top_k=2)) == 0


def test_rows_sorted_by_expert():
    counts = torch.tensor([4, 6])
    sides = [[make_weight(o, i), make_pair(o, i, 3)] for o, i in ((F, D), (F, D), (D, F))]
    counted = count(lambda: ops.experts(make_x(T, D), None, None, *sides, counts=counts))
    assert counted == BASE + T * 3 * 3 * PER_UNIT


def test_every_op_has_a_formula():
    from flexmore_kernels import library

    defined = {name.split("::")[1].split(".")[0] for name in library._LIBRARY._op_defs}
    assert set(flops.FORMULAS) == defined


@pytest.mark.parametrize("first", ["torch.utils.flop_counter", "flexmore_kernels"])
def test_registered_whichever_is_imported_first(first):
    second = {"torch.utils.flop_counter", "flexmore_kernels"} - {first}
    code = f"""
import torch, sys, {first}
assert ("torch.utils.flop_counter" in sys.modules) == ({first!r} != "flexmore_kernels")
import {second.pop()}
assert torch.ops.flexmore.experts in torch.utils.flop_counter.flop_registry
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_profile_names_what_ran():
    """The ops of the layer, forward and backward, and beneath them the library's."""
    layer, x = some_layer((0, 2, 3), 2), make_x(T, D).requires_grad_()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        layer(x).sum().backward()
    names = {event.key for event in profiled.key_averages()}
    for op in ("topk_route_linear", "topk_route_backward", "experts", "experts_backward"):
        assert f"flexmore::{op}" in names
    assert not [name for name in names if re.match(r"flexmore::.*[A-Z]", name)]
    if fk.ops.routing.backend.native.available():
        assert {"flexmore_native::topk_route", "flexmore_native::make_plan"} <= names
