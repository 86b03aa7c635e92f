"""The experts op against the reference, in every named case.

Traps covered: the base's sum against each expert's own (the identity), every mix of full-size,
low-rank and no delta, needs that differ tensor by tensor, stacked factors, sorted rows with a tail,
int32 ids, non-contiguous inputs, weights that are zero, values that poison what is not routed.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import reference
from flexmore_kernels import StackedFactors, ops, testing, validation
from flexmore_kernels.kept import keeps
from flexmore_kernels.projection import unflatten
from flexmore_kernels.testing import CASE_IDS, CASES, Case

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SMALL = Case("small", "gradcheck", 4, 5, 6, (0, 2, (1, "full", 0), ("full", 0, "full")), 2)
LOW_RANK = Case("low_rank", "all that a backward can keep", 5, 5, 6, (0, 2, 17, (1, 0, 3)), 2)
FULL_DOWN = Case("full_down", "full-size in down alone: its hidden rows are read like a delta's",
                 9, 8, 12, (0, 2, (1, 0, "full"), 3), 2)  # fmt: skip


def make(case: Case, device: str, dtype: torch.dtype):
    x = testing.make_x(case.tokens, case.hidden, device, dtype)
    indices, weights = testing.make_routing(case, device, dtype)
    return x, indices, weights, *testing.make_experts(case, device, dtype)


def run(function, inputs, dy):
    """Output and gradients of x, weights and every weight tensor."""
    inputs = testing.leaves(inputs)
    wanted = [t for t in testing.tensors(inputs) if t.requires_grad]
    y = function(*inputs)
    grads = torch.autograd.grad(y, wanted, dy, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, grads, strict=True)]
    return [y.detach(), *grads]


def by_role(inputs, results):
    """Output and gradients, those of all experts' same factor or full weight of a side as one.

    An expert of rank 1 with a row or two has a handful of independent errors: by itself the
    reference's may be small by luck. The packed gradient is also what the kernels compute.
    """
    roles = {"y": [results[0]], "dx": [results[1]], "dweights": [results[2]]}
    grads = iter(results[3:])
    for name, side in zip(("gate", "up", "down"), inputs[3:], strict=True):
        for entry in (entry for entry in side if entry is not None):
            for part in ("a", "b") if isinstance(entry, tuple) else ("full",):
                roles.setdefault(f"{name} {part}", []).append(next(grads))
    return {role: torch.cat([t.flatten() for t in parts]) for role, parts in roles.items()}


def check(draw, ours=ops.experts, ref=reference.experts, roles=by_role):
    """The accuracy rule for the output and every gradient."""
    results = {"ours": [], "truth": [], "same": []}
    inputs = draw()
    draws = 1 if inputs[0].dtype == torch.float64 else 24  # float64 has a fixed allowance
    for index in range(draws):
        inputs = draw() if index else inputs
        dy = torch.randn_like(inputs[0])
        if index >= draws - 2:
            results["ours"].append(roles(inputs, run(ours, inputs, dy)))
        wide = testing.to_float64(inputs)
        results["truth"].append(roles(inputs, run(ref, wide, dy.double())))
        results["same"].append(roles(inputs, run(ref, inputs, dy)))
    for role in results["ours"][0]:
        columns = [[result[role] for result in column] for column in results.values()]
        testing.assert_accurate_draws(*columns, name=role)


def in_order(inputs, results):
    return dict(enumerate(results))


def supported(kernels: str, device: str, dtype: torch.dtype) -> bool:
    """The interpreter's bf16 and fp16 arithmetic is not the GPU's."""
    return not (kernels == "triton" and device == "cpu" and dtype.itemsize == 2)


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_experts_forward_and_backward(case, dtype, device, kernels):
    if not supported(kernels, device, dtype):
        pytest.skip("the interpreter computes float32 and float64 only")
    check(lambda: make(case, device, dtype))


@pytest.mark.parametrize("case", [CASES[0], CASES[8], SMALL, FULL_DOWN], ids=lambda c: c.name)
def test_experts_float64(case, device, kernels):
    check(lambda: make(case, device, torch.float64))


def test_experts_needs_of_each_tensor(device, kernels):
    """Whatever subset needs a gradient, it is the same gradient, and no other is computed."""
    inputs = make(SMALL, device, torch.float64)
    dy = torch.randn_like(inputs[0])
    leaves = testing.leaves(inputs)
    every = [t for t in testing.tensors(leaves) if t.requires_grad]
    full = torch.autograd.grad(ops.experts(*leaves), every, dy)
    for index, tensor in enumerate(every):
        for other in every:
            other.requires_grad_(other is tensor)
        (grad,) = torch.autograd.grad(ops.experts(*leaves), [tensor], dy)
        testing.assert_accurate(grad, full[index], name=f"needs {index}")


@pytest.mark.parametrize("dtype", (torch.float64, *DTYPES), ids=str)
def test_experts_adjoint(dtype, device, kernels):
    """<J v, w> = <v, J' w>: J v is the float64 reference's, J' w the kernels', in their dtype."""
    if not supported(kernels, device, dtype):
        pytest.skip("the interpreter computes float32 and float64 only")
    inputs = make(CASES[3], device, dtype)
    wide = testing.to_float64(inputs)
    v = torch.randn_like(wide[0])
    _, jv = torch.func.jvp(lambda x: reference.experts(x, *wide[1:]), (wide[0],), (v,))
    w = torch.randn_like(inputs[0])
    expected = (jv * w.double()).sum()
    ours, plain = (run(f, inputs, w)[1].double() for f in (ops.experts, reference.experts))
    # The accuracy rule along v: a rounding of each entry, beside twice what plain PyTorch does.
    rounding = 0.5 * torch.finfo(dtype).eps * (v.abs() * ours.abs()).sum()
    allowed = 2 * ((v * plain).sum() - expected).abs() + rounding
    assert ((v * ours).sum() - expected).abs() <= allowed


@pytest.mark.parametrize("case", (SMALL, LOW_RANK), ids=lambda case: case.name)
def test_experts_registration(case, device, kernels):
    inputs = testing.leaves(make(case, device, torch.float32))
    flat, layout = _flat(inputs[3:])
    for recompute in (False, True):
        flags = keeps(unflatten(flat, layout, [False] * 3), recompute)
        args = (*inputs[:3], flat, layout, [False] * 3, True, list(flags))
        torch.library.opcheck(torch.ops.flexmore.experts, args)
    compiled = torch.compile(ops.experts, fullgraph=True, backend="aot_eager")
    testing.assert_same(compiled(*inputs), ops.experts(*inputs))


def _flat(sides):
    from flexmore_kernels.ops.experts import _projection
    from flexmore_kernels.projection import flatten

    return flatten([_projection("gate", side) for side in sides])


@pytest.mark.parametrize("case", CASES, ids=CASE_IDS)
def test_experts_same_bits(case, device, kernels):
    inputs = make(case, device, torch.float32)
    dy = torch.randn_like(inputs[0])
    first, second = run(ops.experts, inputs, dy), run(ops.experts, inputs, dy)
    for a, b in zip(first, second, strict=True):
        testing.assert_same(a, b)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize("tail", [0, 3])
def test_experts_sorted_rows(weighted, tail, device, kernels):
    case = CASES[0]
    counts = torch.tensor([3, 0, 4, 2], device=device)

    def draw():
        x = testing.make_x(9 + tail, case.hidden, device, torch.float64)
        weights = torch.rand(9 + tail, device=device).double() if weighted else None
        return x, weights, *make(case, device, torch.float64)[3:]

    def sorted_rows(module):
        return lambda x, weights, *sides: module.experts(x, None, weights, *sides, counts=counts)

    check(draw, sorted_rows(ops), sorted_rows(reference), in_order)
    assert not sorted_rows(ops)(*draw())[9:].any()


def stack(side) -> StackedFactors:
    """A projection's factors stacked, padded with nothing."""
    pairs = [entry for entry in side if isinstance(entry, tuple)]
    ranks = tuple(entry[0].shape[0] if isinstance(entry, tuple) else 0 for entry in side)
    full = tuple(entry if isinstance(entry, torch.Tensor) else None for entry in side)
    a, b = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
    return StackedFactors(full, a, b, ranks)


