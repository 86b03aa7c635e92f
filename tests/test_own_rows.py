"""Experts with rows of their own beside token-major ones, and the raw products of their rows.

Traps covered: experts whose three projections differ, a base that nobody shares, empty experts and
slots, ranks that no vector divides, memory that nobody wrote beside each segment.
"""

from __future__ import annotations

import pytest
import torch
from common import skip_interpreted, some_plan

import reference
from flexmore_kernels import backend, ops, schedule, testing
from flexmore_kernels.ragged import SEGMENT, SORTED, TOKEN, RowProducts, Term
from flexmore_kernels.testing import Case, assert_accurate, assert_same

FULL = "full"
RANKS = {
    "mixed": (0, 1, 9, 40, 16, 72),
    "all full-size": (0, FULL, FULL, FULL),
    "triples": (0, (0, FULL, 4), (40, 0, FULL), (FULL, FULL, 35), (16, 8, 40), (0, 0, 0), FULL),
    "shares down alone": (0, (FULL, FULL, 40), (FULL, FULL, 0)),
    "shares gate and up alone": (0, (16, 40, FULL), (0, 0, FULL)),
}


@pytest.fixture
def small_limits(monkeypatch):
    """Ranks above 32 and 5 tokens are many, so that tests stay small."""
    monkeypatch.setattr(schedule, "FUSED_RANK", 32)
    monkeypatch.setattr(schedule, "OWN_TOKENS", 5)
    schedule._choose.cache_clear()
    yield
    schedule._choose.cache_clear()


def make(case: Case, device: str, dtype: torch.dtype):
    x = testing.make_x(case.tokens, case.hidden, device, dtype)
    indices, weights = testing.make_routing(case, device, dtype)
    return x, indices, weights, *testing.make_experts(case, device, dtype)


def case_of(ranks, routing: str, hidden: int = 40, intermediate: int = 56) -> Case:
    top_k = min(3, len(ranks))
    return Case("own", "rows of their own", 21, hidden, intermediate, ranks, top_k, routing)


@pytest.mark.parametrize("routing", ("random", "starved", "empty_slots"))
@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16), ids=str)
def test_forward(ranks, routing, dtype, device, kernels, small_limits):
    skip_interpreted(kernels, device, dtype)
    inputs = make(case_of(ranks, routing), device, dtype)
    if kernels == "triton":
        layouts = [[-1 if r == FULL else r for r in side]
                   for side in testing.projection_ranks((FULL, *ranks[1:]))]  # fmt: skip
        sizes = {"hidden": 40, "width": 56, "dtype": dtype}
        assert schedule.choose(layouts, 21, **sizes).own
    ours = ops.experts(*inputs)
    truth = reference.experts(*testing.to_float64(inputs))
    assert_accurate(ours, truth, reference.experts(*inputs))
    assert_same(ours, ops.experts(*inputs))


@pytest.mark.parametrize("ranks", (RANKS["triples"], RANKS["all full-size"]), ids=str)
def test_sizes_that_no_vector_divides(ranks, device, kernels, small_limits):
    inputs = make(case_of(ranks, "random", 37, 53), device, torch.float32)
    truth = reference.experts(*testing.to_float64(inputs))
    assert_accurate(ops.experts(*inputs), truth, reference.experts(*inputs))


@pytest.mark.parametrize("ranks", RANKS.values(), ids=RANKS)
def test_gradients_in_double(ranks, device, kernels, small_limits):
    inputs = testing.leaves(make(case_of(ranks, "empty_slots"), device, torch.float64))
    wanted = [t for t in testing.tensors(inputs) if t.requires_grad]
    dy = torch.randn_like(inputs[0])
    ours = torch.autograd.grad(ops.experts(*inputs), wanted, dy)
    truth = torch.autograd.grad(reference.experts(*inputs), wanted, dy, allow_unused=True)
    for index, (a, b) in enumerate(zip(ours, truth, strict=True)):
        assert_accurate(a, torch.zeros_like(a) if b is None else b, name=f"gradient {index}")


def test_what_else_is_trained_changes_no_gradient(device, kernels, small_limits):
    inputs = testing.leaves(make(case_of(RANKS["mixed"], "random"), device, torch.float32))
    x, _, weights, *sides = inputs
    dy = torch.randn_like(x)
    of_all = [t for t in testing.tensors(sides) if t.requires_grad]
    grads = torch.autograd.grad(ops.experts(*inputs), [x, weights, *of_all], dy)
    expected = dict(zip(map(id, [x, weights, *of_all]), grads, strict=True))
    for e in (1, 4, 5):
        own = testing.tensors([side[e] for side in sides])
        for tensor in of_all:
            tensor.requires_grad_(any(tensor is one for one in own))
        grads = torch.autograd.grad(ops.experts(*inputs), own, dy)
        for tensor, grad in zip(own, grads, strict=True):
            assert_same(grad, expected[id(tensor)])


