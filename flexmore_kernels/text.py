"""Text from and to token ids, by a checkpoint's tokenizer.json and the `tokenizers` package."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

TOKENIZER_FILE = "tokenizer.json"
_CUT = "\ufffd"  # how a decoder shows bytes of a character that are not all there
_LONGEST = 4  # bytes of a character, and so ids that can still become one


def read_tokenizer(
    directory: str | os.PathLike,
    needed: bool = True,
    *,
    argument: str = "prompt",
    instead: str = "prompts as --ids",
) -> Any:
    """The directory's `tokenizers.Tokenizer`; None if it cannot be had and is not needed.

    argument, instead: for messages, what text came as and what is accepted in its place.

    Raises ValueError that says what is missing where it is needed, or what is wrong with the file.
    """
    path = Path(directory) / TOKENIZER_FILE
    if not path.is_file():
        if needed:
            raise ValueError(f"{TOKENIZER_FILE}: missing in {directory}; accepted: {instead}")
        return None
    try:
        from tokenizers import Tokenizer
    except ImportError:
        if needed:
            raise ValueError(
                f"{argument}: got text, which needs `pip install tokenizers`; accepted: {instead}"
            ) from None
        return None
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the package raises nothing more special
        raise ValueError(f"{TOKENIZER_FILE}: not a tokenizer ({error})") from error


def ids_of(text: str) -> list[int]:
    """ "5,17,3" as integers >= 0."""
    try:
        ids = [int(part) for part in text.split(",")]
    except ValueError:
        ids = [-1]
    if min(ids) < 0:
        raise ValueError(f"ids: got {text!r}; accepted: integers >= 0 between commas")
    return ids


class Pieces:
    """Text of ids that come one at a time: what each adds, whole characters alone.

    A token's text depends on those before it (spaces, characters of several tokens), so each piece
    is what decoding the last tokens gives beyond decoding those already shown. Without a tokenizer,
    the ids themselves.
    """

    def __init__(self, tokenizer: Any = None) -> None:
        self.tokenizer = tokenizer
        self._ids: list[int] = []
        self._shown, self._from = 0, 0  # ids that are out; where decoding begins

    def add(self, token: int) -> str:
        """What this id adds to the text; "" while a character is not complete."""
        if self.tokenizer is None:
            self._ids.append(token)
            return f"{token} "
        self._ids.append(token)
        return self._piece(whole=True)

    def rest(self) -> str:
        """What is left when no more ids come."""
        return "" if self.tokenizer is None else self._piece(whole=False)

    def _piece(self, whole: bool) -> str:
        before = self.tokenizer.decode(self._ids[self._from : self._shown])
        now = self.tokenizer.decode(self._ids[self._from :])
        waits = whole and now.endswith(_CUT) and len(self._ids) - self._shown < _LONGEST
        if waits or len(now) <= len(before):
            return ""
        self._from, self._shown = self._shown, len(self._ids)
        return now[len(before) :]
