"""One expert apart from any mixture: its matrices in every layer, its card, its router's rows.

    expert = fk.Expert.from_checkpoint("my-domain", 1)     trained beside the frozen base
    expert.save("my-domain.safetensors")                   one file, to hand over
    model.add_expert(fk.Expert.load("my-domain.safetensors"))

The file's form is in expert_file.py.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_base import BaseCheckpoint
from .adapter_config import CONFIG_FILE
from .cards import Card, cards_of, check_card
from .checkpoint import check_finite
from .checkpoint_layout import PROJECTIONS
from .checks import FLOATS, check_int, check_tensor
from .expert_file import ExpertFile, write_expert
from .expert_sources import AdapterSource, CheckpointSource, DenseSource, ExpertLayer, ExpertSource
from .members import Weights, check_weights, expert_rank


@dataclass(frozen=True, eq=False)
class Expert(ExpertSource):
    """An expert in memory; `dataclasses.replace` makes one with another card, base or embedding.

    hidden_size, intermediate_size: D, F. layers: for each layer gate, up and down, each a full-size
    matrix (out, in), a pair a (r, in), b (out, r), whose b a is added to the base's, or None, the
    base's own. card: name, owner, licence; None: a mixture gives it a default name. base: the
    fingerprint of the base beside which it was trained (base_fingerprint.py); None: not known, of
    which adding warns. router_rows (L, D): those of a linear router, trained with it. router_bias
    (L,): its expert_bias. embedding (m,): of its domain, for a projected router. origin: where it
    is from, for messages.

    Raises ValueError or TypeError naming the layer: shapes, ranks above min(D, F), NaN, Inf.
    """

    hidden_size: int
    intermediate_size: int
    layers: Sequence[Weights]
    card: Card | None = None
    base: str | None = None
    router_rows: Tensor | None = None
    router_bias: Tensor | None = None
    embedding: Tensor | None = None
    origin: str = "an expert in memory"

    def __post_init__(self) -> None:
        D, F = check_int("hidden_size", self.hidden_size, 1), self.intermediate_size
        check_int("intermediate_size", F, 1)
        found = []
        for layer, weights in enumerate(self.layers):
            try:
                found.append(check_weights(weights, D, F))
            except (ValueError, TypeError) as error:
                raise type(error)(f"layers[{layer}]: {error}") from None
        if not found:
            raise ValueError("layers: got none; accepted: one or more")
        object.__setattr__(self, "layers", tuple(found))
        if self.base is not None and not isinstance(self.base, str):
            raise TypeError(f"base: got {self.base!r}; accepted: a fingerprint, or None")
        if self.card is not None:
            object.__setattr__(self, "card", check_card(self.card))
        shapes = {"router_rows": (len(found), D), "router_bias": (len(found),), "embedding": ("m",)}
        for name, shape in shapes.items():
            tensor = getattr(self, name)
            if tensor is not None:
                check_tensor(name, tensor, shape, FLOATS)
                check_finite(name, tensor)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def mark(self) -> Any:
        digest = hashlib.sha256()
        for name, tensor in self._tensors().items():
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            numbers = tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
            digest.update(memoryview(numbers))
        return digest.hexdigest()

    def layer_ranks(self) -> list[Any]:
        return list(map(expert_rank, self.layers))

    def layer(self, layer: int) -> ExpertLayer:
        row = None if self.router_rows is None else self.router_rows[layer]
        bias = None if self.router_bias is None else self.router_bias[layer]
        return ExpertLayer(self.layers[layer], row, bias)

    def save(self, path: str | os.PathLike) -> None:
        """Write one safetensors file, whole or not at all; what is there is replaced.

        Raises OSError with errno ENOSPC when the disk is full.
        """
        write_expert(path, self, self._tensors())

    @classmethod
    def load(cls, path: str | os.PathLike) -> Expert:
        """Read a file that `save` wrote. Raises ValueError naming what is missing, extra,
        misshapen, NaN or Inf."""
        return cls.of(ExpertFile(path))

    @classmethod
    def from_checkpoint(
        cls, directory: str | os.PathLike, expert: int | str = 1, *, card: Card | None = None
    ) -> Expert:
        """An expert of a mixture's checkpoint: see `CheckpointSource`."""
        return cls.of(CheckpointSource(directory, expert, card=card))

    @classmethod
    def from_dense(
        cls,
        directory: str | os.PathLike,
        rank: Any = None,
        *,
        base: str | os.PathLike | None = None,
        card: Card | None = None,
        method: str = "exact",
    ) -> Expert:
        """The FFN of an independently trained dense model: see `DenseSource`."""
        return cls.of(DenseSource(directory, rank, base=base, card=card, method=method))

    @classmethod
    def from_adapter(
        cls,
        directory: str | os.PathLike,
        base: str | os.PathLike,
        *,
        other: str = "refuse",
        card: Card | None = None,
    ) -> Expert:
        """A PEFT LoRA of a dense base's FFN: see `AdapterSource`."""
        return cls.of(AdapterSource(directory, base, other=other, card=card))

    @classmethod
    def of(cls, source: ExpertSource) -> Expert:
        """A source's expert, all of it in memory."""
        layers = [source.layer(layer) for layer in range(source.num_layers)]
        rows, biases = ([part[i] for part in layers] for i in (1, 2))
        return cls(
            source.hidden_size,
            source.intermediate_size,
            [part.weights for part in layers],
            source.card,
            source.base,
            torch.stack(rows) if all(row is not None for row in rows) else None,
            torch.stack(biases) if all(bias is not None for bias in biases) else None,
            source.embedding,
            source.origin,
        )

    def _tensors(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for layer, weights in enumerate(self.layers):
            for projection, entry in zip(PROJECTIONS, weights, strict=True):
                name = f"layers.{layer}.{projection}_proj"
                if isinstance(entry, Tensor):
                    found[f"{name}.weight"] = entry
                elif entry is not None:
                    found[f"{name}_a.weight"], found[f"{name}_b.weight"] = entry
        rest = ("router_rows", "router_bias", "embedding")
        return found | {n: t for n in rest if (t := getattr(self, n)) is not None}


class Revised(ExpertSource):
    """A source's expert with another card, or as if its base were not known."""

    def __init__(self, source: ExpertSource, *, card: Card | None = None, any_base: bool = False):
        self.num_layers = source.num_layers
        self.hidden_size, self.intermediate_size = source.hidden_size, source.intermediate_size
        self.embedding, self.origin = source.embedding, source.origin
        self.card = source.card if card is None else check_card(card)
        self._source, self._any_base = source, any_base

    @property
    def base(self) -> str | None:
        return None if self._any_base else self._source.base

    @property
    def mark(self) -> Any:
        return self._source.mark

    def layer(self, layer: int) -> ExpertLayer:
        return self._source.layer(layer)

    def routing(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        return self._source.routing(layer)

    def layer_ranks(self) -> list[Any]:
        return self._source.layer_ranks()


def open_expert(
    where: ExpertSource | str | os.PathLike,
    *,
    expert: int | str | None = None,
    rank: Any = None,
    base: str | os.PathLike | None = None,
    card: Card | None = None,
    other: str = "refuse",
) -> ExpertSource:
    """An expert of what it is given as, by what lies there.

    Args:
        where: an `Expert` or another source, itself; a file of `Expert.save`; a PEFT adapter's
            directory (on `base`); a dense model's; or a mixture's checkpoint, of which `expert`
            says which, unless it has just one beside its base.
        expert, rank, base, card, other: as the sources take them; a base is that of an adapter, or
            of a rank.

    Raises ValueError for what the kind of source has no use for, or as it does.
    """
    if isinstance(where, ExpertSource):
        return where
    if not isinstance(where, (str, os.PathLike)):
        raise TypeError(f"expert: got {type(where).__name__}; accepted: an expert, or a path")
    path = Path(where)
    if not path.exists():
        raise FileNotFoundError(f"expert: no file or folder {path}")
    if path.is_file():
        _unused("an expert's file", expert=expert, rank=rank)
        return ExpertFile(path, card=card)
    if (path / CONFIG_FILE).is_file():
        if base is None:
            raise ValueError(
                f"base: got None for the adapter {path}; accepted: its base's directory"
            )
        _unused("an adapter", expert=expert, rank=rank)
        return AdapterSource(path, base, other=other, card=card)
    source = BaseCheckpoint(path)
    count = source.layout.config["num_experts"]
    if source.is_dense or count == 1:
        _unused("a dense model", expert=expert)
        return DenseSource(path, rank, base=base if rank is not None else None, card=card)
    _unused("an expert of a mixture", rank=rank)
    if expert is None and count > 2:
        names = ", ".join(c.name for c in cards_of(source.layout.config, count)[1:])
        raise ValueError(f"expert: got None for {path} of {count} experts; accepted: {names}")
    return CheckpointSource(path, 1 if expert is None else expert, card=card)


def _unused(kind: str, **given: Any) -> None:
    for name, value in given.items():
        if value is not None:
            raise ValueError(f"{name}: got {value!r} for {kind}; accepted: None")
