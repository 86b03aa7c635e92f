"""Where an expert comes from: read layer by layer from files, so that one layer is in memory.

    CheckpointSource   an expert of a mixture's checkpoint, as FlexOlmo's owners train one beside
                       the frozen base in a checkpoint of two
    DenseSource        the FFN of a dense model: a full-size expert, or its difference to a base
    AdapterSource      a PEFT LoRA of a dense base's FFN
    ExpertFile         a file that `Expert.save` wrote (expert.py)

Each tells what is known of the expert as a whole, and gives what it is in a layer.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import base_fingerprint
from .adapter_base import BaseCheckpoint, expert_entry
from .adapter_config import CONFIG_FILE, WEIGHTS_FILE
from .adapter_others import Others
from .adapters import Adapter, Place
from .cards import Card, cards_of, default_name, find
from .checkpoint import read_tensors
from .checkpoint_config import shortest
from .checkpoint_layout import PROJECTIONS, Layout, mlp_prefix, read_layout
from .checkpoint_writer import file_state
from .checks import check_one_of
from .conversion.svd import METHODS
from .members import Entry, Weights, expert_rank
from .reranking import parse_rank, reranked

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


class ExpertLayer(NamedTuple):
    """An expert in one layer: gate, up and down, each a matrix, a pair (a, b) or None, the row that
    the router had for it (D,), and its expert_bias, a number; None where there is none.
    """

    weights: Weights
    router_row: Tensor | None = None
    bias: Tensor | None = None


class ExpertSource:
    """An expert apart from a mixture. What its makers know of it:

    num_layers, hidden_size, intermediate_size: L, D, F. card: None where it has no name. embedding:
    of its domain, (m,), or None. origin: where it is from, for messages.
    """

    num_layers: int
    hidden_size: int
    intermediate_size: int
    card: Card | None
    embedding: Tensor | None
    origin: str

    @property
    def base(self) -> str | None:
        """The fingerprint of the base beside which it was trained; None: not known."""
        raise NotImplementedError

    @property
    def mark(self) -> Any:
        """What tells it from another one, and from itself changed, for work that is taken up."""
        raise NotImplementedError

    def layer(self, layer: int) -> ExpertLayer:
        """What it is in a layer. Raises ValueError naming a tensor with NaN or Inf."""
        raise NotImplementedError

    def routing(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        """Its router_row and bias in a layer, without its weights where they are work."""
        return self.layer(layer)[1:]

    def layer_ranks(self) -> list[Any]:
        """Its entry of `expert_ranks` in each layer."""
        return [expert_rank(self.layer(layer).weights) for layer in range(self.num_layers)]

    def check_fits(self, num_layers: int, hidden_size: int, intermediate_size: int) -> None:
        """Refuse an expert of a model of other sizes; ValueError names both."""
        own = (self.num_layers, self.hidden_size, self.intermediate_size)
        wanted = (num_layers, hidden_size, intermediate_size)
        if own != wanted:
            raise ValueError(
                f"expert: {self.origin} has (layers, D, F) = {own}; accepted: {wanted}, as the "
                "mixture"
            )

    def _sizes_of(self, layout: Layout) -> None:
        self.num_layers = len(layout.layer_ranks)
        self.hidden_size = layout.config["hidden_size"]
        self.intermediate_size = layout.config["intermediate_size"]


class CheckpointSource(ExpertSource):
    """Expert `expert`, a name or a number, of a mixture's checkpoint, with its router's row.

    card: default: the checkpoint's, if it has one.
    """

    def __init__(
        self, directory: str | os.PathLike, expert: int | str = 1, *, card: Card | None = None
    ) -> None:
        self._layout = read_layout(directory)
        config = self._layout.config
        cards = cards_of(config, config["num_experts"])
        self._expert = number = find(cards, expert)
        if number == 0:
            raise ValueError(
                f"expert: got {expert!r}, the base of {directory}; accepted: an expert beside it, "
                "or Expert.from_dense, for the FFN of a whole model"
            )
        named = cards[number] if cards[number] != Card(default_name(number)) else None
        self.card, self.origin = card or named, f"{cards[number].name} of {directory}"
        self._sizes_of(self._layout)
        shared = config.get("shared_expert", False)
        self._has_row = number != (0 if shared is True else shared or None)
        self.embedding = self._embedding()
        self._base: str | None = None

    @property
    def base(self) -> str:
        """Of the checkpoint; its base is read when this is first asked for."""
        if self._base is None:
            self._base = base_fingerprint.of_checkpoint(self._layout)
        return self._base

    @property
    def mark(self) -> Any:
        return (self._expert, *_states(self._layout))

    def layer_ranks(self) -> list[Any]:
        return [ranks[self._expert] for ranks in self._layout.layer_ranks]

    def layer(self, layer: int) -> ExpertLayer:
        mlp, number = mlp_prefix(layer), self._expert
        prefix = f"{mlp}experts.{number}."
        gate, bias = f"{mlp}gate.weight", f"{mlp}gate.expert_bias"
        names = [name for name in self._layout.files if name.startswith(prefix)]
        found = read_tensors(self._layout, names=[*names, gate, bias])
        row = found[gate][number].clone() if gate in found and self._has_row else None
        own = found[bias][number - 1].clone() if bias in found else None
        return ExpertLayer(_entries(found, layer, number), row, own)

    def _embedding(self) -> Tensor | None:
        name = f"{mlp_prefix(0)}gate.domain_embeddings"
        found = read_tensors(self._layout, names=[name]).get(name)
        row = None if found is None else found[self._expert].clone()
        return row if row is not None and bool(row.any()) else None


class DenseSource(ExpertSource):
    """The FFN of a dense OLMo-2, or expert 0 of a mixture's checkpoint, as an expert.

    Args:
        directory: of the dense model.
        rank: None: a full-size expert. An int or a triple: the best of that rank of its difference
            to the base, see `reranking.reranked`.
        base: the base's checkpoint, dense or a mixture's; needed for a rank. Without one the base
            beside which it was trained is not known.
        card: default: the directory's name.
        method: of the SVD, see `conversion.svd.decompose`.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        rank: Any = None,
        *,
        base: str | os.PathLike | None = None,
        card: Card | None = None,
        method: str = "exact",
    ) -> None:
        self._layout = BaseCheckpoint(directory).layout
        self._sizes_of(self._layout)
        self.card = card or Card(Path(directory).resolve().name)
        check_one_of("method", method, METHODS)
        self.origin, self.embedding, self._method = str(directory), None, method
        self._triple = None
        if rank is not None:
            if base is None:
                raise ValueError(
                    "base: got None; accepted: a checkpoint, to which a rank's delta is"
                )
            limit = min(self.hidden_size, self.intermediate_size)
            self._triple = parse_rank(rank, limit)
        self._beside = None if base is None else BaseCheckpoint(base).layout
        if self._beside is not None:
            config = self._beside.config
            sizes = (config["hidden_size"], config["intermediate_size"])
            self.check_fits(len(self._beside.layer_ranks), *sizes)
        self._base: str | None = None

    @property
    def base(self) -> str | None:
        if self._base is None and self._beside is not None:
            self._base = base_fingerprint.of_checkpoint(self._beside)
        return self._base

    @property
    def mark(self) -> Any:
        beside = () if self._beside is None else _states(self._beside)
        return (self._triple, self._method, *_states(self._layout), *beside)

    def routing(self, layer: int) -> tuple[None, None]:
        return None, None

    def layer_ranks(self) -> list[Any]:
        return [0 if self._triple is None else shortest(self._triple)] * self.num_layers

    def layer(self, layer: int) -> ExpertLayer:
        weights = _entries(_ffn(self._layout, layer), layer, 0)
        if self._triple is not None:
            beside = _entries(_ffn(self._beside, layer), layer, 0)
            weights = tuple(
                reranked(weight, base, rank, method=self._method)
                for weight, base, rank in zip(weights, beside, self._triple, strict=True)
            )
        return ExpertLayer(weights)


