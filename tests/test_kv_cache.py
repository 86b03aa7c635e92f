"""Caches: a text in pieces gives the logits of the text at once; masks are fixed for a request.

Traps covered: pieces of one token and of several, padding on the left and between pieces, grouped
heads, memory used again for other requests, a cache that is full.
"""

from __future__ import annotations

import pytest
import torch

import flexmore_kernels as fk
import reference
from flexmore_kernels import testing
from flexmore_kernels.kv_cache import DynamicCache, StaticCache

CONFIG = {
    "vocab_size": 40,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_experts_per_tok": 2,
    "expert_ranks": [0, 3, 0, 5],
}
B, S, E = 3, 9, 4
PADDED = torch.tensor([[1] * 9, [0, 0, 1, 1, 1, 1, 1, 1, 1], [0, 1, 1, 1, 0, 1, 0, 1, 1]])
EXPERTS = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
PIECES = {"tokens": (1,) * 9, "prompt_and_tokens": (4, 1, 1, 1, 1, 1), "chunks": (3, 4, 2)}


def make(heads=2, dtype=torch.float64):
    config = fk.FlexMoREConfig(**CONFIG, num_key_value_heads=heads)
    model = fk.FlexMoREForCausalLM(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model.requires_grad_(False)


def new_cache(kind, model):
    if kind == "dynamic":
        return DynamicCache()
    return StaticCache(model.config, B, S, dtype=model.lm_head.weight.dtype)


def in_pieces(model, cache, ids, sizes, mask=None, experts=None):
    found, start = [], 0
    for size in sizes:
        part = slice(start, start + size)
        now = None if mask is None else mask[:, part]
        found.append(model(ids[:, part], now, expert_mask=experts, cache=cache))
        start, experts = start + size, None
    return torch.cat(found, 1)


@pytest.mark.parametrize("kind", ("static", "dynamic", "reference"))
@pytest.mark.parametrize("sizes", PIECES.values(), ids=PIECES)
@pytest.mark.parametrize("heads", (2, 4), ids=("grouped", "every_head"))
def test_pieces_are_the_whole(heads, sizes, kind):
    model = make(heads)
    ids = torch.randint(40, (B, S))
    plain = reference.FlexMoREForCausalLM(model.config, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    runs = plain if kind == "reference" else model
    cache = {} if kind == "reference" else new_cache(kind, model)
    for mask, experts in ((None, None), (PADDED, None), (PADDED, EXPERTS), (None, EXPERTS[1])):
        expected = plain(ids, mask, expert_mask=experts)
        found = in_pieces(runs, cache, ids, sizes, mask, experts)
        real = torch.ones(B, S).bool() if mask is None else mask.bool()
        testing.assert_accurate(found[real], expected[real].detach())
        if kind == "reference":
            cache = {}
        else:
            assert cache.length == S
            cache.reset()


def test_a_mask_that_begins_late_hides_only_what_it_says():
    """Padding in a later call alone: what came before it was tokens."""
    model, ids = make(), torch.randint(40, (B, S))
    mask = torch.ones_like(ids)
    mask[1, 5:7] = 0
    for kind in ("static", "dynamic"):
        cache = new_cache(kind, model)
        found = [model(ids[:, :5], cache=cache)]
        found += [model(ids[:, 5:7], mask[:, 5:7], cache=cache), model(ids[:, 7:], cache=cache)]
        testing.assert_accurate(
            torch.cat(found, 1)[mask.bool()], model(ids, mask)[mask.bool()].detach()
        )


def test_a_requests_experts_are_fixed_and_part_of_the_key():
    model, ids = make(), torch.randint(40, (B, S))
    for kind in ("static", "dynamic"):
        cache = new_cache(kind, model)
        assert cache.key is None
        mine = EXPERTS.clone()
        model(ids[:, :3], expert_mask=mine, cache=cache)
        assert cache.key == ("1111", "1010", "0001")
        mine.fill_(True)  # the caller's tensor is theirs
        model(ids[:, 3:4], cache=cache)
        model(ids[:, 4:5], expert_mask=EXPERTS, cache=cache)
        for other in (mine, EXPERTS[1], EXPERTS.flip(0)):
            with pytest.raises(ValueError, match="^expert_mask: got another than the one"):
                model(ids[:, 5:6], expert_mask=other, cache=cache)
        assert cache.length == 5
        cache.reset()
        model(ids[:, :3], cache=cache)
        assert cache.key == ("1111",) * 3
        model(ids[:, 3:4], expert_mask=mine, cache=cache)
        with pytest.raises(ValueError, match="^expert_mask: got another"):
            model(ids[:, 4:5], expert_mask=EXPERTS[2], cache=cache)
        with pytest.raises(ValueError, match=r"^expert_mask: got shape \(3, 1, 4\) with a cache"):
            model(ids[:, 4:5], expert_mask=EXPERTS[:, None], cache=cache)
        with pytest.raises(ValueError, match="^input_ids: got 2 rows"):
            model(ids[:2, 4:5], cache=cache)


def test_a_static_cache_is_written_in_place_up_to_its_length():
    model, ids = make(), torch.randint(40, (B, S + 1))
    cache = StaticCache(model.config, B, S, dtype=torch.float64)
    where = [t.data_ptr() for t in (*cache.keys, *cache.values, cache.real, cache.position)]
    assert cache.keys[0].shape == (B, 2, 16, 6)
    model(ids[:, :S], cache=cache)
    with pytest.raises(ValueError, match="^cache: got 10 columns; accepted: max_length, 9"):
        model(ids[:, S:], cache=cache)
    assert cache.end.tolist() == [S] * B and (cache.keys[1][:, :, S:] == 0).all()
    now = [t.data_ptr() for t in (*cache.keys, *cache.values, cache.real, cache.position)]
    assert where == now
    with pytest.raises(ValueError, match="^input_ids: got 1 rows; accepted: the cache's, 3"):
        model(ids[:1, :2], cache=StaticCache(model.config, B, S))
    with pytest.raises(ValueError, match="^batch: got 0"):
        StaticCache(model.config, 0, S)


def test_gradients_go_through_a_dynamic_cache_and_not_into_a_static_one():
    model, ids = make().requires_grad_(), torch.randint(40, (B, S))
    whole = torch.autograd.grad(model(ids).sum(), model.model.layers[0].self_attn.k_proj.weight)[0]
    logits = in_pieces(model, DynamicCache(), ids, (4, 5))
    parts = torch.autograd.grad(logits.sum(), model.model.layers[0].self_attn.k_proj.weight)[0]
    testing.assert_accurate(parts, whole)
    with pytest.raises(ValueError, match="^cache: got a StaticCache with gradients"):
        model(ids, cache=new_cache("static", model))


def test_one_token_at_a_time_by_every_kernel(kernels):
    model, ids = make(), torch.randint(40, (B, S))
    experts = EXPERTS | torch.tensor([True, False, False, False])
    expected = model(ids, PADDED, expert_mask=experts)
    real = PADDED.bool()
    found = in_pieces(model, new_cache("static", model), ids, (7, 2), PADDED, experts)
    testing.assert_accurate(found[real], expected[real])
    whole = model(ids, expert_mask=experts)
    cache = new_cache("static", model)
    testing.assert_accurate(in_pieces(model, cache, ids, (7, 1, 1), None, experts), whole)
    testing.assert_accurate(in_pieces(model, DynamicCache(), ids, (7, 1, 1), None, experts), whole)


def test_a_refused_first_call_leaves_an_empty_cache():
    model, ids = make(), torch.randint(40, (B, S + 1))
    cache = new_cache("static", model)
    for refused in (ids[:1, :2], ids):  # rows, columns
        with pytest.raises(ValueError, match="^(input_ids: got 1 rows|cache: got 10 columns)"):
            model(refused, expert_mask=EXPERTS[2], cache=cache)
        expected = model(ids[:, :S], expert_mask=EXPERTS)
        testing.assert_accurate(model(ids[:, :S], expert_mask=EXPERTS, cache=cache), expected)
        assert cache.key == ("1111", "1010", "0001")
        cache.reset()


def test_an_emptied_static_cache_holds_nothing_of_before():
    """Not even NaN, whose weight would be 0."""
    model, ids = make(), torch.randint(40, (B, S))
    cache = new_cache("static", model)
    model(ids, cache=cache)
    for tensor in (*cache.keys, *cache.values):
        tensor.fill_(torch.nan)
    cache.reset()
    expected = model(ids[:, :4])
    testing.assert_accurate(in_pieces(model, cache, ids[:, :4], (2, 1, 1)), expected)


@pytest.mark.parametrize(
    "change",
    (
        {"dtype": torch.float32},
        {"device": "meta"},
        {"num_hidden_layers": 1},
        {"num_key_value_heads": 4},
        {"hidden_size": 48},
        {"rope_theta": 1e4},
    ),
    ids=str,
)
def test_a_cache_of_another_model_is_named(change):
    model, ids = make(), torch.randint(40, (B, S))
    kind = {"dtype": change.get("dtype", torch.float64), "device": change.get("device")}
    sizes = {name: change[name] for name in change if name not in kind}
    config = fk.FlexMoREConfig(**(CONFIG | {"num_key_value_heads": 2} | sizes))
    cache = StaticCache(config, B, S, **kind)
    with pytest.raises(ValueError, match="^cache: got one on .* for Heads.*; accepted: as the mod"):
        model(ids, cache=cache)
    assert cache.length == 0
    more = StaticCache(fk.FlexMoREConfig(**(CONFIG | {"num_key_value_heads": 2,
                       "num_hidden_layers": 3})), B, S, dtype=torch.float64)  # fmt: skip
    testing.assert_accurate(model(ids, cache=more), model(ids))
    with pytest.raises(TypeError, match="^cache: got dict; accepted: DynamicCache"):
        model(ids, cache={})
