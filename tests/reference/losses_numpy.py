"""Remedies for dead features written as slowly and plainly as possible, from the papers' formulas, in NumPy.

A student is a dict of arrays: e [n, d] and beta [n] (encoder), d [n, d_out] (decoder; absent where it is tied to e) and
b [d] (b_dec, taken off the input and added to the output). What carries no gradient in a formula (choices, residuals,
scales) is an argument here, so that a numerical derivative holds it fixed.
"""

import math

import numpy as np


def pre_activation(p, sample, j):
    return sum(p["e"][j][i] * (sample[i] - p["b"][i]) for i in range(len(sample))) + p["beta"][j]


def scores(p, x):
    return np.array([[pre_activation(p, sample, j) for j in range(len(p["e"]))] for sample in x])


def decoder(p):
    return p.get("d", p["e"])


def output(p, x, k):
    """TopK SAE: b + Σ over the k largest z_j of max(0, z_j) d_j."""
    rows = []
    for z in scores(p, x):
        y = p["b"].copy()
        for j in sorted(range(len(z)), key=lambda j: -z[j])[:k]:
            y = y + max(0.0, z[j]) * decoder(p)[j]
        rows.append(y)
    return np.stack(rows)


def reconstruction(p, x, k, variance):
    """Mean over the batch of ‖x − ŷ‖², over the targets' variance."""
    return sum(float(r @ r) for r in x - output(p, x, k)) / (len(x) * variance)


def switch(p, x, chosen, alpha, temperature):
    """Fedus et al. (2021), eq. 4–6: α·n·Σ f_i P_i."""
    n, total = len(p["e"]), 0.0
    exponentials = [[math.exp(z / temperature) for z in row] for row in scores(p, x)]
    for i in range(n):
        f = sum(1 for row in chosen for j in row if j == i) / sum(len(row) for row in chosen)
        probability = sum(row[i] / sum(row) for row in exponentials) / len(x)
        total += f * probability
    return alpha * n * total


def switch_gradient(s, chosen, alpha, temperature):
    """∂L/∂s_bj = (αn / (Tτ)) · p_j(x_b) · (f_j − Σ_i f_i p_i(x_b)) for T samples."""
    batch, n = s.shape
    f = [sum(1 for row in chosen for j in row if j == i) / chosen.size for i in range(n)]
    gradient = np.zeros_like(s)
    for b in range(batch):
        p = [math.exp(z / temperature) for z in s[b]]
        p = [value / sum(p) for value in p]
        mean = sum(f[i] * p[i] for i in range(n))
        for j in range(n):
            gradient[b, j] = alpha * n / (batch * temperature) * p[j] * (f[j] - mean)
    return gradient


def frequency(p, x, chosen, alpha, temperature, held):
    """α·n·Σ f_i², f_i = ω_i/k: at the arrays `held` what was chosen; beside them f_i moves as in a soft choice of k.

    Soft: fires_i = sigmoid((z_i − θ)/τ) with θ such that Σ fires_i stays what it is at θ = the smallest chosen score.
    """
    n, k, total = len(p["e"]), len(chosen[0]), 0.0
    now, then = scores(p, x), scores(held, x)
    moves = np.zeros(n)
    for b, row in enumerate(chosen):
        fires = [1 / (1 + math.exp(-(z - min(then[b][j] for j in row)) / temperature)) for z in then[b]]
        slopes = [fire * (1 - fire) / temperature for fire in fires]
        centre = sum(slope * (now[b][i] - then[b][i]) for i, slope in enumerate(slopes)) / sum(slopes)
        for i in range(n):
            moves[i] += slopes[i] * (now[b][i] - then[b][i] - centre) / (len(x) * k)
    for i in range(n):
        f = sum(1 for row in chosen for j in row if j == i) / sum(len(row) for row in chosen)
        total += (f + moves[i]) ** 2
    return alpha * n * total


def zloss(p, x, coefficient):
    """Zoph et al. (2022), eq. 5."""
    return coefficient * sum(math.log(sum(math.exp(z) for z in row)) ** 2 for row in scores(p, x)) / len(x)


