"""examples/federated/corpus.py: a prepared folder as ids, once, and then without the folder.

Traps covered: ids that int16 cannot hold, bytes counted of other text than tokens, texts that
changed under a study, a probe whose ids are not those of its text.
"""

from __future__ import annotations

import json
import random

import pytest
import torch
from federated_runs import LATE, PUBLIC, TINY, parts, study
from federated_runs import corpus as federated_corpus
from federated_runs import sources as federated_sources

SETTINGS = TINY.changed(vocabulary=300, items=3)
NAMES = (PUBLIC, "arithmetic", "hymns", LATE)
tokenizers = pytest.importorskip("tokenizers")


def write_texts(folder, seed: int = 0) -> None:
    """A prepared folder: sums, of which there is a probe, and words at random."""
    folder.mkdir(exist_ok=True)
    facts = {}
    for name in NAMES:
        draw = random.Random(f"{name} {seed}")
        if name == "arithmetic":
            pairs = [
                [(draw.randrange(90), draw.randrange(90)) for _ in range(40)] for _ in range(12)
            ]
            texts = ["\n".join(f"{a} + {b} = {a + b}" for a, b in rows) for rows in pairs]
        else:
            words = ["".join(draw.choices("aeklmnöst", k=4)) for _ in range(50)]
            texts = [" ".join(draw.choices(words, k=120)) for _ in range(12)]
        text = federated_sources.SEPARATOR.join(texts) + "\n"
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
        facts[name] = {"title": name.title(), "licence": "CC0", "synthetic": True}
    about = {"format": federated_sources.FORMAT, "domains": facts}
    (folder / federated_sources.FACTS).write_text(json.dumps(about))


def read(out, folder):
    store = parts.Store(out, SETTINGS.as_dict(), torch.device("cpu"))
    try:
        return federated_corpus.read_corpus(store, folder, SETTINGS, lambda text: None)
    finally:
        store.close()


def test_texts_are_encoded_once(tmp_path):
    write_texts(tmp_path / "texts")
    found = read(tmp_path / "out", tmp_path / "texts")
    assert found.early == ("arithmetic", "hymns") and found.domains[-1] == LATE
    assert list(found.heldout) == ["arithmetic", "hymns", LATE, PUBLIC]
    about = found.about["texts"]["domains"]["hymns"]
    assert len(found.train["hymns"]) == about["train_tokens"]
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "out/tokenizer.json"))
    text = tokenizer.decode(found.train["hymns"].tolist())
    assert len(text.encode()) == about["train_bytes"]
    for vector in found.embeddings.values():
        assert vector.shape == (TINY.hidden_size,)
        assert float(vector.norm()) == pytest.approx(1, abs=1e-6)
    (probe,) = found.probes
    assert (probe.name, probe.sequences, probe.chance) == ("arithmetic", 12, 0.25)
    ids = probe.batches[0].ids[0].tolist()
    assert ids[0] == 0 and "=" in tokenizer.decode(ids)

    # A machine that has neither texts nor tokenizer.
    (tmp_path / "out/tokenizer.json").unlink()
    again = read(tmp_path / "out", None)
    assert again.about == found.about and again.early == found.early
    assert all(torch.equal(again.train[name], ids) for name, ids in found.train.items())
    write_texts(tmp_path / "texts", seed=1)
    with pytest.raises(ValueError, match="--texts: .* has other texts than those"):
        read(tmp_path / "out", tmp_path / "texts")


def test_the_command_prepares_and_names_what_is_wrong(tmp_path, monkeypatch):
    write_texts(tmp_path / "texts")
    monkeypatch.setitem(study.SIZES, "small", SETTINGS)
    words = [str(tmp_path / "out"), "--texts", str(tmp_path / "texts"), "--device", "cpu"]
    assert study.main([*words, "--prepare"]) == 0
    assert (tmp_path / "out/corpus.json").is_file()
    assert not (tmp_path / "out/results.json").exists()
    with pytest.raises(ValueError, match="--seeds: got 0; accepted: an integer >= 1"):
        study.main([*words, "--seeds", "0"])
    with pytest.raises(ValueError, match="has no sources.json"):
        study.main([str(tmp_path / "new"), "--texts", str(tmp_path / "out"), "--device", "cpu"])
