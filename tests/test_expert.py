"""One expert apart from a mixture: its file, its sources, the fingerprint of its base.

Traps: a fingerprint that depends on how a base is stored, or not on its last bit; a file of another
kind taken for an expert's; an adapter's scale lost; a delta taken in the dtype of the weights.
"""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from flexmore_kernels import base_fingerprint, checkpoint, checkpoint_edit
from flexmore_kernels.adapter_import import import_adapters
from flexmore_kernels.cards import Card
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.expert import Expert, Revised, open_expert
from flexmore_kernels.expert_file import ExpertFile
from flexmore_kernels.expert_sources import CheckpointSource, DenseSource
from flexmore_kernels.testing import assert_accurate, assert_same, tensors
from tests.members import (
    RANKS,
    D,
    F,
    L,
    M,
    an_expert,
    make_checkpoint,
    make_dense,
    make_model,
    weights_of,
)  # fmt: skip


def same_expert(one, other):
    for name in ("hidden_size", "intermediate_size", "num_layers", "card", "base"):
        assert getattr(one, name) == getattr(other, name), name
    assert one.layer_ranks() == other.layer_ranks()
    for name in ("layers", "router_rows", "router_bias", "embedding"):
        mine, theirs = (tensors([getattr(x, name)]) for x in (one, other))
        for a, b in zip(mine, theirs, strict=True):
            assert_same(a, b, name)


