"""Text to domain embeddings: the hashing embedder's numbers, the mean, files in and out.

Traps covered: text in other scripts and lone surrogates, tiny texts whose features cancel, widths
that change between batches, NaN in one document, blank parts, files that are something else.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import types
from pathlib import Path
from pydoc_data.topics import topics

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from flexmore_kernels import testing
from flexmore_kernels.documents import read_documents
from flexmore_kernels.domain_embedding import (
    HashingEmbedder,
    check_documents,
    domain_embedding,
    load_embeddings,
    save_embeddings,
    sentence_transformer,
)
from reference import router_rows as reference

REAL = Path(__file__).parent.parent / "../shared/data/domain_embeddings"
CODE = ["def add(a, b):\n    return a + b\n", "for i in range(10):\n    print(i)\n",
        "class Tree:\n    def __init__(self, left):\n        self.left = left\n"]  # fmt: skip
VERSE = ["In the beginning God created the heaven and the earth.",
         "And God said, Let there be light: and there was light.",
         "And the evening and the morning were the first day."]  # fmt: skip


def test_same_bits_on_every_machine():
    texts = ["The quick brown fox", "  naïve Ærø 日本 \x00\n", "a", "\ud800 alone", "x" * 5000]
    found = HashingEmbedder(48, seed=3)(texts)
    assert found.shape == (5, 48) and found.dtype == torch.float32
    digest = hashlib.sha256(found.numpy().astype("<f4").tobytes()).hexdigest()
    assert digest[:16] == "bc13a6500e19c1b7"


def test_rows_of_hashing_have_length_one_and_do_not_depend_on_the_batch():
    embedder = HashingEmbedder()
    found = embedder(CODE + VERSE)
    assert (found.double().norm(dim=1) - 1).abs().max() < 2**-22  # 256 roundings of 2^-25 at most
    assert torch.equal(found, torch.cat([embedder([text]) for text in CODE + VERSE]))
    assert torch.equal(embedder(["Two  WORDS\n"]), embedder([" two words"]))
    assert not torch.equal(HashingEmbedder(seed=1)(CODE), HashingEmbedder()(CODE))


def test_real_texts_lie_nearest_their_own_domain():
    """Python's own manual, and its own library: of unseen halves nearly all (97 of 100 when this
    was written; by chance 50) lie nearer to their own mean."""
    library = [
        path.read_text("utf-8") for path in sorted(Path(argparse.__file__).parent.glob("[a-z]*.py"))
    ]
    code = [text[-4000:] for text in library if len(text) > 1500][:60]
    prose = [text for text in topics.values() if len(text) > 1000][:60]
    means = torch.stack([domain_embedding(texts[0::2]) for texts in (prose, code)])
    unit = torch.nn.functional.normalize(means, dim=1)
    for number, texts in enumerate((prose, code)):
        nearest = (HashingEmbedder()(texts[1::2]) @ unit.T).argmax(1)
        assert (nearest == number).double().mean() > 0.8


def test_counts_are_sublinear():
    once, often = HashingEmbedder(4096)(["light night", "light " * 100 + "night"]).double()
    alone = HashingEmbedder(4096)(["night"])[0].double()
    assert 0.1 < float(often @ alone) / float(once @ alone) < 1


def test_no_text_of_one_or_two_characters_is_zero():
    texts = [chr(33 + i) + end for i in range(90) for end in ("", "!")]
    found = HashingEmbedder(2)(texts)  # two places: features cancel often
    assert (found.norm(dim=1) > 0.9).all() and found.isfinite().all()


def test_mean_over_documents_for_any_batch():
    texts = [f"{text} {i}" for i in range(5) for text in CODE + VERSE]
    rows = HashingEmbedder(32)(texts)
    for batch in (1, 7, 64):
        found = domain_embedding(texts, HashingEmbedder(32), batch=batch)
        assert found.shape == (32,) and found.dtype == torch.float32
        testing.assert_accurate(found, reference.domain_embedding(rows.double()))
    assert torch.equal(domain_embedding(CODE), domain_embedding(tuple(CODE), HashingEmbedder(256)))


def rows(values):
    return lambda texts: torch.tensor(values)[: len(texts)]


@pytest.mark.parametrize(
    "documents, embedder, words",
    [
        ([], None, "documents: got none"),
        (["fine", " \n\t"], None, r"documents\[1\]: got empty text"),
        (["fine", ""], rows([[1.0]] * 2), r"documents\[1\]: got empty text"),
        (["a", "b"], rows([[1.0], [float("nan")]]), r"NaN or Inf for documents\[1\]"),
        (["a", "b"], rows([[1.0]]), r"embedder: got shape \(1, 1\); accepted: \(2, m\)"),
        (["a"], rows([1.0]), r"embedder: got shape \(1,\)"),
        (["a"], rows([[]]), "rows of no number"),
    ],
)
def test_bad_input_of_the_mean(documents, embedder, words):
    with pytest.raises(ValueError, match=words):
        domain_embedding(documents, embedder)


def test_other_bad_input():
    with pytest.raises(ValueError, match=r"embedder: got shape \(1, 3\); accepted: \(1, 2\)"):
        domain_embedding(["ab", "abc"], lambda texts: torch.ones(1, len(texts[0])), batch=1)
    for bad in ("text", b"bytes", 3):
        with pytest.raises(TypeError, match="a sequence of texts"):
            check_documents(bad)
    with pytest.raises(TypeError, match=r"documents\[0\]: got int"):
        HashingEmbedder()([1])
    with pytest.raises(TypeError, match="embedder: got list"):
        domain_embedding(["a"], lambda texts: [[1.0]])
    with pytest.raises(ValueError, match="size: got 0"):
        HashingEmbedder(0)


def test_sentence_transformer_is_asked_for_by_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(ValueError, match="pip install sentence-transformers"):
        sentence_transformer("small")

    class Model:
        def __init__(self, name, device, model_kwargs):
            assert (name, device) == ("small", "cpu") and model_kwargs == {"use_safetensors": True}

        def encode(self, texts, convert_to_tensor, show_progress_bar):
            assert type(texts) is list and convert_to_tensor and not show_progress_bar
            return torch.tensor([[len(text), 2.0] for text in texts], dtype=torch.bfloat16)

    module = types.ModuleType("sentence_transformers")
    module.SentenceTransformer = Model
    monkeypatch.setitem(sys.modules, "sentence_transformers", module)
    found = domain_embedding(("ab", "abcd"), sentence_transformer("small", device="cpu"))
    assert found.tolist() == [3.0, 2.0]


def test_embeddings_come_back_from_a_file(tmp_path):
    made = {"law": torch.randn(5).double(), "code, 2": torch.randn(5)}
    save_embeddings(tmp_path / "new" / "e.safetensors", made, embedder="ours")
    found = load_embeddings(tmp_path / "new" / "e.safetensors")
    assert found.keys() == made.keys()
    for name, vector in found.items():
        assert torch.equal(vector, made[name].float())
    np.save(tmp_path / "b.npy", np.arange(4, dtype=np.float64))
    np.save(tmp_path / "a.npy", np.ones(4, np.float32))
    assert list(load_embeddings(tmp_path)) == ["a", "b"]
    assert load_embeddings(tmp_path / "b.npy")["b"].tolist() == [0, 1, 2, 3]


def test_files_that_hold_something_else(tmp_path):
    np.save(tmp_path / "pickled.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "matrix.npy", np.ones((2, 3)))
    (tmp_path / "cut.npy").write_bytes((tmp_path / "matrix.npy").read_bytes()[:9])
    (tmp_path / "text.safetensors").write_text("{}")
    save_file({"a": torch.ones(3), "b": torch.ones(4)}, tmp_path / "widths.safetensors")
    save_file({"a": torch.full((3,), float("inf"))}, tmp_path / "inf.safetensors")
    save_file({"a": torch.ones(3, dtype=torch.int64)}, tmp_path / "ints.safetensors")
    for name, words in (
        ("pickled.npy", "no .npy of numbers"), ("cut.npy", "no .npy of numbers"),
        ("matrix.npy", "accepted: one vector"), ("text.safetensors", "no whole safetensors"),
        ("widths.safetensors", r"\['b'\]: got shape \(4,\); accepted: \(3,\)"),
        ("inf.safetensors", "got NaN or Inf"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            load_embeddings(tmp_path / name)
    with pytest.raises(TypeError, match="int64"):
        load_embeddings(tmp_path / "ints.safetensors")
    with pytest.raises(FileNotFoundError):
        load_embeddings(tmp_path / "none.safetensors")
    with pytest.raises(ValueError, match="got none"):
        save_embeddings(tmp_path / "e.safetensors", {})
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="got none"):
        load_embeddings(tmp_path / "empty")


def test_documents_of_files_and_folders(tmp_path):
    (tmp_path / "verses.txt").write_text("\ufeffone\nmore\r\n\r\n \n\ntwo\n  \nthree", "utf-8")
    assert read_documents(tmp_path / "verses.txt") == ["one\nmore", "two", "three"]
    assert read_documents(tmp_path / "verses.txt", 2) == ["one\nmore", "two"]
    (tmp_path / "fed.txt").write_text("a\n\nb\f\n\fc")
    assert read_documents(tmp_path / "fed.txt") == ["a\n\nb", "c"]
    lines = [json.dumps({"text": text, "id": 1}) for text in ("x\n\ny", "z")]
    (tmp_path / "rows.jsonl").write_text("\n\n".join(lines) + "\n")
    assert read_documents(tmp_path / "rows.jsonl") == ["x\n\ny", "z"]
    folder = tmp_path / "folder"
    (folder / "b" / ".git").mkdir(parents=True)
    for name, text in (("z.py", "z = 1\n\n2"), ("b/a.c", "int a;"), ("empty", "\n"),
                       (".hidden", "no"), ("b/.git/config", "no")):  # fmt: skip
        (folder / name).write_text(text)
    assert read_documents(folder) == ["int a;", "z = 1\n\n2"]
    assert read_documents(folder, 1) == ["int a;"]
    assert read_documents(folder / "z.py") == ["z = 1\n\n2"]


def test_documents_that_cannot_be_read(tmp_path):
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "blank.txt").write_text(" \n\n")
    (tmp_path / "bad.jsonl").write_text('{"text": "a"}\n["text"]\n')
    (tmp_path / "blank.jsonl").write_text('{"text": " "}')
    (tmp_path / "folder").mkdir()
    for name, words in (("latin.txt", "not UTF-8"), ("blank.txt", "holds no text"),
                        ("bad.jsonl", "line 2"), ("blank.jsonl", "line 1"),
                        ("folder", "holds no text")):  # fmt: skip
        with pytest.raises(ValueError, match=words):
            read_documents(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        read_documents(tmp_path / "none")


@pytest.mark.skipif(not REAL.is_dir(), reason="the domain embeddings of FlexOlmo are not here")
def test_flexolmo_s_embeddings():
    found = load_embeddings(REAL)
    unit = {name: v.double() / v.double().norm() for name, v in found.items()}
    cosines = {name: round(float(v @ unit["public"]), 3) for name, v in unit.items()}
    assert cosines == {"public": 1.0, "news": 0.918, "creative": 0.858, "math": 0.782,
                       "pes2o": 0.753, "code": 0.684, "reddit": 0.672}  # fmt: skip
    assert {v.shape[0] for v in found.values()} == {4096}
