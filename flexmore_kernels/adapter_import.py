"""PEFT LoRA adapters of different ranks and scales, imported onto one base as a mixture.

An adapter of the dense FFN becomes an expert of its own, W_0 + s B A. An adapter of a mixture's
experts changes those in place: with d_e its delta of expert e,

    full-size expert e     W_e + d_e, in the base's dtype
    low-rank expert e      factors of  W_e - W_0 + d_e - d_0,  side by side
    public expert          W_0 + d_0

so that each expert keeps its own weights although d_0 moves what all of them share.

What an adapter changes beside the FFN is shared by all experts, so it cannot be an expert's own:
`other` refuses it, drops it, or adds the average over all adapters (absent: zero) to the base.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor

from .adapter_base import BaseCheckpoint, expert_entry, put_entry
from .adapter_config import CONFIG_FILE, WEIGHTS_FILE
from .adapter_others import OtherPart, Others, parts_of
from .adapters import Adapter, Place, accumulator, shortest
from .checkpoint import read_tensors
from .checkpoint_config import RANK_KEYS
from .checkpoint_config import shortest as shortest_entry
from .checkpoint_forms import config_for
from .checkpoint_layout import PROJECTIONS, mlp_prefix
from .checkpoint_writer import CheckpointWriter, file_state, fingerprint
from .checks import check_int, check_one_of
from .model_config import FlexMoREConfig

OTHER = ("refuse", "drop", "average")
Factors = tuple[Tensor, Tensor]


class ImportReport(NamedTuple):
    """What an import did: (expert, adapter, entry of its ranks in each layer) of every adapter that
    became an expert, what was dropped or averaged, and what the user should know.
    """

    experts: tuple[tuple[int, str, tuple], ...]
    others: tuple[OtherPart, ...]
    notes: tuple[str, ...]


def import_adapters(
    base: str | os.PathLike,
    adapters: Sequence[str | os.PathLike],
    out: str | os.PathLike,
    *,
    other: str = "refuse",
    router_rows: str | os.PathLike | None = None,
    top_k: int | None = None,
    dtype: torch.dtype | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> ImportReport:
    """Write the mixture of a base and PEFT adapters as a FlexMoRE checkpoint.

    Args:
        base: a dense `olmo2` checkpoint, or a mixture's, of which expert 0 is the base.
        adapters: PEFT directories; those of dense FFNs become experts in this order, behind the
            base's.
        out: a new or an empty directory; written layer by layer, whole or not at all. The same call
            goes on where a killed one stopped.
        other: what to do with deltas of shared weights: "refuse", "drop" or "average".
        router_rows: safetensors with rows for the new experts (N, D), or for all (E, D): one tensor
            `gate.weight` for every layer, or `model.layers.{l}.mlp.gate.weight` for each. Default:
            zeros.
        top_k: experts a token; default: all for a dense base, else the base's.
        dtype: of the factors; default: the base's.
        say: gets a line of progress.

    Raises ValueError naming the adapter and tensor: options of PEFT that are no plain LoRA, an
    adapter for another base, NaN or Inf.
    """
    check_one_of("other", other, OTHER)
    source = BaseCheckpoint(base)
    if not adapters:
        raise ValueError("adapters: got none; accepted: at least one directory")
    opened = [Adapter(directory, source.sizes) for directory in adapters]
    job = _Import(source, opened, router_rows, dtype)
    config = job.config(top_k)
    others = Others(source, opened, other)
    for adapter in opened:
        adapter.check_finite()
    files = [Path(d) / name for d in adapters for name in (CONFIG_FILE, WEIGHTS_FILE)]
    files += [] if router_rows is None else [Path(router_rows)]
    mark = fingerprint(
        [source.layout], other=other, config=config, dtype=dtype, files=list(map(file_state, files))
    )
    units = ["outside the layers", *(f"layer {i}" for i in range(source.sizes.num_layers))]
    with CheckpointWriter(out, units, config=config, fingerprint=mark) as writer:
        started, count = time.monotonic(), len(writer.remaining)
        for done, unit in enumerate(writer.remaining, 1):
            tensors, ranks = job.unit(units.index(unit) - 1, others)
            writer.write(unit, tensors, facts={"ranks": ranks, "others": others.take()})
            left = (time.monotonic() - started) / done * (count - done)
            say(f"{unit} written, {done} of {count}, {left:.0f} s left")
        writer.add(source.layout.directory)
        facts = [writer.facts[unit] for unit in units]
        layout = writer.finish(config_for(config, [fact["ranks"] for fact in facts[1:]]))
    experts = tuple(
        (expert, adapter.name, tuple(ranks[expert] for ranks in layout.layer_ranks))
        for expert, adapter in enumerate(job.new, job.known)
    )
    counted = parts_of(row for fact in facts for row in fact["others"])
    return ImportReport(experts, counted, tuple(job.notes))


class _Import:
    """What becomes of each layer."""

    def __init__(self, source, adapters, router_rows, dtype) -> None:
        self.source, self.dtype = source, dtype
        self.new = [a for a in adapters if any(p.expert is None for p in a.places)]
        self.placed = [a for a in adapters if any(p.expert is not None for p in a.places)]
        for adapter in adapters:
            if not adapter.places:
                raise ValueError(f"{adapter.directory}: changes no FFN weight; nothing to import")
        for adapter in self.new:
            if adapter in self.placed:
                raise ValueError(f"{adapter.directory}: of a dense FFN and of a mixture's experts")
        self.known = 1 if source.is_dense else source.layout.config["num_experts"]
        self.total = self.known + len(self.new)
        self.rows = None if router_rows is None else _RouterRows(router_rows, self)
        self.notes = _base_notes(source, adapters)
        if self.new and self.rows is None:
            self.notes.append(
                "router: rows of zeros for the new experts; with all experts selected each weighs "
                "the same. Train the router, or give router_rows."
            )

    def config(self, top_k: int | None) -> dict[str, Any]:
        """config.json of the mixture, without its ranks."""
        values = {k: v for k, v in self.source.layout.config.items() if k not in RANK_KEYS}
        known_k = self.total if self.source.is_dense else values["num_experts_per_tok"]
        values |= {
            "architectures": ["FlexMoREForCausalLM"],
            "model_type": "flexmore",
            "num_experts": self.total,
            "num_experts_per_tok": check_int("top_k", top_k or known_k, 1, self.total),
        }
        FlexMoREConfig.from_dict(values)  # refuses what the decoder does not compute
        return values

    def unit(self, layer: int, others: Others) -> tuple[dict[str, Tensor], list]:
        """The tensors and ranks of a layer; of -1 those outside the layers, which have none."""
        layout, block = self.source.layout, f"model.layers.{layer}."
        if layer < 0:
            names = [name for name in layout.shapes if not name.startswith("model.layers.")]
            found = read_tensors(layout, names=names)
            return {name: others.applied(name, found[name]) for name in names}, []
        stored = {block + rest: t for rest, t in read_tensors(layout, block).items()}
        prefix = f"{mlp_prefix(layer)}experts."
        tensors = {
            name: others.applied(name, tensor)
            for name, tensor in stored.items()
            if not name.startswith(prefix)
        }
        self._router(layer, tensors)
        kinds = [
            [self._expert(layer, e, projection, stored, tensors) for projection in PROJECTIONS]
            for e in range(self.total)
        ]
        return tensors, [shortest_entry(own) for own in kinds]

    def _expert(self, layer, e, projection, stored, tensors) -> int | str:
        """Store one projection of an expert; returns its kind."""
        public = expert_entry(stored, layer, 0, projection)
        moved = self._deltas(layer, 0, projection)
        if e >= self.known:
            delta = self.new[e - self.known].delta(Place(layer, None, projection))
            own, entry = [] if delta is None else [delta.factors()], None
        else:
            own = moved if e == 0 else self._deltas(layer, e, projection)
            entry = expert_entry(stored, layer, e, projection)
            copied = isinstance(entry, Tensor) and e > 0 and bool(own or moved)
            if copied and torch.equal(entry, public):
                entry = None  # a copy of the base: its delta alone is what it adds
        if isinstance(entry, Tensor):
            return put_entry(tensors, layer, e, projection, _added(entry, own))
        pairs = [*([entry] if entry else []), *own, *((a, -b) for a, b in moved)]
        return put_entry(tensors, layer, e, projection, self._joined(pairs, public))

    def _deltas(self, layer: int, expert: int, projection: str) -> list[Factors]:
        found = [a.delta(Place(layer, expert, projection)) for a in self.placed]
        factors = [delta.factors() for delta in found if delta is not None]
        return [pair for pair in factors if pair is not None]

    def _joined(self, pairs: list[Factors | None], like: Tensor) -> Factors | None:
        """One pair whose product is the sum of the pairs', in the dtype of the factors."""
        pairs = [pair for pair in pairs if pair is not None]
        if not pairs:
            return None
        acc = accumulator(like)
        a = torch.cat([a.to(acc) for a, _ in pairs])
        b = torch.cat([b.to(acc) for _, b in pairs], 1)
        short = shortest(a, b)
        dtype = self.dtype or like.dtype
        return None if short is None else (_finite(short[0].to(dtype)), _finite(short[1].to(dtype)))

    def _router(self, layer: int, tensors: dict[str, Tensor]) -> None:
        name = f"{mlp_prefix(layer)}gate.weight"
        like = tensors[f"model.layers.{layer}.post_feedforward_layernorm.weight"]
        dtype = tensors[name].dtype if name in tensors else like.dtype
        known = tensors.get(name, torch.zeros(self.known, self.source.sizes.hidden_size))
        rows = torch.zeros(len(self.new), self.source.sizes.hidden_size)
        given = None if self.rows is None else self.rows.of(layer)
        if given is not None and given.shape[0] == self.total:
            known, rows = given[: self.known], given[self.known :]
        elif given is not None:
            rows = given
        tensors[name] = torch.cat([known.to(dtype), rows.to(dtype)])
        bias = f"{mlp_prefix(layer)}gate.expert_bias"
        if bias in tensors:
            tensors[bias] = torch.cat([tensors[bias], tensors[bias].new_zeros(len(self.new))])


