"""Grouped GEMM against the reference: output and both gradients by the accuracy rule.

Traps covered: weights in one tensor or in many, several tiles, sizes no vector divides, experts
without rows or without a weight, tails (memory is poisoned: an unwritten number would show as NaN).
"""

from __future__ import annotations

import pytest
import torch
from common import skip_interpreted, some_plan, to_device
from hypothesis import given
from hypothesis import strategies as st

import reference
from flexmore_kernels import backend, ops
from flexmore_kernels.testing import (
    CASE_IDS,
    CASES,
    Case,
    assert_accurate,
    assert_same,
    make_routing,
    make_weight,
    make_x,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TILES = (
    Case("row_tiles", "rows past a tile of 64 and of 128; the last tile has one row",
         129, 40, 24, (0, 1), 1, "one"),
    Case("wide", "several tiles in each direction, all multiples of 8", 70, 72, 136, (0, 1), 2),
    Case("wide_and_odd", "the same with sizes that no vector divides", 70, 67, 131, (0, 1), 2),
)  # fmt: skip


def grads(function, x, weights, cotangent, plan, stacked=False):
    """out, dx and the E dweights."""
    x = x.detach().requires_grad_()
    leaves = [w.detach().requires_grad_() for w in weights]
    out = function(x, torch.stack(leaves) if stacked else leaves, plan)
    found = torch.autograd.grad(out, [x, *leaves], cotangent)
    return out.detach(), *found


@pytest.mark.parametrize("case", (*CASES, *TILES), ids=[*CASE_IDS, *(c.name for c in TILES)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("stacked", (False, True), ids=("separate", "stacked"))
def test_named_cases(case, dtype, stacked, device, kernels):
    skip_interpreted(kernels, device, dtype)
    plan = ops.make_plan(make_routing(case, device)[0], case.num_experts)
    width_in, width_out = case.hidden, case.intermediate
    x = make_x(plan.num_rows, width_in, device, dtype)
    dy = make_x(plan.num_rows, width_out, device, dtype)
    weights = [make_weight(width_out, width_in, device, dtype) for _ in case.ranks]
    ours = grads(ops.grouped_gemm, x, weights, dy, plan, stacked)
    same = grads(reference.grouped_gemm, x, weights, dy, plan)
    wide = [w.double() for w in weights]
    truth = grads(reference.grouped_gemm, x.double(), wide, dy.double(), plan)
    names = ("out", "dx", *(f"dweight of {e}" for e in range(case.num_experts)))
    for name, o, t, s in zip(names, ours, truth, same, strict=True):
        assert_accurate(o, t, s, name)


def test_strided_inputs(device, kernels):
    plan = some_plan(device)
    x, dy = torch.randn(20, 18, device=device).T, torch.randn(18, 48, device=device)[:, ::2]
    weight = torch.randn(20, 24, 4, device=device).permute(2, 1, 0)
    ours = grads(ops.grouped_gemm, x, weight.unbind(0), dy, plan)
    plain = [w.contiguous() for w in weight]
    want = grads(ops.grouped_gemm, x.contiguous(), plain, dy.contiguous(), plan)
    for a, b in zip(ours, want, strict=True):
        assert_same(a, b)


@pytest.mark.parametrize("transpose", (False, True))
def test_experts_without_a_weight_are_left_alone(transpose, device, kernels):
    """The raw kernel writes the rows of the given weights and no others, the tail included."""
    plan = some_plan(device, 12, 6, 3)
    stack = torch.randn(4, 24, 20, device=device)
    weight = [None, stack[0], stack[2], None, stack[1].clone(), None]
    x = torch.randn(36, 24 if transpose else 20, device=device)
    out = torch.full((36, 20 if transpose else 24), 7.0, device=device)
    want, offsets = out.clone(), plan.row_offsets.tolist()
    backend.kernels("grouped_gemm", x).grouped_gemm(x, weight, plan.row_offsets, transpose, out)
    for e, matrix in enumerate(weight):
        if matrix is not None:
            rows = slice(offsets[e], offsets[e + 1])
            want[rows] = x[rows] @ (matrix if transpose else matrix.T)
    torch.testing.assert_close(out, want)
    assert (out[offsets[-1] :] == 7).all()


@pytest.mark.parametrize("order", ((0, 1, 3, 4), (0, 2, 4, 1), (3, 2, 1, 0)), ids=str)
def test_weights_anywhere_in_one_storage(order, device, kernels):
    """Experts at equal distances are read as a stack, also a descending one; others must not be."""
    plan, x = some_plan(device), torch.randn(18, 20, device=device)
    stack = torch.randn(5, 24, 20, device=device)
    apart = ops.grouped_gemm(x, [stack[place].clone() for place in order], plan)
    assert_same(ops.grouped_gemm(x, [stack[place] for place in order], plan), apart)


def test_only_wanted_gradients(device, kernels):
    """A frozen weight costs no launch: its gradient is never formed."""
    plan = some_plan(device)
    x, dy = torch.randn(18, 8, device=device), torch.randn(18, 12, device=device)
    weights = [torch.randn(12, 8, device=device).requires_grad_(e == 2) for e in range(4)]
    out = ops.grouped_gemm(x, weights, plan)
    out.backward(dy)
    assert [w.grad is None for w in weights] == [True, True, False, True]
    leaves = [w.detach() for w in weights]
    assert_same(weights[2].grad, grads(ops.grouped_gemm, x, leaves, dy, plan)[4])


@given(data=st.data())
def test_any_shape_in_exact_numbers(data, device, kernels):
    T, E, width_in, width_out = (data.draw(st.integers(low, 9)) for low in (0, 1, 1, 1))
    K = data.draw(st.integers(1, E))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plan = some_plan(device, T, E, K)
    x = torch.randint(-4, 5, (T * K, width_in)).to(device, torch.float32)
    dy = torch.randint(-4, 5, (T * K, width_out)).to(device, torch.float32)
    weight = torch.randint(-4, 5, (E, width_out, width_in)).to(device, torch.float32)
    ours = grads(ops.grouped_gemm, x, weight.unbind(0), dy, plan)
    want = grads(reference.grouped_gemm, x, weight.unbind(0), dy, plan)
    for a, b in zip(ours, want, strict=True):
        assert torch.equal(a, b)


def test_gradcheck(device, kernels):
    plan = some_plan(device, 5)
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    x, weights = torch.randn(15, 3, **options), [torch.randn(4, 3, **options) for _ in range(4)]
    check = lambda x, *weights: ops.grouped_gemm(x, weights, plan)
    assert torch.autograd.gradcheck(check, (x, *weights), fast_mode=True)


def test_same_bits_every_time(device, kernels):
    plan = some_plan(device, 90)
    x, dy = torch.randn(270, 70, device=device), torch.randn(270, 50, device=device)
    weights = torch.randn(4, 50, 70, device=device).unbind(0)
    first, again = (grads(ops.grouped_gemm, x, weights, dy, plan) for _ in range(2))
    for a, b in zip(first, again, strict=True):
        assert_same(a, b)


def test_opcheck(device, kernels):
    plan, flexmore = some_plan(device), torch.ops.flexmore
    x = torch.randn(18, 4, device=device, requires_grad=True)
    weights = [torch.randn(5, 4, device=device, requires_grad=True) for _ in range(4)]
    torch.library.opcheck(flexmore.grouped_gemm.default, (x, weights, plan.row_offsets))
    frozen, dy = [w.detach() for w in weights], torch.randn(18, 5, device=device)
    needs = [True, True, False, True, False]
    torch.library.opcheck(
        flexmore.grouped_gemm_backward.default,
        (dy, x.detach(), frozen, plan.row_offsets, needs),
    )


def test_compiles_without_a_break(device, kernels):
    def there(x, weight, indices):
        plan = ops.make_plan(indices, 4)
        return ops.grouped_gemm(ops.permute(x, plan), weight, plan)

    compiled = torch.compile(there, fullgraph=True, backend="aot_eager")
    weight = torch.randn(4, 5, 7, device=device, requires_grad=True)
    for tokens in (3, 4, 9):
        indices = torch.rand(tokens, 4).argsort(1)[:, :2].to(device)
        x = torch.randn(tokens, 7, device=device, requires_grad=True)
        results = []
        for function in (there, compiled):
            out = function(x, weight, indices)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, weight))))
        for a, b in zip(*results, strict=True):
            assert_same(a, b)


