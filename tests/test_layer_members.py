"""Experts joining and leaving one live layer.

Traps: stacked factors in another order, a router row under another expert's number, a prepared copy
or kept projection of before, parameters that stop learning, a refusal that has changed something.
"""

from __future__ import annotations

import copy

import pytest
import torch

from flexmore_kernels import layer_members
from flexmore_kernels.testing import assert_accurate, assert_same
from tests.members import (
    NEW,
    RANKS,
    ROUTERS,
    D,
    F,
    M,
    check_unchanged,
    make_layer,
    snapshot,
    weights_of,
)  # fmt: skip


@pytest.mark.parametrize("new", NEW)
@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("stacked", [False, True])
def test_add_and_remove_a_layers_expert(device, stacked, kind, new):
    layer = make_layer(device, stacked_factors=stacked, **ROUTERS[kind])
    x, before = torch.randn(40, D, device=device), snapshot(layer)
    parameters = dict(layer.named_parameters())
    y, routing = layer(x, return_routing=True)
    weights = weights_of(NEW[new])
    given = {"embedding": torch.randn(M)} if kind == "projected" else {"router_row": torch.randn(D)}
    assert layer_members.add_expert(layer, weights, **given) == 4
    assert layer.expert_ranks == (*RANKS, NEW[new]) and layer.num_experts == 5
    after = layer.state_dict()
    for name, tensor in before.items():
        assert_same(after[name][: len(tensor)], tensor, name)  # rows are added behind the others
    if not stacked:
        own = dict(layer.named_parameters())
        assert all(own[n] is p for n, p in parameters.items() if n.startswith("experts."))
    for side, entry in zip(("gate", "up", "down"), weights, strict=True):
        kinds = {"": entry} if isinstance(entry, torch.Tensor) else {}
        kinds = dict(zip(("_a", "_b"), entry, strict=True)) if isinstance(entry, tuple) else kinds
        for end, tensor in kinds.items():
            assert_same(after[f"experts.4.{side}_proj{end}.weight"], tensor.to(device))
    # Excluded, it takes no part; what it computes is checked by the layer of the same state_dict.
    mask = torch.tensor([True] * 4 + [False], device=device)
    masked, theirs = layer(x, expert_mask=mask, return_routing=True)
    assert_same(theirs.indices, routing.indices.where(routing.indices < 4, 5))
    wide = copy.deepcopy(layer).cpu().double()
    assert_accurate(masked, wide(x.cpu().double(), expert_mask=mask.cpu()), y)
    twin = make_layer(device, layer.expert_ranks, stacked_factors=stacked, **ROUTERS[kind])
    twin.load_state_dict(layer.state_dict())
    assert_same(layer(x), twin(x))
    layer_members.remove_expert(layer, 4)
    check_unchanged(layer, before)
    assert layer.state_dict().keys() == before.keys()
    assert_same(layer(x), y)


@pytest.mark.parametrize("stacked", [False, True])
def test_what_learns_still_learns(stacked):
    layer = make_layer(stacked_factors=stacked, dtype=torch.bfloat16)
    for parameter in layer.experts._modules["0"].parameters():
        parameter.requires_grad_(False)
    layer.gate.weight.requires_grad_(False)
    layer_members.add_expert(layer, weights_of(4), torch.randn(D))
    layer_members.rerank_expert(layer, 2, 3)
    flags = {name: p.requires_grad for name, p in layer.named_parameters()}
    frozen = {name for name, learns in flags.items() if not learns}
    assert frozen == {f"experts.0.{p}_proj.weight" for p in ("gate", "up", "down")} | {
        "gate.weight"
    }
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}
    layer(torch.randn(3, D, dtype=torch.bfloat16)).sum().backward()
    layer.requires_grad_(False)
    layer_members.add_expert(layer, weights_of(0), torch.randn(D))
    assert not any(p.requires_grad for p in layer.parameters())


@pytest.mark.parametrize("stacked", [False, True])
def test_a_prepared_layer_stays_prepared(stacked):
    layer = make_layer(ranks=(0, 3, 5, 0), stacked_factors=stacked).requires_grad_(False)
    layer.prepare([1, 2])
    layer_members.add_expert(layer, weights_of(4), torch.randn(D))
    layer_members.remove_expert(layer, 1)
    assert layer._modules["prepared"].choice == [1]  # what was expert 2
    x = torch.randn(70, D)
    y = layer(x)
    layer.unprepare()
    assert_accurate(y, layer.double()(x.double()), layer.float()(x))


def test_kept_rows_are_those_of_now():
    layer = make_layer(**ROUTERS["projected"]).requires_grad_(False)
    layer.gate.keep(True)
    layer(torch.randn(3, D))
    layer_members.add_expert(layer, weights_of(4), embedding=torch.randn(M))
    kept = layer.gate.rows().clone()
    assert kept.shape == (5, D)
    layer.gate.keep(False)
    assert_same(kept, layer.gate.rows())


@pytest.mark.parametrize("rank", [0, 2, (1, 4, 0), ("full", 0, 3)])
@pytest.mark.parametrize("stacked", [False, True])
def test_rerank_touches_one_expert(stacked, rank):
    layer = make_layer(stacked_factors=stacked)
    before = snapshot(layer)
    layer_members.rerank_expert(layer, 1, rank)
    assert layer.expert_ranks == (0, rank, *RANKS[2:])
    check_unchanged(layer, {n: t for n, t in before.items() if "experts.1." not in n})
    truth = (
        before["experts.1.up_proj_b.weight"].double()
        @ before["experts.1.up_proj_a.weight"].double()
    )
    after = layer.state_dict()
    if rank == 0:
        full = before["experts.0.up_proj.weight"].double() + truth
        assert_same(after["experts.1.up_proj.weight"], full.float())
    elif rank == (1, 4, 0):
        assert_same(after["experts.1.up_proj_a.weight"][:3], before["experts.1.up_proj_a.weight"])
        assert "experts.1.down_proj_a.weight" not in after


