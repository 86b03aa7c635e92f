"""What is learned by heart: meanings of words, ends of verses, names in modules.

All is asked as the training text says it, so that a model that remembers the text is right. Wrong
choices are true of something else in the same text: none is unlikely in itself.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence

from probe_items import Item, Pool, shuffled

_ENTRY = re.compile(r"^([a-z]+) \((noun|verb|adjective|adverb)\): (.*)\.$", re.M)
_VERSE = re.compile(r"^(\d+) (.+)$", re.M)
_NAME = re.compile(
    r"^ *(function|class|method|data|attribute|exception|classmethod|coroutinefunction|"
    r"coroutinemethod) ([A-Za-z_][\w.]*)\.([A-Za-z]\w{2,})",
    re.M,
)


def meanings(documents: Sequence[str], generator: random.Random) -> Iterator[Item]:
    """ "abacus (noun):" and its first meaning, among first meanings of other words of its kind.

    No choice has the word's first four letters, and none is another meaning of the word or one that
    two words share.
    """
    entries = [found.groups() for text in documents for found in _ENTRY.finditer(text)]
    own: dict[str, set[str]] = defaultdict(set)
    for word, _, says in entries:
        own[word].update(says.split("; "))
    asked = [(word, kind, says.split("; ")[0]) for word, kind, says in entries]
    asked = [entry for entry in asked if 15 <= len(entry[2]) <= 90]
    shared = Counter(says for _, _, says in asked)
    asked = [entry for entry in asked if shared[entry[2]] == 1]
    pool = Pool((kind, f" {says}", word) for word, kind, says in asked)
    for word, kind, says in _mixed(asked, generator):
        stem = word[:4]
        fits = lambda text, _, word=word, stem=stem: text[1:] not in own[word] and stem not in text
        if stem in says:
            continue
        if wrong := pool.like(generator, kind, f" {says}", fits):
            yield shuffled(generator, f"{word} ({kind}):", f" {says}", wrong)


def verses(documents: Sequence[str], generator: random.Random) -> Iterator[Item]:
    """The beginning of a verse and its end, among ends of other verses.

    A verse is cut at the comma, colon or semicolon nearest to its middle; wrong ends follow the
    same sign. Beginnings and ends that stand in the Bible more than once are not asked.
    """
    halves = []
    for text in documents:
        for number, verse in _VERSE.findall(text):
            cuts = [found.end() for found in re.finditer(r"[,:;](?= [a-z])", verse)]
            if cuts and 60 <= len(verse) <= 200:
                cut = min(cuts, key=lambda at: (abs(at - len(verse) // 2), at))
                halves.append((number, verse[:cut], verse[cut:]))
    begins = Counter(begin for _, begin, _ in halves)
    ends = Counter(end for _, _, end in halves)
    asked = [
        (number, begin, end) for number, begin, end in halves
        if begins[begin] == ends[end] == 1 and len(begin) >= 25 and len(end) >= 15
    ]  # fmt: skip
    pool = Pool((begin[-1], end, begin) for _, begin, end in asked)
    fits = lambda *_: True
    for number, begin, end in _mixed(asked, generator):
        if wrong := pool.like(generator, begin[-1], end, fits):
            yield shuffled(generator, f"{number} {begin}", end, wrong)


def names(documents: Sequence[str], generator: random.Random) -> Iterator[Item]:
    """ "function json." and a name that the module or class has, among names of other modules.

    Wrong names are of the same kind (function, method, ..) and written like the right one (small
    letters, capitals, with or without underscores). Names that several top modules have are not
    among the choices, nor those that repeat a part of the module's name.
    """
    found = sorted({entry.groups() for text in documents for entry in _NAME.finditer(text)})
    tops: dict[str, set[str]] = defaultdict(set)
    for _, module, name in found:
        tops[name].add(module.split(".")[0])
    found = [entry for entry in found if len(tops[entry[2]]) == 1]
    pool = Pool(((kind, _look(name)), name, module.split(".")[0]) for kind, module, name in found)
    for kind, module, name in _mixed(found, generator):
        parts = [part[:4].lower() for part in re.findall(r"[A-Za-z]{3,}", module)]
        tells = lambda name, parts=parts: any(part in name.lower() for part in parts)
        fits = lambda name, owner, module=module, tells=tells: (
            owner != module.split(".")[0] and not tells(name)
        )
        if tells(name):
            continue
        if wrong := pool.like(generator, (kind, _look(name)), name, fits):
            yield shuffled(generator, f"{kind} {module}.", name, wrong)


def _look(name: str) -> tuple[bool, bool, bool]:
    return name.islower(), name.isupper(), "_" in name


def _mixed(entries: Sequence[tuple], generator: random.Random) -> list[tuple]:
    """Entries in a random order that does not depend on how the text is cut into documents."""
    return generator.sample(ordered := sorted(set(entries)), len(ordered))
