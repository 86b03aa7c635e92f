"""Conversion stopped, and bad input: nothing half-written, nothing done twice, all named."""

from __future__ import annotations

import argparse
import errno
import json
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from flexmore_kernels import checkpoint, checkpoint_writer
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.commands import convert
from flexmore_kernels.conversion import one_matrix, spectra
from flexmore_kernels.conversion.convert import convert_checkpoint
from flexmore_kernels.conversion.report import REPORT_FILE, read_report
from flexmore_kernels.testing import assert_same

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 3, "top_k": 2, "vocab_size": 11}
ROOT = Path(__file__).parent.parent
MATRICES = 6  # a layer: two experts

KILLED = """
import os, signal, sys
from flexmore_kernels.conversion import one_matrix
from flexmore_kernels.conversion.convert import convert_checkpoint

store, left = one_matrix.OneMatrix.store, [int(sys.argv[4])]

def last(self, *arguments):
    left[0] -= 1
    if left[0] < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return store(self, *arguments)

one_matrix.OneMatrix.store = last
convert_checkpoint(sys.argv[1], sys.argv[2], sys.argv[3], device="cpu")
"""


@pytest.fixture
def source(tmp_path):
    checkpoint.make_demo_checkpoint(tmp_path / "source", expert_ranks=(0, 0, 0), **SIZES)
    return tmp_path / "source"


@pytest.fixture
def counted(monkeypatch):
    """How many matrices were decomposed or measured; `stop_at` raises what a Ctrl-C does."""
    state = SimpleNamespace(count=0, stop_at=None)
    store = one_matrix.OneMatrix.store

    def count(self, *arguments):
        if state.count == state.stop_at:
            raise KeyboardInterrupt
        state.count += 1
        return store(self, *arguments)

    monkeypatch.setattr(one_matrix.OneMatrix, "store", count)
    return state


def assert_equal_checkpoints(one, other):
    """Every file but the report, whose seconds and names differ, has the same bytes."""
    names = sorted(p.name for p in one.iterdir())
    assert names == sorted(p.name for p in other.iterdir())
    for name in set(names) - {REPORT_FILE, "report.svg"}:
        assert (one / name).read_bytes() == (other / name).read_bytes(), name
    assert read_report(one).matrices == read_report(other).matrices


@pytest.mark.parametrize("rule", ["5", "energy:0.7", "params:9000"])
def test_interrupted_conversion_goes_on(source, tmp_path, counted, rule):
    convert_checkpoint(source, tmp_path / "whole", rule)
    counted.count, counted.stop_at = 0, 2 * MATRICES + 1
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", rule)
    assert not (tmp_path / "out").exists()
    counted.count, counted.stop_at = 0, None
    convert_checkpoint(source, tmp_path / "out", rule)
    assert counted.count == MATRICES  # of the third layer alone
    assert_equal_checkpoints(tmp_path / "whole", tmp_path / "out")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source", "whole"]


def test_killed_conversion_goes_on(source, tmp_path, counted):
    arguments = [str(source), str(tmp_path / "out"), "v02", str(MATRICES + 2)]
    died = subprocess.run([sys.executable, "-c", KILLED, *arguments], timeout=120, cwd=ROOT)
    assert died.returncode == -signal.SIGKILL
    assert not (tmp_path / "out").exists()
    convert_checkpoint(source, tmp_path / "out", "v02", device="cpu")
    assert counted.count == 2 * MATRICES
    convert_checkpoint(source, tmp_path / "whole", "v02", device="cpu")
    assert_equal_checkpoints(tmp_path / "whole", tmp_path / "out")


def test_spectra_are_taken_up(source, tmp_path, monkeypatch):
    found, singular_values = [], spectra.singular_values

    def stop(*arguments):
        if len(found) == MATRICES + 3:
            raise KeyboardInterrupt
        found.append(1)
        return singular_values(*arguments)

    monkeypatch.setattr(spectra, "singular_values", stop)
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", "v06")
    found[:] = []
    monkeypatch.setattr(
        spectra, "singular_values", lambda *a: found.append(1) or singular_values(*a)
    )
    convert_checkpoint(source, tmp_path / "out", "v06")
    assert len(found) == 2 * MATRICES
    convert_checkpoint(source, tmp_path / "whole", "v06")
    assert_equal_checkpoints(tmp_path / "whole", tmp_path / "out")


def test_spectra_serve_another_rule(source, tmp_path, monkeypatch):
    lines = []
    with pytest.raises(ValueError, match="the least is"):
        convert_checkpoint(source, tmp_path / "out", "params:1", say=lines.append)
    assert "singular values stay" in lines[-1]
    monkeypatch.setattr(spectra, "singular_values", None)
    convert_checkpoint(source, tmp_path / "out", "params:9000")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out", "source"]


