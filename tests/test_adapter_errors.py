"""What is refused of an adapter, before anything is written, and with which words.

Adapters here are written by hand, without PEFT; the base is a dense OLMo-2 in the same way.
"""

from __future__ import annotations

import argparse
import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels.adapter_config import read_adapter_config
from flexmore_kernels.adapter_export import export_adapter
from flexmore_kernels.adapter_import import import_adapters
from flexmore_kernels.adapters import Adapter, shortest
from flexmore_kernels.checkpoint import load_model, make_demo_checkpoint, read_tensors
from flexmore_kernels.checkpoint_layout import read_layout, tensor_shapes
from flexmore_kernels.commands import export_adapter as export_command
from flexmore_kernels.commands import import_adapters as import_command
from flexmore_kernels.testing import assert_accurate, assert_same

CONFIG = {
    "model_type": "olmo2",
    "vocab_size": 7,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
}
GATE = "base_model.model.model.layers.0.mlp.gate_proj.lora_"


@pytest.fixture
def base(tmp_path):
    shapes = tensor_shapes(CONFIG | {"num_experts": 1}, [(0,)])
    del shapes["model.layers.0.mlp.gate.weight"]
    tensors = {n.replace("experts.0.", ""): torch.randn(shape) for n, shape in shapes.items()}
    directory = tmp_path / "base"
    directory.mkdir()
    save_file(tensors, directory / "model.safetensors")
    (directory / "config.json").write_text(json.dumps(CONFIG))
    return directory


def write(directory, tensors=None, **config):
    directory.mkdir(exist_ok=True)
    pair = {f"{GATE}A.weight": torch.randn(2, 8), f"{GATE}B.weight": torch.randn(12, 2)}
    tensors = {name: t for name, t in (pair | (tensors or {})).items() if t is not None}
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4} | config
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


REFUSED = {
    "use_dora": True,
    "lora_bias": True,
    "use_qalora": True,
    "fan_in_fan_out": True,
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 1]],
    "trainable_token_indices": [3],
    "kasa_config": {"beta": 1.0},
    "an_option_of_tomorrow": True,
    "bias": "all",
    "peft_type": "LOHA",
    "init_lora_weights": "pissa_niter_4",
    "rank_pattern": {"(": 3},
    "alpha_pattern": {"gate_proj": "big"},
    "r": 0,
}


