"""Execute the chapters that are no longer valid, each in a kernel of its own, whole or not at all."""

from __future__ import annotations

import ast
import json
import logging
import os
import re
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from threading import Event, Lock, Thread
from typing import Any

import nbformat
import papermill
from filelock import FileLock, Timeout
from ipykernel.kernelspec import make_ipkernel_cmd
from IPython.core.inputtransformer2 import TransformerManager
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.markup import escape
from rich.status import Status

from helpers import settings
from helpers.press.chapters import Job, digest_files, entries, fingerprint, shortened, stale

LOG_EVERY = 20.0
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


WHOLE = "whole.json"
"""File beside the copies that says how long it took to run all chapters, none of them kept from before."""
START = 300
"""Seconds that a kernel may take to start, on a machine that is busy."""


class ChapterFailed(RuntimeError):
    """A chapter stopped with an error, or ended without its records; `asked_wrongly` where it refused a parameter."""

    asked_wrongly = False


@dataclass
class Running:
    """A chapter at work, and what it does now."""

    job: Job
    started: float = field(default_factory=time.monotonic)
    begun: int = 0
    line: str = ""

    def on_cell_start(self, cell: Any, cell_index: int) -> None:
        if cell.cell_type == "code":
            self.line = (cell.source.strip().splitlines() or [""])[0][:60]
            self.begun += 1

    def __str__(self) -> str:
        total = sum(cell["cell_type"] == "code" for cell in self.job.chapter.cells) + bool(self.job.given)
        where = f"{time.monotonic() - self.started:.0f} s, in code cell {self.begun} of {total}: {self.line}"
        return f"      chapter {self.job.chapter.number}: {where}"


@dataclass
class Desk:
    """Where chapters are worked on side by side, each in a kernel of its own with its share of the cores.

    What two of them need is made once: the second waits at the lock of the first (`helpers.kept`).
    """

    console: Console
    share: int | None = None  # cores of a chapter; None for all of them
    at_work: list[Running] = field(default_factory=list)
    halted: Event = field(default_factory=Event)

    @contextmanager
    def begun(self, job: Job) -> Iterator[Running]:
        self.at_work.append(running := Running(job))
        try:
            yield running
        finally:
            self.at_work.remove(running)

    @contextmanager
    def in_view(self) -> Iterator[None]:
        """A line for each chapter at work, kept up to date on a terminal, else printed now and then."""
        ended = Event()

        def tell(status: Status) -> None:
            while not ended.wait(1.0 if self.console.is_terminal else LOG_EVERY):
                said = "\n".join(map(str, self.at_work))
                status.update(escape(said))
                if said and not self.console.is_terminal:
                    self.console.print(said, markup=False)

        with self.console.status("") as status:
            Thread(target=tell, args=[status], daemon=True).start()
            try:
                yield
            finally:
                ended.set()


class Queue:
    """What waits to be run. Beside one chapter the next is one of another teacher, where there is such a one: it would
    only wait until the first has converted the teacher and harvested from it."""

    def __init__(self, waiting: Sequence[tuple[Job, Sequence[str]]], desk: Desk):
        self.waiting, self.all, self.desk = list(enumerate(waiting, 1)), len(waiting), desk
        self.taken: list[Job] = []
        self.turn = Lock()

    def take(self) -> tuple[int, Job, Sequence[str]] | None:
        with self.turn:
            if not self.waiting or self.desk.halted.is_set():
                return None
            busy = {job.parameters.get("teacher") for job in self.taken} - {None}
            apart = (n for n, (_, (job, _)) in enumerate(self.waiting) if job.parameters.get("teacher") not in busy)
            place, (job, why) = self.waiting.pop(next(apart, 0))
            self.taken.append(job)
            return place, job, why

    def work_off(self) -> list[tuple[int, ChapterFailed]]:
        """In one of the threads; returns the failures of what it ran, with their places."""
        failed = []
        while (taken := self.take()) is not None:
            place, job, why = taken
            if (failure := _run(job, why, f"[{place}/{self.all}]", self.desk)) is not None:
                failed.append((place, failure))
            with self.turn:
                self.taken.remove(job)
        return failed


