"""Experts joining and leaving a live model between two batches: the life of a mixture.

    number = add_expert(model, fk.Expert.load("law.safetensors"))
    replace_expert(model, "law", newer)     rerank_expert(model, "law", 16)
    tag_expert(model, "law", owner="A. Owner")     remove_expert(model, "law")

Every function checks and lays out all layers before it changes any: what is refused leaves the
model as it was, to the bit. Experts that stay keep their bits, and their names when their numbers
move up. Where a newcomer is excluded, the model computes what it did: the same routing to the bit,
the same outputs to rounding (to the bit where the number of experts chooses the same kernels).
Where it is allowed and not selected, so too with the scorings "sigmoid" and "unit"; the weights of
a softmax over all allowed experts shrink by the newcomer's share of it.

Optimizers, KV caches of running requests, captured CUDA graphs and compiled code know the old
experts: make them anew. Sources: FlexOlmo (arXiv 2507.07024, section 3.3) for joining and leaving;
Nexus (arXiv 2408.15901, section 2) for rows made of embeddings and weights that are merged.
"""

from __future__ import annotations

import dataclasses
import os
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from . import base_fingerprint
from .cards import KEY, Card, cards_of, config_cards, find, new_name
from .checkpoint_config import as_triple
from .expert import Expert, open_expert
from .expert_sources import ExpertSource
from .layer_change import Change, entry_of, factor_dtype, tensors_of
from .layer_members import expert_entries, rerank_member
from .member_rows import row_for, row_of_layer
from .members import (
    Member,
    Newcomer,
    Order,
    cards_after,
    check_routed,
    parameters_of,
    retagged,
    shared_field,
    with_one,
)
from .shared_weights import SharedWeights


def add_expert(
    model: Any,
    expert: ExpertSource | str | os.PathLike,
    *,
    router_rows: Tensor | str | None = None,
    embedding: Tensor | None = None,
    merge_shared: Mapping[str, Tensor] | str | os.PathLike | None = None,
) -> int:
    """Add an expert behind the others; its number.

    Args:
        model: a `FlexMoREForCausalLM`.
        expert: an `Expert`, the path of its file, or another source (expert_sources.py), which is
            read layer by layer; taken to the layers' devices and dtypes.
        router_rows: of linear routers: (D,) for every layer, such as its domain embedding, (L, D),
            "zeros" or "mean" (see `members.router_row`); default: the expert's own, which were
            trained with it. Without either the call is refused.
        embedding: (m,), of projected routers, which make the expert's rows of it; default: the
            expert's own.
        merge_shared: the newcomer's dense model, as tensors by their names or a checkpoint's
            directory: every weight that is neither FFN nor router becomes, in place,
            (1 - l) old + l new with l = 1 / (n + 1), n the routed experts before. This changes what
            every expert computes.

    The expert's name must be new; one without a name gets a default one. An expert of another base
    is refused; of an unknown one a UserWarning says so. `top_k` stays. Prepared layers are prepared
    again. Waits for the device. Raises ValueError or TypeError by name.
    """
    source, cards, count = open_expert(expert), _cards(model), model.config.num_experts
    card = source.card or Card(new_name(cards))
    after = cards_after(cards, [*range(count), card])
    newcomers = _newcomers(model, source, router_rows, embedding, None)
    shared = None
    if merge_shared is not None:
        routed = count - (_layers(model)[0].shared_expert is not None)
        shared = SharedWeights(model.named_parameters(), merge_shared, routed)
    _change(model, [[*range(count), newcomer] for newcomer in newcomers], after)
    if shared is not None:
        shared.merge()
    return count


def remove_expert(model: Any, expert: int | str) -> None:
    """Remove an expert by name or number; those behind it move up, names stay.

    The model then computes what it computed with this expert excluded (`expert_mask`); `top_k` goes
    down to what is left. Refused are the base, the shared expert and the last routed one beside
    that. Otherwise as `add_expert`.
    """
    cards, number = _routed(model, expert)
    order = [e for e in range(len(cards)) if e != number]
    _change(model, [order] * len(_layers(model)), cards_after(cards, order))


def replace_expert(
    model: Any,
    expert: int | str,
    new: ExpertSource | str | os.PathLike,
    *,
    router_rows: Tensor | str | None = None,
    embedding: Tensor | None = None,
) -> None:
    """Put another expert in an expert's place, under the same number; the card is the new one's.

    One without a card gets the old one's. Of the router what the new expert brings is taken, and
    what neither it nor the call brings stays; router_rows "keep" keeps the old rows. Otherwise as
    `add_expert`.
    """
    cards, number = _routed(model, expert)
    source = open_expert(new)
    after = cards_after(cards, with_one(len(cards), number, source.card or cards[number]))
    newcomers = _newcomers(model, source, router_rows, embedding, number)
    _change(model, [with_one(len(cards), number, newcomer) for newcomer in newcomers], after)


def rerank_expert(model: Any, expert: int | str, rank: Any, *, method: str = "exact") -> None:
    """Give an expert another rank in every layer: cut, grown, made full-size, or factored.

    rank: an int, 0 for full-size, or a triple (gate, up, down) of a rank, 0 for no delta, or
    "full". Down: the best approximation of b a, whose pieces are then in order, so that
    `rank_limit` may cut them; up: the same b a, with more to train. method: of the SVD of a
    full-size matrix's difference, "exact" or "randomized". See `reranking.reranked`. Otherwise as
    `add_expert`.
    """
    cards, number = _routed(model, expert)
    orders = []
    for layer in _layers(model):
        newcomer = rerank_member(layer, number, rank, method)
        orders.append(with_one(len(cards), number, newcomer))
    _change(model, orders, cards)


