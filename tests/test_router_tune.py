"""Training the routers alone: what moves, what stays, to the bit, and how often the same.

Traps covered: gradients that were asked for elsewhere, a shared expert's row, chosen rows, narrow
parameters, a projector and its embeddings, padding, a run that fails half-way.
"""

from __future__ import annotations

import math

import pytest
import torch
from router_models import (
    assert_unchanged,
    bits,
    make_model,
    own_words,
    projected,
    rows_of,
)
from torch.nn import functional as F

import flexmore_kernels as fk
from flexmore_kernels import testing
from flexmore_kernels.router_inputs import layers_of, padded
from flexmore_kernels.router_rows import from_embeddings
from flexmore_kernels.router_tune import tune

PROJECTOR = ("projector_in.weight", "projector_out.weight")


def some_batches(count=3):
    return [torch.tensor([docs[i] for docs in own_words(documents=count).values()])
            for i in range(count)]  # fmt: skip


def text_loss(model, batches):
    with torch.no_grad():
        losses = [F.cross_entropy(model(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
                  for ids in batches]  # fmt: skip
    return float(torch.stack(losses).mean())


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_only_the_rows_move_and_the_loss_falls(dtype):
    model, batches = make_model(dtype, expert_bias=True), some_batches()
    model.model.embed_tokens.weight.requires_grad_(False)
    asked = {name: p.requires_grad for name, p in model.named_parameters()}
    before, loss = bits(model), text_loss(model, batches)
    losses = tune(model, batches, 12, learning_rate=0.05)
    assert len(losses) == 12 and text_loss(model, batches) < loss
    assert_unchanged(model, before, but=["gate.weight"])
    for layer, old in zip(layers_of(model), [v for k, v in before.items() if "gate.weight" in k],
                          strict=True):  # fmt: skip
        assert layer.gate.weight.dtype == dtype and not torch.equal(layer.gate.weight, old)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == asked
    assert all(p.grad is None for p in model.parameters())


def test_steps_are_adamw_s_of_the_sum_of_the_losses():
    model, (ids,) = make_model(), some_batches(1)
    twin = make_model()
    twin.load_state_dict(model.state_dict())
    layers, seen, losses = layers_of(twin), [], []
    weights = [layer.gate.weight for layer in layers]
    for layer in layers:
        layer.register_forward_pre_hook(
            lambda m, args, named: (args, {**named, "return_routing": True}), with_kwargs=True
        )
        layer.register_forward_hook(lambda m, args, out: seen.append(out[1]) or out[0])
    optimizer = torch.optim.AdamW(weights, lr=1e-2, betas=(0.9, 0.95), weight_decay=0.0)
    for _ in range(3):
        seen.clear()
        text = F.cross_entropy(twin(ids)[:, :-1].flatten(0, 1), ids[:, 1:].flatten())
        logits, chosen = [one.logits for one in seen], [one.indices for one in seen]
        total = text + 0.3 * fk.ops.load_balancing_loss(logits, chosen)
        optimizer.zero_grad()
        (total + 0.2 * fk.ops.router_z_loss(logits)).backward()
        torch.nn.utils.clip_grad_norm_(weights, 0.5)
        optimizer.step()
        losses.append(text.item())
    assert tune(model, [ids], 3, learning_rate=1e-2, balance=0.3, z_loss=0.2, clip=0.5) == losses
    assert all(map(torch.equal, rows_of(model), rows_of(twin)))


def test_the_seed_is_all_that_chance_has():
    batches, found = some_batches(4), []
    start = bits(make_model())
    for seed in (0, 0, 1):
        model = make_model()
        model.load_state_dict(start)
        losses = tune(model, batches, 6, seed=seed)
        found.append((losses, rows_of(model)))
    assert found[0][0] == found[1][0] != found[2][0]
    assert all(map(torch.equal, found[0][1], found[1][1]))
    assert not any(map(torch.equal, found[0][1], found[2][1]))


def test_chosen_rows_alone():
    model = make_model()
    before = rows_of(model)
    tune(model, some_batches(), 3, experts=["code", 3])
    for rows, old in zip(rows_of(model), before, strict=True):
        assert torch.equal(rows[:2], old[:2]) and not (rows[2:] == old[2:]).all(1).any()


@pytest.mark.parametrize("shared", [0, 2])
def test_a_shared_expert_s_row_stays(shared):
    model = make_model(shared_expert=shared or True)
    before, others = rows_of(model), [e for e in range(4) if e != shared]
    tune(model, some_batches(), 3)
    for rows, old in zip(rows_of(model), before, strict=True):
        assert torch.equal(rows[shared], old[shared])
        assert not (rows[others] == old[others]).all(1).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_projector_is_trained_and_its_embeddings_are_not(dtype):
    model, batches = projected(dtype=dtype), some_batches()
    from_embeddings(model, torch.randn(4, 5))
    before, loss = bits(model), text_loss(model, batches)
    gate = layers_of(model)[0].gate
    layers_of(model)[0].prepare()
    with torch.inference_mode():
        kept = gate.rows().clone()
    tune(model, batches, 12, learning_rate=0.05)
    assert_unchanged(model, before, but=PROJECTOR)
    for name, tensor in model.state_dict().items():
        assert not name.endswith(PROJECTOR) or not torch.equal(tensor, before[name])
    with torch.inference_mode():  # what was kept for serving is not stale
        assert not torch.equal(gate.rows(), kept)
    assert text_loss(model, batches) < loss
    with pytest.raises(ValueError, match="one projector makes all rows"):
        tune(model, batches, 1, experts=[1])


def test_padding_does_not_count():
    model, ids = make_model(), own_words(documents=1)[1][0]
    ids, mask = padded([torch.tensor(ids), torch.tensor(ids[:5])])
    start = bits(model)
    losses = tune(model, [(ids, mask)], 2)
    model.load_state_dict(start)
    # Other padding goes to other experts, which changes how rows are grouped, and so roundings.
    other = tune(model, [(ids.masked_fill(~mask, 7), mask)], 2)
    testing.assert_accurate(*(torch.tensor(each, dtype=torch.float64) for each in (other, losses)))
    with torch.no_grad():
        model.load_state_dict(start)
        logits = [model(row[None, :n])[0, :-1] for row, n in zip(ids, (12, 5), strict=True)]
    targets = torch.cat([ids[0, 1:], ids[1, 1:5]])
    right = F.cross_entropy(torch.cat(logits), targets)
    assert math.isclose(losses[0], float(right), rel_tol=testing.FLOAT64_SLACK)


def test_a_run_that_fails_leaves_the_model_as_it_was():
    model, batches = make_model(torch.float32), some_batches()
    before = bits(model)
    with pytest.raises(ValueError, match="not finite at step 2, the model is as it was"):
        tune(model, batches, 5, learning_rate=1e30, z_loss=1.0)
    model.half()
    before = bits(model)
    with pytest.raises(ValueError, match="gate.weight: not finite after the last step"):
        tune(model, batches, 1, learning_rate=1e5)
    assert_unchanged(model, before)
    assert all(p.requires_grad for p in model.parameters())


def test_bad_input():
    model, batches = make_model(), some_batches()
    before = bits(model)
    for given, change, words in (
        (batches, {"learning_rate": 0}, "learning_rate: got 0; accepted: a number above 0"),
        (batches, {"balance": -1}, "balance: got -1; accepted: a number >= 0"),
        (batches, {"z_loss": math.nan}, "z_loss: got nan"),
        (batches, {"clip": True}, "clip: got True"),
        (batches, {"experts": []}, "experts: got none"),
        (batches, {"experts": ["art"]}, "got 'art'"),
        (batches, {"steps": 0}, "steps: got 0"),
        ([torch.ones(2, 1, dtype=torch.int64)], {}, "S >= 2"),
        ([torch.full((1, 3), 40)], {}, "0 to 39"),
        ([torch.ones(3, dtype=torch.int64)], {}, r"batches\[0\]: got shape \(3,\)"),
        ([(batches[0], torch.zeros_like(batches[0]))], {}, "no token after another"),
    ):
        with pytest.raises(ValueError, match=words):
            tune(model, given, **{"steps": 2, **change})
    for given in ([], batches[0], iter(batches)):
        with pytest.raises(TypeError, match="batches: got"):
            tune(model, given, 2)
    assert_unchanged(model, before)
