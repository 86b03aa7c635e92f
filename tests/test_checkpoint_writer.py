"""The writer of checkpoints that do not fit in memory: killed, resumed, out of space, disturbed.

Traps: a kill in the middle of a file, another process in the same folder, other inputs than those
that the work began with, a disk that is full before or while a file is written.
"""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from flexmore_kernels import checkpoint, checkpoint_writer
from flexmore_kernels.checkpoint_config import LOADER
from flexmore_kernels.checkpoint_folders import made_whole
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.checkpoint_writer import CheckpointWriter, fingerprint
from flexmore_kernels.testing import assert_same

UNITS = ["ends", "model.layers.0.", "model.layers.1."]
ROOT = Path(__file__).parent.parent


@pytest.fixture
def source(tmp_path):
    checkpoint.make_demo_checkpoint(
        tmp_path / "made", hidden_size=16, intermediate_size=24, num_layers=2, top_k=2,
        vocab_size=11, expert_ranks=(0, 3, 0),
    )  # fmt: skip
    return read_layout(tmp_path / "made")


def tensors_of(source, unit):
    names = [name for name in source.files if name.startswith(unit)]
    if unit == "ends":
        names = [name for name in source.files if not name.startswith("model.layers.")]
    return checkpoint.read_tensors(source, names=names)


def writer_of(source, out, print_of="a", units=UNITS):
    return CheckpointWriter(out, units, config=source.config, fingerprint=print_of)


def hidden(out):
    return out.parent / f".{out.name}.partial"


def test_all_units_make_the_checkpoint(source, tmp_path):
    out = tmp_path / "deep" / "out"
    with writer_of(source, out) as writer:
        for unit in writer.remaining:
            assert not out.exists()
            writer.write(unit, tensors_of(source, unit), facts={"unit": unit})
        (writer.folder / "report.json").write_text("{}")
        layout = writer.finish()
    assert layout == read_layout(out)
    assert layout.shapes == source.shapes and layout.notes == ()
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    found = sorted(path.name for path in out.iterdir())
    index_file, loader = "model.safetensors.index.json", "modeling_flexmore.py"
    assert found == ["config.json", *files, index_file, loader, "report.json"]
    assert (out / loader).read_text() == LOADER.read_text()
    index = json.loads((out / index_file).read_text())
    assert index["metadata"]["total_size"] == sum(p.nbytes for p in source.parts.values())
    for name, tensor in checkpoint.read_tensors(layout).items():
        assert_same(tensor, checkpoint.read_tensors(source, names=[name])[name], name)
    assert not hidden(out).exists()
    (tmp_path / "mine").touch()
    assert {path.stat().st_mode for path in out.iterdir()} == {(tmp_path / "mine").stat().st_mode}


def test_what_is_made_whole(tmp_path):
    (tmp_path / "mine").mkdir()
    out = tmp_path / "deep" / "out"
    with pytest.raises(KeyboardInterrupt), made_whole(out) as folder:
        (folder / "half").touch()
        raise KeyboardInterrupt
    assert list(out.parent.iterdir()) == []
    with made_whole(out) as folder:
        (folder / "file").touch()
        assert not out.exists()
    assert [path.name for path in out.parent.iterdir()] == ["out"] and (out / "file").exists()
    assert out.stat().st_mode == (tmp_path / "mine").stat().st_mode
    with pytest.raises(ValueError, match="exists"), made_whole(out):
        raise AssertionError("nothing is to be made")


def test_one_unit_is_one_file(source, tmp_path):
    with writer_of(source, tmp_path / "out", units=["all"]) as writer:
        writer.write("all", checkpoint.read_tensors(source))
        writer.finish({**source.config, "note": 1})
    assert (tmp_path / "out" / "model.safetensors").exists()
    assert read_layout(tmp_path / "out").config["note"] == 1


def test_it_goes_on_where_it_stopped(source, tmp_path):
    out = tmp_path / "out"
    with writer_of(source, out) as writer:
        writer.write("ends", tensors_of(source, "ends"), facts={"error": 0.25})
    left = hidden(out) / "model-00002-of-00003.safetensors.tmp"
    left.write_bytes(b"half")
    written = hidden(out) / "model-00001-of-00003.safetensors"
    before = written.stat().st_mtime_ns
    with writer_of(source, out) as writer:
        assert writer.remaining == UNITS[1:]
        assert writer.facts == {"ends": {"error": 0.25}}
        assert not left.exists()
        with pytest.raises(ValueError, match=r"units: model.layers.0., model.layers.1. not"):
            writer.finish()
        for unit in writer.remaining:
            writer.write(unit, tensors_of(source, unit))
        assert written.stat().st_mtime_ns == before
        writer.finish()
    assert read_layout(out).shapes == source.shapes


