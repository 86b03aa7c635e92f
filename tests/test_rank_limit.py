"""Rank as a dial: fewer ranks of an expert for a call or a request, in place.

Traps covered: projections of different ranks, an expert without a delta, stacked factors, a
prepared layer, requests of different limits in one batch, a cache that began with others, memory.
"""

from __future__ import annotations

import pytest
import torch

import flexmore_kernels as fk
import reference
from flexmore_kernels.rank_limit import limited
from flexmore_kernels.storage import PROJECTIONS
from flexmore_kernels.testing import assert_accurate, assert_same

RANKS = [0, 6, (2, 0, 5), (3, "full", 4), 0]
LIMITS = (None, 4, 3, 0, None)
CUT = [0, 4, (2, 0, 3), (0, "full", 0), 0]
SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_experts_per_tok": 3,
}  # fmt: skip


def randomised(module):
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(std=0.2)
    return module


def truncated(layer, ranks, limits, **options):
    """A layer of the cut factors alone."""
    cut = fk.FlexMoRE(layer.hidden_size, layer.intermediate_size, ranks, layer.top_k, **options)
    state = {}
    for name, tensor in layer.state_dict().items():
        if name.startswith("experts."):
            limit = limits[int(name.split(".")[1])]
            if limit is not None and "_a." in name:
                tensor = tensor[:limit]
            elif limit is not None and "_b." in name:
                tensor = tensor[:, :limit]
        if tensor.numel():
            state[name] = tensor
    cut.load_state_dict(state)
    return cut


@pytest.mark.parametrize("stacked", [False, True])
@pytest.mark.parametrize("prepared", [False, True])
def test_equals_the_truncated_layer(device, kernels, stacked, prepared):
    layer = randomised(fk.FlexMoRE(16, 24, RANKS, 3, stacked_factors=stacked, device=device))
    cut = truncated(layer, CUT, LIMITS, device=device)
    if prepared:
        layer.prepare([1])
    x = torch.randn(9, 16, device=device)
    with torch.no_grad():
        y = layer(x, rank_limit=LIMITS)
        theirs = reference.FlexMoRE(16, 24, CUT, 3, dtype=torch.float64)
        theirs.load_state_dict(cut.state_dict())
        plain = reference.FlexMoRE(16, 24, CUT, 3, device=device)
        plain.load_state_dict(cut.state_dict())
        assert_accurate(y, theirs(x.double().cpu()), plain(x), name="y")
        twin = reference.FlexMoRE(16, 24, RANKS, 3, dtype=torch.float64)
        twin.load_state_dict(layer.state_dict())
        assert_accurate(y, twin(x.double().cpu(), rank_limit=LIMITS), plain(x), name="y")


def test_nothing_is_copied():
    layer = fk.FlexMoRE(16, 24, RANKS, 3)
    for side, name in zip(limited(layer._live_weights(), LIMITS), PROJECTIONS, strict=True):
        for entry, whole in zip(side, layer.experts.projection(name), strict=True):
            if isinstance(entry, tuple):
                for view, factor in zip(entry, whole, strict=True):
                    assert view.data_ptr() == factor.data_ptr()


def test_the_rank_itself_limits_nothing():
    layer = randomised(fk.FlexMoRE(16, 24, RANKS, 3))
    x = torch.randn(5, 16)
    assert_same(layer(x, rank_limit=[None, 6, 5, 4, None]), layer(x), name="y")


