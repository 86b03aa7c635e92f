"""Routing against the reference: ids bit for bit, weights and gradients by the accuracy rule.

Traps covered: the order of ties and of -inf, softmax over the allowed only, empty slots, NaN, bias
gradients at 0, expanded masks, both paths of the router's matmul, strided inputs, unwritten memory
(conftest poisons it).
"""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from common import skip_narrow
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from flexmore_kernels import backend, ops
from flexmore_kernels.checks import SCORINGS
from flexmore_kernels.testing import assert_accurate, assert_accurate_draws, assert_same

INF, NAN = float("inf"), float("nan")
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Case(NamedTuple):
    """Logits with a reason; `routable` says that every token has somewhere to go."""

    name: str
    why: str
    logits: Tensor
    top_k: int
    bias: Tensor | None = None
    mask: Tensor | None = None
    routable: bool = True


def grid(tokens: int, experts: int, seed: int = 0) -> Tensor:
    """Multiples of 1/8, exact in every dtype; some are equal."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-24, 25, (tokens, experts), generator=generator).double() / 8


def choice(tokens: int, experts: int) -> Tensor:
    """A mask that leaves each token expert 1 and some others."""
    generator = torch.Generator().manual_seed(1)
    mask = torch.rand(tokens, experts, generator=generator) < 0.5
    mask[:, 1] = True
    return mask


CASES = (
    Case("no_tokens", "T = 0: nothing may launch, shapes must be right", grid(0, 4), 2),
    Case("one_token", "T = 1: decode", grid(1, 7), 5),
    Case("one_expert", "E = 1: the softmax of one number is 1, the bias is empty",
         grid(3, 1), 1, torch.zeros(0)),
    Case("k_equals_1", "top_k = 1: renormalised weights are 1 and have no gradient", grid(9, 5), 1),
    Case("k_equals_e", "top_k = E: a permutation of all experts", grid(7, 5), 5, -grid(1, 4)[0]),
    Case("odd_sizes", "no size is a power of two", grid(67, 7), 5, grid(1, 6)[0], choice(67, 7)),
    Case("ties", "all equal: the smaller index wins", torch.zeros(5, 6), 4),
    Case("signed_zeros", "-0.0 and 0.0 tie", torch.tensor([[0, -0.0, 0], [-0.0, 0, -0.0]]), 2),
    Case("starved", "an expert that no token chooses", grid(11, 4) - 50 * torch.eye(4)[2], 3),
    Case("all_to_one", "every token's first is the same", grid(9, 4) + 50 * torch.eye(4)[3], 2),
    Case("fewer_than_k", "fewer allowed than k: the last slots are empty",
         grid(6, 5), 4, None, torch.tensor([False, True, False, True, False])),
    Case("underflow", "excluded logits so large that the allowed ones underflow beside them",
         grid(4, 4) + torch.tensor([300.0, 0, 0, 250]), 2, None,
         torch.tensor([False, True, True, False])),
    Case("far_apart", "allowed logits so far apart that p underflows: weight 0, but selected",
         torch.tensor([[0.0, -400, -800, -2000]]), 3),
    Case("all_low", "so low that every sigmoid underflows: renormalised they do not",
         grid(4, 5) - 900, 3),
    Case("all_high", "so high that every sigmoid is 1, its slope 0", grid(4, 5) + 900, 3),
    Case("minus_inf", "an allowed -inf is selected after all finite ones, an excluded one never",
         torch.tensor([[-INF, 1, -INF, -INF, 0]]), 4, None,
         torch.tensor([True, True, False, True, True])),
    Case("masked_nan", "a NaN that the mask excludes does not matter",
         torch.tensor([[NAN, 1.0, 2.0], [3.0, 4, NAN]]), 2, None,
         torch.tensor([[False, True, True], [True, True, False]])),
    Case("many_experts", "a row for several warps",
         grid(5, 300), 8, grid(1, 299)[0], choice(5, 300)),
    Case("hundreds", "a lane sorts several logits; no bias", grid(5, 200), 8),
    Case("a_thousand", "the most that a lane sorts", grid(3, 1000), 8, None, choice(3, 1000)),
    Case("nan_token", "a NaN among the allowed: the whole token is empty, its neighbours are not",
         torch.tensor([[1.0, 2, 3], [1, NAN, 3], [3, 2, 1]]), 2, None, None, False),
    Case("nothing_allowed", "a token that may use no expert", grid(3, 4), 2, None,
         torch.arange(3)[:, None].expand(3, 4) != 1, False),
    Case("infinite", "a largest logit of +inf or -inf has no softmax",
         torch.tensor([[INF, 0, 1], [-INF, -INF, -INF], [0, 1, 2]]), 2, None, None, False),
)  # fmt: skip
ROUTABLE = [case for case in CASES if case.routable]
# topk_softmax reaches the kernels as softmax, renormalised: see test_topk_softmax.
SCORED = pytest.mark.parametrize(
    "scored",
    [
        {"scoring": s, "norm_topk_prob": n}
        for s in ("softmax", "sigmoid", "unit")
        for n in (False, True)
    ],
    ids=lambda scored: scored["scoring"] + "-renormalised" * scored["norm_topk_prob"],
)


def by_name(cases):
    return pytest.mark.parametrize("case", cases, ids=[case.name for case in cases])


def inputs(case: Case, device: str, dtype: torch.dtype):
    """(logits, bias, mask) on the device."""
    bias = None if case.bias is None else case.bias.to(device, dtype)
    return case.logits.to(device, dtype), bias, None if case.mask is None else case.mask.to(device)


def grads(route, inputs, cotangents, **options):
    """Routing of (x, weight, bias) and, from the cotangents of (logits, weights), the gradients.

    The cotangent of the logits keeps the truth away from zero, which no error is relative to.
    """
    leaves = [None if t is None else t.detach().requires_grad_() for t in inputs]
    out = route(*leaves[:2], bias=leaves[2], **options)
    leaves = [leaf for leaf in leaves if leaf is not None]
    constant = options.get("scoring") == "unit"
    assert out.weights.requires_grad != constant
    outputs = (out.logits,) if constant else (out.logits, out.weights)
    cotangents = cotangents[: len(outputs)]
    found = torch.autograd.grad(outputs, leaves, cotangents, allow_unused=constant)
    return out, tuple(
        torch.zeros_like(a) if g is None else g for a, g in zip(leaves, found, strict=True)
    )


def float64(tensors):
    return tuple(None if t is None else t.double() for t in tensors)


@by_name(ROUTABLE)
@SCORED
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_routes_as_the_reference(case, scored, dtype, device, kernels):
    skip_narrow(kernels, device, dtype)
    logits, bias, mask = inputs(case, device, dtype)
    K = case.top_k
    accumulator = torch.promote_types(dtype, torch.float32)
    given, options = (logits, None, bias), {"top_k": K, "mask": mask, **scored}
    best, same = [], []  # of several draws, since dbias is a few numbers
    for _ in range(6):
        cotangents = (
            torch.randn(logits.shape).to(device, dtype) / 8,
            torch.randn(len(logits), K).to(device, accumulator),
        )
        ref, found = grads(reference.topk_route, given, cotangents, **options)
        same.append(found)
        truth, found = grads(reference.topk_route, float64(given), float64(cotangents), **options)
        best.append(found)
    out, ours = grads(ops.topk_route, given, cotangents, **options)
    assert_same(out.indices, truth.indices, "indices")
    assert_accurate(out.weights, truth.weights, ref.weights, "weights")
    columns = zip(zip(*best, strict=True), zip(*same, strict=True), strict=True)
    for name, a, (b, c) in zip(("dlogits", "dbias"), ours, columns, strict=False):
        assert_accurate_draws([a], b, c, name)


@by_name(CASES)
@SCORED
def test_tokens_without_a_softmax_are_empty(case, scored, device, kernels):
    """The raw kernels, which a GPU runs unchecked: nothing but zeros for such tokens."""
    logits, bias, mask = inputs(case, device, torch.float32)
    mask = None if mask is None else mask.expand(logits.shape)
    raw = backend.kernels("routing", logits)
    norm, scoring = scored["norm_topk_prob"], scored["scoring"]
    weights, indices = raw.topk_route(logits, bias, mask, case.top_k, norm, scoring)
    expected = reference.topk_route(logits, top_k=case.top_k, bias=bias, mask=mask, **scored)
    assert_same(indices, expected.indices, "indices")
    torch.testing.assert_close(weights, expected.weights)
    if scoring == "unit":
        return
    dweights = torch.randn_like(weights)
    dlogits = raw.topk_route_backward(dweights, logits, bias, mask, indices, norm, scoring)
    assert dlogits.isfinite().all()
    assert (dlogits[(indices == logits.shape[1]).all(1)] == 0).all()
    if mask is not None:
        assert (dlogits[~mask] == 0).all()


@pytest.mark.parametrize("experts", (1, 7, 64, 65))
@pytest.mark.parametrize("tokens", (0, 1, 35))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_from_the_router_weight(experts, tokens, dtype, device, kernels):
    """E = 65 is past the fused matmul. Small integers keep the logits exact, and full of ties."""
    skip_narrow(kernels, device, dtype)
    x = torch.randint(-3, 4, (tokens, 37)).to(device, dtype)
    weight = torch.randint(-1, 2, (experts, 37)).to(device, dtype) / 8
    bias = (torch.randint(-2, 3, (experts - 1,)) / 4).to(device, dtype)
    K = min(experts, 5)
    accumulator = torch.promote_types(dtype, torch.float32)
    cotangents = (
        torch.randn(tokens, experts).to(device, dtype),
        torch.randn(tokens, K).to(device, accumulator),
    )
    given = (x, weight, bias)
    out, ours = grads(ops.topk_route, given, cotangents, top_k=K)
    ref, same = grads(reference.topk_route, given, cotangents, top_k=K)
    truth, best = grads(reference.topk_route, float64(given), float64(cotangents), top_k=K)
    assert_same(out.logits, ref.logits, "logits")
    assert_same(out.indices, truth.indices, "indices")
    assert_accurate(out.weights, truth.weights, ref.weights, "weights")
    for name, a, b, c in zip(("dx", "dweight", "dbias"), ours, best, same, strict=True):
        assert_accurate(a, b, c, name)


def test_logits_are_rounded_before_routing(device, kernels):
    """The same logits give the same ids, whether they were computed here or given."""
    x, weight = torch.randn(33, 50, device=device), torch.randn(7, 50, device=device)
    out = ops.topk_route(x, weight, top_k=5)
    again = ops.topk_route(out.logits, top_k=5)
    assert_accurate(out.logits, x.double() @ weight.double().T, x @ weight.T, "logits")
    assert_same(out.indices, again.indices, "indices")
    torch.testing.assert_close(out.weights, again.weights)


def test_bias_gradient_at_zero_is_one_half(device, kernels):
    bias = torch.tensor([-1.0, 0.0, 1.0], device=device, requires_grad=True)
    logits = torch.tensor([[0.3, 0.1, -0.2, 0.4]], device=device, requires_grad=True)
    ops.topk_route(logits, top_k=4, bias=bias).weights[0, 0].backward()
    slope = torch.tensor([1.0, 0.5, 0.0], device=device)
    torch.testing.assert_close(bias.grad, logits.grad[0, 1:] * slope)
    assert logits.grad.abs().min() > 0


def test_strided_inputs(device, kernels):
    """Transposed logits, a strided bias, a mask of one row and one of every second column."""
    logits = torch.randn(7, 12, device=device).T
    bias = torch.randn(6, 3, device=device)[:, 1]
    for mask in (choice(12, 7)[:1].expand(12, 7), choice(12, 14)[:, 1::2]):
        mask = mask.to(device) | (torch.arange(7, device=device) == 1)
        mask = torch.stack((mask, mask), -1).flatten(1)[:, ::2]
        got = ops.topk_route(logits, top_k=3, bias=bias, mask=mask)
        want = ops.topk_route(
            logits.contiguous(), top_k=3, bias=bias.contiguous(), mask=mask.contiguous()
        )
        assert_same(got.indices, want.indices)
        assert_same(got.weights, want.weights)
        assert_same(
            got.indices, reference.topk_route(logits, top_k=3, bias=bias, mask=mask).indices
        )


@given(data=st.data())
def test_routes_for_any_shape_and_mask(data, device, kernels):
    T, E = data.draw(st.integers(0, 9)), data.draw(st.integers(1, 20))
    K, seed = data.draw(st.integers(1, E)), data.draw(st.integers(0, 99))
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(T, E, generator=generator) < data.draw(st.sampled_from((0.2, 0.7, 1.0)))
    mask[:, seed % E] = True
    logits, mask = grid(T, E, seed).to(device, torch.float32), mask.to(device)
    bias = grid(1, E, seed + 1)[0, 1:].to(device, torch.float32)
    scoring = data.draw(st.sampled_from(SCORINGS))
    options = {"top_k": K, "bias": bias, "mask": mask, "norm_topk_prob": bool(seed % 2),
               "scoring": scoring}  # fmt: skip
    out, ref = ops.topk_route(logits, **options), reference.topk_route(logits, **options)
    assert_same(out.indices, ref.indices)
    torch.testing.assert_close(out.weights, ref.weights)
    assert torch.equal(out.indices == E, torch.arange(K, device=device) >= mask.sum(1)[:, None])


@SCORED
def test_gradcheck(scored, device, kernels):
    """Through the kernels in float64; the ids are constant near these logits."""
    x = torch.randn(3, 4, dtype=torch.float64, device=device, requires_grad=True)
    weight = torch.randn(5, 4, dtype=torch.float64, device=device, requires_grad=True)
    bias = torch.tensor([-0.5, 0.7, -1.1, 0.2], device=device).double().requires_grad_()
    mask = choice(3, 5).to(device)

    def linear(x, weight, bias):
        out = ops.topk_route(x, weight, top_k=3, bias=bias, mask=mask, **scored)
        return out.logits, out.weights

    def given_logits(logits, bias):
        return ops.topk_route(logits, top_k=3, bias=bias, **scored).weights

    assert torch.autograd.gradcheck(linear, (x, weight, bias), fast_mode=True)
    logits = (x @ weight.T).detach().requires_grad_()
    assert torch.autograd.gradcheck(given_logits, (logits, bias), fast_mode=True)


def test_same_bits_every_time(device, kernels):
    given = (torch.randn(40, 33, device=device), torch.randn(7, 33, device=device), None)
    cotangents = (torch.randn(40, 7, device=device), torch.randn(40, 5, device=device))
    (a, da), (b, db) = (grads(ops.topk_route, given, cotangents, top_k=5) for _ in range(2))
    for first, again in zip((*a, *da), (*b, *db), strict=True):
        assert_same(first, again)
