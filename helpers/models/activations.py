"""Activations of a teacher over a corpus, on disk: harvest once, then stream, and match a Gaussian to them.

`training.Shuffled(store["mlp_in"], fingerprint=store.key, …)` reads shuffled batches without loading the store.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import settings
from helpers.kept import Kept, keep
from helpers.models import corpora, sources
from helpers.models.architecture import OF_MLP
from helpers.models.corpora import Texts, cut, texts
from helpers.models.store import Files
from helpers.models.teachers import SITES, Splice, Teacher, check_sites
from helpers.settings import allowed, one_of

STORE_DTYPES = ("float32", "float16")
BLOCK = 32
"""Pieces of text that are computed together, always all of them: a row's bits do not depend on what was asked for."""
BLOCK_ROWS = 8192


def loss_texts(teacher: Teacher, corpus: str, n_tokens: int, split: str = "test") -> Texts:
    """Text for a loss: of 30 documents, the units of its interval, or fewer with 64 tokens of each, but five."""
    documents = min(30, max(corpora.SEVERAL, n_tokens // 64))
    return texts(teacher, corpus, n_tokens=n_tokens, split=split, documents=documents)


def losses(teacher: Teacher, pieces: Texts, splice: Splice | None = None, *, batch_size: int = 8) -> pd.DataFrame:
    """Cross-entropy of texts: one row per piece with `article`, `nats` (sum) and `tokens` (predicted).

    The mean is `nats.sum() / tokens.sum()`; grouped by article it can be resampled. `pieces`, of `loss_texts` or
    `texts`, are cut once and serve for every splice.
    """
    parts = []
    for batch in settings.progress(pieces.batches(batch_size), desc="cross-entropy", unit="batch", delay=2):
        nats, tokens = teacher.loss(*pieces.padded(batch), splice).per_text()
        parts.append(pd.DataFrame({"article": pieces.articles[batch], "nats": nats, "tokens": tokens}, batch))
    return pd.concat(parts).sort_index()


# -- mean and covariance -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Moments:
    """Count, mean and covariance (divided by n) in float64."""

    n: int
    mean: Float[Tensor, " d"]
    cov: Float[Tensor, "d d"]

    @classmethod
    def empty(cls, d: int) -> Moments:
        return cls(0, torch.zeros(d, dtype=torch.float64), torch.zeros(d, d, dtype=torch.float64))

    @classmethod
    def of(cls, rows: Float[Tensor, "n d"]) -> Moments:
        if not len(rows):
            return cls.empty(rows.shape[1])
        rows = rows.detach().cpu().double()
        centred = rows - rows.mean(0)
        return cls(len(rows), rows.mean(0), centred.T @ centred / len(rows))

    def __add__(self, other: Moments) -> Moments:
        """Moments of both sets of rows together (Chan, Golub & LeVeque 1983), stable where the means are far from 0."""
        n = self.n + other.n
        if 0 in (self.n, other.n):
            return self if self.n else other
        a, b, gap = self.n / n, other.n / n, other.mean - self.mean
        return Moments(n, self.mean + b * gap, a * self.cov + b * other.cov + a * b * torch.outer(gap, gap))

    @property
    def variance(self) -> float:
        """Mean over dimensions of each dimension's variance: tr(cov)/d."""
        return float(self.cov.trace() / len(self.mean))

    @cached_property
    def _root(self) -> Float[Tensor, "d d"]:
        """R with R Rᵀ = cov. Eigenvalues that rounding made negative count as zero, so a singular cov is fine."""
        values, vectors = torch.linalg.eigh(self.cov)
        return vectors * values.clamp(min=0).sqrt()

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """n rows of the Gaussian with this mean and covariance, float32, on the generator's device."""
        z = torch.randn(n, len(self.mean), generator=generator, device=generator.device)
        root, mean = (t.to(generator.device, torch.float32) for t in (self._root, self.mean))
        return z @ root.T + mean


# -- the store ---------------------------------------------------------------------------------------------------------


class ActivationStore:
    """Rows of activations at one layer, memory-mapped: row i of every site belongs to the same token.

    Rows stand in the order of `texts`: piece after piece, token after token, BOS and padding left out.

    Args:
        folder: `…/KEY@N`, the first N rows of what lies in `…/KEY`: all that another process needs.
        sites: those that are to be read.
    """

    def __init__(self, folder: str | Path, sites: Iterable[str], tokenizer=None):
        self.folder, self.sites, self.tokenizer = Path(folder), check_sites(sites), tokenizer
        key, _, n = self.folder.name.partition("@")
        allowed(n.isdecimal(), f"folder={str(folder)!r} names no rows", "a store's folder, which ends with @ and rows")
        self._files = Files(self.folder.with_name(key))
        self.rows = self._files.open("rows", int(n))
        self._arrays = {site: self._files.open(site, int(n)) for site in self.sites}

    def __repr__(self) -> str:
        return f"ActivationStore({self.n:,} rows of {self.d}, sites {', '.join(self.sites)}, {self.key})"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, site: str) -> Float[np.ndarray, "n d"]:
        allowed(site in self._arrays, f"site={site!r} is not in this store", ", ".join(self.sites))
        return self._arrays[site]

    @property
    def n(self) -> int:
        return len(self.rows)

    @property
    def d(self) -> int:
        return self[self.sites[0]].shape[1]

    @property
    def key(self) -> str:
        """Names everything that determines the rows (without the site)."""
        return self.folder.name

    @property
    def article(self) -> Int[np.ndarray, " n"]:
        """The article each row's token stands in."""
        return self.rows["article"]

    @property
    def position(self) -> Int[np.ndarray, " n"]:
        """The token's place in what the model read; BOS, where there is one, is 0."""
        return self.rows["position"]

    @property
    def token_id(self) -> Int[np.ndarray, " n"]:
        return self.rows["token_id"]

    def tensor(self, site: str, rows=slice(None)) -> Float[Tensor, "rows d"]:
        """A copy of some rows (all by default) as float32."""
        return torch.from_numpy(np.array(self[site][rows], dtype=np.float32))

    def context(self, row: int, before: int = 8, after: int = 4) -> tuple[str, str, str]:
        """The text before a row's token, the token, and the text after, as far as the model's piece of text goes."""
        first, end = np.searchsorted(self.rows["text"], self.rows["text"][row], "left"), row + after + 1
        end = min(end, np.searchsorted(self.rows["text"], self.rows["text"][row], "right"))
        parts = slice(max(first, row - before), row), slice(row, row + 1), slice(row + 1, end)
        return tuple(self.tokenizer.decode(self.token_id[part].tolist()) for part in parts)

    def moments(self, site: str) -> Moments:
        """Mean and covariance over all rows, computed once and kept in the cache."""

        def total() -> tuple:
            found = Moments.empty(self[site].shape[1])
            for start in range(0, self.n, BLOCK_ROWS):
                found += Moments.of(self.tensor(site, slice(start, start + BLOCK_ROWS)))
            return found.n, found.mean, found.cov

        return Moments(*keep("moments", [self.key, site], total, cache_dir=self.folder.parent.parent))

    def verify(self) -> None:
        """Read every file and compare checksums; `ValueError` naming the file that is damaged."""
        for name in ("rows", *self.sites):
            self._files.verify(name)


def harvest(
    teacher: Teacher,
    corpus: str = "wikipedia-sample",
    *,
    layer: int | Sequence[int],
    sites: Iterable[str] = OF_MLP,
    n_tokens: int,
    split: str = "train",
    max_length: int = 256,
    batch_size: int = 16,
    store_dtype: str = "float32",
    cache_dir: str | Path | None = None,
) -> ActivationStore | dict[int, ActivationStore]:
    """Activations of `n_tokens` tokens of text at `layer`; a dict of them by layer where several are asked for.

    A store grows: fewer tokens are the beginning of what is there, and one forward pass, which ends at the last site
    asked for, adds what is missing of all sites and layers. The first n rows are the same bits whatever was asked for
    before. Neither padding nor BOS is in them. A harvest that was killed goes on at its last finished block of text;
    two processes that want the same one do not work twice. Fewer than `max_length` come from several documents.

    Raises `ValueError` before any work for what is not there or a full disk; for a damaged store, naming the file.
    """
    layers, sites = _layers(teacher, layer), check_sites(sites)
    one_of("store_dtype", store_dtype, STORE_DTYPES)
    allowed(batch_size >= 1, f"batch_size={batch_size} is no batch", "at least 1")
    allowed(n_tokens >= 1, f"n_tokens={n_tokens} is no text", "at least 1")
    max_length = corpora.spread(teacher, corpus, split, n_tokens, max_length) if n_tokens < max_length else max_length
    what = _identity(teacher) | {"corpus": corpora.fingerprint(corpus), "split": split, "max_length": max_length}
    what |= {"batch_size": batch_size, "block": BLOCK, "store_dtype": store_dtype}
    makers = Teacher, type(teacher), harvest
    asked = {n: Kept("activations", what | {"layer": n}, *makers, cache_dir=cache_dir) for n in layers}
    places = {n: each.folder / each.key for n, each in asked.items()}
    if _lacking(places, sites, n_tokens):
        with contextlib.ExitStack() as locks:
            for each in asked.values():
                locks.enter_context(each.lock())
            if _lacking(places, sites, n_tokens):
                blocks, ended = _blocks(teacher, corpus, split, max_length, n_tokens)
                files = {n: Files(place) for n, place in places.items()}
                _grow(teacher, files, sites, blocks, ended, batch_size, np.dtype(store_dtype))
    there = min(n_tokens, *(Files(place).n for place in places.values()))
    corpora.check_length(corpus, split, there, n_tokens)
    stores = {n: ActivationStore(f"{place}@{there}", sites, teacher.tokenizer) for n, place in places.items()}
    return stores[layer] if isinstance(layer, int) else stores


def _layers(teacher: Teacher, layer: int | Sequence[int]) -> list[int]:
    """The layers asked for in ascending order; `ValueError` for one that is not there."""
    layers = [layer] if isinstance(layer, int) else list(layer)
    allowed(bool(layers), f"layer={layer!r} names no layer", f"0 to {teacher.n_layers - 1}")
    for each in layers:
        teacher.block(each)
    return sorted(set(layers))


def _lacking(places: Mapping[int, Path], sites: Sequence[str], n_tokens: int) -> bool:
    """Whether the store of any layer lacks rows of some site."""
    return not all(Files(place).has(sites, n_tokens) for place in places.values())


def _identity(teacher: Teacher) -> dict[str, str]:
    """What determines a teacher's activations, for keys."""
    of = {"teacher": teacher.fingerprint, "dtype": str(teacher.dtype), "device": teacher.device.type}
    return of | {"attention": teacher.attn_implementation}


def _blocks(teacher: Teacher, corpus: str, split: str, max_length: int, n_tokens: int) -> tuple[list[Texts], bool]:
    """Blocks of whole pieces that hold `n_tokens` tokens, and whether the corpus ended there."""
    pieces, blocks, left = cut(teacher, corpus, split, max_length), [], n_tokens
    while left > 0 and (some := list(itertools.islice(pieces, BLOCK))):
        blocks.append(Texts.of(teacher, some))
        left -= blocks[-1].n_tokens
    allowed(bool(blocks), f"corpus={corpus!r}, split={split!r} has no tokens", "a corpus with text in every split")
    return blocks, left > 0


def _grow(
    teacher: Teacher, files: Mapping[int, Files], sites, blocks: Sequence[Texts], ended: bool, batch_size: int, dtype
) -> None:
    """Add what is missing of the blocks to the sites of each layer, in one pass over what is missing of any of them."""
    have = {(layer, site): each.blocks(site) for layer, each in files.items() for site in sites}
    lengths = [block.n_tokens for block in blocks]
    missing = sum(sum(lengths[n:]) for n in have.values())
    for each in files.values():
        each.prepare()
    sources.check_room(next(iter(files.values())).place, missing * teacher.d_model * dtype.itemsize, "the harvest")
    marks = sorted({n for n in have.values() if n < len(blocks)} | {len(blocks)})
    with settings.progress(total=missing, desc="harvest", unit="row", unit_scale=True) as bar:
        for first, last in itertools.pairwise(marks):
            wanted = {layer: [s for s in SITES if have.get((layer, s), last) <= first] for layer in files}
            wanted = {layer: some for layer, some in wanted.items() if some}
            batches = [block.batches(batch_size) for block in blocks[first:last]]
            # Padding stands on the right, after all text: causal attention never sees it, so no mask is needed.
            ids = [[b.padded(batch)[0] for batch in of] for b, of in zip(blocks[first:last], batches, strict=True)]
            scratch = next(iter(files.values())).place.parent
            with contextlib.closing(teacher.through(wanted, ids, scratch=scratch)) as pass_:
                for layer, i, found in pass_:
                    block = blocks[first + i]
                    parts = _in_order(block, batches[i], found, dtype)
                    files[layer].append(first + i, block.rows((first + i) * BLOCK), parts)
                    bar.update(block.n_tokens * len(parts))
    for each in files.values() if ended else ():
        each.end()


def _in_order(block: Texts, batches, found: Sequence[Mapping[str, Tensor]], dtype: np.dtype) -> dict[str, np.ndarray]:
    """Rows of each site in the order of the text, from activations of its batches."""
    ends = np.cumsum(block.lengths)
    arrays = {site: np.empty((ends[-1], values.shape[2]), dtype) for site, values in found[0].items()}
    for batch, of_batch in zip(batches, found, strict=True):
        for site, values in of_batch.items():
            values = values.float().cpu().numpy()
            for piece, value in zip(batch, values, strict=True):
                length = block.lengths[piece]
                with np.errstate(over="ignore"):  # named below
                    rows = value[block.bos : block.bos + length].astype(dtype)
                good = np.isfinite(rows).all()
                allowed(bool(good), f"activations overflow store_dtype={dtype.name!r}", "'float32'")
                arrays[site][ends[piece] - length : ends[piece]] = rows
    return arrays


# -- the wrong way, on purpose -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedRun:
    """Moments of the rows of padded batches, by site and by kind of row: `text`, `bos`, `padding`."""

    moments: dict[str, dict[str, Moments]]
    padding_row: dict[str, Float[Tensor, " d"]]
    """The first padding row of each site."""

    def of(self, site: str, *kinds: str) -> Moments:
        """Moments of some kinds of rows together, of all rows if none is named."""
        chosen = [self.moments[site][kind] for kind in kinds or KINDS]
        return sum(chosen[1:], chosen[0])

    @property
    def share(self) -> float:
        """Share of all rows that is padding."""
        first = next(iter(self.moments.values()))
        return first["padding"].n / sum(moments.n for moments in first.values())


def padded(
    teacher: Teacher,
    corpus: str = "wikipedia-sample",
    *,
    layer: int,
    sites: Iterable[str] = OF_MLP,
    n_tokens: int,
    split: str = "train",
    max_length: int = 256,
    min_length: int = 20,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
) -> PaddedRun:
    """What a harvest sees that keeps every row of its batches: texts as they come, padded on the LEFT to the longest.

    So do the released commands of *Secret mixtures of experts inside your LLM*: batches of 8, texts of 20 tokens or
    more. Where no batch would have padding, since all texts are as long as what a model reads at once, half of the
    first one stands before it. The rows depend on how the attention treats a query that may look at nothing, so load
    the teacher with the `attn_implementation` in question. Kept in the cache.
    """
    teacher.block(layer)
    sites = check_sites(sites)
    what = [_identity(teacher), corpora.fingerprint(corpus), layer, sites, n_tokens, split, max_length]

    def run() -> dict:
        pieces = texts(teacher, corpus, n_tokens=n_tokens, split=split, max_length=max_length)
        long = [tokens for tokens in pieces.tokens if len(tokens) >= min_length]
        given = f"corpus={corpus!r}, n_tokens={n_tokens} has no text of min_length={min_length} and more"
        allowed(bool(long), given, "more tokens, or longer texts")
        batches = [long[i : i + batch_size] for i in range(0, len(long), batch_size)]
        if all(len(set(map(len, batch))) == 1 for batch in batches):
            batches[0] = [long[0][: len(long[0]) // 2], *batches[0]]
        return _run_padded(teacher, batches, pieces.bos, layer, sites)

    found = keep("padded", [*what, min_length, batch_size], run, type(teacher), cache_dir=cache_dir)
    moments = {site: {kind: Moments(*m) for kind, m in kinds.items()} for site, kinds in found["moments"].items()}
    return PaddedRun(**found | {"moments": moments})


KINDS = ("text", "bos", "padding")


def _run_padded(teacher: Teacher, batches: Sequence[Sequence[np.ndarray]], bos: int, layer: int, sites) -> dict:
    moments = {site: dict.fromkeys(KINDS, Moments.empty(teacher.d_model)) for site in sites}
    first: dict[str, Tensor] = {}
    for batch in settings.progress(batches, desc=f"padded batches, {teacher.attn_implementation} attention"):
        pieces = Texts(batch, np.zeros(len(batch), np.int32), bos)
        ids, mask = pieces.padded(range(len(batch)), teacher.tokenizer.pad_token_id, left=True)
        text = teacher.rows_kept(ids, mask)
        where = {"text": text, "bos": mask.bool() & ~text, "padding": ~mask.bool()}
        for site, values in teacher.run_to(layer, ids, mask, sites).items():
            values = values.float().cpu()
            for kind, rows in where.items():
                moments[site][kind] += Moments.of(values[rows])
            if len(pads := values[where["padding"]]):
                first.setdefault(site, pads[0])
    plain = {site: {kind: (m.n, m.mean, m.cov) for kind, m in kinds.items()} for site, kinds in moments.items()}
    return {"moments": plain, "padding_row": first}
