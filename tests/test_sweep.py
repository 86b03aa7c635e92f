"""Sweep: each choice is what a conversion by its rule alone would be, from one decomposition."""

from __future__ import annotations

import argparse
import gc
import json
import xml.etree.ElementTree as ElementTree

import pytest
import torch
from common import second_target_stops

from flexmore_kernels import checkpoint, checkpoint_writer
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.commands import sweep as command
from flexmore_kernels.conversion import one_matrix, sweep
from flexmore_kernels.conversion.convert import convert_checkpoint
from flexmore_kernels.conversion.report import read_report

SIZES = {"hidden_size": 16, "intermediate_size": 24, "num_layers": 2, "top_k": 2, "vocab_size": 11}
RULES = ("2", "fixed:1,full", "energy:0.8", "v02:0.01", "params:8000")
NAMES = ["rank-2", "fixed-1-full", "energy-0.8", "v02-0.01", "params-8000"]
MATRICES = 12


@pytest.fixture
def source(tmp_path):
    checkpoint.make_demo_checkpoint(tmp_path / "source", expert_ranks=(0, 0, 0), **SIZES)
    return tmp_path / "source"


@pytest.fixture
def decomposed(monkeypatch):
    """How many decompositions there were; None in it stops at that one."""
    seen, decompose, stop = [], one_matrix.decompose, []

    def count(*arguments, **more):
        if stop and len(seen) == stop[0]:
            raise KeyboardInterrupt
        seen.append(1)
        return decompose(*arguments, **more)

    monkeypatch.setattr(one_matrix, "decompose", count)
    return seen, stop


def weights(directory):
    return {p.name: p.read_bytes() for p in directory.iterdir() if not p.name.startswith("report")}


@pytest.mark.parametrize("compat", [False, True])
def test_each_choice_is_a_conversion(source, tmp_path, decomposed, compat):
    rules = [rule for rule in RULES if not (compat and rule.startswith("params"))]
    reports = sweep.sweep_checkpoints(source, tmp_path / "out", rules, compat=compat)
    assert len(decomposed[0]) == MATRICES
    for rule, name, report in zip(rules, NAMES, reports, strict=False):
        alone = convert_checkpoint(source, tmp_path / name, rule, compat=compat)
        assert weights(tmp_path / name) == weights(tmp_path / "out" / name)
        assert report.matrices == alone.matrices
        assert read_report(tmp_path / "out" / name).matrices == alone.matrices
    found = sorted(p.name for p in (tmp_path / "out").iterdir())
    assert found == sorted([*NAMES[: len(rules)], "sweep.json", "sweep.svg"])


def test_randomized_sweep_is_nested(source, tmp_path):
    """One range finder, for the largest rank, serves all; each is no worse than its bound."""
    reports = sweep.sweep_checkpoints(source, tmp_path / "out", [1, 3, 6], method="randomized")
    exact = sweep.sweep_checkpoints(source, tmp_path / "exact", [1, 3, 6])
    for report, best in zip(reports, exact, strict=True):
        for found, least in zip(report.matrices, best.matrices, strict=True):
            assert found.error <= least.error + found.bound + 1e-6 * least.norm
    errors = [report.relative_error() for report in reports]
    assert errors == sorted(errors, reverse=True)


class Alive:
    """Bytes of all tensors that there are, at moments that a function is entered; views once."""

    def __init__(self, monkeypatch):
        self.monkeypatch, self.seen = monkeypatch, {}

    def now(self):
        held = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
            for t in gc.get_objects()
            if type(t) is torch.Tensor
        }
        return sum(held.values())

    def at(self, place, name):
        before, function = self.now(), getattr(place, name)

        def look(*arguments, **more):
            self.seen.setdefault(name, []).append(self.now() - before)
            return function(*arguments, **more)

        self.monkeypatch.setattr(place, name, look)


