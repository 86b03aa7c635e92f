"""`flexmore verify`: equal checkpoints pass, and what a post-norm hides does not.

Traps: a scale of the routing weights, which the norm after the layer takes away again; one expert
that few tokens choose; weights that are not let go.
"""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels import checkpoint, verification
from flexmore_kernels.adapter_base import BaseCheckpoint
from flexmore_kernels.checkpoint_forms import dense_weight
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.commands import verify as command

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "top_k": 2, "vocab_size": 11}
RANKS = (0, 3, (2, 0, 4), 0)


@pytest.fixture
def directory(tmp_path):
    checkpoint.make_demo_checkpoint(tmp_path / "made", expert_ranks=RANKS, **SIZES)
    return tmp_path / "made"


def changed(directory, name, tensors=None, **config):
    """A copy with other tensors or another config."""
    layout = read_layout(directory)
    stored = checkpoint.read_tensors(layout) | (tensors or {})
    out = directory.parent / name
    checkpoint.save_checkpoint(out, stored, {**layout.config, **config})
    return out


def test_equal_checkpoints_differ_by_nothing(directory):
    rows = verification.verify(directory, changed(directory, "copy"))
    assert [row.name for row in rows] == ["layer 0", "layer 1", "layer 2", "logits"]
    assert all(row.ok and row.error == row.worst == 0 for row in rows)


def test_the_same_function_in_other_weights_passes(directory, tmp_path):
    """The dense form of a low-rank expert: other roundings, no other numbers."""
    layout = read_layout(directory)
    tensors = checkpoint.read_tensors(layout)
    for layer in range(3):
        prefix = f"model.layers.{layer}.mlp.experts."
        for projection in ("gate", "up", "down"):
            name = f"{prefix}1.{projection}_proj"
            pair = tuple(tensors.pop(f"{name}_{side}.weight") for side in "ab")
            base = tensors[f"{prefix}0.{projection}_proj.weight"]
            tensors[f"{name}.weight"] = dense_weight(base, pair)
    config = {**layout.config, "expert_ranks": [0, 0, 4, 0]}
    config["layer_expert_ranks"] = [[0, 0, [2, 0, 4], 0]] * 3
    checkpoint.save_checkpoint(tmp_path / "dense", tensors, config)
    rows = verification.verify(directory, tmp_path / "dense")
    assert all(row.ok for row in rows) and any(row.error > 0 for row in rows)


def test_a_scale_that_the_post_norm_hides_is_seen(directory):
    other = changed(directory, "renormalised", norm_topk_prob=True)
    rows = verification.verify(directory, other, tolerance=1e-3)
    assert not rows[0].ok and rows[0].error > 0.1


def test_one_expert_of_one_layer(directory):
    name = "model.layers.1.mlp.experts.2.gate_proj_a.weight"
    a = load_file(directory / "model.safetensors")[name]
    other = changed(directory, "other", {name: a * 1.01})
    rows = verification.verify(directory, other, seed=3)
    assert [row.ok for row in rows] == [True, False, False, False]
    assert rows[1].worst >= rows[1].error > 1e-5
    # Without that expert there is no difference; it is the others' router weights that change.
    alone = {"experts_a": [0, 1, 3], "experts_b": [0, 1, 3]}
    assert all(row.error == 0 for row in verification.verify(directory, other, **alone))


def test_a_dense_base_and_its_mixture(directory, tmp_path):
    """The public expert alone is the dense model."""
    tensors = checkpoint.read_tensors(read_layout(directory))
    others = ("mlp.gate.", "experts.1.", "experts.2.", "experts.3.")
    dense = {
        name.replace("experts.0.", ""): tensor
        for name, tensor in tensors.items()
        if not any(other in name for other in others)
    }
    (tmp_path / "dense").mkdir()
    save_file(dense, tmp_path / "dense/model.safetensors")
    config = json.loads((directory / "config.json").read_text()) | {"model_type": "olmo2"}
    (tmp_path / "dense/config.json").write_text(json.dumps(config))
    rows = verification.verify(tmp_path / "dense", directory, experts_b=[0])
    assert all(row.ok for row in rows)


def test_weights_are_let_go(directory):
    with verification.streamed(BaseCheckpoint(directory), torch.float32, "cpu") as model:
        held = []
        for block in model.model.layers:
            block.mlp.register_forward_hook(
                lambda *_: held.append(sum(p.numel() for p in model.parameters() if not p.is_meta))
            )
        logits = model(torch.tensor([[1, 2, 3]]))
        assert all(p.is_meta for p in model.parameters())
    block = sum(p.numel() for p in model.model.layers[0].parameters())
    assert held == [block] * 3
    assert torch.equal(logits, checkpoint.load_model(directory)(torch.tensor([[1, 2, 3]])))


def test_tied_embeddings(directory, tmp_path):
    tensors = checkpoint.read_tensors(read_layout(directory))
    del tensors["lm_head.weight"]
    config = {**read_layout(directory).config, "tie_word_embeddings": True}
    checkpoint.save_checkpoint(tmp_path / "tied", tensors, config)
    rows = verification.verify(tmp_path / "tied", tmp_path / "tied", dtype=torch.float64)
    assert rows[-1].name == "logits" and rows[-1].ok and rows[-1].tolerance == 1e-10


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dtype": torch.bfloat16}, "tolerance: got None with torch.bfloat16"),
        ({"tolerance": float("nan")}, "tolerance: got nan"),
        ({"experts_b": [4]}, r"experts_b: got \[4\]; accepted: some of 0 to 3"),
        ({"ids": torch.tensor([[11]])}, "ids: accepted: one or more from 0 to 10"),
    ],
    ids=["dtype", "tolerance", "experts", "ids"],
)
def test_bad_arguments(directory, options, words):
    with pytest.raises(ValueError, match=words):
        verification.verify(directory, directory, **options)


def test_other_sizes_are_named(directory, tmp_path):
    checkpoint.make_demo_checkpoint(
        tmp_path / "more", expert_ranks=RANKS, **SIZES | {"vocab_size": 12}
    )
    with pytest.raises(ValueError, match="vocab_size is 12; accepted: 11"):
        verification.verify(directory, tmp_path / "more")


def test_command(directory, capsys):
    parser = argparse.ArgumentParser()
    command.add(parser)

    def call(*arguments):
        return command.run(parser.parse_args([str(directory), *arguments]))

    assert call(str(directory), "--ids", "1,2,3") == 0
    assert "PASS at 1e-05" in capsys.readouterr().out
    other = str(changed(directory, "other", norm_topk_prob=True))
    assert call(other, "--dtype", "bfloat16", "--tolerance", "0.01") == 1
    assert "FAIL at 0.01: layer 0 is the first of" in capsys.readouterr().out
    assert call(other, "--json", "--experts-a", "0,1,2", "--experts-b", "0,1,2") == 1
    found = json.loads(capsys.readouterr().out)
    assert not found["ok"] and found["rows"][0]["error"] > 0.1
