"""Execute the chapters that are no longer valid, each in a kernel of its own, whole or not at all."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import papermill
from filelock import FileLock, Timeout
from ipykernel.kernelspec import make_ipkernel_cmd
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


class ChapterFailed(RuntimeError):
    """A chapter stopped with an error, or ended without its records."""


def run(jobs: Sequence[Job], console: Console, force: bool = False) -> list[ChapterFailed]:
    """Run the jobs that are not valid any more; one that fails does not keep the others from running.

    Returns the failures, each already shown. Raises `ValueError` when another run is busy in the same folder.
    """
    failures = []
    with _alone(jobs):
        for i, job in enumerate(jobs):
            name = f"chapter {job.chapter.number}"
            why = ["forced"] if force else stale(job)
            if not why:
                executed = json.loads(job.stamp.read_text(encoding="utf-8"))["executed"]
                console.print(f"[{i + 1}/{len(jobs)}] {name}: unchanged, kept from {executed}", markup=False)
                continue
            left = f"{len(jobs) - i - 1} left after it"
            console.print(f"[{i + 1}/{len(jobs)}] {name}: {job.chapter.title} ({shortened(why)}; {left})", markup=False)
            try:
                seconds = execute(job, console)
                console.print(f"      done in {seconds:.0f} s", markup=False)
            except ChapterFailed as failure:
                failures.append(failure)
                console.print(f"[bold red]failed[/] {escape(str(failure))}")
    return failures


def execute(job: Job, console: Console) -> float:
    """Execute one chapter into its copy, atomically, and return the seconds it took; raises `ChapterFailed`."""
    made_from, started = fingerprint(job), time.perf_counter()
    partial = job.executed.with_suffix(".partial.ipynb")
    partial.parent.mkdir(parents=True, exist_ok=True)
    for old in (job.stamp, job.results):
        old.unlink(missing_ok=True)
    _papermill(job, partial, console)
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
    settings.write_json(job.stamp, stamp)
    return seconds


def _papermill(job: Job, partial: Path, console: Console) -> None:
    where = f"{job.chapter.slug}: {{}}\n  partial notebook: {partial}"
    manager = AsyncKernelManager(kernel_spec_manager=_ThisInterpreter(job.profile))
    try:
        with _progress(job, console) as on_cell_start:
            papermill.execute_notebook(
                job.chapter.path,
                partial,
                parameters=job.given,
                progress_bar=False,
                kernel_name="python3",
                language="python",
                km=manager,
                on_cell_start=on_cell_start,
            )
    except PapermillExecutionError as error:
        cell = f"In [{error.exec_count}] (cell {error.cell_index + 1} of the notebook), which begins"
        first = error.source.strip().splitlines()[0]
        raise ChapterFailed(where.format(f"{cell}\n    {first}\n  {error.ename}: {error.evalue}")) from None
    except (CellExecutionError, DeadKernelError) as error:
        raise ChapterFailed(where.format(f"the kernel stopped ({error}); was memory enough?")) from None
    finally:  # a manager that was handed in is not the notebook client's to stop, and a kernel may hold gigabytes
        if manager.has_kernel:
            run_sync(manager.shutdown_kernel)(now=True)


class _ThisInterpreter(KernelSpecManager):
    """The kernel is the running Python, whatever kernels the user has registered under the same name."""

    def __init__(self, profile: str):
        super().__init__()
        self.variables = {"RANK1_PROFILE": profile, "TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        quiet = ["--log-level=ERROR"]  # else each kernel warns that loopback is not encrypted
        command = make_ipkernel_cmd(executable=sys.executable, extra_arguments=quiet)
        return KernelSpec(argv=command, display_name="book", language="python", env=self.variables)


@contextmanager
def _progress(job: Job, console: Console) -> Iterator[Callable[..., None]]:
    """A line that says the cell, kept up to date on a terminal, else printed now and then; yields `on_cell_start`."""
    total = sum(cell["cell_type"] == "code" for cell in job.chapter.cells) + bool(job.given)
    begun, line, started, ended = 0, "", time.monotonic(), Event()

    def on_cell_start(cell: Any, cell_index: int) -> None:
        nonlocal begun, line
        if cell.cell_type == "code":
            line = (cell.source.strip().splitlines() or [""])[0][:60]
            begun += 1

    def tell(status: Status) -> None:
        while not ended.wait(1.0 if console.is_terminal else LOG_EVERY):
            said = f"      {time.monotonic() - started:.0f} s, in code cell {begun} of {total}: {line}"
            status.update(escape(said))
            if not console.is_terminal:
                console.print(said, markup=False)

    with console.status("") as status:
        Thread(target=tell, args=[status], daemon=True).start()
        try:
            yield on_cell_start
        finally:
            ended.set()


@contextmanager
def _alone(jobs: Sequence[Job]) -> Iterator[None]:
    """Two runs at once would write over each other's copies."""
    if not jobs:
        raise ValueError("there is no chapter in notebooks/")
    folder = jobs[0].executed.parent
    folder.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(folder / ".lock", timeout=0):
            yield
    except Timeout:
        raise ValueError(f"another run is busy in {folder}; wait for it to end") from None
