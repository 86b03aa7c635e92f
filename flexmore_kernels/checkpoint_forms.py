"""The forms in which the same experts can be written, and config.json for each.

The authors' reader knows one rank an expert. For it, factors are padded with zero rows of A and
zero columns of B to the expert's largest rank (`pad_experts`); FlexOlmo's fused form stacks the
experts' matrices (`fuse_experts`).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from .checkpoint_config import AUTO_MAP, RANK_KEYS, as_triple, largest_ranks, with_ranks
from .checkpoint_layout import FUSED, KINDS, PROJECTIONS, mlp_prefix
from .router_kinds import ROUTER_FIELDS

_ARCHITECTURES = {"flexmore": "FlexMoREForCausalLM", "flex_olmo": "FlexOlmoForCausalLM"}


def dense_weight(base: Tensor, pair: tuple[Tensor, Tensor] | None) -> Tensor:
    """W_0 + B A (out, in), computed above W_0's precision and rounded once to its dtype.

    base: W_0 (out, in). pair: A (r, in), B (out, r) on its device, or None for W_0 itself.
    """
    if pair is None:
        return base.clone()
    acc = torch.float32 if base.dtype.itemsize == 2 else torch.float64
    a, b = (side.to(acc) for side in pair)
    return torch.addmm(base.to(acc), b, a).to(base.dtype)


def padded_ranks(layer_ranks: Sequence[Sequence]) -> list[int]:
    """The one rank of each expert that the padded form has, 0 for a full-size one.

    It is the largest of the expert in any layer and projection, at least 1. An expert that is
    full-size in some and not in others is full-size: that form cannot say so otherwise.
    """
    ranks = []
    for expert, largest in enumerate(largest_ranks(layer_ranks)):
        full = any("full" in as_triple(entries[expert]) for entries in layer_ranks)
        ranks.append(0 if full else max(1, largest))
    return ranks


def pad_experts(tensors: Mapping[str, Tensor], ranks: Sequence[int]) -> dict[str, Tensor]:
    """The tensors of MoE layers with experts of these ranks alone, one an expert.

    A smaller factor is padded with zeros; an expert of rank 0 becomes full-size (`dense_weight`).
    Tensors of other names are passed on.

    Args:
        tensors: canonical names, with any prefix, of whole layers: expert 0 must be among them.
        ranks: E entries, as `padded_ranks` gives them.

    Raises ValueError when a factor's rank is above the one that it is to have.
    """
    done = {name: tensor for name, tensor in tensors.items() if "experts." not in name}
    for base_name in [name for name in tensors if "experts.0." in name]:
        base = tensors[base_name]
        for expert, rank in enumerate(ranks):
            name = base_name.replace("experts.0.", f"experts.{expert}.")
            sides = [name.replace("_proj.", f"_proj_{side}.") for side in "ab"]
            pair = tuple(tensors[side] for side in sides) if sides[0] in tensors else None
            if name in tensors and rank == 0:
                done[name] = tensors[name]
            elif rank == 0:
                done[name] = dense_weight(base, pair)
            else:
                found = 0 if pair is None else pair[0].shape[0]
                if name in tensors or found > rank:
                    what = "full-size" if name in tensors else f"of rank {found}"
                    raise ValueError(f"{name}: {what}; accepted: up to rank {rank}")
                out, width = base.shape
                a, b = pair or (base.new_zeros(0, width), base.new_zeros(out, 0))
                more = rank - found
                done[sides[0]] = torch.cat([a, a.new_zeros(more, width)])
                done[sides[1]] = torch.cat([b, b.new_zeros(out, more)], dim=1)
    return done


def fuse_experts(tensors: MutableMapping[str, Tensor], num_experts: int) -> dict[str, Tensor]:
    """The tensors of MoE layers, all experts full-size, in FlexOlmo's fused form.

    mlp.experts.gate_up_proj (E, 2F, D) has gate's rows first, mlp.experts.down_proj is (E, D, F).
    tensors: canonical names, with any prefix, of whole layers; matrices are taken out of it as they
    are copied, so that never all are in memory twice. Other names are passed on.
    """
    done = {name: tensor for name, tensor in tensors.items() if "experts." not in name}
    for first in [name for name in tensors if name.endswith("experts.0.gate_proj.weight")]:
        prefix = first.removesuffix("experts.0.gate_proj.weight")
        F, D = tensors[first].shape
        kinds = {t.dtype for n, t in tensors.items() if n.startswith(f"{prefix}experts.")}
        dtype = reduce(torch.promote_types, kinds)
        both = tensors[first].new_empty(num_experts, 2 * F, D, dtype=dtype)
        down = tensors[first].new_empty(num_experts, D, F, dtype=dtype)
        for e in range(num_experts):
            places = (both[e, :F], both[e, F:], down[e])
            for place, projection in zip(places, PROJECTIONS, strict=True):
                place.copy_(tensors.pop(f"{prefix}experts.{e}.{projection}_proj.weight"))
        done[f"{prefix}{FUSED[0]}"], done[f"{prefix}{FUSED[1]}"] = both, down
    return done


def check_kind(
    kind: str, config: Mapping[str, Any], layer_ranks: Sequence[Sequence], expert_bias: bool
) -> None:
    """Check that a kind of checkpoint can hold these experts; ValueError says what it cannot."""
    if kind not in KINDS:
        raise ValueError(f"kind: got {kind!r}; accepted: {', '.join(map(repr, KINDS))}")
    if kind == "flexmore":
        return
    for layer, ranks in enumerate(layer_ranks):
        for expert, entry in enumerate(ranks):
            if as_triple(entry) != ("full",) * 3:
                name = f"{mlp_prefix(layer)}experts.{expert}"
                raise ValueError(f"{name}: not full-size; accepted by kind {kind!r}: full-size")
    scoring = config.get("scoring", "softmax")
    if scoring != "softmax":
        raise ValueError(f"scoring: got {scoring!r}; accepted by kind {kind!r}: 'softmax'")
    for name in ROUTER_FIELDS:
        if config.get(name) not in (None, False, "linear"):
            raise ValueError(f"{name}: got {config[name]!r}; kind {kind!r} has no place for it")
    if expert_bias:
        raise ValueError(f"mlp.gate.expert_bias: kind {kind!r} has no place for it")


def config_for(
    config: Mapping[str, Any],
    layer_ranks: Sequence[Sequence],
    *,
    kind: str = "flexmore",
    compat: bool = False,
) -> dict[str, Any]:
    """The object of config.json for a checkpoint of this kind with these experts.

    config: any of the model's config.json, of either model type. compat: for the padded form, with
    `expert_ranks` alone, and without the `auto_map` by which transformers finds this library:
    where `trust_remote_code` is always given, the authors' reader is to stay the one that reads it.
    """
    for name in ROUTER_FIELDS if compat else ():
        if config.get(name) not in (None, False, "linear"):
            raise ValueError(
                f"{name}: got {config[name]!r}; accepted by plain readers (compat): a linear "
                "router without a shared expert"
            )
    if compat and kind == "flexmore":
        layer_ranks = [padded_ranks(layer_ranks)] * len(layer_ranks)
    model_type = "flexmore" if kind == "flexmore" else "flex_olmo"
    found = {"architectures": None, **with_ranks(config, layer_ranks), "model_type": model_type}
    found.pop("auto_map", None)  # names the source's Python files, which are not copied
    if kind == "flexmore" and not compat:
        found["auto_map"] = dict(AUTO_MAP)
    if config.get("model_type", "flexmore") != model_type or not config.get("architectures"):
        found["architectures"] = [_ARCHITECTURES[model_type]]
    if model_type == "flex_olmo":
        for name in (*RANK_KEYS, *ROUTER_FIELDS, "scoring", "expert_bias"):
            found.pop(name, None)
        # transformers has kept the angle there since version 5.
        if "rope_parameters" not in found and "rope_theta" in found:
            rope = {"rope_type": "default", "rope_theta": found["rope_theta"]}
            found["rope_parameters"] = rope
    return found
