"""Shared by the tests of router rows: a small model, texts of it, what its layers see, its bits."""

from __future__ import annotations

import torch

import flexmore_kernels as fk

D, VOCABULARY = 12, 40
NAMES = ("base", "math", "code", "law")


def make_model(dtype=torch.float64, **change):
    values = {
        "vocab_size": VOCABULARY,
        "hidden_size": D,
        "intermediate_size": 20,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_experts_per_tok": 2,
        "expert_ranks": [0, 3, 0, 2],
        "experts": [{"name": name} for name in NAMES],
    }
    model = fk.FlexMoREForCausalLM(fk.FlexMoREConfig.from_dict(values | change), dtype=dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            offset = 1.0 if parameter.dim() == 1 else 0.0
            parameter.copy_(offset + torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model


def projected(**change):
    more = {"router": "projected", "domain_embedding_size": 5, "projector_size": 6}
    return make_model(**more, **change)


def some_texts(experts=(0, 1, 2, 3), documents=3):
    """By expert, documents of different lengths."""
    lengths = [5, 1, 9, 14, 3]
    return {
        e: [torch.randint(VOCABULARY, (lengths[(e + i) % 5],)).tolist() for i in range(documents)]
        for e in experts
    }


def own_words(experts=(0, 1, 2, 3), documents=6, tokens=12, words=3):
    """Documents of which each expert's have a few words that no other's have."""
    return {
        e: [(torch.randint(words, (tokens,)) + e * words).tolist() for _ in range(documents)]
        for e in experts
    }


def seen(model, document, expert=0):
    """x of each layer over one document, (n, D), with `expert` (and the shared one) alone."""
    layers, found = [block.mlp for block in model.model.layers], []
    shared = layers[0].shared_expert
    mask = torch.zeros(model.config.num_experts, dtype=torch.bool)
    mask[[expert] if shared is None else [expert, shared]] = True
    keep = lambda layer, args: found.append(args[0][0])
    hooks = [layer.register_forward_pre_hook(keep) for layer in layers]
    with torch.no_grad():
        model(torch.tensor([document]), expert_mask=mask)
    for hook in hooks:
        hook.remove()
    return found


def rows_of(model):
    return [block.mlp.gate.weight.detach().clone() for block in model.model.layers]


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_unchanged(model, before, but=()):
    """All but tensors whose names end so have the bits that they had."""
    for name, tensor in model.state_dict().items():
        if not name.endswith(tuple(but)) or not but:
            assert torch.equal(tensor, before[name]), name
