"""examples/federated/: intervals, regression and choices, by hand and by simulation."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from federated_results import fake_results

sys.path.insert(0, str(Path(__file__).parent.parent / "examples/federated"))
import intervals
import rank_scores


@pytest.mark.parametrize(
    ("degrees", "quantile"),
    [(1, 12.7062047), (2, 4.3026527), (3, 3.1824463), (7, 2.3646243), (30, 2.0422725)],
)
def test_t_quantiles_are_those_of_the_tables(degrees, quantile):
    assert intervals.t_quantile(0.975, degrees) == pytest.approx(quantile, abs=5e-8)
    assert intervals.t_quantile(0.025, degrees) == -intervals.t_quantile(0.975, degrees)


def test_interval_by_hand():
    e = intervals.over_seeds([1.0, 2.0, 3.0])  # s^2 = 1, standard error 1 / sqrt(3)
    assert (e.value, e.seeds) == (2.0, 3)
    half = 4.30265273 / math.sqrt(3)
    assert (e.high - 2, 2 - e.low) == pytest.approx((half, half))
    # 1/3 more variance: 2 * (2/3 / 1/3)^2 = 8 degrees, 2.306 * sqrt(2/3) = 1.88 < 2.48: not less.
    assert intervals.over_seeds([1.0, 2.0, 3.0], item_variance=1 / 3) == e
    much = intervals.over_seeds([1.0, 2.0, 3.0], item_variance=100.0)
    assert much.high - 2 == pytest.approx(1.96234 * math.sqrt(100 + 1 / 3), rel=1e-4)
    one = intervals.over_seeds([5.0])
    assert one.value == 5.0 and math.isnan(one.low) and math.isnan(one.high)
    for wrong in ([], [1.0, math.nan]):
        with pytest.raises(ValueError, match=r"values: got .*; accepted: one finite"):
            intervals.over_seeds(wrong)


def test_t_covers_and_a_bootstrap_of_three_would_not():
    """The page's reason for t: what three seeds span holds the truth in 1 - 2 / 2^3 of cases."""
    draws = np.random.default_rng(0).normal(size=(4000, 3))
    covers = [e.low <= 0 <= e.high for e in map(intervals.over_seeds, draws.tolist())]
    spans = (draws.min(axis=1) <= 0) & (draws.max(axis=1) >= 0)
    for found, truth in ((np.mean(covers), 0.95), (np.mean(spans), 0.75)):
        assert abs(found - truth) < 4 * math.sqrt(truth * (1 - truth) / 4000)


def test_item_variance_by_hand_and_paired():
    right = np.zeros((200, 2))
    right[:60] = 1.0  # two columns that are equal: 0.3 of the items
    found = intervals.item_variance({"a": right}, lambda m: float(m["a"][0]))
    # Of a sample variance over n draws the relative standard deviation is sqrt(2 / (n - 1)).
    assert found == pytest.approx(0.3 * 0.7 / 200, rel=4 * math.sqrt(2 / 399))
    assert intervals.item_variance({"a": right}, lambda m: float(m["a"][0] - m["a"][1])) == 0
    again = intervals.item_variance({"a": right}, lambda m: float(m["a"][0]))
    assert again == found


def test_regression_is_least_squares_with_a_level_for_each_label():
    generator = np.random.default_rng(2)
    x = np.tile(np.arange(6.0), 6)
    probe, seed = np.repeat(np.arange(6), 6) % 3, np.repeat(np.arange(6), 6) // 3
    y = 4.0 - 0.1 * (x - 3.5) ** 2 + probe - 2 * seed + 0.1 * generator.normal(size=36)
    full = np.stack([x, x * x, *(probe == p for p in range(3)), seed == 1], axis=1)
    slope, bend = np.linalg.lstsq(full, y, rcond=None)[0][:2]
    curve = intervals.regress(x, y, probe, seed)
    assert (curve.slope, curve.bend) == pytest.approx((slope, bend), rel=1e-9)
    # Balanced: a seed's level changes nothing, and the curve goes through the mean of all.
    assert intervals.regress(x, y, probe)[1:] == pytest.approx(curve[1:], rel=1e-9)
    assert np.mean([curve.at(v) for v in x]) == pytest.approx(y.mean(), rel=1e-12)
    with pytest.raises(ValueError, match="got 2 different ones; accepted: at least 3"):
        intervals.regress([0, 1, 1], [1, 2, 3])


@pytest.mark.parametrize(
    ("curve", "best"),
    [
        ((0, 4, -1), (2.0, "peak")),
        ((0, 1, 0), (3.0, "high end")),
        ((0, -1, 0), (0.0, "low end")),
        ((0, -4, 1), (0.0, "low end")),  # a valley: the better end, here 0 > -3
        ((0, 7, -1), (3.0, "high end")),  # a vertex at 3.5 that was not tested
        ((1, 0, 0), (0.0, "low end")),  # flat: the cheaper one
    ],
)
def test_best_rank_is_within_what_was_tested(curve, best):
    assert intervals.Curve(*map(float, curve)).best(0.0, 3.0) == best


def test_interval_of_the_best_rank_covers_it():
    """Seeds whose true best rank scatters around 3, scores with noise: 95 % hold the 3."""
    generator, covers, studies = np.random.default_rng(3), 0, 400
    x = np.arange(8.0)
    matrix = intervals.regression(x)
    for _ in range(studies):
        best = 3 + 0.4 * generator.normal(size=3)
        scores = -0.01 * (x - best[:, None]) ** 2 + 0.005 * generator.normal(size=(3, 8))
        found = [intervals.Curve(*c).best(0, 7).log2_rank for c in (matrix @ scores.T).T.tolist()]
        e = intervals.over_seeds(found)
        covers += e.low <= 3 <= e.high
    # The vertex is a ratio, a little skew: two points more than the draws' own scatter.
    assert covers / studies > 0.95 - 0.02 - 4 * math.sqrt(0.95 * 0.05 / studies)


def test_being_chosen_by_luck_earns_nothing():
    generator, results = np.random.default_rng(4), fake_results(0, 1)
    best, fair = [], []
    for _ in range(60):  # twenty mixtures that are equally good
        items = {p: (generator.random((40, 3, 20)) < 0.5) * 1.0 for p in ("entries", "sums")}
        taken, often = rank_scores.cross_fitted(results, items, items)
        fair.append(np.mean([found.mean() for found in taken.values()]) - 0.5)
        best.append(np.mean([f.mean(axis=(0, 1)) for f in items.values()], axis=0).max() - 0.5)
        assert often.total() == 6
    assert np.mean(best) > 0.04  # what choosing on the same items would have claimed
    assert abs(np.mean(fair)) < 4 * np.std(fair) / math.sqrt(60)
