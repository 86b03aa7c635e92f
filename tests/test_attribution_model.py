"""`model.attributing`: what the reference's routing says, for each request, in every way to run.

Traps covered: padding, requests that end before others, tokens that come in parts through a cache,
a shared expert, counters beside it, a batch of another size, gradients, a decoding step's graph.
"""

from __future__ import annotations

import pytest
import torch
from test_generation import LENGTHS, NEW, make, prompts, twin

import reference
from flexmore_kernels import testing
from flexmore_kernels.kv_cache import DynamicCache

CACHES = ("static", "dynamic")
EXPERTS = [[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 1, 1]]


def routings(model, ids, mask=None, expert_mask=None):
    """What the reference's layers decide for ids (B, S), one a layer."""
    found = []

    def keep(layer, args, kwargs, _):
        found.append(layer.forward(*args, **kwargs, return_routing=True)[1])

    hooks = [
        block.mlp.register_forward_hook(keep, with_kwargs=True) for block in model.model.layers
    ]
    with torch.no_grad():
        model(ids, mask, expert_mask=expert_mask)
    for hook in hooks:
        hook.remove()
    return found


def expected(model, ids, mask=None, expert_mask=None):
    """rows (L, B, E) and weight_sum (L, B, E) by the reference."""
    counted = None if mask is None else mask.bool()
    E = model.config.num_experts
    each = [
        reference.attribute(
            routing.indices.flatten(0, 1), routing.weights.flatten(0, 1), len(ids), E,
            counted=counted,
        )
        for routing in routings(model, ids, mask, expert_mask)
    ]  # fmt: skip
    rows, weight_sum = zip(*each, strict=True)
    return torch.stack(rows), torch.stack(weight_sum)


def check(attribution, plain, ids, mask=None, expert_mask=None):
    """Rows exactly, weights by the accuracy rule, as those of `plain`, a reference in float32."""
    rows, same = expected(plain, ids, mask, expert_mask)
    testing.assert_same(attribution.layer_rows, rows)
    truth = expected(plain.double(), ids, mask, expert_mask)[1]
    plain.float()
    testing.assert_accurate(attribution.layer_weight_sum.float(), truth, same.float())


@pytest.mark.parametrize("shared", (False, True, 2))
@pytest.mark.parametrize("padding", ("none", "left", "right"))
def test_rows_and_weights_are_the_references(padding, shared, device):
    model = make(device, shared_expert=shared)
    ids, left = prompts(device)
    mask = {"none": None, "left": left, "right": left.flip(1)}[padding]
    experts = torch.tensor(EXPERTS, device=device).bool()
    with model.attributing(3) as attribution, model.routings() as seen:
        model(ids, mask, expert_mask=experts)
    rows = expected(twin(model), ids, mask, experts)[0]
    testing.assert_same(attribution.layer_rows, rows)
    counted = None if mask is None else mask.flatten().bool()
    for layer, routing in enumerate(seen):  # the same weights: exactly their sums
        given = (routing.indices.flatten(0, 1), routing.weights.flatten(0, 1), 3, len(EXPERTS[0]))
        sums = reference.attribute(*given, counted=counted)[1]
        testing.assert_same(attribution.layer_weight_sum[layer], sums)
    tokens = list(LENGTHS) if mask is not None else [7] * 3
    assert attribution.tokens.tolist() == tokens
    assert not attribution.rows[~experts].any() and not attribution.weight_sum[~experts].any()
    if shared is not False:
        number = 0 if shared is True else shared
        always = [n * allowed[number] for n, allowed in zip(tokens, EXPERTS, strict=True)]
        assert attribution.layer_rows[:, :, number].tolist() == [always] * 2


@pytest.mark.parametrize("cache", CACHES)
def test_generation_is_accounted_for(cache, device):
    """The prompts' tokens and all new ones but the last, which no layer has seen."""
    model = make(device)
    ids, mask = prompts(device)
    experts = torch.tensor(EXPERTS, device=device).bool()
    options = {"attention_mask": mask, "expert_mask": experts, "cache": cache}
    with model.attributing(3) as attribution:
        found = model.generate(ids, max_new_tokens=NEW, **options)
    real = torch.cat([mask, torch.ones_like(found[:, 7:-1])], 1)
    check(attribution, twin(model), found[:, :-1], real, experts)
    assert attribution.tokens.tolist() == [length + NEW - 1 for length in LENGTHS]
    testing.assert_same(found, model.generate(ids, max_new_tokens=NEW, **options))


