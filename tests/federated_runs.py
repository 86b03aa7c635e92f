"""A study so small that it takes seconds: four made-up languages of 48 tokens, a few steps each."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/federated"))
import corpus  # noqa: E402, F401 (for the tests)
import factors  # noqa: E402, F401
import flexolmo  # noqa: E402, F401
import models  # noqa: E402, F401
import parts  # noqa: E402
import routers  # noqa: E402, F401
import scores  # noqa: E402
import seeds  # noqa: E402
import sources  # noqa: E402, F401
import study  # noqa: E402
import train  # noqa: E402, F401
from corpus import MIX, Corpus  # noqa: E402
from settings import Settings  # noqa: E402

EARLY, LATE, PUBLIC = ("codes", "hymns"), "maps", "english"
STEP = 4 * 16  # tokens
TINY = Settings(
    hidden_size=8, intermediate_size=12, layers=2, heads=2, vocabulary=48, length=16, batch=4,
    base_tokens=30 * STEP, expert_tokens=6 * STEP, dense_tokens=6 * STEP, tuned_tokens=2 * STEP,
    upcycled_tokens=3 * STEP, late_tokens=2 * STEP,
    base_rate=2e-2, expert_rate=1e-2, dense_rate=1e-2, upcycled_rate=5e-3, row_rate=1e-3,
    tuned_rate=1e-3, router_rate=1e-2,
    heldout_tokens=160, items=6, calibration_tokens=320,
    late=LATE, budgets=(2,), few=(2,), shipped_rank=2, active=(2, "all"), middle=2,
)  # fmt: skip


def text(language: int, count: int, generator: torch.Generator) -> torch.Tensor:
    """Ids (count,) int32: mostly each the one before times a number plus another one."""
    random = torch.randint(48, (count,), generator=generator).tolist()
    usual = (torch.rand(count, generator=generator) < 0.9).tolist()
    ids = [random[0]]
    for number in range(1, count):
        next_one = (ids[-1] * (2 * language + 1) + 5 * language + 1) % 48
        ids.append(next_one if usual[number] else random[number])
    return torch.tensor(ids, dtype=torch.int32)


def tiny_corpus(device: str = "cpu") -> Corpus:
    generator = torch.Generator().manual_seed(0)
    trained, heldout, embeddings, probes = {}, {}, {}, []
    for language, name in enumerate((*EARLY, LATE, PUBLIC)):
        ids = text(language, 300, generator).to(device)
        heldout[name] = scores.Heldout.of(ids, 3 * len(ids), TINY.length, TINY.heldout_tokens)
        if name == PUBLIC:
            continue
        trained[name] = text(language, 500, generator).to(device)
        vector = torch.randn(TINY.hidden_size, generator=generator)
        embeddings[name] = vector / vector.norm()
        items = []
        for _ in range(TINY.items):
            ids = text(language, 9, generator).tolist()
            items.append(scores.Item(ids[:6], [([1, 2], 4), (ids[6:], 6), ([3], 2)], 1))
        group = "reasoning" if language % 2 else "knowledge"
        probes.append(scores.packed(f"of-{name}", group, name, items, TINY.length,
                                    torch.device(device)))  # fmt: skip
    general = text(3, 600, generator).to(device)
    trained[MIX] = torch.cat([general, *(trained[name][:200] for name in EARLY)])
    said = {"title": "Made up", "licence": "CC0", "synthetic": True, "train_bytes": 1500,
            "train_tokens": 500, "heldout_bytes": 900, "heldout_tokens": 300}  # fmt: skip
    about = {
        "texts": {"late": LATE, "tokenizer": 48, "public": {"bytes": 3000, "tokens": 1000},
                  "domains": dict.fromkeys((*EARLY, LATE), said)},
        "probes": {one.name: {"group": one.group, "domain": one.domain, "items": TINY.items,
                              "chance": one.chance} for one in probes[:2]},
    }  # fmt: skip
    return Corpus(trained, heldout, embeddings, tuple(probes[:2]), EARLY, LATE, about)


def tiny_store(out: Path) -> parts.Store:
    return parts.Store(out, TINY.as_dict(), torch.device("cpu"))


def tiny_seed(out: Path) -> seeds.Seed:
    return seeds.Seed(TINY, tiny_corpus(), tiny_store(out), 0)


def run(out: Path, monkeypatch, **options) -> int:
    """The study in this folder, of the tiny corpus."""
    monkeypatch.setattr(study, "read_corpus", lambda *_: tiny_corpus(options.get("device", "cpu")))
    given = {"out": str(out), "texts": "-", "size": "small", "seeds": 1, "device": "cpu",
             "prepare": False, "export": None} | options  # fmt: skip
    return study.run(argparse.Namespace(**given), TINY)
