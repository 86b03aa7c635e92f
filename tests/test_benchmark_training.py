"""Benchmarks of training: what is trained, what is checked before it is timed, what is kept.

Traps covered: a gradient that is wrong in one trained tensor alone; gradients of what is frozen; a
step through other kernels than those that are timed.
"""

from __future__ import annotations

import pytest
import torch
from test_benchmarks import CONTEXT, layer_records, quiet

from benchmarks import bench_experts, run, training
from benchmarks.aims import DENSE_FORWARD, TRAINING
from benchmarks.candidates import CANDIDATES
from benchmarks.problem import Problem
from benchmarks.shapes import SHAPES, Shape

STEPS = [name for name in training.PASSES if name != training.FORWARD]
OURS = ("ours, layer", "ours, experts")
MIXED = Shape("", 16, 24, (0, 4, 0, 2), 3, 12)


def trained(problem) -> set[str]:
    return {name for name, p in problem.layer.named_parameters() if p.requires_grad}


def test_what_each_pass_trains():
    problem, found = Problem(MIXED, 12, "cpu", torch.float32), {}
    names = {name for name, _ in problem.layer.named_parameters()}
    for which in training.PASSES:
        problem.train(training.PASSES[which])
        found[which] = trained(problem)
        assert problem.layer.recompute is (which == training.RECOMPUTE)
    frozen = {name for name in names if name.endswith("_proj.weight")}
    assert found[training.STEP] == found[training.RECOMPUTE] == names - frozen
    assert found[training.ALL] == names
    assert found[training.ONE] == {name for name in names if name.startswith("experts.1.")}
    stacked = Problem(MIXED._replace(ranks=(0, *[2] * 66)), 12, "cpu", torch.float32)
    with pytest.raises(ValueError, match="got stacked factors"):
        stacked.train(training.PASSES[training.ONE])


@pytest.mark.parametrize("which", STEPS)
def test_steps_are_checked_and_measured(which):
    names = [*OURS, "fair eager, by index", "dense FFN"]
    (record,) = layer_records(names, passes=[which])
    assert record["pass"] == which
    for name, found in record["results"].items():
        assert "ms" in found and found["saved_kb_a_token"] > 0, (name, found)
        assert (found.get("gradient_error_ratio", 2) <= 1) is (name in OURS)
    small, kept = (
        record["results"][name]["saved_kb_a_token"] for name in ("ours, layer", names[2])
    )
    assert small < kept and (small < 2 * 4 * 0.128) is (which == training.RECOMPUTE)


@pytest.mark.parametrize("name", OURS)
def test_every_trained_tensor_is_compared(name):
    """One wrong row of one tensor's gradient, whichever it is, is found."""
    candidate = CANDIDATES[name]
    problem = Problem(MIXED, 12, "cpu", torch.float32)
    problem.train(training.PASSES[training.ALL])
    run_it, tensors = candidate.make(problem), candidate.trains(problem)
    given = (problem, candidate.what, run_it, tensors, 8)
    assert training.gradient_error(*given) <= 1
    for tensor in tensors:
        hook = tensor.register_hook(lambda grad: grad + 0.01 * grad.abs().max())
        assert training.gradient_error(*given) > 1, tensor.shape
        hook.remove()


def test_wrong_gradients_are_not_timed(monkeypatch):
    def make(p):
        return lambda: p.layer(p.x * 1.0) + 0 * p.x.sum() + (p.x - p.x.detach())

    wrong = CANDIDATES["ours, layer"]._replace(make=make)
    monkeypatch.setitem(CANDIDATES, "ours, layer", wrong)
    (record,) = layer_records(["ours, layer"], passes=[training.STEP])
    found = record["results"]["ours, layer"]
    assert found["error_ratio"] <= 1 < found["gradient_error_ratio"]
    assert found["not_run"] == "WRONG" and "ms" not in found


@pytest.mark.slow
def test_the_dense_ffn_s_forward_is_a_forward():
    (record,) = layer_records([DENSE_FORWARD, "dense FFN"], passes=[training.ALL])
    forward, step = (record["results"][name] for name in (DENSE_FORWARD, "dense FFN"))
    assert "saved_kb_a_token" not in forward and forward["error_ratio"] <= 1
    # The same time's share of three times the operations.
    rate = step["tflop_s"] * step["ms"] / (forward["tflop_s"] * forward["ms"])
    assert rate == pytest.approx(3, rel=1e-3)


def test_peft_s_lora_on_a_dense_ffn():
    pytest.importorskip("peft")
    name = "PEFT LoRA on a dense FFN"
    pair = MIXED._replace(ranks=(0, 4), top_k=2)
    problem = Problem(pair, 12, "cpu", torch.float32)
    problem.train(training.PASSES[training.ONE])
    calls, results = bench_experts._build(problem, [name], training.ONE, quiet, float("inf"))
    assert name in calls and results[name]["error_ratio"] <= 1
    assert len(CANDIDATES[name].trains(problem)) == 7, "x and six factors"
    for ranks in ((0, 0), (0, 4, 4)):
        other = Problem(pair._replace(ranks=ranks), 12, "cpu", torch.float32)
        assert CANDIDATES[name].fits(other)


def test_merged_matrices_are_trained_where_all_experts_are_full_size():
    full = MIXED._replace(ranks=(0, 0, 0))
    problem = Problem(full, 12, "cpu", torch.float32)
    candidate = CANDIDATES["torch grouped_mm"]
    for which, count in ((training.STEP, 2), (training.ONE, None), (training.ALL, 4)):
        problem.train(training.PASSES[which])
        found = candidate.trains(problem)
        assert (found and len(found)) == count
    forward = candidate.make(problem)()
    grads = torch.autograd.grad(forward, candidate.trains(problem), problem.dy)
    ours = CANDIDATES["ours, layer"].make(problem)()
    base = problem.weights[2][0]
    (own,) = torch.autograd.grad(ours, [base], problem.dy)
    torch.testing.assert_close(grads[3][0], own)


def test_every_step_of_the_table_is_taken():
    groups = run.training_steps()
    for aim in TRAINING:
        if aim.device != "CPU":
            wanted = (aim.shape, aim.tokens, aim.which)
            (group,) = (g for g in groups if (g.shape, g.tokens, g.which) == wanted)
            assert {"ours, layer", DENSE_FORWARD} <= set(group.names), aim.case
    assert all(name in CANDIDATES for group in groups for name in group.names)
    assert sum(group.expected_s for group in groups) <= 300
    assert {group.shape for group in groups} <= set(SHAPES)


def test_each_group_says_how_long_it_takes(monkeypatch):
    said = []
    monkeypatch.setattr(bench_experts, "price", lambda *a, **k: None)
    progress = run.Progress(100)
    monkeypatch.setattr(progress, "say", said.append)
    groups = [run.layer("tiny", 1, (), 50, training.ONE)]
    run.take(groups, "cpu", torch.float32, progress, CONTEXT, quiet)
    title = "1/1 layer, tiny, T = 1, forward + backward, one expert"
    assert said == [f"{title}: about 50 s on an H100"]
