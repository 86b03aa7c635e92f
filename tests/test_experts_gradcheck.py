"""The experts' backward against finite differences, in float64.

Traps covered: parts that are frozen beside trained ones, in each of the backward's ways: by token,
with rows of own experts (large ranks, full-size, a base that nobody shares), all by rows; weights
that lie transposed; trained factors of no rank.
"""

from __future__ import annotations

import pytest
import torch
from test_experts import SMALL, make
from test_own_rows import small_limits  # noqa: F401

from flexmore_kernels import StackedFactors, ops, testing
from flexmore_kernels.testing import Case

FULL = "full"
CASES = {
    "all by rows": SMALL,
    "small ranks": Case("low", "", 6, 5, 6, (0, 2, (1, 0, 3), 4), 2),
    "mixed ranks": Case("mixed", "", 6, 5, 6, (0, 1, 2, 35, 3, (40, 2, 0)), 3),
    "full-size too": Case("own", "", 6, 5, 6, (0, 2, FULL, (1, FULL, 36), (FULL, 0, FULL)), 3),
    "all full-size": Case("full", "", 6, 5, 6, (0, FULL, FULL), 2),
}
TRAINS = {
    "everything": lambda name: True,
    "factors": lambda name: "full" not in name,
    "the last expert": lambda name: name.split()[1] == "last",
    "routing alone": lambda name: False,
    "down alone": lambda name: name.endswith("down"),  # and neither x nor the routing
}


def named(sides) -> list[str]:
    """Of each weight tensor: "full" or "factor", "last" if the last expert's, and its side."""
    names = []
    for name, side in zip(("gate", "up", "down"), sides, strict=True):
        for e, entry in enumerate(side):
            which = "last" if e == len(side) - 1 else "other"
            count = 2 if isinstance(entry, tuple) else int(entry is not None)
            names += [f"{'factor' if count == 2 else 'full'} {which} {name}"] * count
    return names


@pytest.mark.parametrize(
    ("case", "trains"),
    [
        ("all by rows", "everything"),
        ("small ranks", "factors"),
        ("small ranks", "routing alone"),
        ("mixed ranks", "the last expert"),
        ("mixed ranks", "factors"),
        ("full-size too", "everything"),
        ("full-size too", "the last expert"),
        ("all full-size", "the last expert"),
        ("all by rows", "down alone"),
        ("small ranks", "down alone"),
        ("full-size too", "down alone"),
    ],
)
def test_gradcheck(case, trains, device, kernels, request):
    if case not in ("all by rows", "small ranks"):
        request.getfixturevalue("small_limits")
    x, indices, weights, *sides = make(CASES[case], device, torch.float64)
    flat, names = testing.tensors(sides), named(sides)
    wanted = [TRAINS[trains](name) for name in names]
    flat, wanted = [x, weights, *flat], [trains != "down alone"] * 2 + wanted
    leaves = [t.requires_grad_() for t, want in zip(flat, wanted, strict=True) if want]

    def function(*tensors):
        given = iter(tensors)
        parts = [next(given) if want else t for t, want in zip(flat, wanted, strict=True)]
        x, weights, parts = *parts[:2], iter(parts[2:])
        return ops.experts(x, indices, weights, *testing.tree_map(lambda _: next(parts), sides))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)


def test_weights_that_lie_transposed(device, kernels, small_limits):  # noqa: F811
    x, indices, weights, *sides = make(CASES["all full-size"], device, torch.float64)
    sides = [[w.requires_grad_() for w in side] for side in sides]
    flat = [w for side in sides for w in side]
    dy = torch.randn_like(x)
    expected = torch.autograd.grad(ops.experts(x, indices, weights, *sides), flat, dy)
    lies = [[w.detach().T.contiguous().T.requires_grad_() for w in side] for side in sides]
    flat = [w for side in lies for w in side]
    found = torch.autograd.grad(ops.experts(x, indices, weights, *lies), flat, dy)
    for ours, other in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, other)


def test_stacked_factors_of_no_rank(device, kernels):
    x, indices, weights, *sides = make(CASES["small ranks"], device, torch.float64)
    base = sides[1][0]
    a, b = (t.to(base).requires_grad_() for t in (torch.empty(0, 5), torch.empty(6, 0)))
    sides[1] = StackedFactors([base, None, None, None], a, b, (0, 0, 0, 0))
    y = ops.experts(x.requires_grad_(), indices, weights, *sides)
    da, db = torch.autograd.grad(y.sum(), (a, b))
    assert da.shape == a.shape and db.shape == b.shape


def test_factors_of_rank_0_are_refused():
    x, indices, weights, gate, up, down = make(CASES["small ranks"], "cpu", torch.float64)
    gate[1] = (torch.empty(0, 5, dtype=x.dtype), torch.empty(6, 0, dtype=x.dtype))
    with pytest.raises(ValueError, match=r"^gate\[1\]: got factors of rank 0; accepted"):
        ops.experts(x, indices, weights, gate, up, down)
