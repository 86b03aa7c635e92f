"""One checkpoint that a conversion writes: its rule, its ranks, its files and what is said of it.

A rank is settled in this order: what the rule says; never more than the source has, whose own
factors are then kept as they are; and, for the padded form, which knows one rank an expert,
full-size for all of an expert of which any matrix is.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint import check_finite
from ..checkpoint_config import shortest
from ..checkpoint_forms import config_for, pad_experts
from ..checkpoint_headers import FLOAT_BYTES
from ..checkpoint_layout import PROJECTIONS, Layout, mlp_prefix
from ..checkpoint_writer import CheckpointWriter
from .matrices import Key, all_keys, size_of, sizes_of, stored_rank, unit_of
from .recover import AnyRule
from .report import Matrix, Report, Size
from .spectra import Spectrum

Rank = int | str


@dataclass
class Target:
    """A directory to be written by a rule; `settings` are for the report.

    dtype: None keeps what is stored. compat: the padded form. ranks: of every matrix that has a
    delta once they are known, None while each is decided by its own spectrum.
    """

    layout: Layout
    directory: Path
    rule: AnyRule
    settings: dict[str, Any]
    fingerprint: str
    dtype: torch.dtype | None
    compat: bool
    writer: CheckpointWriter
    ranks: dict[Key, Rank] | None = None

    @property
    def needs_spectra_first(self) -> bool:
        """Whether no tensor can be written before all spectra are known."""
        return self.rule.needs_all or (self.compat and self.rule.needs_spectra)

    def settle(self, spectra: Mapping[Key, Spectrum]) -> None:
        """Decide every rank, from all spectra, or from none where the rule looks at none.

        Raises ValueError when the rule cannot be met.
        """
        keys = [key for key in all_keys(self.layout) if stored_rank(self.layout, key) != 0]
        if self.rule.needs_spectra:
            wanted = self._by_rule({key: spectra[key] for key in keys})
        else:
            wanted = self.rule.ranks(dict.fromkeys(keys), sizes_of(self.layout))
        self.ranks = {key: self._bounded(key, rank) for key, rank in wanted.items()}
        if self.compat:
            full = {key.expert for key, rank in self.ranks.items() if rank == "full"}
            self.ranks = {k: "full" if k.expert in full else r for k, r in self.ranks.items()}
        self._check_budget()

    def rank_of(self, key: Key, spectrum: Spectrum | None) -> Rank:
        """The rank of one matrix; its spectrum is needed where `ranks` are not known before."""
        if stored_rank(self.layout, key) == 0:
            return 0
        if self.ranks is not None:
            return self.ranks[key]
        return self._bounded(key, self._by_rule({key: spectrum})[key])

    def write(
        self,
        layer: int | None,
        tensors: Mapping[str, Tensor],
        matrices: list[dict[str, Any]],
        seconds: float,
    ) -> None:
        """Write what is outside of the layers (None) or a layer, under the checkpoint's names.

        matrices: the fields of `report.Matrix` but the last two, which are found here.
        """
        if self.compat and layer is not None:
            tensors = pad_experts(tensors, self._padded())
        if self.dtype is not None:
            tensors = {name: tensor.to(self.dtype) for name, tensor in tensors.items()}
            for name, tensor in tensors.items():  # a smaller range may turn numbers into Inf
                check_finite(name, tensor)
        facts: dict[str, Any] = {
            "parameters": sum(t.numel() for t in tensors.values()),
            "bytes": sum(t.nbytes for t in tensors.values()),
            "seconds": seconds,
        }
        if layer is not None:
            held = {name.removeprefix(mlp_prefix(layer)): t for name, t in tensors.items()}
            facts["ranks"] = self._entries(layer, held)
            facts["matrices"] = [
                fields | _size(held, Key(layer, fields["expert"], fields["projection"]))
                for fields in matrices
            ]
        self.writer.write(unit_of(layer), tensors, facts)

    def finish(self) -> Report:
        """Write config.json, report.json, report.svg and the source's tokenizer; let the directory
        appear.
        """
        facts = self.writer.facts
        layers = [facts[unit_of(layer)] for layer in range(len(self.layout.layer_ranks))]
        report = Report(
            source=str(self.layout.directory),
            directory=str(self.directory),
            fingerprint=self.fingerprint,
            settings=self.settings,
            before=size_of(self.layout),
            after=Size(*(sum(f[k] for f in facts.values()) for k in ("parameters", "bytes"))),
            matrices=tuple(Matrix(**m) for found in layers for m in found["matrices"]),
            notes=self.layout.notes,
            seconds=sum(found["seconds"] for found in facts.values()),
        )
        config = config_for(
            self.layout.config, [found["ranks"] for found in layers], compat=self.compat
        )
        if self.dtype is not None:
            name = str(self.dtype).removeprefix("torch.")
            config |= {key: name for key in ("dtype", "torch_dtype") if key in config}
        self.writer.add(self.layout.directory, report.files())
        self.writer.finish(config)
        return report

    def _by_rule(self, spectra: Mapping[Key, Spectrum]) -> dict[Key, Rank]:
        rest = size_of(self.layout, self.dtype, rest=True)
        return self.rule.ranks(
            {k: s.signal if self.rule.minds_rounding else s.s for k, s in spectra.items()},
            sizes_of(self.layout),
            layers=len(self.layout.layer_ranks),
            other=rest.bytes if self.rule.kind == "bytes" else rest.parameters,
            itemsize=self._itemsize(),
            features={k: s.features for k, s in spectra.items() if s.features is not None},
        )

    def _bounded(self, key: Key, rank: Rank) -> Rank:
        have = stored_rank(self.layout, key)
        if isinstance(have, str):
            return rank
        if isinstance(rank, str) and self.rule.kind in ("params", "bytes"):
            D, F = sizes_of(self.layout)
            return min(have, max(1, (D * F - 1) // (D + F)))  # what full-size would have paid for
        return have if isinstance(rank, str) else min(rank, have)

    def _itemsize(self) -> int:
        if self.dtype is not None:
            return self.dtype.itemsize
        parts = self.layout.parts.items()
        return max(FLOAT_BYTES[part.stored.dtype] for name, part in parts if ".experts." in name)

    def _padded(self) -> list[int]:
        """The one rank of each expert, 0 for a full-size one, and at least 1 of the others."""
        ranks = [0] + [1] * (self.layout.config["num_experts"] - 1)
        for key, rank in (self.ranks or {}).items():
            ranks[key.expert] = 0 if isinstance(rank, str) else max(ranks[key.expert], rank)
        return ranks

    def _check_budget(self) -> None:
        """A budget counts what is stored: the source's own factors, and padding, too."""
        if self.rule.kind not in ("params", "bytes"):
            return
        D, F = sizes_of(self.layout)
        ranks: list[Rank] = list((self.ranks or {}).values())
        if self.compat:
            padded = [rank or "full" for rank in self._padded()[1:]]
            ranks = padded * 3 * len(self.layout.layer_ranks)
        parameters = sum(D * F if isinstance(rank, str) else rank * (D + F) for rank in ranks)
        rest = size_of(self.layout, self.dtype, rest=True)
        if self.rule.kind == "params":
            found = rest.parameters + parameters
        else:
            found = rest.bytes + parameters * self._itemsize()
        if found > self.rule.value:
            padding = " when every expert is padded to its largest rank" if self.compat else ""
            raise ValueError(
                f"rule: {self.rule.text} makes {found} {self.rule.kind}{padding}; accepted: no "
                "padding, a larger budget, or a rule of one rank an expert (RANK, v02)"
            )

    def _entries(self, layer: int, tensors: Mapping[str, Tensor]) -> list:
        """A layer's `expert_ranks`."""
        entries: list[Any] = [0]
        for expert in range(1, self.layout.config["num_experts"]):
            kinds = []
            for key in (Key(layer, expert, p) for p in PROJECTIONS):
                a, full = tensors.get(f"{key.local}_a.weight"), f"{key.local}.weight" in tensors
                kinds.append("full" if full else 0 if a is None else a.shape[0])
            entries.append(shortest(kinds))
        return entries


def _size(tensors: Mapping[str, Tensor], key: Key) -> dict[str, int]:
    names = (f"{key.local}{end}.weight" for end in ("", "_a", "_b"))
    held = [tensors[name] for name in names if name in tensors]
    return {"parameters": sum(t.numel() for t in held), "bytes": sum(t.nbytes for t in held)}
