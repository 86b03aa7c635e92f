"""examples/train_expert.py: what it trains, what it leaves, and the commands of its README.

Traps covered: rows of the router that are another expert's, experts of a mixture that are masked
out, what is trained in another dtype than what is around it.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
from example_runs import (
    EXAMPLES,
    OWN_SIZES,
    determinism_restored,
    left,
    run_model,
    run_options,
    run_report,
    run_text,
    start,
    train,
    train_expert,
    words,
    write_mixture,
    write_text,
)
from safetensors.torch import load_file

from flexmore_kernels import checkpoint, cli
from flexmore_kernels.testing import assert_same


@pytest.fixture(autouse=True)
def _determinism():
    with determinism_restored():
        yield


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text") / "text.txt")


@pytest.fixture(scope="module")
def mixture(tmp_path_factory):
    return write_mixture(tmp_path_factory.mktemp("mixture") / "made")


def test_the_loss_falls_and_only_the_expert_changes(text, tmp_path):
    changed = {"steps": 60, "router_steps": 0, "save_every": 60, "length": 32, "batch": 4}
    model = train(text, tmp_path / "run", **changed)
    before, after = start(**changed).state_dict(), model.state_dict()
    assert before.keys() == after.keys()
    for name, tensor in after.items():
        if ".experts.1." in name:
            assert not torch.equal(tensor, before[name]), name
        elif ".gate." in name:
            assert_same(tensor[0], before[name][0])
            assert not torch.equal(tensor[1], before[name][1])
        else:
            assert_same(tensor, before[name])
    losses = [json.loads(line) for line in (tmp_path / "run/loss.jsonl").read_text().splitlines()]
    assert [(one["stage"], one["step"]) for one in losses] == [("expert", i + 1) for i in range(60)]
    values = [one["loss"] for one in losses]
    # Of 40 sentences a fixed random model is told apart from what it read: by far more than a nat.
    assert sum(values[-5:]) / 5 < sum(values[:5]) / 5 - 1
    assert (tmp_path / "run/loss.svg").read_text().startswith("<svg")


def test_at_the_start_it_computes_what_the_public_model_does():
    """2 of 2 with B = 0: the two experts are one, and their weights sum to 1."""
    options = run_options.parse(["text", "out", *words()])
    torch.manual_seed(0)
    public, ids = run_model.small_decoder(options, "cpu", torch.float32), torch.arange(9)[None]
    model = run_model.with_expert(public, 3)
    for block in model.model.layers:
        block.mlp.top_k = 2
    torch.testing.assert_close(model(ids), public(ids))


def test_the_router_s_stage_leaves_the_experts(text, tmp_path):
    """The weights in bfloat16, so that what is trained is wider than what is around it."""
    after = train(text, tmp_path / "run", dtype="bfloat16").state_dict()
    states = sorted((tmp_path / "run").glob("state-*"))
    assert [path.name[8:16] for path in states] == ["00000003", "00000006"]  # of the router
    tensors = load_file(states[0])
    for name, tensor in after.items():
        if f"model/{name}" in tensors:
            then = tensors[f"model/{name}"]
            assert then.dtype == torch.float32
            assert torch.equal(then.bfloat16(), tensor) == (".experts." in name), name


def test_two_of_two_are_active_then_top_k(text, mixture, tmp_path, monkeypatch):
    losses, seen = train_expert.losses_of, set()

    def watched(model, stage, *given):
        masked = None if stage.mask is None else stage.mask.tolist()
        seen.update((stage.name, block.mlp.top_k, str(masked)) for block in model.model.layers)
        return losses(model, stage, *given)

    monkeypatch.setattr(train_expert, "losses_of", watched)
    train(text, tmp_path / "run", checkpoint=mixture, top_k=3, **OWN_SIZES)
    assert seen == {("expert", 2, "[True, False, False, True]"), ("router", 3, "None")}


def test_recompute_changes_no_bit(text, tmp_path):
    train(text, tmp_path / "one")
    train(text, tmp_path / "two", "--recompute", save_every=5)
    for name, content in left(tmp_path / "one").items():
        if not name.startswith("state-"):
            assert (tmp_path / "two" / name).read_bytes() == content, name


def test_a_mixture_gets_one_more_expert(text, mixture, tmp_path):
    more = {"checkpoint": mixture, "top_k": 3, "router_steps": 0, **OWN_SIZES}
    model = train(text, tmp_path / "run", **more)
    assert model.config.num_experts == 4 and model.config.num_experts_per_tok == 3
    before, after = checkpoint.load_model(mixture).state_dict(), model.state_dict()
    for name, tensor in before.items():
        assert_same(after[name][: len(tensor)] if ".gate." in name else after[name], tensor)
    assert bool((after["model.layers.0.mlp.gate.expert_bias"][2:] != 0).all())
    assert len(after) == len(before) + 2 * 6
    config = json.loads((tmp_path / "run/expert/adapter_config.json").read_text())
    assert config["r"] == 3 and config["base_model_name_or_path"] == mixture


def test_in_isolation_the_other_experts_do_not_count(text, mixture, tmp_path):
    """Trained beside others than it will be with, the expert comes out the same."""
    tensors = checkpoint.load_model(mixture).state_dict()
    for name, tensor in tensors.items():
        if ".experts.1." in name or ".experts.2." in name:
            tensor.mul_(3)
        elif name.endswith("gate.weight"):
            tensor[1:].mul_(-2)
    config = json.loads((Path(mixture) / "config.json").read_text())
    checkpoint.save_checkpoint(tmp_path / "others", tensors, config)
    found = []
    for place in (mixture, str(tmp_path / "others")):
        out = tmp_path / f"run{len(found)}"
        model = train(text, out, checkpoint=place, router_steps=0, **OWN_SIZES)
        new = {n: t for n, t in model.state_dict().items() if ".experts.3." in n}
        found.append(((out / "loss.jsonl").read_text(), new))
    assert found[0][0] == found[1][0]
    for name, tensor in found[0][1].items():
        assert_same(tensor, found[1][1][name])


def test_the_balancing_loss_evens_the_load(text, mixture, tmp_path):
    def evenness(balance):
        more = {"checkpoint": mixture, "steps": 0, "router_steps": 40, "top_k": 1, **OWN_SIZES}
        model = train(text, tmp_path / str(balance), balance=balance, **more,
                      router_learning_rate=0.05)  # fmt: skip
        assert not (tmp_path / str(balance) / "expert").exists()
        ids = torch.frombuffer(bytearray(Path(text).read_bytes()), dtype=torch.uint8)
        with model.counting() as counted:
            model(ids[None, :480].long())
        load = sum(one.load for one in counted)
        return float((load / load.sum()).square().sum())

    assert evenness(10.0) < evenness(0.0)


def test_batches_depend_on_seed_stage_and_step_alone():
    ids = torch.arange(100, dtype=torch.uint8)
    inputs, targets = run_text.batch_of(ids, 4, 10, 0, 0, 7)
    assert_same(inputs[:, 1:], targets[:, :-1])
    torch.manual_seed(3)
    assert_same(run_text.batch_of(ids, 4, 10, 0, 0, 7)[0], inputs)
    for other in ((1, 0, 7), (0, 1, 7), (0, 0, 8)):
        assert not torch.equal(run_text.batch_of(ids, 4, 10, *other)[0], inputs)
    starts = {int(run_text.batch_of(ids[:12], 1, 10, 0, 0, step)[0][0, 0]) for step in range(50)}
    assert starts == {0, 1}  # both places where 11 ids fit, the last included


def test_bytes_as_a_tokenizer(tmp_path):
    tokenizers = pytest.importorskip("tokenizers")
    made, text = tokenizers.Tokenizer.from_str(run_text.byte_tokenizer()), "naïve ✓\n\t漢字 a  b\0"
    ids = made.encode(text).ids
    assert bytes(ids) == text.encode() and made.decode(ids) == text


def test_the_curve_of_many_steps_stays_small():
    svg = run_report.draw(["expert", "router"], [[5 - i / 1e5 for i in range(100_000)], [1.0]])
    assert len(svg) < 60_000 and "nan" not in svg
    assert "nan" not in run_report.draw(["expert"], [[]])


def test_the_readme_s_commands_run(tmp_path, monkeypatch):
    pytest.importorskip("tokenizers")
    monkeypatch.chdir(tmp_path)
    for name, sentence in (("math", "One and one are two. "), ("code", "return x + 1;\n")):
        Path(f"{name}.txt").write_text(sentence * 50)
    Path("both.txt").write_text(Path("math.txt").read_text() + Path("code.txt").read_text())
    blocks = re.findall(r"^```(\w+)\n(.*?)^```", (EXAMPLES / "README.md").read_text(), re.M | re.S)
    assert {kind for kind, _ in blocks} == {"sh", "console"}
    for kind, block in blocks:
        for line in block.splitlines():
            program, *arguments = shlex.split(line.removeprefix("$ "))
            if program == "python":
                assert arguments.pop(0) == "examples/train_expert.py"
                if kind == "sh":
                    assert train_expert.main(arguments) == 0, line
                else:  # for a GPU: that there are such options
                    run_options.parse(arguments)
            else:
                assert program == "flexmore"
                if kind == "sh":
                    assert cli.main(arguments) == 0, line
                else:
                    cli._parser().parse_args(arguments)
