"""Small models for the tests of `flexmore_kernels.hf`."""

from __future__ import annotations

import torch
from torch import Tensor

import reference
from flexmore_kernels import FlexMoREConfig

SIZES = {
    "vocab_size": 50,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "eos_token_id": None,
}
RANKS = [0, 3, 0, 5]
RAGGED = [[0, 3, [2, 0, "full"], [0, 0, 0]], [0, 0, 1, 32]]


def make(ranks=RANKS, **change):
    """A FlexMoRE model of transformers in which no delta is zero."""
    from flexmore_kernels import hf

    return filled(hf.FlexMoREForCausalLM(hf.FlexMoREConfig(**SIZES | change, expert_ranks=ranks)))


def make_stock(**change):
    """Transformers' FlexOlmo with four experts."""
    import transformers

    config = transformers.FlexOlmoConfig(**SIZES | {"num_experts": 4} | change)
    return filled(transformers.FlexOlmoForCausalLM(config))


@torch.no_grad()
def filled(model):
    """The model, in eval mode, with weights that keep the size of what they are applied to."""
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.copy_(torch.randn(parameter.shape) * parameter.shape[-1] ** -0.5)
    return model.eval()


def plain(model, dtype=torch.float64):
    """The reference with the model's weights."""
    layers = range(model.config.num_hidden_layers)
    values = model.config.to_dict()
    values |= {"expert_ranks": [list(model.config.layer_ranks(layer)) for layer in layers]}
    config = FlexMoREConfig.from_dict(values)
    twin = reference.FlexMoREForCausalLM(config, dtype=dtype)
    twin.load_state_dict(model.state_dict())
    return twin


def some_ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(1, SIZES["vocab_size"], (batch, length))
