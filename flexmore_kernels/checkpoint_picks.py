"""Experts picked from checkpoints for a new one: their cards, router rows and weights."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cards import KEY, cards_of, check_cards, config_cards, default_name, is_default
from .checkpoint import read_tensors
from .checkpoint_layout import Layout, mlp_prefix
from .checkpoint_shared import mean_tensors
from .router_kinds import ROUTER_ROWS


class Pick(NamedTuple):
    """An expert of a checkpoint."""

    layout: Layout
    expert: int


def members_of(picks: Sequence[Pick]) -> dict[str, Any]:
    """The cards and the shared expert's number among these experts, as config.json has them.

    Raises ValueError for two experts of one name, or a shared expert of another checkpoint than the
    first, which is the base's.
    """
    cards = []
    alone = len({id(pick.layout) for pick in picks}) == 1  # then all names stay
    for number, (layout, expert) in enumerate(picks):
        card = cards_of(layout.config, layout.config["num_experts"])[expert]
        named = alone or not is_default(card.name)
        cards.append(card if named else card._replace(name=default_name(number)))
    first = picks[0].layout
    shared = first.config.get("shared_expert", False)
    if shared and shared is not True:
        for number, pick in enumerate(picks):
            if pick.layout is not first and pick.layout.config.get("shared_expert") == shared:
                raise ValueError(f"shared_expert: got {shared}; accepted: the base, or none")
            if pick == Pick(first, shared):
                shared = number
                break
    fields = {KEY: config_cards(check_cards(cards, len(picks))), "shared_expert": shared}
    return {name: value for name, value in fields.items() if value or name in first.config}


class PickedExperts:
    """Reads a layer's router rows and experts 1.. under their new numbers."""

    def __init__(self, picks: Sequence[Pick], averaged: Sequence[Layout]) -> None:
        self._picks, self._averaged = picks, averaged
        self._names: dict[tuple[int, str], list[str]] = {}
        for key, layout in {id(pick.layout): pick.layout for pick in picks}.items():
            for name in layout.files:
                head, found, tail = name.partition(".experts.")
                if found:
                    prefix = f"{head}{found}{tail.partition('.')[0]}."
                    self._names.setdefault((key, prefix), []).append(name)

    def read(self, layer: int) -> dict[str, Tensor]:
        mlp, files = mlp_prefix(layer), self._picks[0].layout.files
        gate = next(name for end in ROUTER_ROWS if (name := f"{mlp[:-5]}{end}") in files)
        bias = f"{mlp}gate.expert_bias"
        base = mean_tensors(self._averaged, [gate], slice(0, 1))[gate][0]
        tensors, rows, biases, routers = {}, [base], [base.new_zeros(0)], {}
        for number, (layout, expert) in enumerate(self._picks[1:], start=1):
            if id(layout) not in routers:
                routers[id(layout)] = read_tensors(layout, names=[gate, bias])
            router = routers[id(layout)]
            rows.append(router[gate][expert])
            if bias in router:
                biases.append(router[bias][expert - 1 : expert])
            prefix = f"{mlp}experts.{expert}."
            names = self._names.get((id(layout), prefix), [])
            for name, tensor in read_tensors(layout, prefix, names=names).items():
                tensors[f"{mlp}experts.{number}.{name}"] = tensor
        tensors[gate] = torch.stack(rows)
        if self._picks[0].layout.expert_bias:
            tensors[bias] = torch.cat(biases)
        return tensors
