"""One change of a checkpoint's experts, checked, then written layer by layer: see
checkpoint_members.py, which says what changes there are."""

from __future__ import annotations

import hashlib
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import base_fingerprint
from .adapter_base import expert_entry, put_entry
from .cards import KEY, Card, cards_of, config_cards, find
from .checkpoint import read_tensors
from .checkpoint_edit import names_of, write_layers
from .checkpoint_folders import refuse_existing
from .checkpoint_forms import config_for, pad_experts, padded_ranks
from .checkpoint_layout import PROJECTIONS, Layout, mlp_prefix, read_layout
from .checkpoint_writer import fingerprint
from .expert_sources import ExpertSource
from .member_rows import router_tensors, row_for, row_of_layer
from .members import Newcomer, Order, Weights, check_routed, check_weights, placed
from .router_kinds import check_shared_expert
from .shared_weights import is_shared, merged

Say = Callable[[str], None] | None
Where = str | os.PathLike
Tensors = dict[str, Tensor]


class CheckpointChange:
    """A checkpoint to be written with other experts: its layout, cards, shared expert and ranks.

    cards are those to be written; the caller changes them. Raises ValueError for a directory `out`
    that exists, or as `read_layout` does.
    """

    def __init__(self, directory: Where, out: Where) -> None:
        refuse_existing(Path(out))
        self.out, self.layout = out, read_layout(directory)
        config = self.layout.config
        self.cards = cards_of(config, config["num_experts"])
        self.shared = check_shared_expert(config.get("shared_expert", False), len(self.cards))
        self.ranks = self.layout.layer_ranks
        self.sizes = (config["hidden_size"], config["intermediate_size"])

    def routed(self, expert: int | str, argument: str = "expert") -> int:
        """The number of an expert that may go or change."""
        number = find(self.cards, expert, argument)
        check_routed(number, self.shared, self.cards[number].name)
        return number

    def joining(
        self, source: ExpertSource, router_rows: Any, embedding: Any, instead_of: int | None
    ) -> Callable[[int, Tensors], Newcomer]:
        """Check an expert against the checkpoint; then what it is in a layer of such tensors."""
        layout, count = self.layout, len(self.ranks)
        source.check_fits(count, *self.sizes)
        mine = base_fingerprint.of_checkpoint(layout)
        about = (source.base, source.origin, mine, layout.directory)
        if (note := base_fingerprint.check_base(*about)) is not None:
            warnings.warn(note, stacklevel=3)
        if embedding is None and layout.config.get("router") == "projected":
            embedding = source.embedding

        def routing(layer: int, tensors: Tensors, own: Sequence) -> Newcomer:
            given, gate = row_of_layer(router_rows, layer, count), _gate(tensors, layer)
            what = (gate, "router_rows", given, own[0], self.shared)
            row = row_for(*what, new=instead_of is None)
            return Newcomer((None, None, None), row, embedding, own[1], instead_of)

        def newcomer(layer: int, tensors: Tensors) -> Newcomer:
            weights, *own = source.layer(layer)
            base = entries_of(tensors, layer, 0)[0]
            weights = check_weights(weights, *self.sizes)
            factors = (t.dtype for n, t in tensors.items() if n.endswith("_a.weight"))
            weights = placed(weights, base, next(factors, base.dtype))
            return routing(layer, tensors, own)._replace(weights=weights)

        # What the router refuses, before any work.
        first = read_tensors(layout, names=[n for n in names_of(layout, 0) if ".mlp.gate." in n])
        router_tensors(_gate(first, 0), [0, routing(0, first, source.routing(0))])
        return newcomer

    def write(
        self,
        order: Callable[[int, Tensors], Order],
        ranks: Sequence[tuple],
        *,
        mark: Any,
        compat: bool,
        say: Say,
        dense: Layout | None = None,
    ) -> Layout:
        """Write it; order: of a layer with these tensors. dense: merged into what all share."""
        layout, routed = self.layout, len(self.layout.layer_ranks[0]) - (self.shared is not None)
        config = carded(layout.config, self.cards)
        factors = any(entry != 0 for entries in ranks for entry in entries)
        kind = "flexmore" if factors or layout.kind == "flexmore" else "flex_olmo"
        padded = padded_ranks(ranks)

        def read(layer: int | None) -> Tensors:
            tensors = read_tensors(layout, names=names_of(layout, layer))
            done = {name: t for name, t in tensors.items() if is_shared(name)}
            if dense is not None:
                new = read_tensors(dense, names=list(done))
                done = {name: merged(t, new[name], routed) for name, t in done.items()}
            if layer is not None:
                done |= _ordered(tensors, layer, order(layer, tensors))
            return pad_experts(done, padded) if compat and kind == "flexmore" else done

        layouts = [layout] if dense is None else [layout, dense]
        print_of = fingerprint(layouts, mark=mark, cards=self.cards, compat=compat)
        written = config_for(config, ranks, kind=kind, compat=compat)
        return write_layers(self.out, layout, written, print_of, read, say)


def _ordered(tensors: Tensors, layer: int, order: Order) -> Tensors:
    """A layer's router and experts in a new order, under their new names."""
    done: Tensors = {}
    for number, who in enumerate(order):
        known = isinstance(who, int)
        weights = entries_of(tensors, layer, who) if known else who.weights
        for projection, entry in zip(PROJECTIONS, weights, strict=True):
            put_entry(done, layer, number, projection, entry)
    prefix = f"{mlp_prefix(layer)}gate."
    router = router_tensors(_gate(tensors, layer), order)
    return done | {f"{prefix}{name}": tensor for name, tensor in router.items()}


def entries_of(tensors: Tensors, layer: int, expert: int) -> Weights:
    """What a layer's tensors hold of an expert."""
    gate, up, down = (expert_entry(tensors, layer, expert, p) for p in PROJECTIONS)
    return gate, up, down


def _gate(tensors: Tensors, layer: int) -> Tensors:
    prefix = f"{mlp_prefix(layer)}gate."
    return {name[len(prefix) :]: t for name, t in tensors.items() if name.startswith(prefix)}


def carded(config: dict[str, Any], cards: Sequence[Card]) -> dict[str, Any]:
    """A config.json's object with these cards."""
    rest = {name: value for name, value in config.items() if name != KEY}
    given = config_cards(cards)
    return rest if given is None else {**rest, KEY: given}


def mark_of(value: Any) -> Any:
    """What tells a tensor from another one; anything else tells itself."""
    if not isinstance(value, Tensor):
        return value
    numbers = value.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes()
    return str(value.dtype), tuple(value.shape), hashlib.sha256(numbers).hexdigest()
