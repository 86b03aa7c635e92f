"""The real text of the federated study: found on the machine or in Debian packages, as documents.

    python examples/federated/sources.py DIR

makes DIR with a file for each domain, `NAME.txt` (UTF-8; a line with a form feed alone stands
between documents), and sources.json, which says what each is, where it is from and under which
licence. A package that the machine has is read where it is; others are fetched from the machine's
Debian mirror and unpacked beside, without installing anything. Stop it when you like: the same
command goes on with the domains that are missing, and DIR appears when all are there.

Only texts whose licence lets a model that was trained on them be shipped are taken: public domain,
CC0, and permissive licences.
"""

from __future__ import annotations

import json
import os
import platform
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import source_code
import source_proofs
import source_prose
import source_sums
from source_packages import Packages
from source_shapes import chosen

from flexmore_kernels.checkpoint_folders import refuse_existing
from flexmore_kernels.checkpoint_writer import write_json, write_text
from flexmore_kernels.progress import Progress

SEPARATOR = "\n\x0c\n"
FACTS = "sources.json"
FORMAT = 1
"""Of the texts: what an older one left half done is made anew."""


class Part(NamedTuple):
    """A text of a domain: a package, a file that it has to have, and what makes documents of it."""

    package: str
    needed: str
    read: Callable[[Path], Iterator[str]]


class Source(NamedTuple):
    """A domain. most: bytes of it that are taken; first: from its begin, not from all of it."""

    title: str
    what: str
    licence: str
    parts: tuple[Part, ...]
    most: int = 5_000_000
    first: bool = False
    synthetic: bool = False


SOURCES = {
    "english": Source(
        "General English",
        "Jane Austen's six novels, the Jargon File, Ambrose Bierce's Devil's Dictionary",
        "Public domain: the novels (1811 to 1818) and the Devil's Dictionary (1911) because their "
        "copyright has expired, the Jargon File because its authors say so.",
        (Part("r-cran-janeaustenr", "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb",
              source_prose.novels),
         Part("jargon-text", "usr/share/doc/jargon-text/jargon.txt.gz", source_prose.jargon),
         Part("dict-devil", "usr/share/dictd/devil.dict.dz", source_prose.devil)),
        most=6_000_000,
    ),
    "scripture": Source(
        "King James Bible", "all 1,189 chapters of the King James Version, a verse a line",
        "Public domain: the translation is of 1611 and its copyright has expired; the package says "
        "that Chip Chapin's file of it may be copied, modified and distributed at will.",
        (Part("bible-kjv-text", "usr/lib/bible.data", source_prose.scripture),),
    ),
    "dictionary": Source(
        "WordNet", "English words with up to three of their meanings, the most used words first",
        "WordNet 3.0 licence: permits use, copying, modification and distribution for any purpose "
        "without fee, where its notice goes along. WordNet 3.0, Copyright 2006 by Princeton "
        "University, all rights reserved.",
        (Part("wordnet-base", "usr/share/wordnet/data.noun", source_prose.dictionary),),
    ),
    "python": Source(
        "Python code", "the source of Python's standard library, without its tests",
        "PSF licence version 2 (some files add permissive notices of their own): permits use, "
        "modification and distribution, where the notice of copyright goes along. Copyright 2001 "
        "onwards, Python Software Foundation.",
        (Part("", "", source_code.python),),
    ),
    "docs": Source(
        "Python reference", "the reference of Python's standard library, each name with its module",
        "PSF licence version 2: permits use, modification and distribution, where the notice of "
        "copyright goes along. Copyright 2001 onwards, Python Software Foundation.",
        (Part("python3-doc", "usr/share/doc/python3.*/html/_sources/library/json.rst.txt",
              source_code.python_docs),),
        most=4_000_000,
    ),
    "proofs": Source(
        "Metamath proofs", "theorems of set.mm with the steps of their proofs, from its begin on",
        "CC0 1.0: its authors gave set.mm to the public domain.",
        (Part("metamath-databases", source_proofs.FILE, source_proofs.proofs),),
        most=6_000_000, first=True,
    ),
    "arithmetic": Source(
        "Arithmetic", "sums, differences and products, made at random",
        "No rights: made by this program.",
        (Part("", "", lambda _: source_sums.sums()),),
        synthetic=True,
    ),
    "sqlite": Source(
        "SQLite documentation", "the pages of SQLite's documentation, as text",
        "Public domain: the authors of SQLite gave it there.",
        (Part("sqlite3-doc", "usr/share/doc/sqlite3/lang_select.html", source_code.sqlite_docs),),
        most=4_000_000,
    ),
}  # fmt: skip


