"""Slow and obvious versions of `helpers.parts.bounds`: one number at a time, with Python's own integers and floats."""

import math


def kl(p, q):
    total = 0.0
    for a, b in ((p, q), (1 - p, 1 - q)):
        if a > 0:
            total += math.inf if b == 0 else a * math.log(a / b)
    return total


def kl_of_fvu(p, f):
    """kl(p ‖ 1 − F) without rounding 1 − F, for 0 < F < 1."""
    return (p * (math.log(p) - math.log1p(-f)) if p > 0 else 0.0) + (1 - p) * (math.log(1 - p) - math.log(f))


def log_configurations(n, k):
    return math.log(math.comb(n, k))


def fvu_bound(w, d, log_n):
    """Halve [0, 1 − w/d] until it cannot be halved: kl falls along it, from infinity to 0."""
    if w >= d:
        return 0.0
    low, high = 0.0, 1 - w / d
    while low < (middle := (low + high) / 2) < high:
        if kl_of_fvu(w / d, middle) > 2 * log_n / d:
            low = middle
        else:
            high = middle
    return low
