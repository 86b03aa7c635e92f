"""Multiple choice on each domain, ranked by likelihood: knowledge and reasoning.

| probe | group | domain | asks |
| --- | --- | --- | --- |
| meanings | knowledge | dictionary | a word, for its meaning |
| verses | knowledge | scripture | the beginning of a verse, for its end |
| names | knowledge | docs | a module or class, for a name that is in it |
| arithmetic | reasoning | arithmetic | two numbers, for their sum, difference or product |
| brackets | reasoning | python | code with open brackets, for what closes them |
| steps | reasoning | proofs | premises and a rule, for what follows |

Knowledge is asked of the training text, since it is what is learned from there; reasoning of what
that text does not show. Four choices, one right, in a random place; chance is 25 %. Choices are
alike in length and kind, and right and wrong ones are drawn from the same texts: which one is
likely in itself says nothing. (A character 5-gram of the training text that does not see the
prompts is right in 23 to 27 % of 1,000 items, where chance is 22.3 to 27.7 %.) The items of `steps`
begin with the shortest, the others' are in no order.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping

from probe_items import Item, Probe, first
from probe_knowledge import meanings, names, verses
from probe_reasoning import arithmetic, brackets, proof_steps
from texts import Domain, split

__all__ = ["Item", "Probe", "build"]

Maker = Callable[[list[str], list[str], random.Random], Iterator[Item]]

PROBES: dict[str, tuple[str, str, Maker]] = {
    "meanings": ("knowledge", "dictionary", lambda train, _, draw: meanings(train, draw)),
    "verses": ("knowledge", "scripture", lambda train, _, draw: verses(train, draw)),
    "names": ("knowledge", "docs", lambda train, _, draw: names(train, draw)),
    "arithmetic": ("reasoning", "arithmetic", lambda train, _, draw: arithmetic(train, draw)),
    "brackets": ("reasoning", "python", lambda _, held_out, draw: brackets(held_out, draw)),
    "steps": ("reasoning", "proofs", proof_steps),
}
"""Of each probe its group, its domain, and what makes items of training and held-out text."""


def build(domains: Mapping[str, Domain], count: int = 1000, seed: int = 0) -> dict[str, Probe]:
    """The probes of these domains, `count` items each; the same for the same texts and seed.

    Domains without a probe have none, and probes whose domain is not there are left out. Raises
    ValueError for a count below 1, and for a text that has too few items, saying how many it has.
    """
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"count: got {count!r}; accepted: an integer >= 1")
    found = {}
    for name, (group, domain, make) in PROBES.items():
        if domain in domains:
            items = make(*split(domains[domain]), random.Random(f"{seed} {name}"))
            found[name] = Probe(name, group, domain, first(name, items, count))
    return found