def loss_free(bias, choices, gamma):
    """Wang et al. (2024), algorithm 1: b_i + γ·sign(mean load − load_i)."""
    loads = [sum(1 for row in choices for j in row if j == i) for i in range(len(bias))]
    mean = sum(loads) / len(loads)
    return np.array([b + gamma * ((mean > load) - (mean < load)) for b, load in zip(bias, loads, strict=True)])


def auxk(p, x, residual, dead, k_aux, coefficient):
    """Gao et al. (2024), §A.2: the k_aux strongest dead latents reconstruct the residual; error over its variance."""
    error, variance = 0.0, 0.0
    mean = sum(residual) / len(residual)
    for sample, e in zip(x, residual, strict=True):
        z = {j: pre_activation(p, sample, j) for j in dead}
        guess = np.zeros_like(e)
        for j in sorted(dead, key=lambda j: -z[j])[:k_aux]:
            guess = guess + max(0.0, z[j]) * decoder(p)[j]
        error += float((guess - e) @ (guess - e))
        variance += float((e - mean) @ (e - mean))
    return coefficient * error / variance


def gated(p, x, sparsity, variance, d=None, b=None):
    """Rajamanoharan et al. (2024), eq. 8, without its first term; `d` and `b` where the decoder is frozen.

    Here w and gamma are the gate's rows and biases. Σπ over the batch, and its reconstruction of x by itself.
    """
    d, b = p["d"] if d is None else d, p["b"] if b is None else b
    total = 0.0
    for sample in x:
        gates = [max(0.0, float(w @ (sample - p["b"]) + g)) for w, g in zip(p["w"], p["gamma"], strict=True)]
        rest = sample - b - sum(gate * row for gate, row in zip(gates, d, strict=True))
        total += sparsity * sum(gates) / variance**0.5 + float(rest @ rest) / variance
    return total / len(x)


def gated_output(p, x):
    """b + Σ over open gates of ReLU(e^r w·(x − b) + mu) d."""
    rows = []
    for sample in x:
        y = p["b"].copy()
        for w, gamma, r, mu, d in zip(*(p[name] for name in ("w", "gamma", "r", "mu", "d")), strict=True):
            if w @ (sample - p["b"]) + gamma > 0:
                y = y + max(0.0, math.exp(r) * float(w @ (sample - p["b"])) + mu) * d
        rows.append(y)
    return np.stack(rows)


def nested(p, x, k, widths, variance):
    """Bussmann et al. (2025): errors of the codes that lie among the first atoms; TopK chooses among all."""
    total = 0.0
    for sample, z in zip(x, scores(p, x), strict=True):
        chosen = sorted(range(len(z)), key=lambda j, z=z: -z[j])[:k]
        for width in widths:
            rest = sample - p["b"] - sum((max(0.0, z[j]) * decoder(p)[j] for j in chosen if j < width), 0 * p["b"])
            total += float(rest @ rest) / variance
    return total / len(x)


def ghosts(p, x, dead):
    return np.stack([sum(math.exp(pre_activation(p, s, j)) * decoder(p)[j] for j in dead) for s in x])


def ghost_scales(p, x, residual, dead):
    """‖e‖ / 2‖g‖, one per sample."""
    return [np.linalg.norm(e) / (2 * np.linalg.norm(g)) for e, g in zip(residual, ghosts(p, x, dead), strict=True)]


def ghost_error(p, x, residual, dead, scales):
    """Jermyn & Templeton (2024): Σ ‖scale·g − e‖², before it is rescaled to the main loss."""
    return sum(float((s * g - e) @ (s * g - e)) for s, g, e in zip(scales, ghosts(p, x, dead), residual, strict=True))


def gradients(loss, p, step=1e-6):
    """Central differences of loss(p) for every number of every array in p."""
    found = {name: np.zeros_like(values) for name, values in p.items()}
    for name, values in p.items():
        for at in np.ndindex(*values.shape):
            sides = []
            for sign in (1, -1):
                moved = {other: array.copy() for other, array in p.items()}
                moved[name][at] += sign * step
                sides.append(loss(moved))
            found[name][at] = (sides[0] - sides[1]) / (2 * step)
    return found
