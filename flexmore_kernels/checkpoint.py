"""Checkpoint directories: config.json and safetensors, read and written.

The authors' format, whose names every function of the package uses:

    config.json                        FlexOlmo's fields and `expert_ranks`, E entries
    model.safetensors                  all tensors; or, when there are many,
    model.safetensors.index.json       which of the model-*.safetensors holds each tensor
    model.layers.{l}.mlp.gate.weight                            (E, D), the router; a projected one:
                                  gate.projector_in.weight, projector_out.weight, domain_embeddings
    model.layers.{l}.mlp.experts.{e}.{P}_proj.weight            (out, in), a full-size expert
    model.layers.{l}.mlp.experts.{e}.{P}_proj_a.weight, _b      (r, in), (out, r), a low-rank one

FlexOlmo's own formats are read by the same names, see checkpoint_layout.py, and what config.json
says of ranks is in checkpoint_config.py. Reading checks every name and shape, and that every file
is as long as it says, before it loads anything. Writing goes to a temporary directory that is
renamed when it is complete; checkpoint_writer.py writes what does not fit in memory.
"""

from __future__ import annotations

import json
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .checkpoint_config import RANK_KEYS, check_config
from .checkpoint_folders import made_whole, refuse_existing
from .checkpoint_forms import check_kind, config_for, fuse_experts, pad_experts, padded_ranks
from .checkpoint_headers import file_names
from .checkpoint_layout import (
    PROJECTIONS,
    Layout,
    as_triple,
    layer_ranks_of,
    mlp_prefix,
    read_layout,
    tensor_shapes,
)
from .checkpoint_writer import write_config, write_index, write_tensors
from .layer import FlexMoRE
from .model import FlexMoREConfig, FlexMoREForCausalLM
from .router_kinds import ROUTER_FIELDS

DEMO_RANKS = (0, 1, 8, 32, 128, 256, 0)
"""Of the checkpoint that the demo makes: 1 to a few hundred, and one full-size expert."""


def read_tensors(
    layout: Layout,
    prefix: str = "",
    dtype: torch.dtype | None = None,
    *,
    device: Any = "cpu",
    names: Collection[str] | None = None,
) -> dict[str, Tensor]:
    """The tensors whose canonical names start with `prefix`, which is cut off.

    names: of these only those, where the checkpoint has them. dtype None keeps what is stored. Of a
    fused tensor only the rows that a name stands for are read. Raises ValueError naming a tensor
    that holds NaN or Inf.
    """
    by_file: dict[str, list[str]] = {}
    for name in layout.files if names is None else names:
        if name.startswith(prefix) and name in layout.files:
            by_file.setdefault(layout.files[name], []).append(name)
    tensors = {}
    for file, found in by_file.items():
        with safe_open(layout.directory / file, framework="pt") as opened:
            for name in found:
                stored, _, index = layout.parts[name]
                if index == ():
                    tensor = opened.get_tensor(stored.name)
                else:
                    tensor = opened.get_slice(stored.name)[index]
                tensor = tensor.to(device=device, dtype=dtype or tensor.dtype).contiguous()
                if tensor.untyped_storage().nbytes() > tensor.nbytes:
                    tensor = tensor.clone()  # a piece must not hold on to the whole
                check_finite(f"{name} in {file}", tensor)
                tensors[name[len(prefix) :]] = tensor
    return tensors


def check_finite(name: str, tensor: Tensor) -> None:
    """Check that a tensor holds numbers alone; ValueError names it and says what it holds."""
    if tensor.numel() == 0 or tensor.device.type == "meta":
        return
    ends = torch.stack(torch.aminmax(tensor))  # one pass, no copy; NaN wins in both
    if not bool(ends.isfinite().all()):
        what = "NaN" if bool(ends.isnan().any()) else "Inf"
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: holds {what} as {kind}; accepted: finite numbers")


