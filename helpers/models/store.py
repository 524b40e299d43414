"""The files behind a store of activations: arrays that grow block by block, checked when they are opened."""

from __future__ import annotations

import bisect
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np

from helpers import kept, settings

INDEX = "index.json"
ROW_FIELDS = np.dtype([("article", "<i4"), ("text", "<i4"), ("position", "<i4"), ("token_id", "<i4")])


class Files:
    """What lies on disk of one layer: `rows.bin` and a file for each site, to which blocks are added; and an index.

    The index is written last: what stands in a file beyond it is a block that was not finished. It holds the number of
    rows up to the end of each block, the checksum of each block, and size and time of each file: one that has these
    still is taken to be whole, of any other the blocks are read once in a process.
    """

    whole: ClassVar[set[tuple]] = set()
    """Files that this process has read and found to be whole: path, size, time and number of blocks."""

    def __init__(self, place: Path):
        self.place = place
        self.index = {"key": place.name, "d": 0, "dtype": "", "ends": [], "ended": False, "checks": {}, "files": {}}
        if (place / INDEX).exists():
            self.index = self._read()

    @property
    def n(self) -> int:
        """Rows there are."""
        return self.index["ends"][-1] if self.index["ends"] else 0

    def blocks(self, name: str) -> int:
        """Blocks there are of a site, or of the table of rows."""
        return len(self.index["checks"].get(name, []))

    def has(self, sites: Iterable[str], n: int) -> bool:
        """Whether there are `n` rows of all sites, or as many as the corpus has."""
        needed = self._holding(n)
        needed = min(needed, len(self.index["ends"])) if self.index["ended"] else needed
        return all(self.blocks(name) >= needed for name in ("rows", *sites))

    def prepare(self) -> None:
        """Make the folder, and clear away what a killed process was writing."""
        self.place.mkdir(parents=True, exist_ok=True)
        for left in self.place.glob(".*.part"):
            left.unlink()

    def append(self, number: int, table: np.ndarray, arrays: Mapping[str, np.ndarray]) -> None:
        """Add block `number` of some sites, and of the table of rows where it has not got it."""
        index = self.index
        index["d"], index["dtype"] = next((array.shape[1], array.dtype.str) for array in arrays.values())
        parts = arrays if self.blocks("rows") > number else {"rows": table, **arrays}
        for name, array in parts.items():
            content, path = np.ascontiguousarray(array).view(np.uint8).ravel(), self._file(name)
            try:
                with path.open("r+b" if path.exists() else "w+b") as file:
                    file.truncate(self._bytes(name, number))
                    file.seek(0, 2)
                    file.write(content.data)
            except OSError as error:
                raise ValueError(f"{path} cannot be written: {error.strerror}; allowed: a disk with room") from error
            index["checks"].setdefault(name, []).append(kept.digest(content))
            index["files"][name] = self._mark(path)
        if len(index["ends"]) == number:
            index["ends"].append(self.n + len(table))
        self._write()

    def end(self) -> None:
        """Note that the corpus has no more."""
        self.index["ended"] = True
        self._write()

    def open(self, name: str, n: int) -> np.ndarray:
        """The first `n` rows of a site or of the table, read-only; `ValueError` where they are not what was kept."""
        path, blocks = self._file(name), self._holding(n)
        if self.blocks(name) < blocks:
            there = ([0] + self.index["ends"])[self.blocks(name)]
            raise ValueError(f"{self.place} has {there:,} rows of {name!r}, not {n:,}; allowed: what was harvested")
        size, needed = path.stat().st_size if path.exists() else 0, self._bytes(name, blocks)
        if size < needed:
            raise self._damaged(path, f"it has {size:,} bytes where {needed:,} belong")
        if self._mark(path) != self.index["files"][name] and (path, *self._mark(path), blocks) not in self.whole:
            self.verify(name, blocks)
            self.whole.add((path, *self._mark(path), blocks))
        dtype, columns = self._kind(name)
        return np.memmap(path, dtype, "r", shape=(n, *columns))

    def verify(self, name: str, blocks: int | None = None) -> None:
        """Compare the checksums of all blocks of a file, or of the first of them."""
        path = self._file(name)
        with path.open("rb") as file:
            for number, check in enumerate(self.index["checks"][name][:blocks]):
                if kept.digest(file.read(self._bytes(name, number + 1) - self._bytes(name, number))) != check:
                    raise self._damaged(path, f"its checksum is wrong in block {number}")

    def _file(self, name: str) -> Path:
        return self.place / f"{name}.bin"

    @staticmethod
    def _mark(path: Path) -> list[int]:
        about = path.stat()
        return [about.st_size, about.st_mtime_ns]

    def _holding(self, n: int) -> int:
        """How many blocks hold `n` rows; one more than there are where they hold fewer."""
        return bisect.bisect_left(self.index["ends"], n) + 1

    def _kind(self, name: str) -> tuple[np.dtype, tuple[int, ...]]:
        return (ROW_FIELDS, ()) if name == "rows" else (np.dtype(self.index["dtype"]), (self.index["d"],))

    def _bytes(self, name: str, blocks: int) -> int:
        """Size of a file of so many blocks."""
        dtype, columns = self._kind(name)
        return ([0] + self.index["ends"])[blocks] * dtype.itemsize * math.prod(columns)

    def _write(self) -> None:
        body = json.dumps(self.index, sort_keys=True)
        settings.write_json(self.place / INDEX, {"check": kept.digest(body), "index": self.index})

    def _read(self) -> dict:
        path = self.place / INDEX
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            if kept.digest(json.dumps(found["index"], sort_keys=True)) != found["check"]:
                raise ValueError("its checksum is wrong")
            if found["index"]["key"] != self.place.name:
                raise ValueError("it is that of another store")
            return found["index"]
        except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
            raise self._damaged(path, str(error)) from error

    def _damaged(self, path: Path, why: str) -> ValueError:
        cure = f"delete the folder {self.place} to harvest again"
        return ValueError(f"the activation store is damaged: {path}: {why}; {cure}")
