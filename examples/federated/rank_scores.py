"""Scores of probes: the regression on rank, and what is best when other seeds and items choose."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from findings import ACTIVE, GROUPS, mixtures, seeds_with
from intervals import Curve, Estimate, item_variance, over_seeds, regression

PAIR = "pair"
FEW = 3
"""Fewer ranks than this have no best one."""


class Outcomes(NamedTuple):
    """Each item of each probe under some configurations: right or not.

    items: {probe: (n, seeds, columns)}; columns: what each column is.
    """

    items: dict[str, np.ndarray]
    columns: dict[str, list[Any]]


def right(probes: Mapping, probe: str) -> np.ndarray:
    """(n,), 1.0 where the item was right."""
    return np.frombuffer(probes[probe]["right"].encode(), dtype=np.uint8) - 48.0


def mixture_outcomes(results: Mapping) -> Outcomes:
    """Every mixture on every probe that it was asked; a column is its `key_of`."""
    seeds = mixtures(results)
    items, columns = {}, {}
    for probe in results["probes"]:
        keys = [key for key in (seeds[0] if seeds else ())
                if all(probe in seed[key]["probes"] for seed in seeds)]  # fmt: skip
        if keys:
            found = [[right(seed[key]["probes"], probe) for key in keys] for seed in seeds]
            items[probe], columns[probe] = np.array(found).transpose(2, 0, 1), keys
    return Outcomes(items, columns)


def rank_outcomes(results: Mapping) -> Outcomes:
    """Each probe over the ranks; a column is (setting, rank).

    Settings: "pair" (base and the expert of the probe's own domain, as FlexMoRE's two-expert
    models), and 2, 4 or "all" active of the mixtures of one rank everywhere.
    """
    several = mixture_outcomes(results)
    items: dict[str, np.ndarray] = {}
    columns: dict[str, list[Any]] = {}
    pairs = [seed["experts"] for seed in seeds_with(results, "experts")]
    for probe, about in results["probes"].items():
        parts, names = [], []
        own = [{e["rank"]: e["probes"] for e in seed.get(about["domain"], {}).get("ranks", ())}
               for seed in pairs]  # fmt: skip
        ranks = [r for r in (own[0] if own else ()) if r != "full"
                 and all(probe in seed.get(r, ()) for seed in own)]  # fmt: skip
        if len(ranks) >= FEW:
            found = [[right(seed[r], probe) for r in ranks] for seed in own]
            parts.append(np.array(found).transpose(2, 0, 1))
            names += [(PAIR, r) for r in ranks]
        keys = several.columns.get(probe, [])
        for active in ACTIVE:
            at = [i for i, (kind, _, a) in enumerate(keys) if kind == "uniform" and a == active]
            if len(at) >= FEW:
                parts.append(several.items[probe][:, :, at])
                names += [(active, keys[i][1]) for i in at]
        if parts:
            items[probe], columns[probe] = np.concatenate(parts, axis=2), names
    return Outcomes(items, columns)


class Design(NamedTuple):
    """A group's observations within a seed. taken: {probe: columns}; matrix: `regression`'s; low,
    high: the least and the largest log2 rank."""

    taken: dict[str, list[int]]
    matrix: np.ndarray
    low: float
    high: float

    def curves(self, means: Mapping[str, np.ndarray]) -> list[Curve]:
        """One a seed, of means over items {probe: (seeds, columns)}."""
        scores = np.concatenate([means[p][:, at] for p, at in self.taken.items()], axis=1)
        return [Curve(*row) for row in (self.matrix @ scores.T).T.tolist()]

    def best(self, means: Mapping[str, np.ndarray]) -> list[float]:
        """The log2 of the best rank, one a seed."""
        return [curve.best(self.low, self.high).log2_rank for curve in self.curves(means)]


def designs(results: Mapping, outcomes: Outcomes, settings: Sequence) -> dict[str, Design]:
    """Of each group that has enough ranks in these settings.

    Each probe in each setting has a level of its own. A seed's level would change nothing: all
    seeds have the same ranks, so slope and bend of all seeds are the mean of the seeds' own.
    """
    found = {}
    for group in GROUPS:
        taken, x, labels = {}, [], []
        for probe, columns in outcomes.columns.items():
            at = [i for i, (setting, _) in enumerate(columns) if setting in settings]
            if results["probes"][probe]["group"] == group and at:
                taken[probe] = at
                x += [math.log2(columns[i][1]) for i in at]
                labels += [f"{probe} {columns[i][0]}" for i in at]
        if len(set(x)) >= FEW:
            found[group] = Design(taken, regression(x, labels), min(x), max(x))
    return found


class RankFit(NamedTuple):
    """A group's best rank. where: "peak", "low end" or "high end", one a seed; estimate: of its
    log2, within the tested low to high."""

    where: list[str]
    low: float
    high: float
    estimate: Estimate


def rank_fits(
    results: Mapping, outcomes: Outcomes, settings: Sequence = (PAIR, *ACTIVE)
) -> dict[str, RankFit]:
    """The fit of each group that has one."""
    fits = {}
    for group, design in designs(results, outcomes, settings).items():
        ends = design.low, design.high
        where = [c.best(*ends).where for c in design.curves(_means(outcomes.items))]
        estimate = _estimated(outcomes, design.best, list(design.taken))
        fits[group] = RankFit(where, *ends, estimate.clipped(*ends))
    return fits


def rank_difference(
    results: Mapping, outcomes: Outcomes, settings: Sequence = (PAIR, *ACTIVE)
) -> Estimate | None:
    """By how much the reasoning group's best log2 rank is above the knowledge group's; None
    without both."""
    found = designs(results, outcomes, settings)
    if len(found) < len(GROUPS):
        return None
    knowledge, reasoning = (found[group] for group in GROUPS)

    def difference(means: Mapping[str, np.ndarray]) -> list[float]:
        pairs = zip(reasoning.best(means), knowledge.best(means), strict=True)
        return [a - b for a, b in pairs]

    return _estimated(outcomes, difference, [*knowledge.taken, *reasoning.taken])


def _estimated(
    outcomes: Outcomes, values: Callable[[Mapping], list[float]], probes: Sequence[str]
) -> Estimate:
    """By seeds and items, of what is one number a seed, of means over items."""
    items = {probe: outcomes.items[probe] for probe in probes}
    spread = item_variance(items, lambda means: float(np.mean(values(means))))
    return over_seeds(values(_means(items)), item_variance=spread)


def _means(items: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {probe: found.mean(axis=0) for probe, found in items.items()}


def overall(results: Mapping, means: Mapping[str, Any]) -> Any:
    """The mean of the groups' means, each over its probes: as FlexMoRE averages its benchmarks."""
    groups = [[m for p, m in means.items() if results["probes"][p]["group"] == g] for g in GROUPS]
    return np.mean([np.mean(found, axis=0) for found in groups if found], axis=0)


