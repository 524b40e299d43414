"""Interpolated modified Kneser–Ney language model: what a table of counts knows, as a yardstick for a trained model.

Chen & Goodman (1999). The probability of a token w after the n−1 tokens h before it is

    p_n(w | h) = (c(hw) − D(c(hw))) / Σ_v c(hv) + γ(h) · p_{n−1}(w | h without its first token),

with a discount D for counts of 1, of 2 and of 3 or more, estimated from the counts of counts of each order; γ(h) is the
mass the discounts take away. Counts of the highest order are those of the text. Of the lower orders they say in how
many different tokens' company a sequence was seen (how many stand before it), except where it begins a text, before
which nothing can stand. Below the unigrams is the uniform distribution, so no probability is zero.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, Int


@dataclass(frozen=True, eq=False)
class _Order:
    """One order's n-grams: `keys` = number of the context · vocabulary + token, sorted; rows of a context together."""

    keys: Int[np.ndarray, " ngrams"]
    counts: Int[np.ndarray, " ngrams"]
    discounts: Float[np.ndarray, " classes"]
    totals: Float[np.ndarray, " contexts"]
    gammas: Float[np.ndarray, " contexts"]


class KneserNey:
    """The model of `texts`, each a sequence of token ids that begins with `bos`; every text is followed by `bos`.

    Args:
        texts: token ids below `vocabulary`; `bos` at the front of each, and nowhere else.
        order: the longest n-gram; 5 looks at four tokens before.

    Raises `ValueError` for a text that does not begin with `bos`, an id outside the vocabulary, or an order below 1.
    """

    def __init__(self, texts: Sequence[Int[np.ndarray, " _"]], *, vocabulary: int, bos: int, order: int = 5):
        if order < 1:
            raise ValueError(f"order={order} is no n-gram; allowed: at least 1")
        self.vocabulary, self.bos, self.order = vocabulary, bos, order
        tokens, place = self._flat([np.append(text, bos) for text in texts])
        context, found = np.zeros(len(tokens), np.int64), []
        for n in range(1, order + 1):
            here = np.flatnonzero(
                place >= max(1, n - 1)
            )  # where an n-gram ends; a BOS in front is never one of its own
            keys, index, inverse, counts = np.unique(
                context[here] * vocabulary + tokens[here], return_index=True, return_inverse=True, return_counts=True
            )
            row = np.full(len(tokens), -1)
            row[here] = inverse
            found.append((keys, counts, here[index], row))
            context = np.roll(tokens if n == 1 else row, 1)  # of the order one up: the n-gram that ends a token before
        self.orders: list[_Order] = []
        contexts = 1
        for n, (keys, counts, first, row) in enumerate(found, 1):
            if n < order:
                neighbours = np.bincount(row[found[n][2]], minlength=len(keys))
                counts = np.where(place[first] == n - 1, counts, neighbours)
            self.orders.append(_discounted(keys, counts, contexts, vocabulary))
            contexts = vocabulary if n == 1 else len(keys)

    def _flat(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All tokens in a row, and the place of each in its text."""
        for number, text in enumerate(texts):
            if len(text) == 0 or text[0] != self.bos:
                raise ValueError(f"text {number} does not begin with bos={self.bos}; allowed: texts that do")
        tokens = np.concatenate(texts).astype(np.int64)
        if tokens.min() < 0 or tokens.max() >= self.vocabulary:
            raise ValueError(f"token ids {tokens.min()} to {tokens.max()}; allowed: 0 to {self.vocabulary - 1}")
        lengths = np.array([len(text) for text in texts])
        starts = np.cumsum(lengths) - lengths
        return tokens, np.arange(len(tokens)) - np.repeat(starts, lengths)

    def nats(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Float[np.ndarray, " texts"]:
        """−log p of each text's tokens after its BOS, summed, in nats; what follows its last token is not asked for."""
        tokens, place = self._flat(texts)
        p = np.where(place > 0, self._probabilities(tokens, place), 1.0)
        logs = -np.log(p)
        ends = np.cumsum([len(text) for text in texts])
        return np.diff(np.concatenate([[0.0], np.cumsum(logs)])[np.concatenate([[0], ends])])

    def next(self, history: Int[np.ndarray, " _"]) -> Float[np.ndarray, " vocabulary"]:
        """Probability of each token of the vocabulary after `history`, which begins with BOS."""
        texts = [np.append(history, token) for token in range(self.vocabulary)]
        tokens, place = self._flat(texts)
        return self._probabilities(tokens, place)[place == len(history)]

    def _probabilities(self, tokens: np.ndarray, place: np.ndarray) -> np.ndarray:
        p = np.full(len(tokens), 1 / self.vocabulary)
        context = np.zeros(len(tokens), np.int64)  # of the order at hand; -1 where it was never seen
        for n, table in enumerate(self.orders, 1):
            known = context >= 0
            key = context * self.vocabulary + tokens
            row = np.minimum(np.searchsorted(table.keys, key), len(table.keys) - 1)
            found = known & (table.keys[row] == key)
            count = np.where(found, table.counts[row], 0)
            known &= table.totals[context] > 0
            own = (count - table.discounts[np.minimum(count, 3)]) / np.maximum(table.totals[context], 1)
            p = np.where(known, own + table.gammas[context] * p, p)
            context = np.roll(tokens if n == 1 else np.where(found, row, -1), 1)
            context[place == 0] = -1
        return p


def _discounted(keys: np.ndarray, counts: np.ndarray, contexts: int, vocabulary: int) -> _Order:
    """Discounts from the counts of counts (Chen & Goodman 1999), and each context's total and γ."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in range(1, 5))
    if min(n1, n2, n3) == 0:  # a text too small for the estimate
        discounts = np.array([0.0, 0.5, 0.5, 0.5])
    else:
        y = n1 / (n1 + 2 * n2)
        discounts = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
    owner = keys // vocabulary
    totals = np.bincount(owner, counts, contexts)
    taken = np.bincount(owner, discounts[np.minimum(counts, 3)], contexts)
    return _Order(keys, counts, discounts, totals, taken / np.maximum(totals, 1))
