"""Generation: the same tokens with any cache, in a batch or alone, the reference's and FlexOlmo's.

Traps covered: prompts of unequal length (left padding), a request that ends before the others,
experts excluded for one request alone, sampling's cuts, the order of streamed tokens.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

import flexmore_kernels as fk
import reference
from flexmore_kernels import generation, testing
from flexmore_kernels.kv_cache import DynamicCache, StaticCache
from flexmore_kernels.sampling import Sampling, choose

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "expert_ranks": [0, 3, 0, 5],
    "rope_theta": 10000.0,
}
LENGTHS = (7, 4, 1)
NEW = 9
CACHES = ("static", "dynamic")


def make(device="cpu", dtype=torch.float32, **change):
    model = fk.FlexMoREForCausalLM(fk.FlexMoREConfig(**(CONFIG | change)))
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model.to(device, dtype).requires_grad_(False)


def twin(model):
    weight = model.model.embed_tokens.weight
    copy = reference.FlexMoREForCausalLM(model.config, device=weight.device, dtype=weight.dtype)
    copy.load_state_dict(model.state_dict())
    return copy


def prompts(device="cpu"):
    """Left-padded ids (3, 7), with ids at the padding that would matter if it were seen."""
    ids = torch.randint(61, (len(LENGTHS), max(LENGTHS)), device=device)
    mask = (torch.arange(max(LENGTHS)) >= max(LENGTHS) - torch.tensor(LENGTHS)[:, None]).long()
    return ids, mask.to(device)


def without_cache(model, ids, mask, expert_mask=None):
    return reference.generate(
        model, ids, max_new_tokens=NEW, attention_mask=mask, expert_mask=expert_mask
    )


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("heads", (2, 4), ids=("grouped", "every_head"))
def test_greedy_tokens_are_the_references(heads, cache, device):
    model = make(device, num_key_value_heads=heads)
    ids, mask = prompts(device)
    expected = without_cache(twin(model), ids, mask)
    assert len({tuple(row) for row in expected[:, 7:].tolist()}) == 3
    testing.assert_same(without_cache(model, ids, mask), expected)
    options = {"max_new_tokens": NEW, "cache": cache}
    testing.assert_same(model.generate(ids, attention_mask=mask, **options), expected)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -length:], **options)
        testing.assert_same(alone, expected[row : row + 1, -length - NEW :])


def test_greedy_tokens_are_hugging_faces():
    transformers = pytest.importorskip("transformers")
    model = make(expert_ranks=[0] * 4)
    same = {name: CONFIG[name] for name in CONFIG if name not in ("expert_ranks", "rope_theta")}
    rope = {"rope_type": "default", "rope_theta": 10000.0}
    theirs = transformers.FlexOlmoForCausalLM(
        transformers.FlexOlmoConfig(
            **same, num_experts=4, pad_token_id=0, eos_token_id=None, rope_parameters=rope
        )
    ).eval()
    copy_to_flex_olmo(model, theirs)
    ids, mask = prompts()
    expected = theirs.generate(ids, attention_mask=mask, max_new_tokens=NEW, do_sample=False)
    testing.assert_same(model.generate(ids, attention_mask=mask, max_new_tokens=NEW), expected)


def copy_to_flex_olmo(model, theirs):
    state = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            state[name].copy_(tensor)
    for block, own in zip(model.model.layers, theirs.model.layers, strict=True):
        for e, expert in enumerate(block.mlp.experts.children()):
            gate_up = torch.cat([expert.gate_proj.weight, expert.up_proj.weight])
            own.mlp.experts.gate_up_proj.data[e] = gate_up
            own.mlp.experts.down_proj.data[e] = expert.down_proj.weight


@pytest.mark.parametrize("cache", CACHES)
def test_each_request_has_its_own_experts(cache):
    model = make()
    ids, mask = prompts()
    experts = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 1]]).bool()
    expected = without_cache(twin(model), ids, mask, experts)
    options = {"max_new_tokens": NEW, "cache": cache}
    found = model.generate(ids, attention_mask=mask, expert_mask=experts, **options)
    testing.assert_same(found, expected)
    for row, length in enumerate(LENGTHS):
        alone = model.generate(ids[row : row + 1, -length:], expert_mask=experts[row], **options)
        testing.assert_same(alone, expected[row : row + 1, -length - NEW :])
    assert not torch.equal(found[1:], model.generate(ids, attention_mask=mask, **options)[1:])


def test_an_ended_request_is_padded_and_the_last_one_ends_all():
    model = make()
    ids, mask = prompts()
    endless = model.generate(ids, attention_mask=mask, max_new_tokens=NEW)[:, 7:]
    stops = sorted({int(endless[0, 2]), int(endless[1, 4]), int(endless[2, 5])})
    options = {"attention_mask": mask, "max_new_tokens": NEW, "pad_token_id": 60}
    found = model.generate(ids, eos_token_id=stops, **options)
    expected = reference.generate(
        twin(model), ids, max_new_tokens=NEW, attention_mask=mask, eos=stops, pad=60
    )
    testing.assert_same(found, expected)
    assert 7 < found.shape[1] < 7 + NEW and (found[:, 7:] == 60).any()
    model.config.extra |= {"eos_token_id": stops, "pad_token_id": 60}
    streamed = []
    same = model.generate(ids, attention_mask=mask, max_new_tokens=NEW, stream=streamed.append)
    testing.assert_same(same, expected)
    testing.assert_same(torch.stack(streamed, 1), expected[:, 7:])
    assert model.generate(ids, eos_token_id=(), **options).shape[1] == 7 + NEW


@pytest.mark.parametrize("cache", CACHES)
def test_sampling_is_the_generators(cache):
    model = make()
    ids, mask = prompts()
    options = {"attention_mask": mask, "max_new_tokens": NEW, "cache": cache, "temperature": 1.5}

    def draw(seed):
        return model.generate(ids, generator=torch.Generator().manual_seed(seed), **options)

    testing.assert_same(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    greedy = model.generate(ids, **(options | {"temperature": 0.0}))
    testing.assert_same(model.generate(ids, top_k=1, **options), greedy)
    testing.assert_same(model.generate(ids, top_p=1e-6, **options), greedy)


@pytest.mark.parametrize(
    ("how", "weights"),
    [
        (Sampling(1.0), (8, 4, 2, 1, 1)),
        (Sampling(0.5), (64, 16, 4, 1, 1)),
        (Sampling(1.0, top_k=2), (8, 4, 0, 0, 0)),
        (Sampling(1.0, top_p=0.74), (8, 4, 0, 0, 0)),
        (Sampling(1.0, top_p=0.76), (8, 4, 2, 0, 0)),
        (Sampling(1.0, top_k=3, top_p=0.6), (8, 4, 0, 0, 0)),
    ],
    ids=str,
)
def test_tokens_are_drawn_with_their_probabilities(how, weights):
    places = torch.tensor([3, 0, 4, 1, 2])
    logits = torch.empty(5).index_copy_(0, places, torch.tensor([8.0, 4, 2, 1, 1]).log())
    draws = 20000
    found = choose(logits.expand(draws, 5), how).bincount(minlength=5)[places] / draws
    p = torch.tensor(weights, dtype=torch.float32) / sum(weights)
    # Five standard deviations of a binomial frequency: one draw of a seed in a million fails.
    assert ((found - p).abs() <= 5 * (p * (1 - p) / draws).sqrt()).all()


def test_streaming_does_not_hold_back_on_the_cpu():
    model, seen = make(), []
    ids, _ = prompts()

    def stop(column):
        seen.append(column)
        if len(seen) == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(ids, max_new_tokens=NEW, stream=stop)
    expected = model.generate(ids, max_new_tokens=2)[:, 7:]
    testing.assert_same(torch.stack(seen, 1), expected)
    # What a callback is given is its own.
    options = {"max_new_tokens": 2, "eos_token_id": [60]}
    found = model.generate(ids, **options, stream=lambda column: column.fill_(60))
    testing.assert_same(found, model.generate(ids, **options))


def test_counting_counts_what_the_routers_chose():
    model = make()
    ids, mask = prompts()
    experts = torch.tensor([True, False, True, True])
    with model.counting() as counted:
        model.generate(ids, attention_mask=mask, max_new_tokens=NEW, expert_mask=experts)
    # The last token is not sent through the model again.
    tokens = sum(LENGTHS) + len(LENGTHS) * (NEW - 1)
    for statistics in counted:
        assert statistics.tokens == tokens and statistics.load.sum() == 2 * tokens
        assert statistics.load[1] == 0
    assert not any(block.watchers for block in model.model.layers)
    with model.counting() as outer:
        with model.counting() as inner:
            model(ids)
        model(ids[:1])
    assert inner[0].tokens == ids.numel() and outer[0].tokens == ids.shape[1]


REFUSED = [
    ({"max_new_tokens": 0}, "max_new_tokens: got 0"),
    ({"temperature": -1}, "temperature: got -1"),
    ({"temperature": "hot"}, "temperature: got 'hot'"),
    ({"top_k": 0}, "top_k: got 0"),
    ({"top_p": 1.5}, "top_p: got 1.5; accepted: a number above 0, up to 1"),
    ({"eos_token_id": 61}, "eos_token_id: got 61"),
    ({"eos_token_id": (1, "end")}, "eos_token_id: got 'end'"),
    ({"pad_token_id": -1}, "pad_token_id: got -1"),
    ({"attention_mask": torch.tensor([[1, 0, 1]])}, "attention_mask: got 0 after a token"),
    ({"attention_mask": torch.tensor([[1, 1, 0]])}, "attention_mask: got 0 after a token"),
    ({"attention_mask": torch.tensor([[0, 0, 0]])}, "attention_mask: got row 0 without tokens"),
    ({"attention_mask": torch.ones(3)}, r"attention_mask: got shape \(3,\)"),
    ({"expert_mask": torch.ones(1, 3, 4).bool()}, r"expert_mask: got shape \(1, 3, 4\)"),
    ({"expert_mask": torch.ones(2, 4).bool()}, r"expert_mask: got shape \(2, 4\)"),
    ({"expert_mask": torch.ones(4)}, "expert_mask: got dtype float32"),
    ({"expert_mask": [True] * 4}, "expert_mask: got list; accepted: a torch.Tensor"),
    ({"generator": SimpleNamespace(device=torch.device("cuda"))}, "generator: got one on cuda"),
    ({"cache": "paged"}, "cache: got 'paged'"),
    ({"cuda_graph": True}, "cuda_graph: got True on cpu with a dynamic cache"),
    ({"cuda_graph": 1}, "cuda_graph: got 1"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_generate_refuses(change, message):
    ids = torch.randint(61, (1, 3))
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        make().generate(ids, **({"max_new_tokens": 2} | change))


def test_a_generator_of_another_gpu_is_named():
    devices = [torch.device("cuda", index) for index in range(2)]
    generation._check_generator(SimpleNamespace(device=devices[1]), devices[1])
    with pytest.raises(ValueError, match="^generator: got one on cuda:1; accepted: one on cuda:0"):
        generation._check_generator(SimpleNamespace(device=devices[1]), devices[0])


def test_a_graph_is_captured_where_it_repays_or_where_asked():
    model = make()
    ids, _ = prompts()
    cache = StaticCache(model.config, 3, 32)
    on_gpu = SimpleNamespace(device=torch.device("cuda", 0))
    fewest = {None: generation.REPAID, True: generation.WARM_UP + 2}
    for asked, count in fewest.items():
        assert generation._whether_graph(asked, cache, on_gpu, count)
        assert not generation._whether_graph(asked, cache, on_gpu, count - 1)
        with fk.validation():
            assert not generation._whether_graph(asked, cache, on_gpu, 99)
    assert not generation._whether_graph(False, cache, on_gpu, 99)
    assert not generation._whether_graph(None, cache, ids, 99)


def test_caches_are_what_generate_makes():
    model = make()
    ids, _ = prompts()
    kinds = (("static", StaticCache), ("dynamic", DynamicCache), (None, DynamicCache))
    for kind, expected in kinds:
        assert type(generation._cache(model, kind, 3, 20, ids.device)) is expected
