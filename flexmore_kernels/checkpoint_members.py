"""Experts joining and leaving a checkpoint: what membership.py does to a live model.

    add("mixture", "law.safetensors", "mixture-2")      replace, rerank: likewise
    tag("mixture-2", "law", owner="A. Owner")           in its config.json
    list_experts("mixture-2")

Experts leave by `checkpoint_edit.drop`.

A new directory is written layer by layer, in the memory of one layer, is taken up by the same call
after a kill, and appears when it is complete (checkpoint_writer.py). All that the change does not
name keeps its bits: of padded factors what is in use.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .adapter_base import BaseCheckpoint
from .cards import Card, cards_of, find, new_name
from .checkpoint_change import CheckpointChange, Say, Tensors, Where, carded, entries_of, mark_of
from .checkpoint_config import shortest
from .checkpoint_headers import read_json
from .checkpoint_layout import Layout, read_layout
from .checkpoint_writer import write_json
from .expert import open_expert
from .expert_sources import ExpertSource
from .members import (
    Member,
    Newcomer,
    Order,
    cards_after,
    parameters_of,
    retagged,
    with_one,
)  # fmt: skip
from .reranking import parse_rank, reranked
from .router_kinds import check_shared_expert
from .shared_weights import check_shared, is_shared


def add(
    directory: Where,
    expert: ExpertSource | Where,
    out: Where,
    *,
    router_rows: Tensor | str | None = None,
    embedding: Tensor | None = None,
    merge_shared: Where | None = None,
    compat: bool = False,
    say: Say = None,
) -> Layout:
    """Write the checkpoint with one expert more, behind the others.

    Args:
        directory: a mixture's checkpoint.
        expert, router_rows, embedding: as `membership.add_expert` takes them.
        out: a new or an empty directory.
        merge_shared: the newcomer's dense model, a checkpoint's directory: see shared_weights.py.
        compat: write for the authors' reader, see `save_checkpoint`.
        say: is told how far it is.

    Raises ValueError by name before anything is written, or as `CheckpointWriter` does.
    """
    edit = CheckpointChange(directory, out)
    source, count = open_expert(expert), len(edit.cards)
    dense = None if merge_shared is None else BaseCheckpoint(merge_shared).layout
    if dense is not None:
        names = [name for name in edit.layout.shapes if is_shared(name)]
        check_shared(dense, names, edit.layout.shapes)
    edit.cards = cards_after(edit.cards, [*range(count), source.card or Card(new_name(edit.cards))])
    join = edit.joining(source, router_rows, embedding, None)
    return edit.write(
        lambda layer, tensors: [*range(count), join(layer, tensors)],
        [(*own, new) for own, new in zip(edit.ranks, source.layer_ranks(), strict=True)],
        dense=dense,
        mark=("add", source.mark, mark_of(router_rows), mark_of(embedding)),
        compat=compat,
        say=say,
    )


def replace(
    directory: Where,
    expert: int | str,
    new: ExpertSource | Where,
    out: Where,
    *,
    router_rows: Tensor | str | None = None,
    embedding: Tensor | None = None,
    compat: bool = False,
    say: Say = None,
) -> Layout:
    """Write the checkpoint with another expert in an expert's place.

    As `membership.replace_expert`: the card is the new one's where it has one, and of the router
    stays what neither it nor the call brings. Otherwise as `add`.
    """
    edit = CheckpointChange(directory, out)
    number, source = edit.routed(expert), open_expert(new)
    count, card = len(edit.cards), source.card or edit.cards[number]
    edit.cards = cards_after(edit.cards, with_one(count, number, card))
    join = edit.joining(source, router_rows, embedding, number)
    entries = zip(edit.ranks, source.layer_ranks(), strict=True)
    return edit.write(
        lambda layer, tensors: with_one(count, number, join(layer, tensors)),
        [tuple(with_one(own, number, entry)) for own, entry in entries],
        mark=("replace", number, source.mark, mark_of(router_rows), mark_of(embedding)),
        compat=compat,
        say=say,
    )


def rerank(
    directory: Where,
    expert: int | str,
    rank: Any,
    out: Where,
    *,
    method: str = "exact",
    seed: int = 0,
    compat: bool = False,
    say: Say = None,
) -> Layout:
    """Write the checkpoint with an expert of another rank in every layer.

    rank, method: as `membership.rerank_expert` takes them. seed: of the rows that a grown A gets.
    Otherwise as `add`.
    """
    edit = CheckpointChange(directory, out)
    number, count = edit.routed(expert), len(edit.cards)
    triple = parse_rank(rank, min(edit.sizes))

    def order(layer: int, tensors: Tensors) -> Order:
        generator = torch.Generator().manual_seed(seed + layer)
        factor = next((t.dtype for n, t in tensors.items() if n.endswith("_a.weight")), None)
        own, base = (entries_of(tensors, layer, e) for e in (number, 0))
        gate, up, down = (
            reranked(*pair, dtype=factor, method=method, generator=generator)
            for pair in zip(own, base, triple, strict=True)
        )
        return with_one(count, number, Newcomer((gate, up, down), instead_of=number))

    return edit.write(
        order,
        [tuple(with_one(own, number, shortest(triple))) for own in edit.ranks],
        mark=("rerank", number, triple, method, seed),
        compat=compat,
        say=say,
    )


def tag(
    directory: Where,
    expert: int | str,
    *,
    name: str | None = None,
    owner: str | None = None,
    licence: str | None = None,
) -> Card:
    """Write on an expert's card, the base's too, in config.json, whole or not at all.

    None leaves, "" takes an owner or a licence off. No tensor is touched. Returns the card.
    """
    layout = read_layout(directory)
    cards = cards_of(layout.config, layout.config["num_experts"])
    number = find(cards, expert)
    card = retagged(cards[number], name, owner, licence)
    after = cards_after(cards, with_one(len(cards), number, card))
    path = Path(directory) / "config.json"
    write_json(path, carded(read_json(path), after))
    return card


def list_experts(directory: Where) -> list[Member]:
    """The experts of a checkpoint, by number; no weights are read."""
    layout = read_layout(directory)
    config = layout.config
    shared = check_shared_expert(config.get("shared_expert", False), config["num_experts"])
    sizes, found = (config["hidden_size"], config["intermediate_size"]), []
    for number, card in enumerate(cards_of(config, config["num_experts"])):
        entries = tuple(ranks[number] for ranks in layout.layer_ranks)
        own = f".experts.{number}."
        nbytes = sum(part.nbytes for name, part in layout.parts.items() if own in name)
        count = parameters_of(entries, *sizes)
        found.append(Member(number, *card, number == shared, entries, count, nbytes))
    return found
