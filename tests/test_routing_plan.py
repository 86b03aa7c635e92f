"""The plan against the reference, bit for bit.

Traps covered: keys that cross a sorting block, narrow and wide blocks, experts without tokens, all
tokens on one, empty slots, ids far out of range, with and without the sort by expert set.
"""

from __future__ import annotations

import pytest
import torch
from common import some_ids
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import reference
from flexmore_kernels import backend, ops
from flexmore_kernels.testing import assert_same


def assert_plan(indices: Tensor, num_experts: int) -> None:
    """The plan is the reference's, bit for bit, and has the properties of a stable sort."""
    plan = ops.make_plan(indices, num_experts)
    expected = reference.make_plan(indices.cpu(), num_experts)
    for name in plan._fields[1:6]:
        assert_same(getattr(plan, name), getattr(expected, name), name)
    assert (plan.num_experts, plan.top_k) == (num_experts, indices.shape[1])
    used = int(plan.row_offsets[-1])
    slot = plan.row_to_slot[:used].long()
    assert (plan.row_to_slot[used:] == -1).all()
    assert torch.equal(
        plan.slot_to_row.flatten()[slot], torch.arange(used, device=slot.device).int()
    )
    key = indices.flatten()[slot] * indices.numel() + slot
    assert (key.diff() > 0).all(), "rows ascend by expert, then by slot"


PLANS = {
    "no_tokens": (0, 4, 2), "one_token": (1, 7, 5), "one_expert": (9, 1, 1),
    "k_equals_1": (70, 5, 1), "k_equals_e": (20, 7, 7),
    "eight_experts": (40, 8, 3), "nine_experts": (40, 9, 3),
    "several_blocks": (150, 7, 3), "wide_blocks": (150, 70, 8), "all_experts": (3, 1024, 20),
    "many_blocks": (3000, 7, 2),
}  # fmt: skip


@pytest.mark.parametrize("shape", PLANS.values(), ids=PLANS)
def test_plan_is_a_stable_sort(shape, device, kernels):
    tokens, experts, top_k = shape
    assert_plan(some_ids(tokens, experts, top_k).to(device), experts)


@pytest.mark.parametrize("name", ("starved", "all_to_one", "all_empty", "one_set"))
def test_plan_of_lopsided_ids(name, device, kernels):
    """An expert without tokens; one with all; only empty slots; one set for every token."""
    ids = {
        "starved": torch.tensor([[0, 2], [2, 3], [3, 0]]).repeat(50, 1),
        "all_to_one": torch.full((140, 1), 2),
        "all_empty": torch.full((5, 2), 4),
        "one_set": torch.tensor([[3, 1], [1, 3]]).repeat(70, 1),
    }[name]
    assert_plan(ids.to(device), 4)


@given(data=st.data())
def test_plan_of_any_shape(data, device, kernels):
    E = data.draw(st.integers(1, 20))
    shape = data.draw(st.integers(0, 20)), E, data.draw(st.integers(1, E))
    torch.manual_seed(data.draw(st.integers(0, 99)))
    assert_plan(some_ids(*shape, data.draw(st.sampled_from((0.0, 0.4)))).to(device), E)


def test_plan_skips_ids_out_of_range(device, kernels):
    """Raw kernels, which a GPU runs unchecked: ids far outside [0, E) touch no memory."""
    ids = torch.tensor([[0, 2**40], [-1, 2], [-(2**62), 3], [1, 2**31]], device=device)
    raw = backend.kernels("routing", ids)
    expected = raw.make_plan(ids.where((ids >= 0) & (ids < 3), 3), 3, True)
    for got, want in zip(raw.make_plan(ids, 3, True), expected, strict=True):
        assert_same(got, want)


@pytest.mark.parametrize("by_set", (False, True))
@pytest.mark.parametrize("shape", ((70, 6), (700, 7), (80, 40)), ids=str)
def test_plan_takes_a_token_s_second_slot_of_an_expert_for_empty(shape, by_set, device, kernels):
    """Raw kernels, which a GPU runs unchecked: sizes elsewhere count on distinct ids."""
    if kernels == "aten" or (device == "cpu" and kernels == "native"):
        pytest.skip("ids are checked before, or nothing counts on them")
    if device == "cpu" and shape[1] > 8:
        pytest.skip("too long in the interpreter")
    ids = torch.randint(-1, 5, shape, device=device)
    again = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(2)
    raw = backend.kernels("routing", ids)
    expected = raw.make_plan(ids.masked_fill(again, 4), 4, by_set)
    for got, want in zip(raw.make_plan(ids, 4, by_set), expected, strict=True):
        assert_same(got, want)


def test_plan_has_the_same_bits_every_time(device, kernels):
    ids = some_ids(200, 7, 5).to(device)
    for first, again in zip(ops.make_plan(ids, 7)[:6], ops.make_plan(ids, 7)[:6], strict=True):
        assert_same(first, again)


def test_plan_of_int32_and_strided_ids(device, kernels):
    ids = some_ids(9, 6, 3).to(device)
    want = ops.make_plan(ids, 6)
    for other in (ids.int(), ids.T.contiguous().T, ids.repeat_interleave(2, 1)[:, ::2]):
        for a, b in zip(ops.make_plan(other, 6)[:6], want[:6], strict=True):
            assert_same(a, b)
