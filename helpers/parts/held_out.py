"""What a trained mixture is judged by: the loss of held-out text beside a table of counts, and what its router does.

The table of counts is an interpolated modified Kneser–Ney language model (Chen & Goodman 1999). The probability of a
token w after the n−1 tokens h before it is

    p_n(w | h) = (c(hw) − D(c(hw))) / Σ_v c(hv) + γ(h) · p_{n−1}(w | h without its first token),

with a discount D for counts of 1, of 2 and of 3 or more, estimated from the counts of counts of each order; γ(h) is the
mass the discounts take away. Counts of the highest order are those of the text. Of the lower orders they say in how
many different tokens' company a sequence was seen (how many stand before it), except where it begins a text, before
which nothing can stand. Below the unigrams is the uniform distribution, so no probability is zero.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from scipy.special import rel_entr
from transformers import PreTrainedTokenizerBase

from helpers.models import activations, corpora
from helpers.models.teachers import Teacher
from helpers.parts.explained import mean_loss
from helpers.parts.mixture import BOS
from helpers.settings import allowed
from helpers.study.scores import interval

BLOCKS = 10
"""Runs of text that information is measured without, one after the other."""

# -- n-grams -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _NGrams:
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
        allowed(order >= 1, f"order={order} is no n-gram", "at least 1")
        self.vocabulary, self.bos, self.order = vocabulary, bos, order
        tokens, place = self._flat([np.append(text, bos) for text in texts])
        context, found = np.zeros(len(tokens), np.int64), []
        for n in range(1, min(order, 1 + int(place.max())) + 1):  # a longer n-gram is nowhere
            here = np.flatnonzero(place >= max(1, n - 1))  # where an n-gram ends; a BOS in front is none of its own
            ask = {"return_index": True, "return_inverse": True, "return_counts": True}
            keys, index, inverse, counts = np.unique(context[here] * vocabulary + tokens[here], **ask)
            row = np.full(len(tokens), -1)
            row[here] = inverse
            found.append((keys, counts, here[index], row))
            context = np.roll(tokens if n == 1 else row, 1)  # of the order one up: the n-gram that ends a token before
        self.orders: list[_NGrams] = []
        contexts = 1
        for n, (keys, counts, first, row) in enumerate(found, 1):
            if n < len(found):
                neighbours = np.bincount(row[found[n][2]], minlength=len(keys))
                counts = np.where(place[first] == n - 1, counts, neighbours)
            self.orders.append(_discounted(keys, counts, contexts, vocabulary))
            contexts = vocabulary if n == 1 else len(keys)

    def _flat(self, texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
        """All tokens in a row, and the place of each in its text."""
        allowed(len(texts) > 0, "texts is empty", "at least one text")
        for number, text in enumerate(texts):
            begins = len(text) > 0 and text[0] == self.bos
            allowed(begins, f"text {number} does not begin with bos={self.bos}", "texts that do")
        tokens = np.concatenate(texts).astype(np.int64)
        low, high = tokens.min(), tokens.max()
        allowed(0 <= low <= high < self.vocabulary, f"token ids {low} to {high}", f"0 to {self.vocabulary - 1}")
        return tokens, np.concatenate([np.arange(len(text)) for text in texts])

    def nats(self, texts: Sequence[Int[np.ndarray, " _"]]) -> Float[np.ndarray, " texts"]:
        """−log p of each text's tokens after its BOS, summed, in nats; what follows its last token is not asked for."""
        tokens, place = self._flat(texts)
        p = np.where(place > 0, self._probabilities(tokens, place), 1.0)
        return np.add.reduceat(-np.log(p), np.flatnonzero(place == 0))

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


def _discounted(keys: np.ndarray, counts: np.ndarray, contexts: int, vocabulary: int) -> _NGrams:
    """Discounts from the counts of counts (Chen & Goodman 1999), and each context's total and γ."""
    n1, n2, n3, n4 = (int((counts == c).sum()) for c in range(1, 5))
    discounts = np.array([0.0, 0.5, 0.5, 0.5])
    if min(n1, n2, n3):
        y = n1 / (n1 + 2 * n2)
        estimated = np.array([0.0, 1 - 2 * y * n2 / n1, 2 - 3 * y * n3 / n2, 3 - 4 * y * n4 / n3])
        if min(estimated[1:]) > 0:  # else the text is too small for the estimate, as where a count of counts is 0
            discounts = estimated
    owner = keys // vocabulary
    totals = np.bincount(owner, counts, contexts)
    taken = np.bincount(owner, discounts[np.minimum(counts, 3)], contexts)
    return _NGrams(keys, counts, discounts, totals, taken / np.maximum(totals, 1))


