"""Items of multiple choice, and how choices are found that do not give the answer away."""

from __future__ import annotations

import bisect
import random
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import NamedTuple

CHOICES = 4


class Item(NamedTuple):
    """A question. Each choice is to be appended to the prompt as it is; answer: which is right."""

    prompt: str
    choices: tuple[str, ...]
    answer: int


class Probe(NamedTuple):
    """Items of one kind. domain: whose training text shows what they ask for."""

    name: str
    group: str  # "knowledge" or "reasoning"
    domain: str
    items: list[Item]


def shuffled(generator: random.Random, prompt: str, right: str, wrong: Sequence[str]) -> Item:
    """An item whose answer is in a random place. Choices differ."""
    choices = [right, *wrong]
    if len(set(choices)) != CHOICES:
        raise ValueError(f"choices: got {choices}; accepted: {CHOICES} that differ")
    generator.shuffle(choices)
    return Item(prompt, tuple(choices), choices.index(right))


class Pool:
    """Texts of several kinds, from which some of nearly equal length are drawn.

    Args:
        entries: (kind, text, what it belongs to).
    """

    def __init__(self, entries: Iterable[tuple[Hashable, str, Hashable]]) -> None:
        self._kinds: dict[Hashable, list[tuple[int, str, Hashable]]] = {}
        for kind, text, owner in sorted(set(entries), key=repr):
            self._kinds.setdefault(kind, []).append((len(text), text, owner))
        for found in self._kinds.values():
            found.sort(key=lambda entry: entry[:2])

    def like(
        self,
        generator: random.Random,
        kind: Hashable,
        right: str,
        allowed: Callable[[str, Hashable], bool],
        within: float = 0.2,
    ) -> list[str] | None:
        """Three texts of the kind that are allowed; None where there are not enough.

        Their lengths are in a range that holds the right one's, a share of it wide and four
        characters at least. The right one is anywhere in it: were it in the middle, the longest and
        the shortest choice would mostly be wrong.
        """
        wide = max(4, int(within * len(right)))
        least = len(right) - generator.randint(0, wide)
        found = self._kinds.get(kind, [])
        begin = bisect.bisect_left(found, least, key=lambda entry: entry[0])
        end = bisect.bisect_right(found, least + wide, key=lambda entry: entry[0])
        taken: list[str] = []
        for _ in range(40 if begin < end else 0):
            _, text, owner = found[generator.randrange(begin, end)]
            if text != right and text not in taken and allowed(text, owner):
                taken.append(text)
                if len(taken) == CHOICES - 1:
                    return taken
        return None


def first(name: str, items: Iterator[Item], count: int) -> list[Item]:
    """So many items, each prompt with its answer once. Raises ValueError where there are fewer, and
    says how many."""
    found: dict[tuple[str, str], Item] = {}
    for item in items:
        found.setdefault((item.prompt, item.choices[item.answer]), item)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"count: {name} has {len(found)} items; accepted: that many, or more text")
