"""The domains of a prepared folder, what is held out of each, and the public mix.

sources.py makes the folder.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from source_shapes import rank_of
from sources import FACTS, FORMAT, SEPARATOR

PUBLIC = "english"
"""The text that no expert has: the base's own."""

LATE = "sqlite"
"""The domain that joins last. Nothing is asked of it (probes.py), and its text, prose about a
language for data, is like that of two early domains, documentation and code, without being of
either: a router can be right or wrong about it."""

HELD_OUT, HELD_OUT_BYTES = 0.05, 65_536
PUBLIC_SHARE = 0.1
"""Of each early domain's training text: enough that the base has seen each kind of text, as a crawl
has some of everything; nine tenths of what an owner has stay the owner's."""


class Domain(NamedTuple):
    """One owner's text."""

    name: str
    title: str
    documents: list[str]
    licence: str
    synthetic: bool


def read_domains(directory: str | os.PathLike) -> dict[str, Domain]:
    """The domains that experts are trained on, in the folder's order; `read_public` gives the
    general English, which has no expert.

    Raises ValueError for a folder that is not one of prepared texts, and for an empty text.
    """
    names = [name for name in _facts(Path(directory)) if name != PUBLIC]
    return {name: _read(Path(directory), name) for name in names}


def read_public(directory: str | os.PathLike) -> Domain:
    """The general English of a prepared folder. Raises as `read_domains`."""
    return _read(Path(directory), PUBLIC)


def _facts(directory: Path) -> dict[str, dict]:
    accepted = "accepted: a folder that `python examples/federated/sources.py DIR` made"
    try:
        found = json.loads((directory / FACTS).read_text(encoding="utf-8"))
    except OSError:
        raise ValueError(f"texts: {directory} has no {FACTS}; {accepted}") from None
    except ValueError as error:
        raise ValueError(f"texts: {directory / FACTS} is not JSON ({error}); {accepted}") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"texts: {directory / FACTS} is of another format; {accepted}")
    return found["domains"]


def _read(directory: Path, name: str) -> Domain:
    facts = _facts(directory)
    if name not in facts:
        raise ValueError(f"texts: {directory} has no {name}; accepted: {', '.join(facts)}")
    path = directory / f"{name}.txt"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"texts: {error}; accepted: UTF-8 text in {path}") from error
    documents = [part for part in text.rstrip("\n").split(SEPARATOR) if part.strip()]
    if not documents:
        raise ValueError(f"texts: {path} is empty; accepted: one document or more")
    about = facts[name]
    return Domain(name, about["title"], documents, about["licence"], about["synthetic"])


def split(domain: Domain, seed: int = 0) -> tuple[list[str], list[str]]:
    """Documents to train on and documents that are held out, both in the domain's order.

    Held out are the documents whose hashes are lowest: 5 % of the bytes and at least 64 KB, but no
    more than a quarter. A document's hash is of its text and the seed alone, so the split is the
    same on every machine and for every seed of a training; another seed here gives another split.

    Raises ValueError for a domain of fewer than two documents.
    """
    documents = list(dict.fromkeys(domain.documents))
    if len(documents) < 2:
        raise ValueError(
            f"texts: {domain.name} has {len(documents)} documents; accepted: 2 or more"
        )
    sizes = {text: len(text.encode()) for text in documents}
    total = sum(sizes.values())
    left = min(max(HELD_OUT * total, HELD_OUT_BYTES), total / 4)
    held_out: set[str] = set()
    for text in sorted(documents, key=lambda text: rank_of(text, f"held out {seed}")):
        if left <= 0 or len(held_out) == len(documents) - 1:
            break
        held_out.add(text)
        left -= sizes[text]
    return [d for d in documents if d not in held_out], [d for d in documents if d in held_out]


def public_mix(
    domains: Mapping[str, Domain], late: str, general: Domain, *, share: float = PUBLIC_SHARE
) -> list[str]:
    """Documents that the base is trained on: all general English, and a share of each early domain.

    Of the late domain there is nothing, and of no domain what is held out. The share of a domain is
    by bytes, of the documents whose hashes are lowest. The documents are in an order by hash, so
    that any stretch of the mix has some of all.

    Raises ValueError for a late domain that is not there, and a share outside 0 .. 1.
    """
    if late not in domains:
        raise ValueError(f"late: got {late!r}; accepted: {', '.join(domains)}")
    if not 0 <= share <= 1:
        raise ValueError(f"share: got {share}; accepted: 0 to 1")
    mix = split(general)[0]
    for name, domain in domains.items():
        if name == late:
            continue
        train = split(domain)[0]
        left = share * sum(len(text.encode()) for text in train)
        for text in sorted(train, key=lambda text: rank_of(text, "public")):
            left -= len(text.encode())
            if left < 0:
                break
            mix.append(text)
    return sorted(mix, key=lambda text: rank_of(text, "mixed"))
