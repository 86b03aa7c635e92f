"""Many experts on a GPU by the compiled library's expert-major kernels, against the reference.

They stand behind the experts op alone. Traps covered: experts with no rows, one or more than a
tile, ranks that differ by expert and projection, experts without a delta, empty slots, columns that
end inside a slab, several passes over the tokens, unwritten memory (conftest poisons it), routing
that changes under a captured graph.
"""

from __future__ import annotations

import pytest
import torch

import reference
from flexmore_kernels import backend, ops, testing
from flexmore_kernels.testing import Case, assert_accurate_draws, assert_same

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="CUDA kernels")
NARROW = (torch.bfloat16, torch.float16)
MIXED = ((16, 32, 0), (32, 0, 16), (0, 0, 0), 5, 24, (0, 16, 32))

CASES = (
    Case("one_tile", "every expert has a few rows", 40, 64, 128, (0, *[16] * 11), 4),
    Case("odd_sizes", "the last slab is cut, tiles not full", 333, 200, 328, (0, *[13] * 39), 8),
    Case("ranks", "of every size up to 32, each projection its own", 500, 128, 264,
         (0, *MIXED, *MIXED), 5),
    Case("up_to_32", "the middle size of tiles", 300, 64, 136, (0, *[32, 7, 17] * 5), 3),
    Case("hundreds", "more experts than rows a block has", 100, 72, 80, (0, *[16] * 299), 8),
    Case("long", "two passes over the tokens", 9000, 64, 72, (0, *[16] * 9), 2),
    Case("one_expert", "all tokens on one of many: one long segment", 2000, 64, 128,
         (0, *[8] * 19), 1, "one"),
    Case("empty_slots", "skipped, nothing read beyond", 70, 64, 128, (0, *[16] * 11), 3,
         "empty_slots"),
    Case("no_down", "no delta in the down projection", 50, 64, 128, (0, *[(16, 8, 0)] * 9), 2),
)  # fmt: skip


def make(case: Case, dtype: torch.dtype):
    x = testing.make_x(case.tokens, case.hidden, "cuda", dtype)
    indices, weights = testing.make_routing(case, "cuda", dtype)
    return x, indices, weights, *testing.make_experts(case, "cuda", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", NARROW, ids=str)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_many_experts(case, dtype):
    ours, truth, same = [], [], []
    for index in range(8):
        inputs = make(case, dtype)
        if index >= 6:
            assert backend.library("expert_major", inputs[0]) is not None
            ours.append(ops.experts(*inputs))
            assert_same(ops.experts(*inputs), ours[-1])
        truth.append(reference.experts(*testing.to_float64(inputs)))
        same.append(reference.experts(*inputs))
    assert_accurate_draws(ours, truth, same, name="y")


@pytest.mark.gpu
def test_routing_changes_under_a_captured_graph():
    case = CASES[1]
    x, indices, weights, *sides = make(case, torch.bfloat16)
    ops.experts(x, indices, weights, *sides)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ops.experts(x, indices, weights, *sides)
    for _ in range(2):
        again = testing.make_routing(case, "cuda", torch.bfloat16)
        indices.copy_(again[0])
        weights.copy_(again[1])
        graph.replay()
        assert_same(captured, ops.experts(x, indices, weights, *sides))
