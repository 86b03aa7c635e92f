"""Tuned tiles: the shipped data is whole, is what kernels ask for, and other devices do without."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
import torch

from flexmore_kernels import tuning
from flexmore_kernels.tuning import Tile

FILES = sorted(tuning.FOLDER.glob("*.json"))
FIELDS = {
    "kernel", "bytes", "safe", "tile", "case", "us", "safe_us", "timed",
    "device", "commit", "time", "torch", "triton",
}  # fmt: skip


def capability(path) -> tuple[int, int]:
    return divmod(int(re.fullmatch(r"sm_(\d+)", path.stem).group(1)), 10)


def entries() -> list[tuple[tuple[int, int], dict]]:
    where = [capability(path) for path in FILES]
    return [(one, entry) for one in where for entry in tuning.read(one)["entries"]]


def test_the_files_are_whole():
    assert FILES, "none is shipped"
    for path in FILES:
        found = json.loads(path.read_text())
        assert found["schema"] == tuning.SCHEMA and tuning.path(capability(path)) == path
        assert set(found) <= {"schema", "entries", "merge_above"}
        keys = [(e["kernel"], e["bytes"], *e["safe"]) for e in found["entries"]]
        assert len(keys) == len(set(keys)) == len(tuning.tiles(capability(path)))


@pytest.mark.parametrize(("where", "entry"), entries(), ids=lambda v: str(v)[:60])
def test_entries_say_what_chose_them(where, entry):
    assert set(entry) == FIELDS
    tile = Tile(**entry["tile"])
    for size in (*tile.shape, tile.warps):
        assert size & (size - 1) == 0 and size > 0, "a tile's sides are powers of two"
    assert min(tile.shape) >= 16 and tile.warps <= 16 and 1 <= tile.stages <= 8
    assert entry["us"] is None or entry["safe_us"] is None or entry["us"] <= entry["safe_us"]
    assert entry["device"] and entry["commit"] and re.match(r"\d{4}-\d\d-\d\dT", entry["time"])


def test_the_tile_of_an_entry_is_found_and_others_are_safe():
    where, entry = entries()[0]
    rows, columns, depth = entry["safe"]
    safe = Tile(rows, columns, depth, 4, 2)
    kernel, width = entry["kernel"], entry["bytes"]
    assert tuning.find(kernel, where, width, safe) == Tile(**entry["tile"])
    assert tuning.find("no such kernel", where, width, safe) == safe
    assert tuning.find(kernel, where, 8, safe) == safe
    other = safe._replace(rows=2 * rows)
    assert tuning.find(kernel, where, width, other) == other


@pytest.mark.parametrize("unknown", [(0, 0), (8, 0), (99, 9)])
def test_a_device_without_a_file_runs_safe_tiles(unknown):
    assert tuning.tiles(unknown) == {} and tuning.merge_above(unknown) == 1.0
    safe = Tile(128, 128, 64, 8, 3)
    assert tuning.find("grouped_gemm", unknown, 2, safe) is safe


def test_nothing_is_read_at_import():
    code = "from flexmore_kernels import tuning; assert not tuning.tiles.cache_info().currsize"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.slow
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="nothing is chosen there")
def test_the_compile_gate_meets_every_entry():
    """So each tuned tile is compiled, and its shared memory and registers are held to the GPU's."""
    pytest.importorskip("triton")
    from compiling import tiles_asked

    for path in FILES:
        where = capability(path)
        asked = tiles_asked(10 * where[0] + where[1])
        missed = set(tuning.tiles(where)) - asked
        assert not missed, f"{path.name}: no call of tests/compiling.py asks for {sorted(missed)}"


def test_tiles_are_chosen_by_kernel_dtype_and_safe_shape(monkeypatch):
    pytest.importorskip("triton")
    from flexmore_kernels._triton import tiles

    where, entry = entries()[0]
    monkeypatch.setattr(tiles, "capability", lambda device: where)
    safe = Tile(*entry["safe"], 4, 2)
    half, single = torch.empty(1, dtype=torch.bfloat16), torch.empty(1)
    tuned = Tile(**entry["tile"])
    assert tiles.tile(entry["kernel"], half, safe) == tuned
    assert tiles.tile(entry["kernel"], half, safe, usual=False) == safe
    assert tiles.tile(entry["kernel"], single, safe) == safe


def test_a_crossover_is_between_the_ranks_that_were_timed():
    crossover = pytest.importorskip("benchmarks.crossover").crossover
    assert crossover({0.5: (10, 12), 0.7: (14, 12), 0.9: (18, 12)}) == pytest.approx(0.6)
    assert crossover({0.5: (10, 20), 0.7: (12, 20)}) == 1.0
    assert crossover({0.7: (14, 12), 0.5: (13, 12)}) == 0.5


def test_a_file_is_written_whole_and_read_again(tmp_path, monkeypatch):
    tune = pytest.importorskip("benchmarks.tune")
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    first = [{"kernel": "expand", "bytes": 2, "safe": [128, 128, 64]}]
    tune.write(None, (8, 0), entries=first)
    tune.write(None, (8, 0), merge_above={"share": 0.5})
    assert tuning.read((8, 0)) == {
        "schema": tuning.SCHEMA, "entries": first, "merge_above": {"share": 0.5},
    }  # fmt: skip
    assert tuning.merge_above((8, 0)) == 0.5 and [p.name for p in tmp_path.iterdir()] == [
        "sm_80.json"
    ]


@pytest.mark.parametrize(
    "kernel", ["expand", "shrink", "grouped_gemm", "token_mix", "add_expanded"]
)
def test_candidates_fit(kernel):
    tune = pytest.importorskip("benchmarks.tune")
    found = list(tune.candidates(kernel, Tile(64 if kernel == "token_mix" else 128, 64, 64, 4, 3)))
    assert 5 < len(found) == len(set(found))
    for tile in found:
        assert (tile.rows + tile.columns) * tile.depth * 2 * tile.stages <= tune.SHARED_BYTES
