"""Checkpoint directories in the authors' format: config.json and safetensors, read and written.

    config.json                        FlexOlmo's fields and `expert_ranks`, E entries
    model.safetensors                  all tensors; or, when there are many,
    model.safetensors.index.json       which of the model-*.safetensors holds each tensor
    model.layers.{l}.mlp.gate.weight                            (E, D), the router
    model.layers.{l}.mlp.experts.{e}.{P}_proj.weight            (out, in), a full-size expert
    model.layers.{l}.mlp.experts.{e}.{P}_proj_a.weight, _b      (r, in), (out, r), a low-rank one

Reading checks every name and shape, and that every file is as long as it says, before it loads
anything. What an expert is follows from the tensors, not from `expert_ranks`, which cannot say that
ranks differ by layer or projection; where the two disagree, `Layout.notes` says so. Writing goes to
a temporary directory that is renamed when it is complete.
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from .checkpoint_layout import (
    INDEX_FILE,
    PROJECTIONS,
    SINGLE_FILE,
    Layout,
    as_triple,
    mlp_prefix,
    read_layout,
    tensor_shapes,
)
from .layer import FlexMoRE
from .model import FlexMoREConfig, FlexMoREForCausalLM

DEMO_RANKS = (0, 1, 8, 32, 128, 256, 0)
"""Of the checkpoint that the demo makes: 1 to a few hundred, and one full-size expert."""


def read_tensors(layout: Layout, prefix: str = "", dtype: torch.dtype | None = None) -> dict:
    """The tensors whose names start with `prefix`, which is cut off, on the CPU."""
    by_file: dict[str, list[str]] = {}
    for name, file in layout.files.items():
        if name.startswith(prefix):
            by_file.setdefault(file, []).append(name)
    tensors = {}
    for file, names in by_file.items():
        with safe_open(layout.directory / file, framework="pt") as opened:
            for name in names:
                tensor = opened.get_tensor(name)
                tensors[name[len(prefix) :]] = tensor if dtype is None else tensor.to(dtype)
    return tensors


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


def load_model(
    checkpoint: str | os.PathLike | Layout, device: Any = "cpu", dtype=None
) -> FlexMoREForCausalLM:
    """The whole decoder of a checkpoint; `dtype` None keeps what is stored.

    Raises as `read_layout` does, before anything is loaded.
    """
    layout = checkpoint if isinstance(checkpoint, Layout) else read_layout(checkpoint)
    ranks = layout.layer_ranks
    found = ranks[0] if len(set(ranks)) == 1 else ranks
    values = {**layout.config, "expert_ranks": found, "expert_bias": layout.expert_bias}
    model = FlexMoREForCausalLM(FlexMoREConfig.from_dict(values), device="meta")
    tensors = {k: t.to(device) for k, t in read_tensors(layout, dtype=dtype).items()}
    model.load_state_dict(tensors, assign=True)
    return model


def save_checkpoint(
    directory: str | os.PathLike,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    max_file_bytes: int = 4 << 30,
) -> None:
    """Write a checkpoint directory, whole or not at all.

    Args:
        directory: must not exist yet, or be empty.
        tensors: every tensor under its name in the format, as from `state_dict()`.
        config: what config.json is to hold; `expert_ranks` among it.
        max_file_bytes: a new safetensors file starts above this size.
    """
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise ValueError(f"directory: {directory} exists; accepted: a new or an empty directory")
    directory.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{directory.name}.", dir=directory.parent))
    try:
        _write_tensors(partial, tensors, max_file_bytes)
        (partial / "config.json").write_text(json.dumps(dict(config), indent=2) + "\n")
        read_layout(partial)
        partial.chmod(0o755)
        os.replace(partial, directory)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise


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


def _write_tensors(directory: Path, tensors: Mapping[str, Tensor], max_file_bytes: int) -> None:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + tensor.nbytes > max_file_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += tensor.nbytes
    count = len(groups)
    names = [f"model-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
    names = [SINGLE_FILE] if count == 1 else names
    for file, group in zip(names, groups, strict=True):
        # Copies: safetensors refuses tensors that share memory, such as views of stacked factors.
        part = {name: tensors[name].detach().to("cpu", copy=True).contiguous() for name in group}
        save_file(part, directory / file, metadata={"format": "pt"})
    if count > 1:
        total = sum(tensor.nbytes for tensor in tensors.values())
        weight_map = {k: file for file, group in zip(names, groups, strict=True) for k in group}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (directory / INDEX_FILE).write_text(json.dumps(index, indent=2) + "\n")
