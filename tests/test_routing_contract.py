"""What holds of routing and plan as ops: opcheck, torch.compile, CUDA graphs, bad input."""

from __future__ import annotations

import pytest
import torch
from common import skip_narrow, some_ids, to_device
from torch import Tensor

import reference
from flexmore_kernels import ops, validation
from flexmore_kernels.checks import SCORINGS
from flexmore_kernels.testing import assert_same


def some_mask(tokens: int, experts: int) -> Tensor:
    mask = torch.rand(tokens, experts) < 0.5
    mask[:, 1] = True
    return mask


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("scoring", ("softmax", "sigmoid", "unit"))
def test_routing_opcheck(scoring, dtype, device, kernels):
    skip_narrow(kernels, device, dtype)
    options = {"dtype": dtype, "device": device, "requires_grad": True}
    logits, weight = torch.randn(4, 5, **options), torch.randn(3, 5, **options)
    bias = torch.randn(4, **options)
    mask = some_mask(4, 5).to(device)
    weights, indices = torch.ops.flexmore.topk_route(logits, bias, mask, 2, False, scoring)
    flexmore = torch.ops.flexmore
    torch.library.opcheck(flexmore.topk_route.default, (logits, bias, mask, 2, True, scoring))
    torch.library.opcheck(
        flexmore.topk_route_linear.default, (logits, weight, None, None, 2, False, scoring)
    )
    torch.library.opcheck(
        flexmore.topk_route_backward.default,
        (weights.detach(), logits.detach(), bias.detach(), mask, indices, False, scoring),
    )


@pytest.mark.parametrize("scoring", SCORINGS)
def test_routing_compiles_without_a_break(scoring, device, kernels):
    def step(x, weight, mask):
        out = ops.topk_route(x, weight, top_k=2, mask=mask, scoring=scoring)
        # The logits' part: unit weights have no gradient.
        return out.weights + out.logits[:, :2], out.indices

    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend="aot_eager")
    weight = torch.randn(5, 6, device=device, requires_grad=True)
    for tokens in (3, 4, 9):
        x, mask = torch.randn(tokens, 6, device=device), some_mask(tokens, 5).to(device)
        want, got = step(x, weight, mask), compiled(x, weight, mask)
        for a, b in zip(got, want, strict=True):
            assert_same(a, b)
        dweight = [torch.autograd.grad((w[0] ** 2).sum(), weight)[0] for w in (want, got)]
        assert_same(*dweight)


def test_routing_captured_in_a_cuda_graph(device, kernels):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    x, weight = torch.randn(70, 64, device=device), torch.randn(7, 64, device=device)

    def step():
        return ops.topk_route(x, weight, top_k=5)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(70, 64))
    graph.replay()
    for got, want in zip(captured, step(), strict=True):
        assert_same(got, want)


def test_topk_softmax(device, kernels):
    """The softmax over the selected alone is the renormalised softmax, bit for bit."""
    logits = torch.randn(9, 7, device=device, requires_grad=True)
    bias = torch.randn(6, device=device, requires_grad=True)
    dweights = torch.randn(9, 3, device=device)

    def results(route, **options):
        out = route(logits, top_k=3, bias=bias, **options)
        return out.indices, out.weights, *torch.autograd.grad(out.weights, (logits, bias), dweights)

    want = results(ops.topk_route, norm_topk_prob=True)
    for norm in (False, True):
        options = {"norm_topk_prob": norm, "scoring": "topk_softmax"}
        got = results(ops.topk_route, **options)
        for a, b, c in zip(got, want, results(reference.topk_route, **options), strict=True):
            assert_same(a, b)
            torch.testing.assert_close(a, c)


def test_unit_weights_are_constant(device, kernels):
    x, weight = torch.randn(5, 8, device=device), torch.randn(4, 8, device=device)
    weight.requires_grad_()
    mask = torch.arange(4, device=device) < 2
    for norm, value in ((False, 1.0), (True, 0.5)):
        out = ops.topk_route(x, weight, top_k=3, mask=mask, scoring="unit", norm_topk_prob=norm)
        assert out.logits.requires_grad and not out.weights.requires_grad
        assert_same(out.weights, torch.tensor([value, value, 0.0], device=device).expand(5, 3))


@pytest.mark.parametrize("experts", (5, 12))
def test_plan_opcheck(experts, device, kernels):
    ids = some_ids(4, experts, 2).to(device)
    torch.library.opcheck(torch.ops.flexmore.make_plan.default, (ids, experts))