class AdapterSource(ExpertSource):
    """A PEFT LoRA of a dense base's FFN, as `flexmore import-adapters` takes it.

    Args:
        directory: PEFT's.
        base: the dense model that it was made on, or a mixture whose expert 0 has its FFN.
        other: what to do with deltas beside the FFN: "refuse" or "drop".
        card: default: the directory's name.
    """

    def __init__(
        self,
        directory: str | os.PathLike,
        base: str | os.PathLike,
        *,
        other: str = "refuse",
        card: Card | None = None,
    ) -> None:
        check_one_of("other", other, ("refuse", "drop"))
        source = BaseCheckpoint(base)
        self._layout, self._adapter = source.layout, Adapter(directory, source.sizes)
        self._sizes_of(self._layout)
        places = self._adapter.places
        if not places or any(place.expert is not None for place in places):
            what = "changes a mixture's experts" if places else "changes no FFN weight"
            raise ValueError(f"{directory}: {what}; accepted: an adapter of a dense FFN")
        Others(source, [self._adapter], other)
        self._adapter.check_finite()
        self.card = card or Card(Path(directory).resolve().name)
        self.origin, self.embedding = str(directory), None
        self._base: str | None = None

    @property
    def base(self) -> str:
        if self._base is None:
            self._base = base_fingerprint.of_checkpoint(self._layout)
        return self._base

    @property
    def mark(self) -> Any:
        files = (self._adapter.directory / name for name in (CONFIG_FILE, WEIGHTS_FILE))
        return (*map(file_state, files), *_states(self._layout))

    def layer(self, layer: int) -> ExpertLayer:
        found: list[Entry] = []
        for projection in PROJECTIONS:
            delta = self._adapter.delta(Place(layer, None, projection))
            pair = None if delta is None else delta.factors()
            name = f"{mlp_prefix(layer)}experts.0.{projection}_proj.weight"
            dtype = _DTYPES[self._layout.parts[name].stored.dtype]
            found.append(None if pair is None else (pair[0].to(dtype), pair[1].to(dtype)))
        gate, up, down = found
        return ExpertLayer((gate, up, down))


def _ffn(layout: Layout, layer: int) -> dict[str, Tensor]:
    prefix = f"{mlp_prefix(layer)}experts.0."
    return read_tensors(layout, names=[name for name in layout.files if name.startswith(prefix)])


def _entries(tensors: dict[str, Tensor], layer: int, expert: int) -> Weights:
    gate, up, down = (expert_entry(tensors, layer, expert, p) for p in PROJECTIONS)
    return gate, up, down


def _states(layout: Layout) -> Sequence[Any]:
    return [file_state(layout.directory / file) for file in sorted(set(layout.files.values()))]
