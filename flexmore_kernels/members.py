"""What adding, removing and replacing experts does, on live layers and on checkpoints alike.

A new membership is an *order*: for each expert of the new mixture the number that it has in the old
one, or a `Newcomer`. [0, 2, Newcomer(...)] drops expert 1, renumbers expert 2 and adds one. Live
layers (layer_members.py) and checkpoints (checkpoint_members.py) follow the same orders. What it
does to a router is in member_rows.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cards import Card, check_card
from .checkpoint_config import as_triple, shortest
from .checks import FLOATS, check_tensor
from .storage import PROJECTIONS

Entry = Tensor | tuple[Tensor, Tensor] | None
Weights = tuple[Entry, Entry, Entry]


class Newcomer(NamedTuple):
    """An expert that is new in a layer: gate, up and down, each a matrix (out, in), a pair
    a (r, in), b (out, r), or None; and what the router holds of it.

    instead_of: the expert whose place it takes, and whose row, embedding and bias it keeps where it
    brings none. router_row: (D,). embedding: (m,). bias: a number.
    """

    weights: Weights
    router_row: Tensor | None = None
    embedding: Tensor | None = None
    bias: Tensor | None = None
    instead_of: int | None = None


Order = Sequence[int | Newcomer]


class Member(NamedTuple):
    """An expert as `list_experts` tells it: number, card, whether it is the shared one, its entry
    of `expert_ranks` in each layer, and what it weighs, its router's row aside.
    """

    number: int
    name: str
    owner: str | None
    licence: str | None
    shared: bool
    layer_ranks: tuple
    parameters: int
    nbytes: int


def entry_rank(entry: Entry) -> int | str:
    """What an entry is in a triple of ranks: "full", 0 for None, or its rank."""
    if entry is None:
        return 0
    return "full" if isinstance(entry, Tensor) else entry[0].shape[0]


def expert_rank(weights: Weights) -> Any:
    """The weights' entry of `expert_ranks`."""
    return shortest(tuple(map(entry_rank, weights)))


def check_weights(weights: Any, hidden_size: int, intermediate_size: int) -> Weights:
    """Check an expert's matrices and return them as a tuple.

    Raises ValueError or TypeError naming the projection: shapes, a rank above min(D, F), NaN, Inf.
    """
    if not isinstance(weights, (list, tuple)) or len(weights) != 3:
        got = f"{len(weights)}" if isinstance(weights, (list, tuple)) else type(weights).__name__
        raise TypeError(f"weights: got {got}; accepted: three, of gate, up and down")
    inward = (intermediate_size, hidden_size)
    found: list[Entry] = []
    for name, entry in zip(PROJECTIONS, weights, strict=True):
        out, width = inward[::-1] if name == "down_proj" else inward
        if isinstance(entry, (list, tuple)) and len(entry) == 2:
            a, b = entry
            check_tensor(f"{name}_a", a, ("r", width), FLOATS)
            check_tensor(f"{name}_b", b, (out, a.shape[0]), FLOATS, a.device)
            found.append((finite(f"{name}_a", a), finite(f"{name}_b", b)) if len(a) else None)
        elif entry is None:
            found.append(None)
        else:
            check_tensor(name, entry, (out, width), FLOATS)
            found.append(finite(name, entry))
    gate, up, down = found
    for name, entry in zip(PROJECTIONS, found, strict=True):
        if isinstance(entry, tuple) and len(entry[0]) > min(inward):
            got, limit = len(entry[0]), min(inward)
            raise ValueError(f"{name}_a: got rank {got}; accepted: 1 to min(D, F), {limit}")
    return gate, up, down


def cards_after(cards: Sequence[Card], order: Sequence[int | Card]) -> tuple[Card, ...]:
    """The cards in a new order; ValueError for a newcomer's that is none, or whose name another
    expert has."""
    found = tuple(cards[who] if isinstance(who, int) else check_card(who) for who in order)
    names = [card.name for card in found]
    for who in order:
        if not isinstance(who, int) and names.count(who.name) > 1:
            raise ValueError(
                f"name: got {who.name!r}, which another expert has; accepted: one that is not in "
                f"{', '.join(map(repr, sorted(set(names))))}"
            )
    return found


def placed(weights: Weights, base: Tensor, factor: torch.dtype) -> Weights:
    """A newcomer's own copies on base's device, full-size ones in its dtype, factors in `factor`.

    Raises ValueError where that cannot hold the numbers.
    """

    def moved(tensor: Tensor, dtype: torch.dtype) -> Tensor:
        copy = torch.empty(tensor.shape, device=base.device, dtype=dtype).copy_(tensor.detach())
        return finite("weights", copy)

    def one(entry: Entry) -> Entry:
        if isinstance(entry, tuple):
            return moved(entry[0], factor), moved(entry[1], factor)
        return None if entry is None else moved(entry, base.dtype)

    gate, up, down = map(one, weights)
    return gate, up, down


def check_routed(expert: int, shared: int | None, name: str | None = None) -> None:
    """Refuse to remove or change what a mixture stands on: the base, the shared expert."""
    if expert not in (0, shared):
        return
    what = "the base, of which low-rank experts are deltas" if expert == 0 else "the shared expert"
    got = repr(expert if name is None else name)
    raise ValueError(f"expert: got {got}, {what}; accepted: a routed expert beside it")


def retagged(card: Card, name: str | None, owner: str | None, licence: str | None) -> Card:
    """The card with what is given on it; None leaves, "" takes an owner or a licence off."""
    given = {"name": name, "owner": owner, "licence": licence}
    changed = {field: value for field, value in given.items() if value is not None}
    for field in ("owner", "licence"):
        if changed.get(field) == "":
            changed[field] = None
    return check_card(card._replace(**changed))


def new_card(card: Card | None, name: str | None, owner: str | None, licence: str | None) -> Card:
    """A newcomer's card with what is given on it; without a card it needs a name."""
    if card is None and name is None:
        raise ValueError("name: got None for an expert without a card; accepted: a name (--name)")
    return retagged(card or Card(name or ""), name, owner, licence)


def shared_field(shared: int | None) -> bool | int:
    """`shared_expert` as a config says it: False, True for the base, or a number."""
    return False if shared is None else shared or True


def with_one(entries: int | Sequence, place: int, one: Any) -> list:
    """The entries, or of a count its numbers, with another one at a place: an order in which one
    expert is replaced, cards of which one is new."""
    found = list(range(entries) if isinstance(entries, int) else entries)
    found[place] = one
    return found


def renumbered(order: Order, number: int | None) -> int | None:
    """The number in the new order of an old expert that stays, or is replaced."""
    for new, who in enumerate(order):
        if number is not None and number == (who if isinstance(who, int) else who.instead_of):
            return new
    return None


def parameters_of(triples: Sequence[Any], hidden_size: int, intermediate_size: int) -> int:
    """How many numbers an expert of these entries of `expert_ranks`, one a layer, holds."""
    D, F = hidden_size, intermediate_size
    kinds = [kind for entry in triples for kind in as_triple(entry)]
    return sum(D * F if kind == "full" else kind * (D + F) for kind in kinds)


def finite(name: str, tensor: Tensor) -> Tensor:
    """The tensor; ValueError for one that holds NaN or Inf."""
    if not bool(tensor.isfinite().all()):
        kind = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{name}: holds NaN or Inf as {kind}; accepted: finite numbers")
    return tensor
