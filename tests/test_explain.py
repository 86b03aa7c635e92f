"""`flexmore bench`: floors are the formulas', the schedule is what ran, the text says all of it."""

from __future__ import annotations

import json

import pytest
import torch

from flexmore_kernels import cli, explain, explain_text, floors, schedule
from flexmore_kernels.floors import Roofs, Stage, Work
from flexmore_kernels.projection import FULL
from flexmore_kernels.shapes import SHAPES, Shape, parse

MIXED = Shape("every way at once", 32, 48, (0, 4, 0, 20, 4), 3, 240)


def run(shape=MIXED, tokens=(240,), **options):
    return explain.run("x", shape, tokens, device="cpu", dtype=torch.float32, **options)


def test_floors_by_hand():
    """T = 2, D = 3, F = 5; expert 1, rank 1, has two rows, 2, full-size, has one, 3 has none."""
    layout = (FULL, 1, FULL, 7)
    work = Work((layout,) * 3, (2, 2, 1, 0), tokens=2, hidden=3, width=5, size=2)
    found = {stage.name: (stage.nbytes, stage.flops) for stage in work.stages()}
    assert found == {
        "router": (2 * (6 + 12), 2 * 2 * 3 * 4),
        "base gate, up": (2 * (6 + 30 + 20), 4 * 2 * 15),
        "A of gate, up": (2 * (6 + (3 + 2) * 2), 2 * 3 * 2 * 2),
        "middle: B, SwiGLU, sum": (2 * (30 + (5 + 2) * 2 + 5 * 3), 2 * 5 * 2 * 2),
        "A of down": (2 * (5 * 2 + (5 + 2)), 2 * 5 * 2),
        "base down": (2 * (10 + 15 + 6), 2 * 2 * 15),
        "B of down": (2 * (12 + (3 + 2)), 2 * 3 * 2),
        "full-size matrices": (3 * 2 * (15 + 8), 3 * 2 * 15),
    }
    whole = work.whole()
    assert whole.nbytes == 2 * (45 + 12 + 3 * 8 + 3 * 15 + 12)
    assert whole.flops == sum(flops for _, flops in found.values())
    assert work.dense() == Stage("dense FFN", 2 * (45 + 12), 6 * 2 * 15)


def test_floors_are_those_of_the_benchmarks():
    problem = pytest.importorskip("benchmarks.problem")
    shape = SHAPES["tiny"]._replace(ranks=(0, 1, 4, 0, 16))
    made = problem.Problem(shape, 40, "cpu", torch.float32)
    rows = torch.bincount(made.indices.flatten(), minlength=5).tolist()
    layout = tuple(FULL if rank == 0 else rank for rank in shape.ranks)
    work = Work((layout,) * 3, rows, 40, shape.hidden, shape.intermediate, 4)
    nbytes, flops = made.work(backward=False)
    router = work.stages()[0]
    # There a token that no expert of the base serves does not pay for it.
    idle = 40 - int((made.indices != 3).any(1).sum())
    assert idle == 0 and work.whole().flops == flops + router.flops
    assert work.whole().nbytes == nbytes + 4 * 5 * shape.hidden


def test_bounds():
    roofs = Roofs(copy_tb_s=1.0, matmul_tflop_s=100.0, matmul_dtype="bfloat16")
    assert Stage("", 10**9, 10**10).floor_ms(roofs) == 1.0
    assert Stage("", 10**9, 10**10).bound(roofs) == "bytes"
    assert Stage("", 10**6, 10**12).floor_ms(roofs) == 10.0
    assert Stage("", 10**6, 10**12).bound(roofs) == "operations"


def test_the_report_has_the_ways_that_the_schedule_gives():
    report = run(explain=True, tokens=(240, 1))
    one = report["tokens"][0]
    layouts = [tuple(FULL if rank == 0 else rank for rank in MIXED.ranks)] * 3
    how = schedule.choose(
        layouts, 240, top_k=3, hidden=32, width=48, dtype=torch.float32, kernels=("aten",)
    )
    assert (one["route"], one["dense_down"]) == (how.route, how.dense_down)
    assert tuple(expert["way"] for expert in one["experts"]) == how.ways
    assert sum(expert["rows"] for expert in one["experts"]) == 240 * 3
    assert [entry["tokens"] for entry in report["tokens"]] == [240, 1]
    for entry in report["tokens"]:
        assert entry["layer"]["ms"] > 0 and entry["layer"]["share"] > 0
        assert entry["ratio"] == entry["layer"]["ms"] / entry["dense"]["ms"]
    json.dumps(report)


