"""The ragged axes: the worked example of the module's docstring, offsets, empty segments."""

from __future__ import annotations

import pytest
import torch

from flexmore_kernels import Ragged, ops
from flexmore_kernels.ragged import (
    joined,
    packed_size,
    rank_offsets,
    rank_offsets_tensor,
    ranks_tensor,
)


def test_worked_example_of_the_docstring():
    E, ranks = 3, (2, 0, 3)
    indices = torch.tensor([[0, 2], [2, 1], [2, 3], [0, 1], [3, 3]])
    plan = ops.make_plan(indices, E)
    assert plan.row_offsets.tolist() == [0, 2, 4, 7]
    assert plan.row_to_slot.tolist() == [0, 6, 3, 7, 1, 2, 4, -1, -1, -1]
    assert plan.slot_to_row.tolist() == [[0, 4], [5, 2], [6, -1], [1, 3], [-1, -1]]
    assert plan.expert_to_row.tolist() == [
        [0, -1, 4], [-1, 2, 5], [-1, -1, 6], [1, 3, -1], [-1, -1, -1],
    ]  # fmt: skip
    assert plan.token_order.tolist() == [4, 3, 2, 0, 1]
    assert plan.rows.sizes == (2, 2, 3)
    assert (plan.num_rows, plan.num_tokens, plan.top_k, plan.num_experts) == (10, 5, 2, 3)

    assert rank_offsets(ranks) == (0, 2, 2, 5)
    assert packed_size(ranks, 5, 2) == 25
    x, a = torch.ones(10, 4), torch.ones(5, 4)
    z = ops.shrink(x, a, plan, ranks)
    assert z.shape == (25,)
    assert z.tolist() == [4.0] * 13 + [0.0] * 12


def test_ragged_from_sizes():
    axis = Ragged.from_sizes([2, 0, 3])
    assert axis.offsets == (0, 2, 2, 5)
    assert axis.sizes == (2, 0, 3)
    assert axis.num_segments == 3
    assert Ragged(torch.tensor([0, 2, 2, 5], dtype=torch.int32)).sizes == (2, 0, 3)
    assert Ragged.from_sizes([]).sizes == ()


def test_ranks_on_the_device_are_made_once():
    cpu = torch.device("cpu")
    assert ranks_tensor((1, 2), cpu) is ranks_tensor((1, 2), cpu)
    assert rank_offsets_tensor((1, 2), cpu).tolist() == [0, 1, 3]


@pytest.mark.parametrize("as_ragged", [True, False])
def test_ops_take_ranks_as_ragged_or_as_a_sequence(as_ragged):
    plan = ops.make_plan(torch.tensor([[0], [1]]), 2)
    ranks = Ragged.from_sizes([1, 2]) if as_ragged else [1, 2]
    assert ops.shrink(torch.ones(2, 3), torch.ones(3, 3), plan, ranks).tolist() == [3, 3, 3, 0]


def test_joined_is_a_view_where_parts_lie_end_to_end():
    whole = torch.arange(60.0).view(6, 10)
    for dim, sizes in ((0, (1, 3, 2)), (1, (4, 1, 5)), (0, (2, 0, 4)), (0, (6,))):
        parts = whole.split(sizes, dim)
        found = joined(parts, dim)
        assert torch.equal(found, whole) and found.data_ptr() == whole.data_ptr()
    inner = joined(whole.split((2, 3, 5), 1)[1:], 1)
    assert torch.equal(inner, whole[:, 2:]) and inner.stride() == (10, 1)


@pytest.mark.parametrize("change", ["order", "gap", "transposed", "storage", "again"])
def test_joined_copies_what_lies_apart(change):
    whole = torch.arange(60.0).view(6, 10)
    one, two, three = whole.split(2)
    parts = {
        "order": [two, one],
        "gap": [one, three],
        "transposed": [whole[:2, :2], whole[2:4, :2].T],
        "storage": [one, two.clone()],
        "again": [one, one],
    }[change]
    found = joined(parts, 0)
    assert torch.equal(found, torch.cat(parts)) and found.data_ptr() != parts[0].data_ptr()
