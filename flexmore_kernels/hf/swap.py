"""A loaded FlexOlmo becomes a FlexMoRE model in place: its MoE blocks are replaced, layer by layer.

    transformers' block                      what takes its place, under its name `mlp`
    gate (router)                            the same module and parameter
    experts.gate_up_proj (E, 2F, D)          a base and, by `expert_ranks`, full-size experts or
    experts.down_proj (E, D, F)              factors: given, or by SVD of W_e - W_0

Attention, norms, embeddings, their parameters, hooks and dtypes stay; the model object is the same
and its classes become `fk.hf`'s, which are subclasses, so that it saves and loads as model type
"flexmore".
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import FlexOlmoForCausalLM, FlexOlmoModel, PreTrainedModel
from transformers.models.flex_olmo.modeling_flex_olmo import FlexOlmoSparseMoeBlock
from transformers.utils import logging

from ..checkpoint import read_layer
from ..checkpoint_layout import PROJECTIONS, Layout, as_triple, read_layout
from ..checks import check_one_of, check_tensor
from .configuration import FlexMoREConfig
from .modeling import (
    FlexMoREDecoderLayer,
    FlexMoREForCausalLM,
    FlexMoREModel,
    FlexMoRESparseMoeBlock,
    FlexMoRETopKRouter,
)

_BECOMES = {FlexOlmoForCausalLM: FlexMoREForCausalLM, FlexOlmoModel: FlexMoREModel}


@torch.no_grad()
def swap_experts(
    model: PreTrainedModel,
    expert_ranks: Sequence | None = None,
    *,
    weights: Mapping[str, Tensor] | str | os.PathLike | None = None,
    method: str = "exact",
) -> PreTrainedModel:
    """Replace the MoE blocks of a loaded FlexOlmo by FlexMoRE blocks, in place; return the model.

    Args:
        model: transformers' FlexOlmoForCausalLM or FlexOlmoModel, with its weights on a device.
        expert_ranks: E entries for all layers or L lists of them, as `fk.FlexMoRE` takes them.
            None: what `weights` says; an expert of which it holds nothing stays full-size.
        weights: what replaces the model's own: tensors under the names of the authors' checkpoints
            (`model.layers.{l}.mlp.` and then as in `FlexMoRE.state_dict()`), or a checkpoint
            directory. Factors that it lacks are the largest singular triples of W_e - W_0.
        method: of the SVD, "exact" or "randomized", as `conversion.svd.decompose`.

    Layers are done one after the other, on the device and in the dtype of each, so that one layer
    is in memory twice. Parameters of the experts are new ones (make the optimizer afterwards);
    `requires_grad` follows the old ones. Raises ValueError or TypeError naming the argument, before
    anything is changed, also for NaN and Inf in weights of which an SVD is to be taken, and for a
    directory whose sizes or routing are not the model's: factors are made for one router.
    """
    if type(model) not in _BECOMES:
        accepted = ", ".join(cls.__name__ for cls in _BECOMES)
        raise TypeError(f"model: got {type(model).__name__}; accepted: {accepted}")
    decompose = _decomposition(method)
    decoder = getattr(model, model.base_model_prefix, model)
    for layer, block in enumerate(decoder.layers):
        _check_block(f"model.layers.{layer}.mlp", block.mlp, model.config)
    source = _Source(weights)
    if source.layout is not None:
        _check_config(source.layout, model.config)
    _check_names(source.tensors, decoder)
    if expert_ranks is None:
        if weights is None:
            raise ValueError("expert_ranks: got None without weights; accepted: ranks, or weights")
        expert_ranks = [source.ranks(layer, model.config) for layer in range(len(decoder.layers))]
    config = _config(model.config, expert_ranks)
    lacking = [_check_layer(source, i, block.mlp, config) for i, block in enumerate(decoder.layers)]
    factors = decompose if any(lacking) else None
    with torch.device("meta"):
        like = _BECOMES[type(model)](config)
    blocks = getattr(like, like.base_model_prefix, like).layers
    layers = list(enumerate(zip(decoder.layers, blocks, strict=True)))
    for layer, (block, new) in logging.tqdm(layers, desc="Swapping experts", unit="layer"):
        block.mlp = _swapped(source, layer, block.mlp, new.mlp, config, factors)
        block.__class__ = FlexMoREDecoderLayer
    _become(model, decoder, like, config)
    return model


class _Source:
    """What replaces the model's own weights, one layer at a time."""

    def __init__(self, weights: Any) -> None:
        if weights is not None and not isinstance(weights, (Mapping, str, os.PathLike)):
            accepted = "a mapping of names to tensors, a directory, None"
            raise TypeError(f"weights: got {type(weights).__name__}; accepted: {accepted}")
        is_directory = weights is not None and not isinstance(weights, Mapping)
        self.layout = read_layout(weights) if is_directory else None
        self.tensors = weights if isinstance(weights, Mapping) else {}

    def read(self, layer: int) -> dict[str, Tensor]:
        """Tensors of a layer under the names of `FlexMoRE.state_dict()`."""
        if self.layout is not None:
            return read_layer(self.layout, layer)
        prefix = f"model.layers.{layer}.mlp."
        return {k[len(prefix) :]: t for k, t in self.tensors.items() if k.startswith(prefix)}

    def ranks(self, layer: int, config: Any) -> list:
        """`expert_ranks` of a layer, by what is there."""
        given = self.read(layer)

        def entry(e: int, projection: str) -> int | str:
            name = f"experts.{e}.{projection}_proj"
            if f"{name}_a.weight" in given:
                return given[f"{name}_a.weight"].shape[0]
            # A directory holds all there is; a mapping leaves out experts that shall stay.
            known = self.layout is not None or any(k.startswith(f"experts.{e}.") for k in given)
            return 0 if known and f"{name}.weight" not in given else "full"

        found = [[entry(e, p) for p in PROJECTIONS] for e in range(config.num_experts)]
        return [0 if own == ["full"] * 3 else own for own in found]


