"""Text: the Wikipedia sample of this repository, a data set of the hub or a local file; and cut for a model to read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import re
import uuid
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset, load_dataset
from jaxtyping import Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from helpers import kept, settings
from helpers.models import files, sources
from helpers.models.files import SEVERAL, SPLITS
from helpers.models.store import ROW_FIELDS
from helpers.models.teachers import Teacher
from helpers.settings import ROOT, allowed, one_of

WIKIPEDIA_SAMPLE = ROOT / "data" / "wikipedia_sample.parquet"
BOOK_TEXTS = {
    "Wikipedia": WIKIPEDIA_SAMPLE,
    "State of the Union": ROOT / "data" / "state_of_the_union.parquet",
    "Moby Dick": ROOT / "data" / "moby_dick.parquet",
}
"""The files of the corpus "book-texts", by what its column `source` calls them."""
FILLED = 0.8
TOKENISED = 64
"""Texts that are tokenised at once."""
ALLOWED = (
    "'wikipedia-sample', 'book-texts', a hub id such as 'Salesforce/wikitext:wikitext-103-raw-v1', "
    "or a local .txt, .jsonl, .json, .csv or .parquet file (.gz and .zst too) or a folder of them"
)


def load(corpus: str = "wikipedia-sample", split: str = "train") -> Dataset:
    """Paragraphs of one split: columns `article` (int), `title` and `text`; rows without text are left out.

    `corpus` is `"wikipedia-sample"` or `"book-texts"` (embedded), a hub id with an optional configuration after a
    colon, or a local file or folder. `"book-texts"` is the Wikipedia sample, the State of the Union addresses and Moby
    Dick; it has a further column `source`, and its `article` numbers run on from one source to the next.

    A local file is divided here, always in the same way, into about 80 % `train`, 10 % `validation` and 10 % `test` by
    document, in the order of the SHA-256 of the documents' text, with five documents to hold out where there are
    fifteen and two at least; a column `split` is used instead where there is one. Rows of a table belong to one
    document where they share `article`, else `title`; a row without is its own. Its text is the column named after a
    colon (`my.csv:body`), else `text`, else the only one of words. In a `.txt` file blank lines separate
    paragraphs, and every 20 make a document (a fiftieth of a short text); a file of fewer than five paragraphs, or of
    long lines with a stray blank one here and there, is taken line by line, each a document. `my.txt:paragraphs` and
    `my.txt:lines` decide. In a folder a `.txt` is a document, and no two files share one.

    A hub set keeps its own splits. Its rows are its articles, except that in WikiText ` = Title = ` lines start one.

    Raises `ValueError` for an unknown name, split or configuration, a missing column, a file that is empty or not in
    Unicode, too few documents, and a hub id that was not downloaded before when the hub cannot be reached.
    """
    rows, there = _rows(corpus, split)
    # `datasets` would name the rows by a hash of a copy of them all
    return Dataset(rows.filter(there).drop_columns("split"), fingerprint=uuid.uuid4().hex)


def _rows(corpus: str, split: str) -> tuple[pa.Table, pa.ChunkedArray]:
    """All rows that were read, no text copied, and which of them are of the split."""
    one_of("split", split, SPLITS)
    if corpus == "book-texts":
        rows = _book_texts()
    elif local(corpus):
        rows = _local(corpus)
    else:
        rows = _articles(_from_hub(corpus, split)).assign(split=split)
        rows = pa.Table.from_pandas(rows, preserve_index=False)
    there = pc.equal(rows["split"], split)
    enough = pc.any(there).as_py()
    allowed(bool(enough), f"corpus={corpus!r} has no text in split={split!r}", "a corpus with text in every split")
    return rows, there


def local(corpus: str) -> tuple[Path, str] | None:
    """The file or folder behind `corpus` and what a colon adds, None for a hub id. `ValueError` when it is neither."""
    if corpus == "wikipedia-sample":
        return WIKIPEDIA_SAMPLE, ""
    before, _, after = corpus.rpartition(":")
    for name, how in ((corpus, ""), (before, after)):
        path = Path(name).expanduser()
        if name and files.inside(path):
            return path, how
    meant = [path for path in map(Path, (corpus, before or corpus)) if path.exists() or files.kind(path) in files.KINDS]
    found = "this is no such file" if meant and meant[0].exists() else "there is no such file"
    allowed(not meant or not corpus, f"corpus={corpus!r}: {found}", ALLOWED)
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", corpus)
    allowed(bool(named), f"corpus={corpus!r} is unknown", ALLOWED)
    return None


def fingerprint(corpus: str) -> str:
    """What determines a corpus, for keys: a file's SHA-256 and ending, or a hub set's commit (offline: its name)."""
    if corpus == "book-texts":
        return "+".join(fingerprint(str(path)) for path in BOOK_TEXTS.values())
    if found := local(corpus):
        path, how = found
        digests = [kept.file_digest(each) for each in files.inside(path)]
        if path.is_dir():
            names = [str(each.relative_to(path)) for each in files.inside(path)]
            digests = [hashlib.sha256(json.dumps([names, digests]).encode()).hexdigest()]
        ending = "" if path.is_dir() else files.kind(path)
        return f"sha256:{digests[0]}{ending}" + (f":{how}" if how else "")
    with contextlib.suppress(sources.Unreachable):
        return f"{corpus}@{sources.commit('dataset', corpus.partition(':')[0])}"
    return corpus


def _book_texts() -> pa.Table:
    """The embedded texts with their `source`; a document's number says how many documents stand before it."""
    parts, before = [], 0
    for source, path in BOOK_TEXTS.items():
        rows = _local(str(path))
        numbers = pc.add(rows["article"], pa.scalar(before, pa.int32()))
        rows = rows.set_column(0, "article", numbers)
        parts.append(rows.append_column("source", pa.array([source] * len(rows))))
        before = pc.max(numbers).as_py() + 1
    return pa.concat_tables(parts)


