"""What each latent of a dictionary, or each expert of a layer, fires on, writes and resembles: one latent at a time.

`Dictionary` holds the codes of harvested rows by latent; `explorer` makes of it the page that one looks into.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from jaxtyping import Float, Int
from scipy.sparse import csc_array
from torch import Tensor

from helpers import settings
from helpers.dictionary import RankOneDictionary, SparseCodes
from helpers.dictionary.rows import unit
from helpers.models.activations import ActivationStore
from helpers.models.teachers import Teacher
from helpers.parts import inside
from helpers.parts.language_model import codes_on
from helpers.parts.lens import lens, oriented
from helpers.settings import allowed

CONTEXTS, WORDS, NEAR = 8, 10, 6
"""Of each latent: pieces of text, words that it promotes and that it suppresses, neighbours."""
BEFORE, AFTER = 15, 8
"""Tokens that are shown around one on which a latent fires."""
CHUNK = 64

Ranked = tuple[Int[Tensor, "n m"], Float[Tensor, "n m"]]
"""Numbers of latents or tokens, best first, and what each is worth."""


@dataclass(frozen=True, eq=False)
class Dictionary:
    """Codes of a store's rows, and the vectors of each latent: what it reads along and what it writes along."""

    codes: csc_array
    reads: Float[Tensor, "n d_in"]
    writes: Float[Tensor, "n d_out"]
    unit: str = "latent"

    def __post_init__(self):
        parts = torch.from_numpy(self.codes.data), self.reads, self.writes
        good = all(bool(part.isfinite().all()) for part in parts)
        allowed(good, f"the {self.unit}s have codes or weights that are not finite", "numbers")

    @classmethod
    @torch.no_grad()
    def of_sae(cls, sae: RankOneDictionary, rows: Float[Tensor, "rows d"]) -> Dictionary:
        """An SAE on rows as it reads them."""
        vectors = (each.vectors().detach().cpu() for each in (sae.encoder, sae.decoder))
        return cls(sparse(codes_on(sae, rows), sae.n_atoms), *vectors)

    @classmethod
    def of_experts(cls, bench: inside.LayerRows) -> Dictionary:
        """A layer's experts: codes are the router's weights, and each writes its implicit direction (chapter 10)."""
        codes = sparse(bench.choice(), bench.moe.n_experts)
        return cls(codes, bench.moe.router.cpu(), oriented(bench).cpu(), "expert")

    @property
    def n(self) -> int:
        return self.codes.shape[1]

    @cached_property
    def counts(self) -> Int[np.ndarray, " n"]:
        """On how many rows each fires."""
        return np.diff(self.codes.indptr)

    @cached_property
    def largest(self) -> Float[np.ndarray, " n"]:
        """Largest activation, without its sign; 0 for one that never fires."""
        return abs(self.codes).max(axis=0).toarray().ravel()

    def column(self, j: int) -> tuple[Int[np.ndarray, " fires"], Float[np.ndarray, " fires"]]:
        """Rows on which latent j fires, in rising order, and its activations there."""
        part = slice(*self.codes.indptr[j : j + 2])
        return self.codes.indices[part], self.codes.data[part]

    def strongest(self, j: int, text: Int[np.ndarray, " rows"], count: int = CONTEXTS) -> Int[np.ndarray, " some"]:
        """Rows of the largest activations, at most one from a piece of text, the largest first."""
        rows, values = self.column(j)
        rows = rows[np.lexsort((rows, -np.abs(values)))]
        _, first = np.unique(text[rows], return_index=True)
        return rows[np.sort(first)[:count]]

    def by_place(self, place: Int[np.ndarray, " rows"]) -> Int[np.ndarray, "n places"]:
        """On how many rows of each place each fires."""
        fires = csc_array((np.ones_like(self.codes.indices), self.codes.indices, self.codes.indptr), self.codes.shape)
        return (np.eye(place.max() + 1, dtype=int)[place].T @ fires).T