def test_shared_expert_and_top_k_follow_the_numbers():
    layer = make_layer(top_k=3, shared_expert=2)
    with pytest.raises(ValueError, match="^expert: got 2, the shared expert"):
        layer_members.remove_expert(layer, 2)
    layer_members.remove_expert(layer, 1)
    assert (layer.shared_expert, layer.top_k) == (1, 2)
    layer_members.remove_expert(layer, 2)
    assert (layer.shared_expert, layer.top_k) == (1, 1)
    assert_same(
        layer(torch.randn(3, D), return_routing=True)[1].indices[:, 0], torch.ones(3).long()
    )
    base_shared = make_layer(ranks=(0, 2), top_k=1, shared_expert=True)
    with pytest.raises(ValueError, match="the last one that the router can select"):
        layer_members.remove_expert(base_shared, 1)


def refusals(layer):
    row, good = torch.randn(D), weights_of(4)
    yield {"weights": good}, "^router_row: got None.*'zeros', 'mean'"
    yield {"weights": good, "router_row": "keep"}, "^router_row: got 'keep'"
    yield {"weights": good, "router_row": torch.randn(D + 1)}, "^router_row: got shape"
    yield {"weights": good, "router_row": row * float("nan")}, "^router_row: holds NaN"
    yield {"weights": good, "router_row": row, "embedding": torch.randn(M)}, "^embedding: got one"
    yield {"weights": good, "router_row": row, "bias": torch.zeros(())}, "^bias: got one"
    yield {"weights": good[:2], "router_row": row}, "^weights: got 2"
    yield {"weights": (good[0], None, good[0]), "router_row": row}, "^down_proj_a: got shape"
    yield (
        {"weights": (torch.full((F, D), torch.inf), None, None), "router_row": row},
        "^gate_proj: ",
    )
    yield {"weights": weights_of(D + 1), "router_row": row}, "^gate_proj_a: got rank 17"


def test_a_refused_layer_is_unchanged():
    layer = make_layer()
    before = snapshot(layer)
    for arguments, words in refusals(layer):
        with pytest.raises((ValueError, TypeError), match=words):
            layer_members.add_expert(layer, **arguments)
    for expert in (0, 4, -1):
        with pytest.raises(ValueError, match="^expert: got"):
            layer_members.remove_expert(layer, expert)
    with pytest.raises(ValueError, match="^rank: got 17"):
        layer_members.rerank_expert(layer, 1, 17)
    half = make_layer().half()
    with pytest.raises(ValueError, match="^weights: holds NaN or Inf as float16"):
        big = torch.full((F, D), 1e5)
        layer_members.add_expert(half, (big, None, None), torch.randn(D))
    projected = make_layer(**ROUTERS["projected"])
    with pytest.raises(ValueError, match=r"^embedding: got None; accepted: \(5,\)"):
        layer_members.add_expert(projected, weights_of(4))
    with pytest.raises(ValueError, match=r"^embedding: got shape \(6,\); accepted: \(5,\)"):
        layer_members.add_expert(projected, weights_of(4), embedding=torch.randn(6))
    with pytest.raises(ValueError, match="^router_row: got one"):
        layer_members.add_expert(projected, weights_of(4), torch.randn(D), torch.randn(M))
    check_unchanged(layer, before)
    assert layer.expert_ranks == RANKS and layer.state_dict().keys() == before.keys()


def test_row_by_name():
    layer = make_layer(shared_expert=True)
    rows = layer.gate.weight.detach().clone()
    layer_members.add_expert(layer, weights_of(4), "mean")
    assert_accurate(layer.gate.weight[4], rows[1:].double().mean(0), rows[1:].mean(0))
    layer_members.add_expert(layer, weights_of(4), "zeros")
    assert not bool(layer.gate.weight[5].any())


@pytest.mark.parametrize("scoring", ["sigmoid", "unit", "softmax"])
def test_where_it_is_not_selected_old_outputs_stay(scoring):
    """Of a softmax to rounding, where the logit is so far below that exp of the difference is 0."""
    layer, x = make_layer(scoring=scoring), torch.rand(40, D) + 0.1
    y, before = layer(x, return_routing=True)
    layer_members.add_expert(layer, weights_of(4), torch.full((D,), -1e3))
    again, after = layer(x, return_routing=True)
    assert_same(after.indices, before.indices)
    if scoring != "softmax":
        assert_same(after.weights, before.weights)
        assert_same(again, y)
        return
    truth = before.logits.double().softmax(-1).gather(1, before.indices)
    assert_accurate(after.weights, truth, before.weights)
    assert_accurate(again, layer.double()(x.double()), y)


def test_a_softmax_gives_the_newcomer_its_share():
    """p_e shrinks by 1 - p_new, where the newcomer may be selected and is not."""
    layer, x = make_layer(top_k=1), torch.rand(40, D) + 0.1
    with torch.no_grad():
        layer.gate.weight[1] += 1  # selected by every token
        before = layer(x, return_routing=True)[1]
        layer_members.add_expert(layer, weights_of(4), "zeros")
        after = layer(x, return_routing=True)[1]
    assert_same(after.indices, before.indices)
    assert not bool(after.logits[:, 4].any())
    share = after.logits.double().softmax(-1)[:, 4:]
    assert_accurate(after.weights, before.weights.double() * (1 - share))
