"""The decoder against the reference, its state_dict keys, and its configuration.

Traps covered: q and k norms over the whole width, grouped heads, padding on either side, experts
excluded per token, ranks per layer, tied embeddings, the meta device; a config.json with fields
that are not ours, or that ask for what is not computed. With transformers installed, FlexOlmo.
"""

from __future__ import annotations

import json

import pytest
import torch

import flexmore_kernels as fk
import reference
from flexmore_kernels import testing

SMALL = {
    "model_type": "flexmore",
    "architectures": ["FlexMoREForCausalLM"],
    "vocab_size": 50,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "expert_ranks": [0, 3, 0, 5],
    "rope_theta": 10000.0,
    "rms_norm_eps": 1e-5,
}
PER_LAYER = [[0, 3, [2, 0, "full"], 5], [0, 0, 1, 24]]


def config(**change):
    return fk.FlexMoREConfig.from_dict(SMALL | change)


def make(dtype=None, device="cpu", **change):
    model = fk.FlexMoREForCausalLM(config(**change), device=device, dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


def twin(model):
    copy = reference.FlexMoREForCausalLM(model.config, dtype=model.lm_head.weight.dtype)
    copy.load_state_dict(model.state_dict())
    return copy


PADDING = {
    "none": None,
    "left": [[1] * 7, [0] * 3 + [1] * 4],
    "right": [[1] * 5 + [0] * 2, [1] * 7],
}


@pytest.mark.parametrize("padding", PADDING)
@pytest.mark.parametrize("ranks", [SMALL["expert_ranks"], PER_LAYER], ids=["one", "per_layer"])
def test_model_forward_and_backward(ranks, padding, kernels):
    model = make(torch.float64, expert_ranks=ranks, expert_bias=True)
    plain = twin(model)
    ids = torch.randint(50, (2, 7))
    mask = None if padding == "none" else torch.tensor(PADDING[padding])
    experts = torch.rand(2, 7, 4) > 0.4
    experts[..., 0] = True
    logits = model(ids, mask, expert_mask=experts)
    expected = plain(ids, mask, expert_mask=experts)
    testing.assert_accurate(logits, expected.detach(), name="logits")
    dy = torch.randn_like(logits)
    logits.backward(dy)
    expected.backward(dy)
    grads = dict(plain.named_parameters())
    for name, parameter in model.named_parameters():
        wanted = grads[name].grad
        wanted = torch.zeros_like(parameter) if wanted is None else wanted
        testing.assert_accurate(parameter.grad, wanted, name=name)


@pytest.mark.parametrize(("norm", "scoring"), [(False, "softmax"), (True, "sigmoid")])
def test_model_hands_its_routing_options_to_every_layer(norm, scoring):
    options = {"norm_topk_prob": norm, "scoring": scoring, "num_experts_per_tok": 3}
    model = make(torch.float64, **options)
    ids = torch.randint(50, (2, 7))
    testing.assert_accurate(model(ids), twin(model)(ids).detach())
    found = {(b.mlp.norm_topk_prob, b.mlp.scoring, b.mlp.top_k) for b in model.model.layers}
    assert found == {(norm, scoring, 3)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_model_on_the_device(dtype, device):
    """The dtypes of use, with every expert selected: no router may decide otherwise."""
    model = make(dtype, device, num_experts_per_tok=4)
    plain = reference.FlexMoREForCausalLM(model.config, device=device, dtype=dtype)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(50, (2, 7), device=device)
    logits = model(ids)
    assert logits.dtype == dtype and logits.shape == (2, 7, 50)
    same, truth = plain(ids), plain.double()(ids)
    testing.assert_accurate(logits, truth.detach(), same.detach())


def test_model_is_causal_and_padding_is_unseen():
    model = make(torch.float64)
    ids = torch.randint(50, (1, 8))
    logits = model(ids)
    testing.assert_accurate(model(ids[:, :5]), logits[:, :5].detach())
    changed = torch.cat([ids[:, :3], 49 - ids[:, 3:4], ids[:, 4:]], 1)
    hidden = torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])
    alike = [model(i, hidden)[:, 4:] for i in (ids, changed)]
    testing.assert_accurate(alike[0], alike[1].detach())
    assert not torch.allclose(model(changed)[:, 4:], logits[:, 4:])


def test_model_positions_count_tokens_alone():
    """A hole in the mask shifts nothing: the same as if its tokens were not there."""
    model = make(torch.float64)
    ids = torch.randint(50, (1, 8))
    hidden = torch.tensor([[0, 1, 1, 0, 0, 1, 1, 1]])
    some = model(ids, hidden)[hidden.bool()]
    testing.assert_accurate(some, model(ids[hidden.bool()][None])[0].detach())


