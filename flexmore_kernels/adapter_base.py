"""The base that adapters are imported onto: a dense OLMo-2, or a mixture's checkpoint.

A dense base is read under the names of a mixture of one expert: its FFN is expert 0, the public
one, and its router has no row yet.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from .adapters import Base
from .checkpoint import read_tensors
from .checkpoint_layout import (
    PROJECTIONS,
    _read_headers,
    _read_json,
    as_triple,
    mlp_prefix,
    read_layout,
    tensor_shapes,
)

DENSE_TYPES = ("olmo2",)


class BaseCheckpoint:
    """A base's config and tensors; `read` gives those of one prefix under a mixture's names."""

    def __init__(self, directory: str | os.PathLike) -> None:
        self.directory = Path(directory)
        if not self.directory.is_dir():
            raise FileNotFoundError(f"base: no directory {directory}")
        config = _read_json(self.directory / "config.json")
        self.is_dense = config.get("model_type") in DENSE_TYPES
        self.config: dict[str, Any] = dict(config)
        if self.is_dense:
            self._open_dense()
        else:
            layout = read_layout(self.directory)
            self.config = dict(layout.config)
            self.layer_ranks, self.expert_bias = layout.layer_ranks, layout.expert_bias
            self.shapes = dict(layout.shapes)
            self._read = lambda prefix: read_tensors(layout, prefix)
        self.sizes = Base(
            self.config["num_hidden_layers"],
            self.config["hidden_size"],
            self.config["intermediate_size"],
            None if self.is_dense else self.config["num_experts"],
        )

    def read(self, prefix: str) -> dict[str, Tensor]:
        """The tensors whose names start with `prefix`, by whole names."""
        return {prefix + rest: tensor for rest, tensor in self._read(prefix).items()}

    def _open_dense(self) -> None:
        """Names and shapes of the dense model, checked."""
        for name in ("hidden_size", "intermediate_size", "num_hidden_layers", "vocab_size",
                     "num_attention_heads"):  # fmt: skip
            if type(self.config.get(name)) is not int or self.config[name] < 1:
                raise ValueError(
                    f"config.json: {name} is {self.config.get(name)!r}; accepted: an integer >= 1"
                )
        layers = self.config["num_hidden_layers"]
        self.layer_ranks, self.expert_bias = ((0,),) * layers, False
        files, found = _read_headers(self.directory)
        self.shapes = tensor_shapes({**self.config, "num_experts": 1}, self.layer_ranks)
        for layer in range(layers):
            del self.shapes[f"{mlp_prefix(layer)}gate.weight"]
        dense = {name: name.replace(".experts.0.", ".") for name in self.shapes}
        for name, own in dense.items():
            if found.get(own) != self.shapes[name]:
                was = found.get(own, "missing")
                raise ValueError(f"{own}: {was}; accepted: {self.shapes[name]}")
        for own in sorted(found.keys() - set(dense.values())):
            raise ValueError(f"{own}: extra; a dense OLMo-2 has no place for it")

        def read(prefix: str) -> dict[str, Tensor]:
            tensors = {}
            for name in self.shapes:
                if name.startswith(prefix):
                    path = self.directory / files[dense[name]]
                    with safe_open(path, framework="pt") as opened:
                        tensors[name[len(prefix) :]] = opened.get_tensor(dense[name])
            return tensors

        self._read = read


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


def shortest_entry(kinds: Sequence[int | str]) -> Any:
    """(gate, up, down) as an entry of `expert_ranks`: an int where one says it all."""
    if tuple(kinds) == ("full",) * len(PROJECTIONS):
        return 0
    return kinds[0] if kinds[0] != 0 and len(set(kinds)) == 1 else tuple(kinds)


def config_ranks(layer_ranks: Sequence[Sequence]) -> dict[str, Any]:
    """The fields of config.json that say what the experts are.

    `expert_ranks`: of each expert the largest rank in any layer and projection, 0 where all are
    full-size; `layer_expert_ranks`, where that does not say it all, one list a layer.
    """
    columns = zip(*layer_ranks, strict=True)
    largest = [
        max(0 if kind == "full" else kind for entry in column for kind in as_triple(entry))
        for column in columns
    ]
    if all(list(ranks) == largest for ranks in layer_ranks):
        return {"expert_ranks": largest}
    exact = [[list(e) if isinstance(e, tuple) else e for e in ranks] for ranks in layer_ranks]
    return {"expert_ranks": exact}


def accumulator(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)
