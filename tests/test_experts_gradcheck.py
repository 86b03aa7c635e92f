"""The experts' backward against finite differences, in float64.

Traps covered: parts that are frozen beside trained ones, in each of the backward's ways: by token,
with rows of own experts (large ranks, full-size, a base that nobody shares), all by rows.
"""

from __future__ import annotations

import pytest
import torch
from test_experts import SMALL, make
from test_own_rows import small_limits  # noqa: F401

from flexmore_kernels import ops, testing
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
}


def named(sides) -> list[str]:
    """Of each weight tensor, in order: "full" or "factor", and "last" if of the last expert."""
    names = []
    for side in sides:
        for e, entry in enumerate(side):
            which = "last" if e == len(side) - 1 else "other"
            count = 2 if isinstance(entry, tuple) else int(entry is not None)
            names += [f"{'factor' if count == 2 else 'full'} {which}"] * count
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
    ],
)
def test_gradcheck(case, trains, device, kernels, request):
    if case not in ("all by rows", "small ranks"):
        request.getfixturevalue("small_limits")
    x, indices, weights, *sides = make(CASES[case], device, torch.float64)
    flat, names = testing.tensors(sides), named(sides)
    wanted = [TRAINS[trains](name) for name in names]
    leaves = [t.requires_grad_() for t in (x, weights)]
    leaves += [t.requires_grad_() for t, want in zip(flat, wanted, strict=True) if want]

    def function(*tensors):
        given = iter(tensors)
        x, weights = next(given), next(given)
        parts = iter([next(given) if want else t for t, want in zip(flat, wanted, strict=True)])
        return ops.experts(x, indices, weights, *testing.tree_map(lambda _: next(parts), sides))

    assert torch.autograd.gradcheck(function, leaves, fast_mode=True)