def test_model_keeps_the_last_logits_and_takes_masks_of_any_shape():
    model = make(torch.float64)
    ids, mask = torch.randint(50, (2, 7)), torch.tensor(PADDING["left"])
    experts = torch.tensor([[1, 0, 1, 1], [1, 1, 0, 0]]).bool()
    logits = model(ids, mask, expert_mask=experts)
    last = model(ids, mask, expert_mask=experts, logits_to_keep=2)
    testing.assert_accurate(last, logits[:, -2:].detach())
    testing.assert_same(model(ids, mask, expert_mask=experts[:, None].expand(2, 7, 4)), logits)
    for row in (0, 1):
        alone = model(ids, mask, expert_mask=experts[row])[row]
        testing.assert_accurate(alone, logits[row].detach())
    with pytest.raises(ValueError, match=r"^expert_mask: got shape \(3, 4\); accepted: \(4,\)"):
        model(ids, expert_mask=experts[:1].expand(3, 4))
    with pytest.raises(ValueError, match="^logits_to_keep: got -1"):
        model(ids, logits_to_keep=-1)


def test_model_keys_are_the_checkpoints():
    shapes = {name: tuple(t.shape) for name, t in make().state_dict().items()}
    block = {
        "self_attn.q_proj.weight": (24, 24),
        "self_attn.k_proj.weight": (12, 24),
        "self_attn.v_proj.weight": (12, 24),
        "self_attn.o_proj.weight": (24, 24),
        "self_attn.q_norm.weight": (24,),
        "self_attn.k_norm.weight": (12,),
        "post_attention_layernorm.weight": (24,),
        "post_feedforward_layernorm.weight": (24,),
    }
    mlp = fk.FlexMoRE(24, 40, SMALL["expert_ranks"], 2).state_dict()
    block |= {f"mlp.{name}": tuple(t.shape) for name, t in mlp.items()}
    expected = {f"model.layers.{n}.{name}": s for n in (0, 1) for name, s in block.items()}
    ends = ("model.embed_tokens.weight", "lm_head.weight")
    assert shapes == expected | dict.fromkeys(ends, (50, 24)) | {"model.norm.weight": (24,)}


def test_model_tied_embeddings():
    model = make(torch.float64, tie_word_embeddings=True)
    assert "lm_head.weight" not in model.state_dict()
    plain = reference.FlexMoREForCausalLM(model.config, dtype=torch.float64)
    plain.load_state_dict(model.state_dict())
    ids = torch.randint(50, (2, 5))
    testing.assert_accurate(model(ids), plain(ids).detach())


def test_model_on_meta(device):
    model = fk.FlexMoREForCausalLM(config(expert_ranks=PER_LAYER), device="meta")
    assert {p.device.type for p in model.parameters()} == {"meta"}
    assert model(torch.zeros(2, 3, dtype=torch.int64, device="meta")).shape == (2, 3, 50)
    model.to_empty(device=device).reset_parameters()
    assert model(torch.zeros(2, 3, dtype=torch.int64, device=device)).isfinite().all()
    loaded = fk.FlexMoREForCausalLM(config(expert_ranks=PER_LAYER), device="meta")
    loaded.load_state_dict(model.state_dict(), assign=True)
    ids = torch.randint(50, (2, 5), device=device)
    testing.assert_same(loaded(ids), model(ids))


def test_model_compiles_to_one_graph():
    torch._dynamo.reset()
    model = make()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for length in (5, 9):
        ids = torch.randint(50, (2, length))
        testing.assert_accurate(compiled(ids), model(ids).double().detach(), model(ids).detach())


def test_config_of_a_json_file_and_back():
    rope = {"rope_type": "default", "rope_theta": 5e5}
    values = SMALL | {"rope_parameters": rope, "torch_dtype": "bfloat16", "bos_token_id": 3}
    del values["rope_theta"]
    found = fk.FlexMoREConfig.from_dict(json.loads(json.dumps(values)))
    assert (found.rope_theta, found.head_dim, found.num_key_value_heads) == (5e5, 6, 2)
    assert found.extra["bos_token_id"] == 3
    written = json.loads(json.dumps(found.to_dict()))
    assert written.items() >= values.items()
    assert fk.FlexMoREConfig.from_dict(written).to_dict() == written
    with_theta = fk.FlexMoREConfig.from_dict(written)
    with_theta.rope_theta = 7.0
    assert fk.FlexMoREConfig.from_dict(with_theta.to_dict()).rope_theta == 7.0


