"""The page's pictures of routers, opting out and speed, each from the results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from figures import RANK, bar_of, by_rank, rank_place, rank_ticks
from findings import (
    ACTIVE,
    ROUTERS,
    early_domains,
    gain,
    opt_out_rises,
    own_shares,
    seeds_with,
    timed,
)
from intervals import over_seeds
from plots import Level, Point, bars, curves, heat

_TIMES = ("ms", "p20", "p80")


def router_figures(results: Mapping) -> list[str]:
    """Losses below the base's by router, before and after training; what the old domains lose."""
    early, late = early_domains(results), [results["texts"]["late"]]
    seeds = seeds_with(results, "nexus")
    found = []
    panels = (
        ("Upcycling: the early domains", early, ("start", "upcycled"), "base",
         ("nothing trained", "after fine-tuning")),
        ("The added domain", late, ("late_before", "late_after"), "base",
         ("just added", "after fine-tuning")),
        ("The early domains when one is added", early, ("late_before", "late_after"), "upcycled",
         ("just added", "after fine-tuning")),
    )  # fmt: skip
    for name, domains, stages, against, legend in panels:
        rows = []
        for router in ROUTERS:
            row = []
            for colour, stage in enumerate(stages):
                values = []
                for seed in seeds:
                    at = seed["nexus"]["routers"].get(router, {})
                    other = seed["base"] if against == "base" else at.get(against)
                    if other and at.get(stage):
                        below = gain(at[stage]["losses"], other["losses"], domains)
                        values.append(below if against == "base" else -below)
                if values:
                    row.append(bar_of(over_seeds(values), colour, "{:.2f} %"))
            if row:
                rows.append((router, row))
        if rows and stages[0] == "start":
            for label, part in (("mean of weights", "average"), ("base, trained on", "continued")):
                values = [gain(seed["nexus"][part], seed["base"]["losses"], domains)
                          for seed in seeds]  # fmt: skip
                rows.append((label, [bar_of(over_seeds(values), 4, "{:.2f} %")]))
        if rows:
            unit = "loss below the base's, %" if against == "base" else "rise of the loss, %"
            found.append(bars(name, rows, unit=unit, legend=legend))
    return found


def joined_figures(results: Mapping) -> list[str]:
    """What the late domain's expert changes in a mixture with nothing trained, and what tuning all
    rows of the router does: losses below those of the mixture without, by rank."""
    early, late, found = early_domains(results), [results["texts"]["late"]], []
    panels = (
        ("One expert more, nothing trained", "joined",
         ((late, "the late domain"), (early, "the early domains"))),
        ("The router tuned on the public mix", "tuned", ((early, "the early domains"),)),
    )  # fmt: skip
    for name, part, groups in panels:
        values: dict[str, list[list[float]]] = {}
        for seed in seeds_with(results, part):
            before = {(m["rank"], m["active"]): m for m in seed.get("mixtures", ())
                      if m["kind"] in ("uniform", "full")}  # fmt: skip
            for after in seed[part]:
                at = before.get((after["rank"], after["active"]))
                label = "full size" if after["rank"] == "full" else f"rank {after['rank']}"
                for i, (domains, _) in enumerate(groups if at else ()):
                    row = values.setdefault(label, [[] for _ in groups])
                    row[i].append(gain(after["losses"], at["losses"], domains))
        rows = [(label, [bar_of(over_seeds(v), i, "{:.2f} %") for i, v in enumerate(row)])
                for label, row in values.items()]  # fmt: skip
        if rows:
            legend = [words for _, words in groups]
            unit = "loss below that of the mixture before, %"
            found.append(bars(name, rows, unit=unit, legend=legend))
    return found


def share_figures(results: Mapping) -> list[str]:
    """Per cent of each domain's tokens at its own expert, by router."""
    early, found = early_domains(results), []
    for name, stage, domains in (
        ("Own expert, after upcycling", "upcycled", early),
        ("Own expert, after one was added", "late_after", [*early, results["texts"]["late"]]),
    ):
        rows = [[_mean(own_shares(results, router, stage, [d])) for d in domains]
                for router in ROUTERS]  # fmt: skip
        if np.isfinite(rows).any():
            found.append(heat(name, ROUTERS, domains, rows, written="{:.0f}",
                              unit="% of a domain's tokens at its own expert"))  # fmt: skip
    return found


def opt_out_figures(results: Mapping) -> list[str]:
    """Rise of each domain's loss without each expert."""
    rises, domains = opt_out_rises(results), early_domains(results)
    if not rises:
        return []
    own = [(i, i) for i in range(len(domains))]
    return [heat("Opting out", [f"no {d}" for d in domains], domains,
                 np.mean(rises, axis=0).tolist(), unit="rise of a domain's loss, %",
                 written="{:.1f}", marked=own)]  # fmt: skip


def speed_figures(results: Mapping) -> list[str]:
    """Time over that of one dense FFN, or of the dense model, by rank; full size at the end."""
    found = []
    entries = results.get("speed", ())
    for what, tokens in dict.fromkeys((e["what"], e["tokens"]) for e in entries):
        series, ranks = [], []
        for colour, active in enumerate(ACTIVE):
            times = timed(results, what, active, tokens)
            names = [n for n in times if n != "dense"]
            ranks += names
            if "dense" in times and names:
                dense = times["dense"]["ms"]
                points = {
                    n: Point(rank_place(n, names), *(times[n][k] / dense for k in _TIMES))
                    for n in names
                }
                series.append(by_rank(f"{active} active", points, colour))
        if series:
            one = "one dense FFN" if what == "layer" else "the dense model"
            found.append(curves(
                f"A {what}, {tokens:,} tokens", series, x_name=RANK, y_name=f"time over {one}'s",
                levels=[Level(one, 1.0, 4)], x_ticks=rank_ticks(ranks, full=True),
            ))  # fmt: skip
    return found


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else math.nan