def test_few_tokens_and_a_down_matrix_alone(device, kernels):
    inputs = testing.leaves(
        make(case_of((0, (0, 0, FULL), (0, 0, 4)), "random"), device, torch.float64)
    )
    wanted = [t for t in testing.tensors(inputs) if t.requires_grad]
    ours, truth = ops.experts(*inputs), reference.experts(*inputs)
    assert_accurate(ours, truth)
    dy = torch.randn_like(truth)
    for a, b in zip(*(torch.autograd.grad(y, wanted, dy) for y in (ours, truth)), strict=True):
        assert_accurate(a, b)


def products(x: torch.Tensor):
    """The raw kernels that the forward would take."""
    module = backend.hopper("grouped_gemm", x) or backend.kernels("grouped_gemm", x)
    if not hasattr(module, "sum_rows"):
        pytest.skip("without Triton the forward is a loop over the experts")
    return module


def segments(plan):
    """(expert, its sorted rows, their tokens and slots), those of no rows included."""
    offsets = plan.row_offsets.tolist()
    for e in range(plan.num_experts):
        rows = slice(offsets[e], offsets[e + 1])
        slots = plan.row_to_slot[rows].long()
        yield e, rows, slots // plan.top_k, slots


RAW = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@pytest.mark.parametrize("place", (SORTED, SEGMENT, TOKEN))
@pytest.mark.parametrize("dtype", RAW, ids=str)
def test_sum_rows(place, dtype, device, kernels):
    skip_interpreted(kernels, device, dtype)
    kernel = products(torch.empty(1, device=device, dtype=dtype)).sum_rows
    plan, width, depth = some_plan(device, 150, 4, 2), 264, (72, 24)
    N, T = plan.num_rows, plan.num_tokens
    acc = torch.promote_types(dtype, torch.float32)
    weights = torch.rand(T, plan.top_k, device=device, dtype=acc)
    left = [testing.make_x(N, depth[0], device, dtype), testing.make_x(T, depth[1], device, dtype)]
    work, want, same = [], [], []
    for e, rows, tokens, slots in segments(plan):
        right = [testing.make_weight(width, d, device, dtype) for d in depth]
        out = torch.full((T if place else N, width + 8), 7.0, device=device, dtype=dtype)
        terms = (Term(left[0], right[0]), Term(left[1], right[1], place=SEGMENT))
        work.append(RowProducts(e, out[:, :width], *(terms if e else terms[:1])))
        count = rows.stop - rows.start
        at = {SORTED: rows, SEGMENT: slice(count), TOKEN: tokens}[place]
        for into, t in ((want, torch.float64), (same, dtype)):
            value = left[0][rows].to(t) @ right[0].to(t).T
            if e:
                value = value + left[1][:count].to(t) @ right[1].to(t).T
            full = out.to(t)
            full[at, :width] = value * weights.view(-1)[slots, None].to(t)
            into.append(full)
    kernel(work, plan, weights, place)
    for item, truth, plain in zip(work, want, same, strict=True):
        whole = item.out.as_strided(truth.shape, (width + 8, 1))
        assert_accurate(whole, truth, plain, f"expert {item.expert}")
        assert ((whole == 7) == (truth == 7)).all()  # nothing else was written


def transposed(t: torch.Tensor) -> torch.Tensor:
    """The same matrix, lying transposed, beside other numbers."""
    return torch.cat((t.T, torch.full_like(t.T[:, :8], 7)), 1)[:, : t.shape[0]].T


