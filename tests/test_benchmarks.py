"""The benchmarks work: candidates agree with the reference, records are whole, README agrees."""

from __future__ import annotations

import importlib
import json
import time
import xml.etree.ElementTree as ElementTree

import pytest
import torch

from benchmarks import bench, bench_experts, figure, records, run, tables
from benchmarks.candidates import CANDIDATES
from benchmarks.problem import Problem
from benchmarks.shapes import SHAPES, Shape
from flexmore_kernels.testing import assert_accurate

CONTEXT = {
    **records.environment("cpu", "abc1234"),
    "roofs": {"copy_tb_s": 0.02, "matmul_tflop_s": 0.1, "matmul_dtype": "float32"},
}
KEYS = {
    "schema", "benchmark", "op", "shape", "hidden", "intermediate", "ranks", "top_k", "tokens",
    "dtype", "pass", "commit", "time", "device", "driver", "cuda", "threads", "python", "torch",
    "triton", "roofs", "clocks", "bytes", "flops", "results",
}  # fmt: skip
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
    assert record.keys() >= KEYS
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
    (record,) = layer_records(names, passes=bench_experts.PASSES[1:])
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
    truth, same = p.truth["experts"]
    assert_accurate(CANDIDATES["ours, experts"].make(p)(), truth, same)
    assert_accurate(CANDIDATES["torch grouped_mm"].make(p)(), truth, same)


def test_operations_are_counted():
    p = Problem(Shape("", 8, 12, (0, 2, 0), 3, 5), 5, "cpu", torch.float32)
    one, rank = 6 * 5 * 8 * 12, 6 * 5 * 2 * (8 + 12)
    assert p.work(False)[1] == 2 * one + rank
    assert p.work(True)[1] == 4 * one + 3 * rank
    weights = 2 * 3 * 8 * 12 + 3 * 2 * (8 + 12)
    assert p.work(False)[0] == 4 * (weights + 2 * 5 * 8)
    assert p.work(False, dense=True) == (4 * (3 * 8 * 12 + 2 * 5 * 8), one)


@pytest.mark.parametrize("stem", run.STEMS)
def test_ops_agree_with_the_reference(stem):
    module = importlib.import_module(f"benchmarks.bench_{stem}")
    found = list(
        bench.price_all(
            module.prices, "tiny", 20, device="cpu", context=CONTEXT, say=quiet, seconds=0.01
        )
    )
    assert {record["pass"] for record in found} == {"forward", "forward + backward"}
    for record in found:
        assert record.keys() >= KEYS
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


def test_ours_when_wrong_is_not_timed(monkeypatch):
    wrong = CANDIDATES["ours, experts"]._replace(make=lambda p: lambda: p.x * 2)
    monkeypatch.setitem(CANDIDATES, "ours, experts", wrong)
    (record,) = layer_records(["ours, experts", "dense FFN"])
    assert record["results"]["ours, experts"]["not_run"] == "WRONG"
    assert "ms" not in record["results"]["ours, experts"]
    assert run.wrong([record]) == ["layer, tiny, T = 20: ours, experts: WRONG"]


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
    assert missing == ["layer, tiny, T = 2: not begun, no time left"]


def test_groups_name_what_there_is():
    groups = run.everything() + run.quick()
    assert {group.shape for group in run.everything() if group.names} >= set(SHAPES) - {"tiny"}
    assert all(name in CANDIDATES for group in groups for name in group.names)
    assert sum(group.expected_s for group in run.quick()) <= 150


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


def some_sweep() -> list[dict]:
    """Records of a sweep as a GPU gives them; the numbers are made up."""
    found = []
    for tokens, ms in ((1, 0.1), (64, 0.1), (4096, 1.6), (16384, 6.4)):
        results = {
            name: {"ms": ms * (2 + i), "how": "graph" if tokens < 99 and i % 2 else "events"}
            for i, name in enumerate(figure.SERIES)
        }
        results["dense FFN compiled"] = {"ms": ms, "how": "graph"}
        results["published"] = {"not_run": "out of memory"}
        found.append({**CONTEXT, "benchmark": "experts", "op": "layer", "pass": "forward",
                      "shape": "flexolmo_6x64", **SHAPES["flexolmo_6x64"]._asdict(),
                      "tokens": tokens, "dtype": "bfloat16", "results": results})  # fmt: skip
    return found


def test_figure_of_a_sweep():
    swept = figure.sweep(some_sweep()[::-1])
    assert [record["tokens"] for record in swept] == [1, 64, 4096, 16384]
    picture = figure.svg(swept)
    assert picture == figure.svg(figure.sweep(some_sweep()))
    assert "abc1234" in picture and "nan" not in picture
    root = ElementTree.fromstring(picture)
    lines = [node for node in root.iter() if node.tag.endswith("polyline")]
    assert len(lines) == len(figure.SERIES) - 1
    assert figure.sweep(some_sweep()[:2]) == []


def test_tables_of_a_sweep():
    text = tables.layers(some_sweep())
    assert text.splitlines()[2].startswith(
        "| `flexolmo_6x64`, T = 16384, bfloat16, forward | 6.4 ms "
    )
    assert len(text.splitlines()) == 3, "other numbers of tokens are in the figure"
    op = {**some_sweep()[0], "benchmark": "permutation", "op": "permute", "driver": "580"}
    op["results"] = {"native": {"ms": 0.25, "share_of_copy": 0.9}, "triton": {"not_run": "no"}}
    assert "| native 250 us (90% of copy) |" in tables.ops([op])


def test_readme_says_what_the_records_say():
    _, _, rest = tables.README.read_text().partition(tables.BEGIN)
    found = records.latest()
    assert rest.partition(tables.END)[0].strip() == tables.block(found).strip()
    swept = figure.sweep(found)
    assert tables.FIGURE.exists() == bool(swept)
    assert not swept or tables.FIGURE.read_text() == figure.svg(swept)


def test_records_are_whole():
    for path in records.RESULTS.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert record.keys() >= KEYS, path.name
            assert record["benchmark"] == path.stem and record["shape"] in SHAPES
