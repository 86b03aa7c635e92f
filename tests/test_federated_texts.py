"""examples/federated/: domains, what is held out, the public mix, and the tokenizer.

Traps covered: held-out documents in what is trained on, the late domain in the public mix, a split
that depends on the order of documents, text that does not come back from its ids.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/federated"))
import sources  # noqa: E402
import texts  # noqa: E402
import tokens  # noqa: E402


def domain(name: str, count: int, size: int = 1000) -> texts.Domain:
    draw = random.Random(name)
    documents = [f"{name} {n} {draw.randbytes(size // 2).hex()}" for n in range(count)]
    return texts.Domain(name, name, documents, "none", False)


def bytes_of(documents: list[str]) -> int:
    return sum(len(text.encode()) for text in documents)


@pytest.mark.parametrize("bad", ["", "[]", '{"format": 0}', "{"])
def test_bad_folders_are_refused(tmp_path, bad):
    if bad:
        (tmp_path / "sources.json").write_text(bad)
    with pytest.raises(ValueError, match="sources.py DIR"):
        texts.read_domains(tmp_path)


def test_empty_and_missing_texts_are_refused(tmp_path):
    about = {"title": "x", "licence": "none", "synthetic": False}
    facts = {"format": sources.FORMAT, "domains": {"one": about}}
    (tmp_path / "sources.json").write_text(json.dumps(facts))
    with pytest.raises(ValueError, match="one.txt"):
        texts.read_domains(tmp_path)
    (tmp_path / "one.txt").write_text(" \n")
    with pytest.raises(ValueError, match="empty"):
        texts.read_domains(tmp_path)
    with pytest.raises(ValueError, match="english"):
        texts.read_public(tmp_path)


@pytest.mark.parametrize(
    "count, wanted", [(4000, "5 % of it"), (400, "64 KB"), (40, "a quarter of it")]
)
def test_split_holds_out_a_share(count, wanted):
    whole = domain("one", count)
    train, held_out = texts.split(whole)
    total = bytes_of(whole.documents)
    least = {"5 % of it": total / 20, "64 KB": 65_536, "a quarter of it": total / 4}[wanted]
    assert least <= bytes_of(held_out) < least + max(map(len, whole.documents))
    assert sorted([*train, *held_out]) == sorted(whole.documents)
    assert train == [text for text in whole.documents if text in set(train)]


def test_split_depends_on_texts_alone():
    whole = domain("one", 300)
    documents = whole.documents[::-1]
    held_out = set(texts.split(whole)[1])
    assert set(texts.split(whole._replace(documents=documents, name="two"))[1]) == held_out
    twice = whole._replace(documents=[*documents, *documents])
    train, again = texts.split(twice)
    assert set(again) == held_out and not held_out & set(train)
    assert set(texts.split(whole, 1)[1]) != held_out
    assert len(texts.split(whole._replace(documents=["a", "b"]))[0]) == 1
    with pytest.raises(ValueError, match="1 documents"):
        texts.split(whole._replace(documents=["a", "a"]))


def test_public_mix():
    domains = {name: domain(name, 300) for name in ("one", "two", "late")}
    general = domain("english", 300)
    mix = texts.public_mix(domains, "late", general)
    found = {name: [text for text in mix if text.startswith(f"{name} ")]
             for name in (*domains, "english")}  # fmt: skip
    assert sum(map(len, found.values())) == len(mix) == len(set(mix))
    assert found["late"] == []
    assert sorted(found["english"]) == sorted(texts.split(general)[0])
    for name in ("one", "two"):
        train, held_out = texts.split(domains[name])
        assert set(found[name]) <= set(train) and not set(found[name]) & set(held_out)
        assert 0.09 < bytes_of(found[name]) / bytes_of(train) <= 0.1
    assert mix == texts.public_mix(domains, "late", general)
    thirds = [sum(text.startswith("one ") for text in mix[i::3]) for i in range(3)]
    assert min(thirds) > 0
    none = texts.public_mix(domains, "late", general, share=0)
    assert {text.split()[0] for text in none} == {"english"}
    with pytest.raises(ValueError, match="late: got 'three'; accepted: one, two, late"):
        texts.public_mix(domains, "three", general)
    with pytest.raises(ValueError, match="share"):
        texts.public_mix(domains, "late", general, share=2)


TEXT = ["def add(a, b):\n    return a + b\n" * 9, "12 + 345 = 357\n" * 9, "In the beginning." * 9]


@pytest.fixture(scope="module")
def tokenizer():
    pytest.importorskip("tokenizers")
    return tokens.train_tokenizer(TEXT, 280)


def test_any_text_comes_back(tokenizer):
    draw = random.Random(0)
    every = "".join(chr(n) for n in range(0x250))
    odd = "".join(chr(draw.randrange(0x20, 0xD800)) for _ in range(500))
    for text in (*TEXT, every, odd, "\U0001f600 \r\n\t x", f"a{tokens.SEPARATOR}b"):
        ids = tokenizer.encode(text).ids
        assert tokenizer.decode(ids, skip_special_tokens=False) == text
        assert tokenizer.token_to_id(tokens.SEPARATOR) not in ids
    assert len(tokenizer.encode(TEXT[0]).ids) < len(TEXT[0])


def test_digits_stand_alone(tokenizer):
    shown = [tokenizer.decode([one]) for one in tokenizer.encode("12 + 345").ids]
    assert [one.strip() for one in shown if one.strip()] == ["1", "2", "+", "3", "4", "5"]


def test_tokenizer_is_the_same_every_time(tokenizer, tmp_path):
    assert tokens.train_tokenizer(TEXT, 280).to_str() == tokenizer.to_str()
    assert tokenizer.get_vocab_size() == 280
    path = tokens.save(tokenizer, tmp_path)
    assert path.name == "tokenizer.json"
    back = tokens.read(tmp_path)
    text = f"a{tokens.SEPARATOR}b"
    assert back.to_str() == tokenizer.to_str()
    assert back.encode(text).ids == tokenizer.encode(text).ids


def test_documents_as_ids(tokenizer):
    ids = tokens.encode_documents(tokenizer, TEXT)
    assert ids.dtype == torch.int32 and ids.ndim == 1
    parts = [[0, *tokenizer.encode(text).ids] for text in TEXT]
    assert ids.tolist() == sum(parts, [])
    with pytest.raises(ValueError, match="documents"):
        tokens.encode_documents(tokenizer, [])
    from tokenizers import Tokenizer, models

    with pytest.raises(ValueError, match="tokenizer"):
        tokens.encode_documents(Tokenizer(models.BPE()), TEXT)


def test_what_no_tokenizer_is_made_of(monkeypatch, tmp_path):
    for size in (256, True, 300.0):
        with pytest.raises(ValueError, match="size"):
            tokens.train_tokenizer(TEXT, size)
    with pytest.raises(ValueError, match="documents"):
        tokens.train_tokenizer([""], 280)
    with pytest.raises(ValueError, match="tokenizer.json"):
        tokens.read(tmp_path)
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(ValueError, match="pip install tokenizers"):
        tokens.train_tokenizer(TEXT, 280)