def test_memory_is_that_of_one_layer_and_one_choice(tmp_path, monkeypatch):
    """However many choices there are: the factors of all of these are far more."""
    D, F, experts, most = 32, 48, 4, 19  # factors of 19.2 would cost as much as the matrix
    ranks = range(1, most + 1, 3)
    sizes = SIZES | {"hidden_size": D, "intermediate_size": F, "num_layers": 1}
    checkpoint.make_demo_checkpoint(tmp_path / "source", expert_ranks=(0,) * experts, **sizes)
    size = [part.nbytes for part in read_layout(tmp_path / "source").parts.values()]
    layer = sum(size)
    factors = 3 * (experts - 1) * most * (D + F) * 4
    assert sum(ranks) / most * factors > 1.3 * (layer + factors)
    # W_0, delta, u, vt and s.
    one_matrix_in_float64 = 8 * (3 * D * F + D * D + D)
    alive = Alive(monkeypatch)
    alive.at(one_matrix.OneMatrix, "store")
    alive.at(checkpoint_writer, "save_file")
    sweep.sweep_checkpoints(tmp_path / "source", tmp_path / "out", ranks)
    assert len(alive.seen["save_file"]) == 2 * len(ranks)
    assert max(alive.seen["save_file"]) <= layer + factors
    assert max(alive.seen["store"]) <= layer + factors + one_matrix_in_float64


def test_interrupted_sweep_goes_on(source, tmp_path, decomposed, monkeypatch):
    seen, stop = decomposed
    stop.append(MATRICES // 2 + 1)
    with pytest.raises(KeyboardInterrupt):
        sweep.sweep_checkpoints(source, tmp_path / "out", RULES)
    seen[:], stop[:] = [], []
    # Once more it stops, where the second checkpoint is about to appear.
    with second_target_stops(monkeypatch), pytest.raises(KeyboardInterrupt):
        sweep.sweep_checkpoints(source, tmp_path / "out", RULES)
    assert len(seen) == MATRICES // 2  # of the second layer alone
    reports = sweep.sweep_checkpoints(source, tmp_path / "out", RULES)
    assert len(seen) == MATRICES // 2
    whole = sweep.sweep_checkpoints(source, tmp_path / "whole", RULES)
    for name, report, one in zip(NAMES, reports, whole, strict=True):
        assert weights(tmp_path / "out" / name) == weights(tmp_path / "whole" / name)
        assert report.matrices == one.matrices
    names = [[p.name for p in (tmp_path / d).iterdir()] for d in ("out", "whole")]
    assert sorted(names[0]) == sorted(names[1])


def test_command(source, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    command.add(parser)
    parser.set_defaults(command=command.NAME)
    words = [str(source), str(tmp_path / "out"), "--ranks", "1", "4"]
    assert command.run(parser.parse_args([*words, "--rules", "energy:0.5"])) == 0
    table = capsys.readouterr().out.splitlines()
    assert len(table) == 4 and table[0].split()[:2] == ["rule", "ranks"]
    # More of them, beside those that are there.
    assert command.run(parser.parse_args([*words, "7", "--json"])) == 0
    found = json.loads(capsys.readouterr().out)
    assert [entry["rank"] for entry in found] == ["1", "4", "7"]
    assert found == json.loads((tmp_path / "out" / "sweep.json").read_text())
    curve = ElementTree.parse(tmp_path / "out" / "sweep.svg").getroot()
    assert sum(part.tag.endswith("circle") for part in curve) == 3
    with pytest.raises(ValueError, match="neither"):
        command.run(parser.parse_args([str(source), str(tmp_path / "none")]))


def test_bad_rules(source, tmp_path):
    for rules in ([], [4, "4"], ["v02", "v02 "]):
        with pytest.raises(ValueError, match="rules"):
            sweep.sweep_checkpoints(source, tmp_path / "out", rules)
    with pytest.raises(ValueError, match="the least is"):
        sweep.sweep_checkpoints(source, tmp_path / "out", [4, "params:1"])
    with pytest.raises(ValueError, match="at most 16"):
        sweep.sweep_checkpoints(source, tmp_path / "out", [4, 99])
    left = [p.name for p in (tmp_path / "out").iterdir() if "spectra" not in p.name]
    assert left == []
    sweep.sweep_checkpoints(source, tmp_path / "out", [4])
    with pytest.raises(ValueError, match="exists"):
        sweep.sweep_checkpoints(source, tmp_path / "out", [4], method="randomized")
