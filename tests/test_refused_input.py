"""Input of conversions and merges that is refused, by name and before there is anything on disk."""

from __future__ import annotations

import argparse
import errno
import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels import checkpoint, checkpoint_edit, checkpoint_writer
from flexmore_kernels.commands import activations as command
from flexmore_kernels.conversion import sweep
from flexmore_kernels.conversion.activations import Activations
from flexmore_kernels.conversion.convert import convert_checkpoint

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 1, "top_k": 2, "vocab_size": 11}


@pytest.fixture
def source(tmp_path):
    checkpoint.make_demo_checkpoint(tmp_path / "source", expert_ranks=(0, 0, 0), **SIZES)
    return tmp_path / "source"


def test_more_ranks_than_experts(source, tmp_path):
    with pytest.raises(ValueError, match="ranks for 3 experts, and there are 2"):
        convert_checkpoint(source, tmp_path / "out", "fixed:4,8,9")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_one_rank_in_two_spellings(source, tmp_path):
    with pytest.raises(ValueError, match="each once"):
        sweep.sweep_checkpoints(source, tmp_path / "out", ["008", 8])


def test_zero_matrix_is_named(source, tmp_path):
    name = "model.layers.0.mlp.experts.2.up_proj"
    tensors = load_file(source / "model.safetensors")
    tensors[f"{name}.weight"].zero_()
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert_checkpoint(source, tmp_path / "out", "v06")


@pytest.mark.parametrize(
    ("value", "tokens", "said"),
    [
        (torch.ones(24), None, "no number of tokens"),
        (torch.ones(24), torch.tensor([-1]), "no number of tokens"),
        (torch.full((24,), torch.nan), torch.tensor([3]), "NaN or Inf"),
        (torch.zeros(24), torch.tensor([3]), "is zero over 3 tokens"),
        (torch.ones(24, 23), torch.tensor([3]), r"has shape \(24, 23\)"),
    ],
)
def test_bad_moments_are_named(tmp_path, value, tokens, said):
    path, name = tmp_path / "moments.safetensors", "layers.0.experts.1.hidden"
    tensors = {name: value} | ({} if tokens is None else {f"{name}.tokens": tokens})
    save_file(tensors, path, metadata={"content": "flexmore second moments"})
    with pytest.raises(ValueError, match=f"moments.safetensors: 'layers.0.*{said}"):
        Activations.load(path)


def test_saved_moments_leave_nothing_beside(tmp_path):
    """A kill leaves one file, of a name that the next call writes over."""
    found = Activations({"layers.0.inputs": torch.ones(4)}, {"layers.0.inputs": 1})
    (tmp_path / "moments.tmp").write_text("left by a kill")
    found.save(tmp_path / "moments")
    assert [p.name for p in tmp_path.iterdir()] == ["moments"]


@pytest.mark.parametrize("field", ["max_position_embeddings", "eos_token_id"])
def test_merge_names_the_field_that_differs(source, tmp_path, field):
    for number, directory in enumerate((source, tmp_path / "other")):
        if number:
            shutil.copytree(source, directory)
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps(config | {field: 7 + number}))
    with pytest.raises(ValueError, match=f"config.json: {field} is 7"):
        checkpoint_edit.merge([source, tmp_path / "other"], tmp_path / "out")


def test_out_is_looked_at_before_the_model(source, tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "load_model", None)
    (tmp_path / "ids.jsonl").write_text("[1, 2, 3]\n")
    parser = argparse.ArgumentParser()
    command.add(parser)
    for out in (tmp_path, tmp_path / "ids.jsonl" / "out"):
        words = [str(source), str(tmp_path / "ids.jsonl"), str(out), "--device", "cpu"]
        with pytest.raises(ValueError, match="OUT: "):
            command.run(parser.parse_args(words))


def test_full_disk_at_the_side_files_is_said(source, tmp_path, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    (source / "tokenizer.json").write_text("{}")
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.shutil, "copy2", full)
        with pytest.raises(OSError, match="make room, then run the same again"):
            convert_checkpoint(source, tmp_path / "out", 4)
    convert_checkpoint(source, tmp_path / "out", 4)
    assert (tmp_path / "out" / "tokenizer.json").exists()
