"""Merge, split, drop and densify: what they write computes what it must, or nothing is written.

Traps: rows of the router in another order than the experts, the first of two bases taken without a
word, layers told apart in the names of differing tensors, a dropped expert that still takes part in
the softmax, factors zero-padded for plain readers, a kill between two experts of a split.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels import checkpoint, checkpoint_edit
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.testing import assert_accurate, assert_same

D, F, V = 16, 24, 11
RANKS = (0, 3, (2, 0, "full"), 0, 5)
GATE = "model.layers.1.mlp.gate.weight"


def make(directory, ranks=RANKS, top_k=2, seed=0, bias=False, **fields):
    checkpoint.make_demo_checkpoint(
        directory, hidden_size=D, intermediate_size=F, num_layers=2, top_k=top_k, vocab_size=V,
        expert_ranks=ranks, seed=seed,
    )  # fmt: skip
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if bias:
        for layer in range(2):
            name = f"model.layers.{layer}.mlp.gate.expert_bias"
            tensors[name] = -torch.rand(len(ranks) - 1)
    save_file(tensors, path)
    config = json.loads((directory / "config.json").read_text()) | fields
    (directory / "config.json").write_text(json.dumps(config))
    (directory / "tokenizer.json").write_text("{}")
    return directory


def change(directory, name, difference=1.0):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    tensors[name][..., 0] += difference
    save_file(tensors, path)


def same_tensors(one, other):
    one, other = (checkpoint.read_tensors(read_layout(d)) for d in (one, other))
    assert set(one) == set(other)
    for name, tensor in one.items():
        assert_same(tensor, other[name], name)


def logits(directory, mask=None, **kind):
    ids = torch.arange(10).reshape(2, 5) % V
    with torch.no_grad():
        return checkpoint.load_model(directory, **kind)(ids, expert_mask=mask)


@pytest.mark.parametrize("compat", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_split_and_merge_are_inverse(tmp_path, bias, compat):
    whole = make(tmp_path / "whole", bias=bias, top_k=3)
    parts = checkpoint_edit.split(whole, tmp_path / "parts", compat=compat)
    assert [part.name for part in parts] == [f"expert-{e}" for e in (1, 2, 3, 4)]
    for expert, part in enumerate(parts, start=1):
        layout = read_layout(part)
        entry = 0 if compat and expert == 2 else RANKS[expert]
        assert layout.layer_ranks == ((0, entry),) * 2
        assert layout.config["num_experts_per_tok"] == 2
        assert (part / "tokenizer.json").exists()
    merged = checkpoint_edit.merge(parts, tmp_path / "merged", top_k=3)
    assert merged.kind == "flexmore" and merged.config["num_experts_per_tok"] == 3
    if not compat:
        same_tensors(whole, tmp_path / "merged")
    # Padding adds nothing; expert 2, full-size then, is rounded once.
    assert_accurate(logits(merged), logits(whole, dtype=torch.float64), logits(whole))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["merged", "parts", "whole"]


def test_split_goes_on_where_it_stopped(tmp_path, monkeypatch):
    whole = make(tmp_path / "whole")
    written, real = [], checkpoint_edit._compose

    def compose(out, *args, **kwargs):
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(out.name)
        return real(out, *args, **kwargs)

    monkeypatch.setattr(checkpoint_edit, "_compose", compose)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_edit.split(whole, tmp_path / "parts")
    assert not (tmp_path / "parts").exists()
    written.clear()
    parts = checkpoint_edit.split(whole, tmp_path / "parts")
    assert written == ["expert-3", "expert-4"] and len(parts) == 4


def test_merge_goes_on_where_it_stopped(tmp_path, monkeypatch):
    parts = checkpoint_edit.split(make(tmp_path / "whole"), tmp_path / "parts")
    read, real = [], checkpoint_edit.PickedExperts.read

    def stop(self, layer):
        read.append(layer)
        if read == [0, 1]:
            raise KeyboardInterrupt
        return real(self, layer)

    monkeypatch.setattr(checkpoint_edit.PickedExperts, "read", stop)
    with pytest.raises(KeyboardInterrupt):
        checkpoint_edit.merge(parts, tmp_path / "merged")
    checkpoint_edit.merge(parts, tmp_path / "merged")
    assert read == [0, 1, 1]
    same_tensors(tmp_path / "whole", tmp_path / "merged")


def test_merge_takes_several_experts_of_each_in_order(tmp_path):
    one, two = make(tmp_path / "one", (0, 3, 0)), make(tmp_path / "two", (0, 4, 5, 1))
    for name in checkpoint.read_tensors(read_layout(one)):
        if ".experts." not in name or ".experts.0." in name:
            change_to(two, name, load_file(one / "model.safetensors")[name])
    layout = checkpoint_edit.merge([one, two], tmp_path / "both")
    assert layout.layer_ranks == ((0, 3, 0, 4, 5, 1),) * 2
    state = checkpoint.load_model(layout).state_dict()
    first, second = (load_file(d / "model.safetensors") for d in (one, two))
    assert_same(state[GATE], torch.cat([first[GATE], second[GATE][1:]]))
    a = "model.layers.1.mlp.experts.{}.up_proj_a.weight"
    assert_same(state[a.format(4)], second[a.format(2)])


def change_to(directory, name, value):
    path = directory / "model.safetensors"
    tensors = load_file(path)
    if name.endswith("gate.weight"):
        tensors[name][0] = value[0]
    else:
        tensors[name] = value
    save_file(tensors, path)


def test_differing_shared_tensors_are_named_or_averaged(tmp_path):
    parts = checkpoint_edit.split(make(tmp_path / "whole"), tmp_path / "parts")
    norm = "model.layers.1.self_attn.k_norm.weight"
    base = "model.layers.0.mlp.experts.0.down_proj.weight"
    for name in (norm, base, GATE):
        change(rewritten(parts[1]), name)
    with pytest.raises(ValueError, match="shared tensors differ") as named:
        checkpoint_edit.merge(parts, tmp_path / "merged")
    said = str(named.value)
    for name in (norm, base, f"{GATE} (row 0)"):
        assert f"{name} in expert-2 by up to 1;" in said
    assert said.count("expert-2") == 3 and "--shared average" in said
    assert not (tmp_path / "merged").exists()
    checkpoint_edit.merge(parts, tmp_path / "merged", shared="average")
    found, mine, theirs = (
        checkpoint.read_tensors(read_layout(d)) for d in (tmp_path / "merged", parts[0], parts[1])
    )
    for name in (norm, base):
        mean = (3 * mine[name].double() + theirs[name].double()) / 4
        assert_same(found[name], mean.float(), name)
    mean = (3 * mine[GATE][0].double() + theirs[GATE][0].double()) / 4
    assert_same(found[GATE][0], mean.float())
    assert_same(found[GATE][2], theirs[GATE][1])


def rewritten(directory):
    """The checkpoint in one file, as `change` wants it."""
    layout = read_layout(directory)
    save_file(checkpoint.read_tensors(layout), directory / "model.safetensors")
    return directory


def test_what_cannot_be_merged_is_named(tmp_path):
    one = make(tmp_path / "one", (0, 3))
    with pytest.raises(ValueError, match="^directories: got 1"):
        checkpoint_edit.merge([one], tmp_path / "out")
    with pytest.raises(ValueError, match="^shared: got 'some'"):
        checkpoint_edit.merge([one, one], tmp_path / "out", shared="some")
    with pytest.raises(ValueError, match="^top_k: got 4; accepted: 1 to 3"):
        checkpoint_edit.merge([one, one], tmp_path / "out", top_k=4)
    with pytest.raises(ValueError, match="has one expert"):
        checkpoint_edit.merge([one, make(tmp_path / "alone", (0,), 1)], tmp_path / "out")
    other = make(tmp_path / "theta", (0, 3), rope_theta=1e4)
    with pytest.raises(ValueError, match=r"rope_theta is 500000.0 in .*one and 10000.0 in .*theta"):
        checkpoint_edit.merge([one, other], tmp_path / "out")
    biased = make(tmp_path / "biased", (0, 3), bias=True)
    with pytest.raises(ValueError, match="expert_bias: in one of"):
        checkpoint_edit.merge([one, biased], tmp_path / "out")
    half = make(tmp_path / "half", (0, 0))
    tensors = load_file(half / "model.safetensors")
    name = "model.layers.1.mlp.experts.1.up_proj.weight"
    save_file(tensors | {name: tensors[name].bfloat16()}, half / "model.safetensors")
    with pytest.raises(ValueError, match=f"{name}: F32 in .* and BF16 in"):
        checkpoint_edit.merge([one, half], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_model_types_are_mixed_on_request(tmp_path):
    whole = make(tmp_path / "whole", (0, 3, 0))
    factors, dense = checkpoint_edit.split(whole, tmp_path / "parts")
    checkpoint_edit.densify(dense, tmp_path / "olmo")
    with pytest.raises(ValueError, match="model_type: 'flexmore' in .*'flex_olmo' in .*--mixed"):
        checkpoint_edit.merge([factors, tmp_path / "olmo"], tmp_path / "out")
    layout = checkpoint_edit.merge([factors, tmp_path / "olmo"], tmp_path / "out", mixed=True)
    assert (layout.kind, layout.layer_ranks[0]) == ("flexmore", (0, 3, 0))
    same_tensors(whole, tmp_path / "out")


def test_flex_olmos_of_both_layouts_merge_to_one(tmp_path):
    whole = make(tmp_path / "whole", (0, 0, 0))
    parts = checkpoint_edit.split(whole, tmp_path / "parts")
    olmos = [tmp_path / "olmo1", tmp_path / "olmo2"]
    for part, olmo, fused in zip(parts, olmos, (False, True), strict=True):
        checkpoint_edit.densify(part, olmo, fused=fused)
    assert checkpoint_edit.merge(olmos, tmp_path / "out").kind == "flex_olmo"
    same_tensors(whole, tmp_path / "out")
    less = checkpoint_edit.drop(tmp_path / "out", [2], tmp_path / "less")
    assert (less.kind, less.config["num_experts"]) == ("flex_olmo", 2)
    same_tensors(parts[0], tmp_path / "less")


@pytest.mark.parametrize("bias", [False, True])
def test_drop_is_what_a_mask_excludes(tmp_path, bias):
    whole = make(tmp_path / "whole", bias=bias, top_k=4)
    layout = checkpoint_edit.drop(whole, [1, 3], tmp_path / "less")
    assert layout.layer_ranks == ((0, (2, 0, "full"), 5),) * 2
    assert layout.config["num_experts_per_tok"] == 3  # of the three that are left
    mask = torch.tensor([True, False, True, False, True])
    truth = logits(whole, mask, dtype=torch.float64)
    assert_accurate(logits(tmp_path / "less"), truth, logits(whole, mask))


@pytest.mark.parametrize("experts", [[0], [5], [1, 1], [], [True]])
def test_drop_refuses(tmp_path, experts):
    with pytest.raises(ValueError, match="^experts: got"):
        checkpoint_edit.drop(make(tmp_path / "whole"), experts, tmp_path / "less")


@pytest.mark.parametrize("fused", [False, True])
def test_densify_computes_the_same(tmp_path, fused):
    whole = make(tmp_path / "whole")
    layout = checkpoint_edit.densify(whole, tmp_path / "olmo", fused=fused)
    assert layout.kind == ("flex_olmo_fused" if fused else "flex_olmo")
    assert "expert_ranks" not in json.loads((tmp_path / "olmo" / "config.json").read_text())
    stored, found = (checkpoint.read_tensors(x) for x in (read_layout(whole), layout))
    name = "model.layers.1.mlp.experts.{}.{}_proj{}.weight"
    a, b = (stored[name.format(4, "up", side)].double() for side in ("_a", "_b"))
    truth = stored[name.format(0, "up", "")].double() + b @ a
    assert_same(found[name.format(4, "up", "")], truth.float())  # one rounding
    assert_same(found[name.format(2, "up", "")], stored[name.format(0, "up", "")])
    # Rounding W_0 + B A once is to a weight what float32 arithmetic is to a product with it.
    assert_accurate(logits(layout), logits(whole, dtype=torch.float64), logits(whole))


def test_densify_refuses_what_flex_olmo_has_not(tmp_path):
    with pytest.raises(ValueError, match="^scoring: got 'sigmoid'"):
        checkpoint_edit.densify(make(tmp_path / "a", scoring="sigmoid"), tmp_path / "out")
    with pytest.raises(ValueError, match=r"^mlp\.gate\.expert_bias: "):
        checkpoint_edit.densify(make(tmp_path / "b", bias=True), tmp_path / "out")


def test_densified_is_hugging_faces(tmp_path):
    transformers = pytest.importorskip("transformers")
    whole = make(tmp_path / "whole", pad_token_id=None)
    ids = torch.arange(10).reshape(2, 5) % V
    for fused in (False, True):
        out = tmp_path / f"olmo{fused}"
        checkpoint_edit.densify(whole, out, fused=fused)
        theirs = transformers.FlexOlmoForCausalLM.from_pretrained(out).eval()
        with torch.no_grad():
            torch.testing.assert_close(theirs(ids).logits, logits(out))
