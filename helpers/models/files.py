"""Files of text as people have them: a row of `text`, `article`, `title` and `split` at a time, whatever the format."""

from __future__ import annotations

import codecs
import csv
import io
import itertools
import json
import re
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from helpers.settings import allowed

KINDS = (".txt", ".jsonl", ".json", ".csv", ".parquet")
PACKED = {".gz": "gzip", ".zst": "zstd"}
SPLITS = ("train", "validation", "test")
DOCUMENT = 20
"""Paragraphs of a `.txt` file that make a document: they stay together in one split. Fewer where the text is short."""
SEVERAL = 5
"""Documents that a corpus needs, that held-out text has where there are enough, and that few tokens are spread over."""


def kind(path: Path) -> str:
    """A file's ending in small letters, `.gz` and `.zst` left out."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def inside(path: Path) -> list[Path]:
    """The file, or those of a folder, that can be read."""
    every = sorted(path.rglob("*")) if path.is_dir() else [path]
    return [each for each in every if each.is_file() and kind(each) in KINDS]


def rows(path: Path, how: str, corpus: str, *, one: bool) -> Iterator[dict]:
    """`text` (never blank) and what there is of `article`, `title` and `split` of each row; `one`: a .txt is one."""
    ending = kind(path)
    readers = {".json": _json, ".jsonl": _json, ".csv": _csv, ".parquet": _parquet}
    try:
        if ending == ".txt":
            yield from _plain(path, how, corpus, one)
            return
        column = _text_column(itertools.islice(readers[ending](path), 100), how, corpus)
        known = [name for name in ("article", "title", "split") if name != column]
        for number, row in enumerate(readers[ending](path, [column, *known])):
            text = row.get(column)
            text = text.decode() if isinstance(text, bytes) else text
            given = f"corpus={corpus!r}: column {column!r} holds {text!r:.40} in row {number}"
            allowed(text is None or isinstance(text, str), given, "strings")
            if text and text.strip():
                yield {name: row[name] for name in known if name in row} | {"text": unicode(text)}
    except UnicodeDecodeError as error:
        byte, at = _undecodable(path) or (error.object[error.start], error.start)
        what = f"corpus={corpus!r} is not UTF-8: byte 0x{byte:02x} at offset {at}"
        raise ValueError(f"{what}; allowed: UTF-8, or UTF-16 with its mark (convert with iconv)") from error
    except (pa.ArrowException, csv.Error, json.JSONDecodeError, OSError, RecursionError) as error:
        raise ValueError(f"corpus={corpus!r} cannot be read as {ending}: {error}") from error


def _text_column(first: Iterable[dict], how: str, corpus: str) -> str:
    """The name of the column with the text: the one asked for, `text`, or the only one of words."""
    names: dict[str, bool] = {}
    for row in first:
        names |= {name: names.get(name, False) or _is_words(row[name]) for name in row if name is not None}
    given = f"corpus={corpus!r} has columns {list(names)}" if names else f"corpus={corpus!r} is empty"
    if how:
        allowed(how in names, f"{given}, not {how!r}", "one of them after the colon")
        return how
    if "text" in names:
        return "text"
    words = [name for name, holds in names.items() if holds and name not in ("article", "title", "split", "id")]
    allowed(len(words) == 1, given, "'text', a single one of words, or a column named after a colon, as in my.csv:body")
    return words[0]


def _is_words(value: Any) -> bool:
    return isinstance(value, (str, bytes)) and bool(value.strip()) and not re.fullmatch(r"[\d\s.,:+eE-]*", str(value))


def unicode(text: str) -> str:
    """Lone surrogates, which no file can hold, become U+FFFD."""
    return text if text.isascii() else text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _bytes(path: Path) -> pa.NativeFile:
    return pa.input_stream(path, compression=PACKED.get(path.suffix.lower()))


def _undecodable(path: Path) -> tuple[int, int] | None:
    """The first byte that is not UTF-8, and where it stands in the file."""
    try:
        _bytes(path).read().decode()
    except UnicodeDecodeError as error:
        return (error.object[error.start], error.start) if kind(path) != ".parquet" else None


def _open(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """A file's text, unpacked; UTF-16 is known by its mark."""
    with _bytes(path) as file:
        head = file.read(2)
    encoding = "utf-16" if head in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE) else "utf-8-sig"
    return io.TextIOWrapper(_bytes(path), encoding, newline=newline)


