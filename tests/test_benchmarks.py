"""The benchmarks work: candidates agree with the reference, failures are recorded."""

from __future__ import annotations

import importlib
import json
import time

import pytest
import torch

from benchmarks import bench, bench_experts, figure, printed, records, run, tables, training
from benchmarks.aims import AIMS
from benchmarks.candidates import CANDIDATES
from benchmarks.problem import Problem
from benchmarks.shapes import SHAPES, SWEEP, Shape
from flexmore_kernels.testing import assert_accurate

CONTEXT = {
    **records.environment("cpu", "abc1234"),
    "roofs": {"copy_tb_s": 0.02, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"},
}
TIMES = {"ms", "p20", "p80", "rounds", "how", "calls", "error_ratio"}


def quiet(_: str) -> None:
    """In place of progress."""


def layer_records(names, **how) -> list[dict]:
    taken: list[dict] = []
    how = {"shape_name": "tiny", "tokens": 20, **how}
    bench_experts.price(
        names=names, device="cpu", context=CONTEXT, say=quiet, write=taken.append, seconds=0.01,
        **how,
    )  # fmt: skip
    return taken


def test_candidates_agree_with_the_reference():
    names = [name for name in CANDIDATES if not name.endswith("compiled")]
    (record,) = layer_records(names)
    assert record.keys() >= records.FIELDS
    assert json.loads(json.dumps(record))["results"].keys() == set(names)
    for name, found in record["results"].items():
        if "not_run" not in found:
            assert found.keys() >= TIMES and found["error_ratio"] <= 1, name
        else:
            absent = found["not_run"].startswith(("not installed", "an adapter"))
            needs_gpu = name.startswith(("Liger", "ScatterMoE", "SonicMoE"))
            assert absent or needs_gpu, f"{name}: {found['not_run']}"
    always = {"ours, layer", "ours, experts", "fair eager, by index", "published", "dense FFN"}
    assert all("ms" in record["results"][name] for name in always)


@pytest.mark.slow
def test_compiled_candidates_agree_with_the_reference():
    (record,) = layer_records([name for name in CANDIDATES if name.endswith("compiled")])
    assert all(found["error_ratio"] <= 1 for found in record["results"].values())


def test_a_lora_on_every_token():
    pytest.importorskip("peft")
    (record,) = layer_records(["PEFT LoRA"], shape_name="flexolmo_k2_of_2", tokens=2)
    assert record["results"]["PEFT LoRA"]["error_ratio"] <= 1


def test_backward_of_candidates():
    names = [
        "ours, layer",
        "ours, experts",
        "fair eager, by index",
        "dense FFN",
        "torch grouped_mm",
    ]
    (record,) = layer_records(names, passes=[training.STEP])
    assert record["pass"] == "forward + backward"
    assert all("ms" in found for found in record["results"].values())


def test_merged_matrices_are_the_experts():
    p = Problem(SHAPES["tiny"], 6, "cpu", torch.float64)
    gate_up, down = p.merged
    gate, up, low = (entries[3] for entries in p.weights)
    x = torch.randn(5, 128, dtype=torch.float64)
    for merged, (a, b), base in (
        (gate_up[3][:352], gate, p.base[0]),
        (gate_up[3][352:], up, p.base[1]),
    ):
        # Merged in float32, as checkpoints are.
        assert_accurate((x @ merged.T).float(), x @ base.T + x @ a.T @ b.T)
    h = torch.randn(5, 352, dtype=torch.float64)
    assert_accurate((h @ down[3].T).float(), h @ p.base[2].T + h @ low[0].T @ low[1].T)


def test_stacked_layers_are_the_same_problem():
    shape = Shape("stacked", 32, 48, (0, *[4] * 69), 3, 10)
    p = Problem(shape, 10, "cpu", torch.float32)
    truth, same = p.truth("experts")
    assert_accurate(CANDIDATES["ours, experts"].make(p)(), truth, same)
    assert_accurate(CANDIDATES["torch grouped_mm"].make(p)(), truth, same)


def test_operations_are_counted():
    p = Problem(Shape("", 8, 12, (0, 2, 0), 3, 5), 5, "cpu", torch.float32)
    one, rank = 6 * 5 * 8 * 12, 6 * 5 * 2 * (8 + 12)
    assert p.work()[1] == 2 * one + rank
    assert p.work(training.STEP)[1] == 4 * one + 3 * rank
    assert p.work(training.ONE)[1] == 4 * one + 3 * rank
    assert p.work(training.ALL)[1] == 6 * one + 3 * rank
    assert p.work(training.RECOMPUTE)[1] == 4 * one + 3 * rank + 2 * one // 3
    weights = 2 * 3 * 8 * 12 + 3 * 2 * (8 + 12)
    assert p.work()[0] == 4 * (weights + 2 * 5 * 8)
    pair, x = 3 * 2 * (8 + 12), 5 * 8
    assert p.work(training.STEP)[0] == 4 * (2 * weights + pair + 5 * x)
    assert p.work(training.ALL)[0] == 4 * (3 * weights + 5 * x)
    assert p.work(what="dense") == (4 * (3 * 8 * 12 + 2 * x), one)
    assert p.work(training.ALL, "dense")[1] == 3 * one
    assert p.work(training.ONE, "adapter")[1] == 2 * one + 3 * rank


@pytest.mark.parametrize("stem", run.STEMS)
def test_ops_agree_with_the_reference(stem):
    module = importlib.import_module(f"benchmarks.bench_{stem}")
    found = list(
        bench.price_all(
            module.prices, "tiny", 20, device="cpu", context=CONTEXT, say=quiet, seconds=0.01
        )
    )
    passes = {"forward"} if stem == "attribution" else {"forward", "forward + backward"}
    assert {record["pass"] for record in found} == passes
    for record in found:
        assert record.keys() >= records.FIELDS
        for kernels, times in record["results"].items():
            assert times["error_ratio"] <= 1 and times.keys() >= TIMES, (record["op"], kernels)


def test_what_fails_is_recorded_and_stops_nothing(monkeypatch):
    def no_memory(p):
        raise torch.OutOfMemoryError("tried to allocate 900 GiB\nand more")

    def later(p):
        calls = iter(range(6))

        def call():
            if next(calls) == 5:
                raise RuntimeError("not any more")
            return CANDIDATES["dense FFN"].make(p)()

        return call

    def slow(p):
        time.sleep(5)

    bad = {"a": no_memory, "b": slow, "c": later}
    for name, make in bad.items():
        monkeypatch.setitem(CANDIDATES, name, CANDIDATES["dense FFN"]._replace(make=make))
    monkeypatch.setattr(bench_experts, "LONGEST_S", 0.2)
    (record,) = layer_records(["a", "b", "c", "ours, experts"])
    found = record["results"]
    assert found["a"]["not_run"] == "OutOfMemoryError: tried to allocate 900 GiB"
    assert found["b"]["not_run"] == "TimeoutError: took more than 0 s"
    assert found["c"]["not_run"] == "RuntimeError: not any more"
    assert "ms" in found["ours, experts"]


def test_an_interrupt_leaves_a_record_of_what_was_timed(monkeypatch):
    calls = iter(range(100))

    def make(p):
        def call():
            if next(calls) == 9:
                raise KeyboardInterrupt
            return CANDIDATES["dense FFN"].make(p)()

        return call

    late = CANDIDATES["dense FFN"]._replace(make=make)
    monkeypatch.setitem(CANDIDATES, "late", late)
    taken: list[dict] = []
    with pytest.raises(KeyboardInterrupt):
        bench_experts.price(
            "tiny", 20, ["ours, experts", "late"], device="cpu", context=CONTEXT, say=quiet,
            write=taken.append, seconds=9.0,
        )  # fmt: skip
    assert all("ms" in found for found in taken[0]["results"].values())


def test_ours_when_wrong_is_not_timed(monkeypatch):
    wrong = CANDIDATES["ours, experts"]._replace(make=lambda p: lambda: p.x * 2)
    monkeypatch.setitem(CANDIDATES, "ours, experts", wrong)
    (record,) = layer_records(["ours, experts", "dense FFN"])
    assert record["results"]["ours, experts"]["not_run"] == "WRONG"
    assert "ms" not in record["results"]["ours, experts"]
    assert printed.wrong([record]) == ["fwd, tiny, T=20: ours, experts: WRONG"]


def test_the_command_keeps_what_it_took(tmp_path, monkeypatch, capsys):
    def price(shape_name, tokens, names, *, write, **_):
        if tokens == 2:
            raise RuntimeError("a broken group")
        if tokens == 3:
            raise KeyboardInterrupt
        write({"benchmark": "experts", "op": "layer", "pass": "forward", "shape": shape_name,
               "tokens": tokens, "results": {}})  # fmt: skip

    monkeypatch.setattr(bench_experts, "price", price)
    monkeypatch.setattr(records, "roofs", lambda device: CONTEXT["roofs"])
    words = ["--shape", "tiny", "--tokens", "1", "2", "4", "3", "5", "--results", str(tmp_path)]
    assert run.main(words) == 1
    assert [record["tokens"] for record in records.latest(tmp_path)] == [1, 4]
    out = capsys.readouterr().out
    assert "MISSING: layer, tiny, T = 2: RuntimeError: a broken group" in out
    assert "MISSING: layer, tiny, T = 3 and what follows: interrupted" in out


def test_a_group_without_time_is_not_begun(monkeypatch):
    monkeypatch.setattr(bench_experts, "price", lambda *a, **k: None)
    groups = [run.layer("tiny", 1, (), 50), run.layer("tiny", 2, (), 50)]
    missing = run.take(groups, "cpu", torch.float32, run.Progress(10), {}, quiet)
    assert missing == ["2/2 layer, tiny, T = 2: not begun, no time left"]


def test_groups_name_what_there_is():
    groups = run.everything() + run.quick()
    assert {group.shape for group in run.everything() if group.names} >= set(SHAPES) - {"tiny"}
    assert all(name in CANDIDATES for group in groups for name in group.names)
    assert sum(group.expected_s for group in run.quick()) <= 150


def test_every_aim_is_taken():
    groups = run.aimed_at()
    for aim in AIMS:
        found = [g for g in groups if (g.shape, g.tokens) == (aim.shape, aim.tokens)]
        assert any(g.op in aim.op if g.stem else aim.op == "layer" for g in found), aim.case


def test_the_last_record_of_a_key_counts(tmp_path):
    base = {"benchmark": "experts", "op": "layer", "shape": "tiny", "tokens": 1, "dtype": "x"}
    for ms, tokens in ((1, 1), (2, 2), (3, 1)):
        records.append({**base, "pass": "forward", "tokens": tokens, "ms": ms}, tmp_path)
    assert [record["ms"] for record in records.latest(tmp_path)] == [3, 2]


def test_records_from_elsewhere_are_added_once(tmp_path, monkeypatch):
    monkeypatch.setattr(records, "RESULTS", tmp_path / "results")
    elsewhere = tmp_path / "all.jsonl"
    for benchmark in ("experts", "routing"):
        records.append({"benchmark": benchmark, "op": "x"}, elsewhere)
    monkeypatch.setattr("sys.argv", ["records", str(elsewhere)])
    for _ in range(2):
        records.append({"benchmark": "experts", "op": "own"}, records.RESULTS)
        assert records.main() == 0
    files = {path.stem: path.read_text() for path in records.RESULTS.iterdir()}
    assert files.keys() == {"experts", "routing"}
    assert (files["experts"].count('"x"'), files["routing"].count('"x"')) == (1, 1)


def test_what_readme_shows_is_always_taken():
    shown = {*figure.SERIES, *tables.COLUMNS, figure.FLOORS[0]}
    assert shown == set(run.SHOWN)
    for group in run.quick() + run.everything():
        if group.shape == run.SWEPT and group.names and group.which == training.FORWARD:
            assert group.tokens not in SWEEP or shown <= set(group.names), str(group)


def test_clocks_are_summed_up():
    clocks = records.Clocks("cpu")
    clocks.look()
    assert clocks.seen() is None
    clocks.samples = [(1000, 2600, 300.0, 40), (1980, 2600, 500.0, 60), (1500, 2600, 400.0, 50)]
    seen = clocks.seen()
    assert seen["sm_mhz"] == [1000, 1500, 1980] and seen["samples"] == 3
    assert clocks.seen() is None, "each record has its own"
