"""csrc/decode_plan.h: how the kernels for few tokens share their work, for any size."""

from __future__ import annotations

import itertools

import pytest
import torch

from flexmore_kernels import native
from flexmore_kernels.projection import FULL

pytestmark = pytest.mark.skipif(native.host() is None, reason="the module _host was not built")

SIZES = ((64, 128), (72, 200), (2048, 5504), (4096, 11008), (8192, 28672))
RANKS = ((), (64,) * 6, (1, 4, 8, 64, 256, 2048), (3,) * 15)
DEVICES = ((132, 233472), (108, 167936), (84, 102400), (1, 233472))


@pytest.fixture(
    params=itertools.product(SIZES, RANKS, DEVICES, (8, 16, 32, 64)),
    ids=lambda p: "-".join(map(str, p)),
)
def plan(request):
    (hidden, width), ranks, (processors, shared), tokens = request.param
    found = native.host().decode_plan(hidden, width, [0, *ranks], processors, shared, tokens)
    given = {"processors": processors, "shared": shared, "tokens": tokens}
    return found | given | {"hidden": hidden, "width": width}


def test_each_unit_has_one_thread_block_and_none_is_idle(plan):
    work = plan["product"]
    units = sum(blocks for _, blocks, _, _ in work["groups"]) * work["chunks"]
    assert work["start"][0] == 0 and work["start"][-1] == units
    assert all(a < b for a, b in itertools.pairwise(work["start"]))
    assert len(work["start"]) - 1 <= plan["processors"]
    firsts = [first for _, _, first, _ in work["groups"]]
    assert (
        firsts
        == [0, *itertools.accumulate(b * work["chunks"] for _, b, _, _ in work["groups"])][:-1]
    )


def test_parts_are_the_most_thread_blocks_that_share_a_block_of_rows(plan):
    work = plan["product"]
    spans = list(itertools.pairwise(work["start"]))
    units = work["start"][-1]
    most = max(
        sum(a < first + work["chunks"] and b > first for a, b in spans)
        for first in range(0, units, work["chunks"])
    )
    assert work["parts"] == most


def test_the_ring_fits_and_holds_every_block(plan):
    work = plan["product"]
    tallest = max(-(-rows // blocks) for rows, blocks, _, _ in work["groups"])
    assert tallest <= work["tile_rows"] and work["tile_rows"] % 16 == 0
    assert 4 * 128 * (work["tile_rows"] + plan["tokens"]) <= plan["product_bytes"]


@pytest.mark.parametrize(
    ("which", "size", "most"), [("cut_in", "width", 96), ("cut_down", "hidden", 32)]
)
def test_rows_of_an_expansion_are_cut_evenly_and_its_ring_fits(plan, which, size, most):
    cut = plan[which]
    rows, blocks, per_block, tile_rows = (
        cut[name] for name in ("rows", "blocks", "per_block", "tile_rows")
    )
    assert rows == plan[size] and -(-rows // blocks) <= tile_rows <= most == cut["most_rows"]
    assert (cut["grid"] - 1) * per_block < blocks <= cut["grid"] * per_block
    assert cut["grid"] <= plan["processors"]
    assert cut["slots"] == (6 if plan["tokens"] >= 32 else 8)
    sums = 8 * (plan["tokens"] + 8) if which == "cut_in" and plan["tokens"] >= 32 else 0
    assert cut["bytes"] == cut["slots"] * 128 * (tile_rows + plan["tokens"]) + tile_rows * sums
    # Down's beside a product's ring, or (as few rows as can be, with many tokens) after it.
    after = which == "cut_down" and tile_rows == 16 and cut["bytes"] <= plan["shared"] - 7168
    assert cut["bytes"] <= cut["most_bytes"] or after


def test_thread_blocks_have_equal_shares():
    """Of W_down; those of the experts' factors, which sum parts in the end, somewhat fewer."""
    work = native.host().decode_plan(4096, 11008, [0, *[64] * 6], 132, 233472, 16)["product"]
    base = work["groups"][1][2]
    units = [b - a for a, b in itertools.pairwise(work["start"]) if b <= base]
    others = [b - a for a, b in itertools.pairwise(work["start"]) if a >= base]
    assert max(units) - min(units) <= 1
    assert max(others) - min(others) <= 1 and max(others) < min(units)


def test_a_single_row_or_column_is_judged_by_its_strides():
    from flexmore_kernels._native.experts import decode_serves
    from flexmore_kernels.projection import Projection

    x, base = torch.ones(1, 16), torch.ones(8, 16)

    def serves(a, b):
        return decode_serves(x, [Projection((base, None), ((a, b),), (FULL, 1), False)])

    a, b = torch.ones(1, 16), torch.ones(8, 1)
    assert serves(a, b)
    assert b.T.contiguous().T.is_contiguous() and not serves(a, torch.ones(1, 8).T)
    assert not serves(torch.ones(16, 1).T, b)