def test_compiles_to_one_graph():
    layer = randomised(fk.FlexMoRE(16, 24, RANKS, 3))
    x = torch.randn(5, 16)
    compiled = torch.compile(lambda x: layer(x, rank_limit=LIMITS), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(compiled(x), layer(x, rank_limit=LIMITS))


def test_no_request_is_no_work():
    ids = torch.zeros(0, 3, dtype=torch.int64)
    with torch.no_grad():
        assert model_of()(ids, rank_limit=LIMITS).shape == (0, 3, 40)


def test_gradients_reach_the_ranks_in_use():
    layer = randomised(fk.FlexMoRE(16, 24, [0, 6], 2))
    layer(torch.randn(5, 16), rank_limit=[None, 2]).sum().backward()
    grad = layer.experts[1].gate_proj_a.weight.grad
    assert bool(grad[:2].any()) and not bool(grad[2:].any())


@pytest.mark.parametrize(
    "limit, message",
    [
        ([None, 7, None, None, None], r"rank_limit\[1\]: got 7; accepted: an integer from 0 to 6"),
        ([None, -1, None, None, None], r"rank_limit\[1\]: got -1"),
        ([2, None, None, None, None], r"rank_limit\[0\]: got 2; accepted: None"),
        ([None, 2], "rank_limit: got 2 entries; accepted: 5"),
    ],
)
def test_bad_limits_are_refused(limit, message):
    layer = fk.FlexMoRE(16, 24, RANKS, 3)
    with pytest.raises(ValueError, match=message):
        layer(torch.randn(2, 16), rank_limit=limit)
    with pytest.raises(TypeError, match="rank_limit: got 4"):
        layer(torch.randn(2, 16), rank_limit=4)


def model_of(ranks=RANKS, device="cpu"):
    config = fk.FlexMoREConfig(**SIZES, expert_ranks=ranks)
    return randomised(fk.FlexMoREForCausalLM(config, device=device))


def test_requests_of_one_batch_have_their_own(device):
    """A request's logits, beside others or alone."""
    model = model_of(device=device)
    ids = torch.randint(40, (3, 40), device=device)
    each = [LIMITS, None, [None, 1, None, None, None]]
    mask = torch.ones(3, 5, dtype=torch.bool, device=device)
    mask[0, 4] = False
    with torch.no_grad():
        both = model(ids, rank_limit=each, expert_mask=mask)
        for row, limit in enumerate(each):
            alone = model(ids[row : row + 1], rank_limit=limit, expert_mask=mask[row])
            plain, wide = (
                reference.FlexMoREForCausalLM(model.config, dtype=dtype, device=where)
                for dtype, where in ((torch.float32, device), (torch.float64, "cpu"))
            )
            own = {"rank_limit": limit, "expert_mask": mask[row]}
            found = []
            for twin in (wide, plain):
                twin.load_state_dict(model.state_dict())
                where = twin.model.norm.weight.device
                moved = own | {"expert_mask": mask[row].to(where)}
                found.append(twin(ids[row : row + 1].to(where), **moved))
            assert_accurate(both[row : row + 1], *found, name="logits")
            assert_accurate(alone, *found, name="logits alone")


def test_generate_keeps_a_request_s_limits():
    model = model_of()
    ids = torch.randint(40, (2, 4))
    each = [LIMITS, None]
    with torch.no_grad():
        made = model.generate(ids, max_new_tokens=5, rank_limit=each)
        for row, limit in enumerate(each):
            whole = made[row : row + 1]
            logits = model(whole[:, :-1], rank_limit=limit)[:, 3:]
            top = logits.topk(2).values
            if float((top[..., 0] - top[..., 1]).min()) > 1e-3:  # no ties by rounding
                assert_same(logits.argmax(-1), whole[:, 4:], name="tokens")


def test_cache_remembers_and_refuses_others():
    from flexmore_kernels.kv_cache import DynamicCache

    model, cache = model_of(), DynamicCache()
    ids = torch.randint(40, (2, 4))
    with torch.no_grad():
        model(ids, cache=cache, rank_limit=LIMITS)
        assert cache.key == ("11111 -,4,3,0,-",) * 2
        model(ids[:, :1], cache=cache)
        model(ids[:, :1], cache=cache, rank_limit=[LIMITS, LIMITS])
        with pytest.raises(ValueError, match="rank_limit: got another"):
            model(ids[:, :1], cache=cache, rank_limit=[LIMITS, None])
        cache.reset()
        model(ids, cache=cache)
        model(ids[:, :1], cache=cache, rank_limit=[None] * 5)


def test_layers_of_other_ranks_take_what_they_have():
    model = model_of([[0, 6, 2], [0, 3, 0]])
    ids = torch.randint(40, (1, 4))
    with torch.no_grad():
        assert model(ids, rank_limit=[None, 5, 1]).isfinite().all()
    with pytest.raises(ValueError, match=r"rank_limit\[1\]: got 7"):
        model(ids, rank_limit=[None, 7, None])
    with pytest.raises(ValueError, match="rank_limit: got 3 requests' limits; accepted: 1"):
        model(ids, rank_limit=[[None, 1, None], None, None])