def _local(corpus: str) -> pa.Table:
    path, how = local(corpus)
    return _documents(corpus, path, how, tuple((each, each.stat().st_mtime_ns) for each in files.inside(path)))


@lru_cache(maxsize=1)
def _documents(corpus: str, path: Path, how: str, stamps: tuple[tuple[Path, int], ...]) -> pa.Table:
    """Columns article (numbered as they appear), title, text and split of local files; the last read is kept."""
    numbers: dict[Any, int] = {}
    digests, columns, texts, waiting, size = [], {"article": [], "title": [], "split": []}, [], [], 0
    for file, _ in stamps:
        named = str(file) if path.is_dir() else corpus
        for place, row in enumerate(files.rows(file, how, named, one=path.is_dir())):
            title, text = row.get("title"), row["text"]
            titled = title not in (None, "") and title == title
            of = "article" if "article" in row else "title"
            own = row.get(of) in (None, "") or row[of] != row[of]  # NaN
            key = place if own else (of, type(row[of]).__name__, str(row[of]))
            article = numbers.setdefault((file, key), len(numbers))
            if article == len(digests):
                digests.append(hashlib.sha256())
            else:
                digests[article].update(b"\n")
            digests[article].update(text.encode())
            columns["article"].append(article)
            columns["title"].append(str(title) if titled else f"document {article}")
            columns["split"].append(row.get("split", ""))
            waiting.append(text)
            size += len(text)
            if size > files.AWAY:
                texts.append(files.away(waiting))
                waiting, size = [], 0
    allowed(bool(numbers), f"corpus={corpus!r} is empty: it has no text", "a file with at least one paragraph")
    texts.append(files.away(waiting) if texts and waiting else pa.array(waiting, pa.large_string()))
    columns["split"] = files.splits(corpus, columns["article"], columns["split"], digests)
    article, title = pa.array(columns["article"], pa.int32()), pa.array(map(files.unicode, columns["title"]))
    return pa.table({"article": article, "title": title, "text": pa.chunked_array(texts), "split": columns["split"]})


def _from_hub(corpus: str, split: str) -> pd.DataFrame:
    name, _, configuration = corpus.partition(":")
    try:
        revision, cached, offline = sources.commit("dataset", name), contextlib.nullcontext(), ""
    except sources.Unreachable as error:
        revision, cached, offline = None, sources.cached_only(), f" (no answer from the hub: {error})"
    except ValueError as error:
        raise ValueError(f"corpus={corpus!r}: {error}; allowed: {ALLOWED}") from error
    try:
        with cached:
            rows = load_dataset(name, configuration or None, split=split, revision=revision)
    except Exception as error:  # the readers raise many kinds; all mean that these parameters give no text
        why = sources.reason(error) + offline
        raise ValueError(f"corpus={corpus!r}, split={split!r}: {why}; allowed: {ALLOWED}") from error
    names = rows.column_names
    allowed("text" in names, f"corpus={corpus!r} has columns {names}", "any that include 'text'")
    return rows.select_columns("text").to_pandas()


