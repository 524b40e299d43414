"""What lies in the cache, what of it the last runs of the chapters asked for, and how to be rid of the rest."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from helpers import settings
from helpers.press.claims import read_json


def asked_for(root: Path = settings.ROOT) -> set[str]:
    """`kind/key` of all that the last run of each chapter asked for, in every profile."""
    stamps = (root / "_build" / "executed").glob("*/*.run.json")
    found = (read_json(stamp, "delete it, and its chapter runs again") for stamp in stamps)
    return {each for stamp in found for each in stamp.get("asked", ())}


def size(path: Path) -> int:
    """Bytes on disk; a file that another process takes away meanwhile counts nothing."""
    total = 0
    for file in path.rglob("*") if path.is_dir() else [path]:
        with suppress(FileNotFoundError):
            total += file.stat().st_size if file.is_file() else 0
    return total


def show(console: Console, free: bool = False, root: Path = settings.ROOT) -> None:
    """Print how much of each kind there is and how much of it no chapter's last run asked for; `free` deletes that."""
    folder, needed = settings.cache_dir(), asked_for(root)
    kept = (path for path in sorted(folder.glob("*/*")) if path.name[0] != ".")  # no lock, nothing half written
    found = [(path, size(path)) for path in kept]
    spare = [(path, n) for path, n in found if f"{path.parent.name}/{path.stem}" not in needed]
    console.print(f"{folder}: {_gb(found)}, of which no chapter's last run asked for {_gb(spare)}", markup=False)
    for kind in dict.fromkeys(path.parent.name for path, _ in found):
        every, rest = ([(p, n) for p, n in some if p.parent.name == kind] for some in (found, spare))
        console.print(f"  {kind:<12} {len(every):5} kept, {_gb(every)}; spare {len(rest):5}, {_gb(rest)}", markup=False)
    if not free:
        console.print("--free deletes what is spare; what is asked for again later is made anew", markup=False)
        return
    gone = [(path, n) for path, n in settings.progress(spare, "freeing", delay=2) if _delete(path)]
    console.print(f"freed {_gb(gone)}; {len(spare) - len(gone)} are in use and stay", markup=False)


def _delete(path: Path) -> bool:
    """Whether it could be deleted: what another process makes or lengthens is locked, and stays."""
    try:
        with FileLock(path.parent / f".{path.stem}.lock", timeout=0):
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    except Timeout:
        return False
    return True


def _gb(some: Sequence[tuple[Path, int]]) -> str:
    return f"{sum(n for _, n in some) / 1e9:.2f} GB"
