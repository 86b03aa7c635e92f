"""Made-up results of the federated study, in the form that examples/federated/results.py says, with
effects that are known: what the page must find, and what it must report as lost.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence

import numpy as np

DOMAINS = ("bible", "code", "dictionary", "manual", "proofs", "arithmetic")
LATE = "recipes"
EVERY = (*DOMAINS, LATE)
PROBES = {
    "entries": ("knowledge", "dictionary"),
    "verses": ("knowledge", "bible"),
    "names": ("knowledge", "manual"),
    "sums": ("reasoning", "arithmetic"),
    "brackets": ("reasoning", "code"),
    "steps": ("reasoning", "proofs"),
}
RANKS = (1, 2, 4, 8, 16, 32, 47, 64, "full")
BUDGETS = (2, 8, 32)
ITEMS = 120
ACTIVE = (2, 4, "all")
ROUTERS = ("linear", "domain", "projected", "ridge")
TOKENS = (64, 4096)
_RANK, _FULL = 1440, 67_584  # parameters of one unit of rank, and of a full-size expert


@dataclasses.dataclass(frozen=True)
class Effects:
    """What is true of made-up results. Scores are shares of items, the rest per cent.

    knowledge, reasoning: log2 of the best rank. full: how far the full-size mixture's score lies
    below that of rank 64, by active experts. aware: loss of data-aware below uniform ranks.
    upcycled, before, after: the projected router's loss below the linear one's. old: rise on the
    early domains. share: of tokens at their own expert. own, others: rises by opting out. slow:
    time of the full-size layer over the low-rank one's; low: that over the dense one's. noise: of
    every loss and score from seed to seed, as a share.
    """

    knowledge: float = 2.0
    reasoning: float = 5.0
    bend: float = 0.01
    full: tuple[float, float, float] = (0.02, 0.04, 0.1)
    aware: float = 1.0
    upcycled: float = 1.0
    before: float = 6.0
    after: float = 3.0
    old: float = 0.5
    share: float = 65.0
    own: float = 12.0
    others: float = 0.2
    slow: float = 2.0
    low: float = 1.4
    noise: float = 0.0005


PAPERS = Effects()
"""Everything as the papers say it."""

LOST = Effects(
    knowledge=5.0, reasoning=2.0, full=(0.0, -0.05, -0.15), aware=-1.0, upcycled=-1.0, before=-6.0,
    after=-3.0, old=4.0, share=12.0, own=-1.0, others=3.0, slow=0.7, low=2.6,
)  # fmt: skip
"""Everything the other way round."""

NOTHING = Effects(
    knowledge=3.5, reasoning=3.5, full=(0.0, 0.0, 0.0), aware=0.0, upcycled=0.0, before=0.0,
    after=0.0, old=2.0, share=50.0, own=1.0, others=1.0, slow=1.0, low=2.0, noise=0.005,
)  # fmt: skip
"""Every number at its threshold, and noise."""


def fake_results(seed: int = 0, seeds: int = 3, effects: Effects = PAPERS) -> dict:
    """Results of every kind; the same for the same arguments."""
    maker = _Maker(np.random.default_rng(seed), effects)
    sizes = {"train_bytes": 900_000, "train_tokens": 300_000, "heldout_bytes": 60_000,
             "heldout_tokens": 20_000}  # fmt: skip
    return {
        "format": 1,
        "size": "small",
        "settings": {"ranks": list(RANKS[:-1]), "active": list(ACTIVE), "middle": 4},
        "machine": {"torch": "2.13", "device": "2 CPU threads", "library": "0.1.0"},
        "texts": {
            "late": LATE,
            "tokenizer": 1024,
            "public": {"bytes": 3_000_000, "tokens": 1_000_000},
            "domains": {name: {"title": f"The text of {name}", "licence": "public domain",
                               "synthetic": name == "arithmetic"} | sizes for name in EVERY},
        },
        "probes": {name: {"group": group, "domain": domain, "items": ITEMS, "chance": 0.25}
                   for name, (group, domain) in PROBES.items()},
        "seeds": [maker.seed(number) for number in range(seeds)],
        "speed": maker.speed(),
        "seconds": {"base": 60.0, "expert": 90.0, "mixture": 200.0},
    }  # fmt: skip


class _Maker:
    """Draws numbers around the effects; each item of a probe is as hard in all seeds."""

    def __init__(self, draw: np.random.Generator, effects: Effects) -> None:
        self._draw, self._true = draw, effects
        self._hard = {p: (draw.permutation(ITEMS) + 0.5) / ITEMS for p in PROBES}
        self._base = {d: 3.0 + 0.1 * len(d) for d in EVERY}

    def seed(self, number: int) -> dict:
        mixtures = [self._mixture("full" if rank == "full" else "uniform", active, rank)
                    for active in ACTIVE for rank in RANKS]  # fmt: skip
        for kind in ("weighted", "spectral", "data-aware"):
            mixtures += [self._mixture(kind, 4, rank) for rank in BUDGETS]
        true = self._true
        everyone = self._losses(EVERY, 20)
        return {
            "seed": number,
            "base": {"parameters": 230_000, "bytes": 460_000, "tokens": 1_500_000,
                     "losses": self._losses(EVERY), "probes": self._probes(PROBES, None, None)},
            "experts": {domain: self._expert(domain) for domain in EVERY},
            "mixtures": mixtures,
            "tuned": [self._mixture("full" if r == "full" else "uniform", 4, r)
                      for r in (4, 32, "full")],
            "joined": [{"rank": rank, "active": 4, "losses": self._losses(EVERY, 15),
                        "own_share": self._shares(EVERY, 50)} for rank in (4, 32, "full")],
            "opt_out": {
                "rank": "full", "active": 4, "all": everyone,
                "without": {out: {d: self._more(everyone[d], true.own if d == out else true.others)
                                  for d in EVERY} for out in DOMAINS},
            },
            "nexus": {
                "average": self._losses(EVERY, 5),
                "continued": self._losses(EVERY, 8),
                "tokens": {"upcycled": 200_000, "late": 50_000},
                "routers": self._routers(),
            },
        }  # fmt: skip

    def speed(self) -> list[dict]:
        found = []
        for what, unit in (("layer", 0.2), ("model", 1.6)):
            for tokens in TOKENS:
                for name in ("dense", *RANKS):
                    for active in (1,) if name == "dense" else ACTIVE:
                        many = {1: 0, 2: 0.6, 4: 1, "all": 1.5}[active]
                        times = 1 + many * (self._true.low - 1) * (name != "dense")
                        times *= self._true.slow if name == "full" else 1
                        ms = unit * tokens / 1000 * times
                        found.append({
                            "what": what, "name": name, "active": active, "tokens": tokens,
                            "ms": ms, "p20": 0.98 * ms, "p80": 1.03 * ms,
                        })  # fmt: skip
        return found

    def _near(self, value: float) -> float:
        return value * (1 + self._true.noise * self._draw.standard_normal())

    def _more(self, loss: dict, percent: float) -> dict:
        return {unit: self._near(value * (1 + percent / 100)) for unit, value in loss.items()}

    def _losses(self, domains: Iterable[str], percent: float = 0.0) -> dict:
        """Per cent below the base's."""
        found = {d: self._near(self._base[d] * (1 - percent / 100)) for d in domains}
        return {d: {"token": token, "byte": token / 3} for d, token in found.items()}

    def _probes(self, names: Iterable[str], rank, active) -> dict:
        found = {}
        for name in names:
            best = getattr(self._true, PROBES[name][0])
            log2 = 6.0 if rank in ("full", None) else math.log2(rank)
            score = 0.3 if rank is None else 0.6 - self._true.bend * (log2 - best) ** 2
            if rank == "full" and active in ACTIVE:
                score -= self._true.full[ACTIVE.index(active)]
            right = self._hard[name] < self._near(score)
            found[name] = {
                "score": float(right.mean()), "raw": score, "probability": score, "items": ITEMS,
                "right": "".join(map(str, right.astype(int).tolist())),
            }  # fmt: skip
        return found

    def _shares(self, domains: Sequence[str], percent: float) -> dict:
        return {d: min(1.0, self._near(percent / 100)) for d in domains}

    def _sizes(self, rank, experts: int) -> dict:
        parameters = experts * (_FULL if rank == "full" else rank * _RANK)
        return {"bytes": 2 * parameters, "parameters": parameters}

    def _mixture(self, kind: str, active, rank) -> dict:
        percent = 2.0 * (6.5 if rank == "full" else math.log2(rank))
        percent += {"data-aware": 1.0, "weighted": 0.5}.get(kind, 0.0) * self._true.aware * 0.9
        entry = {"kind": kind, "active": active, "rank": rank, **self._sizes(rank, len(DOMAINS)),
                 "losses": self._losses(EVERY, percent),
                 "probes": self._probes(PROBES, rank, active),
                 "own_share": self._shares(DOMAINS, 60)}  # fmt: skip
        if kind in ("weighted", "spectral", "data-aware"):
            entry["budget"] = rank
        if kind in ("spectral", "data-aware"):
            entry["spread"] = {"smallest": 1, "median": rank, "largest": 4 * rank}
        return entry

    def _expert(self, domain: str) -> dict:
        own = [name for name, (_, of) in PROBES.items() if of == domain]
        ranks = [{"rank": rank, **self._sizes(rank, 1), "losses": self._losses([domain], 20),
                  "probes": self._probes(own, rank, None)} for rank in RANKS]  # fmt: skip
        return {"tokens": 500_000, "relative_delta": 0.3, "dense": self._losses(EVERY, 10),
                "ranks": ranks}  # fmt: skip

    def _routers(self) -> dict:
        true = self._true
        ahead = {"linear": (0, 0, 0, 0), "domain": (1, 0.1, 1, 0.5), "ridge": (2, 0.2, 3, 1),
                 "projected": (0.5, true.upcycled, true.before, true.after)}  # fmt: skip
        found = {}
        for router, (start, upcycled, before, after) in ahead.items():
            losses = [self._losses(EVERY, 5), self._losses(EVERY, 10)]
            losses = [{d: self._more(v, -p) for d, v in part.items()}
                      for part, p in zip(losses, (start, upcycled), strict=True)]  # fmt: skip
            stages = {"start": losses[0], "upcycled": losses[1]}
            for stage, percent, late in (("late_before", before, 20), ("late_after", after, 30)):
                part = {d: self._more(losses[1][d], true.old) for d in DOMAINS}
                part |= self._losses([LATE], late)
                stages[stage] = part | {LATE: self._more(part[LATE], -percent)}
            found[router] = {
                stage: {"losses": part, "own_share": self._shares(
                    EVERY if stage.startswith("late") else DOMAINS,
                    true.share if router == "projected" else 55)}
                for stage, part in stages.items()
            }  # fmt: skip
        return found
