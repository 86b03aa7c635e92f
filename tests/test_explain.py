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
    nbytes, flops = made.work()
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
    how = schedule.choose(layouts, 240, hidden=32, width=48, dtype=torch.float32, kernels=("aten",))
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
    schedule.choose([(FULL, 1)] * 3, 1, hidden=1, width=1, dtype=torch.float32)
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


GPU = {"hidden": 4096, "width": 11008, "dtype": torch.bfloat16}


def explained(ranks, tokens, kernels=("native", "triton"), on_hopper=True, **sizes):
    """What is said of a forward on a GPU that is not here: what serves it, and the text."""
    sizes = GPU | sizes
    layouts = list(zip(*((r if isinstance(r, tuple) else (r,) * 3) for r in ranks), strict=True))
    decode = "native" in kernels
    how = schedule.choose(layouts, tokens, **sizes, kernels=kernels, decode=decode)
    found = explain.served(
        how, layouts, tokens, 5, sizes["hidden"], sizes["width"], on_hopper and decode
    )
    entries = enumerate(zip(how.ways, zip(*layouts, strict=True), strict=True))
    one = {
        "tokens": tokens, "route": how.route, "dense_down": how.dense_down,
        "by_library": how.by_library, "served": found, "expected_rows": 1.0, "kernels": [],
        "experts": [{"expert": e, "ranks": explain._ranks(own), "way": way, "rows": 1}
                    for e, (way, own) in entries],
        "stages": [], "layer": {"nbytes": 1, "flops": 1, "floor_ms": 1.0, "bound": "bytes"},
    }  # fmt: skip
    return found, "\n".join(explain_text._explained(one))


@pytest.mark.parametrize("ranks", [(FULL, 1, 4, 8, 64, 256, 2048), (FULL, *[16] * 11)])
def test_few_tokens_are_said_to_be_the_library_s(ranks):
    found, text = explained(ranks, 16)
    assert found == {"all": "the library"}
    assert "route decode" in text and "kernels: the library" in text
    assert "fused" in text and "added by the library" in text
    assert "grouped" not in text and "of down" not in text


def test_many_experts_are_said_to_be_whose_they_are():
    found, text = explained((FULL, *[32] * 63), 4096)
    assert found == {"all": "the library"}
    assert "route expert-major" in text and "added by the library" in text
    for ranks, kernels in (((FULL, *[33] * 63), ("native", "triton")),
                           ((FULL, *[32] * 63), ("triton",))):  # fmt: skip
        found, text = explained(ranks, 4096, kernels)
        assert found == {"all": "Triton"} and "kernels: Triton" in text
        assert "by the library" not in text and "grouped" in text and "by rows" in text


@pytest.mark.parametrize(
    ("ranks", "tokens", "sizes", "said"),
    [
        ([64] * 6, 4096, {}, "library (hidden sum, deltas of down)"),
        ([64] * 6, 1023, {}, "library (hidden sum); Triton (deltas of down)"),
        ([64] * 6, 511, {}, "Triton (hidden sum, deltas of down)"),
        ([64] * 7, 4096, {}, "Triton (hidden sum); the library (deltas of down)"),
        ([(16, 16, 0)] * 2, 4096, {}, "library (hidden sum)"),
        ([64] * 6, 4096, {"on_hopper": False}, "Triton (hidden sum, deltas of down)"),
        ([64] * 6, 4096, {"kernels": ("triton",)}, "Triton (hidden sum, deltas of down)"),
        ([64] * 6, 4096, {"width": 11000}, "Triton (hidden sum); the library (deltas of down)"),
        ([64] * 6, 4096, {"hidden": 4100}, "library (hidden sum); Triton (deltas of down)"),
        ([1, 64, 256, 2048], 4096, {},
         "library (hidden sum, rows of their own, deltas of down)"),
        ([*[16] * 5, 256], 4096, {}, "library (hidden sum, rows of their own, deltas of down)"),
        ([*[16] * 6, 256], 4096, {},
         "Triton (hidden sum); the library (rows of their own, deltas of down)"),
        ([*[16] * 6, FULL], 4096, {},
         "library (hidden sum, rows of their own); cuBLAS (deltas of down)"),
        ([FULL] * 6, 4096, {}, "library (rows of their own)"),
        ([(16, 16, FULL), 16], 100, {}, "Triton (hidden sum, deltas of down)"),
    ],
)  # fmt: skip
def test_who_serves_few_experts(ranks, tokens, sizes, said):
    pytest.importorskip("triton")
    _, text = explained((FULL, *ranks), tokens, **sizes)
    assert "route token-major" in text
    (line,) = (line for line in text.splitlines() if line.startswith("kernels: "))
    assert line.removeprefix("kernels: ").removeprefix("the ") == said


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
     (["tiny", "--ranks", "999"], "expert_ranks"), (["tiny", "--top-k", "9"], "top_k"),
     (["tiny", "--ranks", "64x0"], "--ranks: got '64x0'; accepted: a rank"),
     (["tiny", "--ranks", "4", "64x-1"], "--ranks: got '64x-1'; accepted: a rank"),
     (["tiny", "--ranks", "64x"], "the count >= 1"),
     (["tiny", "--ranks", "8x1100"], "expert_ranks")],
)  # fmt: skip
def test_what_the_command_refuses(words, message, capsys, monkeypatch):
    monkeypatch.setattr(floors, "measure", lambda device: pytest.fail("roofs were measured"))
    assert cli.main(["bench", "--device", "cpu", *words]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("command", ["bench", "demo"])
def test_a_device_that_is_not_here(command, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main([command, "--device", "cuda"]) == 2
    assert capsys.readouterr().err == (
        f"flexmore {command}: device: got 'cuda', but torch finds no NVIDIA GPU here; "
        "accepted: 'cpu'\n"
    )


@pytest.mark.parametrize(
    ("error", "words"),
    [(torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory"),
     (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out of memory"),
     (ValueError("a number\nand more"), "ValueError"), (RuntimeError("no kernel"), "no kernel")],
)  # fmt: skip
def test_what_fails_while_it_is_timed_is_one_line(error, words, capsys, monkeypatch):
    def fail():
        raise error

    timed = lambda *_: explain.timing.compare({"dense FFN": fail}, "cpu")
    monkeypatch.setattr(explain, "_measure", timed)
    assert cli.main(["bench", "tiny", "--device", "cpu"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line.startswith("flexmore bench: ") and words in line
    assert "while the dense FFN was timed" in line and (
        "--tokens" in line or "`flexmore env`" in line
    )


def test_memory_that_does_not_suffice_is_one_line(capsys, monkeypatch):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore")

    monkeypatch.setattr(explain, "make_layer", fail)
    assert cli.main(["bench", "tiny", "--device", "cpu"]) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert "Tried to allocate 2 GiB" in line and "take fewer --tokens" in line
    monkeypatch.setattr(explain, "make_layer", lambda *_: [][0:1].no_such)
    with pytest.raises(AttributeError):
        cli.main(["bench", "tiny", "--device", "cpu"])


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
