"""Activations of a teacher over a corpus, on disk: harvest once, then stream, and match a Gaussian to them.

`training.Shuffled(store["mlp_in"], fingerprint=store.key, …)` reads shuffled batches without loading the store.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from filelock import FileLock
from jaxtyping import Float, Int
from torch import Tensor

from helpers import settings
from helpers.models import corpora
from helpers.models.teachers import SITES, Splice, Teacher, check_sites

FORMAT = 2
"""Version of what a harvest writes: raise it when the same parameters give other files."""
STORE_DTYPES = ("float32", "float16")
ROW_FIELDS = np.dtype([("article", "<i4"), ("text", "<i4"), ("position", "<i4"), ("token_id", "<i4")])
FILLED = 0.8
BLOCK_ROWS = 8192
CHECKPOINT_BATCHES = 64


# -- text, cut to what a model reads at once ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Pieces of a corpus: `tokens[i]` (BOS in front where the tokenizer adds one) comes from article `articles[i]`."""

    tokens: list[Int[np.ndarray, " _"]]
    articles: Int[np.ndarray, " texts"]
    bos: int
    """Number of BOS tokens in front of a piece: 0 or 1."""

    @property
    def n_tokens(self) -> int:
        """Tokens of text, BOS not counted."""
        return sum(len(tokens) - self.bos for tokens in self.tokens)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Numbers of the pieces of each batch, the longest first.

        A batch ends when it is full, or when the next piece is shorter than `FILLED` of its longest: so little of it
        is padding even where texts are few.
        """
        lengths = np.array([len(tokens) for tokens in self.tokens])
        batches: list[list[int]] = []
        for i in np.argsort(-lengths, kind="stable").tolist():
            if not batches or len(batches[-1]) == batch_size or lengths[i] < FILLED * lengths[batches[-1][0]]:
                batches.append([])
            batches[-1].append(i)
        return batches

    def padded(
        self, pieces: Iterable[int], pad_id: int = 0, *, left: bool = False
    ) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Token ids and attention mask of a batch, padded on the right (or left) to its longest piece."""
        chosen = [self.tokens[i] for i in pieces]
        longest = max(map(len, chosen))
        ids = torch.full((len(chosen), longest), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(chosen):
            at = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
            ids[row, at], mask[row, at] = torch.from_numpy(tokens).long(), 1
        return ids, mask


def texts(teacher: Teacher, corpus: str, *, n_tokens: int, split: str = "train", max_length: int = 256) -> Texts:
    """`n_tokens` tokens of a corpus (BOS not counted), cut to pieces of at most `max_length` with BOS.

    Paragraphs are taken in a random order that is always the same (seed 0), so few tokens cover many articles and a
    smaller harvest is the beginning of a larger one. A paragraph that is too long becomes several pieces. The last
    piece is cut so that the count is exact; a corpus that is too short is used whole, with a warning.
    """
    if n_tokens < 1:
        raise ValueError(f"n_tokens={n_tokens} is no text; allowed: at least 1")
    if max_length < 2:
        raise ValueError(f"max_length={max_length} leaves no room for BOS and a token; allowed: at least 2")
    rows = corpora.load(corpus, split)
    order = torch.randperm(len(rows), generator=settings.generator(0)).tolist()
    bos = [teacher.tokenizer.bos_token_id] if teacher.adds_bos else []
    room, found, articles, left = max_length - len(bos), [], [], n_tokens
    for start in range(0, len(order), 256):
        some = rows.select(order[start : start + 256])
        ids_of = teacher.tokenizer(some["text"][:], add_special_tokens=False).input_ids
        for article, ids in zip(some["article"], ids_of, strict=True):
            ids = [i for i in ids if i not in bos][:left]
            pieces = [np.array(bos + ids[at : at + room], np.int32) for at in range(0, len(ids), room)]
            found, articles, left = found + pieces, articles + [article] * len(pieces), left - len(ids)
        if left == 0:
            break
    if not found:
        raise ValueError(
            f"corpus={corpus!r}, split={split!r} has no tokens; allowed: a corpus with text in every split"
        )
    if left:
        warnings.warn(
            f"corpus={corpus!r}, split={split!r} has {n_tokens - left:,} tokens, not n_tokens={n_tokens:,}",
            stacklevel=2,
        )
    return Texts(found, np.array(articles, np.int32), len(bos))


def losses(teacher: Teacher, pieces: Texts, splice: Splice | None = None, *, batch_size: int = 8) -> pd.DataFrame:
    """Cross-entropy of texts: one row per piece with `article`, `nats` (sum) and `tokens` (predicted).

    The mean is `nats.sum() / tokens.sum()`; grouped by article it can be resampled. `pieces` come from `texts`: cut
    once, they serve for every splice.
    """
    parts = []
    for batch in settings.progress(pieces.batches(batch_size), desc="cross-entropy", unit="batch", delay=2):
        nats, tokens = teacher.loss(*pieces.padded(batch), splice).per_text()
        parts.append(
            pd.DataFrame({"article": pieces.articles[batch], "nats": nats.cpu(), "tokens": tokens.cpu()}, batch)
        )
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
    """

    def __init__(self, folder: Path, sites: tuple[str, ...], tokenizer=None):
        self.folder, self.sites, self.tokenizer = Path(folder), tuple(sites), tokenizer
        self.rows = _open(self.folder, "rows", whole=True)
        self._arrays = {site: _open(self.folder, site) for site in self.sites}

    def __repr__(self) -> str:
        return f"ActivationStore({self.n:,} rows of {self.d}, sites {', '.join(self.sites)}, {self.folder.name})"

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, site: str) -> Float[np.ndarray, "n d"]:
        if site not in self._arrays:
            raise ValueError(f"site={site!r} is not in this store; allowed: {', '.join(self.sites)}")
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
        piece = self.rows["text"]
        lo, hi = max(0, row - before), min(self.n, row + after + 1)
        inside = [i for i in range(lo, hi) if piece[i] == piece[row]]
        ids = {part: [int(self.token_id[i]) for i in inside if keep(i)] for part, keep in {
            "before": lambda i: i < row, "token": lambda i: i == row, "after": lambda i: i > row}.items()}  # fmt: skip
        return tuple(self.tokenizer.decode(ids[part]) for part in ("before", "token", "after"))

    def moments(self, site: str) -> Moments:
        """Mean and covariance over all rows, computed once and kept beside the store."""
        path = self.folder / f"{site}.moments.npz"
        array, mark = self[site], _describe(self.folder, site)["sha256"]
        if path.exists():
            with np.load(path) as kept:
                if str(kept["of"]) == mark:
                    return Moments(int(kept["n"]), torch.from_numpy(kept["mean"]), torch.from_numpy(kept["cov"]))
        total = Moments.empty(array.shape[1])
        for start in range(0, len(array), BLOCK_ROWS):
            total = total + Moments.of(self.tensor(site, slice(start, start + BLOCK_ROWS)))
        with _written(path) as part:
            np.savez(part, n=total.n, mean=total.mean, cov=total.cov, of=mark)
        return total

    def verify(self) -> None:
        """Read every file and compare checksums; `ValueError` naming the file that is damaged."""
        for name in ("rows", *self.sites):
            _open(self.folder, name, whole=True)


def harvest(
    teacher: Teacher,
    corpus: str = "wikipedia-sample",
    *,
    layer: int,
    sites: Iterable[str] = ("mlp_in", "mlp_out"),
    n_tokens: int,
    split: str = "train",
    max_length: int = 256,
    batch_size: int = 16,
    store_dtype: str = "float32",
    cache_dir: str | Path | None = None,
) -> ActivationStore:
    """Activations of `n_tokens` tokens of text at `layer`, from the cache if they were harvested before.

    Neither padding nor BOS is in the store. The forward stops at the last site asked for; batches are of equal length
    as far as possible, and each site is a file of its own, so a site that is there already is not computed again. A
    harvest that was killed goes on where it stopped; two processes that want the same one do not work twice. Of a
    teacher that was loaded with `layerwise=True` ask for layers in ascending order, and for all sites of a layer at
    once: then all layers together take one forward pass.

    Raises `ValueError` before any work for a layer, site, split, dtype or corpus that is not there or a full
    disk, and for a store that is damaged, naming the file.
    """
    teacher.block(layer)
    sites = check_sites(sites)
    if store_dtype not in STORE_DTYPES:
        raise ValueError(f"store_dtype={store_dtype!r} is unknown; allowed: {', '.join(STORE_DTYPES)}")
    if batch_size < 1:
        raise ValueError(f"batch_size={batch_size} is no batch; allowed: at least 1")
    what = {
        "layer": layer,
        "split": split,
        "n_tokens": n_tokens,
        "max_length": max_length,
        "batch_size": batch_size,
        "store_dtype": store_dtype,
    }
    key = _key(teacher, corpus, what)
    folder = settings.cache_dir(cache_dir) / "activations" / key
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "lock"):
        missing = tuple(site for site in SITES if site in sites and not _described(folder, site).exists())
        if missing or not _described(folder, "rows").exists():
            pieces = texts(teacher, corpus, n_tokens=n_tokens, split=split, max_length=max_length)
            _run(teacher, pieces, layer, missing, batch_size, np.dtype(store_dtype), folder, what)
    return ActivationStore(folder, sites, teacher.tokenizer)


def _key(teacher: Teacher, corpus: str, what: dict) -> str:
    """Names a harvest by all that determines its rows."""
    what |= {
        "format": FORMAT,
        "teacher": teacher.fingerprint,
        "teacher_dtype": str(teacher.dtype),
        "attn_implementation": teacher.attn_implementation,
        "device": teacher.device.type,
        "corpus": corpora.fingerprint(corpus),
    }
    return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()[:24]


def _run(teacher, pieces: Texts, layer: int, sites, batch_size: int, dtype: np.dtype, folder: Path, what: dict) -> None:
    """Write the rows and sites of a store, from the last checkpoint if there is one, and move them into place."""
    lengths = np.array([len(tokens) - pieces.bos for tokens in pieces.tokens])
    starts, n = np.cumsum(lengths) - lengths, int(lengths.sum())
    partial = folder / f"partial-{'-'.join(sites)}"
    shapes = {"rows": ((n,), ROW_FIELDS)} | {site: ((n, teacher.d_model), dtype) for site in sites}
    done = _progress(partial, shapes)
    if done == 0:
        _reserve(partial, shapes)
    arrays = {name: np.load(partial / f"{name}.npy", mmap_mode="r+") for name in shapes}
    arrays["rows"][:] = _row_table(pieces, lengths)
    batches = pieces.batches(batch_size)
    # Padding stands on the right, after all text: causal attention never sees it, so no mask is needed.
    padded = [pieces.padded(batch)[0] for batch in batches]
    with (
        contextlib.closing(teacher.through(layer, padded, sites, start=done, scratch=folder.parent)) as found,
        settings.progress(total=n, desc=f"harvest layer {layer}", unit="token", unit_scale=True) as bar,
    ):
        for number, batch in enumerate(batches):
            if number >= done:
                for site, values in next(found).items():
                    _store(arrays[site], values.float().cpu().numpy(), starts[batch], lengths[batch], pieces.bos)
                if number % CHECKPOINT_BATCHES == CHECKPOINT_BATCHES - 1:
                    _checkpoint(partial, arrays, number + 1)
            bar.update(int(lengths[batch].sum()))
    for array in arrays.values():
        array.flush()
    for name, (shape, kind) in shapes.items():
        _publish(partial, folder, name, {"shape": shape, "dtype": str(kind), "what": what})
    shutil.rmtree(partial)


def _store(array: np.ndarray, values: np.ndarray, starts: np.ndarray, lengths: np.ndarray, bos: int) -> None:
    for value, start, length in zip(values, starts, lengths, strict=True):
        with np.errstate(over="ignore"):  # told below, by what and what is allowed
            rows = value[bos : bos + length].astype(array.dtype)
        if not np.isfinite(rows).all():
            raise ValueError(f"activations overflow store_dtype={array.dtype.name!r}; allowed here: 'float32'")
        array[start : start + length] = rows


def _row_table(pieces: Texts, lengths: np.ndarray) -> np.ndarray:
    table = np.empty(int(lengths.sum()), ROW_FIELDS)
    table["article"] = np.repeat(pieces.articles, lengths)
    table["text"] = np.repeat(np.arange(len(lengths)), lengths)
    table["position"] = np.concatenate([np.arange(pieces.bos, pieces.bos + length) for length in lengths])
    table["token_id"] = np.concatenate([tokens[pieces.bos :] for tokens in pieces.tokens])
    return table


# -- the wrong way, on purpose -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PaddedRun:
    """Moments of the rows of padded batches, by site and by kind of row: `text`, `bos`, `padding`."""

    moments: dict[str, dict[str, Moments]]
    padding_row: dict[str, Float[Tensor, " d"]]
    """The first padding row of each site."""
    padding_spread: dict[str, float]
    """Largest distance of a padding row from the first one, relative to that one's norm: 0 where all are one vector."""

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
    sites: Iterable[str] = ("mlp_in", "mlp_out"),
    n_tokens: int,
    split: str = "train",
    max_length: int = 256,
    min_length: int = 20,
    batch_size: int = 8,
    cache_dir: str | Path | None = None,
) -> PaddedRun:
    """What a harvest sees that keeps every row of its batches: texts as they come, padded on the LEFT to the longest.

    So do the released commands of *Secret mixtures of experts inside your LLM*: batches of 8, texts of 20 tokens or
    more. The rows depend on how the attention treats a query that may look at nothing, so load the teacher with the
    `attn_implementation` in question. Kept in the cache.
    """
    teacher.block(layer)
    sites = check_sites(sites)
    what = {name: value for name, value in locals().items() if name not in ("teacher", "cache_dir")}
    path = settings.cache_dir(cache_dir) / "activations" / f"padded-{_key(teacher, corpus, what)}.pt"
    if path.exists():
        return PaddedRun(**_load_padded(path))
    pieces = texts(teacher, corpus, n_tokens=n_tokens, split=split, max_length=max_length)
    long = [i for i, tokens in enumerate(pieces.tokens) if len(tokens) >= min_length]
    if not long:
        raise ValueError(f"min_length={min_length}: no text of corpus={corpus!r} is that long; allowed: fewer tokens")
    run = _run_padded(teacher, pieces, long, layer, sites, batch_size)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _written(path) as part:
        torch.save(
            {**run, "moments": {s: {k: vars(m) for k, m in kinds.items()} for s, kinds in run["moments"].items()}}, part
        )
    return PaddedRun(**run)


