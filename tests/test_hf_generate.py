"""Generation through transformers: caches, left padding, requests with experts of their own.

The tokens are those of transformers' FlexOlmo, of a model without a cache, and of the same requests
one by one; a mask is kept for the life of its cache; continuous batching (`transformers serve`).
"""

from __future__ import annotations

import functools

import pytest
import torch

import reference
import reference.generation
from flexmore_kernels import FlexMoREForCausalLM, testing
from tests.hf_models import RAGGED, make, make_stock, plain, some_ids

transformers = pytest.importorskip("transformers", minversion="5.17")
hf = pytest.importorskip("flexmore_kernels.hf")

GREEDY = {"max_new_tokens": 5, "do_sample": False}


def test_four_models_give_the_same_tokens(tmp_path):
    """Transformers' FlexOlmo, ours in transformers, the bare decoder and the plain reference: with
    every cache, in a left-padded batch and one by one."""
    stock = make_stock()
    stock.save_pretrained(tmp_path)
    model = hf.FlexMoREForCausalLM.from_pretrained(tmp_path)
    twin, ids = plain(model, torch.float32), some_ids()
    bare = FlexMoREForCausalLM(twin.config)
    bare.load_state_dict(model.state_dict())
    short = ids[1:, 3:]
    batch = torch.cat([ids[:1], torch.nn.functional.pad(short, (3, 0))])
    padding = (torch.arange(7) >= torch.tensor([[0], [3]])).long()
    prompts = [(batch, padding), (ids[:1], None), (short, None)]
    new = {"max_new_tokens": 5, "eos_token_id": (), "pad_token_id": 0}

    def all_of(generate):
        return [generate(x, attention_mask=mask)[:, x.shape[1] :] for x, mask in prompts]

    theirs = [{}, {"cache_implementation": "static"}, {"use_cache": False}]
    found = [
        all_of(functools.partial(each.generate, **GREEDY, **options))
        for each in (stock, model)
        for options in theirs
    ]
    for cache in ("dynamic", "static"):
        found.append(all_of(functools.partial(bare.generate, cache=cache, **new)))
    plainly = functools.partial(reference.generation.generate, twin, max_new_tokens=5)
    found.append(all_of(plainly))
    for tokens in found:
        assert all(a.equal(b) for a, b in zip(tokens, found[0], strict=True))
    assert found[0][0].equal(torch.cat(found[0][1:]))


def test_tokens_with_any_cache_and_left_padded():
    model, ids = make(RAGGED), some_ids()
    wanted = model.generate(ids, use_cache=False, **GREEDY)
    assert model.generate(ids, **GREEDY).equal(wanted)
    assert model.generate(ids, cache_implementation="static", **GREEDY).equal(wanted)
    short = ids[1:, 3:]
    padded = torch.cat([ids[:1], torch.nn.functional.pad(short, (3, 0))])
    mask = (torch.arange(7) >= torch.tensor([[0], [3]])).long()
    together = model.generate(padded, attention_mask=mask, **GREEDY)
    assert together[:1].equal(wanted[:1])
    assert together[1:, 7:].equal(model.generate(short, **GREEDY)[:, 4:])


def test_each_request_has_its_experts():
    model, ids = make(), some_ids()
    masks = torch.tensor([[True, False, True, False], [False, True, True, True]])
    together = model.generate(ids, expert_mask=masks, **GREEDY)
    for i in range(2):
        alone = model.generate(ids[i : i + 1], expert_mask=masks[i], **GREEDY)
        assert together[i : i + 1].equal(alone)
    beams = {"num_beams": 2, "max_new_tokens": 5, "do_sample": False}
    same = model.generate(ids, expert_mask=masks[:1].expand(2, 4), **beams)
    assert same[:1].equal(model.generate(ids[:1], expert_mask=masks[:1], **beams))
    # What the masked experts hold is of no consequence.
    for layer in model.model.layers:
        layer.mlp.experts[1].gate_proj_b.weight.data.fill_(7.0)
    assert model.generate(ids[:1], expert_mask=masks[0], **GREEDY).equal(together[:1])


def test_a_cache_keeps_its_mask():
    model, ids = make(), some_ids()
    masks = torch.tensor([[True, False, True, False], [True] * 4])
    for first, other in (
        (masks, None),
        (None, masks),
        (masks, ~masks | masks[1]),
        (masks, masks[0]),
    ):
        cache = model(ids, expert_mask=first, use_cache=True).past_key_values
        with pytest.raises(ValueError, match="^expert_mask: got .* with a cache of"):
            model(ids[:, :1], past_key_values=cache, expert_mask=other)
        again = None if first is None else first.clone()
        with_cache = model(ids[:, :1], past_key_values=cache, expert_mask=again).logits
        whole = model(torch.cat([ids, ids[:, :1]], 1), expert_mask=first).logits[:, -1:]
        torch.testing.assert_close(with_cache, whole)
    with pytest.raises(ValueError, match="^expert_mask: got shape"):
        model(ids, expert_mask=masks[:, :3])


@pytest.mark.parametrize("how", ["a tuple", "by the decoder", "in inference mode"])
def test_however_a_cache_was_filled_it_keeps_its_mask(how):
    model, ids = make(), some_ids()
    with torch.inference_mode(how == "in inference mode"), torch.no_grad():
        mask = torch.tensor([[True, False, True, False], [True] * 4])
        before = mask.clone()
        filled = model.model if how == "by the decoder" else model
        output = filled(ids, expert_mask=mask, use_cache=True, return_dict=how != "a tuple")
        cache = output[1] if how == "a tuple" else output.past_key_values
        assert type(output) is tuple or how != "a tuple"
        for other in (None, mask):
            mask[:] = True
            for each in (model, model.model):
                with pytest.raises(ValueError, match="^expert_mask: got .* with a cache of"):
                    each(ids[:, :1], past_key_values=cache, expert_mask=other)
        found = model(ids[:, :1], past_key_values=cache, expert_mask=before).logits
        whole = model(torch.cat([ids, ids[:, :1]], 1), expert_mask=before).logits[:, -1:]
        torch.testing.assert_close(found, whole)


def test_a_batch_of_requests_takes_no_mask():
    """It would be ignored: requests come and go between its forwards."""
    model = make()
    with pytest.raises(ValueError, match=r"^expert_mask: got a mask for generate_batch"):
        model.generate_batch(inputs=[[3, 5]], expert_mask=torch.ones(4, dtype=torch.bool))


def test_continuous_batching_runs_a_swapped_model():
    """What `transformers serve` runs: requests of different lengths, paged attention."""
    model = hf.swap_experts(make_stock(), [0, 4, 0, 32])
    prompts = [some_ids(1, length)[0].tolist() for length in (6, 3)]
    options = transformers.GenerationConfig(eos_token_id=-1, pad_token_id=0, **GREEDY)
    pool = transformers.ContinuousBatchingConfig(num_blocks=4, max_batch_tokens=32)
    results = model.generate_batch(
        inputs=prompts, generation_config=options, continuous_batching_config=pool
    )
    found = [results[name].generated_tokens for name in sorted(results)]
    for prompt, tokens in zip(prompts, found, strict=True):
        alone = model.generate(torch.tensor([prompt]), **GREEDY)[0, len(prompt) :]
        testing.assert_same(torch.tensor(tokens), alone)
