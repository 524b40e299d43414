"""The family written as slowly and plainly as possible, one sample and one expert at a time, in NumPy."""

import math

import numpy as np

GELU = np.vectorize(lambda z: 0.5 * z * (1 + math.erf(z / math.sqrt(2))))
ACTIVATIONS = {"identity": lambda z: z, "relu": lambda z: np.maximum(z, 0), "gelu": lambda z: GELU(z)}


def output(model, x: np.ndarray) -> np.ndarray:
    """y(x) of a `RankOneDictionary` for rows x, from its parameters alone."""

    def array(t):
        return None if t is None else t.detach().double().numpy()

    def rows(part):
        weight, bias, down = array(part.weight), array(part.bias), array(part.down)
        return weight if down is None else weight @ down, np.zeros(len(weight)) if bias is None else bias

    (routes, route_bias), (e, beta), (d, _) = rows(model.router), rows(model.encoder), rows(model.decoder)
    b_in, b_out, c = array(model.b_in), array(model.b_out), array(model.selection_bias)
    outputs = []
    for sample in x:
        centred = sample - (0 if b_in is None else b_in)
        scores = np.array([row @ centred + b for row, b in zip(routes, route_bias, strict=True)])
        chosen = np.argsort(-(scores + (0 if c is None else c)), kind="stable")[: model.k]
        y = np.zeros(d.shape[1])
        for expert in chosen:
            gate = {
                "hard": 1.0,
                "score": scores[expert],
                "softmax": math.exp(scores[expert]) / sum(math.exp(scores[j]) for j in chosen),
            }[model.gate]
            for atom in range(expert * model.expert_rank, (expert + 1) * model.expert_rank):
                z = e[atom] @ centred + beta[atom]
                y += gate * float(ACTIVATIONS[model.activation](z)) * d[atom]
        if b_out is not None:
            y += b_out
        if model.shared is not None:
            first, _, second = model.shared
            hidden = GELU(array(first.weight) @ sample + array(first.bias))
            y += array(second.weight) @ hidden + array(second.bias)
        outputs.append(y)
    return np.stack(outputs)
