"""Permutation against the reference: bit for bit where sums are exact, else by the rule.

Traps covered: empty slots and tails (memory is poisoned: a skipped row would show as NaN), rows of
no round size, weights of 0 on rows that hold NaN, strided inputs, plans without rows.
"""

from __future__ import annotations

import pytest
import torch
from common import skip_narrow, some_ids, to_device
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from flexmore_kernels import backend, ops
from flexmore_kernels.ragged import RoutingPlan
from flexmore_kernels.testing import CASE_IDS, CASES, assert_accurate, assert_same, make_routing

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def exact(*shape: int, device: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Multiples of 1/4: their products and sums are exact in the accumulator, in any order."""
    return (torch.randint(-12, 13, shape) / 4).to(device, dtype)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def some_plan(device: str) -> RoutingPlan:
    """Six tokens, four experts, three slots of which some are empty."""
    ids = torch.tensor([[0, 1, 2], [3, 2, 4], [4, 4, 4], [2, 0, 4], [1, 3, 0], [2, 1, 4]])
    return ops.make_plan(ids.to(device), 4)


def grads(function, inputs, cotangent, plan):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(leaves[0], plan, *leaves[1:])
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_cases_are_exact(case, dtype, device, kernels):
    """Given numbers that add exactly, every result is the float64 one rounded once."""
    skip_narrow(kernels, device, dtype)
    plan = ops.make_plan(make_routing(case, device)[0], case.num_experts)
    T, K, D = case.tokens, case.top_k, case.hidden
    x = exact(T, D, device=device, dtype=dtype)
    y = exact(T * K, D, device=device, dtype=dtype)
    weights = exact(T, K, device=device, dtype=accumulator(dtype))
    for name, inputs, cotangent in (
        ("permute", (x,), y), ("unpermute", (y,), x), ("unpermute", (y, weights), x),
    ):  # fmt: skip
        ours = grads(getattr(ops, name), inputs, cotangent, plan)
        inputs64 = tuple(t.double() for t in inputs)
        truth = grads(getattr(reference, name), inputs64, cotangent.double(), plan)
        for a, b in zip(ours, truth, strict=True):
            assert_same(a + 0.0, b.to(a.dtype) + 0.0, name)  # -0.0 is 0.0 here


@pytest.mark.parametrize("width", (1, 8, 37, 300, 2053))
def test_widths_are_exact(width, device, kernels):
    """One number, one vector, odd, several tiles a row, a last tile of few."""
    plan = some_plan(device)
    x, y = exact(6, width, device=device), exact(18, width, device=device)
    weights = exact(6, 3, device=device)
    assert_same(ops.permute(x, plan), reference.permute(x, plan))
    ours = grads(ops.unpermute, (y, weights), x, plan)
    truth = grads(reference.unpermute, (y.double(), weights.double()), x.double(), plan)
    for a, b in zip(ours, truth, strict=True):
        assert_same(a + 0.0, b.to(a.dtype) + 0.0)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_sums_by_the_accuracy_rule(dtype, device, kernels):
    skip_narrow(kernels, device, dtype)
    plan = ops.make_plan(some_ids(60, 7, 4, empty=0.1).to(device), 7)
    x, y = torch.randn(60, 500).to(device, dtype), torch.randn(240, 500).to(device, dtype)
    weights = torch.rand(60, 4).to(device, accumulator(dtype))
    for inputs in ((y,), (y, weights)):
        ours = grads(ops.unpermute, inputs, x, plan)
        same = grads(reference.unpermute, inputs, x, plan)
        truth = grads(reference.unpermute, tuple(t.double() for t in inputs), x.double(), plan)
        for name, a, b, c in zip(("y", "dx", "dweights"), ours, truth, same, strict=False):
            assert_accurate(a, b, c, name)
    # The plain gradient of a gather may round after every addition, ours may not.
    dx = grads(ops.permute, (x,), y, plan)[1]
    assert_accurate(dx, grads(reference.permute, (x.double(),), y.double(), plan)[1], name="dx")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unpermute_onto_a_base(dtype, device, kernels):
    """The raw kernel adds to a base before the only rounding; the base may be wider than x."""
    skip_narrow(kernels, device, dtype)
    plan = some_plan(device)
    x = exact(18, 20, device=device, dtype=dtype)
    weights = exact(6, 3, device=device, dtype=accumulator(dtype))
    for base_dtype in {dtype, accumulator(dtype)}:
        base = exact(6, 20, device=device, dtype=base_dtype)
        out = backend.kernels("permutation", x).unpermute(x, plan.slot_to_row, weights, base)
        truth = base.double() + reference.unpermute(x.double(), plan, weights.double())
        assert_same(out + 0.0, truth.to(dtype) + 0.0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
def test_sums_are_kept_in_the_accumulator(dtype, device, kernels):
    """A row so large that x's dtype would lose the ones that are added before it is taken off."""
    skip_narrow(kernels, device, dtype)
    K, large = 8, 4 / torch.finfo(dtype).eps
    plan = ops.make_plan(torch.arange(K, device=device).expand(5, K).contiguous(), K)
    x = torch.ones(5 * K, 9, device=device, dtype=dtype)
    x[plan.slot_to_row[:, 0].long()] = large
    x[plan.slot_to_row[:, K - 1].long()] = -large
    assert_same(ops.unpermute(x, plan), torch.full_like(x[:5], K - 2))


def test_sums_are_in_the_order_of_slots(device, kernels):
    """2^30 - 2^30 + 1 is 1 in this order alone; the second token's slots are not in rows' order."""
    plan = ops.make_plan(torch.tensor([[0, 1, 2], [2, 1, 0]], device=device), 3)
    x = torch.zeros(6, 5, device=device)
    x[plan.slot_to_row.long()] = torch.tensor([2.0**30, -(2.0**30), 1.0], device=device)[:, None]
    for weights in (None, torch.ones(2, 3, device=device)):
        assert (ops.unpermute(x, plan, weights) == 1).all()


@pytest.mark.parametrize("offset", (1, 2, 4, 8))
@pytest.mark.parametrize("dtype", (torch.float32, torch.float16), ids=str)
def test_rows_that_start_anywhere(offset, dtype, device, kernels):
    """A slice of a larger tensor is contiguous, but need not start where wide accesses may."""

    def moved(tensor: Tensor) -> Tensor:
        room = tensor.new_empty(tensor.numel() + offset)
        return room[offset:].view(tensor.shape).copy_(tensor)

    plan = some_plan(device)
    x, y = exact(6, 64, device=device, dtype=dtype), exact(18, 64, device=device, dtype=dtype)
    weights = exact(6, 3, device=device)
    assert_same(ops.permute(moved(x), plan), ops.permute(x, plan))
    ours = grads(ops.unpermute, (moved(y), moved(weights)), moved(x), plan)
    for a, b in zip(ours, grads(ops.unpermute, (y, weights), x, plan), strict=True):
        assert_same(a, b)
    raw = backend.kernels("permutation", x)
    for base in (x, x.float()):
        given = (y, plan.slot_to_row, weights)
        assert_same(raw.unpermute(*given, moved(base)), raw.unpermute(*given, base))


@given(data=st.data())
def test_the_two_are_adjoint(data, device, kernels):
    """<permute(x), y> = <x, unpermute(y)> for any plan, in numbers that add exactly."""
    T, E, D = (data.draw(st.integers(low, 12)) for low in (0, 1, 1))
    K = data.draw(st.integers(1, E))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    ids = some_ids(T, E, K)
    plan = ops.make_plan(ids.to(device), E)
    x = torch.randint(-8, 9, (T, D)).to(device, torch.float32)
    y = torch.randint(-8, 9, (T * K, D)).to(device, torch.float32)
    assert (ops.permute(x, plan) * y).sum() == (x * ops.unpermute(y, plan)).sum()
    filled = (ids < E).sum(1, keepdim=True).to(device)
    assert torch.equal(ops.unpermute(ops.permute(x, plan), plan), x * filled)


def test_what_no_slot_points_at_is_not_read(device, kernels):
    """NaN in tail rows and weights of empty slots reach neither outputs nor gradients."""
    plan = some_plan(device)
    used = int(plan.row_offsets[-1])
    x, weights = torch.randn(18, 5, device=device), torch.rand(6, 3, device=device)
    x[used:] = float("nan")
    weights[plan.slot_to_row < 0] = float("nan")
    dy = torch.randn(6, 5, device=device)
    y, dx, dweights = grads(ops.unpermute, (x, weights), dy, plan)
    for result in (y, dx, dweights):
        assert result.isfinite().all()
    assert (dx[used:] == 0).all() and (dweights[plan.slot_to_row < 0] == 0).all()
    assert (y[2] == 0).all(), "a token without experts"
    assert (ops.permute(dy, plan)[used:] == 0).all()


def test_strided_inputs(device, kernels):
    plan = some_plan(device)
    x, y = torch.randn(9, 6, device=device).T, torch.randn(18, 26, device=device)[:, ::2]
    weights = torch.rand(3, 6, device=device).T
    assert_same(ops.permute(x, plan), ops.permute(x.contiguous(), plan))
    dy = torch.randn(13, 6, device=device).T
    ours = grads(ops.unpermute, (y, weights), dy, plan)
    want = grads(ops.unpermute, (y.contiguous(), weights.contiguous()), dy.contiguous(), plan)
    for a, b in zip(ours, want, strict=True):
        assert_same(a.contiguous(), b.contiguous())


def test_gradcheck(device, kernels):
    plan = some_plan(device)
    x = torch.randn(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    y = torch.randn(18, 3, dtype=torch.float64, device=device, requires_grad=True)
    weights = torch.rand(6, 3, dtype=torch.float64, device=device, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: ops.permute(x, plan), (x,), fast_mode=True)
    assert torch.autograd.gradcheck(lambda y: ops.unpermute(y, plan), (y,), fast_mode=True)
    assert torch.autograd.gradcheck(
        lambda y, weights: ops.unpermute(y, plan, weights), (y, weights), fast_mode=True
    )


def test_same_bits_every_time(device, kernels):
    plan = ops.make_plan(torch.rand(90, 7).argsort(1)[:, :5].to(device), 7)
    y, weights = torch.randn(450, 50, device=device), torch.rand(90, 5, device=device)
    dy = torch.randn(90, 50, device=device)
    first, again = (grads(ops.unpermute, (y, weights), dy, plan) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)


def test_opcheck(device, kernels):
    plan = some_plan(device)
    maps = (plan.row_to_slot, plan.slot_to_row)
    x = torch.randn(6, 3, device=device, requires_grad=True)
    y = torch.randn(18, 3, device=device, requires_grad=True)
    weights = torch.rand(6, 3, device=device, requires_grad=True)
    flexmore = torch.ops.flexmore
    torch.library.opcheck(flexmore.permute.default, (x, *maps))
    torch.library.opcheck(flexmore.unpermute.default, (y, *maps, weights))
    torch.library.opcheck(
        flexmore.unpermute_backward.default,
        (x.detach(), y.detach(), plan.row_to_slot, weights.detach()),
    )


def test_compiles_without_a_break(device, kernels):
    def there_and_back(x, weights, indices):
        plan = ops.make_plan(indices, 5)
        return ops.unpermute(ops.permute(x, plan).sin(), plan, weights)

    compiled = torch.compile(there_and_back, fullgraph=True, dynamic=True, backend="aot_eager")
    for tokens in (3, 4, 9):
        indices = torch.rand(tokens, 5).argsort(1)[:, :2].to(device)
        x = torch.randn(tokens, 6, device=device, requires_grad=True)
        weights = torch.rand(tokens, 2, device=device, requires_grad=True)
        results = []
        for function in (there_and_back, compiled):
            out = function(x, weights, indices)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, weights))))
        for a, b in zip(*results, strict=True):
            assert_same(a, b)


