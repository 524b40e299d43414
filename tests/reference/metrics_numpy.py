"""Recovery of true features in plain NumPy, with all one-to-one matchings tried where they are few."""

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment

from helpers.study.scores import Comparison, resampled


def cosine(a, b):
    return float(a @ b) / (math.sqrt(a @ a) * math.sqrt(b @ b))


def best_matching(cosines):
    """The largest sum of cosines over one-to-one pairs; a pair with a negative one is as good as none."""
    cosines = np.maximum(cosines, 0)
    n_true, n_learned = cosines.shape
    if n_learned < n_true:
        return best_matching(cosines.T)
    if n_learned <= 6:
        pairings = (list(enumerate(p)) for p in itertools.permutations(range(n_learned), n_true))
        pairs = max(pairings, key=lambda pairs: sum(cosines[i, j] for i, j in pairs))
    else:
        pairs = zip(*linear_sum_assignment(cosines, maximize=True), strict=True)
    return float(sum(cosines[i, j] for i, j in pairs))


def slow_recovery(learned, truth, threshold):
    """found, matched, mmcs, mcc, duplicates."""
    cosines = np.array([[cosine(t, v) for v in learned] for t in truth]).reshape(len(truth), len(learned))
    of_truth = [max(row, default=0.0) for row in cosines]
    of_learned = [max(column) for column in cosines.T]
    twins = [any(cosine(a, b) > threshold for j, b in enumerate(learned) if j != i) for i, a in enumerate(learned)]
    return {
        "found": sum(c > threshold for c in of_truth) / len(truth),
        "matched": sum(c > threshold for c in of_learned) / len(learned) if len(learned) else math.nan,
        "mmcs": sum(of_truth) / len(truth),
        "mcc": best_matching(cosines) / len(truth),
        "duplicates": sum(twins) / len(learned) if len(learned) else math.nan,
    }


def slow_interval(
    data: np.ndarray,
    statistic: Callable[[np.ndarray], float],
    *,
    seed: int = 0,
    n_resamples: int = 2000,
    level: float = 0.95,
) -> tuple[float, float]:
    """Percentile bootstrap that resamples the first two axes, each as a whole: seeds, and units such as articles.

    With one seed only the units are resampled, and the interval says nothing about seeds.
    """
    data = np.asarray(data)
    if data.ndim < 2 or data.shape[1] < 2:
        raise ValueError(f"data has shape {data.shape}; allowed: [seeds, units, ...] with at least 2 units to resample")
    values = [statistic(data[i][:, j]) for i, j in resampled(*data.shape[:2], n_resamples, seed)]
    lo, hi = np.quantile(values, [(1 - level) / 2, (1 + level) / 2])
    return float(lo), float(hi)


def slow_comparison(data: np.ndarray, statistic: Callable[[np.ndarray], float], **bootstrap) -> Comparison:
    """`statistic` of `data`, of each seed's share of it, and of resamples (`slow_interval`).

    The largest of many rates is larger in a resample than in the sample, on average; where that leaves the number
    itself outside its interval, the interval is widened to hold it.
    """
    value, (low, high) = statistic(data), slow_interval(data, statistic, **bootstrap)
    by_seed = [statistic(data[i : i + 1]) for i in range(len(data))]
    return Comparison(value, (min(low, value), max(high, value)), by_seed, data.shape[0] * data.shape[1])
