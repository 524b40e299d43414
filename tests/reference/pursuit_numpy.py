"""Matching pursuit in plain NumPy, one signal at a time, each step solved from scratch."""

import numpy as np


def slow_omp(x, atoms, k, *, signed=False, tolerance=0.0, tiny=1e-12):
    """Support in the order of choice, and its coefficients."""
    support, values, residual = [], np.zeros(0), x.copy()
    for _ in range(k):
        if np.linalg.norm(residual) <= tolerance * np.linalg.norm(x):
            break
        score = atoms @ residual
        score = score if signed else np.abs(score)
        score[support] = -np.inf
        if score.max() <= tiny * np.linalg.norm(x):
            break
        support.append(int(score.argmax()))
        values = np.linalg.lstsq(atoms[support].T, x, rcond=None)[0]
        residual = x - values @ atoms[support]
    return support, values


def slow_nonnegative(x, atoms, k, *, tolerance=0.0, tiny=1e-12):
    """The same with coefficients ≥ 0: Lawson and Hanson's algorithm, stopped after k additions. Dense coefficients."""
    values, passive = np.zeros(len(atoms)), []
    for _ in range(k):
        residual = x - values @ atoms
        score = atoms @ residual
        score[passive] = -np.inf
        if np.linalg.norm(residual) <= tolerance * np.linalg.norm(x) or score.max() <= tiny * np.linalg.norm(x):
            break
        passive.append(int(score.argmax()))
        while True:
            goal = np.zeros(len(atoms))
            goal[passive] = np.linalg.lstsq(atoms[passive].T, x, rcond=None)[0]
            beyond = [j for j in passive if goal[j] <= 0]
            if not beyond:
                break
            ratios = {j: values[j] / (values[j] - goal[j]) for j in beyond}
            share = min(ratios.values())
            values = values + share * (goal - values)
            passive = [j for j in passive if not (j in ratios and ratios[j] <= share)]
            values = np.where(np.isin(np.arange(len(atoms)), passive), values, 0)
        values = goal
    return values
