"""Intervals over few seeds, and the regression of score on rank, in numpy alone.

Three seeds decide how. A bootstrap that draws seeds again never leaves the lowest and the highest
of what was seen, and a fair coin puts the truth outside three of them in a quarter of all cases:
its "95 %" is 75 %. So an interval is Student's t over the seeds, with n - 1 degrees of freedom
(4.30 standard errors at three seeds). Where the items of a probe are the same for all seeds, seeds
do not show how much depends on the items: their variance, from drawing items again, is added.

The regression is that of FlexMoRE (arXiv 2602.08818, abstract): score on log2 rank. Of its form
they say nothing; here it is quadratic, the simplest that has a best rank, with fixed effects.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

LEVEL = 0.95
DRAWS = 400
"""Of items: the variance is then known to within 7 % of itself."""


class Estimate(NamedTuple):
    """A mean over seeds and its interval, in the unit of the values.

    low and high are nan where one seed gives no interval; seeds: how many there are.
    """

    value: float
    low: float
    high: float
    seeds: int

    def clipped(self, low: float, high: float) -> Estimate:
        """The same where only values from low to high can be."""
        return self._replace(
            value=min(max(self.value, low), high),
            low=min(max(self.low, low), high) if self.seeds > 1 else math.nan,
            high=min(max(self.high, low), high) if self.seeds > 1 else math.nan,
        )


def t_probability(t: float, degrees: int) -> float:
    """P(T <= t) of Student's T, by the finite sums for whole degrees of freedom (Abramowitz and
    Stegun, 26.7.3 and 26.7.4)."""
    if degrees < 1:
        raise ValueError(f"degrees: got {degrees}; accepted: at least 1")
    angle = math.atan2(t, math.sqrt(degrees))
    cosine, sine = math.cos(angle), math.sin(angle)
    term, total = 1.0, 0.0
    first = degrees % 2
    for j in range(first, degrees - 1, 2):
        total += term
        term *= cosine * cosine * (j + 1) / (j + 2)
    if first:
        return 0.5 + (angle + sine * cosine * total) / math.pi
    return 0.5 + sine * total / 2


@functools.cache
def t_quantile(probability: float, degrees: int) -> float:
    """The t below which Student's T lies with this probability, to the last bits of a float."""
    if not 0 < probability < 1:
        raise ValueError(f"probability: got {probability}; accepted: between 0 and 1")
    if probability < 0.5:
        return -t_quantile(1 - probability, degrees)
    low, high = 0.0, 1.0
    while t_probability(high, degrees) < probability:
        low, high = high, 2 * high
    while low < (middle := (low + high) / 2) < high:
        if t_probability(middle, degrees) < probability:
            low = middle
        else:
            high = middle
    return high


def over_seeds(
    values: Sequence[float], *, item_variance: float = 0.0, level: float = LEVEL
) -> Estimate:
    """Mean of one value a seed and its t interval.

    Args:
        values: one a seed; all of them finite.
        item_variance: of the mean, from drawing items again (`item_variance`), where all seeds
            have the same items. It is added to the seeds' s^2 / n, with Satterthwaite's degrees of
            freedom, rounded down; but never is the interval narrower than by the seeds alone.
            What items and seeds do together counts twice: too wide rather than too narrow.
        level: of the interval.
    """
    found = np.asarray(values, dtype=np.float64)
    if found.ndim != 1 or found.size == 0 or not np.isfinite(found).all():
        raise ValueError(f"values: got {list(values)}; accepted: one finite number a seed")
    mean, count = float(found.mean()), int(found.size)
    if count == 1:
        return Estimate(mean, math.nan, math.nan, 1)
    share = (1 + level) / 2
    between = float(found.var(ddof=1)) / count
    variance = between + item_variance
    # 1e-9, so that 2 is not taken for 1.9999999; above 1000 the quantile moves no more.
    degrees = (count - 1) * (variance / between) ** 2 if between else math.inf
    degrees = math.floor(min(degrees, 1000.0) + 1e-9)
    half = max(
        t_quantile(share, count - 1) * math.sqrt(between),
        t_quantile(share, degrees) * math.sqrt(variance),
    )
    return Estimate(mean, mean - half, mean + half, count)


