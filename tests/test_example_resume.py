"""examples/train_expert.py: no kill changes a bit; what it refuses, by name.

Traps covered: a learning rate or batches that depend on where a run was taken up, AdamW's counts, a
torn file, a kill between the two renames at the end, options that change silently.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys

import pytest
import torch
from example_runs import (
    OWN_SIZES,
    ROOT,
    determinism_restored,
    left,
    run_model,
    run_state,
    train,
    train_expert,
    words,
    write_mixture,
    write_text,
)


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


def moments(out: str) -> list[tuple[str, str, int]]:
    """Five at random steps, few enough that the end stays far, then one of every other kind."""
    draw = random.Random(5)
    found = [("step", draw.randint(1, 7)) for _ in range(5)]
    found += [("torn", 1), ("written", 1), ("renamed", 1), ("saved", 1)]
    return [(out, *one) for one in (*found, ("finish", 1), ("finish", 2), ("", 0))]


def test_killed_and_taken_up_it_ends_with_the_same_bits(text, tmp_path):
    killed = moments(str(tmp_path / "killed"))
    given = json.dumps([(str(tmp_path / "whole"), "", 0), *killed])
    done = subprocess.run(
        [sys.executable, "tests/kill_example.py", given, text,
         *words(steps=18, router_steps=20, warmup=4)],
        cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout.splitlines()[-1])
    assert ends == [0, *[-9] * (len(killed) - 1), 0], done.stderr
    assert done.stderr.count("going on after step") >= 6
    assert "of the expert" in done.stderr and "of the router" in done.stderr
    expected, found = left(tmp_path / "whole"), left(tmp_path / "killed")
    assert expected.keys() == found.keys()
    assert [name for name in expected if expected[name] != found[name]] == []


class Stop(Exception):
    pass


def stopped(text, out, monkeypatch, after: int, **changed):
    """A run that ends after so many states."""
    saved, seen = train_expert.Run._save, []

    def save(self, *given):
        saved(self, *given)
        seen.append(given)
        if len(seen) == after:
            raise Stop

    with monkeypatch.context() as patch, pytest.raises(Stop):
        patch.setattr(train_expert.Run, "_save", save)
        train(text, out, **changed)


def test_a_state_cut_short_is_passed_over(text, tmp_path, monkeypatch, capsys, device):
    train(text, tmp_path / "whole", device=device)
    stopped(text, tmp_path / "cut", monkeypatch, 2, device=device)
    states = sorted((tmp_path / "cut").glob("state-*"))
    os.truncate(states[-1], states[-1].stat().st_size - 1)
    capsys.readouterr()
    train(text, tmp_path / "cut", device=device)
    err = capsys.readouterr().err
    assert f"truncated in {states[-1].name}" in err and "going on after step 3 of the expert" in err
    assert left(tmp_path / "cut") == left(tmp_path / "whole")
    stopped(text, tmp_path / "none", monkeypatch, 2, device=device)
    for path in (tmp_path / "none").glob("state-*"):
        path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match="^out: no state in .* is whole"):
        train(text, tmp_path / "none", device=device)


def test_other_settings_are_refused_by_name(text, mixture, tmp_path, monkeypatch, capsys):
    out, other = tmp_path / "run", tmp_path / "other.txt"
    other.write_text("Another text that is long enough.")
    with pytest.raises(ValueError, match="^out: .*other.txt is a file"):
        train(text, other)
    stopped(text, out, monkeypatch, 1)
    before = left(out)
    for name, value in {
        "rank": 4, "steps": 9, "router_steps": 0, "batch": 3, "length": 11, "learning_rate": 1e-3,
        "router_learning_rate": 0.1, "schedule": "constant", "warmup": 1, "clip": 2.0,
        "z_loss": 0.0, "balance": 0.0, "top_k": 1, "seed": 1, "dtype": "float64", "heads": 1,
        "layers": 1, "hidden_size": 32, "intermediate_size": 16, "router_text": str(other),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')}: got .* was begun with"):
            train(text, out, **{name: value})
    with pytest.raises(ValueError, match="^text: got 'text of 33 ids"):
        train(str(other), out)
    with pytest.raises(ValueError, match="^--.*: got .* was begun with"):
        train(text, out, checkpoint=mixture, **OWN_SIZES)
    assert left(out) == before
    train(text, out)
    capsys.readouterr()
    done = left(out)
    (out / run_model.UNFINISHED).mkdir()  # as a kill just before the end leaves it
    train(text, out)  # done: it says so, and changes nothing
    assert "/model: a FlexMoRE checkpoint" in capsys.readouterr().err
    assert left(out) == done and not (out / run_model.UNFINISHED).exists()
    for path in out.glob("state-*"):
        path.unlink()
    with pytest.raises(ValueError, match="^out: .* has a model"):
        train(text, out)


def test_another_machine_is_told(tmp_path):
    said = []
    for machine in ({"torch": "2.11"}, {"torch": "2.12"}):
        folder = run_state.RunFolder(tmp_path, {"a": 1}, machine, said.append)
        assert (folder.newest() is None) == (machine["torch"] == "2.11")
        folder.save(0, 5, {"model/x": torch.ones(2)})
        with pytest.raises(ValueError, match="^out: another process trains"):
            run_state.RunFolder(tmp_path, {"a": 1}, machine, said.append)
        folder.close()
    assert said == ["torch is 2.12 and was 2.11: the last bits may come out otherwise"]


REFUSED = [
    *((f"--{name}: got {value}; accepted: an integer >= ", {name.replace("-", "_"): value})
      for name, value in (("rank", 0), ("steps", -1), ("router-steps", -1), ("batch", 0),
                          ("length", 0), ("warmup", -1), ("top-k", 0), ("save-every", 0),
                          ("layers", 0), ("seed", -1))),
    *((f"--{name}: got {value}; accepted: a number ", {name.replace("-", "_"): value})
      for name, value in (("learning-rate", 0.0), ("router-learning-rate", "nan"),
                          ("clip", 0.0), ("z-loss", -1.0), ("balance", "inf"))),
    ("--steps: got 0 and --router-steps 0", {"steps": 0, "router_steps": 0}),
    ("--steps: got 0 without --checkpoint", {"steps": 0}),
    ("--heads: got 3; accepted", {"heads": 3}),
    ("--layers: got 2 with --checkpoint", {"checkpoint": "x", **OWN_SIZES, "layers": 2}),
    ("--rank: got 17; accepted: up to min", {"rank": 17}),
    ("--top-k: got 3 of 2 experts", {"top_k": 3}),
    ("--router-text: .*No such file", {"router_text": "absent.txt"}),
    ("text: got 1920 tokens; accepted: at least --length", {"length": 1920}),
]  # fmt: skip


@pytest.mark.parametrize(("message", "changed"), REFUSED, ids=[m for m, _ in REFUSED])
def test_refused(text, tmp_path, message, changed):
    with pytest.raises(ValueError, match=f"^{message}"):
        train(text, tmp_path / "run", **changed)
    assert not (tmp_path / "run/model").exists()


def test_a_loss_that_is_none_ends_the_run(text, tmp_path, monkeypatch):
    """Before a state of it is written over those from before."""
    losses, calls = train_expert.losses_of, []

    def broken(*given):
        calls.append(None)
        total, loss = losses(*given)
        return total, loss / (len(calls) != 5) - loss * (len(calls) == 5)

    monkeypatch.setattr(train_expert, "losses_of", broken)
    with pytest.raises(ValueError, match="^loss: not finite at step 5 of the expert"):
        train(text, tmp_path / "run")
    assert [p.name for p in (tmp_path / "run").glob("state-*")] == ["state-0-00000003.safetensors"]
