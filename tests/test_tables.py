"""README's tables and figure are what the records say, and the records are whole."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree

from benchmarks import aims, figure, printed, records, tables, training
from benchmarks.shapes import SHAPES

WHERE = {"device": "Some GPU", "driver": "580", "commit": "abc1234"}


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
        found.append({**WHERE, "benchmark": "experts", "op": "layer", "pass": "forward",
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
    found = records.latest()
    assert tables.between(tables.README) == tables.block(found).strip()
    assert tables.between(tables.KERNELS) == aims.table(found)
    trained = aims.table(found, aims.TRAINING)
    assert tables.between(tables.KERNELS, tables.TRAINING) == trained
    assert tables.PAGE.read_text() == tables.page(found)
    swept = figure.sweep(found)
    assert tables.FIGURE.exists() == bool(swept)
    assert not swept or tables.FIGURE.read_text() == figure.svg(swept)


def test_aims_beside_records():
    found = some_sweep()
    for record in found:
        record["device"] = "NVIDIA H100 80GB HBM3"
    text = {line.split(" | ")[0][2:]: line.split(" | ") for line in aims.table(found).splitlines()}
    # SERIES puts ours last of six: 7 dense FFNs, replayed at T <= 64.
    assert text["T=16384, ranks 6 x 64"][1:6] == ["1.09", "1.28", "1.15", "7.00", "missed"]
    assert text["T=1, ranks 6 x 64, graph replay, us"][4] == "700"
    assert text["T=16384, ranks 6 x 16"][4:6] == ["", "not measured"]
    found[3]["results"]["ours, layer"]["ms"] = 6.4
    assert "| 1.00 | aim reached |" in aims.table(found)
    assert round(aims.over_compiled(found[3]), 6) == 6
    assert {aim.shape for aim in aims.AIMS} <= set(SHAPES)


def step(which: str, shape: str = "flexolmo_6x64", **results) -> dict:
    """A record of a step: the dense FFN's forward takes 4 ms."""
    found = {"dense FFN forward": {"ms": 4.0}, "dense FFN compiled": {"ms": 8.0}, **results}
    return {**some_sweep()[3], "device": "NVIDIA H100 80GB HBM3", "pass": which, "shape": shape,
            "results": found}  # fmt: skip


def test_aims_of_training_beside_records():
    ours = {"ms": 12.0, "saved_kb_a_token": 54.6, "tflop_s": 500.0}
    found = [
        step(training.STEP, **{"ours, layer": ours}),
        step(training.ONE, "flexolmo_k2_of_2", **{"ours, layer": ours, aims.PEFT: {"ms": 16.0}}),
        step(training.ALL, "flexolmo_full", **{"ours, layer": ours}),
        {**step(training.STEP, "small", **{"ours, layer": {"ms": 12.0}}), "driver": None,
         "device": "a CPU", "dtype": "float32", "tokens": 512},
    ]  # fmt: skip
    lines = aims.table(found, aims.TRAINING).splitlines()[2:]
    text = {line.split(" | ")[0][2:]: line.split(" | ") for line in lines}
    assert text["frozen base, 6 x 64, all factors and router"][4:6] == ["3.00", "reached"]
    assert text["kept for the backward, 6 x 64, KB a token"][4:6] == ["54.6", "aim reached"]
    assert text["2 of 2, frozen base, one expert of rank 64"][4:6] == ["3.00", "missed"]
    peft = text["beside it: PEFT's LoRA, r = 64, on a dense FFN"]
    assert peft[1:6] == ["", "", "", "4.00", "for comparison"]
    assert text["all full-size and trained, top-5, TFLOP/s"][4:6] == ["500", "reached"]
    assert text["CPU, `small`, in dense FFNs' forward + backward"][4:6] == ["1.50", "reached"]
    assert text["base trained too, 6 x 64"][4:6] == ["", "not measured"]
    # A record from before the dense FFN's forward was in it has no ratio, and hides no older one.
    old = step(training.STEP, **{"ours, layer": {"ms": 1.0}})
    del old["results"]["dense FFN forward"]
    assert aims.table([*found, old], aims.TRAINING).splitlines()[2:] == lines
    assert {aim.which for aim in aims.TRAINING} <= set(training.PASSES)
    assert "layer 3.00 forwards, keeps 54.6 KB" in printed.short(found[:1])


def test_readme_shows_no_variants_of_a_step():
    ours = {"ours, layer": {"ms": 12.0}}
    found = [step(which, **ours) for which in (training.STEP, training.ONE, training.ALL)]
    assert tables.block(found).count("forward + backward") == 1
    assert tables.page(found).count("forward + backward") == 3


def test_records_are_whole():
    for path in records.RESULTS.glob("*.jsonl"):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            assert record.keys() >= records.FIELDS, path.name
            assert record["benchmark"] == path.stem and record["shape"] in SHAPES


def test_short_lines_of_layers_and_ops():
    op = {**some_sweep()[0], "op": "permute", "pass": "forward + backward", "tokens": 9}
    op["results"] = {"native": {"ms": 0.25, "share_of_copy": 0.9}, "torch": {"not_run": "no"}}
    first, *layers, last = printed.short([op, *some_sweep()]).splitlines()
    assert first.split()[-1] == "g_mm" and len(layers) == 4
    assert layers[0].split() == [
        "fwd,",
        "flexolmo_6x64,",
        "T=1",
        "0.1",
        "7.00",
        "5.00",
        "6.00",
        "3.00",
    ]
    assert last.split("T=9")[1].strip() == "native 250 us 90% copy"
    assert printed.name(op) == "permute, fwd + bwd, flexolmo_6x64, T=9"