def prepare(directory: Path, say: Callable[[str], None] | None = None) -> None:
    """Make the folder of texts, whole or not at all, or go on with one that was begun.

    say: is told how far it is; None for silence. Nothing is done where it is there already. Raises
    ValueError for a directory that holds something else; OSError that names the package which is
    missing, and what to do.
    """
    directory, say = Path(directory), say or (lambda _: None)
    if (directory / FACTS).is_file():
        say(f"{directory} is there already")
        return
    refuse_existing(directory)
    folder = directory.parent / f".{directory.name}.partial"
    folder.mkdir(parents=True, exist_ok=True)
    progress, facts = Progress(len(SOURCES), say), {}
    with Packages(say) as packages:
        for name, source in SOURCES.items():
            facts[name] = _kept(folder, name)
            if facts[name] is None:
                say(f"reading {source.title}")
                facts[name] = _made(folder, name, source, packages)
            progress.done(1, source.title)
    write_json(folder / FACTS, {"format": FORMAT, "domains": facts})
    for name in SOURCES:
        (folder / f"{name}.json").unlink(missing_ok=True)
    os.replace(folder, directory)
    total = sum(about["bytes"] for about in facts.values())
    say(f"{directory}: {total / 1e6:.1f} MB of text in {len(facts)} domains")


def _kept(folder: Path, name: str) -> dict[str, Any] | None:
    """What is known of a domain that an earlier run made."""
    try:
        about = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        size = (folder / f"{name}.txt").stat().st_size
    except (OSError, ValueError):
        return None
    same = about.get("format") == FORMAT and about.get("bytes") == size
    return {key: about[key] for key in about if key != "format"} if same else None


def _made(folder: Path, name: str, source: Source, packages: Packages) -> dict[str, Any]:
    """Write a domain's text, then what is known of it."""
    documents: list[str] = []
    origin = []
    for part in source.parts:
        if part.package:
            package = part.package
            if package == "python3-doc":  # an empty one that needs the one with the files
                package = packages.documents_of_python(part.needed)
            root, version = packages.root(package, part.needed)
            origin.append(f"Debian package {package} {version}")
        elif source.synthetic:
            root = Path()
            origin.append("made by this program")
        else:
            root = source_code.library()
            origin.append(f"Python {platform.python_version()}")
        documents.extend(_begin(part.read(root), source.most) if source.first else part.read(root))
    documents = chosen(documents, source.most)
    text = SEPARATOR.join(documents) + "\n"
    write_text(folder / f"{name}.txt", text)
    about = {
        "title": source.title, "what": source.what, "source": "; ".join(origin),
        "licence": source.licence, "synthetic": source.synthetic, "bytes": len(text.encode()),
        "documents": len(documents),
    }  # fmt: skip
    write_json(folder / f"{name}.json", {"format": FORMAT, **about})
    return about


def _begin(documents: Iterator[str], most: int) -> Iterator[str]:
    """The first documents, of no more than so many bytes."""
    for document in documents:
        most -= len(document.encode()) + len(SEPARATOR)
        if most < 0:
            return
        yield document


def main(arguments: Sequence[str] | None = None) -> int:
    """`python examples/federated/sources.py DIR`."""
    words = sys.argv[1:] if arguments is None else list(arguments)
    say = lambda text: print(f"sources: {text}", file=sys.stderr, flush=True)
    if len(words) != 1 or words[0].startswith("-"):
        print(__doc__)
        return 0 if words in (["-h"], ["--help"]) else 2
    try:
        prepare(Path(words[0]), say)
    except (OSError, ValueError) as error:
        say(str(error))
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
