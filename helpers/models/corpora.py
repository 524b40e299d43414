"""Text: the Wikipedia sample of this repository, a data set of the hub or a local file; and cut for a model to read."""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import re
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from datasets import Dataset, load_dataset
from jaxtyping import Int
from torch import Tensor

from helpers import kept, settings
from helpers.models import sources
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
SPLITS = ("train", "validation", "test")
FILES = (".txt", ".jsonl", ".parquet")
DOCUMENT = 20
"""Paragraphs of a `.txt` file that make a document: they stay together in one split. Fewer where the text is short."""
FILLED = 0.8
TOKENISED = 64
"""Texts that are tokenised at once."""
ALLOWED = (
    "'wikipedia-sample', 'book-texts', a hub id such as 'Salesforce/wikitext:wikitext-103-raw-v1', "
    "or a local .txt, .jsonl or .parquet file"
)


def load(corpus: str = "wikipedia-sample", split: str = "train") -> Dataset:
    """Paragraphs of one split: columns `article` (int), `title` and `text`; rows without text are left out.

    `corpus` is `"wikipedia-sample"` or `"book-texts"` (embedded), a hub id with an optional configuration after a
    colon, or a local file. `"book-texts"` is the Wikipedia sample, the State of the Union addresses and Moby Dick; it
    has a further column `source`, and its `article` numbers run on from one source to the next.

    A local file is divided here, always in the same way, into about 80 % `train`, 10 % `validation` and 10 % `test` by
    document, in the order of the SHA-256 of the documents' text; a column `split` is used instead where there is one.
    In `.jsonl` and `.parquet` files (column `text`) documents are told apart by `article`, else by `title`, else each
    row is one. In a `.txt` file blank lines separate paragraphs, and every 20 paragraphs make a document
    (in a text of fewer than 200, every tenth of it).

    A hub set keeps its own splits. Its rows are its articles, except that in WikiText ` = Title = ` lines start one.

    Raises `ValueError` for an unknown name, split or configuration, a missing column, an empty file, one not in UTF-8,
    and a hub id that was not downloaded before when the hub cannot be reached.
    """
    one_of("split", split, SPLITS)
    if corpus == "book-texts":
        rows = _book_texts()
    elif path := local_file(corpus):
        rows = _documents(_read(path, corpus), corpus)
    else:
        rows = _articles(_from_hub(corpus, split)).assign(split=split)
    rows = rows[rows.split == split].drop(columns="split")
    allowed(not rows.empty, f"corpus={corpus!r} has no text in split={split!r}", "a corpus with text in every split")
    return Dataset.from_pandas(rows.reset_index(drop=True), preserve_index=False)


def local_file(corpus: str) -> Path | None:
    """The file behind `corpus`, or None for a hub id. Raises `ValueError` when it is neither."""
    if corpus == "wikipedia-sample":
        return WIKIPEDIA_SAMPLE
    path = Path(corpus).expanduser()
    if path.is_file() and path.suffix in FILES:
        return path
    found = "this is no such file" if path.exists() else "there is no such file"
    allowed(not path.exists() and path.suffix not in FILES, f"corpus={corpus!r}: {found}", ALLOWED)
    named = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", corpus)
    allowed(bool(named), f"corpus={corpus!r} is unknown", ALLOWED)
    return None


def fingerprint(corpus: str) -> str:
    """What determines a corpus, for keys: a file's SHA-256 and ending, or a hub set's commit (offline: its name)."""
    if corpus == "book-texts":
        return "+".join(fingerprint(str(path)) for path in BOOK_TEXTS.values())
    path = local_file(corpus)
    if path is not None:
        return f"sha256:{kept.file_digest(path)}{path.suffix.lower()}"
    with contextlib.suppress(sources.Unreachable):
        return f"{corpus}@{sources.commit('dataset', corpus.partition(':')[0])}"
    return corpus


def _book_texts() -> pd.DataFrame:
    """The embedded texts with their `source`; a document's number says how many documents stand before it."""
    parts, before = [], 0
    for source, path in BOOK_TEXTS.items():
        rows = _documents(_read(path, str(path)), str(path))
        parts.append(rows.assign(article=rows.article + before, source=source))
        before += rows.article.nunique()
    return pd.concat(parts).astype({"article": "int32"})


def _read(path: Path, corpus: str) -> pd.DataFrame:
    """A file's rows, with a column `text` of strings at least."""
    try:
        if path.suffix == ".txt":
            rows = _paragraphs(path.read_bytes().decode("utf-8").removeprefix("\ufeff"))
        elif path.suffix == ".jsonl":
            rows = pd.read_json(path, lines=True, dtype=False, encoding="utf-8")
        else:
            rows = pd.read_parquet(path)
    except UnicodeDecodeError as error:
        byte, at = error.object[error.start], error.start
        raise ValueError(
            f"corpus={corpus!r} is not UTF-8: byte 0x{byte:02x} at offset {at}; allowed: UTF-8 (convert with iconv)"
        ) from error
    except (ValueError, OSError) as error:
        raise ValueError(f"corpus={corpus!r} cannot be read as {path.suffix}: {error}") from error
    allowed(not rows.empty, f"corpus={corpus!r} is empty", "a file with at least one paragraph")
    allowed("text" in rows, f"corpus={corpus!r} has columns {list(map(str, rows))}", "any that include 'text'")
    strings = rows.text.dropna().map(lambda text: isinstance(text, str)).all()
    allowed(bool(strings), f"corpus={corpus!r}: column 'text' holds {rows.text.dtype}", "strings")
    return rows


