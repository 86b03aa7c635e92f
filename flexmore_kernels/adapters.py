"""PEFT LoRA adapters, read as deltas of a base's weights.

    adapter_config.json          ranks and scales (adapter_config.py)
    adapter_model.safetensors    base_model.model.{module}.lora_A.weight (r, in), lora_B (out, r)

A delta is s B A. Three kinds of module hold deltas of FFN weights, of layer l and expert e:

    model.layers.{l}.mlp.{P}_proj                   a dense FFN: the adapter is an expert of its own
    model.layers.{l}.mlp.experts.{e}.{P}_proj       expert e of a mixture
    model.layers.{l}.mlp.experts[.base_layer]       all E experts at once (`target_parameters`):
        lora_A (E r, in) holds expert e in rows [e r, (e + 1) r), but lora_B (out, r E) in the
        columns e, e + E, e + 2 E, ... Whether it is of gate_up_proj (E, 2F, D), gate rows first,
        or of down_proj (E, D, F), follows from the shapes.

What else an adapter changes (attention, lm_head, embeddings, norms, router) is in `others`.
Source: PEFT 0.21 (`LoraLayer`, `ParamWrapper`); the packing also in unsloth-zoo #1269.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .adapter_config import CONFIG_FILE, WEIGHTS_FILE, read_adapter_config
from .checks import FLOATS

_DENSE = re.compile(r"model\.layers\.(\d+)\.mlp\.(gate|up|down)_proj")
_EXPERT = re.compile(r"model\.layers\.(\d+)\.mlp\.experts\.(\d+)\.(gate|up|down)_proj")
_FUSED = re.compile(r"(model\.layers\.(\d+)\.mlp\.experts)(\.base_layer)?")
_SIDE = re.compile(r"(.*)\.lora_(embedding_)?(A|B)(?:\.weight)?")


class Base(NamedTuple):
    """What an adapter must fit: L, D, F, and the experts, None for a dense FFN."""

    num_layers: int
    hidden_size: int
    intermediate_size: int
    num_experts: int | None

    def shape(self, projection: str) -> tuple[int, int]:
        """(out, in) of a projection."""
        sizes = (self.intermediate_size, self.hidden_size)
        return sizes[::-1] if projection == "down" else sizes


class Place(NamedTuple):
    """Which FFN weight a delta is of; expert None: of a dense FFN."""

    layer: int
    expert: int | None
    projection: str


class LowRankDelta(NamedTuple):
    """scale * b @ a, with a (r, in) and b (out, r) as stored."""

    a: Tensor
    b: Tensor
    scale: float

    def factors(self) -> tuple[Tensor, Tensor] | None:
        """(a, b) in float32 (float64), the scale in b, and r <= min(out, in); None for zero."""
        acc = accumulator(self.a)
        return shortest(self.a.to(acc), self.b.to(acc) * self.scale)

    def dense(self) -> Tensor:
        """The delta (out, in) in float32 (float64)."""
        acc = accumulator(self.a)
        return (self.b.to(acc) * self.scale) @ self.a.to(acc)


def accumulator(tensor: Tensor) -> torch.dtype:
    """float32, or float64 for float64."""
    return torch.promote_types(tensor.dtype, torch.float32)


def shortest(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor] | None:
    """The factors without their zero rows, of rank at most min(out, in); None if none is left.

    A delta of more rows than that is one full-size matrix beside an identity.
    """
    kept = (a != 0).any(1) & (b != 0).any(0)
    if not bool(kept.all()):
        a, b = a[kept], b[:, kept]
    rank, out, width = a.shape[0], b.shape[0], a.shape[1]
    if rank > min(out, width):
        one = torch.eye(min(out, width), dtype=a.dtype, device=a.device)
        a, b = (one, b @ a) if width <= out else (b @ a, one)
    return (a.contiguous(), b.contiguous()) if rank else None


class Adapter:
    """A PEFT adapter directory whose names and shapes fit `base`; tensors are read when asked for.

    places: of all FFN deltas. others: names of the base's other tensors that it changes.
    copies: names of base tensors of which PEFT stored a copy. Raises ValueError naming the tensor.
    """

    def __init__(self, directory: str | os.PathLike, base: Base) -> None:
        self.directory, self.base = Path(directory), base
        self.config = read_adapter_config(directory)
        path = self.directory / WEIGHTS_FILE
        if not path.is_file():
            found = "adapter_model.bin" if path.with_suffix(".bin").is_file() else "nothing"
            raise ValueError(f"{path}: missing, got {found}; accepted: safetensors")
        try:
            self._file = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: no whole safetensors file ({error})") from error
        keys = self._file.keys()
        self._shapes = {key: tuple(self._file.get_slice(key).get_shape()) for key in keys}
        self._pairs: dict[str, dict[str, str]] = {}
        self._full: dict[str, str] = {}
        self.copies: dict[str, str] = {}
        for key in self._shapes:
            self._sort(key)
        self._places: dict[Place, tuple[str, str]] = {}
        self._low_rank: dict[str, str] = {}
        for module in self._pairs:
            self._place(module)
        self.others = tuple(sorted({*self._full, *self._low_rank}))

    @property
    def name(self) -> str:
        return self.directory.name

    @property
    def places(self) -> tuple[Place, ...]:
        return tuple(self._places)

    def delta(self, place: Place) -> LowRankDelta | None:
        """The delta of an FFN weight, None where the adapter has none."""
        if place not in self._places:
            return None
        module, path = self._places[place]
        a, b = self._read_pair(module)
        if _FUSED.fullmatch(module):
            E, width, out = self.base.num_experts, a.shape[1], b.shape[0]
            a = a.reshape(E, -1, width)[place.expert]
            b = b.reshape(out, -1, E)[:, :, place.expert]
            if place.projection != "down":
                b = b.chunk(2)[place.projection == "up"]
        return LowRankDelta(a, b, self.config.scale_of(path))

    def is_low_rank(self, name: str) -> bool:
        """Whether what the adapter changes of another tensor is a delta, no tensor in its place."""
        return name in self._low_rank

    def other(self, name: str) -> LowRankDelta | Tensor:
        """What the adapter adds to another tensor, or the tensor that stands in its place."""
        if name in self._full:
            return self._file.get_tensor(self._full[name])
        module = self._low_rank[name]
        a, b = self._read_pair(module)
        if "lora_embedding" in self._pairs[module]["A"]:
            a, b = b.T, a.T  # of an embedding's transpose
        return LowRankDelta(a, b, self.config.scale_of(module))

    def other_shape(self, name: str) -> tuple[int, ...]:
        """The shape of the tensor that `other` is of."""
        if name in self._full:
            return self._shapes[self._full[name]]
        a, b = (self._shapes[key] for key in self._sides(self._low_rank[name]))
        return (
            (a[1], b[0]) if "embedding" in self._pairs[self._low_rank[name]]["A"] else (b[0], a[1])
        )

    def copy(self, name: str) -> Tensor:
        """The adapter's copy of a base tensor."""
        return self._file.get_tensor(self.copies[name])

    def check_finite(self) -> None:
        """Read every tensor; ValueError names one that holds NaN or Inf, or is of another dtype."""
        for key in self._shapes:
            tensor = self._file.get_tensor(key)
            if tensor.dtype not in FLOATS:
                accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
                raise self._error(key, f"holds {tensor.dtype}; accepted: {accepted}")
            if not bool(tensor.isfinite().all()):
                raise self._error(key, "holds NaN or Inf; accepted: finite floats")

    def _error(self, what: str, reason: str) -> ValueError:
        return ValueError(f"{self.directory}: {what}: {reason}")

    def _sides(self, module: str) -> tuple[str, str]:
        return self._pairs[module]["A"], self._pairs[module]["B"]

    def _read_pair(self, module: str) -> tuple[Tensor, Tensor]:
        a, b = map(self._file.get_tensor, self._sides(module))
        return a, b

    def _sort(self, key: str) -> None:
        """File a tensor as one side of a delta, a copy of the base's, or a new weight."""
        path = key.removeprefix("base_model.model.")
        if not path.startswith(("model.", "lm_head.")):
            path = f"model.{path}"  # of the decoder without its head
        if match := _SIDE.fullmatch(path):
            sides = self._pairs.setdefault(match.group(1), {})
            if match.group(3) in sides:
                raise self._error(key, f"a second one beside {sides[match.group(3)]}")
            sides[match.group(3)] = key
        elif path.endswith(".base_layer.weight") and ".mlp.experts" not in path:
            self.copies[path.replace(".base_layer.weight", ".weight")] = key
        elif ".lora_" in path or "magnitude" in path or not path.endswith(".weight"):
            raise self._error(key, "refused: not one of the two sides of a plain LoRA delta")
        elif ".mlp." in path and not path.endswith(".mlp.gate.weight"):
            raise self._error(key, "refused: a whole FFN weight (modules_to_save), not a delta")
        else:
            self._full[path] = key

    def _place(self, module: str) -> None:
        pair = self._pairs[module]
        for side in "AB":
            if side not in pair:
                raise self._error(f"{module}.lora_{side}", "missing beside its other side")
            if len(shape := self._shapes[pair[side]]) != 2:
                raise self._error(pair[side], f"shape {shape}; accepted: a matrix")
        (rows, width), (out, columns) = (self._shapes[key] for key in self._sides(module))
        if rows != columns:
            raise self._error(module, f"lora_A has {rows} rows, lora_B {columns} columns")
        if match := _DENSE.fullmatch(module):
            layer, projection = match.groups()
            places, path, experts = [Place(int(layer), None, projection)], module, 1
        elif match := _EXPERT.fullmatch(module):
            layer, expert, projection = match.groups()
            places, path, experts = [Place(int(layer), int(expert), projection)], module, 1
        elif match := _FUSED.fullmatch(module):
            places, path, experts = self._fused(match, (out, width))
        else:
            self._low_rank[f"{module}.weight"] = module
            places, path, experts = [], module, 1
        rank = self.config.rank_of(path)
        if rows != rank * experts:
            each = f" for each of {experts} experts" if experts > 1 else ""
            reason = f"lora_A has {rows} rows; {CONFIG_FILE} gives r = {rank}{each}"
            raise self._error(module, reason)
        for place in places:
            self._fits(place, module, (out, width), bool(_FUSED.fullmatch(module)))
            if place in self._places:
                raise self._error(module, f"a second delta of {place}")
            self._places[place] = (module, path)

    def _fused(self, match: re.Match, shape: tuple[int, int]) -> tuple[list[Place], str, int]:
        experts, layer = self.base.num_experts, int(match.group(2))
        if experts is None:
            raise self._error(match.group(), "of a mixture's experts; the base is a dense FFN")
        is_down = shape == self.base.shape("down")
        sides = ("down",) if is_down else ("gate", "up")
        places = [Place(layer, e, side) for side in sides for e in range(experts)]
        return places, f"{match.group(1)}.{'down' if is_down else 'gate_up'}_proj", experts

    def _fits(self, place: Place, module: str, shape: tuple[int, int], fused: bool) -> None:
        """Whether the base has such a weight: else the adapter is for another base."""
        base = self.base
        wanted = base.shape(place.projection)
        if fused and place.projection != "down":
            wanted = (2 * wanted[0], wanted[1])
        if shape != wanted:
            reason = f"an adapter for another base: its weight is {shape}, the base's {wanted}"
            raise self._error(module, reason)
        if place.layer >= base.num_layers:
            reason = f"an adapter for another base, which has {base.num_layers} layers"
            raise self._error(module, reason)
        if place.expert is not None and place.expert >= (base.num_experts or 0):
            found = "a dense FFN" if base.num_experts is None else f"{base.num_experts} experts"
            raise self._error(module, f"an adapter for another base, which has {found}")
