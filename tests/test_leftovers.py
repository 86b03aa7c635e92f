"""What is left on the disk by work that was refused or killed: nothing that is in the way.

Traps: a source that is repaired and given again, a kill just after the rename, singular values of a
sweep one of whose targets is finished.
"""

from __future__ import annotations

import shutil

import pytest
from common import second_target_stops
from safetensors.torch import load_file, save_file

from flexmore_kernels import checkpoint, checkpoint_edit, checkpoint_folders
from flexmore_kernels.checkpoint_writer import CheckpointWriter, write_json
from flexmore_kernels.conversion import spectra, sweep
from flexmore_kernels.conversion.convert import convert_checkpoint

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "top_k": 2, "vocab_size": 11}
NAME = "model.layers.1.mlp.experts.2.up_proj.weight"


@pytest.fixture
def source(tmp_path):
    checkpoint.make_demo_checkpoint(tmp_path / "source", expert_ranks=(0, 0, 0), **SIZES)
    return tmp_path / "source"


def names(directory):
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("task", ["densify", "split", "drop", "merge"])
def test_repaired_source_after_nan(source, tmp_path, task):
    shutil.copytree(source, tmp_path / "good")
    tensors = load_file(source / "model.safetensors")
    tensors[NAME][0, 0] = float("nan")
    save_file(tensors, source / "model.safetensors")
    out = tmp_path / "out"
    call = {
        "densify": lambda: checkpoint_edit.densify(source, out),
        "split": lambda: checkpoint_edit.split(source, out),
        "drop": lambda: checkpoint_edit.drop(source, [1], out),
        "merge": lambda: checkpoint_edit.merge([source, source], out),
    }[task]
    with pytest.raises(ValueError, match="NaN"):
        call()
    assert names(tmp_path) == ["good", "source"]
    shutil.copy(tmp_path / "good" / "model.safetensors", source)
    call()
    assert names(tmp_path) == ["good", "out", "source"]


def test_other_processes_work_is_left(source, tmp_path):
    """Refused because of what is in the folder, nothing of it is removed."""
    with CheckpointWriter(tmp_path / "out", ["all"], config={}, fingerprint="other"):
        pass
    with pytest.raises(ValueError, match="holds other work"):
        checkpoint_edit.densify(source, tmp_path / "out")
    assert checkpoint_folders.JOURNAL in names(tmp_path / ".out.partial")


def test_refused_sweep_leaves_nothing(source, tmp_path):
    (tmp_path / "out" / "rank-5").mkdir(parents=True)
    (tmp_path / "out" / "rank-5" / "mine").touch()
    with pytest.raises(ValueError, match="exists"):
        sweep.sweep_checkpoints(source, tmp_path / "out", [4, 5])
    assert names(tmp_path / "out") == ["rank-5"]


def test_journal_left_by_a_kill_after_the_rename(source, tmp_path):
    out = tmp_path / "out"
    checkpoint_edit.densify(source, out)
    whole = names(out)
    write_json(out / "journal.json", {"fingerprint": "a", "units": [], "written": {}})
    (out / "lock").touch()
    with pytest.raises(ValueError, match="exists"):
        checkpoint_edit.densify(source, out)
    assert names(out) == whole
    write_json(out / "journal.json", {"mine": 1})
    with pytest.raises(ValueError, match="exists"):
        checkpoint_edit.densify(source, out)
    assert "journal.json" in names(out)


def test_spectra_are_taken_up_when_a_target_is_finished(source, tmp_path, monkeypatch):
    """v06 alone wants features; what was found with them serves the rules that are left."""
    with second_target_stops(monkeypatch), pytest.raises(KeyboardInterrupt):
        sweep.sweep_checkpoints(source, tmp_path / "out", ["v06", "v02"])
    monkeypatch.setattr(spectra, "singular_values", None)
    sweep.sweep_checkpoints(source, tmp_path / "out", ["v06", "v02"])
    assert names(tmp_path / "out") == ["sweep.json", "sweep.svg", "v02", "v06"]


def test_spectra_of_another_rule_are_removed(source, tmp_path):
    with pytest.raises(ValueError, match="the least is"):
        convert_checkpoint(source, tmp_path / "out", "params:1")
    convert_checkpoint(source, tmp_path / "out", "v06")
    assert names(tmp_path) == ["out", "source"]