def test_killed_by_the_system(source, tmp_path):
    """A process that dies as kill -9 leaves it: what it had written is whole, and it goes on."""
    out = tmp_path / "out"
    program = (
        "import sys, time\n"
        "from tests.test_checkpoint_writer import *\n"
        "source = read_layout(sys.argv[1])\n"
        "writer = writer_of(source, Path(sys.argv[2]))\n"
        "writer.write('ends', tensors_of(source, 'ends'))\n"
        "print('written', flush=True)\n"
        "checkpoint_writer._settle = lambda path: time.sleep(60)\n"
        "writer.write(UNITS[1], tensors_of(source, UNITS[1]))\n"
    )
    arguments = [sys.executable, "-c", program, str(source.directory), str(out)]
    child = subprocess.Popen(arguments, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        assert child.stdout.readline() == "written\n"
        with pytest.raises(ValueError, match="another process is writing"):
            writer_of(source, out)
    finally:
        child.kill()
        child.wait()
    with writer_of(source, out) as writer:
        assert writer.remaining == UNITS[1:]
        for unit in writer.remaining:
            writer.write(unit, tensors_of(source, unit))
        writer.finish()
    assert read_layout(out).shapes == source.shapes


def test_other_work_is_refused(source, tmp_path):
    out = tmp_path / "out"
    with writer_of(source, out, "first"):
        pass
    with pytest.raises(ValueError, match=r"first, than this, second; remove .*\.out\.partial"):
        writer_of(source, out, "second")
    with pytest.raises(ValueError, match="units: "):
        writer_of(source, out, "first", UNITS[:2])
    with writer_of(source, out, "first"):
        pass


def test_fingerprint_sees_every_change(source, tmp_path):
    first = fingerprint([source], rank="64")
    assert fingerprint([read_layout(source.directory)], rank="64") == first
    assert fingerprint([source], rank="32") != first
    assert fingerprint([source, source], rank="64") != first
    path = source.directory / "model.safetensors"
    os.utime(path, ns=(1, 1))
    assert fingerprint([source], rank="64") != first


def no_space(*_, **__):
    raise SafetensorError("Error while serializing: I/O error: No space left (os error 28)")


@pytest.mark.parametrize("when", ["before", "while"])
def test_full_disk_keeps_what_is_written(source, tmp_path, monkeypatch, when):
    out = tmp_path / "out"
    with writer_of(source, out) as writer:
        writer.write("ends", tensors_of(source, "ends"))
        with monkeypatch.context() as patch:
            if when == "before":
                usage = type("Usage", (), {"free": 100})
                patch.setattr(checkpoint_writer.shutil, "disk_usage", lambda path: usage)
            else:
                patch.setattr(checkpoint_writer, "save_file", no_space)
            with pytest.raises(OSError, match="no space left .* 1 of 3 files are safe") as full:
                writer.write(UNITS[1], tensors_of(source, UNITS[1]))
        assert full.value.errno == errno.ENOSPC
        assert sorted(p.name for p in hidden(out).glob("*.tmp")) == []
        assert writer.remaining == UNITS[1:]
        for unit in UNITS[1:]:
            writer.write(unit, tensors_of(source, unit))
        writer.finish()


def test_bad_arguments_are_named(source, tmp_path):
    with pytest.raises(ValueError, match="^directory: .* exists"):
        writer_of(source, source.directory)
    with pytest.raises(ValueError, match="^units: got"):
        writer_of(source, tmp_path / "out", units=["a", "a"])
    with writer_of(source, tmp_path / "out") as writer:
        with pytest.raises(ValueError, match="^unit: 'b' is unknown"):
            writer.write("b", {})
        with pytest.raises(ValueError, match="^tensors: got none"):
            writer.write("ends", {})
        writer.write("ends", tensors_of(source, "ends"))
        with pytest.raises(ValueError, match="^unit: 'ends' is written already"):
            writer.write("ends", tensors_of(source, "ends"))


def test_what_is_wrong_does_not_appear(source, tmp_path):
    out = tmp_path / "out"
    with writer_of(source, out) as writer:
        for unit in writer.remaining:
            tensors = tensors_of(source, unit)
            tensors.pop("model.norm.weight", None)
            writer.write(unit, tensors)
        with pytest.raises(ValueError, match=r"model\.norm\.weight: missing"):
            writer.finish()
    assert not out.exists()


def test_shared_memory_and_other_layouts_are_written(source, tmp_path):
    whole = torch.arange(12.0).reshape(3, 4)
    views = {"a": whole[:2], "b": whole.T, "c": whole, "d": whole}
    checkpoint_writer.write_tensors(tmp_path / "x.safetensors", views)
    found = checkpoint_writer.read_header(tmp_path / "x.safetensors")
    shapes = {"a": (2, 4), "b": (4, 3), "c": (3, 4), "d": (3, 4)}
    assert {name: stored.shape for name, stored in found.items()} == shapes
    for name, tensor in load_file(tmp_path / "x.safetensors").items():
        assert_same(tensor, views[name].contiguous(), name)


def test_directory_that_no_folder_can_replace(source, tmp_path, monkeypatch):
    """Refused before any work: the last rename would fail."""
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    (tmp_path / "dangling").symlink_to(tmp_path / "none")
    (tmp_path / "inside").mkdir()
    monkeypatch.chdir(tmp_path / "inside")
    for out in ("link", "dangling", "inside", "inside/.."):
        with pytest.raises(ValueError, match="directory: .*accepted"):
            writer_of(source, tmp_path / out)
    for out in (Path("."), Path(".."), Path("/")):
        with pytest.raises(ValueError, match="directory: .*accepted"):
            writer_of(source, out)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path).name == "real")
    with pytest.raises(ValueError, match="mount point"):
        writer_of(source, tmp_path / "real")
    assert {p.name for p in tmp_path.iterdir()} == {"real", "link", "dangling", "inside", "made"}
    assert not list((tmp_path / "inside").iterdir())
