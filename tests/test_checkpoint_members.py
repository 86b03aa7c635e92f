"""Experts joining and leaving checkpoints, against the same on the live model, to the bit.

Traps: cards that stay behind when experts move up, rows of a projected router, a shared expert's
number, a directory left half written, work of another expert taken up, zero padding for plain
readers, a refusal after hours.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels import checkpoint, checkpoint_edit, membership, shared_weights
from flexmore_kernels import checkpoint_members as members
from flexmore_kernels.adapter_base import BaseCheckpoint
from flexmore_kernels.base_fingerprint import of_checkpoint
from flexmore_kernels.cards import Card
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.expert import Expert
from flexmore_kernels.testing import assert_accurate, assert_same
from tests.members import (
    RANKS,
    ROUTERS,
    D,
    L,
    M,
    an_expert,
    make_checkpoint,
    make_dense,
    same_checkpoint,
    tensors_of,
)  # fmt: skip


def beside(directory, rank=4, **options):
    """An expert of the checkpoint's base, with what its router needs."""
    config = read_layout(directory).config
    if config.get("router") == "projected":
        options = {"embedding": torch.randn(M), **options}
    else:
        options = {"router_rows": torch.randn(L, D), **options}
    return an_expert(rank, base=of_checkpoint(directory), **options)


@pytest.mark.parametrize("kind", ROUTERS)
@pytest.mark.parametrize("shared", [False, 2])
def test_checkpoints_and_live_models_take_the_same_steps(tmp_path, kind, shared):
    options = {**ROUTERS[kind], "shared_expert": shared, "experts": [Card(n) for n in "abcd"]}
    start = make_checkpoint(tmp_path / "0", **options, top_k=3)
    model = checkpoint.load_model(start)
    bias = {"router_bias": -torch.rand(L)} if kind == "biased" else {}
    law = beside(start, **bias)
    membership.add_expert(model, law)
    law.save(tmp_path / "law.safetensors")
    layout = members.add(start, tmp_path / "law.safetensors", tmp_path / "1")
    assert layout.notes == () and (tmp_path / "1" / "tokenizer.json").exists()
    same_checkpoint(model, tmp_path / "1")
    membership.rerank_expert(model, "law", (2, "full", 0))
    members.rerank(tmp_path / "1", "law", (2, "full", 0), tmp_path / "2")
    same_checkpoint(model, tmp_path / "2")
    new = beside(start, (0, 3, "full"), name="laws")
    membership.replace_expert(model, 3, new)
    members.replace(tmp_path / "2", 3, new, tmp_path / "3")
    same_checkpoint(model, tmp_path / "3")
    membership.tag_expert(model, "laws", owner="")
    members.tag(tmp_path / "3", "laws", owner="")
    membership.remove_expert(model, 1)
    checkpoint_edit.drop(tmp_path / "3", [1], tmp_path / "4")
    same_checkpoint(model, tmp_path / "4")
    assert members.list_experts(tmp_path / "4") == membership.list_experts(model)
    assert [one.name for one in members.list_experts(tmp_path / "4")][-2:] == ["laws", "law"]
    assert model.config.shared_expert == (shared and 1)


def test_an_experts_life_leaves_no_trace(tmp_path):
    start = make_checkpoint(tmp_path / "0")
    members.add(start, beside(start), tmp_path / "1")
    checkpoint_edit.drop(tmp_path / "1", ["law"], tmp_path / "2")
    one, other = tensors_of(start), tensors_of(tmp_path / "2")
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert_same(other[name], tensor, name)
    before, after = ((d / "config.json").read_text() for d in (start, tmp_path / "2"))
    wanted, found = json.loads(before), json.loads(after)
    assert found.pop("experts", None) is None and found == wanted


@pytest.mark.parametrize("compat", [False, True])
def test_compat_is_padded_for_plain_readers(tmp_path, compat):
    start = make_checkpoint(tmp_path / "0", (0, 3, 0))
    layout = members.add(start, beside(start, (4, 2, 1)), tmp_path / "1", compat=compat)
    assert layout.layer_ranks == ((0, 3, 0, (4, 2, 1)),) * L
    config = json.loads((tmp_path / "1" / "config.json").read_text())
    assert config["expert_ranks"] == [0, 3, 0, 4]
    assert ("layer_expert_ranks" in config) == (not compat)
    assert config["experts"][3] == {"name": "law", "owner": "A. Owner", "licence": "CC0"}


def test_full_size_experts_join_a_flex_olmo(tmp_path):
    whole = make_checkpoint(tmp_path / "whole", (0, 0))
    checkpoint_edit.densify(whole, tmp_path / "olmo", fused=True)
    assert members.add(tmp_path / "olmo", beside(whole, 0), tmp_path / "1").kind == "flex_olmo"
    assert members.add(tmp_path / "olmo", beside(whole, 2), tmp_path / "2").kind == "flexmore"


