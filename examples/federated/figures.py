"""The page's pictures of scores and losses, each from the results; figures_routers.py has the rest.

A mean over seeds has its t interval. Where the study has not what a picture shows, there is none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from findings import (
    ACTIVE,
    KINDS,
    early_domains,
    gain,
    key_of,
    low_rank,
    middle,
    mixtures,
    seeds_with,
)
from intervals import Estimate, over_seeds
from plots import Bar, Level, Point, Series, bars, curves, signed
from rank_scores import PAIR, designs, overall, rank_outcomes

RANK, RIGHT = "rank", "% of items right"
BELOW = "loss below the base's, %, mean over early domains"


def rank_figures(results: Mapping) -> list[str]:
    """Score over rank of each group, with its regression and full size: a picture a setting."""
    outcomes, found = rank_outcomes(results), []
    for setting in (PAIR, *ACTIVE):
        series, levels = [], []
        for colour, (group, design) in enumerate(designs(results, outcomes, [setting]).items()):
            scores: dict[Any, list[float]] = {}
            for rank in _ranks(results):
                scores[rank] = _group_scores(results, list(design.taken), setting, rank)
            points = [_point(math.log2(r), v) for r, v in scores.items() if v and r != "full"]
            means = {p: found.mean(axis=0) for p, found in outcomes.items.items()}
            curve = [np.mean(part) for part in zip(*design.curves(means), strict=True)]
            at = np.linspace(design.low, design.high, 41)
            fit = [(x, 100 * (curve[0] + (curve[1] + curve[2] * x) * x)) for x in at.tolist()]
            series.append(Series(group, points, colour, fit))
            if scores.get("full"):
                e = over_seeds(scores["full"])
                levels.append(Level(f"{group}, full size", e.value, colour, e.low, e.high))
        if series:
            name = f"Score over rank: {_setting_words(setting)}"
            found.append(curves(
                name, series, x_name=RANK, y_name=f"{RIGHT}, mean over probes", levels=levels,
                x_ticks=rank_ticks(_ranks(results)),
            ))  # fmt: skip
    return found


def probe_figures(results: Mapping) -> list[str]:
    """Each probe's score over rank in every setting; full size stands at the right end."""
    found = []
    for probe, about in results.get("probes", {}).items():
        series = []
        for colour, setting in enumerate((PAIR, *ACTIVE)):
            points: dict[Any, Point] = {}
            for rank in _ranks(results):
                if values := _group_scores(results, [probe], setting, rank):
                    points[rank] = _point(rank_place(rank, _ranks(results)), values)
            if points:
                series.append(by_rank(_setting_words(setting), points, colour))
        asked = [seed["base"]["probes"] for seed in seeds_with(results, "base")]
        base = [100 * probes[probe]["score"] for probes in asked if probe in probes]
        levels = [Level("chance", 100 * about["chance"], 4)]
        levels += [Level("base alone", over_seeds(base).value, 3)] if base else []
        if series:
            found.append(curves(
                f"{probe} ({about['group']})", series, x_name=RANK, y_name=RIGHT, levels=levels,
                x_ticks=rank_ticks(_ranks(results), full=True),
            ))  # fmt: skip
    return found


def size_figures(results: Mapping) -> list[str]:
    """Mean score and mean loss over the experts' parameters, by kind, `middle` active."""
    seeds, active = mixtures(results), middle(results)
    domains, base = early_domains(results), [s["base"] for s in seeds_with(results, "base")]
    found = []
    for name, unit in (
        (f"Score over parameters, {active} active", f"{RIGHT}, mean of the two groups"),
        (f"Loss over parameters, {active} active", BELOW),
    ):
        series, levels = [], []
        for colour, kind in enumerate((*KINDS, "full")):
            points = []
            for key in (k for k in (seeds[0] if seeds else ()) if k[0] == kind and k[2] == active):
                each = [seed[key] for seed in seeds]
                if unit == BELOW:
                    values = [gain(m["losses"], b["losses"], domains)
                              for m, b in zip(each, base, strict=True)]  # fmt: skip
                else:
                    values = [_mean_score(results, m["probes"]) for m in each]
                points.append(_point(math.log2(each[0]["parameters"]), values))
            if points and kind == "full":
                levels.append(Level("full size", points[0].y, 4, points[0].low, points[0].high))
            elif points:
                series.append(Series(kind, sorted(points), colour))
        if series:
            xs = [p.x for s in series for p in s.points]
            ticks = {float(b): _count(2.0**b) for b in range(math.ceil(min(xs)), int(max(xs)) + 1)}
            found.append(curves(name, series, x_name="parameters of all experts", y_name=unit,
                                levels=levels, x_ticks=ticks))  # fmt: skip
    return found