def test_full_disk_is_said_and_taken_up(source, tmp_path, monkeypatch, counted):
    free = iter([1 << 40] * 3 + [100])
    usage = lambda path: SimpleNamespace(free=next(free))
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_writer.shutil, "disk_usage", usage)
        with pytest.raises(OSError, match="no space left") as raised:
            convert_checkpoint(source, tmp_path / "out", 4)
    assert raised.value.errno == errno.ENOSPC
    assert not (tmp_path / "out").exists()
    counted.count = 0
    convert_checkpoint(source, tmp_path / "out", 4)
    assert counted.count == MATRICES


def test_other_work_is_not_taken_up(source, tmp_path, counted):
    counted.stop_at = MATRICES + 1
    with pytest.raises(KeyboardInterrupt):
        convert_checkpoint(source, tmp_path / "out", 4)
    counted.stop_at = None
    with pytest.raises(ValueError, match="holds other work"):
        convert_checkpoint(source, tmp_path / "out", 5)
    convert_checkpoint(source, tmp_path / "out", 4)
    with pytest.raises(ValueError, match="exists"):
        convert_checkpoint(source, tmp_path / "out", 4)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(
    "name",
    ["model.layers.2.mlp.experts.1.up_proj.weight", "model.layers.1.self_attn.q_norm.weight",
     "lm_head.weight"],
)  # fmt: skip
@pytest.mark.parametrize("rule", ["4", "v02"])
def test_nan_is_refused_by_name(source, tmp_path, name, value, rule):
    tensors = load_file(source / "model.safetensors")
    tensors[name].view(-1)[-1] = value
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=name.replace(".", r"\.")):
        convert_checkpoint(source, tmp_path / "out", rule)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("rule", "said"),
    [
        ("17", "at most 16"),
        ("fixed:1,2,3,x", "no rank"),
        ("fixed:1,", "no rank"),
        ("params:100", "the least is"),
        ("bytes:1KiB", "the least is"),
        ("energy:2", "out of range"),
        ("best", "numerical"),
        ("-3", "accepted"),
    ],
)
def test_rule_that_cannot_be_met(source, tmp_path, rule, said):
    with pytest.raises(ValueError, match=said):
        convert_checkpoint(source, tmp_path / "out", rule)
    assert [p.name for p in tmp_path.iterdir() if "spectra" not in p.name] == ["source"]


def test_number_too_large_for_the_dtype_is_named(source, tmp_path):
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.experts.2.down_proj.weight"][3, 4] = 1e6
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.experts\.2\.down_proj.*float16"):
        convert_checkpoint(source, tmp_path / "out", "fixed:2,full", dtype=torch.float16)
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_bad_arguments(source, tmp_path):
    with pytest.raises(ValueError, match="method"):
        convert_checkpoint(source, tmp_path / "out", 4, method="quick")
    with pytest.raises(ValueError, match="dtype"):
        convert_checkpoint(source, tmp_path / "out", 4, dtype=torch.int8)
    with pytest.raises(TypeError, match="rule"):
        convert_checkpoint(source, tmp_path / "out", 4.0)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        convert_checkpoint(tmp_path / "nowhere", tmp_path / "out", 4)
    checkpoint.make_demo_checkpoint(tmp_path / "one", expert_ranks=(0,), **SIZES | {"top_k": 1})
    with pytest.raises(ValueError, match="one expert"):
        convert_checkpoint(tmp_path / "one", tmp_path / "out", 4)


def command(*words):
    parser = argparse.ArgumentParser()
    convert.add(parser)
    parser.set_defaults(command=convert.NAME)
    return convert.run(parser.parse_args([str(word) for word in words]))


def test_command(source, tmp_path, capsys):
    (source / "tokenizer.json").write_text("{}")
    assert command(source, tmp_path / "out", "--rank", "4", "--dtype", "bfloat16") == 0
    printed = capsys.readouterr()
    assert "relative error" in printed.out and "finishing" in printed.err
    layout = read_layout(tmp_path / "out")
    assert {part.stored.dtype for part in layout.parts.values()} == {"BF16"}
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "{}"
    assert (
        command(source, tmp_path / "again", "--rank", "4", "--method", "randomized", "--json") == 0
    )
    report = json.loads(capsys.readouterr().out)
    assert report["settings"]["method"] == "randomized"
    exact = convert_checkpoint(source, tmp_path / "exact", 4)
    for found, best in zip(report["matrices"], exact.matrices, strict=True):
        # Never better than the best, but for rounding, and no worse than its own bound says.
        assert best.error * (1 - 1e-6) <= found["error"]
        assert found["error"] <= best.error + found["bound"] + 1e-6 * best.norm


def test_same_bits_in_two_runs(source, tmp_path):
    for method in ("exact", "randomized"):
        for name in ("first", "second"):
            convert_checkpoint(source, tmp_path / f"{method}-{name}", 3, method=method)
        pair = [tmp_path / f"{method}-{name}" for name in ("first", "second")]
        for file in pair[0].glob("*.safetensors"):
            other = load_file(pair[1] / file.name)
            for name, tensor in load_file(file).items():
                assert_same(other[name], tensor, name)
