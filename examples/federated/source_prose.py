"""English text from Debian packages: novels and two witty dictionaries, the King James Bible, and
WordNet as a dictionary."""

from __future__ import annotations

import gzip
import itertools
import re
import subprocess
import zlib
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from source_shapes import clean, joined, pieces, rank_of

_STRINGS, _STRING = 16, 9
"""R's numbers of a character vector and of its elements."""

_BOOKS = (
    "Genesis,Exodus,Leviticus,Numbers,Deuteronomy,Joshua,Judges,Ruth,1 Samuel,2 Samuel,1 Kings,"
    "2 Kings,1 Chronicles,2 Chronicles,Ezra,Nehemiah,Esther,Job,Psalm,Proverbs,Ecclesiastes,"
    "Song of Solomon,Isaiah,Jeremiah,Lamentations,Ezekiel,Daniel,Hosea,Joel,Amos,Obadiah,Jonah,"
    "Micah,Nahum,Habakkuk,Zephaniah,Haggai,Zechariah,Malachi,Matthew,Mark,Luke,John,Acts,Romans,"
    "1 Corinthians,2 Corinthians,Galatians,Ephesians,Philippians,Colossians,1 Thessalonians,"
    "2 Thessalonians,1 Timothy,2 Timothy,Titus,Philemon,Hebrews,James,1 Peter,2 Peter,1 John,"
    "2 John,3 John,Jude,Revelation"
)

KINDS = {"noun": "noun", "verb": "verb", "adj": "adjective", "adv": "adverb"}
"""WordNet's files and what they hold."""

DICTIONARY_BYTES = 2_500_000


def r_strings(data: bytes) -> list[str]:
    """The elements of a character vector as R writes it (serialize: XDR, version 3)."""
    place = 18 + int.from_bytes(data[14:18], "big")  # after the name of the encoding
    if data[:2] != b"X\n" or data[place + 3] != _STRINGS:
        raise ValueError("novels: got another kind of R object; accepted: a character vector")
    count = int.from_bytes(data[place + 4 : place + 8], "big")
    place += 8
    found = []
    for _ in range(count):
        if data[place + 3] != _STRING:
            raise ValueError("novels: got another kind of R element; accepted: strings")
        end = place + 8 + int.from_bytes(data[place + 4 : place + 8], "big")
        found.append(data[place + 8 : end].decode())
        place = end
    return found


def novels(root: Path) -> Iterator[str]:
    """Jane Austen's six novels. R keeps each as 4 bytes of size and a zlib stream."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        stream = zlib.decompressobj()
        lines = r_strings(stream.decompress(data[4:]))
        data = stream.unused_data
        yield from pieces(clean("\n".join(lines)))


def without_contents(text: str) -> str:
    """A text without its tables of contents: five or more paragraphs in a row of a few words."""
    kept: list[str] = []
    short = lambda part: len(part) < 50 and "\n" not in part and not part.endswith((".", ":", "”"))
    for brief, run in itertools.groupby(text.split("\n\n"), short):
        parts = list(run)
        if not brief or len(parts) < 5:
            kept.extend(parts)
    return "\n\n".join(kept)


def jargon(root: Path) -> Iterator[str]:
    """The Jargon File, from its first chapter on."""
    data = (root / "usr/share/doc/jargon-text/jargon.txt.gz").read_bytes()
    text = clean(gzip.decompress(data).decode())
    text = text[text.index("\nChapter 1. Hacker Slang") :]
    text = re.sub(r"^ *[\u2550_=-]{20,}$", "", text, flags=re.M)
    yield from pieces(without_contents(clean(re.sub(r"^ {2,3}(?=\S)", "", text, flags=re.M))))


def devil(root: Path) -> Iterator[str]:
    """The Devil's Dictionary."""
    data = (root / "usr/share/dictd/devil.dict.dz").read_bytes()
    text = gzip.decompress(data).decode("latin-1")
    yield from pieces(clean(text[text.index("PREFACE") :]))


def scripture(root: Path) -> Iterator[str]:
    """Chapters of the King James Bible: a title, then a line for each verse, its number first.

    The file is: 88 bytes, the number of parts, where each begins, their data. A part is as Unix
    `compress` writes it, without its three first bytes; gzip reads that.
    """
    data = (root / "usr/lib/bible.data").read_bytes()
    if data[:4] != b"EC02":
        raise ValueError("bible.data: got another format; accepted: EC02")
    count = int.from_bytes(data[88:92], "big")
    begin = [int.from_bytes(data[i : i + 4], "big") for i in range(92, 92 + 4 * count, 4)]
    text = b""
    for first, last in itertools.pairwise([*begin, len(data)]):
        part = b"\x1f\x9d\x90" + data[first:last]
        text += subprocess.run(["gzip", "-dc"], input=part, capture_output=True, check=True).stdout
    yield from chapters(text.decode("latin-1").splitlines()[1:])


def chapters(lines: Sequence[str]) -> Iterator[str]:
    """Lines "Ge1:1 In the beginning ..", in the Bible's order, as chapters."""
    found: dict[tuple[str, str], list[str]] = defaultdict(list)
    for line in lines:
        book, chapter, verse, words = re.fullmatch(r"(\w+?)(\d+):(\d+) (.*)", line).groups()
        found[book, chapter].append(f"{verse} {clean(words).strip()}")
    names = dict(zip(dict.fromkeys(book for book, _ in found), _BOOKS.split(","), strict=True))
    for (book, chapter), verses in found.items():
        yield "\n".join([f"{names[book]} {chapter}", *verses])


def dictionary(root: Path) -> Iterator[str]:
    """Pages of WordNet: words in the alphabet's order, each kind of a word with its meanings.

    The words that WordNet's texts use most come first until there is enough of them, then any.
    """
    folder = root / "usr/share/wordnet"
    used: dict[str, int] = defaultdict(int)
    for line in (folder / "cntlist.rev").read_text().splitlines():
        sense, _, times = line.split()
        used[sense.split("%")[0]] += int(times)
    entries: dict[str, list[str]] = defaultdict(list)
    for name, kind in KINDS.items():
        for word, entry in _entries(folder, name, kind):
            entries[word].append(entry)
    left, taken = DICTIONARY_BYTES, []
    for word in sorted(entries, key=lambda word: (-used[word], rank_of(word, "dictionary"))):
        size = len("\n".join(entries[word]).encode())
        if size > left:
            break
        left -= size
        taken.append(word)
    yield from joined(["\n".join(entries[word]) for word in sorted(taken)], "\n", 2000)


def _entries(folder: Path, name: str, kind: str) -> Iterator[tuple[str, str]]:
    """Words of small letters, and "abacus (noun): a calculator that ..; a tablet placed .."."""
    glosses = {}
    for line in (folder / f"data.{name}").read_text().splitlines():
        if not line.startswith(" "):
            gloss = line.partition("|")[2].strip()
            meaning = re.split(r"[;:,]?\s*\"", gloss)[0]  # what follows are examples
            glosses[line[:8]] = re.sub(r"\s+", " ", meaning.split(";")[0]).strip()
    for line in (folder / f"index.{name}").read_text().splitlines():
        word, _, _, pointers, *rest = line.split() if not line.startswith(" ") else ["."] * 4
        if not re.fullmatch(r"[a-z]{3,}", word):
            continue
        places = rest[int(pointers) + 2 :]
        meanings = list(dict.fromkeys(glosses[place] for place in places[:3] if glosses[place]))
        if meanings:
            yield word, f"{word} ({kind}): {'; '.join(meanings)}."