def loss_figures(results: Mapping) -> list[str]:
    """Bits a byte of every domain; and the mean loss over rank by number of active experts."""
    seeds, base = mixtures(results), [s["base"] for s in seeds_with(results, "base")]
    domains, active, found = early_domains(results), middle(results), []
    names = [n for n in low_rank(results) if n[0] == "uniform" and (*n, active) in seeds[0]]
    if names and ("full", "full", active) in seeds[0]:
        best = max(names, key=lambda n: np.mean([
            gain(seed[(*n, active)]["losses"], b["losses"], domains)
            for seed, b in zip(seeds, base, strict=True)]))  # fmt: skip
        mixed = f"rank {best[1]}, {active} active", f"full size, {active} active"
        legend = ("base", *mixed, "a model of its own")
        rows = []
        for d in domains:
            four = [
                [b["losses"] for b in base],
                [seed[(*best, active)]["losses"] for seed in seeds],
                [seed["full", "full", active]["losses"] for seed in seeds],
                [seed["experts"][d]["dense"] for seed in seeds_with(results, "experts")],
            ]
            bits = [[losses[d]["byte"] / math.log(2) for losses in each] for each in four]
            row = [bar_of(over_seeds(v), i, "{:.2f}") for i, v in enumerate(bits) if v]
            rows.append((d, row))
        found.append(bars("Losses of held-out text", rows, unit="bits a byte", legend=legend))
    series, levels = [], []
    for colour, several in enumerate(ACTIVE):
        values = {
            key[1]: [gain(seed[key]["losses"], b["losses"], domains)
                     for seed, b in zip(seeds, base, strict=True)]
            for key in (seeds[0] if seeds else ()) if key[2] == several and key[0] in
            ("uniform", "full")
        }  # fmt: skip
        points = [_point(math.log2(r), v) for r, v in values.items() if r != "full"]
        if points:
            series.append(Series(f"{several} active", sorted(points), colour))
        if "full" in values:
            e = over_seeds(values["full"])
            levels.append(Level(f"full size, {several}", e.value, colour, e.low, e.high))
    if series:
        found.append(curves(
            "Loss over rank, one rank everywhere", series, x_name=RANK, y_name=BELOW,
            levels=levels, x_ticks=rank_ticks(_ranks(results)),
        ))  # fmt: skip
    return found


def _ranks(results: Mapping) -> list[Any]:
    """Every rank of the study, ascending, full size last."""
    found = {m["rank"] for seed in seeds_with(results, "mixtures") for m in seed["mixtures"]}
    for seed in seeds_with(results, "experts"):
        found |= {e["rank"] for expert in seed["experts"].values() for e in expert["ranks"]}
    return sorted(found, key=lambda rank: math.inf if rank == "full" else rank)


def by_rank(name: str, points: Mapping[Any, Point], colour: int) -> Series:
    """A series over rank, with full size apart."""
    low = sorted(p for rank, p in points.items() if rank != "full")
    return Series(name, low, colour, apart=[p for rank, p in points.items() if rank == "full"])


def rank_place(rank: Any, ranks: Iterable[Any]) -> float:
    """On the axis of log2 ranks, full size one step beyond the largest."""
    if rank != "full":
        return math.log2(rank)
    return 1 + max((math.log2(r) for r in ranks if r != "full"), default=0.0)


def rank_ticks(ranks: Iterable[Any], full: bool = False) -> dict[float, str]:
    """Powers of two are named; ranks between them would stand too close."""
    ranks = list(ranks)
    powers = {r for r in ranks if r != "full" and r & (r - 1) == 0}
    found = {math.log2(r): str(r) for r in sorted(powers)}
    return found | ({rank_place("full", ranks): "full"} if full and "full" in ranks else {})


def _group_scores(results: Mapping, probes: Sequence[str], setting: Any, rank: Any) -> list[float]:
    """Mean score of probes at a rank in per cent, one a seed; none where any is missing."""
    found = []
    for seed in seeds_with(results, "experts" if setting == PAIR else "mixtures"):
        scores = []
        for probe in probes:
            if setting == PAIR:
                own = seed["experts"].get(results["probes"][probe]["domain"], {}).get("ranks", ())
                entries = [e for e in own if e["rank"] == rank]
            else:
                key = "full" if rank == "full" else "uniform", rank, setting
                entries = [m for m in seed["mixtures"] if key_of(m) == key]
            scores += [100 * e["probes"][probe]["score"] for e in entries if probe in e["probes"]]
        if len(scores) != len(probes):
            return []
        found.append(float(np.mean(scores)))
    return found


def _mean_score(results: Mapping, probes: Mapping) -> float:
    return 100 * float(overall(results, {probe: p["score"] for probe, p in probes.items()}))


def _point(x: float, values: Sequence[float]) -> Point:
    e = over_seeds(values)
    return Point(x, e.value, e.low, e.high)


def bar_of(e: Estimate, colour: int, written: str) -> Bar:
    """An estimate as a bar, with its value in words."""
    return Bar(e.value, e.low, e.high, signed(written.format(e.value)), colour)


def _setting_words(setting: Any) -> str:
    return "base and own expert" if setting == PAIR else f"mixture, {setting} active"


def _count(number: float) -> str:
    """16 k, 2.1 M."""
    for size, suffix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {suffix}"
    return f"{number:.0f}"