def run(jobs: Sequence[Job], console: Console, force: bool = False, at_once: int = 1) -> list[ChapterFailed]:
    """Run the jobs that are not valid any more, `at_once` of them side by side; one that fails stops no other.

    Returns the failures, each already shown. Raises `ValueError` when another run is busy in the same folder.
    """
    with _alone(settings.made("_build", jobs[0].executed.parent, to_write=True)):
        reasons = [["forced"] if force else stale(job) for job in jobs]
        for job, why in zip(jobs, reasons, strict=True):
            if not why:
                executed = json.loads(job.stamp.read_text(encoding="utf-8"))["executed"]
                console.print(f"chapter {job.chapter.number}: unchanged, kept from {executed}", markup=False)
        waiting = [(job, why) for job, why in zip(jobs, reasons, strict=True) if why]
        at_once = min(at_once, len(waiting))
        desk, started = Desk(console, max(1, settings.cores() // at_once) if at_once > 1 else None), time.perf_counter()
        queue, pool = Queue(waiting, desk), ThreadPoolExecutor(max(1, at_once))
        with desk.in_view():
            ended = [pool.submit(queue.work_off) for _ in range(max(1, at_once))]
            try:
                failed = {place: failure for each in ended for place, failure in each.result()}
            except KeyboardInterrupt:
                desk.halted.set()
                raise
            finally:
                pool.shutdown()
        failures = [failed[place] for place in sorted(failed)]
        if len(waiting) == len(jobs) and not failures:
            took = {"seconds": round(time.perf_counter() - started, 1), "at_once": at_once, "cores": settings.cores()}
            settings.write_json(jobs[0].executed.parent / WHOLE, took)
    return failures


def _run(job: Job, why: Sequence[str], place: str, desk: Desk) -> ChapterFailed | None:
    name = f"chapter {job.chapter.number}"
    if why == ["notebook changed"]:  # and its code did not
        reword(job)
        desk.console.print(f"{place} {name}: new words around what was computed", markup=False)
        return None
    desk.console.print(f"{place} {name}: {job.chapter.title} ({shortened(why)})", markup=False)
    try:
        seconds = execute(job, desk)
        desk.console.print(f"      {name}: done in {seconds:.0f} s", markup=False)
    except ChapterFailed as failure:
        desk.console.print(f"[bold red]failed[/] {escape(str(failure))}")
        return failure


def execute(job: Job, desk: Desk) -> float:
    """Execute one chapter into its copy, atomically, and return the seconds it took; raises `ChapterFailed`."""
    started = time.perf_counter()
    partial = job.executed.with_suffix(".partial.ipynb")
    try:
        made_from = fingerprint(job)
        _check_syntax(job)
        for old in (job.stamp, job.results):
            old.unlink(missing_ok=True)
        notes = _papermill(job, partial, desk)
        if not job.results.is_file():
            raise ChapterFailed(f"{job.chapter.slug}: it ended, but wrote no records to {job.results}; copy: {partial}")
        os.replace(partial, job.executed)
        seconds = time.perf_counter() - started
        stamp = {
            "made_from": entries(job) | made_from,  # what it recorded is known only now
            "parameters": job.parameters,
            "executed": datetime.now().isoformat(sep=" ", timespec="minutes"),
            "seconds": round(seconds, 1),
            "results": digest_files(job.results),
            "copy": digest_files(job.executed),
        }
        settings.write_json(job.stamp, stamp | notes)
    except OSError as error:
        where = f"{error.filename or partial.parent}: {error.strerror or error}"
        raise ChapterFailed(f"{job.chapter.slug}: {where}; allowed: folders of yours with room") from error
    except ValueError as error:
        raise ChapterFailed(f"{job.chapter.slug}: {error}") from error
    return seconds


def reword(job: Job) -> None:
    """The executed copy with the notebook's present words, captions and tags; outputs stay, as the code is the same."""
    executed, now = (nbformat.read(path, as_version=4) for path in (job.executed, job.chapter.path))
    stamp = json.loads(job.stamp.read_text(encoding="utf-8"))
    ran, executed.cells = iter([cell for cell in executed.cells if cell.cell_type == "code"]), []
    for cell in now.cells:
        executed.cells.append(cell)
        if cell.cell_type == "code":
            old = next(ran)
            cell.outputs, cell.execution_count = old.outputs, old.execution_count
            if job.given and "parameters" in cell.metadata.get("tags", []):
                executed.cells.append(next(ran))  # the parameters that were put in
    settings.write(job.executed, nbformat.writes(executed).encode())
    made_from = stamp["made_from"] | fingerprint(job)
    settings.write_json(job.stamp, stamp | {"made_from": made_from, "copy": digest_files(job.executed)})


def _check_syntax(job: Job) -> None:
    """Cells that are no Python fail before a kernel starts; what IPython adds to the language is translated."""
    for number, cell in enumerate(job.chapter.cells, 1):
        if cell["cell_type"] == "code":
            code = TransformerManager().transform_cell(cell["source"])
            try:
                compile(code, "cell", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
            except SyntaxError as error:
                where = f"{job.chapter.slug}: cell {number} of the notebook, line {error.lineno}"
                raise ChapterFailed(f"{where}, which is\n    {(error.text or '').strip()}\n  {error.msg}") from None


def _papermill(job: Job, partial: Path, desk: Desk) -> dict[str, Any]:
    """Run a chapter in a thread: there the notebook client takes no signals, so that they arrive here.

    Returns the seconds of what it computed and `made` for good, by kind, and what it `asked` of the cache.
    """
    where = f"{job.chapter.slug}: {{}}\n  partial notebook: {partial}"
    logging.getLogger("traitlets").setLevel(logging.CRITICAL)  # what it says of a dead kernel is said below
    with TemporaryDirectory(prefix="rank1-kernel-") as folder, desk.begun(job) as running:
        (Path(folder) / "notes").touch()
        specs = _ThisInterpreter(job.profile, folder, desk.share)
        manager = _Manager(kernel_spec_manager=specs, connection_file=f"{folder}/kernel.json")
        ended = ThreadPoolExecutor(1).submit(_work, job, partial, manager, running.on_cell_start)
        while not wait([ended], timeout=0.2).done:
            if desk.halted.is_set() and manager.has_kernel and manager.provisioner.pgid:
                with suppress(ProcessLookupError):
                    os.killpg(manager.provisioner.pgid, signal.SIGKILL)
        if desk.halted.is_set():
            raise ChapterFailed(where.format("stopped"))
        try:
            ended.result()
        except PapermillExecutionError as error:
            cell = f"In [{error.exec_count}] (cell {error.cell_index + 1} of the notebook), which begins"
            first = error.source.strip().splitlines()[0]
            failed = ChapterFailed(where.format(f"{cell}\n    {first}\n  {error.ename}: {error.evalue}"))
            refused = any(re.search(rf"\b{name}=", error.evalue) for name in job.given)
            failed.asked_wrongly = error.ename == "ValueError" and refused
            raise failed from None
        except (CellExecutionError, DeadKernelError) as error:
            raise ChapterFailed(
                where.format(f"the kernel stopped ({error}); was memory enough?{manager.said()}")
            ) from None
        except RuntimeError as error:
            raise ChapterFailed(where.format(f"the kernel did not start: {error}{manager.said()}")) from None
        lines = [line.split() for line in (Path(folder) / "notes").read_text(encoding="utf-8").splitlines()]
    made = Counter()
    for what, kind, seconds in lines:
        made[kind] += float(seconds) if what == "made" else 0
    asked = sorted({f"{kind}/{key}" for what, kind, key in lines if what == "asked"})
    return {"made": {kind: round(each, 1) for kind, each in made.items()}, "asked": asked}


def _work(job: Job, partial: Path, manager: AsyncKernelManager, on_cell_start: Callable[..., None]) -> None:
    try:
        papermill.execute_notebook(
            job.chapter.path,
            partial,
            parameters=job.given,
            progress_bar=False,
            kernel_name="python3",
            language="python",
            km=manager,
            start_timeout=START,
            on_cell_start=on_cell_start,
        )
    finally:  # a manager that was handed in is not the notebook client's to stop, and a kernel may hold gigabytes
        if manager.has_kernel:
            run_sync(manager.shutdown_kernel)(now=True)


class _Manager(AsyncKernelManager):
    """What a kernel says beside its notebook goes to a file: one that is stopped may show a library's traceback."""

    async def start_kernel(self, **options: Any) -> None:
        with Path(self.connection_file).with_suffix(".said").open("wb") as said:
            await super().start_kernel(stderr=said, **options)

    def said(self) -> str:
        """Its last line, for one that stopped of itself."""
        path = Path(self.connection_file).with_suffix(".said")
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n") if path.is_file() else []
        return "".join(f"\n  it said: {line.strip()}" for line in lines[-2:-1])


class _ThisInterpreter(KernelSpecManager):
    """The kernel is the running Python, whatever kernels the user has registered under the same name."""

    def __init__(self, profile: str, folder: str, share: int | None):
        """`folder` is where a kernel may write, also for a user who has no home; `share` its cores, None for all."""
        super().__init__()
        self.variables = {"RANK1_PROFILE": profile, "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        self.variables |= {"JUPYTER_RUNTIME_DIR": folder, settings.NOTES: f"{folder}/notes"}
        if os.path.expanduser("~") == "~":
            self.variables |= {"HOME": folder}
        if share is not None:
            self.variables |= {settings.CORES: str(share), "OMP_NUM_THREADS": str(share)}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        quiet = ["--log-level=ERROR"]  # else each kernel warns that loopback is not encrypted
        command = make_ipkernel_cmd(executable=sys.executable, extra_arguments=quiet)
        return KernelSpec(argv=command, display_name="book", language="python", env=self.variables)


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Two runs at once would write over each other's copies."""
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another run is busy in {folder}; wait for it to end") from None