@pytest.mark.parametrize("tokens, width", ((150, 264), (1400, 1640)), ids=("few", "many"))
@pytest.mark.parametrize("dtype", RAW, ids=str)
def test_sums_of_the_backward(tokens, width, dtype, device, kernels):
    """Right operands that lie transposed and bases, with each other and without; the last item is
    of all tokens' rows."""
    skip_interpreted(kernels, device, dtype)
    if tokens > 1000 and device == "cpu":
        pytest.skip("several tiles a block: for a GPU")
    plan, depth = some_plan(device, tokens, 5, 2), (328, 40)
    kernel = products(torch.empty(1, device=device, dtype=dtype)).sum_rows
    N, T = plan.num_rows, plan.num_tokens
    left = [testing.make_x(N, depth[0], device, dtype), testing.make_x(T, depth[1], device, dtype)]
    bases = [testing.make_x(T, width, device, dtype) for _ in range(2)]
    every = torch.arange(T, device=device)
    work, want, same = [], [], []
    for e, rows, tokens_of, _ in (*segments(plan), (-1, slice(0, T), every, None)):
        # Of a smaller depth than left's, and fewer columns than out's: the others are zero.
        sizes = (
            (width, depth[0]),
            (width - (16 if e == 3 else 0), depth[1] - (3 if e == 3 else 0)),
        )
        right = [testing.make_weight(*size, device, dtype) for size in sizes]
        lies = [transposed(w) if e != 1 or i else w for i, w in enumerate(right)]
        base = [bases[i] if (e % 5 + 1) >> i & 1 else None for i in range(2)]
        terms = (Term(left[0], lies[0], base[0]), Term(left[1], lies[1], base[1], SEGMENT))
        out = torch.full((N, width + 8), 7.0, device=device, dtype=dtype)[: T if e < 0 else N]
        work.append(RowProducts(e, out[:, :width], *(terms if e else terms[:1])))
        for into, t in ((want, torch.float64), (same, dtype)):
            value = left[0][rows].to(t) @ right[0].to(t).T
            for i, term in enumerate(terms if e else terms[:1]):
                if i:
                    w = right[1].to(t)
                    value[:, : len(w)] += left[1][: len(value), : w.shape[1]].to(t) @ w.T
                if term.base is not None:
                    value = value + term.base[tokens_of].to(t)
            full = out.to(t)
            full[rows, :width] = value
            into.append(full)
    kernel(work, plan)
    for item, truth, plain in zip(work, want, same, strict=True):
        whole = item.out.as_strided(truth.shape, (width + 8, 1))
        assert_accurate(whole, truth, plain, f"expert {item.expert}")
        assert ((whole == 7).all(1) == (truth == 7).all(1)).all() and (whole[:, width:] == 7).all()


@pytest.mark.parametrize("keeps", (False, True), ids=("", "kept"))
@pytest.mark.parametrize("dtype", RAW, ids=str)
def test_gated_rows(dtype, keeps, device, kernels):
    skip_interpreted(kernels, device, dtype)
    kernel = products(torch.empty(1, device=device, dtype=dtype)).gated_rows
    plan, F, D, rank = some_plan(device, 150, 5, 2), 264, 72, 24
    N, T = plan.num_rows, plan.num_tokens
    x, z = testing.make_x(N, D, device, dtype), testing.make_x(T, rank, device, dtype)
    bases = [testing.make_x(T, F, device, dtype) for _ in range(2)]
    h = torch.full((N, F), 7.0, device=device, dtype=dtype)
    kept = (torch.full_like(h, 7), torch.full_like(h, 7)) if keeps else None
    truth, plain, work = [h.double().clone() for _ in range(3)], [h.clone() for _ in range(3)], []
    for e, rows, tokens, _ in segments(plan):
        terms, sides = [], {torch.float64: [], dtype: []}
        for side, base in enumerate(bases):
            kind = ("full", "none", "low")[(e + side) % 3]  # each beside each
            w = testing.make_weight(F, D if kind == "full" else rank, device, dtype)
            left, place = (x, SORTED) if kind == "full" else (z, SEGMENT)
            if kind == "full":
                terms.append(Term(left, w))
            else:
                terms.append(Term(base=base) if kind == "none" else Term(left, w, base, place))
            own = left[rows] if kind == "full" else left[: rows.stop - rows.start]
            for t, values in sides.items():
                value = own.to(t) @ w.to(t).T
                shared = base[tokens].to(t)
                values.append({"full": value, "none": shared, "low": shared + value}[kind])
        if e == 3:
            continue  # its rows stay as they are
        for into, t in ((truth, torch.float64), (plain, dtype)):
            gated = torch.nn.functional.silu(sides[t][0]) * sides[t][1]
            for values, value in zip(into, (gated, *sides[t]), strict=True):
                values[rows] = value
        work.append(RowProducts(e, h, *terms))
    kernel(work, plan, kept)
    for ours, want, same in zip((h, *(kept or ())), truth, plain, strict=False):
        assert_accurate(ours, want, same)
        # By rows: a single number may be 7 by chance.
        assert ((ours == 7).all(1) == (want == 7).all(1)).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_captured_in_a_cuda_graph(small_limits):
    case = case_of(RANKS["triples"], "random", 64, 72)
    x, ids, weights, *sides = make(case, "cuda", torch.bfloat16)
    ops.experts(x, ids, weights, *sides)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.experts(x, ids, weights, *sides)
    ids.copy_(ids.flip(0))
    x.copy_(x.roll(1, 0))
    graph.replay()
    assert_same(y, ops.experts(x, ids, weights, *sides))
