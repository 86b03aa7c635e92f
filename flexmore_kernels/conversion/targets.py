"""One checkpoint that a conversion writes: its rule, its ranks, its tensors and what is said of it.

A rank is settled in this order: what the rule says; full-size where the padded form cannot say a
part of an expert alone; and never more than the source has, whose own factors are then kept as
they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..checkpoint_config import shortest
from ..checkpoint_forms import config_for, pad_experts, padded_ranks
from ..checkpoint_layout import PROJECTIONS, Layout, mlp_prefix
from ..checkpoint_writer import CheckpointWriter, copy_side_files
from .matrices import Key, SourceLayer, all_keys, keys_of, size_of, stored_rank
from .rank_rules import Rule, parse_rule
from .report import Matrix, Report, Size
from .spectra import Spectrum
from .svd import Decomposition, error, factor_pair

Rank = int | str
NUMERICAL = "numerical"


@dataclass(frozen=True)
class Recover:
    """The rule "numerical": what a truncated expert that was stored dense was truncated to, and
    full-size where nothing shows that.
    """

    text: str = NUMERICAL
    kind: str = NUMERICAL
    needs_spectra: bool = True
    needs_all: bool = False
    needs_features: bool = False

    def ranks(self, spectra: Mapping, sizes: tuple[int, int], **_: Any) -> dict[Key, Rank]:
        D, F = sizes
        found = {key: int((s > 0).sum()) for key, s in spectra.items()}
        return {key: "full" if r * (D + F) >= D * F else r for key, r in found.items()}


AnyRule = Rule | Recover


def read_rule(rule: str | int | AnyRule) -> AnyRule:
    """A rule of its text; "numerical" beside those of `rank_rules`."""
    if isinstance(rule, (Rule, Recover)):
        return rule
    if isinstance(rule, bool) or not isinstance(rule, (str, int)):
        raise TypeError(f"rule: got {rule!r}; accepted: a rule's text, or a rank")
    text = str(rule).strip()
    try:
        return Recover() if text == NUMERICAL else parse_rule(text)
    except ValueError as error:
        raise ValueError(f"{error}, {NUMERICAL}") from None


@dataclass
class Target:
    """A directory to be written by a rule; `settings` are for the report.

    ranks: of every matrix once they are known, None while each is decided by its own spectrum.
    """

    directory: Path
    rule: AnyRule
    settings: dict[str, Any]
    dtype: torch.dtype | None
    compat: bool
    writer: CheckpointWriter
    ranks: dict[Key, Rank] | None = None
    records: dict[str, list[dict]] = field(default_factory=dict)

    def needs_spectra_first(self) -> bool:
        """Whether no tensor can be written before all spectra are known."""
        return self.rule.needs_all or (self.compat and self.rule.needs_spectra)

    def settle_all(self, layout: Layout, spectra: Mapping[Key, Spectrum]) -> None:
        """Decide every rank, from all spectra, or from none where the rule looks at none.

        Raises ValueError when the rule cannot be met.
        """
        keys = [key for key in all_keys(layout) if stored_rank(layout, key) != 0]
        if self.rule.needs_spectra:
            wanted = self.by_rule(layout, {key: spectra[key] for key in keys})
        else:
            wanted = self.rule.ranks(dict.fromkeys(keys), sizes(layout))
        self.ranks = {key: bounded(layout, key, rank) for key, rank in wanted.items()}
        if self.compat:
            full = {key.expert for key, rank in self.ranks.items() if rank == "full"}
            self.ranks = {k: "full" if k.expert in full else r for k, r in self.ranks.items()}
            self._check_padded(layout)

    def by_rule(self, layout: Layout, spectra: Mapping[Key, Spectrum]) -> dict[Key, Rank]:
        """What the rule says of these matrices."""
        kept = size_of(layout, self.dtype, rest=True)
        itemsize = (self.dtype or largest_dtype(layout)).itemsize
        return self.rule.ranks(
            {key: spectrum.s for key, spectrum in spectra.items()},
            sizes(layout),
            layers=len(layout.layer_ranks),
            other=kept.bytes if self.rule.kind == "bytes" else kept.parameters,
            itemsize=itemsize,
            features={k: s.features for k, s in spectra.items() if s.features is not None},
        )

    def rank_of(self, layout: Layout, key: Key, spectrum: Spectrum | None) -> Rank:
        """The rank of one matrix; `spectrum` where `ranks` are not known before."""
        if stored_rank(layout, key) == 0:
            return 0
        if self.ranks is not None:
            return self.ranks[key]
        return bounded(layout, key, self.by_rule(layout, {key: spectrum})[key])

    def layer_entries(self, layout: Layout, layer: int, tensors: Mapping[str, Tensor]) -> list:
        """`expert_ranks` of a layer, from its tensors under the names of `FlexMoRE`."""
        entries = [0]
        for expert in range(1, layout.config["num_experts"]):
            kinds = []
            for key in (Key(layer, expert, p) for p in PROJECTIONS):
                a = tensors.get(f"{key.local}_a.weight")
                full = f"{key.local}.weight" in tensors
                kinds.append("full" if full else 0 if a is None else a.shape[0])
            entries.append(shortest(kinds))
        return entries

    def finish(self, layout: Layout, fingerprint: str) -> Report:
        """Write config.json, report.json, report.svg and the source's tokenizer; let the directory
        appear.
        """
        facts = self.writer.facts
        layers = len(layout.layer_ranks)
        matrices = tuple(
            Matrix(**m) for layer in range(layers) for m in facts[f"layer {layer}"]["matrices"]
        )
        report = Report(
            source=str(layout.directory),
            directory=str(self.directory),
            fingerprint=fingerprint,
            settings=self.settings,
            before=size_of(layout),
            after=Size(
                sum(f["parameters"] for f in facts.values()), sum(f["bytes"] for f in facts.values())
            ),
            matrices=matrices,
            notes=layout.notes,
            seconds=sum(f["seconds"] for f in facts.values()),
        )
        entries = [facts[f"layer {layer}"]["ranks"] for layer in range(layers)]
        config = config_for(layout.config, entries, compat=self.compat)
        if self.dtype is not None:
            name = str(self.dtype).removeprefix("torch.")
            config |= {k: name for k in ("dtype", "torch_dtype") if k in config}
        copy_side_files(layout.directory, self.writer.folder)
        for name, text in report.files().items():
            (self.writer.folder / name).write_text(text)
        self.writer.finish(config)
        return report

    def pack(self, layer: int, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A layer's tensors as they are stored, under the checkpoint's names."""
        if self.compat and self.ranks:
            tensors = pad_experts(tensors, self._padded(1 + max(k.expert for k in self.ranks)))
        cast = {} if self.dtype is None else {"dtype": self.dtype}
        return {f"{mlp_prefix(layer)}{name}": t.to(**cast) for name, t in tensors.items()}