KINDS = ("text", "bos", "padding")


def _run_padded(teacher: Teacher, pieces: Texts, numbers: list[int], layer: int, sites, batch_size: int) -> dict:
    moments = {site: dict.fromkeys(KINDS, Moments.empty(teacher.d_model)) for site in sites}
    first: dict[str, Tensor] = {}
    spread = dict.fromkeys(sites, 0.0)
    pad_id = (
        teacher.tokenizer.pad_token_id if teacher.tokenizer.pad_token_id is not None else teacher.tokenizer.eos_token_id
    )
    batches = [numbers[i : i + batch_size] for i in range(0, len(numbers), batch_size)]
    for batch in settings.progress(batches, desc=f"padded batches, {teacher.attn_implementation} attention"):
        ids, mask = pieces.padded(batch, pad_id, left=True)
        text = teacher.rows_kept(ids, mask)
        where = {"text": text, "bos": mask.bool() & ~text, "padding": ~mask.bool()}
        for site, values in teacher.run_to(layer, ids, mask, sites).items():
            values = values.float().cpu()
            for kind, rows in where.items():
                moments[site][kind] += Moments.of(values[rows])
            if len(pads := values[where["padding"]]):
                first.setdefault(site, pads[0])
                spread[site] = max(spread[site], float((pads - first[site]).norm(dim=1).max() / first[site].norm()))
    return {"moments": moments, "padding_row": first, "padding_spread": spread}


