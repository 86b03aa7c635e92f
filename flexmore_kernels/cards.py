"""Cards of experts: a name that stays when numbers move up, an owner, a licence.

config.json keeps them under "experts", one entry an expert, the base first. Where it does not, the
experts are called "base", "expert-1", "expert-2" ...
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .checks import check_int

KEY = "experts"


class Card(NamedTuple):
    """An expert's name, and whose it is on what terms, where that is known."""

    name: str
    owner: str | None = None
    licence: str | None = None


def check_card(card: object, argument: str = "card") -> Card:
    """A Card of a Card or a mapping with `name`, `owner`, `licence`; ValueError otherwise."""
    values = card._asdict() if isinstance(card, Card) else card
    if not isinstance(values, Mapping) or not set(values) <= set(Card._fields):
        accepted = "a Card, or an object with name, owner, licence"
        raise ValueError(f"{argument}: got {card!r}; accepted: {accepted}")
    name = values.get("name")
    # A number would be taken for the expert's place, a comma for the next name in a list.
    if not isinstance(name, str) or name != name.strip() or not name or "," in name:
        raise ValueError(f"{argument}: got the name {name!r}; accepted: a text without commas")
    if name.lstrip("-").isdecimal() or name.startswith("-"):
        raise ValueError(f"{argument}: got the name {name!r}; accepted: no number, no leading -")
    for field in ("owner", "licence"):
        value = values.get(field)
        if value is not None and not isinstance(value, str):
            raise ValueError(f"{argument}: got the {field} {value!r}; accepted: a text or None")
    return Card(**values)


def check_cards(cards: Iterable, count: int, argument: str = KEY) -> tuple[Card, ...]:
    """`count` cards with different names; ValueError otherwise."""
    if isinstance(cards, (str, bytes, Mapping)) or not isinstance(cards, Iterable):
        raise ValueError(f"{argument}: got {cards!r}; accepted: a list of {count} cards")
    found = tuple(check_card(card, f"{argument}[{e}]") for e, card in enumerate(cards))
    if len(found) != count:
        raise ValueError(f"{argument}: got {len(found)} cards; accepted: {count}, one an expert")
    names = [card.name for card in found]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{argument}: got {twice[0]!r} twice; accepted: different names")
    return found


def default_name(expert: int) -> str:
    return f"expert-{expert}" if expert else "base"


def is_default(name: str) -> bool:
    """Whether it says no more than a number."""
    return re.fullmatch(r"base|expert-\d+", name) is not None


def cards_of(config: Any, count: int) -> tuple[Card, ...]:
    """The cards of a `FlexMoREConfig` or a config.json's object, with default names if it has none.

    Raises ValueError for cards that do not fit `count` experts.
    """
    given = config.get(KEY) if isinstance(config, Mapping) else getattr(config, KEY)
    if given is None:
        return tuple(Card(default_name(e)) for e in range(count))
    return check_cards(given, count)


def config_cards(cards: Sequence[Card]) -> list[dict[str, str | None]] | None:
    """What config.json holds of them; None where they say nothing beyond the default names."""
    if all(card == Card(default_name(e)) for e, card in enumerate(cards)):
        return None
    return [card._asdict() for card in cards]


def new_name(cards: Sequence[Card]) -> str:
    """A default name that nobody has yet."""
    taken, number = {card.name for card in cards}, len(cards)
    while default_name(number) in taken:
        number += 1
    return default_name(number)


def find(cards, expert: int | str, argument: str = "expert") -> int:
    """The number of an expert given by name or number; ValueError names those that are there."""
    names = [card.name for card in cards]
    if not isinstance(expert, str):
        return check_int(argument, expert, 0, len(names) - 1)
    if expert in names:
        return names.index(expert)
    raise ValueError(
        f"{argument}: got {expert!r}, which is not here (any more); accepted: {', '.join(names)}"
    )


def mask_of(
    cards: Sequence[Card],
    only: Iterable[int | str] | None = None,
    without: Iterable[int | str] | None = None,
) -> Tensor:
    """bool (E,): the experts that a request may use: `only` these, and none of `without`.

    Raises ValueError for an expert that is not there, or where none is left.
    """
    for argument, names in (("only", only), ("without", without)):
        listed = isinstance(names, Iterable) and not isinstance(names, (str, bytes))
        if names is not None and not listed:
            raise TypeError(f"{argument}: got {names!r}; accepted: a list of names or numbers")
    mask = torch.full((len(cards),), only is None)
    for expert in () if only is None else only:
        mask[find(cards, expert, "only")] = True
    for expert in () if without is None else without:
        mask[find(cards, expert, "without")] = False
    if not bool(mask.any()):
        raise ValueError("only, without: got what leaves no expert; accepted: one or more")
    return mask
