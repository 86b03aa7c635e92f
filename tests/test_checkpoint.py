"""Checkpoint directories: what is written is read back bit for bit, and nothing wrong is loaded.

Traps: a tensor missing, extra, misshapen or cut off anywhere in several files; ranks that differ by
layer and projection, which config.json cannot say; a write that dies half-way.
"""

from __future__ import annotations

import json
import re

import pytest
import torch
from safetensors.torch import load_file, save_file

import reference
from flexmore_kernels import FlexMoREForCausalLM, checkpoint
from flexmore_kernels.checkpoint_layout import read_layout, tensor_shapes
from flexmore_kernels.testing import assert_accurate, assert_same

RANKS = (0, 3, 1, 0, (2, 0, "full"))
SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "top_k": 2, "vocab_size": 11}
EXPERT = "model.layers.1.mlp.experts.1."


@pytest.fixture
def directory(tmp_path):
    checkpoint.make_demo_checkpoint(tmp_path / "made", expert_ranks=RANKS, **SIZES)
    return tmp_path / "made"


def rewrite(directory, change):
    """Apply `change` to the dict of tensors in the directory's only file."""
    path = directory / "model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)


def ragged(directory):
    """Other ranks in layer 1 than config.json says, and other ones for each projection."""

    def change(tensors):
        tensors[f"{EXPERT}gate_proj_a.weight"] = torch.randn(7, 16)
        tensors[f"{EXPERT}gate_proj_b.weight"] = torch.randn(24, 7)
        for side in "ab":
            del tensors[f"{EXPERT}down_proj_{side}.weight"]
        tensors[f"{EXPERT}down_proj.weight"] = torch.randn(16, 24)

    rewrite(directory, change)


def test_layout_holds_what_was_written(directory):
    layout = read_layout(directory)
    assert layout.layer_ranks == (RANKS, RANKS)
    assert layout.notes == ()
    assert not layout.expert_bias
    assert layout.shapes == tensor_shapes(layout.config, layout.layer_ranks)


def test_same_seed_same_bits(directory, tmp_path):
    checkpoint.make_demo_checkpoint(tmp_path / "again", expert_ranks=RANKS, **SIZES)
    first, again = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "again"))
    for name, tensor in first.items():
        assert_same(again[name], tensor, name)


def test_layer_loads_every_bit(directory):
    stored = checkpoint.read_layer(read_layout(directory), 1)
    layer = checkpoint.load_layer(directory, 1)
    state = layer.state_dict()
    assert set(state) == set(stored)
    for name, tensor in stored.items():
        assert_same(state[name], tensor, name)


def test_layer_in_another_dtype(directory):
    layer = checkpoint.load_layer(directory, 0, dtype=torch.bfloat16)
    assert {p.dtype for p in layer.parameters()} == {torch.bfloat16}


def test_ranks_come_from_the_tensors(directory):
    ragged(directory)
    layout = read_layout(directory)
    assert layout.layer_ranks[0] == RANKS
    assert layout.layer_ranks[1][1] == (7, 3, "full")
    assert layout.notes == (
        "expert 1: layer_expert_ranks says rank 3; its tensors hold full size and ranks 3 to 7",
    )
    model = checkpoint.load_model(directory)
    stored = load_file(directory / "model.safetensors")
    name = f"{EXPERT}gate_proj_a.weight"
    assert_same(model.state_dict()[name], stored[name])
    for layer in (0, 1):
        assert checkpoint.load_layer(directory, layer).expert_ranks == layout.layer_ranks[layer]


def test_config_says_a_rank_above_the_matrix_and_how_to_route(directory):
    config = json.loads((directory / "config.json").read_text())
    config["expert_ranks"][1] = 16384
    config |= {"scoring": "sigmoid", "norm_topk_prob": True}
    (directory / "config.json").write_text(json.dumps(config))
    layout = read_layout(directory)
    assert layout.layer_ranks == (RANKS, RANKS)
    assert "16384" in layout.notes[0] and "expert 1" in layout.notes[0]
    layer = checkpoint.load_layer(directory, 0)
    assert (layer.scoring, layer.norm_topk_prob) == ("sigmoid", True)


def test_model_round_trip(directory, tmp_path):
    ragged(directory)
    layout = read_layout(directory)
    model = checkpoint.load_model(layout)
    assert isinstance(model, FlexMoREForCausalLM)
    checkpoint.save_checkpoint(tmp_path / "copy", model.state_dict(), layout.config)
    stored, copy = (load_file(d / "model.safetensors") for d in (directory, tmp_path / "copy"))
    assert set(stored) == set(copy)
    for name, tensor in stored.items():
        assert_same(copy[name], tensor, name)


def test_model_computes_what_its_twin_does(directory):
    layout = read_layout(directory)
    model = checkpoint.load_model(layout)
    twin = reference.FlexMoREForCausalLM(model.config)
    twin.load_state_dict(checkpoint.read_tensors(layout))
    ids = torch.randint(0, SIZES["vocab_size"], (2, 5))
    with torch.no_grad():
        logits, same = model(ids), twin(ids)
        truth = twin.double()(ids)
    assert_accurate(logits, truth, same, "logits")


