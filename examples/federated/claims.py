"""The claims of PREDICTIONS.md, judged: an estimate, its interval, a verdict; a loss is a loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import numpy as np
from findings import (
    ACTIVE,
    ROUTERS,
    active_gains,
    early_domains,
    kind_gains,
    low_rank,
    middle,
    mixtures,
    opt_out_rises,
    own_shares,
    router_gains,
    time_ratio,
    timed,
    whole_seeds,
)
from intervals import Estimate, over_seeds
from plots import signed
from predictions import Prediction, predictions
from rank_scores import (
    PAIR,
    cross_fitted,
    in_points,
    mixture_outcomes,
    rank_difference,
    rank_fits,
    rank_outcomes,
)

NOT_CLEAR, OPPOSITE, MISSING = "not clear", "opposite", "not measured"


class Judged(NamedTuple):
    """A claim with its result. estimate: None where it is not measured; beside: sentences with
    what else was seen."""

    prediction: Prediction
    estimate: Estimate | None
    verdict: str
    beside: tuple[str, ...] = ()

    @property
    def inside(self) -> bool | None:
        """Whether the mean is in the range that was expected."""
        if self.estimate is None:
            return None
        return self.prediction.low <= self.estimate.value <= self.prediction.high


def verdict(prediction: Prediction, estimate: Estimate | None) -> str:
    """By the whole interval: on the claim's side of the threshold, on the other, or neither."""
    if estimate is None:
        return MISSING
    if math.isnan(estimate.low):
        return NOT_CLEAR
    above, below = estimate.low > prediction.threshold, estimate.high < prediction.threshold
    if prediction.side == "below":
        above, below = below, above
    return prediction.yes if above else OPPOSITE if below else NOT_CLEAR


def judge(results: Mapping) -> list[Judged]:
    """Every claim, in the order of PREDICTIONS.md."""
    results = whole_seeds(results)
    judged = []
    for prediction in predictions():
        estimate, beside = _MEASURES[prediction.key](results)
        found = verdict(prediction, estimate)
        judged.append(Judged(prediction, estimate, found, tuple(beside)))
    return judged


def in_words(estimate: Estimate, unit: str = "") -> str:
    """1.20 % [0.80, 1.60]."""
    digits = 1 if max(abs(v) for v in estimate[:3] if math.isfinite(v)) >= 20 else 2
    unit = {"times": "×"}.get(unit, unit)

    def said(value: float) -> str:
        return signed(f"{value:.{digits}f}")

    words = f"{said(estimate.value)} {unit}".rstrip()
    if math.isnan(estimate.low):
        return words
    return f"{words} [{said(estimate.low)}, {said(estimate.high)}]"


def mixture_words(kind: str, rank: int | str, active: int | str | None = None) -> str:
    """uniform, rank 16, 4 active."""
    name = "full size" if kind == "full" else f"{kind}, rank {rank}"
    return name if active is None else f"{name}, {active} active"


Measured = tuple[Estimate | None, list[str]]


def _seeds(values: list[float]) -> Estimate | None:
    return over_seeds(values) if values else None


def _others(found: Mapping[str, list[float]], more: str = "") -> list[str]:
    """A sentence for each router beside the projected one."""
    return [
        f"{router}{more}: {in_words(over_seeds(values), '%')}."
        for router, values in found.items()
        if values and router != "projected"
    ]


def _ranks(results: Mapping) -> Measured:
    outcomes = rank_outcomes(results)
    beside = []
    for group, fit in rank_fits(results, outcomes).items():
        wheres = ", ".join(
            f"{where} in {fit.where.count(where)}" for where in sorted(set(fit.where))
        )
        ranks = Estimate(*(2**v for v in fit.estimate[:3]), fit.estimate.seeds)
        beside.append(
            f"Best rank for {group}: {in_words(ranks)}, of {2**fit.low:.0f} to {2**fit.high:.0f} "
            f"tested (by seeds: {wheres})."
        )
    for setting in (PAIR, *ACTIVE):
        alone = rank_difference(results, outcomes, (setting,))
        if alone is not None:
            name = "base and one expert" if setting == PAIR else f"mixtures, {setting} active"
            beside.append(f"{name[0].upper()}{name[1:]}: {in_words(alone, 'log2 rank')}.")
    return rank_difference(results, outcomes), beside