def read_layer(layout: Layout, layer: int, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
    """The tensors of one MoE layer under the names of `FlexMoRE.state_dict()`, on the CPU."""
    count = len(layout.layer_ranks)
    if not 0 <= layer < count:
        raise ValueError(f"layer: got {layer}; accepted: 0 to {count - 1}")
    return read_tensors(layout, mlp_prefix(layer), dtype)


def layer_arguments(layout: Layout, layer: int) -> dict[str, Any]:
    """The arguments that `FlexMoRE` (and `reference.FlexMoRE`) take for one layer."""
    config = layout.config
    return {
        "hidden_size": config["hidden_size"],
        "intermediate_size": config["intermediate_size"],
        "expert_ranks": layout.layer_ranks[layer],
        "top_k": config["num_experts_per_tok"],
        "norm_topk_prob": config.get("norm_topk_prob", False),
        "scoring": config.get("scoring", "softmax"),
        "expert_bias": layout.expert_bias,
        **{name: config[name] for name in ROUTER_FIELDS if name in config},
    }


def expert_weights(
    tensors: Mapping[str, Tensor], ranks: Sequence[Any]
) -> tuple[list[Any], list[Any], list[Any]]:
    """gate, up and down as `ops.experts` takes them, from a layer's tensors and `expert_ranks`."""

    def entry(expert: int, projection: str, kind: Any) -> Any:
        name = f"experts.{expert}.{projection}_proj"
        if kind == "full":
            return tensors[f"{name}.weight"]
        return (tensors[f"{name}_a.weight"], tensors[f"{name}_b.weight"]) if kind else None

    triples = [as_triple(rank) for rank in ranks]
    gate, up, down = (
        [entry(e, projection, triple[i]) for e, triple in enumerate(triples)]
        for i, projection in enumerate(PROJECTIONS)
    )
    return gate, up, down


def build_layer(
    arguments: Mapping[str, Any], tensors: Mapping[str, Tensor], device: Any
) -> FlexMoRE:
    """A layer of these constructor arguments that holds these tensors, moved but not copied."""
    module = FlexMoRE(**arguments, device="meta")
    module.load_state_dict({k: t.to(device) for k, t in tensors.items()}, assign=True)
    return module


def load_layer(
    checkpoint: str | os.PathLike | Layout, layer: int, device: Any = "cpu", dtype=None
) -> FlexMoRE:
    """One MoE layer of a checkpoint; `dtype` None keeps what is stored.

    Raises as `read_layout` does, before anything is loaded.
    """
    layout = checkpoint if isinstance(checkpoint, Layout) else read_layout(checkpoint)
    return build_layer(layer_arguments(layout, layer), read_layer(layout, layer, dtype), device)


def model_config(layout: Layout) -> FlexMoREConfig:
    """The config of a checkpoint's model: of ranks what its tensors say, not what config.json does,
    and of a FlexOlmo's what it is from now on."""
    ranks = layout.layer_ranks
    found = ranks[0] if len(set(ranks)) == 1 else ranks
    values = {k: v for k, v in config_for(layout.config, ranks).items() if k not in RANK_KEYS}
    return FlexMoREConfig.from_dict(
        values | {"expert_ranks": found, "expert_bias": layout.expert_bias}
    )


def load_model(
    checkpoint: str | os.PathLike | Layout, device: Any = "cpu", dtype=None
) -> FlexMoREForCausalLM:
    """The whole decoder of a checkpoint; `dtype` None keeps what is stored.

    Raises as `read_layout` does, before anything is loaded.
    """
    layout = checkpoint if isinstance(checkpoint, Layout) else read_layout(checkpoint)
    model = FlexMoREForCausalLM(model_config(layout), device="meta")
    model.load_state_dict(read_tensors(layout, dtype=dtype, device=device), assign=True)
    return model


def save_checkpoint(
    directory: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    max_file_bytes: int = 4 << 30,
    *,
    compat: bool = False,
    kind: str | None = None,
) -> None:
    """Write a checkpoint directory, whole or not at all.

    Args:
        directory: must not exist yet, or be empty.
        tensors: every tensor under its canonical name, as from `state_dict()`.
        config: what config.json is to hold. Of ranks it needs to say only which matrices have no
            delta; what is written of them comes from the tensors.
        max_file_bytes: a new safetensors file starts above this size.
        compat: write for the authors' reader, which knows one rank an expert: factors padded with
            zeros to the largest, and an expert that is full-size in part full-size in all.
        kind: "flexmore", "flex_olmo" or "flex_olmo_fused"; default: the config's model_type.

    Raises ValueError naming what is wrong with the tensors, the config or the kind, OSError when
    the disk is full; then there is no directory.
    """
    directory = Path(directory)
    refuse_existing(directory)
    if kind is None:
        kind = config.get("model_type", "flexmore")
    config = json.loads(json.dumps(dict(config)))  # tuples as the lists that will be read
    checked = check_config({"model_type": "flexmore", **config})
    ranks = layer_ranks_of(checked, {name: tuple(t.shape) for name, t in tensors.items()})
    expert_bias = any(name.endswith("gate.expert_bias") for name in tensors)
    check_kind(kind, config, ranks, expert_bias)
    written = config_for(config, ranks, kind=kind, compat=compat)
    if compat and kind == "flexmore":
        tensors = pad_experts(tensors, padded_ranks(ranks))
    elif kind == "flex_olmo_fused":
        tensors = fuse_experts(dict(tensors), checked["num_experts"])
    with made_whole(directory) as partial:
        _write_files(partial, tensors, max_file_bytes)
        write_config(partial, written)
        read_layout(partial)


def make_demo_checkpoint(
    directory: str | os.PathLike,
    *,
    hidden_size: int = 512,
    intermediate_size: int = 1376,
    num_layers: int = 3,
    expert_ranks: Sequence = DEMO_RANKS,
    top_k: int = 4,
    vocab_size: int = 256,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> None:
    """Write a checkpoint of random weights: every delta is there (no B is zero), and half as large
    as the base; the same seed gives the same bits.
    """
    config = {
        "architectures": ["FlexMoREForCausalLM"],
        "model_type": "flexmore",
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_layers,
        "num_attention_heads": max(1, hidden_size // 64),
        "num_experts": len(expert_ranks),
        "num_experts_per_tok": top_k,
        "expert_ranks": list(expert_ranks),
        "norm_topk_prob": False,
        "rms_norm_eps": 1e-6,
        "rope_theta": 500000.0,
        "tie_word_embeddings": False,
    }
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, shape in tensor_shapes(config, [expert_ranks] * num_layers).items():
        if "norm" in name:
            tensors[name] = torch.ones(shape, dtype=dtype)
            continue
        scale = shape[-1] ** -0.5 * (0.5 if name.endswith("_b.weight") else 1.0)
        tensors[name] = (torch.randn(shape, generator=generator) * scale).to(dtype)
    save_checkpoint(directory, tensors, config)


def _write_files(directory: Path, tensors: Mapping[str, Tensor], max_file_bytes: int) -> None:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    files = file_names(len(groups))
    for file, group in zip(files, groups, strict=True):
        write_tensors(directory / file, {name: tensors[name] for name in group})
    if len(files) > 1:
        write_index(directory, files)
