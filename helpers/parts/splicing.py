"""What a language model loses with a dictionary's reconstructions in the place of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.dictionary import RankOneDictionary
from helpers.dictionary.pursuit import least_squares, omp
from helpers.models import activations, teachers
from helpers.models.corpora import Texts
from helpers.models.teachers import Splice, Teacher
from helpers.settings import allowed

WAYS = ("encoder", "solved", "pursuit")
"""How codes are found: the encoder's; its atoms with least-squares coefficients; matching pursuit's atoms."""

BATCH = 8
"""Pieces of text in a forward pass."""


@dataclass(frozen=True)
class Passage:
    """Held-out text, and the place in the model where its rows are replaced. Names only: it travels to a worker."""

    teacher: str
    corpus: str
    layer: int
    site: str
    n_tokens: int
    split: str = "test"
    device: str = "cpu"
    cache_dir: str | None = field(default=None, compare=False)

    @property
    @cache  # noqa: B019 (passages are names: few, and for as long as the process)
    def scene(self) -> Scene:
        """The model and its rows on this text: made once in a process."""
        return Scene(self, teachers.load(self.teacher, device=self.device, cache_dir=self.cache_dir))


def by_article(teacher: Teacher, pieces: Texts, splice: Splice | None = None) -> pd.DataFrame:
    """A model's cross-entropy on pieces of text, by article: columns `nats` (sums) and `tokens`."""
    found = activations.losses(teacher, pieces, splice, batch_size=BATCH)
    return found.groupby("article")[["nats", "tokens"]].sum()


def ablated(
    teacher: Teacher, pieces: Texts, layer: int, site: str, mean: Float[Tensor, " d_model"]
) -> dict[str, Float[np.ndarray, " articles"]]:
    """Nats by article with `zero` in the place of a site's rows, and with their `mean` (in the model's own units)."""
    splices = {"zero": Splice.zero(layer, site), "mean": Splice.mean(layer, site, mean)}
    return {name: by_article(teacher, pieces, each).nats.to_numpy() for name, each in splices.items()}


class Scene:
    """A model on a passage: its rows at the site, in the order in which it meets them, and its loss with others there.

    `rows` [rows, d_model] in the model's own units, `articles` [rows]; `clean` [articles] is its loss in nats.
    """

    def __init__(self, passage: Passage, teacher: Teacher):
        self.passage, self.teacher = passage, teacher
        self._pieces = activations.texts(teacher, passage.corpus, n_tokens=passage.n_tokens, split=passage.split)
        parts: list[Tensor] = []

        def look(rows: Tensor) -> Tensor:
            parts.append(rows.float().cpu())
            return rows

        self.clean = self._nats(look)
        self.rows, self._sizes = torch.cat(parts), [len(part) for part in parts]
        pieces = self._pieces
        order = [i for batch in pieces.batches(BATCH) for i in batch]
        self.articles = np.concatenate([np.full(len(pieces.tokens[i]) - pieces.bos, pieces.articles[i]) for i in order])

    def nats(self, rows: Float[Tensor, "rows d_model"]) -> Float[np.ndarray, " articles"]:
        """The model's loss by article, with these in the place of `rows`."""
        shape, own = tuple(rows.shape), tuple(self.rows.shape)
        allowed(shape == own, f"rows has shape {shape}", f"{own}, as the passage's")
        parts = iter(rows.split(self._sizes))
        return self._nats(lambda given: next(parts).to(given))

    def yardstick(self, mean: Float[Tensor, " d_model"]) -> dict[str, Float[np.ndarray, " articles"]]:
        """Columns for `scores.Sums`: the loss `clean`, and those of `ablated`."""
        return {"clean": self.clean} | ablated(self.teacher, self._pieces, self.passage.layer, self.passage.site, mean)

    def _nats(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        splice = Splice(self.passage.layer, self.passage.site, function)
        return by_article(self.teacher, self._pieces, splice).nats.to_numpy()


@torch.no_grad()
def reconstructions(
    sae: RankOneDictionary, rows: Float[Tensor, "rows d_model"], way: str = "encoder", *, batch_size: int = 4096
) -> Float[Tensor, "rows d_model"]:
    """b_dec + Σ values · d_j with codes found in a way of `WAYS`; matching pursuit chooses by SIGNED correlation, as
    paper B does, and solves for coefficients of either sign."""
    where, parts = next(sae.parameters()), []
    for part in rows.split(batch_size):
        x = part.to(where.device, where.dtype)
        codes = omp(x - sae.b_out, sae.decoder, sae.k, select="signed") if way == "pursuit" else sae.encode(x)
        if way == "solved":
            codes = replace(codes, values=least_squares(x - sae.b_out, sae.decoder, codes.indices))
        parts.append(sae.decode(codes).cpu())
    return torch.cat(parts).to(rows)
