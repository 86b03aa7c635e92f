"""The conversion's benchmark: what it times is what `flexmore convert` does, right before fast."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import conversion, printed, records
from benchmarks.shapes import SHAPES, SWEPT, Shape
from flexmore_kernels.checkpoint import make_demo_checkpoint, read_layer, read_layout
from flexmore_kernels.conversion.convert import convert_checkpoint
from flexmore_kernels.conversion.svd import METHODS, factor_pair
from flexmore_kernels.testing import assert_same

ROOFS = {"copy_tb_s": 0.02, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"}
CONTEXT = {**records.environment("cpu", "abc1234"), "roofs": ROOFS}


def taken(seconds: float = 0.0, **how) -> dict:
    return conversion.take("tiny", "cpu", CONTEXT, lambda _: None, seconds=seconds, **how)


def test_a_record_is_whole():
    record = json.loads(json.dumps(taken()))
    assert record.keys() >= records.FIELDS
    assert (record["matrices"], record["dtype"], record["clocks"]) == (9, "bfloat16", None)
    D, F = 128, 352
    assert record["bytes"] == 2 * 3 * (4 * D * F + (1 + 4 + 16) * (D + F))
    assert tuple(record["results"]) == METHODS
    for found in record["results"].values():
        assert found["error_ratio"] <= 1 and found["ms"] > 0
        assert (found["how"], found["rounds"]) == ("wall", 1)  # no time was given for a second
    exact, drawn = record["results"].values()
    assert exact["relative_bound"] == 0 < drawn["relative_bound"]
    # To the rounding of factors to bfloat16, which both have: no better than the best there is.
    assert exact["relative_error"] * (1 - 2**-8) <= drawn["relative_error"] < 1
    assert drawn["relative_error"] <= exact["relative_error"] + drawn["relative_bound"] + 2**-8
    assert printed.name(record) == "convert, fwd, tiny, T=0" and printed.full(record)
    assert all("9 matrices" in line for line in conversion.lines(record))


def test_rounds_end_with_the_time():
    assert [r["rounds"] for r in taken(1e6, rounds=2)["results"].values()] == [2, 2]


def test_the_drawn_layer():
    layer = conversion.Layer(SHAPES["tiny"], "cpu")
    source = layer.source()
    assert SWEPT in conversion.CONVERTED and "flexolmo_full" not in conversion.CONVERTED
    for key in layer.target.ranks:
        delta, share = source.delta(key), conversion.SHARE
        # bfloat16 has rounded W: by 2^-9 of it at most, which a share is small beside.
        assert abs(delta.norm() / source.base(key).norm() - share) <= 2**-9
        s = torch.linalg.svdvals(delta)
        assert s[0] > 2 * s[16] > 3 * s[64] > 0
    before = {name: tensor.clone() for name, tensor in layer.tensors.items()}
    tensors, facts = layer.convert("exact", None)
    assert layer.tensors.keys() == before.keys()
    assert all(torch.equal(layer.tensors[name], before[name]) for name in before)
    assert [fact["rank"] for fact in facts] == [1, 4, 16] * 3
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}


@pytest.mark.parametrize("method", METHODS)
def test_what_is_timed_is_the_conversion(tmp_path, method):
    sizes = {"hidden_size": 64, "intermediate_size": 80, "num_layers": 1, "top_k": 2}
    source, out = tmp_path / "source", tmp_path / "out"
    make_demo_checkpoint(source, expert_ranks=(0, 0, 0), dtype=torch.bfloat16, **sizes)
    report = convert_checkpoint(source, out, "fixed:3,9", method=method, device="cpu")
    layer = conversion.Layer(Shape("", 64, 80, (0, 3, 9), 2, 1), "cpu")
    layer.tensors = read_layer(read_layout(source), 0)
    tensors, facts = layer.convert(method, None)
    found = load_file(out / "model-00002-of-00002.safetensors")
    assert len(tensors) == 3 + 1 + 3 * 2 * 2 and found.keys() >= tensors.keys()
    for name, tensor in tensors.items():
        assert_same(tensor, found[name], name)
    for fact, matrix in zip(facts, report.matrices, strict=True):
        assert fact.items() <= vars(matrix).items()


def test_wrong_factors_are_not_timed(monkeypatch, tmp_path, capsys):
    def off(found, rank, dtype):
        a, b = factor_pair(found, rank, dtype)
        return a, b * (1 + 2**-8)

    monkeypatch.setattr(conversion, "factor_pair", off)
    monkeypatch.setattr(records, "roofs", lambda device: ROOFS)
    words = ["--device", "cpu", "--shape", "tiny", "--results", str(tmp_path)]
    assert conversion.main(words) == 1
    (record,) = records.latest(tmp_path)
    assert [found["not_run"] for found in record["results"].values()] == ["WRONG", "WRONG"]
    assert capsys.readouterr().out.count("WRONG") == 2


def test_a_decomposition_that_is_not_the_best_is_wrong(monkeypatch):
    def second_best(delta, **how):
        found = decompose(delta, **how)
        return found._replace(u=found.u.flip(1), s=found.s.flip(0), vt=found.vt.flip(0))

    decompose = conversion.decompose
    layer = conversion.Layer(SHAPES["tiny"], "cpu")
    assert all(conversion.check(layer, method, expert=2) <= 1 for method in METHODS)
    monkeypatch.setattr(conversion, "decompose", lambda delta, rank, method: second_best(delta))
    assert conversion.check(layer, "exact", expert=2) > 1


def test_the_command(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(records, "roofs", lambda device: ROOFS)
    words = ["--device", "cpu", "--shape", "tiny", "--seconds", "0", "--results", str(tmp_path)]
    assert conversion.main(words) == 0
    printed_ = capsys.readouterr()
    assert "exact " in printed_.out and "randomized: checking" in printed_.err
    assert len(records.latest(tmp_path)) == 1
