"""Chapter 0: how often the book's intervals hold the truth, in samples of which it is known."""

from __future__ import annotations

import itertools
import math

import numpy as np
from jaxtyping import Float

from helpers.study.scores import margin

SIZES = ((1, 3), (1, 5), (1, 8), (1, 10), (1, 30), (2, 10), (3, 10), (3, 30), (5, 10))
"""Seeds × units for which `coverage` is simulated; with one seed only units vary."""
VARY = {"all": (1, 1, 1), "seeds": (1, 0, 0), "units": (0, 1, 0), "cells": (0, 0, 1)}


def coverage(n_samples: int = 4000, *, seed: int = 0) -> list[dict[str, str | float]]:
    """How often the 95 % interval holds the truth, in samples of two correlated columns of which the truth is known.

    A row for each size, kind of data (normal with a spread of a fifth of the mean, lognormal with σ = 1) and, of
    several seeds, what varies, with the shares for a mean, a difference of means and a ratio of sums, plain and on the
    log scale.
    """
    random, rows = np.random.default_rng(seed), []
    quantities = {"mean": lambda x, y: x, "difference": lambda x, y: x - y, "ratio of sums": lambda x, y: x / y}
    quantities["its logarithm"] = lambda x, y: np.log(x / y)
    for (seeds, units), vary in itertools.product(SIZES, VARY):
        if seeds == 1 and vary != "units":
            continue
        x, other = (_varying(random, n_samples, seeds, units, VARY[vary]) for _ in range(2))
        y = x / 2 + 0.75**0.5 * other
        for kind, truth, columns in (("normal", 5, (5 + x, 5 + y)), ("lognormal", math.exp(0.5), np.exp((x, y)))):
            row = {"units": f"{seeds} × {units}" if seeds > 1 else str(units), "vary": vary, "data": kind}
            for name, of in quantities.items():
                value = of(*(column.mean((1, 2)) for column in columns))
                without = [of(*(_without_each(column.mean(1)) for column in columns))]
                if seeds > 1:
                    without.append(of(*(_without_each(column.mean(2)) for column in columns)))
                off = np.abs(value - of(truth, truth)) - 1e-9  # what does not vary is rounded
                row[name] = float((off <= margin(*without, level=0.95)).mean())
            rows.append(row)
    return rows


def _varying(
    random: np.random.Generator, n: int, seeds: int, units: int, spreads: tuple[float, float, float]
) -> Float[np.ndarray, "n seeds units"]:
    sizes = ((n, seeds, 1), (n, 1, units), (n, seeds, units))
    parts = [spread * random.normal(size=size) for spread, size in zip(spreads, sizes, strict=True)]
    return np.broadcast_to(sum(parts), (n, seeds, units)) / sum(spreads) ** 0.5


def _without_each(values: Float[np.ndarray, "n units"]) -> Float[np.ndarray, "n units"]:
    return (values.sum(1, keepdims=True) - values) / (values.shape[1] - 1)