def test_captured_in_a_cuda_graph(device, kernels):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    plan = some_plan(device)
    x, weight = torch.randn(18, 64, device=device), torch.randn(4, 32, 64, device=device)
    ops.grouped_gemm(x, weight, plan)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.grouped_gemm(x, weight, plan)
    x.copy_(torch.randn(18, 64))
    graph.replay()
    assert_same(captured, ops.grouped_gemm(x, weight, plan))


X, W = torch.zeros(18, 4), torch.zeros(4, 5, 4)
BAD_INPUT = {
    "x_not_a_tensor": (TypeError, "x", [1.0], W),
    "x_of_ints": (TypeError, "x", X.long(), W),
    "x_of_tokens": (ValueError, "x", X[:6], W),
    "x_of_one_dimension": (ValueError, "x", X[:, 0], W),
    "weight_of_too_few_experts": (ValueError, "weight", X, W[1:]),
    "weight_too_wide": (ValueError, "weight", X, torch.zeros(4, 5, 3)),
    "weight_of_another_dtype": (TypeError, "weight", X, W.double()),
    "weight_elsewhere": (ValueError, "weight", X, W.to("meta")),
    "weights_too_few": (ValueError, "weight", X, list(W[1:])),
    "weights_of_two_shapes": (ValueError, r"weight\[2\]", X, [W[0], W[1], W[2, 1:], W[3]]),
    "weights_not_tensors": (TypeError, r"weight\[1\]", X, [W[0], None, W[2], W[3]]),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_names_the_argument(bad, device):
    error, message, x, weight = bad

    with pytest.raises(error, match=message):
        ops.grouped_gemm(to_device(x, device), to_device(weight, device), some_plan(device))
