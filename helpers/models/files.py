"""Files of text as people have them: a row of `text`, `article`, `title` and `split` at a time, whatever the format."""

from __future__ import annotations

import codecs
import contextlib
import csv
import io
import itertools
import json
import mmap
import re
import sys
import tempfile
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
RARE, LONG = 20, 200
"""Blank lines are strays where they are one in so many lines or fewer, and most lines have more characters than this:
no one breaks lines there, and few sentences are as long, so that each line is a document."""
AWAY = 2**22
"""Characters of text that are held before they are laid away, so that memory does not grow with a file."""
NO_TEXT = re.compile(r"[\x01-\x08\x0b\x0e-\x1a\x1c-\x1f]")
MARKS = {
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF32_LE: "utf-32",  # begins as UTF-16's does
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


class NoRows(Exception):
    """Why a file can be read, but not as a table."""


class Number(str):
    """A number as its file writes it, so that no id is rounded."""

    __repr__ = str.__str__


def kind(path: Path) -> str:
    """A file's ending in small letters, `.gz` and `.zst` left out."""
    name = Path(path.name.lower())
    return Path(name.stem).suffix if name.suffix in PACKED else name.suffix


def inside(path: Path) -> list[Path]:
    """The file, or those of a folder, that can be read; hidden ones cannot."""
    every = sorted(path.rglob("[!.]*")) if path.is_dir() else [path]
    for each in every:
        twice = kind(each) in PACKED and kind(each.with_suffix("")) in KINDS and each.is_file()
        allowed(not twice, f"corpus={str(path)!r}: {each.name} is packed twice", "a file packed once, by gzip or zstd")
    return [each for each in every if each.is_file() and kind(each) in KINDS]


def away(texts: list[str]) -> pa.Array:
    """Texts in a file without a name, of which memory holds what is looked at; in memory where the disk has no room."""
    array = pa.array(texts, pa.large_string())
    _, offsets, content = array.buffers()
    with contextlib.suppress(OSError), tempfile.TemporaryFile() as file:
        file.write(content)
        file.flush()
        content = pa.py_buffer(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    return pa.LargeStringArray.from_buffers(len(array), offsets, content)


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
            allowed(text is None or type(text) is str, given, "strings")
            if text and text.strip():
                yield {name: row[name] for name in known if name in row} | {"text": unicode(text)}
    except UnicodeDecodeError as error:
        name, byte, at = _undecodable(path) or (error.encoding, error.object[error.start], error.start)
        what = f"corpus={corpus!r} is not {name.upper()}: byte 0x{byte:02x} at offset {at}"
        raise ValueError(f"{what}; allowed: UTF-8, UTF-16, UTF-32 (convert with iconv, as by -f LATIN1)") from error
    except (pa.ArrowException, csv.Error, json.JSONDecodeError, NoRows, OSError, RecursionError) as error:
        raise ValueError(f"corpus={corpus!r} cannot be read as {ending}: {error}") from error


def _text_column(first: Iterable[dict], how: str, corpus: str) -> str:
    """The name of the column with the text: the one asked for, `text`, or the only one of words."""
    names: dict[str, bool] = {}
    for row in first:
        names |= {name: names.get(name, False) or _is_words(row[name]) for name in row}
        if (how or "text") in names:
            return how or "text"
    given = f"corpus={corpus!r} has columns {list(names)}" if names else f"corpus={corpus!r} is empty"
    allowed(not how, f"{given}, not {how!r}", "one of them after the colon")
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


def _undecodable(path: Path) -> tuple[str, int, int] | None:
    """A file's encoding, the first byte that does not keep to it, and where that stands."""
    try:
        _bytes(path).read().decode(_encoding(path))
    except UnicodeDecodeError as error:
        return (error.encoding, error.object[error.start], error.start) if kind(path) != ".parquet" else None


def _encoding(path: Path) -> str:
    """By the file's mark; without one UTF-16 and UTF-32 are known by where zeros stand."""
    with _bytes(path) as file:
        head = file.read(2**16)
    for mark, name in MARKS.items():
        if head.startswith(mark):
            return name
    zeros = [head[at::4].count(0) / max(1, len(head[at::4])) for at in range(4)]
    even, odd = zeros[0] + zeros[2], zeros[1] + zeros[3]
    if zeros[3] == 1 and zeros[2] > 0.5:
        return "utf-32-le"
    if zeros[0] == 1 and zeros[1] > 0.5:
        return "utf-32-be"
    if min(even, odd) == 0 and max(even, odd) > (1 if _is_utf8(head) else 0.1):
        return "utf-16-le" if odd else "utf-16-be"
    return "utf-8"


def _is_utf8(head: bytes) -> bool:
    """Whether this begins a text in UTF-8, zeros allowed; other control characters are halves of UTF-16's."""
    try:
        return not NO_TEXT.search(codecs.getincrementaldecoder("utf-8")().decode(head))
    except UnicodeDecodeError:
        return False


def _open(path: Path, newline: str | None = None) -> io.TextIOWrapper:
    """A file's text, unpacked."""
    return io.TextIOWrapper(_bytes(path), _encoding(path), newline=newline)


def _plain(path: Path, how: str, corpus: str, one: bool) -> Iterator[dict]:
    """Paragraphs between blank lines, their own line breaks taken out, or lines."""
    allowed(how in ("", "paragraphs", "lines"), f"corpus={corpus!r}", "':paragraphs' or ':lines' after a .txt file")
    lines = count = long = 0
    blank = True
    with _open(path) as file:
        for length in map(len, map(str.strip, file)):
            lines += length > 0
            long += length > LONG
            count += blank and length > 0
            blank = length == 0
    strays = count * RARE <= lines < 2 * long
    taken = how or ("lines" if not one and count < lines and (count < SEVERAL or strays) else "paragraphs")
    size = min(DOCUMENT, max(1, count // (10 * SEVERAL))) if taken == "paragraphs" else 1
    if not how and not one:
        other = "lines" if taken == "paragraphs" else "paragraphs"
        between = f" between blank lines, {size} to a document" if taken == "paragraphs" else ", each a document"
        found = count if taken == "paragraphs" else lines
        say(f"corpus={corpus!r}: {found:,} {taken[: -1 if found == 1 else None]}{between} (for {other} add ':{other}')")
    with _open(path) as file:
        blocks = itertools.groupby(file, lambda line: bool(line.strip()))
        parts = (part for there, block in blocks if there for part in ([block] if taken == "paragraphs" else block))
        for number, part in enumerate(parts):
            block = [part] if isinstance(part, str) else part
            yield {"article": 0 if one else number // size, "text": " ".join(map(_single_spaced, block))}


def _single_spaced(line: str) -> str:
    """A line without further blanks; one of many words is not taken to pieces."""
    return " ".join(line.split()) if len(line) < 2**20 else re.sub(r"\s{2,}|[^\S ]", " ", line.strip())


@cache
def say(what: str) -> None:
    """To standard error, once."""
    print(what, file=sys.stderr)


def _json(path: Path, _columns: Sequence[str] = ()) -> Iterator[dict]:
    """Objects a line each, or the rows of the one value that fills the file."""
    decode = json.JSONDecoder(parse_int=Number, parse_float=Number).decode
    with _open(path) as file:
        lines = ((number, line) for number, line in enumerate(file, 1) if line.strip())
        _, first = next(lines, (1, "[]"))
        try:
            found, more = decode(first), next(lines, None)
        except json.JSONDecodeError:
            found, more = decode(first + file.read()), None
        yield from map(_row, [found] if more else _table(found, path))
        for number, line in itertools.chain([more] if more else (), lines):
            try:
                yield _row(decode(line))
            except (json.JSONDecodeError, NoRows) as error:
                raise NoRows(f"line {number}: {error}") from error


def _row(value: Any) -> dict:
    value = {"text": value} if type(value) is str else value
    if not isinstance(value, dict):
        raise NoRows(f"{value!r:.40} stands where a row should, an object or a string")
    return value


def _table(value: Any, path: Path) -> list:
    """Rows of a value that fills a file: a list of them, or an object of columns, of splits, or around one of these."""
    if not isinstance(value, dict):
        return value if isinstance(value, list) else [value]
    inside = list(value.values())
    words = [name for name, each in value.items() if isinstance(each, str) and (name == "text" or len(each) > LONG)]
    if words or not inside:
        return [value]
    if all(isinstance(each, dict) and each and all(map(str.isdecimal, each)) for each in inside):  # as pandas writes it
        value = {name: list(each.values()) for name, each in value.items()}
    if all(isinstance(each, dict) for each in inside) and all(map(str.isdecimal, value)):
        return inside
    lists = {name: each for name, each in value.items() if isinstance(each, list)}
    of_rows = [name for name, each in lists.items() if any(isinstance(row, dict) for row in each)]
    if lists and set(lists) <= set(SPLITS):
        return [_row(row) | {"split": name} for name, each in lists.items() for row in each]
    within = of_rows or [name for name, each in value.items() if isinstance(each, dict) and not lists]
    if len(within) > 1:
        raise NoRows(f"rows stand in each of {within}: keep one")
    if within:
        say(f"{path}: its rows are those in {within[0]!r}")
        return _table(value[within[0]], path)
    if len(set(map(len, lists.values()))) > 1:
        raise NoRows(f"the lists {list(lists)} are not of one length")
    return [dict(zip(lists, row, strict=True)) for row in zip(*lists.values(), strict=True)] if lists else [value]


def _csv(path: Path, columns: Sequence[str] = ()) -> Iterator[dict]:
    csv.field_size_limit(2**31 - 1)
    with _open(path, newline="") as file:
        header = file.readline()
    delimiter = max(",;\t|", key=header.count)
    with _open(path, newline="") as file:
        table = csv.DictReader(file, delimiter=delimiter if delimiter in header else "\x1f", strict=True)
        twice = [name for name in columns if (table.fieldnames or []).count(name) > 1]
        if twice:
            raise NoRows(f"several columns are called {twice[0]!r}")
        for row in table:
            if any(row.pop(None, ())):
                raise NoRows(f"line {table.line_num} has more fields than the header; quote what holds {delimiter!r}")
            yield row


def _parquet(path: Path, columns: Sequence[str] = ()) -> Iterator[dict]:
    """Rows of the columns asked for; without any a row of all names, then those that can hold text."""
    with _bytes(path) as file:
        whole = path if PACKED.get(path.suffix.lower()) is None else io.BytesIO(file.read())
    table = pq.ParquetFile(whole, buffer_size=2**20, pre_buffer=False)
    schema, groups = table.schema_arrow, map(table.metadata.row_group, range(table.num_row_groups))
    size = sum(group.total_byte_size for group in groups) // max(1, table.metadata.num_rows)
    if not columns:
        yield dict.fromkeys(schema.names)
        columns = [field.name for field in schema if re.search("^[^<]*(string|binary)|^dict", str(field.type))]
    for batch in table.iter_batches(
        max(1, min(1024, AWAY // max(1, size))), columns=[name for name in schema.names if name in columns]
    ):
        yield from batch.to_pylist()


def splits(corpus: str, articles: Sequence[int], named: Sequence, digests: Sequence) -> list[str]:
    """The split of each row: the one it names; else documents in the order of their hashes, so many to test, …"""
    if any(named) or None in named:
        named = [split if isinstance(split, str | None) else repr(split) for split in named]
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