class _RouterRows:
    """Rows of the router from a safetensors file, one matrix for all layers or one for each."""

    def __init__(self, path: str | os.PathLike, job: _Import) -> None:
        if not Path(path).is_file():
            raise ValueError(f"router_rows: no file {path}; accepted: a safetensors file")
        with safe_open(path, framework="pt") as opened:
            self.tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        accepted = ((len(job.new), job.source.sizes.hidden_size),
                    (job.total, job.source.sizes.hidden_size))  # fmt: skip
        for layer in range(job.source.sizes.num_layers):
            rows = self.of(layer)
            if rows is None or tuple(rows.shape) not in accepted:
                found = "nothing" if rows is None else tuple(rows.shape)
                raise ValueError(
                    f"router_rows: got {found} for layer {layer}; accepted: gate.weight or "
                    f"{mlp_prefix(layer)}gate.weight of shape {accepted[0]} or {accepted[1]}"
                )
            if not bool(rows.isfinite().all()):
                raise ValueError(f"router_rows: NaN or Inf for layer {layer}; accepted: finite")

    def of(self, layer: int) -> Tensor | None:
        every = self.tensors.get("gate.weight")
        return self.tensors.get(f"{mlp_prefix(layer)}gate.weight", every)


def _added(weight: Tensor, pairs: Sequence[Factors]) -> Tensor:
    """weight + sum b a, added before it is rounded."""
    if not pairs:
        return weight
    total = weight.to(accumulator(weight))
    for a, b in pairs:
        total = total + b.to(total.dtype) @ a.to(total.dtype)
    return _finite(total.to(weight.dtype))


def _finite(result: Tensor) -> Tensor:
    """The tensor; ValueError for a sum or a scaled factor that its dtype cannot hold."""
    if not bool(result.isfinite().all()):
        raise ValueError(
            f"adapters: a delta, scaled, is beyond {result.dtype}; accepted: a smaller lora_alpha, "
            "or a wider dtype"
        )
    return result


def _base_notes(source: BaseCheckpoint, adapters: Sequence[Adapter]) -> list[str]:
    """Where names say that adapters were trained on another base than this, or than each other."""
    # Pairs: two adapters may bear the same name.
    named = [(a.name, a.config.base) for a in adapters if a.config.base]
    directory = source.layout.directory.resolve()
    own = source.layout.config.get("_name_or_path") or str(directory)
    if len({Path(base).name for _, base in named}) > 1:
        told = ", ".join(f"{name}: {base}" for name, base in named)
        raise ValueError(f"adapters: for different bases ({told}); accepted: one base for all")
    return [
        f"{name}: trained on {base}, by its name; the base here is {own}"
        for name, base in named
        if Path(base).name != Path(own).name
    ]