@pytest.mark.parametrize("name", REFUSED)
def test_options_that_are_no_plain_lora(base, tmp_path, name):
    write(tmp_path / "a", **{name: REFUSED[name]})
    with pytest.raises(ValueError, match=rf"adapter_config.json: {name} "):
        import_adapters(base, [tmp_path / "a"], tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_options_that_change_nothing(tmp_path):
    write(
        tmp_path / "a", use_dora=False, loftq_config={}, init_lora_weights="eva", kasa_config=None
    )
    config = read_adapter_config(tmp_path / "a")
    assert (config.rank, config.scale_of("model.layers.0.mlp.gate_proj")) == (2, 2.0)


def nan(shape):
    return torch.full(shape, float("nan"))


LAYER = "base_model.model.model.layers."
TENSORS = {
    "one side": ({f"{GATE}B.weight": None}, r"gate_proj.lora_B: missing beside its other side"),
    "rank": ({f"{GATE}A.weight": torch.ones(3, 8), f"{GATE}B.weight": torch.ones(12, 3)},
             r"lora_A has 3 rows; adapter_config.json gives r = 2"),
    "sides": ({f"{GATE}A.weight": torch.ones(3, 8)}, r"lora_A has 3 rows, lora_B 2 columns"),
    "width": ({f"{GATE}A.weight": torch.ones(2, 9)}, r"another base: its weight is \(12, 9\)"),
    "vector": ({f"{GATE}A.weight": torch.ones(2)}, r"shape \(2,\); accepted: a matrix"),
    "nan": ({f"{GATE}A.weight": nan((2, 8))}, r"gate_proj.lora_A.weight: holds NaN"),
    "float8": ({f"{GATE}A.weight": torch.ones(2, 8).to(torch.float8_e4m3fn)},
               "lora_A.weight: holds torch.float8_e4m3fn; accepted: float32"),
    "integers": ({f"{GATE}A.weight": torch.ones(2, 8, dtype=torch.int32)}, "holds torch.int32"),
    "magnitude": ({f"{GATE}magnitude_vector": torch.ones(12)}, "magnitude_vector: refused"),
    "whole weight": ({f"{LAYER}0.mlp.up_proj.weight": torch.ones(12, 8)}, "a whole FFN weight"),
    "layer": ({f"{LAYER}3.mlp.up_proj.lora_A.weight": torch.ones(2, 8),
               f"{LAYER}3.mlp.up_proj.lora_B.weight": torch.ones(12, 2)}, "which has 1 layers"),
    "expert": ({f"{LAYER}0.mlp.experts.1.up_proj.lora_A.weight": torch.ones(2, 8),
                f"{LAYER}0.mlp.experts.1.up_proj.lora_B.weight": torch.ones(12, 2)},
               "which has a dense FFN"),
    "fused": ({f"{LAYER}0.mlp.experts.lora_A.weight": torch.ones(2, 12),
               f"{LAYER}0.mlp.experts.lora_B.weight": torch.ones(8, 2)}, "the base is a dense FFN"),
    "elsewhere": ({f"{LAYER}0.cross.q_proj.lora_A.weight": torch.ones(2, 8),
                   f"{LAYER}0.cross.q_proj.lora_B.weight": torch.ones(8, 2)},
                  "cross.q_proj.weight .*another base, which has no such tensor"),
    "copy": ({"base_model.model.lm_head.base_layer.weight": torch.ones(7, 8)},
             "its copy of lm_head.weight differs"),
}  # fmt: skip


@pytest.mark.parametrize("case", TENSORS)
def test_tensors_that_do_not_fit(base, tmp_path, case):
    tensors, words = TENSORS[case]
    write(tmp_path / "a", tensors)
    with pytest.raises(ValueError, match=words):
        import_adapters(base, [tmp_path / "a"], tmp_path / "out", other="drop")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "base"]


def test_files_that_are_missing_or_cut_off(base, tmp_path):
    path = write(tmp_path / "a") / "adapter_model.safetensors"
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="no whole safetensors file"):
        import_adapters(base, [tmp_path / "a"], tmp_path / "out")
    path.rename(path.with_suffix(".bin"))
    with pytest.raises(ValueError, match=r"missing, got adapter_model.bin; accepted: safetensors"):
        import_adapters(base, [tmp_path / "a"], tmp_path / "out")
    (tmp_path / "a/adapter_config.json").unlink()
    with pytest.raises(ValueError, match=r"adapter_config.json: missing"):
        import_adapters(base, [tmp_path / "a"], tmp_path / "out")
    with pytest.raises(FileNotFoundError, match="no directory"):
        import_adapters(base, [tmp_path / "nowhere"], tmp_path / "out")
    with pytest.raises(ValueError, match="adapters: got none"):
        import_adapters(base, [], tmp_path / "out")


def test_adapters_that_name_different_bases(base, tmp_path):
    write(tmp_path / "a", base_model_name_or_path="x/one")
    write(tmp_path / "b", base_model_name_or_path="x/two")
    with pytest.raises(ValueError, match="for different bases"):
        import_adapters(base, [tmp_path / "a", tmp_path / "b"], tmp_path / "out")
    report = import_adapters(base, [tmp_path / "a"], tmp_path / "out")
    assert report.notes[0].startswith("a: trained on x/one, by its name")


