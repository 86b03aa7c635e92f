"""A shared expert: outside the softmax, weight 1, at no further cost where it is the base.

Traps covered: a mask that excludes it, or all but it, a NaN in its row of the router, its gradient,
a token with no routed expert, top_k beside it, the base's work done twice.
"""

from __future__ import annotations

import pytest
import torch
from common import skip_narrow
from torch.nn import functional as F

import flexmore_kernels as fk
import reference
from flexmore_kernels import ops
from flexmore_kernels.checks import SCORINGS
from flexmore_kernels.testing import assert_accurate, assert_same

RANKS = [0, 3, (2, 0, "full"), 0, 5]


def masks(tokens: int, experts: int, shared: int) -> dict:
    some = torch.rand(tokens, experts) < 0.6
    some[:, 1 - min(shared, 1)] = True
    alone = torch.zeros(tokens, experts, dtype=torch.bool)
    alone[:, shared] = True
    without = torch.ones(experts, dtype=torch.bool)
    without[shared] = False
    return {"none": None, "some": some, "alone": alone, "without": without}


@pytest.mark.parametrize("shared", [0, 2])
@pytest.mark.parametrize("scoring", SCORINGS)
@pytest.mark.parametrize("which", ["none", "some", "alone", "without"])
@pytest.mark.parametrize("given", ["x", "logits"])
def test_route_matches_the_reference(device, kernels, shared, scoring, which, given):
    x = torch.randn(67, 40, device=device)
    weight = torch.randn(5, 40, device=device) if given == "x" else None
    logits = x if given == "x" else torch.randn(67, 5, device=device)
    mask = masks(67, 5, shared)[which]
    options = {"top_k": 2, "scoring": scoring, "shared": shared}
    options["mask"] = None if mask is None else mask.to(device)
    options["bias"] = torch.randn(4, device=device)
    source = logits.clone().requires_grad_()
    mine = ops.topk_route(source, weight, **options)
    true = reference.topk_route(mine.logits.detach().double(), **options)
    plain = reference.topk_route(mine.logits.detach(), **options)
    assert_same(mine.indices, true.indices, name="indices")
    assert_accurate(mine.weights, true.weights, plain.weights, name="weights")
    first = mine.indices[:, 0]
    assert bool(((first == shared) | (first == 5)).all())
    if scoring != "unit":
        (dx,) = torch.autograd.grad(mine.weights[:, 1:].square().sum(), source)
        wide = [t if t is None else t.double() for t in (logits, weight)]
        wide[0] = wide[0].requires_grad_()
        again = reference.topk_route(*wide, **options)
        (true_dx,) = torch.autograd.grad(again.weights[:, 1:].square().sum(), wide[0])
        narrow = logits.clone().requires_grad_()
        same = reference.topk_route(narrow, weight, **options)
        (plain_dx,) = torch.autograd.grad(same.weights[:, 1:].square().sum(), narrow)
        assert_accurate(dx, true_dx, plain_dx, name="dx")


def test_weights_of_the_others_do_not_see_it(device):
    """The routed experts' weights are those of a router without its row."""
    logits = torch.randn(6, 5, device=device)
    mine = ops.topk_route(logits, top_k=2, shared=2)
    others = ops.topk_route(logits[:, [0, 1, 3, 4]].contiguous(), top_k=2)
    assert_same(mine.weights[:, 1:], others.weights, name="weights")
    assert_same(mine.indices[:, 1:], others.indices + (others.indices >= 2), name="indices")


def test_its_row_is_not_read():
    logits = torch.randn(4, 3)
    clean = ops.topk_route(logits, top_k=1, shared=0)
    logits[:, 0] = torch.nan
    noisy = ops.topk_route(logits, top_k=1, shared=0)
    assert_same(noisy.weights, clean.weights, name="weights")
    assert_same(noisy.indices, clean.indices, name="indices")


def test_nothing_allowed_is_refused():
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2] = False
    with pytest.raises(ValueError, match="mask: got no allowed expert for token 2"):
        ops.topk_route(torch.randn(4, 3), top_k=1, shared=0, mask=mask)


@pytest.mark.parametrize("shared", [True, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layer_matches_the_reference(device, kernels, shared, dtype):
    skip_narrow(kernels, device, dtype)
    options = {"hidden_size": 24, "intermediate_size": 40, "expert_ranks": RANKS, "top_k": 2}
    theirs = reference.FlexMoRE(**options, shared_expert=shared, dtype=torch.float64)
    with torch.no_grad():
        for name, parameter in theirs.named_parameters():
            parameter.normal_(std=0.5 if name.startswith("gate") else 0.2)
    ours = fk.FlexMoRE(**options, shared_expert=shared, dtype=dtype, device=device)
    ours.load_state_dict(theirs.state_dict())
    theirs.load_state_dict({k: v.double() for k, v in ours.state_dict().items()})
    x = torch.randn(11, 24, device=device, dtype=dtype)
    y, routing = ours(x, return_routing=True)
    assert routing.indices.shape == (11, 3)
    gate, up, down = (
        [e.projection(name, torch.float64) for e in theirs.experts]
        for name in reference.layer.PROJECTIONS
    )
    w = routing.weights.double().cpu()
    true = reference.experts(x.double().cpu(), routing.indices.cpu(), w, gate, up, down)
    plain = theirs.to(device, dtype)
    narrow = [
        [e.projection(name, dtype) for e in plain.experts] for name in reference.layer.PROJECTIONS
    ]
    same = reference.experts(x, routing.indices, routing.weights, *narrow)
    assert_accurate(y, true, same, name="y")


def test_base_as_shared_expert_is_added_with_weight_one(device):
    """y = FFN_base(x) + sum over the selected of p_k FFN_k(x), as Nexus has it."""
    layer = fk.FlexMoRE(16, 24, [0, 0, 2], 1, shared_expert=True, device=device)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
    x = torch.randn(5, 16, device=device)
    alone = torch.tensor([True, False, False], device=device)
    with torch.no_grad():
        y = layer(x, expert_mask=alone)
        base = layer.experts[0]
        hidden = F.silu(x @ base.gate_proj.weight.T) * (x @ base.up_proj.weight.T)
        true = hidden.double() @ base.down_proj.weight.double().T
        assert_accurate(y, true, hidden @ base.down_proj.weight.T, name="y")


def test_its_gradient_is_whole(device):
    """d y / d base does not depend on the router where only the base is allowed."""
    layer = fk.FlexMoRE(8, 12, [0, 2], 1, shared_expert=True, device=device)
    x = torch.randn(3, 8, device=device)
    layer(x, expert_mask=torch.tensor([True, False], device=device)).sum().backward()
    assert layer.experts[0].down_proj.weight.grad.abs().sum() > 0
    assert layer.gate.weight.grad is None or not layer.gate.weight.grad.any()


def test_counters_leave_it_out_of_the_router_s_distribution():
    config = fk.FlexMoREConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=1,
        num_attention_heads=2, num_experts_per_tok=1, expert_ranks=[0, 2, 3], shared_expert=True,
    )  # fmt: skip
    model = fk.FlexMoREForCausalLM(config)
    ids = torch.randint(40, (2, 6))
    with model.counting() as counted, torch.no_grad():
        model(ids)
    compiled = torch.compile(lambda ids: model(ids), backend="eager", fullgraph=True)
    with model.counting() as again, torch.no_grad():
        compiled(ids)
    assert_same(again[0].load, counted[0].load)
    assert counted[0].load.tolist()[0] == 12 and int(counted[0].load.sum()) == 24
    assert float(counted[0].score_sum[0]) == 0