def sparse(codes: SparseCodes, n: int) -> csc_array:
    """Codes by latent: what is not zero, rows in rising order."""
    fires = codes.fires.cpu().numpy()
    rows, _ = np.nonzero(fires)
    indices, values = (part.detach().cpu().numpy()[fires] for part in (codes.indices, codes.values))
    return csc_array((values, (rows, indices)), shape=(len(fires), n))


def places(store: ActivationStore) -> Int[np.ndarray, " rows"]:
    """Each row's place in its piece of text: 0 for the first token, 1 for the second, 2 for two more, 3 for four …"""
    after = store.position - store.position.min()
    return np.ceil(np.log2(after + 1.0)).astype(int)


def nearest(vectors: Float[Tensor, "n d"], count: int = NEAR) -> Ranked:
    """Of each vector the `count` others with the largest cosine, and these."""
    rows, parts = unit(vectors.float()), []
    for start in range(0, len(rows), CHUNK):
        cosines = rows[start : start + CHUNK] @ rows.T
        itself = torch.arange(len(cosines))
        cosines[itself, start + itself] = -torch.inf
        parts.append(cosines.topk(min(count, len(rows) - 1)))
    return _joined(parts)


def promoted(teacher: Teacher, vectors: Float[Tensor, "n d"], count: int = WORDS) -> dict[str, Ranked]:
    """Tokens whose logit each vector raises most, by the logit lens, and those whose it lowers most."""
    best, worst = [], []
    for some in settings.progress(vectors.split(CHUNK), desc="logit lens", delay=2):
        logits = lens(teacher, some)
        best.append(logits.topk(count))
        worst.append(logits.topk(count, largest=False))
    return {"promoted": _joined(best), "suppressed": _joined(worst)}


def _joined(parts: Sequence[torch.return_types.topk]) -> Ranked:
    return torch.cat([each.indices for each in parts]), torch.cat([each.values for each in parts])


def words(tokenizer, ids: Sequence[int]) -> list[str]:
    """Tokens as they read after another one, with the blank before them where there is one."""
    anchor = tokenizer("a", add_special_tokens=False).input_ids[-1:]
    options = {"clean_up_tokenization_spaces": False}
    first = tokenizer.decode(anchor, **options)
    return [tokenizer.decode([*anchor, i], **options).removeprefix(first) for i in ids]


# -- a dictionary on a text --------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class View:
    """A dictionary on the rows of a store, and what a page or another tool shows of each latent.

    `about` says what it is: name, teacher, layer, site, corpus and the like; `documents` [articles] are titles and
    sources by article. `logits` is what `promoted` gives, or the reason why there is none.
    """

    dictionary: Dictionary
    store: ActivationStore
    about: dict[str, object]
    documents: dict[int, list[str]]
    logits: dict[str, Ranked] | str

    @cached_property
    def rows(self) -> list[Int[np.ndarray, " some"]]:
        """Of each latent the rows that are shown."""
        bar = settings.progress(range(self.dictionary.n), desc="contexts", delay=2)
        return [self.dictionary.strongest(j, self.store.rows["text"]) for j in bar]

    @cached_property
    def starts(self) -> Int[np.ndarray, " pieces"]:
        """First row of each piece of text."""
        return np.flatnonzero(np.diff(self.store.rows["text"], prepend=-1))

    def window(self, row: int) -> slice:
        """The rows shown around one: those of the same piece of text."""
        piece = np.searchsorted(self.starts, row, "right")
        end = np.append(self.starts, self.store.n)[piece]
        return slice(max(int(self.starts[piece - 1]), row - BEFORE), min(int(end), row + AFTER + 1))

    def around(self, j: int, row: int) -> tuple[slice, Float[np.ndarray, " window"]]:
        """The window of a row, and the activation of latent j on each of its tokens."""
        window, (rows, values) = self.window(row), self.dictionary.column(j)
        part = slice(*np.searchsorted(rows, (window.start, window.stop)))
        dense = np.zeros(window.stop - window.start)
        dense[rows[part] - window.start] = values[part]
        return window, dense