def test_export_refuses_what_is_no_delta(tmp_path):
    sizes = {"hidden_size": 8, "intermediate_size": 12, "num_layers": 1, "vocab_size": 7}
    ranks = (0, (2, "full", 0), (0, 0, 0))
    make_demo_checkpoint(tmp_path / "made", expert_ranks=ranks, top_k=1, **sizes)
    for expert, words in (
        (1, "1 is full-size in up_proj of layer 0"),
        (2, "2 equals the base"),
        (0, "got 0; accepted"),
    ):
        with pytest.raises(ValueError, match=f"expert: {words}"):
            export_adapter(tmp_path / "made", expert, tmp_path / "out")


def test_import_goes_on_after_a_kill(base, tmp_path, monkeypatch):
    """The second run writes the layer alone, and knows what the first counted."""
    lm_head = {f"base_model.model.lm_head.lora_{s}.weight": t
               for s, t in (("A", torch.randn(2, 8)), ("B", torch.randn(7, 2)))}  # fmt: skip
    write(tmp_path / "a", lm_head)
    whole = import_adapters(base, [tmp_path / "a"], tmp_path / "whole", other="drop")
    monkeypatch.setattr(Adapter, "delta", None)
    with pytest.raises(TypeError):
        import_adapters(base, [tmp_path / "a"], tmp_path / "out", other="drop")
    assert not (tmp_path / "out").exists() and (tmp_path / ".out.partial").exists()
    monkeypatch.undo()
    lines = []
    again = import_adapters(
        base, [tmp_path / "a"], tmp_path / "out", other="drop", say=lines.append
    )
    assert again == whole and whole.others[0].kind == "lm_head"
    assert lines == ["layer 0 written, 1 of 1, 0 s left"]
    for file in sorted((tmp_path / "whole").iterdir()):
        assert file.read_bytes() == (tmp_path / "out" / file.name).read_bytes(), file.name


@pytest.mark.parametrize("dtype", [None, "float32"])
def test_commands(base, tmp_path, capsys, dtype):
    """A bfloat16 base: factors in its dtype, or in the adapter's own; an expert out again."""
    path = base / "model.safetensors"
    save_file({name: t.bfloat16() for name, t in load_file(path).items()}, path)
    write(tmp_path / "a")
    options = [] if dtype is None else ["--dtype", dtype]
    out = str(tmp_path / "out")
    assert call(import_command, str(base), str(tmp_path / "a"), out, *options) == 0
    printed = capsys.readouterr().out
    assert "expert 1: a, rank (gate/up/down) 2/0/0" in printed and "rows of zeros" in printed
    kinds = {t.dtype for name, t in read_tensors(read_layout(out)).items() if "_proj_" in name}
    assert kinds == {torch.float32 if dtype else torch.bfloat16}
    assert load_model(out)(torch.tensor([[1, 2]])).isfinite().all()
    assert call(export_command, out, "1", str(tmp_path / "again")) == 0
    assert "1 modules, ranks 2 to 2" in capsys.readouterr().out
    assert call(import_command, str(base), str(tmp_path / "again"), f"{out}2", "--json") == 0
    assert json.loads(capsys.readouterr().out)["experts"][0]["layer_ranks"] == [[2, 0, 0]]


def call(command, *arguments):
    parser = argparse.ArgumentParser()
    command.add(parser)
    return command.run(parser.parse_args(arguments))


def test_shortest_drops_what_adds_nothing():
    a, b = torch.randn(9, 4, dtype=torch.float64), torch.randn(6, 9, dtype=torch.float64)
    long_a, long_b = shortest(a, b)
    assert long_a.shape == (4, 4)
    assert_accurate(long_b @ long_a, b @ a)
    assert_accurate(torch.matmul(*shortest(b.T, a.T)[::-1]), a.T @ b.T)
    a[2:], b[:, 1] = 0, 0
    kept = shortest(a, b)
    assert_same(kept[0], a[:1])
    assert_same(kept[1], b[:, :1].contiguous())
    assert shortest(a[2:], b[:, 2:]) is None