def _low_against_full(results: Mapping) -> Measured:
    outcomes = mixture_outcomes(results)
    keys = next(iter(outcomes.columns.values()), [])
    names = low_rank(results)
    columns = {
        "low": [i for i, key in enumerate(keys) if key[:2] in names],
        "full": [i for i, key in enumerate(keys) if key[0] == "full"],
    }
    if not all(columns.values()):
        return None, []
    taken, beside = {}, []
    sizes = {key: mixture["parameters"] / 1e6 for key, mixture in mixtures(results)[0].items()}
    for name, at in columns.items():
        items = {probe: found[:, :, at] for probe, found in outcomes.items.items()}
        taken[name], often = cross_fitted(results, items, items)
        key = keys[at[often.most_common(1)[0][0]]]
        score = in_words(in_points(results, taken[name]), "points")
        beside.append(
            f"Most often chosen: {mixture_words(*key)} ({sizes[key]:.3g} M parameters beside the "
            f"base); it scores {score}."
        )
    difference = {probe: found - taken["full"][probe] for probe, found in taken["low"].items()}
    return in_points(results, difference), beside


def _more_active(results: Mapping) -> Measured:
    outcomes = mixture_outcomes(results)
    keys = next(iter(outcomes.columns.values()), [])
    place = {key: i for i, key in enumerate(keys)}
    ends = (2, "all")
    names = [n for n in low_rank(results) if all((*n, active) in place for active in ends)]
    if not names or not all(("full", "full", active) in place for active in ends):
        return None, []
    few, many = (
        {
            probe: found[:, :, [place[(*name, active)] for name in names]]
            - found[:, :, [place["full", "full", active]]]
            for probe, found in outcomes.items.items()
        }
        for active in ends
    )
    both = {probe: (few[probe] + many[probe]) / 2 for probe in few}
    growth = {probe: many[probe] - few[probe] for probe in few}
    taken, often = cross_fitted(results, both, growth)
    beside = [f"Most often chosen: {mixture_words(*names[often.most_common(1)[0][0]])}."]
    ahead = {active: active_gains(results, active) for active in ACTIVE}
    words = [f"{in_words(over_seeds(v), '%')} with {a} active" for a, v in ahead.items() if v]
    beside.append(f"In loss, uniform low ranks are ahead of full size by {'; '.join(words)}.")
    grown = [b - a for a, b in zip(ahead[2], ahead["all"], strict=True)]
    beside.append(f"In loss the lead grows by {in_words(over_seeds(grown), '%')}.")
    return in_points(results, taken), beside


def _data_aware(results: Mapping) -> Measured:
    beside = [
        f"{words}: {in_words(over_seeds(found), '%')}."
        for words, found in (
            ("One rank everywhere, but weighted by activations, over plain",
             kind_gains(results, "weighted")),
            ("Ranks by plain spectra over one rank", kind_gains(results, "spectral")),
            ("Ranks by data over ranks by plain spectra",
             kind_gains(results, "data-aware", "spectral")),
        )
        if found
    ]  # fmt: skip
    return _seeds(kind_gains(results, "data-aware")), beside


def _routers(stage: str, late: bool) -> Callable[[Mapping], Measured]:
    def measured(results: Mapping) -> Measured:
        domains = [results["texts"]["late"]] if late else early_domains(results)
        found = {r: router_gains(results, r, stage, domains) for r in ROUTERS if r != "linear"}
        return _seeds(found["projected"]), _others(found, " over linear")

    return measured


