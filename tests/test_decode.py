"""The forward for few tokens without a gradient: the compiled library's CUDA kernels.

What they are sent is chosen by `schedule` (test_schedule.py); here they run, on a GPU.
"""

from __future__ import annotations

import pytest
import torch

import flexmore_kernels as fk
import reference
from flexmore_kernels import backend, native, ops, testing
from flexmore_kernels.testing import Case, make_experts, make_routing, make_x, to_float64

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not native.cuda_runs_on(), reason="no CUDA code of the library runs here"),
]

RAGGED = (0, 1, 3, (5, 0, 7), (0, 12, 20), (64, 16, 0), (0, 0, 0), 70, (66, 65, 33))
TOKENS = (1, 2, 8, 9, 16, 17, 32, 33, 64)
CASES = (
    Case("even", "whole tiles", 0, 64, 128, (0, 16, 16, 16), 2),
    Case("ragged", "ranks of every alignment, chunks that end anywhere", 0, 72, 200, RAGGED, 4),
    Case("all_experts", "K = E", 0, 136, 72, (0, 8, 24, 5), 4),
    Case("starved", "an expert that nobody chose is not read",
         0, 64, 96, (0, 4, 8, 16), 2, "starved"),
    Case("one", "one expert for all", 0, 64, 96, (0, 4, 8), 1, "one"),
    Case("base", "no factors at all", 0, 64, 96, (0,), 1),
    Case("unequal", "a down factor far longer than its neighbour", 0, 64, 96, (0, 130, 40, 1), 3),
    Case("empty_slots", "tokens without an expert get zeros",
         0, 64, 96, (0, 4, 8), 2, "empty_slots"),
    Case("sixteen", "as many experts as there may be",
         0, 128, 160, (0, *(3 * e for e in range(1, 16))), 5),
    Case("wide", "several blocks of rows of F a multiprocessor", 0, 640, 17408, (0, 40, 16), 2),
    Case("tall", "several blocks of rows of D a multiprocessor", 0, 6144, 96, (0, 40, 16), 2),
)  # fmt: skip


@pytest.fixture(autouse=True)
def _only_these_kernels(monkeypatch):
    """A forward that would not be theirs fails."""

    def refuse(*_):
        raise AssertionError("not sent to the kernels for few tokens")

    monkeypatch.setattr(
        backend.kernels("experts", torch.empty(1, device="cuda")), "forward", refuse
    )


def make(case: Case, tokens: int, dtype: torch.dtype) -> tuple:
    case = case._replace(tokens=tokens)
    x = make_x(tokens, case.hidden, "cuda", dtype)
    return x, *make_routing(case, "cuda", dtype), *make_experts(case, "cuda", dtype)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16), ids=str)
