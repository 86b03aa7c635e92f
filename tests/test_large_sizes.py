"""More than 2^31 numbers: where a row lies does not fit in 32 bits.

Without a GPU, one row at the end of memory of which nothing else is ever touched; on a GPU, a layer
of so many tokens that the hidden values of its experts pass 2^31.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import reference
from flexmore_kernels import backend, ops
from flexmore_kernels.testing import assert_accurate, make_projection, make_x

WIDTH = 1024
ROWS = 2**31 // WIDTH + 1


def many_rows(last: float, device: str) -> Tensor:
    """(ROWS, WIDTH) float16. A place cut to 32 bits lies 2^32 lower: in memory, where zeros are."""
    room = torch.empty(2**31 + ROWS * WIDTH, dtype=torch.float16, device=device)
    if device == "cuda":
        room.zero_()
    x = room[2**31 :].view(ROWS, WIDTH)
    x[-1] = last
    return x


@pytest.mark.parametrize("weighted", (False, True))
def test_unpermute_of_a_row_far_away(weighted, device, kernels):
    x = many_rows(2.0, device)
    slot_to_row = torch.tensor([[ROWS - 1]], dtype=torch.int32, device=device)
    weights = torch.full((1, 1), 0.5, device=device) if weighted else None
    y = backend.kernels("permutation", x).unpermute(x, slot_to_row, weights, None)
    assert (y == (1 if weighted else 2)).all()


def test_low_rank_products_of_a_token_far_away(device, kernels):
    """The rows of x are found by token: K = 1, so a slot is a token."""
    x, ranks = many_rows(0.5, device), (0, 16)
    a = torch.ones(16, WIDTH, dtype=x.dtype, device=device)
    offsets = torch.tensor([0, 0, 1], dtype=torch.int32, device=device)
    slots = torch.tensor([ROWS - 1], dtype=torch.int32, device=device)
    raw = backend.kernels("lowrank", x)
    z = raw.shrink(x, a, offsets, ranks, slots, 1, 16, gather=True)
    assert (z == WIDTH / 2).all()
    da = raw.factor_grad(torch.ones_like(z), x, offsets, ranks, slots, 1, gather=True)
    assert (da == 0.5).all()
    y = raw.expand(z, torch.zeros(WIDTH, 16, dtype=x.dtype, device=device), offsets, ranks, 1, x,
                   slots, 1, gather=True)  # fmt: skip
    assert (y == 0.5).all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@torch.no_grad()
def test_experts_of_many_tokens():
    """By each way to the hidden values: token-major, fused, and expanded rows. Up to 30 GB."""
    tokens, hidden, width, dtype = 2**16 + 64, 16, 2**15, torch.bfloat16
    x = make_x(tokens, hidden, "cuda", dtype)
    indices = torch.randint(3, (tokens, 1), device="cuda")
    weights = torch.rand(tokens, 1, device="cuda")
    for ranks in (("full", 16, 16), ("full", 80, 16), ("full", 272, 16)):
        shapes = ((width, hidden), (width, hidden), (hidden, width))
        sides = [make_projection(ranks, *shape, "cuda", dtype) for shape in shapes]
        y = ops.experts(x, indices, weights, *sides)[-64:]
        last = [x[-64:], indices[-64:], weights[-64:]]
        same = reference.experts(*last, *sides)
        wide = [[tuple(t.double() for t in e) if isinstance(e, tuple) else e.double()
                 for e in side] for side in sides]  # fmt: skip
        truth = reference.experts(last[0].double(), last[1], last[2].double(), *wide)
        assert_accurate(y, truth, same, f"ranks {ranks}")