def test_a_requests_account_ends_with_it():
    """As much as of each request alone, however long the others go on."""
    model = make()
    ids, mask = prompts()
    stops = model.generate(ids, attention_mask=mask, max_new_tokens=2)[0, -1:].tolist()
    options = {"max_new_tokens": NEW, "eos_token_id": stops}
    with model.attributing(3) as together:
        found = model.generate(ids, attention_mask=mask, **options)
    assert found.shape[1] == 7 + NEW and int(together.tokens[0]) == LENGTHS[0] + 1
    for row, length in enumerate(LENGTHS):
        with model.attributing(1) as alone:
            model.generate(ids[row : row + 1, -length:], **options)
        testing.assert_same(together.layer_rows[:, row], alone.layer_rows[:, 0])
        testing.assert_same(together.tokens[row], alone.tokens[0])


def test_tokens_in_parts_are_the_same_account():
    model = make(dtype=torch.float64)
    ids, _ = prompts()
    with model.attributing(3) as whole:
        model(ids)
    with model.attributing(3) as parts:
        cache = DynamicCache()
        for part in ids.split(3, 1):
            model(part, cache=cache)
    testing.assert_same(parts.layer_rows, whole.layer_rows)
    testing.assert_same(parts.tokens, whole.tokens)


def test_beside_counters_and_within_another():
    model = make()
    ids, mask = prompts()
    with model.attributing(3) as outer, model.counting() as counted:
        model(ids, mask)
        with model.attributing(2) as inner:
            model(ids[:2])
        model(ids, mask)
    model(ids, mask)
    assert outer.tokens.tolist() == [2 * length for length in LENGTHS]
    assert inner.tokens.tolist() == [7, 7]
    for layer, statistics in enumerate(counted):
        rows = outer.layer_rows[layer].sum(0) + inner.layer_rows[layer].sum(0)
        testing.assert_same(statistics.load, rows)


def test_another_batch_is_refused_before_anything_is_counted():
    model = make()
    ids, _ = prompts()
    with model.attributing(2) as attribution:
        with pytest.raises(ValueError, match="^input_ids: got 3 rows; accepted: 2, as"):
            model(ids)
        with pytest.raises(ValueError, match="^input_ids: got 3 rows; accepted: 2, as"):
            model.generate(ids, max_new_tokens=2)
    assert not any(part.any() for part in attribution)
    with pytest.raises(ValueError, match="^num_requests: got 0"), model.attributing(0):
        pass
    model(ids)


def test_training_goes_on_as_before():
    """The same bits of logits and gradients, beside an account."""
    model = make().requires_grad_(True)
    ids, _ = prompts()
    plain = model(ids)
    plain.sum().backward()
    grads = [parameter.grad for parameter in model.parameters()]
    model.zero_grad()
    with model.attributing(3) as attribution:
        logits = model(ids)
        logits.sum().backward()
    testing.assert_same(logits, plain)
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        testing.assert_same(parameter.grad, grad)
    assert int(attribution.rows.sum()) == 3 * 7 * 2 * 2
    assert not any(part.requires_grad for part in attribution)


def test_compiles_to_one_graph():
    torch._dynamo.reset()
    model = make()
    ids, mask = prompts()
    with model.attributing(3) as attribution:
        model(ids, mask)
        eager = [part.clone() for part in attribution]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        attribution.zero_()
        compiled(ids, mask)
    for found, wanted in zip(attribution, eager, strict=True):
        testing.assert_same(found, wanted)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_graphs_account_is_the_steps():
    model = make("cuda", torch.bfloat16)
    ids, mask = prompts("cuda")
    stop = int(model.generate(ids, attention_mask=mask, max_new_tokens=12)[0, -1])
    accounts = []
    for graph in (False, True):
        with model.attributing(3) as attribution:
            model.generate(
                ids, attention_mask=mask, max_new_tokens=24, eos_token_id=stop, cuda_graph=graph
            )
        accounts.append(attribution)
    for a, b in zip(*accounts, strict=True):
        testing.assert_same(a, b)
    assert accounts[0].tokens.min() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_a_step_is_one_launch_more_a_layer():
    from torch.profiler import ProfilerActivity, profile

    model = make("cuda", torch.bfloat16)
    ids, _ = prompts("cuda")
    with torch.no_grad(), model.attributing(3):
        model(ids[:, :1])
        with profile(activities=[ProfilerActivity.CUDA]) as profiled:
            model(ids[:, :1])
            torch.cuda.synchronize()
    found = [event.name for event in profiled.events() if "flexmore_attribute" in event.name]
    assert len(found) == len(model.model.layers)
