"""flexmore_kernels/schedule.py: the way of each expert, from sizes alone."""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import schedule
from flexmore_kernels.projection import FULL
from flexmore_kernels.ragged import MAX_SET_EXPERTS
from flexmore_kernels.schedule import (
    DECODE_EXPERTS,
    DECODE_TOKENS,
    FUSED_RANK,
    OWN_TOKENS,
    SWEPT_RANK,
)

BOTH = ("native", "triton")

SIZES = {"hidden": 4096, "width": 11008, "dtype": torch.bfloat16}


def choose(*entries, tokens=4096, **options):
    """Of experts given as a rank, `FULL`, or a triple of them; the base is put before."""
    triples = [entry if isinstance(entry, tuple) else (entry,) * 3 for entry in (FULL, *entries)]
    return schedule.choose(list(zip(*triples, strict=True)), tokens, **SIZES | options)


def test_few_experts_of_small_ranks_are_fused():
    how = choose(1, 0, FUSED_RANK, (16, 0, 0), (0, 0, 16))
    assert how.route == "token-major" and how.all_fused and how.dense_down
    assert how.ways == ("base", "fused", "base", "fused", "fused", "base")


def test_a_larger_rank_has_rows_of_its_own():
    how = choose(FUSED_RANK + 1, 16, (0, 0, FUSED_RANK + 1), 0)
    assert how.ways == ("base", "grouped", "fused", "grouped", "base") and how.own == (1, 3)
    assert not how.all_fused and how.dense_down


def test_with_few_tokens_all_go_one_way():
    how = choose(FUSED_RANK + 1, 16, tokens=OWN_TOKENS - 1)
    assert how.ways == ("base", "grouped", "grouped") and how.own == () and how.dense_down
    assert choose(FUSED_RANK + 1, 16, tokens=OWN_TOKENS).own == (1,)


@pytest.mark.parametrize("entry", [FULL, (FULL, 16, 16), (16, FULL, 0), (16, 16, FULL)])
def test_a_full_size_expert_is_full(entry):
    how = choose(entry, 16)
    assert how.ways == ("base", "full", "fused") and how.own == (1,) and not how.all_fused


@pytest.mark.parametrize("entry", [FULL, (FULL, FULL, 16), (FULL, FULL, 0), (16, 16, FULL)])
def test_a_base_that_none_shares_is_an_expert_as_others(entry):
    how = choose(entry, entry)
    assert how.ways == ("full",) * 3 and how.own == (0, 1, 2)


def test_a_full_size_down_is_not_one_dense_product():
    how = choose((16, 16, FULL), tokens=OWN_TOKENS - 1)
    assert how.ways == ("base", "grouped") and not how.dense_down


def test_a_full_size_down_alone_needs_rows_of_its_own():
    how = choose((0, 0, FULL), (0, 0, 16), tokens=OWN_TOKENS - 1)
    assert how.ways == ("base", "grouped", "base") and not how.all_fused and not how.dense_down


def test_many_experts_are_expert_major():
    most = choose(*[16] * (MAX_SET_EXPERTS - 1))
    more = choose(*[16] * MAX_SET_EXPERTS)
    assert (most.route, more.route) == ("token-major", "expert-major")
    assert not more.all_fused and not more.dense_down and set(more.ways) == {"base", "grouped"}


def test_decode_needs_the_library_few_tokens_and_no_backward():
    routes = [
        choose(16, tokens=tokens, kernels=kernels, decode=decode).route
        for tokens, kernels, decode in (
            (DECODE_TOKENS, BOTH, True),
            (DECODE_TOKENS + 1, BOTH, True),
            (DECODE_TOKENS, BOTH, False),
            (DECODE_TOKENS, ("triton",), True),
        )
    ]
    assert routes == ["decode", "token-major", "token-major", "token-major"]


@pytest.mark.parametrize("names", [BOTH, ("native",)])
def test_decode_fuses_every_rank(names):
    most = (16, *[0] * (DECODE_EXPERTS - 3), 2048)
    for entries in ((1, 4, 8, 64, 256, 2048), most, ((0, 0, 7), (16, 0, 0), (0, 0, 0))):
        how = choose(*entries, tokens=16, kernels=names)
        assert how.route == "decode" and how.by_library and how.own == () and not how.dense_down
        ways = ["fused" if any(e if isinstance(e, tuple) else (e,)) else "base" for e in entries]
        assert how.ways == ("base", *ways)


@pytest.mark.parametrize("other", [FULL, (16, 16, FULL)])
def test_decode_has_no_full_size_expert(other):
    assert choose(16, other, tokens=16, kernels=BOTH).route == "token-major"


def test_many_experts_of_small_ranks_are_fused_by_the_library():
    small = [SWEPT_RANK, 1, (0, 0, 8), 0, *[16] * MAX_SET_EXPERTS]
    how = choose(*small, kernels=BOTH)
    assert how.route == "expert-major" and how.by_library and not how.all_fused
    assert how.ways == ("base", "fused", "fused", "fused", "base", *["fused"] * MAX_SET_EXPERTS)
    assert choose(*small, kernels=BOTH, tokens=16, decode=False) == how
    for larger, options in (
        ((SWEPT_RANK + 1,), {}),
        (((0, 0, SWEPT_RANK + 1),), {}),
        ((FULL,), {}),
        (((4, 4, FULL),), {}),
        ((), {"kernels": ("triton",)}),
        ((), {"dtype": torch.float32}),
        ((), {"hidden": 4100}),
        ((), {"width": 11004}),
    ):
        how = choose(*small, *larger, **{"kernels": BOTH} | options)
        assert how.route == "expert-major" and not how.by_library and "fused" not in how.ways


def test_plain_pytorch_loops():
    how = choose(16, FULL, 0, kernels=("aten",), tokens=1)
    assert how.route == "loop" and how.ways == ("base", "grouped", "full", "base")
    assert not how.all_fused and not how.dense_down
