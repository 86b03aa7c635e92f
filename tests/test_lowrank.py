"""Shrink and expand against the reference: outputs and gradients by the accuracy rule.

Traps covered: ranks of no round size beside each other, rank 0, several tiles in rows and in ranks,
sums that are split, factors strided either way, z past its used length, tails (memory is poisoned:
an unwritten number would show as NaN).
"""

from __future__ import annotations

import pytest
import torch
from common import skip_interpreted, some_plan, to_device
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from flexmore_kernels import backend, ops
from flexmore_kernels.ragged import RoutingPlan, packed_size
from flexmore_kernels.testing import (
    CASE_IDS,
    CASES,
    Case,
    assert_accurate,
    assert_same,
    make_routing,
    make_weight,
    make_x,
    projection_ranks,
)

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
TILES = (
    Case("row_tiles", "rows past a tile of 64 and of 128; the last tile has one row",
         129, 40, 24, (0, 16), 1, "one"),
    Case("rank_tiles", "ranks past a tile of 64 and of 128, aligned to 16",
         9, 40, 72, (0, 144, 16, 80), 2),
    Case("unaligned_rank_tiles", "the same with ranks that no vector divides",
         9, 41, 73, (0, 130, 1, 65), 2),
    Case("split_width", "few rows and a long sum: it is split and added in order",
         3, 520, 70, (0, 3, 8), 2),
    Case("split_rows", "few factors and many rows: their gradient's sum is split",
         600, 8, 8, (0, 2), 1),
    Case("only_rank_0", "no factor at all: z is empty, expand writes zeros",
         4, 24, 32, ((0, 0, 0), (0, 0, 0)), 2),
)  # fmt: skip


def ranks_of(case: Case) -> tuple[int, ...]:
    """The case's gate ranks; an expert of full size has none."""
    return tuple(0 if entry == "full" else entry for entry in projection_ranks(case.ranks)[0])


def used_length(plan: RoutingPlan, ranks: tuple[int, ...]) -> int:
    return sum(n * r for n, r in zip(plan.rows.sizes, ranks, strict=True))


def grads(function, inputs, cotangent, *rest):
    leaves = [t.detach().requires_grad_() for t in inputs]
    out = function(*leaves, *rest)
    return out.detach(), *torch.autograd.grad(out, leaves, cotangent)


def check_both(plan, ranks, x, a, b, dtype):
    """Shrink, expand and their four gradients, by the rule."""
    size = packed_size(ranks, plan.num_tokens, plan.top_k)
    z = make_weight(1, size, x.device, dtype).flatten()
    y = make_x(plan.num_rows, b.shape[0], x.device, dtype)
    for name, inputs, cotangent in (("shrink", (x, a), z), ("expand", (z, b), y)):
        ours = grads(getattr(ops, name), inputs, cotangent, plan, ranks)
        twin = getattr(reference, name)
        same = grads(twin, inputs, cotangent, plan, ranks)
        inputs64 = tuple(t.double() for t in inputs)
        truth = grads(twin, inputs64, cotangent.double(), plan, ranks)
        for part, o, t, s in zip(("out", "first", "factor"), ours, truth, same, strict=True):
            assert_accurate(o, t, s, f"{name} {part}")