def test_config_of_ragged_ranks_and_back():
    written = json.loads(json.dumps(config(expert_ranks=PER_LAYER).to_dict()))
    assert written["expert_ranks"] == [0, 3, 2, 24]
    assert written["layer_expert_ranks"] == PER_LAYER
    again = fk.FlexMoREConfig.from_dict(written)
    assert again.expert_ranks == PER_LAYER and "layer_expert_ranks" not in again.extra
    assert again.to_dict() == written
    # What a loader found in the tensors is right, whatever the file said.
    found = fk.FlexMoREConfig.from_dict(written | {"expert_ranks": PER_LAYER[::-1]})
    assert found.expert_ranks == PER_LAYER[::-1]
    triples = config(expert_ranks=[0, 3, (0, 0, 0), (7, 0, "full")]).to_dict()
    assert triples["expert_ranks"] == [0, 3, 0, 7]
    assert triples["layer_expert_ranks"] == [[0, 3, (0, 0, 0), (7, 0, "full")]] * 2
    assert "layer_expert_ranks" not in config().to_dict()


def test_config_defaults_are_flexolmos():
    found = fk.FlexMoREConfig()
    assert (found.num_experts, found.num_experts_per_tok, found.head_dim) == (7, 5, 128)
    assert list(found.layer_ranks(31)) == [0] * 7
    assert found.num_key_value_heads == 32 and not found.norm_topk_prob


REFUSED = [
    ({"hidden_size": 0}, "hidden_size: got 0"),
    ({"vocab_size": 1.5}, "vocab_size: got 1.5"),
    ({"num_attention_heads": 5, "num_key_value_heads": 5}, "num_attention_heads: got 5"),
    ({"num_key_value_heads": 3}, "num_key_value_heads: got 3"),
    ({"head_dim": 3}, "head_dim: got 3"),
    ({"num_experts_per_tok": 5}, "num_experts_per_tok: got 5"),
    ({"num_experts": 5}, "expert_ranks: got 4 entries for layer 0; accepted: num_experts, 5"),
    ({"expert_ranks": [PER_LAYER[0]]}, "expert_ranks: got 1 lists"),
    ({"expert_ranks": [PER_LAYER[0], [0, 1]]}, "expert_ranks: got 2 entries for layer 1"),
    ({"expert_ranks": 3}, "expert_ranks: got 3"),
    ({"model_type": "olmoe"}, "model_type: got 'olmoe'"),
    ({"hidden_act": "gelu"}, "hidden_act: got 'gelu'"),
    ({"attention_bias": True}, "attention_bias: got True"),
    ({"scoring": "relu"}, "scoring: got 'relu'; accepted: 'softmax', 'topk_softmax'"),
    ({"rope_scaling": {"rope_type": "yarn"}}, "rope_scaling.rope_type: got 'yarn'"),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[m for _, m in REFUSED])
def test_config_refuses(change, message):
    with pytest.raises((ValueError, TypeError), match=f"^{message}"):
        config(**change)


def test_model_refuses_bad_ids_and_ranks():
    with pytest.raises(ValueError, match=r"expert_ranks\[3\]: got 25"):
        make(expert_ranks=[0, 1, 2, 25])
    with pytest.raises(TypeError, match="^input_ids: got dtype float32"):
        make()(torch.zeros(2, 3))
    with pytest.raises(ValueError, match="^attention_mask: got shape"):
        make()(torch.zeros(2, 3, dtype=torch.int64), torch.ones(2, 4))


def test_model_is_hugging_faces_flexolmo():
    transformers = pytest.importorskip("transformers")
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "rms_norm_eps",
             "num_attention_heads", "num_key_value_heads", "num_experts_per_tok")  # fmt: skip
    theirs = transformers.FlexOlmoForCausalLM(
        transformers.FlexOlmoConfig(
            **{name: SMALL[name] for name in names}, num_experts=4, pad_token_id=None,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    ).eval()  # fmt: skip
    model = make(expert_ranks=[0] * 4)
    state = theirs.state_dict()
    for name, tensor in model.state_dict().items():
        if ".experts." not in name:
            state[name].copy_(tensor)
            continue
        prefix, rest = name.split("experts.")
        e, projection = int(rest.split(".")[0]), rest.split(".")[1]
        if projection == "down_proj":
            state[f"{prefix}experts.down_proj"][e].copy_(tensor)
        else:
            half = slice(0, 40) if projection == "gate_proj" else slice(40, 80)
            state[f"{prefix}experts.gate_up_proj"][e, half].copy_(tensor)
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), theirs(ids).logits)


def test_model_is_prepared_layer_by_layer():
    model = make(torch.float64).requires_grad_(False)
    ids = torch.randint(50, (2, 7))
    logits = model(ids)
    assert [done.merged for done in model.prepare([1])] == [(1,), (1,)]
    testing.assert_accurate(model(ids), logits)