def _plain(path: Path, how: str, corpus: str, one: bool) -> Iterator[dict]:
    """Paragraphs between blank lines, their own line breaks taken out, or lines."""
    allowed(how in ("", "paragraphs", "lines"), f"corpus={corpus!r}", "':paragraphs' or ':lines' after a .txt file")
    with _open(path) as file:
        blank = [not line.strip() for line in file]
    lines = len(blank) - sum(blank)
    count = sum(before and not now for before, now in itertools.pairwise([True, *blank]))
    taken = how or ("lines" if not one and count < SEVERAL and count < lines else "paragraphs")
    size = min(DOCUMENT, max(1, count // (10 * SEVERAL))) if taken == "paragraphs" else 1
    if not how and not one:
        other = "lines" if taken == "paragraphs" else "paragraphs"
        between = f" between blank lines, {size} to a document" if taken == "paragraphs" else ", each a document"
        found = count if taken == "paragraphs" else lines
        _say(
            f"corpus={corpus!r}: {found:,} {taken[: -1 if found == 1 else None]}{between} (for {other} add ':{other}')"
        )
    with _open(path) as file:
        blocks = itertools.groupby(file, lambda line: bool(line.strip()))
        parts = (part for there, block in blocks if there for part in ([block] if taken == "paragraphs" else block))
        for number, part in enumerate(parts):
            text = " ".join((part if isinstance(part, str) else "".join(part)).split())
            yield {"article": str(path)} | {"text": text} if one else {"article": number // size, "text": text}


@cache
def _say(what: str) -> None:
    print(what, file=sys.stderr)


def _json(path: Path, _columns: Sequence[str] = ()) -> Iterator[dict]:
    """Objects a line each, or in an array, or in the array that is an object's only member."""
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                found = json.loads(line)
            except json.JSONDecodeError as error:
                if number > 1:
                    raise json.JSONDecodeError(f"line {number}: {error.msg}", line, error.pos) from error
                found = json.loads(line + file.read())
            only = next(iter(found.values())) if isinstance(found, dict) and len(found) == 1 else found
            for row in only if isinstance(only, list) else [found]:
                row = {"text": row} if isinstance(row, str) else row
                if not isinstance(row, dict):
                    raise json.JSONDecodeError(f"line {number} holds no object", line, 0)
                yield row


def _csv(path: Path, _columns: Sequence[str] = ()) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)
    with _open(path, newline="") as file:
        header = file.readline()
    with _open(path, newline="") as file:
        yield from csv.DictReader(file, delimiter=max(",;\t", key=header.count))


def _parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[dict]:
    with _bytes(path) as file:
        table = pq.ParquetFile(path if PACKED.get(path.suffix.lower()) is None else io.BytesIO(file.read()))
    wanted = [name for name in table.schema_arrow.names if name in columns] if columns else None
    for batch in table.iter_batches(1024, columns=wanted):
        yield from batch.to_pylist()


def splits(corpus: str, articles: Sequence[int], named: Sequence, digests: Sequence) -> list[str]:
    """The split of each row: the one it names; else documents in the order of their hashes, so many to test, …"""
    if any(named) or None in named:
        unknown = sorted(set(named) - set(SPLITS), key=str)
        allowed(not unknown, f"corpus={corpus!r}: column 'split' holds {unknown}", ", ".join(SPLITS))
        counts = {split: len({a for a, s in zip(articles, named, strict=True) if s == split}) for split in SPLITS}
        lone = [split for split in SPLITS[1:] if counts[split] == 1]
        what = f"corpus={corpus!r} has 1 document in split={', '.join(map(repr, lone))}"
        allowed(not lone, what, "at least 2 there, to resample")
        return list(named)
    count = len(digests)
    cure = f"at least {SEVERAL} (paragraphs between blank lines, lines, or rows), or a column 'split'"
    given = f"corpus={corpus!r} has {count} document{'s' * (count > 1)} to train, validate and test"
    allowed(count >= SEVERAL, given, cure)
    held = max(round(count / 10), min(SEVERAL, count // 3), 2)
    ranked = sorted(range(count), key=lambda i: digests[i].digest())
    split = {i: ("test", "validation", "train")[min(place // held, 2)] for place, i in enumerate(ranked)}
    return [split[article] for article in articles]