def test_a_kill_costs_nothing_and_another_expert_is_refused(tmp_path, monkeypatch):
    start = make_checkpoint(tmp_path / "0")
    law, other = beside(start), beside(start)
    read, real = [], Expert.layer

    def stop(self, layer):
        read.append(layer)
        if read == [0, 0, 1]:  # the first is the check
            raise KeyboardInterrupt
        return real(self, layer)

    with monkeypatch.context() as patch:
        patch.setattr(Expert, "layer", stop)
        with pytest.raises(KeyboardInterrupt):
            members.add(start, law, tmp_path / "1")
    assert not (tmp_path / "1").exists()
    with pytest.raises(ValueError, match="^fingerprint: .* holds other work"):
        members.add(start, other, tmp_path / "1")
    read.clear()
    with monkeypatch.context() as patch:
        patch.setattr(Expert, "layer", lambda self, layer: read.append(layer) or real(self, layer))
        members.add(start, law, tmp_path / "1")
    assert read == [0, 1]
    members.add(start, law, tmp_path / "2")
    one, two = tensors_of(tmp_path / "1"), tensors_of(tmp_path / "2")
    assert all(torch.equal(one[name], two[name]) for name in two) and one.keys() == two.keys()


def test_other_weights_are_merged_on_request(tmp_path):
    start, dense = make_checkpoint(tmp_path / "0"), make_dense(tmp_path / "law", seed=1)
    with pytest.warns(UserWarning, match="law does not say which base"):
        members.add(start, dense, tmp_path / "1", router_rows="mean", merge_shared=dense)
    before, new, after = map(tensors_of_any, (start, dense, tmp_path / "1"))
    for name, tensor in before.items():
        if not shared_weights.is_shared(name):
            assert_same(after[name][: len(tensor)], tensor, name)
            continue
        truth = 0.8 * tensor.double() + 0.2 * new[name].double()  # four experts before
        assert_accurate(after[name], truth, name=name)
    model = checkpoint.load_model(start)
    with pytest.warns(UserWarning):
        membership.add_expert(
            model, Expert.from_dense(dense), router_rows="mean", merge_shared=dense
        )
    same_checkpoint(model, tmp_path / "1")


def tensors_of_any(directory):
    return checkpoint.read_tensors(BaseCheckpoint(directory).layout)


def test_refused_before_anything_is_written(tmp_path):
    start = make_checkpoint(tmp_path / "0", shared_expert=2, top_k=1)
    law, out = beside(start), tmp_path / "out"
    without = dataclasses.replace(law, router_rows=None)
    named = dataclasses.replace(law, card=Card("expert-1"))
    foreign = dataclasses.replace(law, base="f" * 16)
    for expert, options, words in (
        (foreign, {}, f"trained beside base {'f' * 16}, .* has base {law.base}"),
        (without, {}, "^router_rows: got None"),
        (law, {"router_rows": "keep"}, "^router_rows: got 'keep'"),
        (law, {"embedding": torch.zeros(M)}, "^embedding: got one"),
        (make_dense(tmp_path / "7"), {"router_rows": "mean"}, "got the name '7'"),
        (named, {}, "^name: got 'expert-1', which another expert has"),
        (dataclasses.replace(law, router_bias=torch.zeros(L)), {}, "^bias: got one"),
        (law, {"merge_shared": make_wide(tmp_path / "wide")}, "^merge_shared: "),
    ):
        with pytest.raises(ValueError, match=words):
            members.add(start, expert, out, **options)
    with pytest.raises(ValueError, match="^rank: got 17"):
        members.rerank(start, 1, 17, out)
    with pytest.raises(ValueError, match="'base', the base"):
        members.replace(start, "base", law, out)
    with pytest.raises(ValueError, match="^name: got 'expert-3'"):
        members.tag(start, 1, name="expert-3")
    projected = make_checkpoint(tmp_path / "projected", **ROUTERS["projected"])
    for embedding, words in ((None, "got None"), (torch.zeros(M + 1), "got shape")):
        bare = dataclasses.replace(law, router_rows=None, embedding=embedding, base=None)
        with pytest.warns(UserWarning), pytest.raises(ValueError, match=f"^embedding: {words}"):
            members.add(projected, bare, out)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"0", "7", "projected", "wide"}


def make_wide(directory):
    """A dense model of another vocabulary."""
    make_dense(directory)
    path = directory / "model.safetensors"
    tensors = load_file(path)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        tensors[name] = torch.cat([tensors[name], tensors[name][:1]])
    save_file(tensors, path)
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | {"vocab_size": 12}))
    return directory


def test_tag_changes_config_alone(tmp_path):
    start = make_checkpoint(tmp_path / "0")
    before = (start / "model.safetensors").read_bytes()
    card = members.tag(start, "expert-3", name="law", owner="A. Owner", licence="CC0")
    assert card == Card("law", "A. Owner", "CC0")
    assert members.tag(start, "law", licence="") == Card("law", "A. Owner")
    config = json.loads((start / "config.json").read_text())
    assert config["experts"][3] == {"name": "law", "owner": "A. Owner", "licence": None}
    assert (start / "model.safetensors").read_bytes() == before
    assert [one.layer_ranks for one in members.list_experts(start)] == [
        (rank,) * L for rank in RANKS
    ]
    assert sorted(path.name for path in start.iterdir() if path.suffix == ".tmp") == []