def _load_padded(path: Path) -> dict:
    kept = torch.load(path, weights_only=True)
    moments = {site: {kind: Moments(**m) for kind, m in kinds.items()} for site, kinds in kept["moments"].items()}
    return {**kept, "moments": moments}


# -- files -------------------------------------------------------------------------------------------------------------


def _described(folder: Path, name: str) -> Path:
    """The file that says what an array holds. It is written last: an array without it is not there yet."""
    return folder / f"{name}.json"


def _publish(partial: Path, folder: Path, name: str, about: dict) -> None:
    array = partial / f"{name}.npy"
    about |= {"bytes": array.stat().st_size, "sha256": _sha256(array)}
    body = json.dumps(about, sort_keys=True)
    os.replace(array, folder / array.name)
    with _written(_described(folder, name)) as part:
        part.write(json.dumps({"check": hashlib.sha256(body.encode()).hexdigest(), "about": about}, indent=1).encode())


def _describe(folder: Path, name: str) -> dict:
    try:
        described = json.loads(_described(folder, name).read_text())
        body = json.dumps(described["about"], sort_keys=True)
        if hashlib.sha256(body.encode()).hexdigest() != described["check"]:
            raise ValueError("its checksum is wrong")
        return described["about"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, f"{name}.json", str(error)) from error


