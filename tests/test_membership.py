"""Experts joining and leaving a live model.

Traps: a refusal that has changed half of the layers, an expert of another base, cards and config
that say something else than the layers, a counter of the old size, weights merged twice.
"""

from __future__ import annotations

import dataclasses
import warnings

import pytest
import torch

import flexmore_kernels as fk
from flexmore_kernels import membership
from flexmore_kernels.base_fingerprint import of_model
from flexmore_kernels.cards import Card
from flexmore_kernels.testing import assert_accurate, assert_same
from tests.members import (
    RANKS,
    ROUTERS,
    D,
    F,
    L,
    M,
    an_expert,
    beside,
    check_unchanged,
    make_model,
    snapshot,
)  # fmt: skip


@pytest.mark.parametrize("kind", ROUTERS)
def test_a_live_model_takes_an_expert_between_two_batches(device, kind):
    model = make_model(device, **ROUTERS[kind], scoring="sigmoid").requires_grad_(False)
    model.prepare()
    ids = torch.randint(0, 11, (2, 6), device=device)
    before, tokens = snapshot(model), model.generate(ids, max_new_tokens=4)
    number = membership.add_expert(model, beside(model))
    mask = torch.tensor([True] * 4 + [False], device=device)
    assert_same(model.generate(ids, max_new_tokens=4, expert_mask=mask), tokens)
    model.generate(ids, max_new_tokens=4)
    after = model.state_dict()
    for name, tensor in before.items():
        assert_same(after[name][: len(tensor)], tensor, name)
    assert (number, model.config.num_experts, model.config.num_experts_per_tok) == (4, 5, 2)
    membership.remove_expert(model, "law")
    assert_same(model.generate(ids, max_new_tokens=4), tokens)
    check_unchanged(model, before)


def test_cards_config_and_list_say_the_same():
    model = make_model()
    assert [m.name for m in membership.list_experts(model)] == [
        "base",
        *(f"expert-{e}" for e in (1, 2, 3)),
    ]
    membership.add_expert(model, beside(model, (2, "full", 0)))
    membership.add_expert(model, dataclasses.replace(beside(model), card=None))
    membership.remove_expert(model, "expert-2")
    card = membership.tag_expert(model, 0, owner="Public", licence="CC0")
    assert card == Card("base", "Public", "CC0")
    membership.tag_expert(model, "law", name="laws", licence="")
    members = membership.list_experts(model)
    assert [m[:4] for m in members] == [
        (0, "base", "Public", "CC0"), (1, "expert-1", None, None), (2, "expert-3", None, None),
        (3, "laws", "A. Owner", None), (4, "expert-5", None, None),
    ]  # fmt: skip
    assert members[3].layer_ranks == ((2, "full", 0),) * L
    assert members[3].parameters == L * (2 * (D + F) + D * F) == members[3].nbytes // 4
    config = fk.FlexMoREConfig.from_dict(model.config.to_dict())
    again = fk.FlexMoREForCausalLM(config)
    again.load_state_dict(model.state_dict())
    assert config.num_experts == model.model.num_experts == 5
    ids = torch.randint(0, 11, (2, 5))
    assert_same(again(ids), model(ids))
    with pytest.raises(ValueError, match="'expert-2', which is not here .any more."):
        membership.remove_expert(model, "expert-2")
    with pytest.raises(ValueError, match="^name: got 'laws', which another expert has"):
        membership.add_expert(model, dataclasses.replace(beside(model), card=Card("laws")))


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("shared", [False, 3])
def test_removed_is_excluded(kind, shared):
    """Opting out of a mixture is opting out of every request."""
    model = make_model(**ROUTERS[kind], shared_expert=shared)
    ids, mask = torch.randint(0, 11, (2, 6)), model.expert_mask(without=["expert-1"])
    with torch.no_grad():
        plain = model(ids, expert_mask=mask)
        truth = model.double()(ids, expert_mask=mask)
        membership.remove_expert(model.float(), "expert-1")
        assert_accurate(model(ids), truth, plain)
    with pytest.raises(ValueError, match="'expert-1', which is not here"):
        model.expert_mask(only=["expert-1"])


