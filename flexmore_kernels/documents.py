"""Documents of a file or a folder: what a domain embedding is the mean of, and routers learn by."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path


def read_documents(path: str | os.PathLike, most: int | None = None) -> list[str]:
    """The documents of a path, in order, at most the first `most`; each has more than white space.

    A folder: each file in it or below, by name, without hidden ones, is a document. A .jsonl file:
    each line is an object whose "text" is one. A .txt file: what form feeds part, or blank lines
    where there is no form feed. Any other file is one document. Files and parts of white space
    alone are left out.

    Raises FileNotFoundError; ValueError for what is not UTF-8, a line of another kind, a line whose
    text is empty, or where no document is left.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"documents: no file or folder {path}")
    if path.is_dir():
        files = sorted(file for file in path.rglob("*") if file.is_file())
        shown = [f for f in files if not any(p.startswith(".") for p in f.relative_to(path).parts)]
        found = []
        for file in shown:
            if most is not None and len(found) >= most:
                break
            found += _not_blank([_read(file)])
    elif path.suffix == ".jsonl":
        found = [_line(path, number, line) for number, line in enumerate(_read(path).split("\n"), 1)
                 if line.strip()]  # fmt: skip
    elif path.suffix == ".txt":
        text = _read(path)
        found = _not_blank(text.split("\f") if "\f" in text else re.split(r"\n[^\S\n]*\n", text))
    else:
        found = _not_blank([_read(path)])
    if not found:
        raise ValueError(f"documents: {path} holds no text; accepted: one document or more")
    return found if most is None else found[:most]


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"documents: {path} is not UTF-8 ({error}); accepted: text") from None


def _not_blank(parts: list[str]) -> list[str]:
    return [part for part in parts if part and not part.isspace()]


def _line(path: Path, number: int, line: str) -> str:
    try:
        text = json.loads(line)["text"]
    except (json.JSONDecodeError, KeyError, TypeError, IndexError):
        text = None
    if not isinstance(text, str) or not text or text.isspace():
        raise ValueError(
            f'documents: {path}, line {number}: accepted: {{"text": "..."}}, with more than white '
            "space"
        )
    return text
