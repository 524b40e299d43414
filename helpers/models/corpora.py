"""Text: the Wikipedia sample of this repository, a data set of the hub, or a local file."""

from __future__ import annotations

import contextlib
import hashlib
import re
from pathlib import Path

import pandas as pd
from datasets import Dataset, load_dataset

from helpers.models import sources
from helpers.settings import ROOT

WIKIPEDIA_SAMPLE = ROOT / "data" / "wikipedia_sample.parquet"
BOOK_TEXTS = {
    "Wikipedia": WIKIPEDIA_SAMPLE,
    "State of the Union": ROOT / "data" / "state_of_the_union.parquet",
    "Moby Dick": ROOT / "data" / "moby_dick.parquet",
}
"""The files of the corpus "book-texts", by what its column `source` calls them."""
SPLITS = ("train", "validation", "test")
FILES = (".txt", ".jsonl", ".parquet")
BLOCK = 20
"""Paragraphs of a `.txt` file that make a document: they stay together in one split. Fewer where the text is short."""
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
    if split not in SPLITS:
        raise ValueError(f"split={split!r} is unknown; allowed: {', '.join(SPLITS)}")
    path = None if corpus == "book-texts" else local_file(corpus)
    if corpus == "book-texts":
        rows = _book_texts()
        rows = rows[rows.split == split].drop(columns="split")
    elif path is None:
        rows = _articles(_from_hub(corpus, split))
    else:
        rows = _documents(_read(path, corpus), corpus)
        rows = rows[rows.split == split].drop(columns="split")
    if rows.empty:
        raise ValueError(
            f"corpus={corpus!r} has no text in split={split!r}; allowed: a corpus with text in every split"
        )
    return Dataset.from_pandas(rows.reset_index(drop=True), preserve_index=False)


def local_file(corpus: str) -> Path | None:
    """The file behind `corpus`, or None for a hub id. Raises `ValueError` when it is neither."""
    if corpus == "wikipedia-sample":
        return WIKIPEDIA_SAMPLE
    path = Path(corpus).expanduser()
    if path.is_file() and path.suffix in FILES:
        return path
    if path.exists() or path.suffix in FILES:
        found = "this is no such file" if path.exists() else "there is no such file"
        raise ValueError(f"corpus={corpus!r}: {found}; allowed: {ALLOWED}")
    if not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+(:[\w.-]+)?", corpus):
        raise ValueError(f"corpus={corpus!r} is unknown; allowed: {ALLOWED}")
    return None


def fingerprint(corpus: str) -> str:
    """What determines a corpus, for cache keys: the SHA-256 of a file, the commit of a hub set (its name offline)."""
    if corpus == "book-texts":
        return "+".join(fingerprint(str(path)) for path in BOOK_TEXTS.values())
    path = local_file(corpus)
    if path is not None:
        with path.open("rb") as file:
            return f"sha256:{hashlib.file_digest(file, 'sha256').hexdigest()}"
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
    if rows.empty:
        raise ValueError(f"corpus={corpus!r} is empty; allowed: a file with at least one paragraph")
    if "text" not in rows:
        raise ValueError(f"corpus={corpus!r} has columns {list(map(str, rows))}; allowed: any that include 'text'")
    if not rows.text.dropna().map(lambda text: isinstance(text, str)).all():
        raise ValueError(f"corpus={corpus!r}: column 'text' holds {rows.text.dtype}; allowed: strings")
    return rows


def _paragraphs(content: str) -> pd.DataFrame:
    """Paragraphs between blank lines, their own line breaks taken out."""
    texts = [" ".join(block.split()) for block in re.split(r"\n\s*\n", content)]
    texts = [text for text in texts if text]
    block = min(BLOCK, max(1, len(texts) // 10))
    return pd.DataFrame({"article": [i // block for i in range(len(texts))], "text": texts})


def _documents(rows: pd.DataFrame, corpus: str) -> pd.DataFrame:
    """Columns article (numbered as they appear), title, text and split of a local file's rows."""
    rows = rows[rows.text.fillna("").str.strip() != ""].reset_index(drop=True)
    named = next((name for name in ("article", "title") if name in rows), None)
    article = pd.Series(pd.factorize(rows[named])[0] if named else rows.index, dtype="int32")
    title = rows.title.astype(str) if "title" in rows else "document " + article.astype(str)
    split = rows.split if "split" in rows else article.map(_divide(rows.text.groupby(article).agg("\n".join)))
    if unknown := set(split) - set(SPLITS):
        raise ValueError(
            f"corpus={corpus!r}: column 'split' holds {sorted(unknown, key=str)}; allowed: {', '.join(SPLITS)}"
        )
    return pd.DataFrame({"article": article, "title": title, "text": rows.text, "split": split})


def _divide(documents: pd.Series) -> dict[int, str]:
    """A split for each document: in the order of their hashes a tenth to test, a tenth to validation (one at least)."""
    ranked = sorted(documents.index, key=lambda i: hashlib.sha256(documents[i].encode()).digest())
    tenth = max(1, round(len(ranked) / 10))
    return {i: ("test", "validation", "train")[min(place // tenth, 2)] for place, i in enumerate(ranked)}


def _from_hub(corpus: str, split: str) -> pd.DataFrame:
    name, _, configuration = corpus.partition(":")
    try:
        revision, cached = sources.commit("dataset", name), contextlib.nullcontext()
    except sources.Unreachable as error:
        revision, cached, offline = None, sources.cached_only(), f" (no answer from the hub: {error})"
    except ValueError as error:
        raise ValueError(f"corpus={corpus!r}: {error}; allowed: {ALLOWED}") from error
    else:
        offline = ""
    try:
        with cached:
            rows = load_dataset(name, configuration or None, split=split, revision=revision)
    except Exception as error:  # the readers raise many kinds; all mean that these parameters give no text
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ValueError(f"corpus={corpus!r}, split={split!r}: {reason}{offline}; allowed: {ALLOWED}") from error
    if "text" not in rows.column_names:
        raise ValueError(f"corpus={corpus!r} has columns {rows.column_names}; allowed: any that include 'text'")
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