def _articles(rows: pd.DataFrame) -> pd.DataFrame:
    """Number the articles of a hub set."""
    heading = rows.text.str.extract(r"^\s*= ([^=].*?) =\s*$", expand=False)
    if heading.notna().any():
        rows = rows.assign(article=heading.notna().cumsum(), title=heading.ffill().fillna(""))
        rows = rows[~rows.text.str.match(r"^\s*(= )+.*( =)+\s*$")]
    else:
        rows = rows.assign(article=rows.index, title="document " + rows.index.astype(str))
    rows = rows[rows.text.fillna("").str.strip() != ""]
    return rows.astype({"article": "int32"})[["article", "title", "text"]]


# -- text, cut to what a model reads at once ---------------------------------------------------------------------------


@dataclass(frozen=True)
class Texts:
    """Pieces of a corpus: `tokens[i]` (BOS in front where the tokenizer adds one) comes from article `articles[i]`."""

    tokens: list[Int[np.ndarray, " _"]]
    articles: Int[np.ndarray, " texts"]
    bos: int
    """Number of BOS tokens in front of a piece: 0 or 1."""

    @classmethod
    def of(cls, teacher: Teacher, pieces: Sequence[tuple[int, list[int]]]) -> Texts:
        """From article and token ids, BOS not among them, of each piece."""
        bos = _bos(teacher)
        tokens = [np.array(bos + ids, np.int32) for _, ids in pieces]
        return cls(tokens, np.array([article for article, _ in pieces], np.int32), len(bos))

    @property
    def n_tokens(self) -> int:
        """Tokens of text, BOS not counted."""
        return int(self.lengths.sum())

    @property
    def lengths(self) -> Int[np.ndarray, " texts"]:
        """Tokens of text in each piece."""
        return np.array([len(tokens) - self.bos for tokens in self.tokens], int)

    def batches(self, batch_size: int) -> list[list[int]]:
        """Numbers of the pieces of each batch, the longest first.

        A batch ends when it is full, or when the next piece is shorter than `FILLED` of its longest: little is padding.
        """
        lengths = self.lengths + self.bos
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
        chosen = [torch.from_numpy(self.tokens[i]).long() for i in pieces]
        how = {"batch_first": True, "padding_side": "left" if left else "right"}
        ids = pad_sequence(chosen, padding_value=pad_id, **how)
        return ids, pad_sequence([torch.ones_like(tokens) for tokens in chosen], **how)

    def rows(self, first: int) -> np.ndarray:
        """A line of `ROW_FIELDS` for each token of text; pieces are numbered from `first`."""
        lengths = self.lengths
        table = np.empty(int(lengths.sum()), ROW_FIELDS)
        table["article"] = np.repeat(self.articles, lengths)
        table["text"] = np.repeat(np.arange(first, first + len(lengths)), lengths)
        table["position"] = np.concatenate([np.arange(self.bos, self.bos + length) for length in lengths])
        table["token_id"] = np.concatenate([tokens[self.bos :] for tokens in self.tokens])
        return table


def texts(
    teacher: Teacher,
    corpus: str,
    *,
    n_tokens: int,
    split: str = "train",
    max_length: int = 256,
    documents: int = SEVERAL,
) -> Texts:
    """`n_tokens` tokens of a corpus (BOS not counted), cut to pieces of at most `max_length` with BOS (or the model's
    positions, where they are fewer).

    A piece of each document in turn, documents and their paragraphs in a random order that is always the same: no
    document fills a split before the others are used up, and fewer tokens are the beginning of more. The last piece is
    cut so that the count is exact; a corpus that is too short is used whole, with a warning. Where fewer than
    `documents` would be all of it, pieces are as short as `spread` says.
    """
    allowed(n_tokens >= 1, f"n_tokens={n_tokens} is no text", "at least 1")
    length = spread(teacher, corpus, split, n_tokens, max_length, documents)
    found, left = [], n_tokens
    for article, ids in cut(teacher, corpus, split, length):
        found.append((article, ids[:left]))
        left -= len(ids[:left])
        if not left:
            break
    check_length(corpus, split, n_tokens - left, n_tokens)
    return Texts.of(teacher, found)


