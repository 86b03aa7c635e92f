"""The models of the study, made of tensors: a base, and experts beside it in any form.

An expert's FFN is a dict: (layer, projection) to its matrix (out, in), or to a pair of factors
a (r, in), b (out, r) of its difference to the base's matrix. Its rows of the router are (L, D).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from settings import Settings
from torch import Tensor

import flexmore_kernels as fk
from flexmore_kernels.checkpoint_config import shortest

PROJECTIONS = ("gate", "up", "down")
Weight = Tensor | tuple[Tensor, Tensor]
Ffn = dict[tuple[int, str], Weight]
Tensors = dict[str, Tensor]


def config_of(settings: Settings, ranks: Sequence, top_k: int, **more) -> fk.FlexMoREConfig:
    """The decoder's config, with these experts."""
    return fk.FlexMoREConfig(
        vocab_size=settings.vocabulary,
        hidden_size=settings.hidden_size,
        intermediate_size=settings.intermediate_size,
        num_hidden_layers=settings.layers,
        num_attention_heads=settings.heads,
        num_experts_per_tok=top_k,
        expert_ranks=list(ranks),
        **more,
    )


def key(layer: int, expert: int, projection: str) -> str:
    """Of a full-size matrix in the state_dict."""
    return f"model.layers.{layer}.mlp.experts.{expert}.{projection}_proj.weight"


def gate_key(layer: int, name: str = "weight") -> str:
    """Of a router's tensor in the state_dict."""
    return f"model.layers.{layer}.mlp.gate.{name}"


def new_base(settings: Settings, device, seed: int) -> fk.FlexMoREForCausalLM:
    """A dense decoder of random weights in float32: expert 0 alone, whose row is zero."""
    torch.manual_seed(seed)
    model = fk.FlexMoREForCausalLM(config_of(settings, [0], 1)).to(device)
    with torch.no_grad():
        for block in model.model.layers:
            block.mlp.gate.weight.zero_()
    return model


def built(config: fk.FlexMoREConfig, tensors: Mapping[str, Tensor], dtype=None):
    """A model that holds these tensors, in a dtype; None shares their memory where they have it."""
    model = fk.FlexMoREForCausalLM(config, device="meta")
    given = {name: t if dtype is None else t.to(dtype) for name, t in tensors.items()}
    model.load_state_dict(given, assign=True)
    return model.requires_grad_(False)


def ffn_of(tensors: Mapping[str, Tensor], layers: int, expert: int = 0) -> Ffn:
    """A full-size expert's matrices in a state_dict."""
    return {(n, p): tensors[key(n, expert, p)] for n in range(layers) for p in PROJECTIONS}


def others_of(tensors: Mapping[str, Tensor]) -> Tensors:
    """What is not of the layers' experts and routers."""
    return {k: t for k, t in tensors.items() if ".mlp." not in k}


def ranks_of(ffns: Sequence[Ffn], layers: int) -> list[list]:
    """The config's expert_ranks, a list a layer, of the base and these experts."""
    found = []
    for layer in range(layers):
        entries = [0]
        for ffn in ffns:
            weights = [ffn[layer, p] for p in PROJECTIONS]
            entries.append(shortest(tuple(
                "full" if isinstance(w, Tensor) else w[0].shape[0] for w in weights
            )))  # fmt: skip
        found.append(entries)
    return found


def expert_tensors(ffn: Ffn, expert: int) -> Tensors:
    """Its entries of the state_dict."""
    found = {}
    for (layer, projection), weight in ffn.items():
        if isinstance(weight, Tensor):
            found[key(layer, expert, projection)] = weight
        else:
            name = key(layer, expert, projection).removesuffix(".weight")
            found[f"{name}_a.weight"], found[f"{name}_b.weight"] = weight
    return found


def mixture_tensors(base: Mapping[str, Tensor], ffns: Sequence[Ffn], layers: int) -> Tensors:
    """The state_dict of base and experts, all but the router."""
    tensors = others_of(base) | expert_tensors(ffn_of(base, layers), 0)
    for number, ffn in enumerate(ffns, 1):
        tensors |= expert_tensors(ffn, number)
    return tensors


def mixture(
    settings: Settings,
    base: Mapping[str, Tensor],
    ffns: Sequence[Ffn],
    rows: Tensor,
    top_k: int,
    dtype: torch.dtype | None,
    **more,
) -> fk.FlexMoREForCausalLM:
    """Base and experts; rows (L, E, D) of the router. more: for the config."""
    tensors = mixture_tensors(base, ffns, settings.layers)
    tensors |= {gate_key(layer): row for layer, row in enumerate(rows)}
    config = config_of(settings, ranks_of(ffns, settings.layers), top_k, **more)
    return built(config, tensors, dtype)


def public_rows(base: Mapping[str, Tensor], layers: int) -> Tensor:
    """(L, 1, D): expert 0's rows of the router."""
    return torch.stack([base[gate_key(layer)][:1] for layer in range(layers)])


def joined_rows(base: Mapping[str, Tensor], rows: Sequence[Tensor], layers: int) -> Tensor:
    """(L, E, D): expert 0's and these experts' rows (L, D)."""
    return torch.cat([public_rows(base, layers), *(row[:, None] for row in rows)], 1)


def parameters_of(ffns: Sequence[Ffn]) -> int:
    """Numbers that experts hold, their rows of the router aside."""
    parts = [w for ffn in ffns for weight in ffn.values()
             for w in ((weight,) if isinstance(weight, Tensor) else weight)]  # fmt: skip
    return sum(part.numel() for part in parts)


def mean_of(models: Sequence[Mapping[str, Tensor]]) -> Tensors:
    """The mean of state_dicts' tensors."""
    return {name: torch.stack([m[name] for m in models]).mean(0) for name in models[0]}


def mixed(old: Tensor, new: Tensor, share: float) -> Tensor:
    """(1 - share) old + share new."""
    return torch.lerp(old, new, share)