@pytest.mark.parametrize("case", [SMALL, CASES[-1]], ids=["mixed", "many_experts"])
def test_experts_stacked_factors(case, device, kernels):

    def draw():
        x, indices, weights, *sides = make(case, device, torch.float64)
        return x, indices, weights, *(stack(side) for side in sides)

    check(draw, roles=in_order)


@pytest.mark.parametrize("case", [CASES[3], SMALL], ids=lambda c: c.name)
def test_experts_int32_ids_and_strides(case, device, kernels):
    x, indices, weights, *sides = make(case, device, torch.float64)
    wide = torch.randn(x.shape[0], 2 * x.shape[1], dtype=x.dtype, device=device)
    expected = ops.experts(wide[:, ::2].contiguous(), indices, weights, *sides)
    testing.assert_same(ops.experts(wide[:, ::2], indices.int(), weights, *sides), expected)
    strided = [
        [(e[0].T.contiguous().T, e[1]) if isinstance(e, tuple) else e for e in side]
        for side in sides
    ]
    testing.assert_accurate(ops.experts(wide[:, ::2], indices, weights, *strided), expected)


def test_experts_poison_stays_where_it_is_routed(device, kernels):
    """An infinite token spoils its own row alone; experts nobody chose may hold anything."""
    x, indices, weights, *sides = make(CASES[6], device, torch.float32)
    x[3] = float("inf")
    indices[:] = torch.tensor([0, 4])
    indices[3, 0] = 1
    for side in sides:
        side[2][0].fill_(float("nan"))
    y = ops.experts(x, indices, weights, *sides)
    clean = torch.arange(len(x), device=device) != 3
    assert y[clean].isfinite().all()
    assert not y[3].isfinite().all()


