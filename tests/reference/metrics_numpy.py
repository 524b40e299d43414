"""Recovery of true features in plain NumPy, with all one-to-one matchings tried where they are few."""

import itertools
import math
from collections.abc import Callable

import numpy as np
from scipy.optimize import linear_sum_assignment
from scipy.stats import t as student

from helpers.study.scores import Comparison


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


def of_two(value: float, one: float, other: float) -> tuple[float, float]:
    """The interval of a ratio where two units vary alone, and what it is of each of them without the other."""
    times = (one / other) ** (float(student.ppf(0.975, 1)) / 2)
    return min(value / times, value * times), max(value / times, value * times)


def slow_comparison(
    data: np.ndarray, statistic: Callable[[np.ndarray], float], *, level: float = 0.95, log: bool = False
) -> Comparison:
    """`statistic` of `data` [seeds, units, ...], of each seed's share of it, and with each seed or unit left out."""
    value, variances, degrees = statistic(data), [], []
    for axis in (0, 1):
        n = data.shape[axis]
        if n > 1:
            left = [statistic(np.delete(data, i, axis)) for i in range(n)]
            left = [math.log(each) for each in left] if log else left
            middle = sum(left) / n
            variances.append((n - 1) / n * sum((each - middle) ** 2 for each in left))
            degrees.append(n - 1)
    total = sum(variances)
    degrees.append(total**2 / sum(v**2 / d for v, d in zip(variances, degrees, strict=True)) if total else 1)
    pairs = zip([*variances, total], degrees, strict=True)
    margin = max(float(student.ppf((1 + level) / 2, freedom)) * math.sqrt(variance) for variance, freedom in pairs)
    ends = (value / math.exp(margin), value * math.exp(margin)) if log else (value - margin, value + margin)
    seeds, units = data.shape[:2]
    about = (units, "articles") if seeds == 1 else ((seeds, units), "seed × article") if units > 1 else (seeds, "seeds")
    return Comparison(value, ends, [statistic(data[i : i + 1]) for i in range(len(data))], *about)