def test_several_files(directory, tmp_path):
    layout = read_layout(directory)
    tensors = checkpoint.read_tensors(layout)
    checkpoint.save_checkpoint(tmp_path / "split", tensors, layout.config, max_file_bytes=4000)
    files = sorted(p.name for p in (tmp_path / "split").glob("*.safetensors"))
    assert len(files) > 2
    again = read_layout(tmp_path / "split")
    assert again.shapes == layout.shapes
    for name, tensor in checkpoint.read_tensors(again).items():
        assert_same(tensor, tensors[name], name)
    (tmp_path / "split" / files[1]).unlink()
    with pytest.raises(ValueError, match=files[1]):
        read_layout(tmp_path / "split")


def test_index_that_disagrees_with_its_files(directory, tmp_path):
    layout = read_layout(directory)
    tensors = checkpoint.read_tensors(layout)
    checkpoint.save_checkpoint(tmp_path / "split", tensors, layout.config, max_file_bytes=4000)
    path = tmp_path / "split" / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = index["weight_map"]["model.norm.weight"]
    index["weight_map"]["invented.weight"] = first
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"invented.weight: missing"):
        read_layout(tmp_path / "split")
    index["weight_map"] = {"model.norm.weight": "../model.safetensors"}
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\.\./model"):
        read_layout(tmp_path / "split")


@pytest.mark.parametrize(
    "name",
    [
        "lm_head.weight",
        "model.norm.weight",
        "model.layers.1.mlp.gate.weight",
        "model.layers.0.mlp.experts.0.up_proj.weight",
        "model.layers.0.mlp.experts.3.up_proj.weight",
        f"{EXPERT}up_proj_a.weight",
        f"{EXPERT}up_proj_b.weight",
    ],
)
@pytest.mark.parametrize("fault", ["missing", "misshapen", "not_float"])
def test_faulty_tensor_is_named(directory, name, fault):
    def change(tensors):
        if fault == "missing":
            del tensors[name]
        elif fault == "misshapen":
            tensors[name] = torch.cat([tensors[name], tensors[name]], dim=-1)
        else:
            tensors[name] = tensors[name].int()

    rewrite(directory, change)
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        checkpoint.load_model(directory)


@pytest.mark.parametrize("part", ["up_proj_a", "down_proj_b"])
def test_transposed_factor_is_named(directory, part):
    """Some files hold A as (in, r) and B as (r, out): as many numbers, another matrix."""
    name = f"{EXPERT}{part}.weight"
    rewrite(directory, lambda tensors: tensors.update({name: tensors[name].T.contiguous()}))
    with pytest.raises(ValueError, match=re.escape(EXPERT)):
        checkpoint.load_model(directory)


@pytest.mark.parametrize(
    "name", ["model.extra.weight", f"{EXPERT}up_proj.weight", "model.layers.2.mlp.gate.weight"]
)
def test_extra_tensor_is_named(directory, name):
    rewrite(directory, lambda tensors: tensors.update({name: torch.zeros(3, 3)}))
    with pytest.raises(ValueError, match="extra"):
        checkpoint.load_layer(directory, 0)


def test_no_pair_at_all_is_missing(directory):
    def change(tensors):
        for side in "ab":
            del tensors[f"{EXPERT}up_proj_{side}.weight"]

    rewrite(directory, change)
    with pytest.raises(ValueError, match=f"{EXPERT}up_proj_a.weight: missing"):
        read_layout(directory)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("hidden_size", None),
        ("hidden_size", 16.0),
        ("num_experts_per_tok", 0),
        ("num_experts_per_tok", 6),
        ("hidden_act", "gelu"),
        ("head_dim", 1.5),
        ("expert_ranks", 3),
        ("expert_ranks", [0, 3, 1, 0, -2]),
        ("expert_ranks", [0, 3, 1, 0, [1, 2]]),
        ("expert_ranks", [[0, 3, 1, 0, 2]]),
        ("layer_expert_ranks", [0, 3, 1, 0, 2]),
        ("layer_expert_ranks", [[0, 3, 1, 0, 2]]),
        ("layer_expert_ranks", [[0, 3, 1, 0]] * 2),
        ("num_experts", 6),
        ("model_type", "olmoe"),
        ("model_type", None),
    ],
)
def test_bad_config_is_named(directory, field, value):
    path = directory / "config.json"
    config = json.loads(path.read_text())
    config[field] = value
    path.write_text(json.dumps(config))
    with pytest.raises(ValueError, match=field if field != "num_experts" else "expert_ranks"):
        read_layout(directory)


def test_missing_directory_and_files(directory, tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        read_layout(tmp_path / "nowhere")
    (directory / "config.json").unlink()
    with pytest.raises(ValueError, match=r"config\.json: missing"):
        read_layout(directory)


def test_half_written_is_nothing_written(directory, tmp_path):
    layout = read_layout(directory)
    tensors = checkpoint.read_tensors(layout)
    del tensors["lm_head.weight"]
    with pytest.raises(ValueError, match="lm_head"):
        checkpoint.save_checkpoint(tmp_path / "out", tensors, layout.config)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["made"]
    with pytest.raises(ValueError, match="exists"):
        checkpoint.save_checkpoint(directory, tensors, layout.config)