def cross_fitted(
    results: Mapping, choose: Mapping[str, np.ndarray], value: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], Counter]:
    """Each item's value under the best column, which other seeds and other items chose.

    choose, value: {probe: (n, seeds, columns)}. For each seed and each half of the items (the even
    ones, the odd ones), the column with the best `overall` on the other seeds' other half: so
    having been chosen by luck earns nothing. With one seed, its own other half chooses.
    Returns {probe: (n, seeds)} and how often which column was chosen.
    """
    count = next(iter(choose.values())).shape[1]
    taken = {probe: np.empty(found.shape[:2]) for probe, found in value.items()}
    often: Counter = Counter()
    for half in (0, 1):
        means = {p: found[1 - half :: 2].mean(axis=0) for p, found in choose.items()}
        score = overall(results, means)  # (seeds, columns)
        for s in range(count):
            others = [i for i in range(count) if i != s] or [s]
            best = int(np.argmax(score[others].mean(axis=0)))
            often[best] += 1
            for probe, found in value.items():
                taken[probe][half::2, s] = found[half::2, s, best]
    return taken, often


def in_points(results: Mapping, items: Mapping[str, np.ndarray]) -> Estimate:
    """`overall` of items' values (n, seeds), in points of 100, by seeds and items."""
    means = {probe: found.mean(axis=0) for probe, found in items.items()}
    spread = item_variance(items, lambda m: 100 * float(np.mean(overall(results, m))))
    return over_seeds((100 * overall(results, means)).tolist(), item_variance=spread)