def spread(teacher: Teacher, corpus: str, split: str, n_tokens: int, max_length: int, documents: int = SEVERAL) -> int:
    """`max_length`, or less where the text would be of fewer than `documents` (or all there are): a share for each."""
    if n_tokens >= documents * max_length:
        return max_length
    pieces = list(itertools.islice(cut(teacher, corpus, split, max_length), documents))
    there = len({article for article, _ in pieces})  # the first of each come first
    left = n_tokens - sum(len(ids) for _, ids in pieces[: there - 1])
    short = len(_bos(teacher)) - (-n_tokens // max(there, 1))
    return max_length if there < 2 or left > 0 else max(2, short)


def _bos(teacher: Teacher) -> list[int]:
    return [teacher.tokenizer.bos_token_id] if teacher.adds_bos else []


def check_length(corpus: str, split: str, there: int, n_tokens: int) -> None:
    """`ValueError` where a split has no tokens, a warning where it has fewer than were asked for."""
    allowed(there > 0, f"corpus={corpus!r}, split={split!r} has no tokens", "a corpus with text in every split")
    if there < n_tokens:
        text = f"corpus={corpus!r}, split={split!r} has {there:,} tokens, not n_tokens={n_tokens:,}"
        warnings.warn(text, stacklevel=3)


def cut(teacher: Teacher, corpus: str, split: str, max_length: int) -> Iterator[tuple[int, list[int]]]:
    """Article and token ids, without BOS, of every piece of a split: the first of each document, then the second …

    A text is cut at whitespace before it is tokenised, and no more of it is tokenised than is asked for, so that the
    work does not depend on how long a document is.
    """
    allowed(max_length >= 2, f"max_length={max_length} leaves no room for BOS and a token", "at least 2")
    bos = _bos(teacher)
    room = min(max_length, teacher.n_positions or max_length) - len(bos)
    documents: Iterable = _by_document(corpus, split, 16 * max_length)
    while documents:
        alive, waiting = [], iter(documents)
        while group := list(itertools.islice(waiting, TOKENISED)):
            chunks = ["" if pieces else next(rest, None) for _, rest, pieces in group]
            given = [chunk for chunk in chunks if chunk]
            ids_of = iter(teacher.tokenizer(given, add_special_tokens=False).input_ids if given else [])
            for document, chunk in zip(group, chunks, strict=True):
                article, _, pieces = document
                if chunk:
                    ids = [i for i in next(ids_of) if i not in bos]
                    pieces.extend(ids[at : at + room] for at in range(0, len(ids), room))
                if pieces:
                    yield article, pieces.popleft()
                if chunk is not None:  # which a document that is used up has not
                    alive.append(document)
        documents = alive


def _by_document(corpus: str, split: str, size: int) -> Iterator[tuple[int, Iterator[str], deque]]:
    """Article, text in chunks of at most `size` characters, and no pieces yet, of each document in a fixed order."""
    rows, there = _rows(corpus, split)
    chosen = np.flatnonzero(there)
    articles, number = np.unique(np.asarray(rows["article"])[chosen], return_inverse=True)
    random = settings.generator(0)
    place = torch.randperm(len(articles), generator=random).numpy()[number]
    order = np.lexsort((torch.randperm(len(number), generator=random).numpy(), place))
    for paragraphs in np.split(order, np.flatnonzero(np.diff(place[order])) + 1):
        yield int(articles[number[paragraphs[0]]]), _chunks(rows["text"], chosen[paragraphs].tolist(), size), deque()


def _chunks(texts: pa.ChunkedArray, paragraphs: Sequence[int], size: int) -> Iterator[str]:
    """Paragraphs, each cut before a whitespace where it is longer than `size` characters; no more of one is decoded."""
    for paragraph in paragraphs:
        content, start = _content(texts.slice(paragraph, 1).chunk(0)), 0
        while start < len(content):
            text = bytes(content[start : start + 4 * size + 4]).decode("utf-8", "ignore")
            if len(text) > size:
                text = text[:size]
                end = max(text.rfind(blank, 1) for blank in " \n\t")
                text = text[:end] if end > 0 else text
            yield text
            start += len(text.encode())


def _content(one: pa.StringArray | pa.LargeStringArray) -> memoryview:
    """The bytes of the only text of a slice, where they lie; a scalar of Arrow would copy them."""
    _, offsets, content = one.buffers()
    first, last = np.frombuffer(offsets, np.int64 if pa.types.is_large_string(one.type) else np.int32)[one.offset :][:2]
    return memoryview(content)[first:last]