def _open(folder: Path, name: str, *, whole: bool = False) -> np.ndarray:
    """An array read-only, its size checked against its description, and its content too if `whole`."""
    about, path = _describe(folder, name), folder / f"{name}.npy"
    size = path.stat().st_size if path.exists() else 0
    if size != about["bytes"]:
        raise _damaged(folder, path.name, f"it has {size:,} bytes where {about['bytes']:,} belong")
    if whole and _sha256(path) != about["sha256"]:
        raise _damaged(folder, path.name, "its checksum is wrong")
    try:
        return np.load(path, mmap_mode="r")
    except ValueError as error:
        raise _damaged(folder, path.name, str(error)) from error


def _damaged(folder: Path, file: str, why: str) -> ValueError:
    return ValueError(
        f"the activation store is damaged: {folder / file}: {why}; delete the folder {folder} to harvest again"
    )


def _reserve(partial: Path, shapes: dict) -> None:
    """Create the arrays with their space on disk, so that a full disk is an error now and not a crash later."""
    shutil.rmtree(partial, ignore_errors=True)
    needed = sum(int(np.prod(shape)) * dtype.itemsize for shape, dtype in shapes.values())
    free = shutil.disk_usage(partial.parent).free
    if free < needed * 1.02 + 2**20:
        raise ValueError(
            f"cache_dir={str(partial.parents[2])!r}: the harvest takes {needed:,} bytes, only {free:,} are free"
        )
    partial.mkdir()
    for name, (shape, dtype) in shapes.items():
        path = partial / f"{name}.npy"
        np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape).flush()
        if hasattr(os, "posix_fallocate"):
            with path.open("r+b") as file:
                os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    _checkpoint(partial, {}, 0)


def _checkpoint(partial: Path, arrays: dict[str, np.memmap], batches: int) -> None:
    for array in arrays.values():
        array.flush()
    with _written(partial / "progress.json") as part:
        part.write(json.dumps({"batches": batches}).encode())


def _progress(partial: Path, shapes: dict) -> int:
    """Batches that an earlier process finished; 0 where nothing usable is left of it."""
    try:
        for name, (shape, dtype) in shapes.items():
            array = np.load(partial / f"{name}.npy", mmap_mode="r")
            if array.shape != tuple(shape) or array.dtype != dtype:
                return 0
        return int(json.loads((partial / "progress.json").read_text())["batches"])
    except (OSError, ValueError, KeyError):
        return 0


class _written:
    """A file that appears whole or not at all."""

    def __init__(self, path: Path):
        self.path = path

    def __enter__(self):
        self.part = tempfile.NamedTemporaryFile(dir=self.path.parent, prefix=f".{self.path.name}-", delete=False)
        return self.part

    def __exit__(self, kind, error, trace) -> None:
        self.part.close()
        if kind is None:
            os.replace(self.part.name, self.path)
        else:
            os.unlink(self.part.name)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