@pytest.mark.parametrize("case", (*CASES, *TILES), ids=[*CASE_IDS, *(c.name for c in TILES)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_named_cases(case, dtype, device, kernels):
    skip_interpreted(kernels, device, dtype)
    ranks = ranks_of(case)
    plan = ops.make_plan(make_routing(case, device)[0], case.num_experts)
    x = make_x(plan.num_rows, case.hidden, device, dtype)
    a = make_weight(sum(ranks), case.hidden, device, dtype)
    b = make_weight(case.intermediate, sum(ranks), device, dtype)
    check_both(plan, ranks, x, a, b, dtype)


@pytest.mark.parametrize("layout", ("rows", "columns", "every_second"))
@pytest.mark.parametrize("ranks", ((0, 3, 17, 1), (16, 0, 32, 16)), ids=str)
def test_strided_inputs(layout, ranks, device, kernels):
    """Factors of any strides are read in place; x, z and cotangents may be strided too."""

    def strided(*shape: int) -> Tensor:
        if layout == "columns":
            return torch.randn(shape[::-1], device=device).T
        if layout == "every_second":
            return torch.randn(*shape[:-1], 2 * shape[-1], device=device)[..., ::2]
        return torch.randn(shape, device=device)

    plan, R = some_plan(device), sum(ranks)
    check_both(plan, ranks, strided(18, 24), strided(R, 24), strided(40, R), torch.float32)
    z = torch.randn(2 * packed_size(ranks, 6, 3), device=device)[::2]
    b, dy = torch.randn(40, R, device=device), torch.randn(40, 18, device=device).T
    ours = grads(ops.expand, (z, b), dy, plan, ranks)
    want = grads(ops.expand, (z.contiguous(), b), dy.contiguous(), plan, ranks)
    for got, expected in zip(ours, want, strict=True):
        assert_same(got, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_weights_and_base(dtype, device, kernels):
    """What the larger ops use of the raw kernels: rows by token, the slot's weight, a base."""
    skip_interpreted(kernels, device, dtype)
    ranks, plan = (3, 0, 16, 5), some_plan(device, 40)
    raw, acc = backend.kernels("lowrank", plan.indices), torch.promote_types(dtype, torch.float32)
    size = packed_size(ranks, 40, 3)
    x, base = make_x(40, 20, device, dtype), make_x(40, 30, device, dtype)
    a, b = make_weight(24, 20, device, dtype), make_weight(30, 24, device, dtype)
    weights = torch.rand(40, 3, device=device, dtype=acc)
    where = (plan.row_offsets, ranks)
    slots = (plan.row_to_slot, plan.top_k)

    def twin_shrink(dtype):
        weight = weights.flatten()[plan.row_to_slot.long().clamp(min=0), None]
        rows = (reference.permute(x.to(dtype), plan) * weight).to(dtype)
        return reference.shrink(rows, a.to(dtype), plan, ranks)

    def twin_expand(dtype):
        delta = reference.expand(z.to(dtype), b.to(dtype), plan, ranks)
        return reference.permute(base.to(dtype), plan) + delta

    z = raw.shrink(x, a, *where, *slots, size, gather=True, weights=weights)
    assert_accurate(z, twin_shrink(torch.float64), twin_shrink(dtype), "z")
    args, row_base = (z, b, *where, plan.num_rows), reference.permute(base, plan)
    y, same = twin_expand(torch.float64), twin_expand(dtype)
    assert_accurate(raw.expand(*args, base, *slots, gather=True), y, same, "y of gathered base")
    assert_accurate(raw.expand(*args, row_base), y, same, "y of row base")
    da = raw.factor_grad(z, x, *where, *slots, gather=True)
    want = raw.factor_grad(z, reference.permute(x, plan), *where, *slots)
    assert_same(da, want, "da")


def test_what_no_row_owns_is_not_read(device, kernels):
    """NaN in tail rows and in z past its used length reaches nothing, and tails come out zero."""
    ranks, plan = (3, 0, 16, 5), some_plan(device, 12)
    rows, used = int(plan.row_offsets[-1]), used_length(plan, ranks)
    assert rows < plan.num_rows
    x, z = torch.randn(36, 20, device=device), torch.randn(packed_size(ranks, 12, 3), device=device)
    x[rows:], z[used:] = float("nan"), float("nan")
    a, b = torch.randn(24, 20, device=device), torch.randn(20, 24, device=device)
    out_z, dx, da = grads(ops.shrink, (x, a), z, plan, ranks)
    out_x, dz, db = grads(ops.expand, (z, b), x, plan, ranks)
    for result in (out_z, dx, da, out_x, dz, db):
        assert result.isfinite().all()
    for tail in (out_z[used:], dz[used:], out_x[rows:], dx[rows:]):
        assert (tail == 0).all()


@given(data=st.data())
def test_the_two_are_adjoint(data, device, kernels):
    """<shrink(x), z> = <x, expand(z)> with b = a^T, for any shape, in numbers that add exactly."""
    T, E, width = (data.draw(st.integers(low, 10)) for low in (0, 1, 1))
    K = data.draw(st.integers(1, E))
    ranks = tuple(data.draw(st.lists(st.integers(0, 20), min_size=E, max_size=E)))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    plan = some_plan(device, T, E, K)
    x = torch.randint(-4, 5, (T * K, width)).to(device, torch.float32)
    a = torch.randint(-4, 5, (sum(ranks), width)).to(device, torch.float32)
    z = torch.randint(-4, 5, (packed_size(ranks, T, K),)).to(device, torch.float32)
    left = (ops.shrink(x, a, plan, ranks) * z).sum()
    assert left == (x * ops.expand(z, a.T, plan, ranks)).sum()
    assert left == (torch.ops.flexmore.factor_grad(z, x, *plan[3:0:-2], ranks) * a).sum()


def test_gradcheck(device, kernels):
    ranks, plan = (2, 0, 3, 1), some_plan(device, 5)
    options = {"dtype": torch.float64, "device": device, "requires_grad": True}
    x, a = torch.randn(15, 4, **options), torch.randn(6, 4, **options)
    z, b = torch.randn(packed_size(ranks, 5, 3), **options), torch.randn(4, 6, **options)
    for function, inputs in ((ops.shrink, (x, a)), (ops.expand, (z, b))):
        check = lambda first, factor, f=function: f(first, factor, plan, ranks)
        assert torch.autograd.gradcheck(check, inputs, fast_mode=True)


def test_same_bits_every_time(device, kernels):
    ranks, plan = (0, 16, 3, 40), some_plan(device, 90)
    x, a = torch.randn(270, 130, device=device), torch.randn(59, 130, device=device)
    z = torch.randn(packed_size(ranks, 90, 3), device=device)
    for function, inputs, cotangent in ((ops.shrink, (x, a), z), (ops.expand, (z, a.T), x)):
        first, again = (grads(function, inputs, cotangent, plan, ranks) for _ in range(2))
        for one, other in zip(first, again, strict=True):
            assert_same(one, other)


def test_opcheck(device, kernels):
    ranks, plan, flexmore = (2, 0, 3, 1), some_plan(device), torch.ops.flexmore
    maps = (plan.row_offsets, plan.row_to_slot, ranks)
    x, a = (torch.randn(n, 4, device=device, requires_grad=True) for n in (18, 6))
    z = torch.randn(packed_size(ranks, 6, 3), device=device, requires_grad=True)
    b = torch.randn(5, 6, device=device, requires_grad=True)
    torch.library.opcheck(flexmore.shrink.default, (x, a, *maps, len(z)))
    torch.library.opcheck(flexmore.expand.default, (z, b, *maps))
    torch.library.opcheck(flexmore.factor_grad.default, (z.detach(), x.detach(), *maps))


def test_compiles_without_a_break(device, kernels):
    ranks = (2, 0, 3, 1)

    def there_and_back(x, a, b, indices):
        plan = ops.make_plan(indices, 4)
        z = ops.shrink(ops.permute(x, plan), a, plan, ranks)
        return ops.expand(z.sin(), b, plan, ranks)

    compiled = torch.compile(there_and_back, fullgraph=True, backend="aot_eager")
    a, b = (torch.randn(s, device=device, requires_grad=True) for s in ((6, 7), (5, 6)))
    for tokens in (3, 4, 9):
        indices = torch.rand(tokens, 4).argsort(1)[:, :2].to(device)
        x = torch.randn(tokens, 7, device=device, requires_grad=True)
        results = []
        for function in (there_and_back, compiled):
            out = function(x, a, b, indices)
            results.append((out, *torch.autograd.grad(out.square().sum(), (x, a, b))))
        for one, other in zip(*results, strict=True):
            assert_same(one, other)


def test_captured_in_a_cuda_graph(device, kernels):
    if device == "cpu":
        pytest.skip("a CPU has no graphs")
    ranks, plan = (3, 0, 16, 5), some_plan(device)
    x, a = torch.randn(18, 64, device=device), torch.randn(24, 64, device=device)

    def step():
        return ops.expand(ops.shrink(x, a, plan, ranks), a.T, plan, ranks)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    x.copy_(torch.randn(18, 64))
    graph.replay()
    assert_same(captured, step())


X, A, Z, B = torch.zeros(18, 4), torch.zeros(6, 4), torch.zeros(36), torch.zeros(5, 6)
RANKS = (2, 0, 3, 1)
BAD_INPUT = {
    "x_not_a_tensor": (TypeError, "x", ops.shrink, [1.0], A, RANKS),
    "x_of_ints": (TypeError, "x", ops.shrink, X.long(), A, RANKS),
    "x_of_tokens": (ValueError, "x", ops.shrink, X[:6], A, RANKS),
    "a_too_wide": (ValueError, "a", ops.shrink, X, torch.zeros(6, 5), RANKS),
    "a_of_too_few_ranks": (ValueError, "a", ops.shrink, X, A[1:], RANKS),
    "a_of_another_dtype": (TypeError, "a", ops.shrink, X, A.double(), RANKS),
    "a_elsewhere": (ValueError, "a", ops.shrink, X, A.to("meta"), RANKS),
    "ranks_negative": (ValueError, "ranks", ops.shrink, X, A, (2, -1, 4, 1)),
    "ranks_fractional": (TypeError, "ranks", ops.shrink, X, A, (2, 0.5, 3, 1)),
    "ranks_too_few": (ValueError, "ranks", ops.shrink, X, A, (2, 3, 1)),
    "z_of_another_length": (ValueError, "z", ops.expand, Z[1:], B, RANKS),
    "z_of_two_dimensions": (ValueError, "z", ops.expand, Z[None], B, RANKS),
    "b_of_one_dimension": (ValueError, "b", ops.expand, Z, B[0], RANKS),
    "b_of_too_many_ranks": (ValueError, "b", ops.expand, Z, torch.zeros(5, 7), RANKS),
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD_INPUT.values(), ids=BAD_INPUT)
def test_bad_input_names_the_argument(bad, device):
    error, message, function, first, factor, ranks = bad

    with pytest.raises(error, match=message):
        function(to_device(first, device), to_device(factor, device), some_plan(device), ranks)
