"""The forms in which experts are written: ragged ranks with a key of ours, padded ranks without.

Traps: an expert that is full-size in one layer only, one without any delta, a base in bfloat16 with
factors in float32, a config that says other ranks than the tensors have.
"""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from flexmore_kernels import checkpoint
from flexmore_kernels.checkpoint_config import AUTO_MAP, rank_fields
from flexmore_kernels.checkpoint_forms import (
    config_for,
    dense_weight,
    fuse_experts,
    pad_experts,
    padded_ranks,
)
from flexmore_kernels.checkpoint_layout import read_layout, tensor_shapes
from flexmore_kernels.testing import assert_accurate, assert_same

D, F = 16, 24
RAGGED = ((0, 3, (2, 0, 6), 0, (0, 0, 0)), (0, 4, 5, (1, "full", 2), (0, 0, 0)))
CONFIG = {
    "model_type": "flexmore", "vocab_size": 11, "hidden_size": D, "intermediate_size": F,
    "num_hidden_layers": 2, "num_attention_heads": 2, "num_experts": 5, "num_experts_per_tok": 3,
    "rope_theta": 500000.0,
}  # fmt: skip
NAME = "model.layers.{}.mlp.experts.{}.{}_proj{}.weight"


def ragged_tensors():
    shapes = tensor_shapes(CONFIG, RAGGED)
    return {name: torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()}


def config_of(directory):
    return json.loads((directory / "config.json").read_text())


FIELDS = [
    ([(0, 3, 0)] * 2, {"expert_ranks": [0, 3, 0]}),
    ([[0, 3, 0], (0, 3, 0)], {"expert_ranks": [0, 3, 0]}),
    ([(0, 3), (0, 4)], {"expert_ranks": [0, 4], "layer_expert_ranks": [[0, 3], [0, 4]]}),
    ([(0, (1, 2, 0))], {"expert_ranks": [0, 2], "layer_expert_ranks": [[0, [1, 2, 0]]]}),
    ([(0, (9, 9, 9))], {"expert_ranks": [0, 9]}),
    ([(0, 0), (0, 7)], {"expert_ranks": [0, 7], "layer_expert_ranks": [[0, 0], [0, 7]]}),
    ([(0, (0, 0, 0))], {"expert_ranks": [0, 0], "layer_expert_ranks": [[0, [0, 0, 0]]]}),
]


@pytest.mark.parametrize(("layer_ranks", "fields"), FIELDS, ids=[str(f[0]) for f in FIELDS])
def test_config_says_of_ranks_what_it_must(layer_ranks, fields):
    assert rank_fields(layer_ranks) == fields


def test_ragged_ranks_are_written_as_they_are(tmp_path):
    tensors = ragged_tensors()
    config = CONFIG | {"layer_expert_ranks": [list(map(list_of, r)) for r in RAGGED]}
    checkpoint.save_checkpoint(tmp_path / "made", tensors, config)
    assert config_of(tmp_path / "made")["expert_ranks"] == [0, 4, 6, 2, 0]
    layout = read_layout(tmp_path / "made")
    assert layout.layer_ranks == RAGGED and layout.notes == ()
    model = checkpoint.load_model(layout)
    for name, tensor in tensors.items():
        assert_same(model.state_dict()[name], tensor, name)
    # As a model's own configuration says it: lists by layer in expert_ranks.
    checkpoint.save_checkpoint(tmp_path / "again", model.state_dict(), model.config.to_dict())
    again = config_of(tmp_path / "again")
    assert again["layer_expert_ranks"] == config_of(tmp_path / "made")["layer_expert_ranks"]
    assert read_layout(tmp_path / "again").layer_ranks == RAGGED


def list_of(entry):
    return list(entry) if isinstance(entry, tuple) else entry


def test_lists_by_layer_in_expert_ranks_are_read(tmp_path):
    """As they were written before layer_expert_ranks."""
    old = [list(map(list_of, ranks)) for ranks in RAGGED]
    checkpoint.save_checkpoint(tmp_path / "made", ragged_tensors(), CONFIG | {"expert_ranks": old})
    config = config_of(tmp_path / "made") | {"expert_ranks": old}
    del config["layer_expert_ranks"]
    (tmp_path / "made" / "config.json").write_text(json.dumps(config))
    layout = read_layout(tmp_path / "made")
    assert layout.layer_ranks == RAGGED and layout.notes == ()


