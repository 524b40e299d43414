"""How well N regions with w linear measurements each can reconstruct a Gaussian: Theorem 3.3 of paper C, made explicit.

For x ~ N(0, I_d) and any model that divides the inputs into N regions and on each of them is a function of w linear
measurements of x,

    kl(w/d ‖ 1 − FVU) ≤ 2 ln N / d    where FVU ≤ 1 − w/d,    kl(p ‖ q) = p ln(p/q) + (1 − p) ln((1 − p)/(1 − q)).

Everything is in nats and float64. N is passed as ln N: C(100 000, 64) does not fit a float.
"""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike
from scipy import special

from helpers.dictionary import RankOneDictionary
from helpers.settings import allowed


def log_configurations(n_experts: ArrayLike, k: ArrayLike) -> np.ndarray | np.floating:
    """ln C(E, k), in nats: how many sets of k experts out of E there are; `ValueError` for k outside 0 to n_experts."""
    n, k = np.broadcast_arrays(np.asarray(n_experts, float), np.asarray(k, float))
    allowed(bool(((k >= 0) & (k <= n)).all()), f"k={k}", f"0 to n_experts={n}")
    return special.gammaln(n + 1) - special.gammaln(k + 1) - special.gammaln(n - k + 1)


def fvu_bound(w: ArrayLike, d: ArrayLike, log_n: ArrayLike) -> np.ndarray | np.floating:
    """The smallest FVU that the theorem allows: the root F ≤ 1 − w/d of kl(w/d ‖ 1 − F) = 2 ln N / d.

    Args:
        w: linear measurements in each region; at w ≥ d the bound is 0.
        d: dimensions of the Gaussian.
        log_n: ln N in nats, or the entropy of the region, which is no larger (the proof uses only that).

    Returns the lower end of the last bracket less what its own arithmetic may have rounded, 4·10⁻¹⁵·(1 − ln F) of it,
    so rounding never overstates the bound; at log_n = 0 it is 1 − w/d, rounded. Arguments are broadcast.
    Raises `ValueError` for a negative w or log_n and for d below 1.
    """
    w, d, log_n = np.broadcast_arrays(*(np.asarray(value, float) for value in (w, d, log_n)))
    for name, value, least in (("w", w, 0), ("d", d, 1), ("log_n", log_n, 0)):
        allowed(bool((value >= least).all()), f"{name}={value}", f"at least {least}")
    inside = w < d
    w, log_n = np.where(inside, w, 0.0), np.where(inside, log_n, 0.0)
    p, rest, budget = w / d, (d - w) / d, 2 * log_n / d
    near, far = np.zeros_like(p), (budget - special.xlogy(p, p)) / rest  # of s = ln((1 − p)/F); kl(far) ≥ the budget
    for _ in range(100):  # halvings: more than float64 can tell apart
        middle = (near + far) / 2
        # kl(p ‖ 1 − F) at F = (1 − p)·e^−middle: exact to rounding where F is tiny, and near its double root
        kl = rest * middle - p * np.log1p(-rest * np.expm1(-middle) / np.where(p > 0, p, 1.0))
        enough = kl > budget  # the error is still too small
        near, far = np.where(enough, near, middle), np.where(enough, middle, far)
    rounded = 16 * np.finfo(float).eps * (1 + far - np.log(rest))
    return np.where(inside, np.where(budget == 0, rest, np.exp(np.log(rest) - far - rounded)), 0.0)


def measurements(model: RankOneDictionary) -> int:
    """w of a model of the family: linear measurements of x that its output needs once the chosen experts are known.

    Every active neuron reads one, e_j·x, the shared network's too. A gate that is not hard reads the k chosen scores
    as well, at most as many as a low-rank router has dimensions, and none that the neurons have read already (a tied
    router).
    """
    tied = model.router.weight is model.encoder.weight
    gate = 0 if model.gate == "hard" or tied or not model.k else min(model.k, model.router.weight.shape[1])
    return model.active_neurons + gate


def model_bound(model: RankOneDictionary) -> float:
    """The smallest FVU that the theorem allows `model` as a reconstruction of x ~ N(0, I), d = `model.d_in`.

    N = C(n, k). Raises `ValueError` where inputs and outputs differ in number, since the target is x.
    """
    allowed(model.d_in == model.d_out, f"d_out={model.d_out}", f"d_in={model.d_in}")
    return float(fvu_bound(measurements(model), model.d_in, log_configurations(model.n_features, model.k)))


def random_subspaces_fvu(w: int, d: int, log_n: float) -> float:
    """FVU that the oracle's choice among N random subspaces has on average over the subspaces, for any N.

    The share of x left outside an even random subspace is Beta((d − w)/2, w/2), whatever x is, and the smallest of N
    such shares has mean ∫ (1 − G(t))^N dt, G their distribution function. Trapezoid rule in ln(t/(1 − t)). Raises
    `ValueError` unless 1 ≤ w < d and log_n ≥ 0.
    """
    allowed(1 <= w < d, f"w={w}", f"1 to d - 1 = {d - 1}")
    allowed(log_n >= 0, f"log_n={log_n}", "at least 0")
    a, b = (d - w) / 2, w / 2
    # G(t) ≤ t^a / (a B(a, b)) · max(1, (1 − t)^(b − 1)): below this t the integrand is 1 to rounding
    start = min(-1.0, (math.log(a) + float(special.betaln(a, b)) - log_n - 40) / a)
    logit = np.linspace(start, 80.0, 8001)
    t, rest = special.expit(logit), special.expit(-logit)
    below, above = special.betainc(a, b, t), special.betainc(b, a, rest)  # G and 1 − G, each accurate where small
    with np.errstate(divide="ignore"):
        hazard = -np.where(below < 0.5, np.log1p(-below), np.log(above))  # −ln(1 − G)
        integrand = np.exp(-np.exp(np.minimum(log_n + np.log(hazard), 700.0)))
    return float(t[0] + np.trapezoid(integrand * t * rest, logit))