def test_replace_and_take():
    model, other = make_model(), make_model(seed=1)
    taken = membership.take_expert(model, 3, card=Card("law"))
    assert taken.base == of_model(model) and taken.layer_ranks() == [RANKS[3]] * L
    rows = [block.mlp.gate.weight.detach().clone() for block in model.model.layers]
    membership.replace_expert(model, 1, taken, router_rows="keep")
    membership.replace_expert(model, 2, dataclasses.replace(taken, card=None))
    names = [m.name for m in membership.list_experts(model)]
    assert names == ["base", "law", "expert-2", "expert-3"]
    for block, row in zip(model.model.layers, rows, strict=True):
        assert_same(block.mlp.gate.weight[:2], row[:2])
        assert_same(block.mlp.gate.weight[2], row[3])
        state = block.mlp.state_dict()
        assert_same(state["experts.1.down_proj.weight"], state["experts.3.down_proj.weight"])
        assert_same(state["experts.2.gate_proj_a.weight"], state["experts.3.gate_proj_a.weight"])
    with pytest.raises(ValueError) as refused:
        membership.replace_expert(other, 1, taken)
    for words in (of_model(model), of_model(other), "expert-3 of a live model", "this model"):
        assert words in str(refused.value)


def test_a_refused_model_is_unchanged():
    model = make_model()
    before, good = snapshot(model), beside(model)
    rows = good.router_rows.clone()
    cases = [
        ((an_expert(base="0" * 16, router_rows=rows),), {}, "was trained beside base 0000"),
        ((dataclasses.replace(good, router_rows=None),), {}, "^router_rows: got None"),
        ((good,), {"router_rows": rows[:1]}, "^router_rows: got 1 rows"),
        ((good,), {"router_rows": torch.cat([rows[:1], rows[:1] * torch.inf])}, "^router_rows: h"),
        ((good,), {"embedding": torch.randn(M)}, "^embedding: got one"),
        ((good,), {"merge_shared": {}}, "^merge_shared: model.embed_tokens.weight"),
        ((dataclasses.replace(good, layers=good.layers[:1], router_rows=None),), {}, "D, F"),
    ]  # fmt: skip
    for arguments, options, words in cases:
        with pytest.raises((ValueError, TypeError), match=words):
            membership.add_expert(model, *arguments, **options)
    with pytest.raises(ValueError, match="^expert: got 'base', the base"):
        membership.remove_expert(model, "base")
    with model.counting(), pytest.raises(ValueError, match="^model: is counting"):
        membership.add_expert(model, good)
    with pytest.warns(UserWarning, match="does not say which base"):
        unknown = dataclasses.replace(good, base=None, router_rows=None)
        with pytest.raises(ValueError, match="^router_rows"):
            membership.add_expert(model, unknown)
    check_unchanged(model, before)
    assert model.config.num_experts == 4 and model.state_dict().keys() == before.keys()


def test_other_weights_are_merged_on_request():
    model, dense = make_model(shared_expert=True), make_model(seed=1)
    before, new = snapshot(model), snapshot(dense)
    embedding = model.model.embed_tokens.weight
    membership.add_expert(model, beside(model), merge_shared=new)
    after = model.state_dict()
    for name, tensor in before.items():
        if ".mlp." in name:
            assert_same(after[name][: len(tensor)], tensor, name)
            continue
        truth = 0.75 * tensor.double() + 0.25 * new[name].double()  # three routed ones before
        assert_same(after[name], truth.float(), name)
    assert model.model.embed_tokens.weight is embedding


def test_a_cast_of_the_base_has_another_fingerprint():
    model = make_model()
    expert = beside(model)
    model.bfloat16()
    with pytest.raises(ValueError, match="A cast of the base"):
        membership.add_expert(model, expert)
    with pytest.warns(UserWarning, match="does not say which base"):
        membership.add_expert(model, dataclasses.replace(expert, base=None))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        membership.rerank_expert(model, "law", 2)
