"""examples/federated/study.py: the whole study at a tiny size, stopped and taken up, and its parts.

Traps covered: an expert's training that moves the base or its row, a kill that changes a number, an
old expert's weights that change when one joins, results of another form than results.py says.
"""

from __future__ import annotations

import json
import math

import federated_results
import pytest
import torch
from federated_runs import (
    EARLY,
    LATE,
    STEP,
    TINY,
    flexolmo,
    models,
    parts,
    routers,
    run,
    scores,
    seeds,
    tiny_seed,
    tiny_store,
)

from flexmore_kernels.checkpoint import load_model
from flexmore_kernels.domains_demo import PROMPTS
from flexmore_kernels.text import TOKENIZER_FILE

FREE = dict.fromkeys(("domains", "probes", "losses", "experts", "own_share", "dense", "all",
                      "average", "continued", "seconds"), 1) | {"without": 2}  # fmt: skip
"""Whose keys a run chooses, to this depth: domains, probes."""


def form(value, free: int = 0):
    """Keys and kinds of a value; of a list, and of what has free keys, the first entry's."""
    if isinstance(value, dict):
        deeper = {k: form(v, FREE.get(k, max(0, free - 1))) for k, v in value.items()}
        return next(iter(deeper.values()), None) if free else deeper
    if isinstance(value, list):
        return [form(value[0])] if value else []
    return "number" if isinstance(value, (int, float)) else type(value).__name__


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a finished study, and its results. It was stopped in trainings and in scorings,
    with a piece half written, and taken up."""
    out = tmp_path_factory.mktemp("federated") / "out"
    left, losses, step = [0], scores.losses, torch.optim.AdamW.step

    def stopping(real):
        def call(*args, **named):
            left[0] -= 1
            if left[0] == 0:
                raise KeyboardInterrupt
            return real(*args, **named)

        return call

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scores, "losses", stopping(losses))
        patch.setattr(torch.optim.AdamW, "step", stopping(step))
        for count in (20, 50, 70):
            left[0] = count
            with pytest.raises(KeyboardInterrupt):
                run(out, patch)
            (out / "seed-0").mkdir(exist_ok=True)
            (out / "seed-0/left.json.tmp").write_text("{")
        assert run(out, patch) == 0
    return out, json.loads((out / "results.json").read_text())


def test_results_have_the_form_that_is_promised(finished):
    results, made_up = finished[1] | {"settings": 0}, federated_results.fake_results()
    assert form(results) == form(made_up | {"settings": 0})
    every = [{key: kind for key, kind in form(m).items() if key not in ("rank", "active")}
             for m in made_up["seeds"][0]["mixtures"]]  # fmt: skip
    for mixture in results["seeds"][0]["mixtures"]:
        found = {k: v for k, v in form(mixture).items() if k not in ("rank", "active")}
        assert found in every, mixture["kind"]


def test_results_are_whole(finished):
    out, results = finished
    seed = results["seeds"][0]
    found = {(m["kind"], m["active"], m["rank"]) for m in seed["mixtures"]}
    assert {r for k, a, r in found if (k, a) == ("uniform", 2)} == set(TINY.ranks) == {1, 2, 4, 8}
    assert {("full", a, "full") for a in (2, "all")} <= found
    assert {("data-aware", a, 2) for a in (2, "all")} <= found
    assert set(seed["experts"]) == {*EARLY, LATE}
    assert set(seed["opt_out"]["without"]) == set(EARLY)
    assert set(seed["nexus"]["routers"]) == set(routers.ROUTERS)
    assert set(seed["nexus"]["routers"]["ridge"]["late_after"]["own_share"]) == {*EARLY, LATE}
    numbers = [loss["token"] for loss in seed["base"]["losses"].values()]
    assert all(0 < number < 2 * math.log(TINY.vocabulary) for number in numbers)
    assert (out / "page.html").is_file()
    times = [(entry["what"], entry["name"], entry["active"]) for entry in results["speed"]]
    assert ("layer", "dense", 1) in times and ("model", "full", "all") in times


def test_mixtures_sizes_and_budgets(finished):
    _, results = finished
    mixtures = {(m["kind"], m["active"], m["rank"]): m for m in results["seeds"][0]["mixtures"]}
    unit = len(EARLY) * TINY.layers * 3 * (TINY.hidden_size + TINY.intermediate_size)
    full = len(EARLY) * TINY.layers * 3 * TINY.hidden_size * TINY.intermediate_size
    assert mixtures["uniform", 2, 4]["parameters"] == 4 * unit
    assert mixtures["full", 2, "full"]["parameters"] == full
    for kind in ("weighted", "spectral", "data-aware"):
        assert mixtures[kind, 2, 2]["bytes"] <= mixtures["uniform", 2, 2]["bytes"]
    # Of full rank the factors are the experts, but for rounding.
    for domain, loss in mixtures["uniform", 2, 8]["losses"].items():
        assert loss["token"] == pytest.approx(
            mixtures["full", 2, "full"]["losses"][domain]["token"], rel=1e-4
        )
    everyone = mixtures["full", "all", "full"]["own_share"]
    assert everyone == dict.fromkeys(EARLY, 1.0)


def test_a_finished_study_does_nothing_again(finished, monkeypatch):
    out, results = finished
    monkeypatch.setattr(seeds, "train", None)
    monkeypatch.setattr(scores, "losses", None)
    assert run(out, monkeypatch) == 0
    assert json.loads((out / "results.json").read_text()) == results


def test_a_kill_changes_no_number(finished, tmp_path):
    """Against pieces that were made at once, in another order."""
    out, _ = finished
    seed, stopped = tiny_seed(tmp_path), tiny_store(out)
    plan = {piece.name: piece for piece in (*flexolmo.pieces(seed), *routers.pieces(seed))}
    assert all(stopped.has(name) for name in plan)
    for part in ("router-projected", "tuned", "mixture-data-aware-2-2", "expert-codes", "base"):
        found = json.loads(json.dumps(plan[f"seed-0/{part}"].make()))
        assert found == stopped.read(f"seed-0/{part}"), part
    stopped.close()


def test_other_settings_and_a_second_process_are_refused(finished, tmp_path):
    out, _ = finished
    changed = TINY.changed(base_tokens=31 * STEP).as_dict()
    with pytest.raises(ValueError, match="base_tokens: got 1984, but .* begun with 1920"):
        parts.Store(out, changed, torch.device("cpu"))
    store = tiny_store(tmp_path)
    with pytest.raises(ValueError, match="another process is at work"):
        tiny_store(tmp_path)
    store.close()


def test_an_experts_training_leaves_the_base_alone(tmp_path):
    seed = tiny_seed(tmp_path)
    before = {name: tensor.clone() for name, tensor in seed.base.items()}
    expert, rows = seed.expert(EARLY[0]), seed.expert_rows(EARLY[0])
    seed.dense(EARLY[0])
    for name, tensor in seed.base.items():
        assert torch.equal(tensor, before[name]), name
    assert all(not torch.equal(weight, seed.base_ffn[place]) for place, weight in expert.items())
    assert bool((rows != seed._first_rows(EARLY[0])).any())
    together = seed.rows(EARLY)
    assert torch.equal(together[:, 0], torch.zeros(TINY.layers, TINY.hidden_size))
    assert torch.equal(together[:, 1], rows)


def test_a_newcomer_leaves_old_experts_alone(tmp_path):
    seed = tiny_seed(tmp_path)
    for router in ("linear", "domain", "projected"):
        old = routers._upcycled(seed, router)
        new = routers._extended(seed, router, old)
        for expert in range(len(EARLY) + 1):
            mine, theirs = (models.ffn_of(m.state_dict(), TINY.layers, expert) for m in (old, new))
            assert all(torch.equal(mine[place], theirs[place]) for place in mine)
        for layer in range(TINY.layers):
            pair = [m.model.layers[layer].mlp.gate.rows() for m in (old, new)]
            # Of the projected router the same rows come out of another product.
            torch.testing.assert_close(pair[1][: len(EARLY) + 1], pair[0])
            assert bool(pair[1][len(EARLY) + 1].any())
        late = seed.dense(LATE)
        name = "model.norm.weight"
        expected = torch.lerp(old.state_dict()[name], late[name], 1 / (len(EARLY) + 1))
        torch.testing.assert_close(new.state_dict()[name], expected)


def test_rows_of_the_router_are_trained_or_solved(tmp_path):
    seed = tiny_seed(tmp_path)
    for router in routers.ROUTERS:
        model = routers._upcycled(seed, router)
        before = [block.mlp.gate.rows().clone() for block in model.model.layers]
        routers._tune(seed, router, model, seed.source(*EARLY), 2 * STEP, "upcycled")
        for block, rows in zip(model.model.layers, before, strict=True):
            assert torch.equal(block.mlp.gate.rows(), rows) == (router == "ridge")


def test_opt_out_masks_the_expert(finished, tmp_path):
    _, results = finished
    found = results["seeds"][0]["opt_out"]
    assert found["all"] == next(
        m["losses"] for m in results["seeds"][0]["mixtures"]
        if (m["kind"], m["active"]) == ("full", 2)
    )  # fmt: skip
    seed = tiny_seed(tmp_path)
    model, experts, _ = flexolmo.early_mixture(seed, "full", 2, "full")
    mask = torch.tensor([True, False, True])
    _, shares = scores.losses(model, seed.corpus.heldout, owner={EARLY[0]: 1}, mask=mask)
    assert shares == {EARLY[0]: 0.0}


def test_export_is_a_checkpoint_with_cards(finished, tmp_path, monkeypatch):
    out, _ = finished
    (out / TOKENIZER_FILE).write_text("{}")
    monkeypatch.setattr("export.samples", lambda *_: {LATE: {"prompt": "a", "text": "b"}})
    assert run(out, monkeypatch, export=str(tmp_path / "model")) == 0
    model = load_model(tmp_path / "model")
    assert [card.name for card in model.cards] == ["base", *EARLY, LATE]
    assert model.cards[1].licence == "CC0"
    assert model.lm_head.weight.dtype == torch.bfloat16
    assert (tmp_path / "model" / TOKENIZER_FILE).read_text() == "{}"
    samples = json.loads((tmp_path / "model" / PROMPTS).read_text())
    assert samples[LATE] == {"prompt": "a", "text": "b"}
    card = (tmp_path / "model/README.md").read_text()
    assert f"| {LATE} | Made up | CC0 |" in card and "{" not in card
    with pytest.raises(ValueError, match="directory"):
        run(out, monkeypatch, export=str(tmp_path / "model"))
    with pytest.raises(ValueError, match="is not finished"):
        run(tmp_path / "other", monkeypatch, export=str(tmp_path / "more"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
def test_the_study_on_a_gpu(finished, tmp_path, monkeypatch):
    """In bfloat16, another initialisation: losses are near the CPU's, no more."""
    _, results = finished
    assert run(tmp_path / "out", monkeypatch, device="cuda") == 0
    found = json.loads((tmp_path / "out/results.json").read_text())
    assert form(found) == form(results)
    for domain, loss in results["seeds"][0]["base"]["losses"].items():
        other = found["seeds"][0]["base"]["losses"][domain]["token"]
        assert other == pytest.approx(loss["token"], rel=0.1)
