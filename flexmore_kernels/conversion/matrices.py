"""A checkpoint's experts as differences to the public expert, one layer at a time.

delta = W_e - W_0 for a full-size matrix,   delta = b a for a low-rank one,   in float64
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ..checkpoint import read_tensors
from ..checkpoint_config import as_triple
from ..checkpoint_layout import PROJECTIONS, Layout, mlp_prefix
from .report import Size

ENDS = "ends"


class Key(NamedTuple):
    """One projection, "gate", "up" or "down", of one expert of one layer."""

    layer: int
    expert: int
    projection: str

    @property
    def local(self) -> str:
        """Of its tensors in `FlexMoRE.state_dict()`, without .weight, _a.weight and _b.weight."""
        return f"experts.{self.expert}.{self.projection}_proj"

    @property
    def name(self) -> str:
        """The same in the checkpoint."""
        return f"{mlp_prefix(self.layer)}{self.local}"

    def __str__(self) -> str:
        return f"layer {self.layer}, expert {self.expert}, {self.projection}"


def unit_of(layer: int | None) -> str:
    """What is read and written together: a layer, or (None) what is outside of the layers."""
    return ENDS if layer is None else f"layer {layer}"


def units_of(layout: Layout) -> list[str]:
    return [unit_of(layer) for layer in (None, *range(len(layout.layer_ranks)))]


def keys_of(layout: Layout, layer: int) -> list[Key]:
    """The matrices of the experts beside the public one, projection by projection."""
    experts = range(1, layout.config["num_experts"])
    return [Key(layer, expert, p) for p in PROJECTIONS for expert in experts]


def all_keys(layout: Layout) -> list[Key]:
    return [key for layer in range(len(layout.layer_ranks)) for key in keys_of(layout, layer)]


def stored_rank(layout: Layout, key: Key) -> int | str:
    """What the checkpoint has of a matrix: "full", 0 for no delta, or a rank."""
    entry = as_triple(layout.layer_ranks[key.layer][key.expert])
    return entry[PROJECTIONS.index(key.projection)]


def sizes_of(layout: Layout) -> tuple[int, int]:
    """D and F."""
    return layout.config["hidden_size"], layout.config["intermediate_size"]


def size_of(layout: Layout, dtype: torch.dtype | None = None, rest: bool = False) -> Size:
    """Of the checkpoint, in a dtype; rest: without the matrices of the experts beside the public
    one.
    """
    parameters = stored = 0
    experts = {key.name for key in all_keys(layout)} if rest else set()
    for name, part in layout.parts.items():
        if name.rpartition(".")[0].removesuffix("_a").removesuffix("_b") not in experts:
            count = math.prod(part.shape)
            parameters += count
            stored += part.nbytes if dtype is None else count * dtype.itemsize
    return Size(parameters, stored)


def read_others(layout: Layout, layer: int | None) -> dict[str, Tensor]:
    """What is outside of the layers (None), or what a layer has beside its experts and router."""
    blocks = "model.layers."
    if layer is None:
        names = [name for name in layout.parts if not name.startswith(blocks)]
    else:
        own, moe = f"{blocks}{layer}.", mlp_prefix(layer)
        names = [n for n in layout.parts if n.startswith(own) and not n.startswith(moe)]
    return read_tensors(layout, names=set(names))


class SourceLayer:
    """The tensors of one MoE layer, and the deltas of its experts in float64 on a device.

    tensors: read from the checkpoint unless they are given, under the names of
    `FlexMoRE.state_dict()`, on the device.
    """

    def __init__(
        self,
        layout: Layout,
        layer: int,
        device: torch.device,
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        self.layout, self.layer, self.device = layout, layer, device
        if tensors is None:
            # Straight to the device, which also looks for NaN faster.
            tensors = read_tensors(layout, mlp_prefix(layer), device=device)
        self.tensors = tensors
        self._base: tuple[str, Tensor] | None = None

    def delta(self, key: Key) -> Tensor:
        """(out, in), float64."""
        if stored_rank(self.layout, key) == "full":
            return self._double(f"{key.local}.weight") - self.base(key)
        if stored_rank(self.layout, key) == 0:
            return torch.zeros_like(self.base(key))
        return self._double(f"{key.local}_b.weight") @ self._double(f"{key.local}_a.weight")

    def base(self, key: Key) -> Tensor:
        """W_0 (out, in) of the key's projection, float64; the last one is kept."""
        if self._base is None or self._base[0] != key.projection:
            self._base = None  # first, so that there are never two
            self._base = key.projection, self._double(f"experts.0.{key.projection}_proj.weight")
        return self._base[1]

    def dtype(self, key: Key) -> torch.dtype:
        """Of what is stored of the matrix, of W_0 where that is nothing."""
        for name in (f"{key.local}.weight", f"{key.local}_a.weight"):
            if name in self.tensors:
                return self.tensors[name].dtype
        return self.tensors[f"experts.0.{key.projection}_proj.weight"].dtype

    def let_go(self, key: Key) -> None:
        """Of a matrix that is done: whoever does not keep its tensors has its memory back."""
        for end in ("", "_a", "_b"):
            self.tensors.pop(f"{key.local}{end}.weight", None)

    def others(self) -> dict[str, Tensor]:
        """The router and the public expert."""
        return {k: t for k, t in self.tensors.items() if k.startswith(("gate.", "experts.0."))}

    def _double(self, name: str) -> Tensor:
        return self.tensors[name].double()