@pytest.mark.parametrize("tokens", TOKENS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_decode(case, tokens, dtype):
    given = make(case, tokens, dtype)
    y = ops.experts(*given)
    exact, same = reference.experts(*to_float64(given)), reference.experts(*given)
    testing.assert_accurate(y, exact, same)
    assert torch.equal(y, ops.experts(*given))


@pytest.mark.parametrize("case", CASES[:3], ids=lambda case: case.name)
def test_a_token_gets_the_same_bits_in_any_company(case):
    x, indices, weights, *sides = make(case, 64, torch.bfloat16)
    y = ops.experts(x, indices, weights, *sides)
    for first, last in ((0, 1), (3, 8), (5, 20), (11, 40), (20, 64)):
        some = slice(first, last)
        assert torch.equal(y[some], ops.experts(x[some], indices[some], weights[some], *sides))


def test_the_order_of_a_sum_does_not_depend_on_other_tokens():
    """Two chunks of a down factor that cancel, between them another's or not."""
    case = Case("long", "", 0, 64, 128, (0, 128, 128, 128), 2)
    x, _, weights, *sides = make(case, 2, torch.bfloat16)
    a, b = sides[2][1]
    a[64:], b[:, 64:] = a[:64], -b[:, :64]
    b.mul_(2**18)
    ids = torch.tensor([[1, 3], [2, 0]], device="cuda")
    alone = ops.experts(x[:1], ids[:1], weights[:1], *sides)
    assert torch.equal(alone, ops.experts(x, ids, weights, *sides)[:1])


@pytest.mark.parametrize("side", (0, 1), ids=("gate", "up"))
@pytest.mark.parametrize("which", (0, 1), ids=("a", "b"))
def test_what_is_infinite_stays_with_who_chose_it(side, which):
    case = Case("some", "", 0, 64, 128, (0, 16, 70, 8), 2)
    x, ids, weights, *sides = make(case, 20, torch.bfloat16)
    ids[:] = torch.tensor([1, 3], device="cuda")
    ids[7, 0] = 2
    sides[side][2][which].fill_(float("inf"))
    y = ops.experts(x, ids, weights, *sides)
    others = torch.arange(20, device="cuda") != 7
    assert y[others].isfinite().all() and not y[7].isfinite().all()


def layer(ranks=(0, 16, 7, 64, 8), **options) -> fk.FlexMoRE:
    options = {"device": "cuda", "dtype": torch.bfloat16, **options}
    made = fk.FlexMoRE(256, 512, ranks, 3, **options)
    for parameter in made.parameters():
        parameter.data.normal_(std=0.1)
    return made.requires_grad_(False)


def run(made: fk.FlexMoRE, x: torch.Tensor) -> torch.Tensor:
    """The layer's formula in eager PyTorch with the routing that the layer chose."""
    y, routing = made(x, return_routing=True)
    sides = [made.experts.projection(f"{name}_proj") for name in ("gate", "up", "down")]
    given = (x, routing.indices, routing.weights, *sides)
    exact, same = reference.experts(*to_float64(given)), reference.experts(*given)
    testing.assert_accurate(y, exact, same)
    return y


@pytest.mark.parametrize("stacked", (False, True))
def test_a_graph_is_replayed_with_other_tokens_and_routing(stacked):
    made = layer(stacked_factors=stacked)
    x = torch.zeros(16, 256, device="cuda", dtype=torch.bfloat16)
    made(x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        x.mul_(1)  # a kernel, then
        buffer = torch.zeros_like(x)  # what may be a memset before the first launch
        y = made(made(x) + buffer)
    for _ in range(5):
        x.normal_()
        graph.replay()
        assert torch.equal(y, made(made(x)))


def test_a_layer_after_another_and_weights_that_change_between():
    made, x = layer(), make_x(16, 256, "cuda", torch.bfloat16)
    first = run(made, x)
    for _ in range(20):
        base = made.experts[0].gate_proj.weight
        pair = made.experts[3].up_proj_a.weight
        base.data.copy_(torch.randn_like(base) * 0.1)
        torch.mm(
            torch.randn(64, 64, device="cuda", dtype=x.dtype), pair.data.clone(), out=pair.data
        )
        pair.data.div_(pair.data.norm() / 10)
        changed = made(x)
        torch.cuda.synchronize()
        assert torch.equal(changed, made(x))
    assert not torch.equal(first, changed)
    state = {name: torch.randn_like(value) * 0.1 for name, value in made.state_dict().items()}
    made.load_state_dict(state, assign=True)
    run(made, x)


def test_shapes_that_are_not_served_take_the_other_path(monkeypatch):
    monkeypatch.undo()
    for ranks, hidden, dtype in (
        ((0, 0, 8), 64, torch.bfloat16),
        ((0, 8), 66, torch.bfloat16),
        ((0, 8), 64, torch.float32),
        ((0, *[4] * 16), 64, torch.float16),
    ):
        case = Case("other", "", 5, hidden, 96, ranks, 2)
        given = make(case, 5, dtype)
        exact, same = reference.experts(*to_float64(given)), reference.experts(*given)
        testing.assert_accurate(ops.experts(*given), exact, same)


@pytest.mark.parametrize("scoring", ("softmax", "topk_softmax", "sigmoid", "unit"))
@pytest.mark.parametrize("norm", (False, True))
@pytest.mark.parametrize("tokens, hidden, experts", [(1, 4096, 7), (64, 72, 32), (5, 2056, 9)])
def test_routing_from_x_as_from_its_logits(tokens, hidden, experts, norm, scoring):
    x, weight = make_x(tokens, hidden, "cuda", torch.bfloat16), make_x(experts, hidden, "cuda")
    weight = (weight / hidden**0.5).bfloat16()
    mask = torch.rand(tokens, experts, device="cuda") < 0.7
    options = {"top_k": min(5, experts), "norm_topk_prob": norm, "scoring": scoring}
    for limits in ({}, {"bias": torch.randn(experts - 1, device="cuda"), "mask": mask}):
        found = ops.topk_route(x, weight, **options, **limits)
        testing.assert_accurate(found.logits, x.double() @ weight.double().T, x @ weight.T)
        again = ops.topk_route(found.logits, **options, **limits)
        assert torch.equal(found.indices, again.indices)
        torch.testing.assert_close(found.weights, again.weights, rtol=1e-6, atol=1e-7)


def test_routing_of_a_token_with_nan_or_without_an_expert():
    x, weight = make_x(4, 64, "cuda", torch.bfloat16), make_x(5, 64, "cuda", torch.bfloat16)
    x[1, 3] = float("nan")
    mask = torch.ones(4, 5, dtype=torch.bool, device="cuda")
    mask[2] = False
    found = ops.topk_route(x, weight, top_k=3, mask=mask)
    assert (found.indices[1:3] == 5).all() and (found.weights[1:3] == 0).all()
    assert (found.indices[[0, 3]] < 5).all()