# -- held-out loss -----------------------------------------------------------------------------------------------------


def bytes_per_token(tokenizer: PreTrainedTokenizerBase) -> Int[np.ndarray, " vocabulary"]:
    """UTF-8 bytes that each token of a byte-level vocabulary stands for; 0 for BOS."""
    names = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    return np.array([0 if name == BOS else len(name) for name in names])


def held_out_losses(
    model: Teacher | KneserNey, corpus: str, split: str, n_tokens: int, *, reader: Teacher | None = None
) -> pd.DataFrame:
    """Loss of held-out text: one row a piece with `article`, `source`, `nats`, `tokens` and `bytes` (UTF-8).

    Every model is given the same pieces, those that `reader` reads (default: the model itself): at most 256 tokens
    with BOS, and nothing before them. Raises `ValueError` for n-grams without a reader, and for a model whose tokens
    are not the reader's.
    """
    reader = reader or model
    allowed(isinstance(reader, Teacher), "reader=None: n-grams have no tokenizer", "the teacher they are compared with")
    pieces = activations.texts(reader, corpus, n_tokens=n_tokens, split=split)
    if isinstance(model, Teacher):
        same = model.tokenizer.get_vocab() == reader.tokenizer.get_vocab()
        allowed(same, f"model={model.name!r} has another tokenizer", f"that of reader={reader.name!r}")
        found = activations.losses(model, pieces, batch_size=16)
    else:
        tokens = [len(piece) - 1 for piece in pieces.tokens]
        found = pd.DataFrame({"article": pieces.articles, "nats": model.nats(pieces.tokens), "tokens": tokens})
    size, rows = bytes_per_token(reader.tokenizer), corpora.load(corpus, split).to_pandas()
    source = dict(zip(rows.article, rows.source if "source" in rows else [corpus] * len(rows), strict=True))
    return found.assign(bytes=[int(size[p].sum()) for p in pieces.tokens], source=found.article.map(source))


def bits_per_byte(losses: pd.DataFrame, against: pd.DataFrame | None = None) -> tuple[float, float, float]:
    """Bits per byte of a table of `held_out_losses`, or how many more than in `against`, a table of the same text;
    and the ends of a 95 % interval over documents, NaN for fewer than five of them."""
    sums = losses.groupby("article")[["nats", "bytes"]].sum()
    if against is not None:
        sums["nats"] -= against.groupby("article").nats.sum()
    found = mean_loss(sums, "bytes")
    return tuple(nats / math.log(2) for nats in (found.value, *(found.ci or (math.nan, math.nan))))


def bits_table(tables: dict[str, pd.DataFrame], against: str) -> pd.DataFrame:
    """Bits per byte of each model and source, and the difference to model `against` on the same documents.

    Columns model, source, documents, perplexity (per token), bits, low, high, difference, difference_low,
    difference_high; intervals are 95 %, over documents, the difference's over those of both models at once.
    """
    rows = []
    for model, table in tables.items():
        for source in ("all", *sorted(set(table.source))):
            part, other = (t if source == "all" else t[t.source == source] for t in (table, tables[against]))
            row = {"model": model, "source": source, "documents": part.article.nunique()}
            row["perplexity"] = math.exp(part.nats.sum() / part.tokens.sum())
            row |= zip(("bits", "low", "high"), bits_per_byte(part), strict=True)
            ends = ("difference", "difference_low", "difference_high")
            rows.append(row | dict(zip(ends, bits_per_byte(part, other), strict=True)))
    return pd.DataFrame(rows)


