"""The benchmark of whole models: checked, timed, recorded; and its tables."""

from __future__ import annotations

import json

import pytest
import torch

from benchmarks import generation, model_tables, records, tables
from benchmarks.decoders import WORK
from benchmarks.generation_checks import Checks

CONTEXT = {
    **records.environment("cpu", "abc1234"),
    "roofs": {"copy_tb_s": 0.02, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"},
}


@pytest.fixture
def bench(monkeypatch):
    monkeypatch.setattr(generation, "ROUNDS", 3)
    monkeypatch.setattr(generation, "LONGEST_S", 0.0)
    return generation.Bench("tiny", "cpu", torch.float32, lambda line: None)


def test_models_are_checked_timed_and_recorded(bench):
    taken: list[dict] = []
    generation.take(bench, CONTEXT, taken.append)
    ops = [(record["op"], record["tokens"]) for record in taken]
    assert ops == [("prefill", 12), ("decode", 1), ("decode", 2), ("generate", 1), ("generate", 2)]
    for record in map(json.loads, map(json.dumps, taken)):
        assert record.keys() >= records.FIELDS and record["model"] == json.loads(
            json.dumps(WORK["tiny"]._asdict())
        )
        ours = record["results"]["ours"]
        assert ours["ms"] and 0 < ours["error_ratio"] <= 1 and ours["tb_s"] > 0
        assert record["results"]["dense FFN"]["ms"]
        theirs = [one for name, one in record["results"].items() if name.startswith("Hugging")]
        if bench.theirs is None:
            assert "not installed" in theirs[0]["not_run"]
        else:
            assert all(one["error_ratio"] <= 1 for one in theirs)


def test_steps_are_what_generate_makes(bench):
    """Of ours, and of transformers' model with the same mathematics; begun anew, the same again."""
    ids = bench.prompts(2, 6)
    expected = bench.ours.generate(ids, max_new_tokens=4, eos_token_id=())[:, -1:]
    steps = [generation.OurSteps(bench.ours, ids, 12)]
    if bench.theirs is not None:
        steps.append(generation.TheirSteps(bench.theirs, ids, 12, "batched_mm", False))
    for one in steps:
        for _ in range(2):
            one.restart()
            for _ in range(3):
                one.step()
            tokens = one.step.tokens if isinstance(one, generation.OurSteps) else one.tokens
            assert torch.equal(tokens, expected)


def test_a_wrong_model_is_not_timed(bench, monkeypatch):
    checks = Checks(bench.ours)
    assert checks.ours() <= 1
    with torch.no_grad():
        bench.ours.model.layers[1].mlp.experts[2].gate_proj_a.weight.mul_(1.01)
    bench.ours.model.layers[1].mlp.unprepare()
    assert checks.ours() > 1
    monkeypatch.setattr(Checks, "all", lambda *_: {"ours": 0.5, "dense": 1.5})
    with pytest.raises(RuntimeError, match="dense is wrong: error ratio 1.5"):
        generation.Bench("tiny", "cpu", torch.float32, lambda line: None)


def test_tables_of_models():
    work = json.loads(json.dumps(WORK["flexolmo_6x64"]._asdict()))
    where = {"device": "Some GPU", "driver": "580", "commit": "abc1234"}
    record = {**where, "benchmark": "generation", "op": "decode", "tokens": 16, "model": work}
    record["results"] = {
        "ours": {"ms": 2.0}, "dense FFN": {"ms": 1.9}, "Hugging Face a": {"ms": 9.0},
        "Hugging Face b": {"ms": 5.0}, "Hugging Face c": {"not_run": "no"},
    }  # fmt: skip
    line = model_tables.generation([record]).splitlines()[2]
    assert line == (
        "| a step, 16 requests, after 512 | 2 ms | 8,000 | 0.95 | 5 ms b; 9 ms a | 2.5 x, 4.5 x | "
        "Some GPU, abc1234 |"
    )
    prompt = record | {"op": "prefill", "tokens": 8192}
    assert "| a prompt, 2 x 4096 | 2 ms | 4,096,000 |" in model_tables.generation([prompt])
    assert model_tables.generation([record | {"driver": None}]) == ""
    assert model_tables.generation([record | {"results": {"ours": {"not_run": "no"}}}]) == ""
    assert tables.ops([record]) == "" == model_tables.conversion([record])
    layer = {**where, "benchmark": "conversion", "ranks": [0, 64], "matrices": 3, "hidden": 8,
             "intermediate": 9, "results": {"exact": {"ms": 1500.0}}}  # fmt: skip
    assert model_tables.conversion([layer]).splitlines()[2] == (
        "| 1 experts, 3 matrices of 8 x 9, to rank 64 | 1.50 s |  | Some GPU, abc1234 |"
    )
