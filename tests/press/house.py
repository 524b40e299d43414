"""A copy of the project to ask wrong things of, and what an asking left behind."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import nbformat

from helpers import settings

AS_NOBODY = [
    "setpriv", "--reuid=54321", "--regid=54321", "--clear-groups",
    "--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search",
]  # fmt: skip
"""As a user without an account, who may write nowhere; reads as root does, for Python may lie in root's home."""
COPIED = ("helpers", "notebooks", "profiles", "book", "requirements.txt", "_config.yml", "_toc.yml")
LINKED = ("data", "results", "third_party")
PARAMETERS = "k = 4\ncache_dir = None\nresults_dir = None"
RECORDS = """from helpers import settings
settings.write_json(settings.results_dir(results_dir) / "01_first.json", {"k": k})"""
MARK = "RANK1_TEST_MARK"


@cache
def why_not_nobody() -> str:
    """Why no command can be run as a user without an account; empty where one can."""
    if os.geteuid():
        return "only root can become another user"
    if shutil.which("setpriv") is None:
        return "setpriv (util-linux) is not there"
    done = subprocess.run([*AS_NOBODY, sys.executable, "-c", "import yaml"], capture_output=True, text=True, cwd="/")
    return f"{done.stderr.strip()[-300:]} (rc {done.returncode})" if done.returncode else ""


def _hears_sigint() -> None:
    """What a script starts in the background has SIGINT ignored, and hands that down."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


@dataclass(frozen=True)
class Done:
    """What a command ended with: `cpu` are the seconds that it and the children it waited for computed."""

    code: int
    said: str
    cpu: float
    wall: float


class House:
    """The project in a folder of its own that every user can read, with a cache and a place for the reader's files."""

    def __init__(self) -> None:
        self.top = Path(tempfile.mkdtemp(prefix="rank1-house-"))
        self.top.chmod(0o755)
        self.root, self.cache, self.own = self.top / "book", self.top / "cache", self.top / "own"
        self.mark = uuid.uuid4().hex
        for folder in (self.root, self.cache, self.own):
            folder.mkdir()
        for name in COPIED:
            place = settings.ROOT / name
            (shutil.copytree if place.is_dir() else shutil.copy2)(place, self.root / name)
        for name in LINKED:
            (self.root / name).symlink_to(settings.ROOT / name)

    def chapter(self, *cells: str, parameters: str = PARAMETERS, slug: str = "01_first") -> None:
        """Make this the book's only chapter; it records last."""
        for path in (self.root / "notebooks").iterdir():
            path.unlink()
        tagged = nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})
        code = [nbformat.v4.new_code_cell(cell) for cell in (*cells, RECORDS)]
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title ≤ 1"), tagged, *code])
        nbformat.write(notebook, self.root / "notebooks" / f"{slug}.ipynb")
        for path in (self.root / "profiles").iterdir():
            path.write_text("")

    def start(
        self,
        arguments: Sequence[str],
        environment: Mapping[str, str | None] | None = None,
        nobody: bool = False,
        folder: Path | None = None,
        **options,
    ) -> subprocess.Popen:
        """`python -m helpers` with some arguments, here and in this environment (None takes a variable out)."""
        given = {
            **os.environ,
            "PYTHONPATH": str(self.root),
            "PYTHONDONTWRITEBYTECODE": "1",
            "RANK1_CACHE": str(self.cache),
            "OMP_NUM_THREADS": "1",
            MARK: self.mark,
            **(environment or {}),
        }
        given = {name: value for name, value in given.items() if value is not None}
        command = [*(AS_NOBODY if nobody else []), sys.executable, "-m", "helpers", *arguments]
        return subprocess.Popen(
            command, cwd=folder or self.root, env=given, start_new_session=True, preexec_fn=_hears_sigint,
            **{"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "errors": "replace"} | options,
        )  # fmt: skip

    def run(self, *arguments: str, seconds: float = 300, **options) -> Done:
        """Run a command to its end; one that takes longer is killed and told of."""
        started = time.perf_counter()
        process = self.start(arguments, **options)
        return self.ended(process, started, seconds)

    @staticmethod
    def ended(process: subprocess.Popen, started: float, seconds: float = 300) -> Done:
        """Wait for a process that `start` started."""
        before = os.times()
        try:
            said, _ = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
            said, _ = process.communicate()
            said = f"KILLED after {seconds} s\n{said}"
        after = os.times()
        cpu = after.children_user + after.children_system - before.children_user - before.children_system
        return Done(process.returncode, said or "", cpu, time.perf_counter() - started)

    def left(self, seconds: float = 5) -> list[str]:
        """Processes of this house that still run, waited for a few seconds."""
        until = time.monotonic() + seconds
        while (found := self._processes()) and time.monotonic() < until:
            time.sleep(0.1)
        return found

    def _processes(self) -> list[str]:
        found = []
        for place in Path("/proc").glob("[0-9]*"):
            try:
                if f"{MARK}={self.mark}".encode() in (place / "environ").read_bytes().split(b"\0"):
                    found.append((place / "cmdline").read_bytes().replace(b"\0", b" ").decode()[:200])
            except OSError:
                continue
        return found

    def state(self, *without: str) -> dict[str, tuple[int, int, int]]:
        """Size, time and rights of all there is, but for folders of these names."""
        found = {}
        for folder, folders, files in os.walk(self.top):
            folders[:] = [name for name in folders if name not in ("__pycache__", *without)]
            for path in (Path(folder), *(Path(folder) / name for name in files)):
                about = path.lstat()
                time_of = 0 if path.is_dir() else about.st_mtime_ns
                found[str(path.relative_to(self.top))] = (about.st_mode, 0 if path.is_dir() else about.st_size, time_of)
        return found

    def remove(self) -> None:
        shutil.rmtree(self.top, ignore_errors=True)