def tag_expert(
    model: Any,
    expert: int | str,
    *,
    name: str | None = None,
    owner: str | None = None,
    licence: str | None = None,
) -> Card:
    """Write on an expert's card, the base's too; None leaves, "" removes. Returns the card."""
    cards = _cards(model)
    number = find(cards, expert)
    card = retagged(cards[number], name, owner, licence)
    after = cards_after(cards, with_one(len(cards), number, card))
    model.config = dataclasses.replace(model.config, **{KEY: config_cards(after)})
    return card


def list_experts(model: Any) -> list[Member]:
    """The experts, by number; no weights are read."""
    layers, config = _layers(model), model.config
    sizes, found = (config.hidden_size, config.intermediate_size), []
    for number, card in enumerate(_cards(model)):
        entries = tuple(layer.expert_ranks[number] for layer in layers)
        shared, count, nbytes = layers[0].shared_expert == number, 0, 0
        for layer, entry in zip(layers, entries, strict=True):
            full = sizes[0] * sizes[1] * as_triple(entry).count("full")
            factors = parameters_of([entry], *sizes) - full
            count += full + factors
            kinds = (entry_of(layer, "gate_proj", 0).dtype, factor_dtype(layer))
            nbytes += full * kinds[0].itemsize + factors * kinds[1].itemsize
        found.append(Member(number, *card, shared, entries, count, nbytes))
    return found


def take_expert(model: Any, expert: int | str, *, card: Card | None = None) -> Expert:
    """A copy of a live expert on the CPU, with its rows or its embedding, to save or to add
    elsewhere; the model stays as it is. card: default: the model's."""
    cards, config = _cards(model), model.config
    number = find(cards, expert)
    if number == 0:
        raise ValueError(f"expert: got {expert!r}, the base; accepted: an expert beside it")
    layers, gates = _layers(model), [tensors_of(layer.gate) for layer in _layers(model)]
    has_rows = "weight" in gates[0] and layers[0].shared_expert != number
    embeddings = gates[0].get("domain_embeddings")
    embedding = None if embeddings is None else _copied(embeddings[number])
    if embedding is not None and not bool(embedding.any()):
        embedding = None  # it was never set
    return Expert(
        config.hidden_size,
        config.intermediate_size,
        [tuple(_copied(e) for e in expert_entries(layer, number)) for layer in layers],
        card or cards[number],
        base_fingerprint.of_model(model),
        torch.stack([_copied(gate["weight"][number]) for gate in gates]) if has_rows else None,
        torch.stack([_copied(gate["expert_bias"][number - 1]) for gate in gates])
        if "expert_bias" in gates[0]
        else None,
        embedding,
        f"{cards[number].name} of a live model",
    )


def _layers(model: Any) -> list[Any]:
    return [block.mlp for block in model.model.layers]


def _cards(model: Any) -> tuple[Card, ...]:
    return cards_of(model.config, model.config.num_experts)


def _routed(model: Any, expert: int | str) -> tuple[tuple[Card, ...], int]:
    """The cards, and the number of an expert that may go or change."""
    cards = _cards(model)
    number = find(cards, expert)
    check_routed(number, _layers(model)[0].shared_expert, cards[number].name)
    return cards, number


def _newcomers(
    model: Any, source: ExpertSource, router_rows: Any, embedding: Any, instead_of: int | None
) -> list[Newcomer]:
    """The expert as each layer takes it, checked against the model as a whole."""
    config, layers = model.config, _layers(model)
    source.check_fits(len(layers), config.hidden_size, config.intermediate_size)
    note = base_fingerprint.check_base(
        *(source.base, source.origin, base_fingerprint.of_model(model), "this model")
    )
    if note is not None:
        warnings.warn(note, stacklevel=3)
    if embedding is None and "domain_embeddings" in tensors_of(layers[0].gate):
        embedding = source.embedding
    found = []
    for index, layer in enumerate(layers):
        part, gate = source.layer(index), tensors_of(layer.gate)
        given, shared = row_of_layer(router_rows, index, len(layers)), layer.shared_expert
        new = instead_of is None
        row = row_for(gate, "router_rows", given, part.router_row, shared, new=new)
        found.append(Newcomer(part.weights, row, embedding, part.bias, instead_of))
    return found


def _change(model: Any, orders: Sequence[Order], cards: Sequence[Card]) -> None:
    """Plan all layers and the config, then change them."""
    layers = _layers(model)
    if any(block.watchers for block in model.model.layers):
        raise ValueError(
            "model: is counting, with a counter for each expert; accepted: a change of experts "
            "outside of `counting()`, `attributing()` and `routings()`"
        )
    changes = [Change(layer, order) for layer, order in zip(layers, orders, strict=True)]
    ranks = [change.expert_ranks for change in changes]
    config = dataclasses.replace(
        model.config,
        num_experts=len(cards),
        expert_ranks=ranks[0] if len(set(ranks)) == 1 else tuple(ranks),
        num_experts_per_tok=changes[0].top_k,
        shared_expert=shared_field(changes[0].shared),
        **{KEY: config_cards(cards)},
    )
    for change in changes:
        change.assign()
    model.config, model.model.num_experts = config, config.num_experts
    for change in changes:
        change.prepare()


def _copied(entry: Any) -> Any:
    """The entry on the CPU, in memory of its own."""
    if isinstance(entry, tuple):
        return tuple(map(_copied, entry))
    return None if entry is None else entry.detach().to("cpu", copy=True).contiguous()