# -- what the router does ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Routing:
    """Which experts each token of a text was sent to, the most weighted first; neither BOS nor padding is in it."""

    tokens: Int[np.ndarray, " rows"]
    pieces: Int[np.ndarray, " rows"]
    """Number of the piece of text; its tokens stand one after the other."""
    experts: Int[np.ndarray, "rows layers k"]
    n_experts: int

    def load(self) -> Float[np.ndarray, "layers experts"]:
        """Share of all choices that fall on each expert: 1/n_experts where the load is even."""
        by_layer = self.experts.transpose(1, 0, 2)
        return np.stack([np.bincount(e.ravel(), minlength=self.n_experts) / e.size for e in by_layer])

    def information(self, offset: int = 0, *, shuffles: int = 20, seed: int = 0) -> pd.DataFrame:
        """Mutual information in bits of the token `offset` places on (0: the routed one) and an expert drawn from its
        chosen k: one row a layer with `bits`, and `shuffled` and `largest shuffled`, its mean and largest value over
        `shuffles` times that tokens were dealt out anew (`bits` above the largest: p ≤ 1/(shuffles + 1)); `low` and
        `high` are the interval of `bits` minus `shuffled`, a jackknife over `BLOCKS` runs of text.

        Counts alone give positive information between things that have none to do with each other, the more the rarer
        the tokens are; `shuffled` is how much.
        """
        there = np.flatnonzero(self.pieces == np.roll(self.pieces, -offset))
        there = there[(there + offset >= 0) & (there + offset < len(self.pieces))]
        tokens = np.unique(self.tokens[there + offset], return_inverse=True)[1]
        blocks = np.arange(len(there)) * BLOCKS // max(1, len(there))
        random, apart, rows = np.random.default_rng(seed), np.random.default_rng([seed, 1]), []
        for layer, chosen in enumerate(self.experts[there].transpose(1, 0, 2)):

            def parts(kept, random, chosen=chosen):
                """Information of the rows that are kept, and what it is by chance."""
                dealt = [random.permutation(tokens[kept]) for _ in range(shuffles)]
                by_chance = [_information(each, chosen[kept], self.n_experts) for each in dealt]
                return _information(tokens[kept], chosen[kept], self.n_experts), by_chance

            found, by_chance = parts(blocks >= 0, random)
            left = [parts(blocks != block, apart) for block in range(BLOCKS)]
            without = np.array([bits - np.mean(chance) for bits, chance in left])
            low, high = interval(found - np.mean(by_chance), without)
            rows.append((layer, found, np.mean(by_chance), max(by_chance), low, high))
        return pd.DataFrame(rows, columns=["layer", "bits", "shuffled", "largest shuffled", "low", "high"])

    def favourites(self, layer: int, tokenizer: PreTrainedTokenizerBase, *, n: int = 5) -> pd.DataFrame:
        """For each expert its `load`, and of the tokens seen ten times or more the `n` that are sent to it most
        often (of equals the more frequent): `tokens`, and `shares`, how often each is."""
        chosen = np.zeros((self.tokens.max() + 1, self.n_experts))
        np.add.at(chosen, (np.repeat(self.tokens, self.experts.shape[2]), self.experts[:, layer].ravel()), 1)
        seen = np.bincount(self.tokens)
        known = np.flatnonzero(seen >= 10)
        share, load = chosen[known] / seen[known, None], self.load()[layer]
        rows = []
        for expert in range(self.n_experts):
            best = np.lexsort((-seen[known], -share[:, expert]))[:n]
            words = [tokenizer.decode([int(known[i])]) for i in best]
            rows.append((expert, load[expert], words, share[best, expert]))
        return pd.DataFrame(rows, columns=["expert", "load", "tokens", "shares"])


def _information(tokens: Int[np.ndarray, " rows"], experts: Int[np.ndarray, "rows k"], n_experts: int) -> float:
    cells = np.repeat(tokens, experts.shape[1]) * n_experts + experts.ravel()
    joint = np.bincount(cells, minlength=(tokens.max() + 1) * n_experts).reshape(-1, n_experts) / cells.size
    return float(rel_entr(joint, joint.sum(1, keepdims=True) * joint.sum(0)).sum() / math.log(2))


@torch.inference_mode()
def routing(teacher: Teacher, corpus: str, *, n_tokens: int) -> Routing:
    """Where the tokens of held-out text are sent at every layer. Raises `ValueError` for a model without routers."""
    has_router = hasattr(teacher.model.config, "num_experts_per_tok")
    allowed(has_router, f"teacher={teacher.name!r} has no router", "a mixture of experts")
    pieces = activations.texts(teacher, corpus, n_tokens=n_tokens, split="test")
    k, found = teacher.model.config.num_experts_per_tok, []
    for batch in pieces.batches(16):
        ids, mask = pieces.padded(batch)
        ids, mask = ids.to(teacher.device), mask.to(teacher.device)
        out = teacher.model(ids, attention_mask=mask, output_router_logits=True, use_cache=False, logits_to_keep=1)
        kept = teacher.rows_kept(ids, mask)
        chosen = torch.stack([logits.topk(k).indices.view(*ids.shape, k)[kept] for logits in out.router_logits], 1)
        number = torch.tensor(batch)[:, None].expand_as(ids.cpu())[kept.cpu()]
        found.append((ids[kept].cpu().numpy(), number.numpy(), chosen.cpu().numpy()))
    return Routing(*(np.concatenate(part) for part in zip(*found, strict=True)), teacher.model.config.num_experts)
