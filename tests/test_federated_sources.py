"""examples/federated/: how packages' files become documents, and the folder that is made of them.

Traps covered: folders that are half written, machine paths in what is kept, packages that are not
there.
"""

from __future__ import annotations

import itertools
import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/federated"))
import probe_reasoning  # noqa: E402
import source_code  # noqa: E402
import source_packages  # noqa: E402
import source_proofs  # noqa: E402
import source_prose  # noqa: E402
import source_sums  # noqa: E402
import sources  # noqa: E402
import texts  # noqa: E402


def test_strings_of_r():
    vector = [b"Emma", b"", "caf\u00e9".encode()]
    data = b"X\n" + bytes(12) + (5).to_bytes(4, "big") + b"UTF-8"
    data += bytes([0, 0, 0, 16]) + len(vector).to_bytes(4, "big")
    for text in vector:
        data += bytes([0, 4, 0, 9]) + len(text).to_bytes(4, "big") + text
    assert source_prose.r_strings(data) == ["Emma", "", "caf\u00e9"]
    with pytest.raises(ValueError, match="character vector"):
        source_prose.r_strings(data.replace(bytes([0, 0, 0, 16]), bytes([0, 0, 0, 13])))


def test_bible_of_two_parts(tmp_path):
    def packed(text: bytes) -> bytes:  # as LZW without a single repetition found: 9 bits a byte
        bits = sum(byte << 9 * i for i, byte in enumerate(text))
        return bits.to_bytes(-(-9 * len(text) // 8), "little")

    parts = [packed(b"Title\nGe1:1 In the "), packed(b"beginning.\nGe1:2 And.\nEx1:1 Now.\n")]
    begins = [100, 100 + len(parts[0])]
    head = b"EC02".ljust(88, b"\0") + (2).to_bytes(4, "big")
    head += b"".join(at.to_bytes(4, "big") for at in begins)
    path = tmp_path / "usr/lib/bible.data"
    path.parent.mkdir(parents=True)
    path.write_bytes(head + parts[0] + parts[1])
    source_prose._BOOKS, books = "Genesis,Exodus", source_prose._BOOKS
    try:
        found = list(source_prose.scripture(tmp_path))
    finally:
        source_prose._BOOKS = books
    assert found == ["Genesis 1\n1 In the beginning.\n2 And.", "Exodus 1\n1 Now."]
    path.write_bytes(b"EC03" + head[4:])
    with pytest.raises(ValueError, match="EC02"):
        list(source_prose.scripture(tmp_path))


def test_dictionary_of_wordnet(tmp_path):
    folder = tmp_path / "usr/share/wordnet"
    folder.mkdir(parents=True)
    for kind in source_prose.KINDS:
        (folder / f"data.{kind}").write_text("")
        (folder / f"index.{kind}").write_text("")
    (folder / "cntlist.rev").write_text("abacus%1:06:00:: 1 20\n")
    (folder / "data.noun").write_text(
        "  1 a licence | of words\n"
        '00000001 04 n 01 x 0 000 | a frame of beads; one more; "he took it"  \n'
        "00000002 04 n 01 x 0 000 | a slab  \n"
    )
    (folder / "index.noun").write_text(
        "  1 a licence\nabacus n 2 1 @ 2 1 00000001 00000002  \nad_hoc n 1 0 1 0 00000002  \n"
    )
    assert list(source_prose.dictionary(tmp_path)) == ["abacus (noun): a frame of beads; a slab."]


def test_contents_are_left_out_and_short_paragraphs_are_not():
    listed = "\n\n".join(["ABEND", "ACK", "Acme", "AFK", "alpha"])
    assert source_prose.without_contents(f"Text.\n\n{listed}\n\nMore.") == "Text.\n\nMore."
    assert source_prose.without_contents("Text.\n\nACK\n\nMore.") == "Text.\n\nACK\n\nMore."


def test_code_is_cut_before_definitions_and_decorators_stay():
    text = "import a\n\n\n@x(\n    1,\n)\n@y\ndef f():\n    pass\n\n\nclass C:\n    x = 1"
    assert [part.split("\n")[0] for part in source_code.code_pieces(text, 40)] == [
        "import a", "@x(", "class C:",
    ]  # fmt: skip
    assert source_code.code_pieces(text) == [text]
    assert source_code.without_notice("# Copyright me\n#\n\nx = 1") == "x = 1"
    assert source_code.without_notice("# Notes\nx = 1") == "# Notes\nx = 1"


def test_reference_names_things_with_their_module():
    text = """:mod:`json` --- JSON
===================

.. module:: json
   :synopsis: Left out.

.. function:: dump(obj, *, \\
                   indent=None)

   Write *obj* by :func:`~io.write` with ``indent``.

.. class:: Encoder

   .. method:: encode(o)

.. audit-event:: left out

   And this.

Kept.
"""
    found = source_code.reference_text(text)
    assert "function json.dump(obj, *, indent=None)" in found
    assert "Write obj by io.write with indent." in found
    assert "class json.Encoder\n\n   method json.Encoder.encode(o)" in found
    assert found.endswith("Kept.") and "eft out" not in found and "And this" not in found


def test_page_of_html():
    page = (
        "<html><head><title>x</title></head><body><div class=nosearch><div>menu</div></div>"
        "<script>no()</script><h1>DELETE</h1><p>The\n statement &amp; <b>more</b>.</p>"
        "<pre>a\n  b</pre><svg><text>no</text></svg></body></html>"
    )
    assert source_code.page_text(page) == "DELETE\n\nThe statement & more.\n\na\n  b"


MM = """$( A toy. $) $c |- wff ( ) -> $. $v ph ps ch $.
wph $f wff ph $. wps $f wff ps $. wch $f wff ch $.
wi $a wff ( ph -> ps ) $.
ax-1 $a |- ( ph -> ( ps -> ph ) ) $.
${ min $e |- ph $. maj $e |- ( ph -> ps ) $. ax-mp $a |- ps $. $}
${ a1i.1 $e |- ph $.
$( Inference introducing an antecedent. (Contributed by NM, 29-Dec-1992.) $)
a1i $p |- ( ps -> ph ) $= ( wi ax-1 ax-mp ) ABADCABEF $. $}
"""


def test_proofs_of_metamath(tmp_path):
    path = tmp_path / source_proofs.FILE
    path.parent.mkdir(parents=True)
    path.write_text(MM)
    assert list(source_proofs.proofs(tmp_path)) == [
        "theorem a1i: Inference introducing an antecedent.\ngiven a1i.1: ph\nprove: ( ps -> ph )\n"
        "1. a1i.1: ph\n2. ax-1: ( ph -> ( ps -> ph ) )\n3. ax-mp 1 2: ( ps -> ph )"
    ]
    path.write_text(MM.replace("a1i $p |- ( ps -> ph )", "a1i $p |- ( ps -> ps )"))
    with pytest.raises(ValueError, match="proof of a1i proves something else"):
        list(source_proofs.proofs(tmp_path))
    path.write_text(MM.replace("ABADCABEF", "ADCABEF"))
    with pytest.raises(ValueError, match="premises in the proof of a1i"):
        list(source_proofs.proofs(tmp_path))


def test_sums_are_right_and_some_pairs_never_occur():
    lines = "\n".join(list(itertools.islice(source_sums.sums(), 50))).split("\n")
    for line in lines:
        asked, result = line.split(" = ")
        assert eval(asked) == int(result)
    pairs = probe_reasoning.facts_of("\n".join(lines))
    assert len(pairs) > 1000 and not any(source_sums.is_kept_out(a, b, s) for a, b, s in pairs)
    assert source_sums.is_kept_out(3, 9, "*") == source_sums.is_kept_out(9, 3, "*")


# The prepared folder


def part(read) -> tuple[sources.Part, ...]:
    return (sources.Part("", "", read),)


def test_prepared_whole_and_resumed(tmp_path, monkeypatch):
    read = []

    def good(_):
        read.append("one")
        return iter(["a b", "c\n\nd", "a b"])

    def bad(_):
        raise OSError("package nothing: cannot be had")

    one = sources.Source("One", "x", "none", part(good))
    monkeypatch.setattr(sources, "SOURCES", {"one": one, "two": one._replace(parts=part(bad))})
    out = tmp_path / "texts"
    with pytest.raises(OSError, match="package nothing"):
        sources.prepare(out)
    assert not out.exists()
    two = one._replace(parts=part(lambda _: iter(["e"])), synthetic=True)
    monkeypatch.setattr(sources, "SOURCES", {"one": one, "two": two})
    lines = []
    sources.prepare(out, lines.append)
    assert read == ["one"] and any("two" in line.lower() or "One" in line for line in lines)
    assert sorted(path.name for path in out.iterdir()) == ["one.txt", "sources.json", "two.txt"]
    found = texts.read_domains(out)
    assert found["one"] == texts.Domain("one", "One", ["a b", "c\n\nd"], "none", False)
    about = json.loads((out / "sources.json").read_text())["domains"]
    assert about["one"]["bytes"] == (out / "one.txt").stat().st_size
    assert about["one"]["documents"] == 2 and about["two"]["synthetic"]
    assert str(tmp_path) not in json.dumps(about)
    sources.prepare(tmp_path / "again")
    assert all((tmp_path / "again" / p.name).read_bytes() == p.read_bytes() for p in out.iterdir())
    sources.prepare(out, lines.append)
    assert "already" in lines[-1]
    (tmp_path / "full").mkdir()
    (tmp_path / "full/mine").write_text("")
    with pytest.raises(ValueError):
        sources.prepare(tmp_path / "full")
    assert sources.main([str(tmp_path / "full")]) == 1 and sources.main([]) == 2


def test_every_source_says_what_it_is():
    assert {texts.PUBLIC, texts.LATE} < set(sources.SOURCES)
    real = [name for name, one in sources.SOURCES.items() if not one.synthetic]
    assert len(set(real) - {texts.PUBLIC}) >= 6
    for one in sources.SOURCES.values():
        assert one.title and one.what and one.licence.endswith(".") and "GPL" not in one.licence


def test_missing_packages_are_named(tmp_path, monkeypatch):
    with source_packages.Packages(lambda _: None, tmp_path) as packages:
        monkeypatch.setattr(source_packages.shutil, "which", lambda _: None)
        with pytest.raises(OSError, match="package wordnet-base: .*no apt-get"):
            packages.root("wordnet-base", "usr/x")
        monkeypatch.setattr(source_packages.shutil, "which", lambda program: program)
        monkeypatch.setattr(packages, "_installed", lambda _: "1.0")
        (tmp_path / "usr").mkdir()
        (tmp_path / "usr/x").write_text("")
        assert packages.root("wordnet-base", "usr/x") == (tmp_path, "1.0")
        done = source_packages.subprocess.CompletedProcess([], 100, "", "E: Unable to locate\n")
        monkeypatch.setattr(source_packages.subprocess, "run", lambda *_, **__: done)
        with pytest.raises(OSError, match="package wordnet-base: .*Unable to locate.*mirror"):
            packages.root("wordnet-base", "usr/y")