def _check_names(given: Mapping[str, Tensor], decoder: nn.Module) -> None:
    """Raise for a tensor that nothing reads; those outside the blocks, as of a whole state_dict,
    are the model's own and stay."""
    blocks = tuple(f"model.layers.{layer}.mlp." for layer in range(len(decoder.layers)))
    rest = {f"model.{name}" for name in decoder.state_dict()} | {"lm_head.weight"}
    for name in given:
        if not name.startswith(blocks) and name not in rest:
            raise ValueError(
                f"weights: got {name}; accepted: model.layers.{{l}}.mlp.* of {len(blocks)} layers"
            )


def _check_config(layout: Layout, config: Any) -> None:
    """Raise for a checkpoint whose mixtures have other sizes or another routing than the model."""
    sizes = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_experts")
    routing = ("num_experts_per_tok", "norm_topk_prob", "scoring", "expert_bias")
    absent = {"norm_topk_prob": False, "scoring": "softmax", "expert_bias": False}
    stored = layout.config | {"expert_bias": layout.expert_bias}  # what is stored is what loads
    for name in (*sizes, *routing):
        found, own = stored.get(name, absent.get(name)), getattr(config, name, absent.get(name))
        if found == own:
            continue
        if name in sizes:
            cure = "convert the checkpoint that this model was loaded from"
        elif hasattr(config, name):
            cure = f"load the model with {name}={found!r}, if that is meant"
        else:
            cure = "FlexOlmo has no other: load the directory itself, AutoModelForCausalLM does"
        raise ValueError(
            f"weights: {layout.directory} has {name} {found!r}; accepted: the model's, {own!r} "
            f"({cure})"
        )


def _check_block(name: str, block: nn.Module, config: Any) -> None:
    if type(block) is not FlexOlmoSparseMoeBlock:
        raise ValueError(f"{name}: got {type(block).__name__}; accepted: FlexOlmoSparseMoeBlock")
    E, F, D = config.num_experts, config.intermediate_size, config.hidden_size
    for part, shape in (("gate_up_proj", (E, 2 * F, D)), ("down_proj", (E, D, F))):
        tensor = getattr(block.experts, part)
        if tensor.device.type == "meta" or type(tensor).__name__ == "DTensor":
            kind = "weights on meta (offloaded?)" if tensor.device.type == "meta" else "a DTensor"
            raise ValueError(f"{name}.experts.{part}: got {kind}; accepted: whole, on a device")
        check_tensor(f"{name}.experts.{part}", tensor, shape)


def _config(old: Any, expert_ranks: Sequence) -> FlexMoREConfig:
    gone = ("model_type", "architectures", "auto_map", "transformers_version")
    fields = {name: value for name, value in old.to_dict().items() if name not in gone}
    config = FlexMoREConfig(**fields, expert_ranks=expert_ranks)
    config._attn_implementation = old._attn_implementation
    return config


def _entries(config: FlexMoREConfig, layer: int) -> Iterator[tuple[int, str, int | str]]:
    """(expert, projection, "full" or 0 or the rank) of a layer."""
    for e, entry in enumerate(config.layer_ranks(layer)):
        for projection, kind in zip(PROJECTIONS, as_triple(entry), strict=True):
            yield e, projection, kind


def _dense(block: nn.Module, expert: int, projection: str) -> Tensor:
    """A view of an expert's matrix in transformers' block."""
    if projection == "down":
        return block.experts.down_proj[expert]
    return block.experts.gate_up_proj[expert].chunk(2)[projection == "up"]