def item_variance(
    items: Mapping[str, np.ndarray],
    statistic: Callable[[dict[str, np.ndarray]], float],
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> float:
    """Variance of a statistic of means over items, from drawing each probe's items again.

    Args:
        items: a probe's outcomes (n, ...): what follows the first axis (seeds, ranks) keeps its
            items together, so that differences between ranks stay paired.
        statistic: of the means over items, a probe's (...).
        draws, seed: how often, and of numpy's generator: the same arguments give the same bits.
    """
    generator = np.random.default_rng(seed)
    means: dict[str, np.ndarray] = {}
    for probe, outcomes in items.items():
        count = len(outcomes)
        weights = generator.multinomial(count, np.full(count, 1 / count), size=draws) / count
        flat = np.asarray(outcomes, dtype=np.float64).reshape(count, -1)
        means[probe] = (weights @ flat).reshape(draws, *outcomes.shape[1:])
    drawn = [statistic({p: found[i] for p, found in means.items()}) for i in range(draws)]
    return float(np.var(drawn, ddof=1))


class Best(NamedTuple):
    """Where a curve is highest in a tested range: log2 rank, and "peak", "low end" or
    "high end"."""

    log2_rank: float
    where: str


class Curve(NamedTuple):
    """score = level + slope x + bend x^2, x = log2 rank; level: of the average fixed effect."""

    level: float
    slope: float
    bend: float

    def at(self, log2_rank: float) -> float:
        """The score at a rank."""
        return self.level + (self.slope + self.bend * log2_rank) * log2_rank

    def best(self, low: float, high: float) -> Best:
        """The vertex where it is a maximum within the range, else the better end; of equally good
        ends the low one, which costs less."""
        if self.bend < 0 and low < (vertex := -self.slope / (2 * self.bend)) < high:
            return Best(vertex, "peak")
        if self.at(high) > self.at(low):
            return Best(high, "high end")
        return Best(low, "low end")


def regress(log2_ranks: Sequence[float], scores: Sequence[float], *effects: Sequence) -> Curve:
    """The quadratic of score over log2 rank by least squares, with fixed effects.

    Args:
        log2_ranks, scores: one an observation, finite.
        effects: each a label an observation (the probe, the seed); each label has a level of its
            own. Only differences within labels tell of the rank.

    Raises ValueError where fewer than three ranks leave the quadratic open.
    """
    y = np.asarray(scores, dtype=np.float64)
    if y.shape != np.shape(log2_ranks) or not np.isfinite(y).all():
        raise ValueError("scores: got another number or a nan; accepted: one finite each")
    return Curve(*(float(b) for b in regression(log2_ranks, *effects) @ y))


def regression(log2_ranks: Sequence[float], *effects: Sequence) -> np.ndarray:
    """The matrix (3, n) that takes scores to `regress`'s level, slope and bend: the design is the
    same for all draws of items."""
    x = np.asarray(log2_ranks, dtype=np.float64)
    if len(np.unique(x)) < 3:
        raise ValueError(
            f"log2_ranks: got {len(np.unique(x))} different ones; accepted: at least 3"
        )
    columns = [np.ones_like(x)]
    for labels in effects:
        kinds, which = np.unique(np.asarray(labels), return_inverse=True)
        columns += [(which == i).astype(np.float64) for i in range(1, len(kinds))]
    effect = np.stack(columns, axis=1)
    # Slope and bend of what the effects do not explain (Frisch, Waugh and Lovell).
    powers = np.stack([x, x * x], axis=1)
    within = powers - effect @ np.linalg.lstsq(effect, powers, rcond=None)[0]
    shape = np.linalg.pinv(within)
    level = np.full_like(x, 1 / x.size) - powers.mean(axis=0) @ shape
    return np.concatenate([level[None], shape])