def test_compat_is_what_the_plain_reader_knows(tmp_path):
    tensors = ragged_tensors()
    ranks = [list(map(list_of, r)) for r in RAGGED]
    for name, compat in (("ragged", False), ("plain", True)):
        config = CONFIG | {"expert_ranks": ranks}
        checkpoint.save_checkpoint(tmp_path / name, tensors, config, compat=compat)
    config = config_of(tmp_path / "plain")
    assert config["expert_ranks"] == [0, 4, 6, 0, 1] and "layer_expert_ranks" not in config
    stored = load_file(tmp_path / "plain" / "model.safetensors")
    one_rank = [tuple(config["expert_ranks"])] * 2
    assert {n: tuple(t.shape) for n, t in stored.items()} == tensor_shapes(config, one_rank)
    for projection, rank in (("gate", 2), ("up", 0), ("down", 6)):
        a, b = (stored[NAME.format(0, 2, projection, side)] for side in ("_a", "_b"))
        assert not a[rank:].any() and not b[:, rank:].any()
        if rank:
            assert_same(a[:rank], tensors[NAME.format(0, 2, projection, "_a")])
    base, a, b = (tensors[NAME.format(1, e, "gate", s)] for e, s in ((0, ""), (3, "_a"), (3, "_b")))
    dense = base.double() + b.double() @ a.double()
    assert_same(stored[NAME.format(1, 3, "gate", "")], dense.float())
    assert_same(stored[NAME.format(1, 3, "up", "")], tensors[NAME.format(1, 3, "up", "")])
    layout = read_layout(tmp_path / "plain")
    assert layout.layer_ranks[0] == (0, 3, (2, 0, 6), 0, (0, 0, 0))
    assert layout.layer_ranks[1] == (0, 4, 5, 0, (0, 0, 0))
    ids = torch.randint(11, (2, 5))
    with torch.no_grad():
        logits = checkpoint.load_model(layout)(ids)
        same = checkpoint.load_model(tmp_path / "ragged")(ids)
        truth = checkpoint.load_model(tmp_path / "ragged", dtype=torch.float64)(ids)
    assert_accurate(logits, truth, same)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dense_weight_is_rounded_once(dtype):
    base, a, b = (torch.randn(s).to(dtype) for s in ((F, D), (3, D), (F, 3)))
    found = dense_weight(base, (a, b))
    truth = base.double() + b.double() @ a.double()
    assert_accurate(found, truth, truth.to(dtype))
    assert found.dtype == dtype
    assert_same(dense_weight(base, None), base)


def test_padding_keeps_a_base_of_another_dtype():
    tensors = {n: t.bfloat16() for n, t in ragged_tensors().items()}
    factor = {n: t.float() for n, t in tensors.items() if n.endswith(("_a.weight", "_b.weight"))}
    padded = pad_experts(tensors | factor, padded_ranks(RAGGED))
    assert padded[NAME.format(0, 1, "up", "_a")].dtype == torch.float32
    assert padded[NAME.format(1, 3, "gate", "")].dtype == torch.bfloat16
    with pytest.raises(ValueError, match="1.gate_proj.weight: of rank 3; accepted: up to rank 2"):
        pad_experts(tensors, [0, 2, 6, 0, 1])
    with pytest.raises(ValueError, match="3.gate_proj.weight: full-size; accepted: up to rank 2"):
        pad_experts(tensors, [0, 4, 6, 2, 1])


def test_fused_has_gate_first():
    mlp = {
        f"experts.{e}.{p}_proj.weight": torch.randn(F, D) for e in (0, 1) for p in ("gate", "up")
    }
    mlp |= {f"experts.{e}.down_proj.weight": torch.randn(D, F) for e in (0, 1)}
    given = mlp | {"gate.weight": torch.randn(2, D)}
    fused = fuse_experts(given, 2)
    assert set(given) == {"gate.weight"}  # what is copied is let go, layer by layer
    assert set(fused) == {"gate.weight", "experts.gate_up_proj", "experts.down_proj"}
    for e in (0, 1):
        assert_same(fused["experts.gate_up_proj"][e, :F], mlp[f"experts.{e}.gate_proj.weight"])
        assert_same(fused["experts.gate_up_proj"][e, F:], mlp[f"experts.{e}.up_proj.weight"])
        assert_same(fused["experts.down_proj"][e], mlp[f"experts.{e}.down_proj.weight"])


def test_config_changes_its_model_type():
    olmo = config_for(CONFIG | {"scoring": "softmax"}, [(0, 0)] * 2, kind="flex_olmo")
    assert (olmo["model_type"], olmo["architectures"]) == ("flex_olmo", ["FlexOlmoForCausalLM"])
    assert olmo["rope_parameters"] == {"rope_type": "default", "rope_theta": 500000.0}
    assert not olmo.keys() & {"scoring", "expert_ranks", "layer_expert_ranks"}
    back = config_for(olmo | {"auto_map": {}}, [(0, 3)] * 2)
    assert (back["model_type"], back["architectures"]) == ("flexmore", ["FlexMoREForCausalLM"])
    assert back["expert_ranks"] == [0, 3] and back["auto_map"] == AUTO_MAP
    # A checkpoint is written without the Python files that its source names.
    named = back | {"auto_map": {"AutoConfig": "x"}}
    assert config_for(named, [(0, 3)] * 2)["auto_map"] == AUTO_MAP
    assert "auto_map" not in config_for(named, [(0, 3)] * 2, compat=True)
    assert "auto_map" not in config_for(named, [(0, 0)] * 2, kind="flex_olmo")


@pytest.mark.parametrize("kind", ["flex_olmo", "flex_olmo_fused"])
def test_kind_that_cannot_hold_it_is_named(tmp_path, kind):
    config = CONFIG | {"layer_expert_ranks": [list(map(list_of, r)) for r in RAGGED]}
    with pytest.raises(ValueError, match=r"layers.0.mlp.experts.1: not full-size"):
        checkpoint.save_checkpoint(tmp_path / "out", ragged_tensors(), config, kind=kind)
    with pytest.raises(ValueError, match="^kind: got 'olmo'"):
        checkpoint.save_checkpoint(tmp_path / "out", ragged_tensors(), config, kind="olmo")
    assert list(tmp_path.iterdir()) == []
