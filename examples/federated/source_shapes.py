"""Text as documents: cleaned, cut into pieces of sensible length, as many as a domain may have."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Sequence

PIECE = 4000
"""Characters that a document has at most, where its text can be cut there."""


def clean(text: str) -> str:
    """Text with plain line ends, spaces for tabs, no form feed and no control characters, no spaces
    at the ends of lines, and one empty line where there were more."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ").expandtabs(4)
    text = re.sub(r"[\x00-\x09\x0b-\x1f\x7f\ufeff]", "", text)
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" +$", "", text, flags=re.M)).strip("\n")


def joined(parts: Sequence[str], between: str, limit: int = PIECE) -> list[str]:
    """Neighbours put together as long as they stay within the limit; what is longer stays alone."""
    found: list[str] = []
    for part in parts:
        if found and len(found[-1]) + len(between) + len(part) <= limit:
            found[-1] += between + part
        else:
            found.append(part)
    return found


def pieces(text: str, limit: int = PIECE) -> list[str]:
    """A cleaned text cut at empty lines, and at ends of lines where a paragraph is too long."""
    parts: list[str] = []
    for paragraph in text.split("\n\n"):
        if len(paragraph) > limit:
            parts.extend(joined(paragraph.split("\n"), "\n", limit))
        else:
            parts.append(paragraph)
    return joined([part for part in parts if part.strip()], "\n\n", limit)


def rank_of(document: str, salt: str) -> bytes:
    """Where a document comes in an order that depends on its text and the salt alone."""
    return hashlib.sha256(f"{salt}\n{document}".encode()).digest()


def chosen(documents: Iterable[str], limit: int) -> list[str]:
    """Each document once, in their order, and of more than `limit` bytes those whose hashes are
    lowest."""
    kept = [text for text in dict.fromkeys(documents) if text.strip()]
    sizes = {text: len(text.encode()) for text in kept}
    if sum(sizes.values()) <= limit:
        return kept
    taken, left = set(), limit
    for text in sorted(kept, key=lambda text: rank_of(text, "chosen")):
        if sizes[text] <= left:
            taken.add(text)
            left -= sizes[text]
        elif left < PIECE:
            break
    return [text for text in kept if text in taken]
