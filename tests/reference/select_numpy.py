"""Each rule of choosing as its paper says it, one score at a time: which pairs of input and atom are chosen."""

import numpy as np


def pairs(scores: np.ndarray, k: int, rule: str, **numbers) -> set[tuple[int, int]]:
    batch, n = scores.shape
    best = [sorted(range(n), key=lambda j, row=row: -row[j]) for row in scores]
    if rule == "token":
        return {(b, j) for b in range(batch) for j in best[b][:k]}
    if rule == "batch":
        every = sorted(((b, j) for b in range(batch) for j in range(n)), key=lambda pair: -scores[pair])
        return set(every[: k * batch])
    if rule == "threshold":
        return {(b, j) for b in range(batch) for j in range(n) if scores[b, j] > numbers["threshold"][j]}
    if rule == "atom":
        taken = min(batch, max(1, round(k * batch / n)))
        return {(b, j) for j in range(n) for b in sorted(range(batch), key=lambda b, j=j: -scores[b, j])[:taken]}
    if rule == "groups":
        size, found = n // numbers["n_groups"], set()
        for b, row in enumerate(scores):
            order = sorted(range(numbers["n_groups"]), key=lambda g, row=row: -max(row[g * size : (g + 1) * size]))
            open_ = [j for j in best[b] if j // size in order[: numbers["groups"]]]
            found |= {(b, j) for j in open_[:k]}
        return found
    if rule == "always":
        first, found = range(numbers["always"]), set()
        for b in range(batch):
            found |= {(b, j) for j in [*first, *(j for j in best[b] if j not in first)][:k]}
        return found
    if rule == "positive":
        return {(b, j) for b in range(batch) for j in range(n) if scores[b, j] > 0}
    if rule == "magnitude":
        return {(b, j) for b, row in enumerate(scores) for j in sorted(range(n), key=lambda j, r=row: -abs(r[j]))[:k]}
    raise ValueError(rule)


def output(model, x: np.ndarray, chosen: set[tuple[int, int]]) -> np.ndarray:
    """b_out + Σ over the chosen pairs of g · a(e_j·x + β_j) d_j of an untied or tied model without a shared part."""

    def array(t):
        return t.detach().double().numpy()

    router, encoder, decoder = model.router, model.encoder, model.decoder
    b_in = 0 if model.b_in is None else array(model.b_in)
    y = np.zeros((len(x), model.d_out)) + (0 if model.b_out is None else array(model.b_out))
    for b, sample in enumerate(x - b_in):
        scores = array(router.weight) @ sample + array(router.bias)
        own = [j for i, j in sorted(chosen) if i == b]
        for j in own:
            gate = {
                "hard": 1.0,
                "score": scores[j],
                "softmax": np.exp(scores[j]) / np.exp(scores[own]).sum(),
                "softmax before": np.exp(scores[j]) / np.exp(scores).sum(),
                "sigmoid": (1 / (1 + np.exp(-scores[j]))) / (1 / (1 + np.exp(-scores[own]))).sum(),
            }[model.gate]
            z = array(encoder.vectors())[j] @ sample + array(encoder.bias)[j]
            y[b] += gate * (max(z, 0) if model.activation == "relu" else z) * array(decoder.weight)[j]
    return y
