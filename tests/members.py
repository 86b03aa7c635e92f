"""Small layers, models and experts for the tests of experts that join and leave."""

from __future__ import annotations

import json

import torch

import flexmore_kernels as fk
from flexmore_kernels import checkpoint
from flexmore_kernels.base_fingerprint import of_model
from flexmore_kernels.cards import Card
from flexmore_kernels.checkpoint_layout import read_layout
from flexmore_kernels.checkpoint_writer import write_tensors
from flexmore_kernels.expert import Expert
from flexmore_kernels.testing import assert_same

D, F, M, L = 16, 24, 5, 2
RANKS = (0, 3, 0, (2, 0, "full"))
NEW = {"low": 4, "full": 0, "mixed": (2, "full", 0)}


def randomised(module):
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.normal_(std=0.3)
    return module


def make_layer(device="cpu", ranks=RANKS, top_k=2, **options):
    return randomised(fk.FlexMoRE(D, F, ranks, top_k, device=device, **options))


def make_model(device="cpu", ranks=RANKS, seed=0, top_k=2, **options):
    top_k = min(top_k, len(ranks) - bool(options.get("shared_expert")))
    torch.manual_seed(seed)
    config = fk.FlexMoREConfig(
        vocab_size=11, hidden_size=D, intermediate_size=F, num_hidden_layers=L,
        num_attention_heads=2, expert_ranks=ranks, num_experts_per_tok=top_k,
        **options,
    )  # fmt: skip
    return randomised(fk.FlexMoREForCausalLM(config, device=device))


def weights_of(rank, dtype=torch.float32):
    """gate, up and down of an expert of this entry of `expert_ranks`."""
    triple = rank if isinstance(rank, tuple) else ("full" if rank == 0 else rank,) * 3
    found = []
    for kind, (out, width) in zip(triple, ((F, D), (F, D), (D, F)), strict=True):
        if kind == "full":
            found.append(torch.randn(out, width, dtype=dtype))
        elif kind == 0:
            found.append(None)
        else:
            found.append(
                (torch.randn(kind, width, dtype=dtype), torch.randn(out, kind, dtype=dtype))
            )
    return tuple(found)


def an_expert(rank=4, name="law", base=None, **options):
    layers = [weights_of(rank) for _ in range(L)]
    return Expert(D, F, layers, Card(name, "A. Owner", "CC0"), base, **options)


def beside(model, rank=4, **options):
    """An expert of the model's base, with what its router needs."""
    if "router_rows" not in options and model.config.router == "linear":
        options["router_rows"] = torch.randn(L, D)
    if model.config.router == "projected":
        options["embedding"] = torch.randn(M)
    return an_expert(rank, base=of_model(model), **options)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def check_unchanged(module, before, but=()):
    after = module.state_dict()
    for name, tensor in before.items():
        if not name.endswith(tuple(but)) or not but:
            assert_same(after[name], tensor, name)


ROUTERS = {
    "linear": {},
    "biased": {"expert_bias": True},
    "projected": {"router": "projected", "domain_embedding_size": M, "projector_size": 7},
}


def make_checkpoint(directory, ranks=RANKS, seed=0, **options):
    """A mixture's checkpoint; options: as `make_model` takes them."""
    model = make_model(ranks=ranks, seed=seed, **options)
    checkpoint.save_checkpoint(directory, model.state_dict(), model.config.to_dict())
    (directory / "tokenizer.json").write_text("{}")
    return directory


def make_dense(directory, seed=0):
    """A dense OLMo-2's checkpoint, as Hugging Face writes it: no router, the FFN below `mlp.`"""
    model = make_model(ranks=(0,), seed=seed)
    tensors = {
        name.replace(".experts.0.", "."): tensor
        for name, tensor in model.state_dict().items()
        if ".mlp.gate.weight" not in name
    }
    kept = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
            "num_attention_heads", "num_key_value_heads", "rms_norm_eps", "rope_theta",
            "tie_word_embeddings")  # fmt: skip
    config = {"model_type": "olmo2", **{name: getattr(model.config, name) for name in kept}}
    directory.mkdir()
    write_tensors(directory / "model.safetensors", tensors)
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def tensors_of(directory):
    return checkpoint.read_tensors(read_layout(directory))


def same_checkpoint(model, directory):
    """A checkpoint holds a live model: tensors to the bit, ranks, cards, top_k, shared expert."""
    found, wanted = tensors_of(directory), model.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert_same(found[name], tensor, name)
    loaded = checkpoint.load_model(directory)
    for name in ("experts", "expert_ranks", "num_experts_per_tok", "shared_expert", "router"):
        assert getattr(loaded.config, name) == getattr(model.config, name), name
