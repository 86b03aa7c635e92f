"""The file of one expert, read a layer at a time, and written whole or not at all.

Safetensors, never pickle: `layers.{l}.{gate,up,down}_proj.weight` (out, in), or
`..._proj_a.weight` (r, in) and `..._proj_b.weight` (out, r), or neither where it has the base's own
matrix; `router_rows` (L, D), `router_bias` (L,), `embedding` (m,) where it has them; in the header,
under "flexmore_expert", a JSON object of its sizes, its card and its base's fingerprint.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from .cards import Card, check_card
from .checkpoint import check_finite
from .checkpoint_config import shortest
from .checkpoint_layout import PROJECTIONS
from .checkpoint_writer import file_state, write_tensors
from .checks import FLOATS, check_int, check_tensor
from .expert_sources import ExpertLayer, ExpertSource
from .members import Entry, check_weights

_KEY, _FORM = "flexmore_expert", 1
_SIZES = ("num_layers", "hidden_size", "intermediate_size")


def write_expert(
    path: str | os.PathLike, expert: ExpertSource, tensors: Mapping[str, Tensor]
) -> None:
    """Write an expert's tensors, under the names of this file's text, and what is known of it."""
    about = {
        "form": _FORM,
        **{name: getattr(expert, name) for name in _SIZES},
        "card": expert.card and expert.card._asdict(),
        "base": expert.base,
    }
    write_tensors(Path(path), tensors, **{_KEY: json.dumps(about)})


class ExpertFile(ExpertSource):
    """A file that `Expert.save` wrote, read a layer at a time."""

    def __init__(self, path: str | os.PathLike, *, card: Card | None = None) -> None:
        self._path, self.origin = Path(path), str(path)
        if not self._path.is_file():
            raise FileNotFoundError(f"expert: no file {path}")
        try:
            self._file = safe_open(self._path, framework="pt")
        except SafetensorError as error:
            raise ValueError(f"{path}: no whole safetensors file ({error})") from error
        about = self._about(self._file.metadata() or {})
        sizes = (check_int(f"{path}: {name}", about.get(name), 1) for name in _SIZES)
        self.num_layers, self.hidden_size, self.intermediate_size = sizes
        given = about.get("card")
        self.card = card or (None if given is None else check_card(given, f"{path}: card"))
        self._base = about.get("base")
        if self._base is not None and not isinstance(self._base, str):
            raise ValueError(f"{path}: base is {self._base!r}; accepted: a fingerprint")
        self._left = set(self._file.keys())
        self._entries = [self._layer_names(layer) for layer in range(self.num_layers)]
        self._rows, self._bias = self._read("router_rows"), self._read("router_bias")
        self.embedding = self._read("embedding")
        if self._left:
            raise ValueError(f"{path}: {min(self._left)} is extra; an expert has no place for it")

    @property
    def base(self) -> str | None:
        return self._base

    @property
    def mark(self) -> Any:
        return file_state(self._path)

    def routing(self, layer: int) -> tuple[Tensor | None, Tensor | None]:
        row = None if self._rows is None else self._rows[layer]
        return row, None if self._bias is None else self._bias[layer]

    def layer_ranks(self) -> list[Any]:
        def rank(names: tuple[str, ...]) -> int | str:
            if len(names) < 2:
                return "full" if names else 0
            return self._file.get_slice(names[0]).get_shape()[0]

        return [shortest(map(rank, entries)) for entries in self._entries]

    def layer(self, layer: int) -> ExpertLayer:
        found: list[Entry] = []
        for names in self._entries[layer]:
            tensors = [self._tensor(name) for name in names]
            found.append(None if not names else tensors[0] if len(names) == 1 else tuple(tensors))
        try:
            weights = check_weights(found, self.hidden_size, self.intermediate_size)
        except (ValueError, TypeError) as error:
            raise type(error)(f"{self.origin}: layer {layer}: {error}") from None
        return ExpertLayer(weights, *self.routing(layer))

    def _about(self, metadata: Mapping[str, str]) -> dict[str, Any]:
        try:
            about = json.loads(metadata.get(_KEY, "null"))
        except json.JSONDecodeError:
            about = None
        if not isinstance(about, dict) or about.get("form") != _FORM:
            raise ValueError(
                f"{self._path}: no expert of form {_FORM} in its header; accepted: a file that "
                "Expert.save (flexmore export-expert) wrote"
            )
        return about

    def _layer_names(self, layer: int) -> list[tuple[str, ...]]:
        found = []
        for projection in PROJECTIONS:
            name = f"layers.{layer}.{projection}_proj"
            full, pair = f"{name}.weight", (f"{name}_a.weight", f"{name}_b.weight")
            names = [n for n in (full, *pair) if n in self._left]
            self._left -= set(names)
            if names not in ([], [full], list(pair)):
                raise ValueError(
                    f"{self._path}: {', '.join(names)} together; accepted: {full}, or _a and _b"
                )
            found.append(tuple(names))
        return found

    def _read(self, name: str) -> Tensor | None:
        if name not in self._left:
            return None
        self._left.discard(name)
        tensor = self._tensor(name)
        shapes = {"router_rows": (self.num_layers, self.hidden_size), "embedding": ("m",)}
        check_tensor(f"{self._path}: {name}", tensor, shapes.get(name, (self.num_layers,)), FLOATS)
        return tensor

    def _tensor(self, name: str) -> Tensor:
        tensor = self._file.get_tensor(name)
        check_finite(f"{name} in {self._path}", tensor)
        return tensor
