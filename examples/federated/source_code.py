"""Text about programs: Python's own library, its documentation, SQLite's documentation."""

from __future__ import annotations

import re
import sysconfig
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

from source_shapes import PIECE, clean, joined, pieces

_LEFT_OUT = {
    "__pycache__", "site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3",
    "turtledemo", "distutils", "ensurepip", "encodings", "pydoc_data", "lib-dynload",
}  # fmt: skip
"""Folders of the library: tests, tables, what is no part of it on every machine."""


def library() -> Path:
    """Where the running Python keeps its library."""
    return Path(sysconfig.get_path("stdlib"))


def python(root: Path) -> Iterator[str]:
    """Python's library, cut between classes, functions and methods; a comment names the file."""
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _LEFT_OUT & set(place.parts) or place.parts[0].startswith(("config-", "_sysconfigdata")):
            continue
        try:
            text = clean(path.read_text(encoding="utf-8"))
        except UnicodeDecodeError:
            continue
        for part in code_pieces(without_notice(text)):
            lines = part.split("\n")
            digits = sum(map(str.isdigit, part))
            if len(part) >= 200 and max(map(len, lines)) < 200 and digits < len(part) // 5:
                yield f"# {place.as_posix()}\n{part}"


def without_notice(text: str) -> str:
    """Code without the comments at its begin where they are of copyright."""
    notice = re.match(r"(?:[ ]*(?:#.*)?\n)+", text)
    if notice and re.search(r"copyright|licen[sc]e|permission", notice.group(), re.I):
        return text[notice.end() :]
    return text


def code_pieces(text: str, limit: int = PIECE) -> list[str]:
    """Code cut before definitions: those that begin a line, and methods where a class is long."""
    parts: list[str] = []
    for part in _before_definitions(text, ""):
        if len(part) <= limit:
            parts.append(part)
            continue
        for inner in joined(_before_definitions(part, "    "), "\n", limit):
            parts.extend([inner] if len(inner) <= limit else pieces(inner, limit))
    return joined([part.strip("\n") for part in parts if part.strip()], "\n\n\n", limit)


def _before_definitions(text: str, indent: str) -> list[str]:
    """Code cut before its definitions of this depth, decorators with what they decorate."""
    begins = re.compile(rf"{indent}(?:@|def |class |async def |if __name__)")
    parts, decorated = [[]], False
    for line in text.split("\n"):
        if begins.match(line):
            if not decorated:
                parts.append([])
            decorated = line.startswith(f"{indent}@")
        elif not line.strip():
            decorated = False
        parts[-1].append(line)
    return ["\n".join(part) for part in parts if part]


_NAMED = re.compile(
    r"( *)\.\. (?:py:)?(function|class|method|attribute|data|exception|decorator|classmethod|"
    r"staticmethod|coroutinefunction|coroutinemethod|abstractmethod):: (.*)"
)
_INNER = {"method", "attribute", "classmethod", "staticmethod", "coroutinemethod", "abstractmethod"}
_SAID = re.compile(
    r"( *)\.\. (note|warning|seealso|rubric|important|impl-detail|cmdoption|opcode|describe|"
    r"pdbcommand)::(.*)"
)
_CHANGED = re.compile(r"( *)\.\. (?:version)?(added|changed|deprecated)::\s*(\S*)(.*)")
_SHOWN = re.compile(r" *\.\. (?:code-block|doctest|testcode|testoutput|productionlist)::")


def python_docs(root: Path) -> Iterator[str]:
    """The reference of Python's library, in which every name is written with its module."""
    folder = next(root.glob("usr/share/doc/python3.*/html/_sources/library"))
    for path in sorted(folder.glob("*.rst.txt")):
        for part in pieces(reference_text(clean(path.read_text(encoding="utf-8")))):
            if len(part) >= 200:
                yield part