def test_choices_are_watched_where_forwards_make_them(device, kernels):
    """What is explained is what the forward asked for; kernels that do not ask have one way."""
    layer = explain.make_layer(MIXED, device, torch.float32)
    with schedule.watch() as seen, torch.no_grad():
        layer(torch.randn(5, 32, device=device))
    assert bool(seen) == (kernels == "triton" or device == "cuda")
    assert all(how.ways == ("base", "grouped", "full", "grouped", "grouped") for how in seen[-1:])
    before = len(seen)
    schedule.choose([(FULL, 1)] * 3, 1, top_k=1, hidden=1, width=1, dtype=torch.float32)
    assert len(seen) == before, "watched after the end"


def test_a_prepared_layer_is_explained_as_it_runs():
    report = run(explain=True, merge=16)
    assert [expert["way"] for expert in report["tokens"][0]["experts"]][2:] == [
        "full", "full", "grouped",
    ]  # fmt: skip
    assert "merged expert 3" in report["prepared"]
    assert "merged expert 3" in explain_text.as_text(report)


def test_the_text_says_all_of_it():
    report = run(explain=True)
    text = explain_text.as_text(report)
    for word in ("route loop", "1 x 4, 1 x full-size, 1 x 20, 1 x 4", "its floor", "bound by",
                 "one after the other", "rows (144 expected)", "dense FFN"):  # fmt: skip
        assert word in text
    assert max(map(len, text.splitlines())) <= 120
    report["tokens"][0]["kernels"] = [
        {"kernel": "void (anonymous namespace)::f(int)", "us": 1500.0, "calls": 2.0}
    ]
    line = explain_text.as_text(report).partition("launches")[2].splitlines()[1]
    assert line.split() == ["f", "2", "1.5", "ms", "100%"]


def test_the_command(capsys):
    assert cli.main(["bench", "tiny", "--device", "cpu", "--explain", "--json"]) == 0
    printed = capsys.readouterr()
    report = json.loads(printed.out)
    assert report["shape"] == "tiny" and report["tokens"][0]["stages"]
    assert "timing 64 tokens" in printed.err
    assert cli.main(["bench", "tiny", "--device", "cpu", "--tokens", "1", "8", "--prepare"]) == 0
    assert "ratio" in capsys.readouterr().out
    assert cli.main(["bench", "--list"]) == 0
    assert set(SHAPES) <= set(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("words", "message"),
    [(["huge"], "shape: got 'huge'"), (["tiny", "--ranks", "4y"], "--ranks: got '4y'"),
     (["tiny", "--ranks", "999"], "expert_ranks"), (["tiny", "--top-k", "9"], "top_k")],
)  # fmt: skip
def test_what_the_command_refuses(words, message, capsys):
    assert cli.main(["bench", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


def test_shapes_are_read():
    assert parse("tiny", None, None, None, None) == ("tiny", SHAPES["tiny"])
    name, shape = parse("tiny", 64, None, ["16x2", "0"], None)
    assert (name, shape.hidden, shape.ranks, shape.top_k) == ("your shape", 64, (0, 16, 16, 0), 2)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("tokens", [1, 300])
def test_the_report_on_a_gpu_lists_kernels(tokens):
    shape = Shape("some", 512, 1024, (0, 16, 16, 64), 2, tokens)
    report = explain.run(
        "x", shape, [tokens], device="cuda", dtype=torch.bfloat16, explain=True, merge=None
    )
    one = report["tokens"][0]
    assert one["route"] in ("decode", "token-major")
    assert any("flexmore" in kernel["kernel"] for kernel in one["kernels"])
    assert floors.measure("cuda").copy_tb_s > 0
