"""What experts write: their directions read by the logit lens, and the tokens on which they are chosen."""

from __future__ import annotations

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers.models.activations import ActivationStore
from helpers.models.teachers import Teacher
from helpers.parts.inside import LayerRows
from helpers.settings import allowed
from helpers.study.scores import FEWEST, Comparison, Sums, Totals


@torch.no_grad()
def lens(teacher: Teacher, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """Logit lens (nostalgebraist 2020): the model's final norm and unembedding applied to a direction by itself.

    What is left out: every layer in between, and the rest of the residual stream, whose length sets the norm's scale.
    Only the order within a row means something. Raises `ValueError` where no final norm is found.
    """
    norms = [module for name, module in teacher.model.base_model.named_children() if "norm" in name]
    allowed(bool(norms), f"teacher={teacher.name!r} has no final norm", "a model that ends in one")
    long = directions.to(teacher.device, teacher.dtype) * directions.shape[1] ** 0.5
    return teacher.model.get_output_embeddings()(norms[-1](long)).float().cpu()


def oriented(bench: LayerRows) -> Float[Tensor, "experts d_model"]:
    """First directions with the sign in which each expert's tokens have them on average (fitting rows, centred).

    A principal component has no sign of its own. An expert that was never chosen keeps the one it has.
    """
    chosen, first = bench.choice("fitting").indices, bench.directions[:, 0]
    along = (bench.rows("fitting", "mlp_out") @ first.T).gather(1, chosen)
    total = along.new_zeros(len(first)).scatter_add(0, chosen.flatten(), along.flatten())
    return first * torch.where(total < 0, -1.0, 1.0)[:, None]


def next_tokens(store: ActivationStore) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Rows that have a next token in the same piece of text, and that token."""
    rows = np.flatnonzero(store.rows["text"][:-1] == store.rows["text"][1:])
    return rows, np.array(store.token_id)[rows + 1]


def lens_hits(bench: LayerRows, logits: Float[Tensor, "experts vocabulary"], top: int) -> dict[str, Comparison]:
    """Whether an expert's direction, read by the lens, says what comes next where that expert is chosen.

    For row t let h_ti say whether its next token is among the `top` words of direction i, and b_i be the mean of h_ti
    over all rows. Over all pairs of a row and an expert j chosen there: `own` is the mean of h_tj, `base` that of b_j
    (what common words give), `shuffled` that of h_ti − b_i over the n − k directions i whose experts are NOT chosen
    there, and `lift` what own − base has beyond shuffled: what the pairing of expert and direction is worth. Judging
    rows only; intervals over experts × articles.
    """
    allowed(1 <= top < logits.shape[1], f"top={top} words", f"1 to {logits.shape[1] - 1}")
    table, scales = _hits(bench, logits, top), {"own": "logit", "base": "logit", "shuffled": "plain", "lift": "plain"}
    return {
        name: table.compare(lambda cell, name=name: _shares(cell)[name], fewest=FEWEST, scale=scale)
        for name, scale in scales.items()  # the plain ones may be negative
    }


def _hits(bench: LayerRows, logits: Tensor, top: int) -> Sums:
    """Experts in the place of seeds, articles as units; `every` has the hits of all directions on all rows."""
    rows, after = next_tokens(bench.judging)
    n, k = len(logits), bench.moe.top_k
    words = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, logits.topk(top, dim=1).indices, True)
    hit = words[:, torch.from_numpy(after).long()].T.double().numpy()  # rows × directions
    chose = np.zeros((len(rows), n))
    np.put_along_axis(chose, bench.choice().indices.cpu().numpy()[rows], 1.0, axis=1)
    stranger = (hit * (1 - chose)).sum(1) / (n - k)
    _, article = np.unique(np.array(bench.judging.article)[rows], return_inverse=True)
    of_article = np.eye(article.max() + 1)[article].T  # articles × rows
    every = of_article @ hit
    experts = {}
    for j in range(n):
        mine = of_article * chose[:, j]
        experts[j] = {"chosen": mine.sum(1), "own": mine @ hit[:, j], "anywhere": every[:, j]}
        experts[j] |= {"strangers": mine @ stranger, "pairs": mine @ (1 - chose) / (n - k)}
    return Sums({"": experts}, {"rows": of_article.sum(1), "every": every})


def _shares(cell: Totals) -> dict[str, float]:
    chosen = max(cell.total("chosen"), 1.0)
    by_chance = cell["every"][0] / cell["rows"][0]  # of every direction, whichever experts were drawn
    own, base = cell.total("own") / chosen, float((cell["chosen"] * cell["anywhere"] / cell["rows"]).sum()) / chosen
    shuffled = float(cell.total("strangers") - cell["pairs"].sum(0) @ by_chance) / chosen
    return {"own": own, "base": base, "shuffled": shuffled, "lift": own - base - shuffled}


def contexts(bench: LayerRows, expert: int, count: int) -> list[tuple[str, str, str]]:
    """The judging rows on which the layer weighs an expert most: text before, the token, text after."""
    choice = bench.choice()
    weight = torch.where(choice.indices == expert, choice.values, 0.0).amax(1)
    best = weight.topk(min(count, len(weight)))
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [bench.judging.context(row, before=6, after=3) for value, row in found if value > 0]
