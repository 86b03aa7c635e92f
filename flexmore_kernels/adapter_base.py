"""The base that adapters are imported onto: a dense OLMo-2, or a mixture's checkpoint.

A dense base is read under the names of a mixture of one expert: its FFN is expert 0, the public
one, and its router has no row yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from .adapters import Base
from .checkpoint_config import RANK_KEYS, check_config
from .checkpoint_headers import read_headers, read_json
from .checkpoint_layout import Layout, Part, mlp_prefix, read_layout, tensor_shapes

DENSE_TYPES = ("olmo2",)


class BaseCheckpoint:
    """A base's layout, checked: `is_dense`, and the `sizes` that adapters must fit."""

    def __init__(self, directory: str | os.PathLike) -> None:
        directory = Path(directory)
        if not directory.is_dir():
            raise FileNotFoundError(f"base: no directory {directory}")
        config = read_json(directory / "config.json")
        self.is_dense = config.get("model_type") in DENSE_TYPES
        self.layout = _dense_layout(directory, config) if self.is_dense else read_layout(directory)
        config = self.layout.config
        self.sizes = Base(
            config["num_hidden_layers"],
            config["hidden_size"],
            config["intermediate_size"],
            None if self.is_dense else config["num_experts"],
        )


def _dense_layout(directory: Path, config: Mapping[str, Any]) -> Layout:
    """A dense OLMo-2's tensors under a mixture's names; ValueError names one that is not there."""
    one = {"model_type": "flexmore", "num_experts": 1, "num_experts_per_tok": 1}
    rest = {name: value for name, value in config.items() if name not in RANK_KEYS}
    config = check_config({**rest, **one, "expert_ranks": [0], "norm_topk_prob": False})
    stored = read_headers(directory)
    ranks = ((0,),) * config["num_hidden_layers"]
    shapes = tensor_shapes(config, ranks)
    for layer in range(len(ranks)):
        del shapes[f"{mlp_prefix(layer)}gate.weight"]
    own = {name: name.replace(".experts.0.", ".") for name in shapes}
    for name, shape in shapes.items():
        if own[name] not in stored:
            raise ValueError(f"{own[name]}: missing in {directory}")
        if stored[own[name]].shape != shape:
            found = stored[own[name]].shape
            raise ValueError(f"{own[name]}: shape {found}; accepted: {shape}")
    for name in stored.keys() - set(own.values()):
        raise ValueError(f"{name}: extra; a dense OLMo-2 has no place for it")
    parts = {name: Part(stored[own[name]], shape) for name, shape in shapes.items()}
    files = {name: part.stored.file for name, part in parts.items()}
    return Layout(directory, config, "olmo2", parts, files, shapes, ranks, False, ())


def expert_entry(tensors: Mapping[str, Tensor], layer: int, expert: int, projection: str) -> Any:
    """What a layer's tensors hold of an expert: a weight, a pair (a, b), or None."""
    name = f"{mlp_prefix(layer)}experts.{expert}.{projection}_proj"
    if f"{name}.weight" in tensors:
        return tensors[f"{name}.weight"]
    if f"{name}_a.weight" in tensors:
        return tensors[f"{name}_a.weight"], tensors[f"{name}_b.weight"]
    return None


def put_entry(
    tensors: dict[str, Tensor], layer: int, expert: int, projection: str, entry: Any
) -> int | str:
    """Store an entry under its names; returns its kind as `expert_ranks` has it in a triple."""
    name = f"{mlp_prefix(layer)}experts.{expert}.{projection}_proj"
    if entry is None:
        return 0
    if isinstance(entry, Tensor):
        tensors[f"{name}.weight"] = entry
        return "full"
    tensors[f"{name}_a.weight"], tensors[f"{name}_b.weight"] = entry
    return entry[0].shape[0]
