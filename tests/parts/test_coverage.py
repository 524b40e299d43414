"""How often intervals hold the truth: gated where data are normal, bounded where they are skewed."""

import numpy as np
import pytest
from scipy.special import stdtrit

from helpers.parts import coverage
from helpers.study import scores

QUANTITIES = ("mean", "difference", "ratio of sums", "its logarithm")


@pytest.fixture(scope="module")
def covered():
    return {(row["units"], row["vary"], row["data"]): row for row in coverage.coverage(4000, seed=0)}


@pytest.mark.parametrize("units", ["3", "5", "8", "10", "30"])
def test_intervals_over_units_hold_the_truth_as_often_as_they_say(covered, units):
    normal, skewed = (covered[units, "units", data] for data in ("normal", "lognormal"))
    assert all(0.93 <= normal[name] <= 0.97 for name in QUANTITIES), normal
    assert all(0.8 <= skewed[name] <= 0.99 for name in QUANTITIES), skewed


@pytest.mark.parametrize("vary", ["all", "seeds", "units"])
@pytest.mark.parametrize("units", ["2 × 10", "3 × 10", "3 × 30", "5 × 10"])
def test_intervals_over_seeds_and_units_hold_it_whichever_vary(covered, units, vary):
    normal, skewed = (covered[units, vary, data] for data in ("normal", "lognormal"))
    most = 0.98 if units == "2 × 10" else 0.97
    assert all(0.93 <= normal[name] <= most for name in QUANTITIES), normal
    assert all(0.8 <= skewed[name] <= 0.99 for name in QUANTITIES), skewed


@pytest.mark.parametrize("units", ["2 × 10", "3 × 10", "3 × 30", "5 × 10"])
def test_intervals_are_too_wide_and_never_too_narrow_where_only_cells_vary(covered, units):
    assert all(0.93 <= covered[units, "cells", "normal"][name] <= 0.997 for name in QUANTITIES)


def test_skewed_ratios_are_held_more_often_on_the_log_scale(covered):
    skewed = [row for row in covered.values() if row["data"] == "lognormal"]
    assert all(row["its logarithm"] >= max(0.91, row["ratio of sums"] - 0.002) for row in skewed)
    assert np.mean([row["its logarithm"] - row["ratio of sums"] for row in skewed]) > 0.005


@pytest.mark.parametrize("units", [10, 30])
def test_the_degrees_of_satterthwaite_alone_hold_it_less_often(units):
    """The negative control: two seeds, or three, that happen to lie close together."""
    seeds = 2 if units == 10 else 3
    x = coverage._varying(np.random.default_rng(1), 4000, seeds, units, coverage.VARY["all"])
    variances = [x.mean(axis).var(1, ddof=1) / n for axis, n in ((2, seeds), (1, units))]
    shares = [v**2 / (n - 1) for v, n in zip(variances, (seeds, units), strict=True)]
    joint = stdtrit(sum(variances) ** 2 / sum(shares), 0.975) * sum(variances) ** 0.5
    without = [coverage._without_each(x.mean(axis)) for axis in (2, 1)]
    off = np.abs(x.mean((1, 2)))
    assert (off <= joint).mean() < 0.93 < (off <= scores.margin(*without, level=0.95)).mean()


@pytest.mark.parametrize(("seeds", "units"), [(1, 5), (1, 8), (1, 10), (3, 10)])
def test_percentiles_of_resamples_hold_it_less_often(seeds, units):
    """The negative control: what the book did before, on the same samples as `coverage`."""
    random = np.random.default_rng(1)
    x = coverage._varying(random, 1500, seeds, units, coverage.VARY["units" if seeds == 1 else "all"])
    by_seed, by_unit = (random.multinomial(n, np.full(n, 1 / n), size=400) / n for n in (seeds, units))
    resamples = np.einsum("nsu,rs,ru->nr", x, by_seed, by_unit, optimize=True)
    low, high = np.quantile(resamples, [0.025, 0.975], axis=1)
    assert ((low <= 0) & (high >= 0)).mean() < 0.93
