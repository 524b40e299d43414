"""What a language model loses with a dictionary's reconstructions in the place of its rows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cache

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.dictionary import RankOneDictionary
from helpers.dictionary.pursuit import least_squares, omp
from helpers.models import activations, teachers
from helpers.models.teachers import Splice
from helpers.settings import allowed

WAYS = ("encoder", "solved", "pursuit")
"""How codes are found: the encoder's; its atoms with least-squares coefficients; matching pursuit's atoms."""


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
    def scene(self) -> Scene:
        """The model and its rows on this text: made once in a process."""
        return _scene(self)


@cache
def _scene(passage: Passage) -> Scene:
    return Scene(passage, teachers.load(passage.teacher, device=passage.device, cache_dir=passage.cache_dir))


class Scene:
    """A model on a passage: its rows at the site, in the order in which it meets them, and its loss with others there.

    `rows` [rows, d_model] in the model's own units, `articles` [rows]; `clean` [articles] is its loss in nats.
    """

    def __init__(self, passage: Passage, teacher: teachers.Teacher, batch_size: int = 8):
        self.passage, self.teacher, self.batch_size = passage, teacher, batch_size
        self._pieces = activations.texts(teacher, passage.corpus, n_tokens=passage.n_tokens, split=passage.split)
        parts: list[Tensor] = []

        def look(rows: Tensor) -> Tensor:
            parts.append(rows.float().cpu())
            return rows

        self.clean = self._nats(look)
        self.rows, self._sizes = torch.cat(parts), [len(part) for part in parts]
        pieces = self._pieces
        order = [i for batch in pieces.batches(batch_size) for i in batch]
        self.articles = torch.from_numpy(
            np.concatenate([np.full(len(pieces.tokens[i]) - pieces.bos, pieces.articles[i]) for i in order])
        )

    def nats(self, rows: Float[Tensor, "rows d_model"]) -> Float[np.ndarray, " articles"]:
        """The model's loss by article, with these in the place of `rows`."""
        shape, own = tuple(rows.shape), tuple(self.rows.shape)
        allowed(shape == own, f"rows has shape {shape}", f"{own}, as the passage's")
        parts = iter(rows.split(self._sizes))
        return self._nats(lambda given: next(parts).to(given))

    def yardstick(self, mean: Float[Tensor, " d_model"]) -> dict[str, Float[np.ndarray, " articles"]]:
        """Columns for `scores.Sums`: the loss untouched, with zeros at the site, and with this row (in the model's own
        units) everywhere.
        """
        rows = {"zero": torch.zeros_like(mean), "mean": mean}
        ablated = {name: self.nats(row.to(self.rows).expand_as(self.rows)) for name, row in rows.items()}
        return {"clean": self.clean} | ablated

    def _nats(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        splice = Splice(self.passage.layer, self.passage.site, function)
        frame = activations.losses(self.teacher, self._pieces, splice, batch_size=self.batch_size)
        return frame.groupby("article").nats.sum().to_numpy()


@torch.no_grad()
def reconstructions(
    sae: RankOneDictionary, rows: Float[Tensor, "rows d_model"], way: str = "encoder", *, batch_size: int = 4096
) -> Float[Tensor, "rows d_model"]:
    """b_dec + Σ values · d_j with codes found in a way of `WAYS`; matching pursuit chooses by SIGNED correlation, as
    paper B does, and solves for coefficients of either sign."""
    where, parts = next(sae.parameters()), []
    for part in rows.split(batch_size):
        x = part.to(where.device, where.dtype)
        codes = None if way == "pursuit" else sae.encode(x)
        if way == "pursuit":
            codes = omp(x - sae.b_out, sae.decoder, sae.k, select="signed")
        elif way == "solved":
            codes = replace(codes, values=least_squares(x - sae.b_out, sae.decoder, codes.indices))
        parts.append(sae.decode(codes).cpu())
    return torch.cat(parts).to(rows)