def test_experts_of_infinite_weights_spoil_their_own_tokens(device, kernels):
    """Only one token chose the expert whose factors are infinite; its neighbours do not see it."""
    x, indices, weights, *sides = make(CASES[6], device, torch.float32)
    indices[:] = torch.tensor([0, 1])
    indices[3, 1] = 2
    for side in sides:
        side[2][0].fill_(float("inf"))
    x.requires_grad_()
    y = ops.experts(x, indices, weights, *sides)
    (dx,) = torch.autograd.grad(y, x, torch.randn_like(y))
    others = torch.arange(len(x), device=device) != 3
    for result in (y.detach(), dx):
        assert not result[3].isfinite().all()
    assert y[others].isfinite().all()
    if device == "cpu" and kernels != "triton":  # else dx of few experts is one product with all A
        assert dx[others].isfinite().all()


@given(data=st.data())
def test_experts_hypothesis(data, device, kernels):
    num_experts = data.draw(st.integers(1, 10))
    entry = st.one_of(
        st.integers(0, 5),
        st.tuples(*[st.sampled_from([0, 1, 3, "full"])] * 3),
    )
    ranks = (0, *(data.draw(entry) for _ in range(num_experts - 1)))
    case = Case(
        "drawn", "", data.draw(st.integers(0, 9)), data.draw(st.integers(5, 19)),
        data.draw(st.integers(5, 23)), ranks, data.draw(st.integers(1, num_experts)),
        data.draw(st.sampled_from(["random", "empty_slots"])),
    )  # fmt: skip
    check(lambda: make(case, device, torch.float64))


BAD = {
    "x": (lambda i: i.update(x=i["x"][:, 1:]), ValueError, "gate"),
    "x dtype": (lambda i: i.update(x=i["x"].int()), TypeError, "x: got dtype int32"),
    "indices shape": (lambda i: i.update(indices=i["indices"][1:]), ValueError, "indices"),
    "indices dtype": (lambda i: i.update(indices=i["indices"].float()), TypeError, "indices"),
    "weights dtype": (lambda i: i.update(weights=i["weights"].double()), TypeError, "weights"),
    "id": (lambda i: i["indices"].__setitem__((1, 0), 9), ValueError, r"indices: got id 9 at \[1"),
    "twice": (lambda i: i["indices"].fill_(1), ValueError, "names expert 1 twice"),
    "no base": (lambda i: i["gate"].__setitem__(0, None), ValueError, r"gate\[0\]"),
    "short": (lambda i: i.update(up=i["up"][:-1]), ValueError, "up: got 3 entries"),
    "factor": (lambda i: i["down"].__setitem__(1, "a"), TypeError, r"down\[1\]: got str"),
    "pair": (
        lambda i: i["down"].__setitem__(1, i["gate"][1]), ValueError, "down factors 0",
    ),
    "mixed dtype": (
        lambda i: i["up"].__setitem__(0, i["up"][0].double()), TypeError, r"up\[0\]: got dtype",
    ),
    "counts": (lambda i: i.update(counts=i["indices"][0]), ValueError, "indices: got a tensor"),
}  # fmt: skip


@pytest.mark.parametrize("spoil, error, match", BAD.values(), ids=BAD)
def test_experts_bad_input(spoil, error, match, device):
    names = ("x", "indices", "weights", "gate", "up", "down")
    inputs = dict(zip(names, make(CASES[0], device, torch.float32), strict=True))
    spoil(inputs)
    with validation(), pytest.raises(error, match=match):
        ops.experts(**inputs)


@pytest.mark.parametrize("counts", [[4, 4, 4], [-1, 2, 2]])
def test_counts_of_more_rows_than_there_are(counts):
    weights = [[torch.randn(shape)] * 3 for shape in ((6, 4), (6, 4), (4, 6))]
    with pytest.raises(ValueError, match="^counts: got .* accepted: counts >= 0 of at most 4 rows"):
        ops.experts(torch.randn(4, 4), None, None, *weights, counts=torch.tensor(counts))