def _check_layer(source: _Source, layer: int, block: nn.Module, config: FlexMoREConfig) -> bool:
    """Raise if what is given does not fit; else whether a factor has to be computed."""
    given, lacking = source.read(layer), False
    path = f"model.layers.{layer}.mlp"
    expected = {"gate.weight": tuple(block.gate.weight.shape)}
    for e, projection, kind in _entries(config, layer):
        name = f"experts.{e}.{projection}_proj"
        out, width = _dense(block, e, projection).shape
        if kind == "full":
            expected[f"{name}.weight"] = (out, width)
        elif kind:
            pair = {f"{name}_a.weight": (kind, width), f"{name}_b.weight": (out, kind)}
            expected |= pair
            missing = sorted(pair.keys() - given.keys())
            if len(missing) == 1:
                raise ValueError(f"weights: {path}.{missing[0]} is missing")
            lacking = lacking or bool(missing)
            for side in (0, e) if missing else ():
                if not bool(_matrix(given, block, side, projection).isfinite().all()):
                    which = f"{path}.experts.{side}.{projection}_proj"
                    raise ValueError(f"{which}: holds NaN or Inf; accepted: finite weights")
    for name, tensor in given.items():
        if name not in expected:
            ranks = config.layer_ranks(layer)
            raise ValueError(f"weights: {path}.{name} has no place in a layer of ranks {ranks}")
        check_tensor(f"weights: {path}.{name}", tensor, expected[name])
    return lacking


def _matrix(given: Mapping[str, Tensor], block: nn.Module, e: int, projection: str) -> Tensor:
    """An expert's full-size matrix: given, or the model's own (a view)."""
    found = given.get(f"experts.{e}.{projection}_proj.weight")
    return _dense(block, e, projection) if found is None else found


def _decomposition(method: str) -> Callable[[Tensor, int, torch.dtype], tuple[Tensor, Tensor]]:
    """(delta, rank, dtype) to a and b."""
    from ..conversion.svd import METHODS, decompose, factor_pair

    check_one_of("method", method, METHODS)
    return lambda delta, rank, dtype: factor_pair(
        decompose(delta, rank=rank, method=method), rank, dtype
    )


def _swapped(
    source: _Source,
    layer: int,
    block: nn.Module,
    new: FlexMoRESparseMoeBlock,
    config: FlexMoREConfig,
    factors: Callable | None,
) -> FlexMoRESparseMoeBlock:
    """`new`, made on meta, with the weights of a layer; `block` is transformers'."""
    given, old = source.read(layer), block.experts.gate_up_proj
    tensors: dict[str, Tensor] = {}
    for e, projection, kind in _entries(config, layer):
        name = f"{e}.{projection}_proj"
        if kind == "full":
            # A copy: a view would keep all experts of the fused tensor alive.
            tensors[f"{name}.weight"] = _matrix(given, block, e, projection).to(old, copy=True)
        elif kind:
            pair = [given.get(f"experts.{name}_{side}.weight") for side in "ab"]
            if pair[0] is None:
                delta = _matrix(given, block, e, projection).to(old.device, torch.float64)
                delta = delta - _matrix(given, block, 0, projection).to(delta)
                pair = factors(delta, kind, old.dtype)
            for side, factor in zip("ab", pair, strict=True):
                tensors[f"{name}_{side}.weight"] = factor.to(old, copy=True).contiguous()
    new.experts.load_state_dict(tensors, assign=True)
    new.experts.requires_grad_(old.requires_grad)
    if "gate.weight" in given:
        block.gate.weight.copy_(given["gate.weight"])
    new.gate = block.gate
    new.gate.__class__ = FlexMoRETopKRouter
    new.gate.scoring = config.scoring
    new.gate.register_parameter("expert_bias", None)
    return new.train(block.training)


def _become(model: nn.Module, decoder: nn.Module, like: nn.Module, config: FlexMoREConfig) -> None:
    """Give the model the classes, config and plans of `like`, a model of its form."""
    old = model.config
    for module in model.modules():
        if getattr(module, "config", None) is old:
            module.config = config
    pairs = {id(model): (model, like)}
    pairs[id(decoder)] = (decoder, getattr(like, like.base_model_prefix, like))
    module_state = nn.Module().__dict__.keys()
    for found, wanted in pairs.values():
        found.__class__ = type(wanted)
        for name in wanted.__dict__.keys() & found.__dict__.keys() - module_state:
            # What transformers' constructors keep: plans for parallelism, what not to split, ...
            if name.startswith("_"):
                found.__dict__[name] = wanted.__dict__[name]
