"""One matrix at another rank, against an SVD of the whole product or difference.

Traps: pieces in no order, a product that is zero, a rank above what there is, a full-size matrix
whose difference is taken in its own dtype, growing that moves the last bits of B A.
"""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels.members import entry_rank
from flexmore_kernels.reranking import parse_rank, product_svd, reranked
from flexmore_kernels.testing import assert_accurate, assert_same

OUT, IN, RANK = 24, 16, 6


def pair(dtype=torch.float64):
    return torch.randn(RANK, IN, dtype=dtype), torch.randn(OUT, RANK, dtype=dtype)


def best(matrix, rank):
    u, s, vt = torch.linalg.svd(matrix.double(), full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vt[:rank]


@pytest.mark.parametrize("rank", [1, 3, RANK])
def test_cut_is_the_best_of_its_rank_and_nested(rank):
    (a, b), base = pair(), torch.randn(OUT, IN, dtype=torch.float64)
    small_a, small_b = reranked((a, b), base, rank)
    assert_accurate(small_b @ small_a, best(b @ a, rank))
    norms = small_a.norm(dim=1)
    assert_accurate(small_b.norm(dim=0), norms)  # split evenly, both by singular value
    assert bool((norms[:-1] >= norms[1:]).all())
    for less in range(1, rank):
        assert_accurate(small_b[:, :less] @ small_a[:less], best(b @ a, less))


def test_float32_is_as_good_as_the_rounding_of_the_best():
    a, b = pair(torch.float32)
    small_a, small_b = reranked((a, b), torch.zeros(OUT, IN), 3)
    assert small_a.dtype == small_b.dtype == torch.float32
    product = b.double() @ a.double()
    u, s, vt = torch.linalg.svd(product, full_matrices=False)
    plain_b, plain_a = (u[:, :3] * s[:3].sqrt()).float(), (s[:3, None].sqrt() * vt[:3]).float()
    assert_accurate(small_b @ small_a, best(product, 3), plain_b @ plain_a)


def test_a_product_that_is_zero_stays_so():
    a, b = torch.randn(RANK, IN), torch.zeros(OUT, RANK)
    small_a, small_b = reranked((a, b), torch.randn(OUT, IN), 2)
    assert small_a.shape == (2, IN) and not bool((small_b @ small_a).any())
    assert not bool(product_svd(a, b).s.any())


def test_grown_adds_nothing_and_can_learn():
    a, b = pair(torch.float32)
    more_a, more_b = reranked((a, b), torch.zeros(OUT, IN), RANK + 3)
    assert_same(more_a[:RANK], a)
    assert_same(more_b[:, :RANK], b)
    assert not bool(more_b[:, RANK:].any()) and bool((more_a[RANK:] != 0).all())
    assert float(more_a[RANK:].abs().max()) <= IN**-0.5
    new_a, new_b = reranked(None, torch.zeros(OUT, IN, dtype=torch.bfloat16), 2)
    assert new_a.dtype == torch.bfloat16 and new_b.shape == (OUT, 2) and not bool(new_b.any())


def test_grown_rows_follow_the_generator():
    generators = [torch.Generator().manual_seed(5) for _ in range(2)]
    first, second = (reranked(None, torch.zeros(OUT, IN), 3, generator=g) for g in generators)
    assert_same(first[0], second[0])


def test_to_full_size_and_back():
    (a, b), base = pair(torch.float32), torch.randn(OUT, IN)
    full = reranked((a, b), base, "full")
    assert_same(full, (base.double() + b.double() @ a.double()).float())  # one rounding
    again = reranked(full, base, RANK)
    truth = best(full.double() - base.double(), RANK)
    u, s, vt = torch.linalg.svd(truth, full_matrices=False)
    root = s[:RANK].sqrt()
    plain = (u[:, :RANK] * root).float() @ (root[:, None] * vt[:RANK]).float()
    assert_accurate(again[1] @ again[0], truth, plain)
    assert_same(reranked(None, base, "full"), base)


def test_what_stays_is_the_same_tensor():
    base = torch.randn(OUT, IN)
    assert reranked(base, base, "full") is base
    assert reranked(None, base, 0) is None and reranked(base, base, 0) is None
    assert [entry_rank(e) for e in (None, base, pair())] == [0, "full", RANK]


def test_ranks_are_parsed_as_expert_ranks_are():
    assert parse_rank(0, 16) == ("full",) * 3 and parse_rank(4, 16) == (4,) * 3
    assert parse_rank((2, 0, "full"), 16) == (2, 0, "full")
    for wrong in (17, -1, (1, 2), (1, 2, 17), (1, 2, "half")):
        with pytest.raises(ValueError, match="^rank"):
            parse_rank(wrong, 16)
    with pytest.raises(TypeError, match="^rank"):
        parse_rank("four", 16)
