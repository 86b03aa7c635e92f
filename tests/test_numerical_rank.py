"""The rank of what was truncated, then rounded: found where there is one, and only there.

Traps covered: rounding coarser than the last of the signal, ranks of 1 and of most of the size,
weights of unlike sizes by row, an expert that is the base, one that was never truncated.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels.conversion.svd import numerical_rank

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def stored(rank, dtype, shape=(96, 128), size=0.3, rows=None):
    """(W - W_0, W_0): W_0 in dtype, W = W_0 + a delta of this rank, rounded to dtype."""
    base = torch.randn(shape) * 0.02
    base = base if rows is None else base * rows[:, None]
    base = base.to(dtype)
    delta = torch.randn(shape[0], rank) @ torch.randn(rank, shape[1])
    delta = delta * (size * 0.02 / max(1, rank) ** 0.5)
    expert = (base.double() + delta.double()).to(dtype)
    return expert.double() - base.double(), base


@pytest.mark.parametrize("with_base", [True, False])
@pytest.mark.parametrize("rank", [1, 5, 40, 80])
@pytest.mark.parametrize("dtype", DTYPES)
def test_finds_the_rank(dtype, rank, with_base, device):
    for shape in ((96, 128), (128, 96)):
        difference, base = stored(rank, DTYPES[dtype], shape)
        base = base.to(device) if with_base else None
        assert numerical_rank(difference.to(device), DTYPES[dtype], base) == rank


def test_finds_the_rank_among_weights_of_unlike_sizes():
    """Some rows' rounding is a thousand times another's: the noise is not of one variance."""
    rows = torch.logspace(-2, 1, 96)
    difference, base = stored(6, torch.bfloat16, size=2.0, rows=rows)
    assert numerical_rank(difference, torch.bfloat16, base) == 6


@pytest.mark.parametrize("with_base", [True, False])
def test_none_where_nothing_was_truncated(with_base):
    base = torch.randn(96, 128).bfloat16()
    left, right = (torch.linalg.qr(torch.randn(n, 96))[0] for n in (96, 128))
    index = torch.arange(1, 97)
    for s in (torch.ones(96), 1 / index, index**-0.5, 0.95**index):
        for size in (1.0, 30.0):
            delta = size * (left * s) @ right.T
            expert = (base.double() + delta.double()).bfloat16()
            difference = expert.double() - base.double()
            base_or_none = base if with_base else None
            assert numerical_rank(difference, torch.bfloat16, base_or_none) is None


def test_zero_where_the_expert_is_the_base():
    base = torch.randn(20, 30)
    assert numerical_rank(torch.zeros(20, 30), torch.float32, base) == 0
    assert numerical_rank(torch.zeros(20, 30), torch.float32) == 0


def test_bad_input():
    good = torch.ones(4, 5)
    with pytest.raises(ValueError, match="difference: got shape"):
        numerical_rank(torch.ones(4), torch.float32)
    with pytest.raises(ValueError, match="base: got shape"):
        numerical_rank(good, torch.float32, torch.ones(5, 4))
    with pytest.raises(ValueError, match="difference: holds NaN"):
        numerical_rank(good * float("inf"), torch.float32)
    with pytest.raises((TypeError, ValueError), match="dtype: got"):
        numerical_rank(good, torch.int8)
