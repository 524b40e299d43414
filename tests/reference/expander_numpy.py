"""Slow and obvious versions of `helpers.parts.masks`: sets of Python, one at a time."""

import itertools

import numpy as np


def neighbours(rows, atoms):
    return set().union(*(set(map(int, rows[a])) for a in atoms))


def expansion(rows, size):
    """ε_1 … ε_size by visiting every set."""
    n, degree = len(rows), len(rows[0])
    return [
        1 - min(len(neighbours(rows, s)) for s in itertools.combinations(range(n), t)) / (degree * t)
        for t in range(1, size + 1)
    ]


def dense(values, rows, m):
    out = np.zeros((len(rows), m))
    for j, (v, r) in enumerate(zip(values, rows, strict=True)):
        for value, row in zip(v, r, strict=True):
            out[j, row] = value
    return out


def babel(atoms, order):
    """μ₁(t): over all atoms and all sets of t others."""
    gram = np.abs(atoms @ atoms.T)
    n = len(atoms)
    return [
        max(
            gram[i, list(s)].sum() for i in range(n) for s in itertools.combinations([j for j in range(n) if j != i], t)
        )
        for t in range(order + 1)
    ]


def recovery_coefficient(atoms, support):
    pseudo = np.linalg.pinv(atoms[list(support)].T)
    others = [j for j in range(len(atoms)) if j not in support]
    return max(np.abs(pseudo @ atoms[j]).sum() for j in others)


def matching_pursuit(x, atoms, k):
    """Orthogonal matching pursuit, one signal: support in order of choice, and its least-squares values."""
    support, residual, values = [], x, None
    for _ in range(k):
        scores = np.abs(atoms @ residual)
        scores[support] = -1
        support.append(int(scores.argmax()))
        values = np.linalg.lstsq(atoms[support].T, x, rcond=None)[0]
        residual = x - atoms[support].T @ values
    return support, values