def test_captured_in_a_cuda_graph(device, kernels):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    plan = some_plan(device)
    x, weights = torch.randn(6, 64, device=device), torch.rand(6, 3, device=device)

    def step():
        return ops.unpermute(ops.permute(x, plan), plan, weights)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(6, 64))
    graph.replay()
    assert_same(captured, step())


BAD_INPUT = {
    "permute_not_a_tensor": (TypeError, "x", ops.permute, [[1.0]], None),
    "permute_of_ints": (TypeError, "x", ops.permute, torch.zeros(6, 2).long(), None),
    "permute_of_too_few_tokens": (ValueError, "x", ops.permute, torch.zeros(5, 2), None),
    "permute_of_one_dimension": (ValueError, "x", ops.permute, torch.zeros(6), None),
    "permute_elsewhere": (ValueError, "x", ops.permute, torch.zeros(6, 2, device="meta"), None),
    "unpermute_of_tokens": (ValueError, "x", ops.unpermute, torch.zeros(6, 2), None),
    "weights_misshapen": (ValueError, "weights", ops.unpermute, torch.zeros(18, 2),
                          torch.zeros(6, 2)),
    "weights_too_narrow": (TypeError, "weights", ops.unpermute, torch.zeros(18, 2).half(),
                           torch.zeros(6, 3).half()),
    "weights_elsewhere": (ValueError, "weights", ops.unpermute, torch.zeros(18, 2),
                          torch.zeros(6, 3, device="meta")),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_names_the_argument(bad, device):
    error, message, function, x, weights = bad
    plan = some_plan(device)

    options = {} if weights is None else {"weights": to_device(weights, device)}
    with pytest.raises(error, match=message):
        function(to_device(x, device), plan, **options)
