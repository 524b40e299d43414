"""Recovery of true features in plain NumPy, with all one-to-one matchings tried where they are few."""

import itertools
import math

import numpy as np
from scipy.optimize import linear_sum_assignment


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