def _old_domains(results: Mapping) -> Measured:
    domains = early_domains(results)

    def rises(router: str, stage: str, names: list[str]) -> list[float]:
        return [-g for g in router_gains(results, router, stage, names, router, "upcycled")]

    found = {router: rises(router, "late_after", domains) for router in ROUTERS}
    beside = _others(found)
    if before := rises("projected", "late_before", domains):
        beside.append(f"Before the fine-tuning: {in_words(over_seeds(before), '%')}.")
        each = {d: over_seeds(rises("projected", "late_after", [d])) for d in domains}
        worst = max(each, key=lambda d: each[d].value)
        beside.append(f"The domain that loses most is {worst}: {in_words(each[worst], '%')}.")
    return _seeds(found["projected"]), beside


def _shares(above: str) -> Callable[[Mapping], Measured]:
    def measured(results: Mapping) -> Measured:
        domains, late = early_domains(results), results["texts"]["late"]
        chance = 100 / len(domains)
        found = {r: own_shares(results, r, "upcycled", domains) for r in ROUTERS}
        beside = _others(found)
        for stage, words in (("late_before", "before"), ("late_after", "after")):
            if values := own_shares(results, "projected", stage, [late]):
                said = in_words(over_seeds(values), "%")
                beside.append(f"The late domain, {words} its fine-tuning: {said}.")
        if above == "half":
            return _seeds(found["projected"]), beside
        over = [share - chance for share in found["projected"]]
        return _seeds(over), [f"Chance is {chance:.1f} %, one of {len(domains)} routed experts."]

    return measured


def _opted_out(whose: str) -> Callable[[Mapping], Measured]:
    def measured(results: Mapping) -> Measured:
        rises = opt_out_rises(results)
        if not rises:
            return None, []
        own = [float(np.diag(rise).mean()) for rise in rises]
        apart = ~np.eye(len(rises[0]), dtype=bool)
        others = [float(rise[apart].mean()) for rise in rises]
        if whose == "others":
            worst = max(float(rise[apart].max()) for rise in rises)
            return _seeds(others), [f"The largest of any pair in any seed: {worst:.2f} %."]
        beside = [f"Its own domain: {in_words(over_seeds(own), '%')}.",
                  f"Another domain: {in_words(over_seeds(others), '%')}."]  # fmt: skip
        return _seeds([a - b for a, b in zip(own, others, strict=True)]), beside

    return measured


def _times(slower: str) -> Callable[[Mapping], Measured]:
    def measured(results: Mapping) -> Measured:
        tokens = [e["tokens"] for e in results.get("speed", ()) if e["what"] == "layer"]
        entries = timed(results, "layer", middle(results), max(tokens, default=0))
        ranks = sorted(name for name in entries if isinstance(name, int))
        if not ranks or not {"full", "dense"} <= set(entries):
            return None, []
        low = entries[ranks[len(ranks) // 2]]
        beside = [f"At {max(tokens)} tokens, rank {ranks[len(ranks) // 2]}: {low['ms']:.3g} ms; "
                  f"full size {entries['full']['ms']:.3g} ms; one dense FFN "
                  f"{entries['dense']['ms']:.3g} ms."]  # fmt: skip
        if slower == "full":
            return time_ratio(entries["full"], low), beside
        return time_ratio(low, entries["dense"]), beside

    return measured


_MEASURES: dict[str, Callable[[Mapping], Measured]] = {
    "1": _ranks,
    "2": _low_against_full,
    "3": _more_active,
    "4": _data_aware,
    "5": _routers("upcycled", late=False),
    "6a": _routers("late_before", late=True),
    "6b": _routers("late_after", late=True),
    "7": _old_domains,
    "8a": _shares("half"),
    "8b": _shares("chance"),
    "9a": _opted_out("own"),
    "9b": _opted_out("others"),
    "10a": _times("full"),
    "10b": _times("low"),
}