@pytest.mark.parametrize("rank", [0, 3, (2, 0, "full"), (0, 0, 0)])
def test_saved_and_loaded(tmp_path, rank):
    given = {"base": "0123456789abcdef", "embedding": torch.randn(M), "router_bias": -torch.rand(L)}
    expert = an_expert(rank, **given, router_rows=torch.randn(L, D).bfloat16())
    expert.save(tmp_path / "law.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["law.safetensors"]
    same_expert(Expert.load(tmp_path / "law.safetensors"), expert)
    bare = dataclasses.replace(an_expert(rank), card=None)
    bare.save(tmp_path / "law.safetensors")
    same_expert(Expert.load(tmp_path / "law.safetensors"), bare)
    assert expert.mark != bare.mark == dataclasses.replace(bare, origin="elsewhere").mark


def rewritten(path, change=None, about=None):
    """The file with other tensors, or another description."""
    with safe_open(path, framework="pt") as opened:
        known = json.loads(opened.metadata()["flexmore_expert"])
    stored = load_file(path)
    if change is not None:
        change(stored)
    known |= about or {}
    save_file(stored, path, {"flexmore_expert": json.dumps(known)})


@pytest.mark.parametrize(
    ("change", "about", "words"),
    [
        (None, {"form": 2}, "no expert of form 1"),
        (None, {"num_layers": 0}, "num_layers: got 0"),
        (None, {"num_layers": 1}, "layers.1.down_proj_a.weight is extra"),
        (None, {"hidden_size": 8}, "gate_proj_a: got shape"),
        (None, {"base": 3}, "base is 3"),
        (None, {"card": {"name": "a,b"}}, "card: got the name 'a,b'"),
        (lambda t: t.pop("layers.0.up_proj_b.weight"), None, "layers.0.up_proj_a.weight together"),
        (lambda t: t.update(more=torch.zeros(1)), None, "more is extra"),
        (lambda t: t["layers.1.up_proj_a.weight"].fill_(torch.nan), None, "holds NaN"),
        (lambda t: t.update(router_rows=torch.zeros(1, D)), None, "router_rows: got shape"),
    ],
)
def test_a_bad_file_is_refused(tmp_path, change, about, words):
    path = tmp_path / "law.safetensors"
    an_expert(3).save(path)
    rewritten(path, change, about)
    with pytest.raises((ValueError, TypeError), match=words):
        Expert.load(path)


def test_what_is_no_file_of_an_expert(tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        ExpertFile(tmp_path / "none")
    (tmp_path / "text").write_text("text, and no more than that")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        ExpertFile(tmp_path / "text")
    save_file({"a": torch.zeros(1)}, tmp_path / "other")
    with pytest.raises(ValueError, match="no expert of form 1"):
        ExpertFile(tmp_path / "other")


def test_an_expert_is_checked():
    for weights, words in (
        ((torch.zeros(F, D),) * 3, r"^layers\[0\]: down_proj: got shape"),
        (weights_of(0)[:2], r"^layers\[0\]: weights: got 2"),
        ((torch.full((F, D), torch.nan), None, None), r"^layers\[0\]: gate_proj: holds NaN"),
    ):
        with pytest.raises((ValueError, TypeError), match=words):
            Expert(D, F, [weights])
    with pytest.raises(ValueError, match="^layers: got none"):
        Expert(D, F, [])
    with pytest.raises(ValueError, match="^router_rows: got shape"):
        an_expert(router_rows=torch.zeros(D))


@pytest.mark.parametrize("kind", [{}, {"expert_bias": True}, {"router": "projected"}])
def test_from_a_checkpoint(tmp_path, kind):
    sizes = {"domain_embedding_size": M} if "router" in kind else {}
    directory = make_checkpoint(tmp_path / "mixture", **kind, **sizes)
    stored = checkpoint.read_tensors(read_layout(directory))
    expert = Expert.from_checkpoint(directory, 3)
    assert expert.card is None and expert.layer_ranks() == [RANKS[3]] * L
    mlp = "model.layers.1.mlp."
    assert_same(expert.layers[1][2], stored[f"{mlp}experts.3.down_proj.weight"])
    assert_same(expert.layers[1][0][0], stored[f"{mlp}experts.3.gate_proj_a.weight"])
    assert expert.layers[1][1] is None
    if "router" in kind:
        assert expert.router_rows is None
        assert_same(expert.embedding, stored["model.layers.0.mlp.gate.domain_embeddings"][3])
    else:
        assert_same(expert.router_rows[1], stored[f"{mlp}gate.weight"][3])
    if "expert_bias" in kind:
        assert_same(expert.router_bias[1], stored[f"{mlp}gate.expert_bias"][2])
    named = Expert.from_checkpoint(directory, "expert-1", card=Card("law"))
    assert named.card == Card("law") and named.origin.startswith("expert-1 of ")
    with pytest.raises(ValueError, match="^expert: got 0, the base of"):
        CheckpointSource(directory, 0)


def test_the_row_of_a_shared_expert_was_never_trained(tmp_path):
    directory = make_checkpoint(tmp_path / "mixture", shared_expert=2)
    assert Expert.from_checkpoint(directory, 2).router_rows is None
    assert Expert.from_checkpoint(directory, 1).router_rows is not None


def test_one_base_has_one_fingerprint(tmp_path):
    dense = make_dense(tmp_path / "dense")
    found = base_fingerprint.of_checkpoint(dense)
    assert len(found) == base_fingerprint.DIGITS and int(found, 16) >= 0
    model = make_model(ranks=(0,))  # the dense one's weights
    assert base_fingerprint.of_model(model) == found
    wide = make_model(seed=3)
    for projection in ("gate", "up", "down"):
        for mine, theirs in zip(wide.model.layers, model.model.layers, strict=True):
            name = f"{projection}_proj"
            with torch.no_grad():
                mine.mlp.experts.full(name)[0].copy_(theirs.mlp.experts.full(name)[0])
    mixture = tmp_path / "mixture"
    checkpoint.save_checkpoint(mixture, wide.state_dict(), wide.config.to_dict())
    checkpoint_edit.densify(mixture, tmp_path / "fused", fused=True)
    for one in (mixture, tmp_path / "fused", read_layout(mixture)):
        assert base_fingerprint.of_checkpoint(one) == found
    assert base_fingerprint.of_model(wide) == found
    with torch.no_grad():
        last = wide.model.layers[1].mlp.experts.full("down_proj")[0]
        last[-1, -1] = torch.nextafter(last[-1, -1], torch.tensor(torch.inf))
    assert base_fingerprint.of_model(wide) != found
    assert base_fingerprint.of_model(model.double()) != found  # a cast: other bits


def test_a_dense_model_is_a_full_size_expert_or_its_difference(tmp_path):
    base, dense = make_dense(tmp_path / "base"), make_dense(tmp_path / "law", seed=1)
    whole = Expert.from_dense(dense)
    assert (whole.card, whole.base) == (Card("law"), None)
    assert whole.layer_ranks() == [0] * L and whole.router_rows is None
    stored = load_file(dense / "model.safetensors")
    assert_same(whole.layers[1][2], stored["model.layers.1.mlp.down_proj.weight"])
    cut = Expert.from_dense(dense, (3, "full", 0), base=base)
    assert cut.base == base_fingerprint.of_checkpoint(base)
    assert cut.layer_ranks() == [(3, "full", 0)] * L
    assert_same(cut.layers[0][1], stored["model.layers.0.mlp.up_proj.weight"])
    before = load_file(base / "model.safetensors")
    name = "model.layers.0.mlp.gate_proj.weight"
    u, s, vt = torch.linalg.svd(stored[name].double() - before[name].double(), full_matrices=False)
    root = s[:3].sqrt()
    plain = (u[:, :3] * root).float() @ (root[:, None] * vt[:3]).float()
    a, b = cut.layers[0][0]
    assert_accurate(b @ a, (u[:, :3] * s[:3]) @ vt[:3], plain)
    with pytest.raises(ValueError, match="^base: got None"):
        DenseSource(dense, 3)
    with pytest.raises(ValueError, match="^rank: got 17"):
        DenseSource(dense, 17, base=base)


def make_adapter(directory, modules, rank=4):
    """A LoRA as PEFT writes it; that PEFT computes what we do is in test_adapters.py."""
    directory.mkdir()
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 10, "target_modules": modules}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(L):
        for module in modules:
            place = "self_attn" if module == "q_proj" else "mlp"
            out, width = {"q_proj": (D, D), "down_proj": (D, F)}.get(module, (F, D))
            name = f"base_model.model.model.layers.{layer}.{place}.{module}.lora_"
            tensors[f"{name}A.weight"] = torch.randn(rank, width)
            tensors[f"{name}B.weight"] = torch.randn(out, rank)
    save_file(tensors, directory / "adapter_model.safetensors")
    return directory


def test_an_adapter_is_what_the_import_makes_of_it(tmp_path):
    base = make_dense(tmp_path / "base")
    adapter = make_adapter(tmp_path / "law", ["gate_proj", "down_proj"])
    expert = Expert.from_adapter(adapter, base)
    assert (expert.card, expert.base) == (Card("law"), base_fingerprint.of_checkpoint(base))
    assert expert.layer_ranks() == [(4, 0, 4)] * L
    import_adapters(base, [adapter], tmp_path / "mixture")
    same = dataclasses.replace(expert, router_rows=torch.zeros(L, D), card=None)
    same_expert(same, Expert.from_checkpoint(tmp_path / "mixture", 1))
    assert open_expert(adapter, base=base).card == Card("law")
    with pytest.raises(ValueError, match="^base: got None for the adapter"):
        open_expert(adapter)
    more = make_adapter(tmp_path / "more", ["q_proj", "up_proj"])
    with pytest.raises(ValueError, match="q_proj"):
        Expert.from_adapter(more, base)
    assert Expert.from_adapter(more, base, other="drop").layer_ranks() == [(0, 4, 0)] * L
    with pytest.raises(ValueError, match="changes no FFN weight"):
        Expert.from_adapter(make_adapter(tmp_path / "none", ["q_proj"]), base, other="drop")


def test_open_expert_finds_out_what_lies_there(tmp_path):
    mixture, dense = make_checkpoint(tmp_path / "mixture"), make_dense(tmp_path / "law")
    an_expert().save(tmp_path / "file")
    assert isinstance(open_expert(dense), DenseSource)
    assert open_expert(tmp_path / "file").card.name == "law"
    assert open_expert(mixture, expert="expert-2").origin.startswith("expert-2 of")
    assert open_expert(make_checkpoint(tmp_path / "pair", (0, 2))).origin.startswith("expert-1 of")
    with pytest.raises(
        ValueError, match="^expert: got None for .* of 4 experts; accepted: expert-1"
    ):
        open_expert(mixture)
    with pytest.raises(ValueError, match="^rank: got 3 for an expert's file"):
        open_expert(tmp_path / "file", rank=3)
    with pytest.raises(ValueError, match="^expert: got 1 for a dense model"):
        open_expert(dense, expert=1)
    source = Revised(open_expert(mixture, expert=1), card=Card("law"), any_base=True)
    assert (source.card, source.base, source.layer_ranks()) == (Card("law"), None, [3] * L)