def _paragraphs(content: str) -> pd.DataFrame:
    """Paragraphs between blank lines, their own line breaks taken out."""
    texts = [" ".join(block.split()) for block in re.split(r"\n\s*\n", content)]
    texts = [text for text in texts if text]
    size = min(DOCUMENT, max(1, len(texts) // 10))
    return pd.DataFrame({"article": [i // size for i in range(len(texts))], "text": texts})


def _documents(rows: pd.DataFrame, corpus: str) -> pd.DataFrame:
    """Columns article (numbered as they appear), title, text and split of a local file's rows."""
    rows = rows[rows.text.fillna("").str.strip() != ""].reset_index(drop=True)
    named = next((name for name in ("article", "title") if name in rows), None)
    article = pd.Series(pd.factorize(rows[named])[0] if named else rows.index, dtype="int32")
    title = rows.title.astype(str) if "title" in rows else "document " + article.astype(str)
    split = rows.split if "split" in rows else article.map(_divide(rows.text.groupby(article).agg("\n".join)))
    unknown = sorted(set(split) - set(SPLITS), key=str)
    allowed(not unknown, f"corpus={corpus!r}: column 'split' holds {unknown}", ", ".join(SPLITS))
    return pd.DataFrame({"article": article, "title": title, "text": rows.text, "split": split})


def _divide(documents: pd.Series) -> dict[int, str]:
    """A split for each document: in the order of their hashes a tenth to test, a tenth to validation (one at least)."""
    ranked = sorted(documents.index, key=lambda i: hashlib.sha256(documents[i].encode()).digest())
    tenth = max(1, round(len(ranked) / 10))
    return {i: ("test", "validation", "train")[min(place // tenth, 2)] for place, i in enumerate(ranked)}


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
    allowed(
        "text" in rows.column_names, f"corpus={corpus!r} has columns {rows.column_names}", "any that include 'text'"
    )
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

        A batch ends when it is full, or when the next piece is shorter than `FILLED` of its longest: so little of it
        is padding even where texts are few.
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
        chosen = [self.tokens[i] for i in pieces]
        longest = max(map(len, chosen))
        ids = torch.full((len(chosen), longest), pad_id, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(chosen):
            at = slice(longest - len(tokens), longest) if left else slice(0, len(tokens))
            ids[row, at], mask[row, at] = torch.from_numpy(tokens).long(), 1
        return ids, mask

    def rows(self, first: int) -> np.ndarray:
        """A line of `ROW_FIELDS` for each token of text; pieces are numbered from `first`."""
        lengths = self.lengths
        table = np.empty(int(lengths.sum()), ROW_FIELDS)
        table["article"] = np.repeat(self.articles, lengths)
        table["text"] = np.repeat(np.arange(first, first + len(lengths)), lengths)
        table["position"] = np.concatenate([np.arange(self.bos, self.bos + length) for length in lengths])
        table["token_id"] = np.concatenate([tokens[self.bos :] for tokens in self.tokens])
        return table


def texts(teacher: Teacher, corpus: str, *, n_tokens: int, split: str = "train", max_length: int = 256) -> Texts:
    """`n_tokens` tokens of a corpus (BOS not counted), cut to pieces of at most `max_length` with BOS.

    A piece of each document in turn, documents and their paragraphs in a random order that is always the same: no
    document fills a split before the others are used up, and fewer tokens are the beginning of more. The last piece is
    cut so that the count is exact; a corpus that is too short is used whole, with a warning.
    """
    allowed(n_tokens >= 1, f"n_tokens={n_tokens} is no text", "at least 1")
    found, left = [], n_tokens
    for article, tokens in cut(teacher, corpus, split, max_length):
        found.append((article, tokens[:left]))
        left -= len(found[-1][1])
        if left == 0:
            break
    check_length(corpus, split, n_tokens - left, n_tokens)
    return Texts.of(teacher, found)


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
    room = max_length - len(bos)
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
    rows = load(corpus, split)
    articles, number = np.unique(np.asarray(rows["article"][:]), return_inverse=True)
    random = settings.generator(0)
    place = torch.randperm(len(articles), generator=random).numpy()[number]
    order = np.lexsort((torch.randperm(len(number), generator=random).numpy(), place))
    for paragraphs in np.split(order, np.flatnonzero(np.diff(place[order])) + 1):
        yield int(articles[number[paragraphs[0]]]), _chunks(rows, paragraphs.tolist(), size), deque()


def _chunks(rows, paragraphs: Sequence[int], size: int) -> Iterator[str]:
    """Paragraphs, each cut before a whitespace where it is longer than `size` characters."""
    for paragraph in paragraphs:
        text, start = rows[paragraph]["text"], 0
        while len(text) - start > size:
            end = max((text.rfind(blank, start + 1, start + size) for blank in " \n\t"), default=-1)
            end = end if end > start else start + size
            yield text[start:end]
            start = end
        yield text[start:]
