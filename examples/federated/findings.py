"""From results.json to one number a seed: losses, routers, opting out, time.

What claims.py judges and figures.py draws, without a judgement; of probes' scores, rank_scores.py
does the same. Where the study has not that part, a list is empty: a claim about it is then not
measured, and nothing is made up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from intervals import Estimate

GROUPS = ("knowledge", "reasoning")
ACTIVE = (2, 4, "all")
KINDS = ("uniform", "weighted", "spectral", "data-aware")
ROUTERS = ("linear", "domain", "projected", "ridge")
STAGES = ("start", "upcycled", "late_before", "late_after")
_PARTS = ("base", "experts", "mixtures", "tuned", "joined", "opt_out", "nexus")


def whole_seeds(results: Mapping) -> dict[str, Any]:
    """The results with only those seeds that have every part that any seed has.

    So all claims speak of the same seeds, and a study that was stopped half-way can be read.
    """
    seeds = results.get("seeds", [])
    parts = [part for part in _PARTS if any(seed.get(part) for seed in seeds)]
    return {**results, "seeds": [s for s in seeds if all(s.get(part) for part in parts)]}


def early_domains(results: Mapping) -> list[str]:
    """The domains of the mixture; the late one joins afterwards."""
    return [name for name in results["texts"]["domains"] if name != results["texts"]["late"]]


def middle(results: Mapping) -> int:
    """How many experts are active in what the study does not sweep."""
    return results["settings"]["middle"]


def seeds_with(results: Mapping, part: str) -> list[Mapping]:
    """The seeds that have a part of the study."""
    return [seed for seed in results.get("seeds", ()) if seed.get(part)]


def key_of(mixture: Mapping) -> tuple:
    """(kind, rank, active): what a mixture is."""
    return mixture["kind"], mixture["rank"], mixture["active"]


def mixtures(results: Mapping, part: str = "mixtures") -> list[dict[tuple, Mapping]]:
    """A seed's mixtures by `key_of`; only those that every seed has."""
    found = [{key_of(m): m for m in seed[part]} for seed in seeds_with(results, part)]
    common = set.intersection(*(set(seed) for seed in found)) if found else set()
    return [{key: m for key, m in seed.items() if key in common} for seed in found]


def low_rank(results: Mapping) -> list[tuple]:
    """The mixtures of low rank with fewer parameters than the full-size one, as (kind, rank)."""
    seeds = mixtures(results)
    whole = [m["parameters"] for m in seeds[0].values() if m["kind"] == "full"] if seeds else []
    names = [key[:2] for key, m in (seeds[0] if whole else {}).items()
             if key[0] != "full" and m["parameters"] < min(whole)]  # fmt: skip
    return list(dict.fromkeys(names))


def gain(losses: Mapping, other: Mapping, domains: Sequence[str]) -> float:
    """By how many per cent the losses are below the other's, mean over the domains; the same in
    nats a token and nats a byte."""
    ratios = [losses[d]["token"] / other[d]["token"] for d in domains]
    return 100 * float(np.mean([1 - ratio for ratio in ratios]))


def kind_gains(results: Mapping, kind: str, other: str = "uniform") -> list[float]:
    """`gain` of a kind of mixture over another one of the same budget and active experts, mean
    over budgets and numbers of active experts, one a seed."""
    found = []
    for seed in mixtures(results):
        pairs = [(m, seed[other, key[1], key[2]]) for key, m in seed.items()
                 if key[0] == kind and (other, key[1], key[2]) in seed]  # fmt: skip
        if pairs:
            domains = early_domains(results)
            found.append(float(np.mean([gain(a["losses"], b["losses"], domains)
                                        for a, b in pairs])))  # fmt: skip
    return found


def active_gains(results: Mapping, active: int | str) -> list[float]:
    """`gain` of the mixtures of one low rank over the full-size one with as many active experts,
    mean over the ranks, one a seed."""
    names = [name for name in low_rank(results) if name[0] == "uniform"]
    found = []
    for seed in mixtures(results):
        full = seed.get(("full", "full", active))
        rows = [seed[(*name, active)] for name in names if (*name, active) in seed]
        if full and rows:
            domains = early_domains(results)
            found.append(float(np.mean([gain(m["losses"], full["losses"], domains)
                                        for m in rows])))  # fmt: skip
    return found


def router_gains(
    results: Mapping,
    router: str,
    stage: str,
    domains: Sequence[str],
    other: str = "linear",
    other_stage: str | None = None,
) -> list[float]:
    """`gain` of a router at a stage over another one (at another stage), one a seed."""
    found = []
    for seed in seeds_with(results, "nexus"):
        routers = seed["nexus"]["routers"]
        ours = routers.get(router, {}).get(stage)
        theirs = routers.get(other, {}).get(other_stage or stage)
        if ours and theirs:
            found.append(gain(ours["losses"], theirs["losses"], domains))
    return found


def own_shares(results: Mapping, router: str, stage: str, domains: Sequence[str]) -> list[float]:
    """Per cent of the domains' tokens that reach their own expert, one a seed."""
    found = []
    for seed in seeds_with(results, "nexus"):
        shares = seed["nexus"]["routers"].get(router, {}).get(stage, {}).get("own_share", {})
        if all(d in shares for d in domains):
            found.append(100 * float(np.mean([shares[d] for d in domains])))
    return found


def opt_out_rises(results: Mapping) -> list[np.ndarray]:
    """(experts, domains), one a seed: by how many per cent a domain's loss rises without an
    expert, both in the order of `early_domains`."""
    domains = early_domains(results)
    found = []
    for seed in seeds_with(results, "opt_out"):
        part = seed["opt_out"]
        rows = [[-gain(part["without"][out], part["all"], [d]) for d in domains]
                for out in domains]  # fmt: skip
        found.append(np.array(rows))
    return found


def timed(results: Mapping, what: str, active: int | str, tokens: int) -> dict[Any, Mapping]:
    """The timings of a layer or model at a number of tokens by name: "dense", "full", ranks."""
    return {
        entry["name"]: entry
        for entry in results.get("speed", ())
        if entry["what"] == what and entry["tokens"] == tokens
        and (entry["active"] == active or entry["name"] == "dense")
    }  # fmt: skip


def time_ratio(slower: Mapping, faster: Mapping) -> Estimate:
    """How many times as long one takes as another. Not over seeds: the interval is from the 20th
    percentile of one over the 80th of the other to the reverse, the timings' own scatter."""
    return Estimate(
        slower["ms"] / faster["ms"],
        slower["p20"] / faster["p80"],
        slower["p80"] / faster["p20"],
        1,
    )