def reference_text(text: str) -> str:
    """reStructuredText as prose: `.. function:: dump(obj)` in the module json becomes
    "function json.dump(obj)"; comments, other directives and markup are left out."""
    module, holder, holder_depth, out = "", "", -1, []
    skip = None  # the depth of what is left out, with all that is deeper
    for line in re.sub(r" *\\\n *", " ", text).split("\n"):
        depth = len(line) - len(line.lstrip(" "))
        if skip is not None and (not line.strip() or depth > skip):
            continue
        skip = None
        if found := re.match(r" *\.\. (?:current)?module:: *(\S+)", line):
            module, skip = found[1], depth
        elif found := _NAMED.match(line):
            kind, name = found[2], found[3]
            if kind in ("class", "exception"):
                holder, holder_depth = re.split(r"[( ]", name)[0], depth
            inside = kind in _INNER and depth > holder_depth >= 0
            if inside and "." not in name.split("(")[0]:
                name = f"{holder}.{name}"
            if module and not name.startswith(f"{module}."):
                name = f"{module}.{name}"
            out.append(f"{found[1]}{kind} {name}")
        elif found := _CHANGED.match(line):
            out.append(f"{found[1]}{found[2]} in version {found[3]}:{found[4]}")
        elif found := _SAID.match(line):
            out.append(f"{found[1]}{found[2]}:{found[3]}")
        elif _SHOWN.match(line):
            out.append("")
        elif line.lstrip().startswith(".. "):
            skip = depth
        elif not re.match(r" *:(?:synopsis|platform|deprecated|noindex|module|option)", line):
            out.append(line)
    return clean(_without_markup("\n".join(out)))


def _without_markup(text: str) -> str:
    text = re.sub(r":[a-z:+-]+:`[~!]?([^`<]*?)(?:\s*<[^`>]*>)?`", r"\1", text)
    text = re.sub(r"``([^`]*)``", r"\1", text)
    text = re.sub(r"`([^`<]*?)\s*<[^`>]*>`_+", r"\1", text)
    text = re.sub(r"^ *([=\-*^~\"#+])\1{3,} *$", "", text, flags=re.M)
    return re.sub(r"\*\*?([A-Za-z_][\w.]*)\*\*?", r"\1", text)


class _Page(HTMLParser):
    """What a page of SQLite's documentation says: its title and text, without the site around."""

    SILENT = {"script", "style", "svg", "head", "button", "form"}
    APART = {"p", "pre", "h1", "h2", "h3", "h4"}
    BLOCKS = {*APART, "div", "li", "tr", "table", "ul", "ol", "dt", "dd", "blockquote", "center",
              "hr"}  # fmt: skip

    def __init__(self, text: str) -> None:
        super().__init__()
        self.parts: list[str] = []
        self._silent: list[str] = []  # tags that are open from where nothing is read
        self._exact = 0
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        classes = dict(attrs).get("class") or ""
        if self._silent:
            if tag == self._silent[0]:
                self._silent.append(tag)
        elif tag in self.SILENT or classes in ("nosearch", "imgcontainer", "fancy_toc"):
            self._silent.append(tag)
        elif tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in self.APART else "\n")
            self._exact += tag == "pre"
        elif tag in ("br", "td", "th"):
            self.parts.append("\n" if tag == "br" else " ")

    def handle_endtag(self, tag: str) -> None:
        if self._silent:
            if tag == self._silent[0]:
                self._silent.pop()
        elif tag in self.BLOCKS:
            self.parts.append("\n\n" if tag in self.APART else "\n")
            self._exact -= tag == "pre" and self._exact > 0

    def handle_data(self, data: str) -> None:
        if not self._silent:
            words = data if self._exact else re.sub(r"\s+", " ", data)
            begins = not self.parts or self.parts[-1].endswith("\n")
            self.parts.append(words.lstrip(" ") if begins and not self._exact else words)


def sqlite_docs(root: Path) -> Iterator[str]:
    """SQLite's documentation: pages of text, without indexes, diagrams and what two pages share."""
    folder = root / "usr/share/doc/sqlite3"
    seen: set[str] = set()
    for path in sorted(folder.rglob("*.html")):
        place = path.relative_to(folder)
        index = r"crossref|keyword_index|requirements|syntaxdiagrams|capi3ref|matrix"
        if re.search(index, place.name) or place.parts[0] in ("images", "search.d", "syntax"):
            continue
        own = []
        for paragraph in page_text(path.read_text(encoding="utf-8")).split("\n\n"):
            if len(paragraph) < 80 or paragraph not in seen:
                own.append(paragraph)
            seen.add(paragraph)
        for part in pieces("\n\n".join(own)):
            if len(part) >= 300:
                yield part


def page_text(text: str) -> str:
    """The text of one page of HTML."""
    return clean("".join(_Page(text).parts))
