"""Opting out is exact: a request without an expert is a request to a model that never had it.

The other model is made of the same weights, less the expert's and its router's row. Traps covered:
neighbours that use the expert, each request without another one, the softmax over those that are
left, the bias's shifted places, a projected router's embeddings, a shared expert that is excluded
or whose number moves, caches, and the counter, which is zero.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_attribution_model import check
from test_generation import LENGTHS, NEW, prompts

import flexmore_kernels as fk
import reference
from flexmore_kernels import testing

E = 5
CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "expert_ranks": [0, 3, 0, 5, 2],
    "rope_theta": 10000.0,
    "expert_bias": True,
}
ROUTERS = {
    "linear": {},
    "linear, no bias": {"expert_bias": False},
    "normalised sigmoid": {"norm_topk_prob": True, "scoring": "sigmoid"},
    "projected": {"router": "projected", "domain_embedding_size": 6, "projector_size": 9},
    "base shared": {"shared_expert": True},
    "projected, one shared": {
        "router": "projected", "domain_embedding_size": 6, "shared_expert": 3,
    },
}  # fmt: skip
OUT = (1, None, 3)  # what each request is without: low-rank ones, or none
EVERY = (2, 4, 1)


def make(router, device="cpu", dtype=torch.float64, **change):
    config = fk.FlexMoREConfig(**(CONFIG | ROUTERS[router] | change))
    model = fk.FlexMoREForCausalLM(config)
    with torch.no_grad():
        for tensor in model.state_dict().values():
            offset = 1.0 if tensor.dim() == 1 else 0.0
            tensor.copy_(offset + torch.randn(tensor.shape) * tensor.shape[-1] ** -0.5)
        for block in model.model.layers:
            if block.mlp.gate.expert_bias is not None:
                block.mlp.gate.expert_bias.copy_(torch.linspace(-0.3, 0.1, E - 1))
    return model.to(device, dtype).requires_grad_(False)


def built_without(package, model, expert):
    """A model of `package` with the weights of `model`, that never had `expert`; None: with all."""
    config, state = model.config, model.state_dict()
    if expert is not None:
        shared = config.shared_expert
        if shared is not False and shared is not True:
            shared = False if shared == expert else shared - (shared > expert)
        ranks = [rank for e, rank in enumerate(config.expert_ranks) if e != expert]
        config = dataclasses.replace(
            config, num_experts=E - 1, expert_ranks=ranks, shared_expert=shared
        )
        state = dict(_less(state, expert))
    weight = model.model.embed_tokens.weight
    other = package.FlexMoREForCausalLM(config, device=weight.device, dtype=weight.dtype)
    other.load_state_dict(state)
    return other.requires_grad_(False)


def _less(state, expert):
    for name, tensor in state.items():
        before, found, after = name.partition(".experts.")
        if found:
            number, _, rest = after.partition(".")
            if int(number) != expert:
                yield f"{before}.experts.{int(number) - (int(number) > expert)}.{rest}", tensor
        elif name.endswith(("gate.weight", "gate.domain_embeddings", "gate.expert_bias")):
            place = expert - name.endswith("expert_bias")
            yield name, torch.cat([tensor[:place], tensor[place + 1 :]])
        else:
            yield name, tensor


def masks(out, device="cpu"):
    mask = torch.ones(len(out), E, dtype=torch.bool, device=device)
    for row, expert in enumerate(out):
        if expert is not None:
            mask[row, expert] = False
    return mask


@pytest.mark.parametrize("out", (OUT, EVERY), ids=str)
@pytest.mark.parametrize("router", ROUTERS)
def test_a_prompt_is_as_without_the_expert(router, out):
    """In a batch where each request is without another expert, or one of them without none."""
    model = make(router)
    ids, mask = prompts()
    with model.attributing(3) as attribution:
        logits = model(ids, mask, expert_mask=masks(out))
    for row, expert in enumerate(out):
        real = mask[row].bool()
        for package in (fk, reference):
            other = built_without(package, model, expert)
            truth = other(ids[row : row + 1], mask[row : row + 1])[0, real]
            testing.assert_accurate(logits[row, real], truth, name=f"without {expert}")
    excluded = ~masks(out)
    assert not attribution.layer_rows[:, excluded].any()
    assert not attribution.layer_units[:, excluded].any()
    with model.attributing(3) as before:
        all_experts = model(ids, mask)
    assert before.rows[excluded].any(), "they would have used it"
    without = torch.tensor([expert is not None for expert in out])
    assert not torch.allclose(logits[without, -1], all_experts[without, -1])
    if not without.all():
        testing.assert_same(attribution.rows[~without], before.rows[~without])
        assert attribution.rows[~without][:, excluded.any(0)].any(), "a neighbour does"


@pytest.mark.parametrize("router", ("linear", "projected", "projected, one shared"))
def test_all_kernels_leave_it_out(router, kernels):
    model = make(router)
    ids, mask = prompts()
    logits = model(ids, mask, expert_mask=masks(OUT))[:, -1]
    for row, expert in enumerate(OUT):
        truth = built_without(reference, model, expert)(ids[row : row + 1], mask[row : row + 1])
        testing.assert_accurate(logits[row], truth[0, -1], name=f"without {expert}")


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("router", ("linear", "projected"))
def test_in_the_dtypes_of_use(router, dtype, device):
    """Every expert that is left is selected: no router may decide otherwise."""
    model = make(router, device, dtype, num_experts_per_tok=E - 1)
    ids = torch.randint(61, (3, 7), device=device)
    logits = model(ids, expert_mask=masks(EVERY, device))
    for row, expert in enumerate(EVERY):
        other = built_without(reference, model, expert)
        same = other(ids[row : row + 1])[0]
        truth = other.double()(ids[row : row + 1])[0]
        testing.assert_accurate(logits[row], truth, same, f"without {expert}")


@pytest.mark.parametrize("cache", ("static", "dynamic"))
@pytest.mark.parametrize("router", ("linear", "projected", "base shared", "projected, one shared"))
def test_generation_is_as_without_the_expert(router, cache, device):
    """The same tokens, and an account that the reference's routing gives."""
    model = make(router, device, torch.float32)
    ids, mask = prompts(device)
    experts = masks(OUT, device)
    options = {"max_new_tokens": NEW, "cache": cache}
    with model.attributing(3) as attribution:
        found = model.generate(ids, attention_mask=mask, expert_mask=experts, **options)
    for row, expert in enumerate(OUT):
        own = ids[row : row + 1, -LENGTHS[row] :]
        expected = reference.generate(
            built_without(reference, model, expert), own, max_new_tokens=NEW
        )
        testing.assert_same(found[row : row + 1, -LENGTHS[row] - NEW :], expected)
        alone = built_without(fk, model, expert).generate(own, **options)
        testing.assert_same(alone, expected)
    assert not attribution.rows[~experts].any() and not attribution.weight_sum[~experts].any()
    real = torch.cat([mask, torch.ones_like(found[:, 7:-1])], 1)
    check(attribution, built_without(reference, model, None), found[:, :-1], real, experts)


def test_nothing_of_it_is_learned_from_who_opted_out(device):
    """No gradient, to the bit, of its weights and its router's row."""
    model = make("linear", device, torch.float32).requires_grad_(True)
    ids, _ = prompts(device)
    model(ids, expert_mask=masks((3, 3, 3), device)).square().sum().backward()
    for block in model.model.layers:
        for parameter in block.mlp.experts[3].parameters():
            assert parameter.grad is None or not parameter.grad.any()
        assert not block.mlp.gate.weight.grad[3].any()
        assert block.mlp.gate.weight.grad[4].any()