def test_plan_compiles_without_a_break(device, kernels):
    compiled = torch.compile(
        lambda ids: ops.make_plan(ids, 5), fullgraph=True, dynamic=True, backend="aot_eager"
    )
    for tokens in (3, 4, 9):
        ids = some_ids(tokens, 5, 2).to(device)
        got, want = compiled(ids), ops.make_plan(ids, 5)
        assert got[6:] == want[6:]
        for a, b in zip(got[:6], want[:6], strict=True):
            assert_same(a, b)


def test_plan_captured_in_a_cuda_graph(device, kernels):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    ids = some_ids(300, 7, 5).to(device)
    ops.make_plan(ids, 7)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.make_plan(ids, 7)
    ids.copy_(some_ids(300, 7, 5))
    graph.replay()
    for got, want in zip(captured[:6], ops.make_plan(ids, 7)[:6], strict=True):
        assert_same(got, want)


NAN = float("nan")
LOGITS = torch.zeros(3, 4)
BAD_INPUT = {
    "x_not_a_tensor": (TypeError, "x", ([1.0],), {}),
    "x_of_ints": (TypeError, "x", (LOGITS.long(),), {}),
    "x_of_one_dimension": (ValueError, "x", (LOGITS[0],), {}),
    "weight_too_wide": (ValueError, "weight", (LOGITS, torch.zeros(2, 5)), {"top_k": 1}),
    "weight_of_another_dtype": (TypeError, "weight", (LOGITS, torch.zeros(2, 4).half()), {}),
    "k_zero": (ValueError, "top_k", (LOGITS,), {"top_k": 0}),
    "k_above_e": (ValueError, "top_k", (LOGITS,), {"top_k": 5}),
    "k_fractional": (TypeError, "top_k", (LOGITS,), {"top_k": 1.5}),
    "norm_not_a_bool": (TypeError, "norm_topk_prob", (LOGITS,), {"norm_topk_prob": 1}),
    "scoring_unknown": (
        ValueError, "scoring: got 'top'; accepted: 'softmax', 'topk_softmax', 'sigmoid', 'unit'",
        (LOGITS,), {"scoring": "top"}),
    "scoring_not_a_string": (ValueError, "scoring", (LOGITS,), {"scoring": 1}),
    "bias_too_long": (ValueError, "bias", (LOGITS,), {"bias": torch.zeros(4)}),
    "bias_of_ints": (TypeError, "bias", (LOGITS,), {"bias": torch.zeros(3).long()}),
    "mask_of_floats": (TypeError, "mask", (LOGITS,), {"mask": torch.ones(4)}),
    "mask_misshapen": (ValueError, "mask", (LOGITS,), {"mask": torch.ones(3, 3).bool()}),
    "mask_on_another_device": (ValueError, "mask", (LOGITS,),
                               {"mask": torch.ones(4, dtype=torch.bool, device="meta")}),
    "nothing_allowed": (ValueError, "mask.*token 1", (LOGITS,),
                        {"mask": torch.arange(3)[:, None].expand(3, 4) != 1}),
    "nan": (ValueError, "logits.*token 0, expert 2", (torch.tensor([[0, 1, NAN, 3.0]]),), {}),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_routing_names_the_argument(bad, device):
    error, message, args, options = bad
    options = {"top_k": 2, **{name: to_device(value, device) for name, value in options.items()}}
    with pytest.raises(error, match=message), validation():
        ops.topk_route(*(to_device(arg, device) for arg in args), **options)


BAD_IDS = {
    "not_a_tensor": (TypeError, "indices", [[0]], 4),
    "floats": (TypeError, "indices", torch.zeros(2, 2), 4),
    "one_dimension": (ValueError, "indices", torch.zeros(2).long(), 4),
    "negative": (ValueError, "indices", torch.tensor([[0, -1]]), 4),
    "above_e": (ValueError, "indices", torch.tensor([[0, 5]]), 4),
    "no_slots": (ValueError, "indices", torch.zeros(2, 0).long(), 4),
    "twice": (ValueError, "indices", torch.tensor([[0, 1], [2, 2]]), 4),
    "no_experts": (ValueError, "num_experts", torch.zeros(2, 1).long(), 0),
    "too_many_experts": (ValueError, "num_experts", torch.zeros(2, 1).long(), 1025),
}


@pytest.mark.parametrize("bad", BAD_IDS.values(), ids=BAD_IDS)
def test_bad_ids_name_the_argument(bad, device):
    error, message, indices, num_experts = bad
    with pytest.raises(error, match=message), validation():
        ops.make_plan(indices.to(device) if isinstance(indices, Tensor) else indices, num_experts)
