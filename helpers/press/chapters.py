"""Find the chapters, settle their parameters, and execute what is no longer valid."""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from typing import Any

import nbformat
import papermill
import yaml
from filelock import FileLock, Timeout
from ipykernel.kernelspec import make_ipkernel_cmd
from jupyter_client.kernelspec import KernelSpec, KernelSpecManager
from jupyter_client.manager import AsyncKernelManager
from jupyter_core.utils import run_sync
from nbclient.exceptions import CellExecutionError, DeadKernelError
from papermill.exceptions import PapermillExecutionError
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from helpers import settings

MACHINERY = ("helpers", "data", "book/claims.yml", "requirements.txt")
"""What every chapter depends on, beside its own notebook and parameters. No finer graph."""

INPUTS = ("teacher", "corpus", "checkpoint")
"""Parameters that may name a file or folder of the reader's."""

LOG_EVERY = 20.0
"""Seconds between lines of progress where there is no terminal to draw a bar on."""


class _Yaml(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, as everywhere but in YAML 1.1."""


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


@dataclass(frozen=True)
class Layout:
    """Where a book keeps its parts; another root makes another book (the tests use that)."""

    root: Path = settings.ROOT

    def executed(self, profile: str) -> Path:
        """Folder of the executed copies of `profile`."""
        return self.root / "_build" / "executed" / profile

    def results(self, profile: str) -> Path:
        """Folder of the records that the chapters write under `profile`."""
        return self.root / "_build" / "results" / profile


@dataclass(frozen=True)
class Chapter:
    """One notebook: `notebooks/NN_slug.ipynb`, with the defaults of its cell tagged `parameters`."""

    number: int
    slug: str
    path: Path
    title: str
    defaults: dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A chapter with the parameters it is to run under: `given` differ from the notebook's own `defaults`."""

    chapter: Chapter
    profile: str
    given: dict[str, Any]
    layout: Layout

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter, as the notebook will see it."""
        return self.chapter.defaults | self.given

    @property
    def executed(self) -> Path:
        """The executed copy."""
        return self.layout.executed(self.profile) / f"{self.chapter.slug}.ipynb"

    @property
    def results(self) -> Path:
        """The records the chapter writes."""
        folder = self.parameters.get("results_dir") or self.layout.results(self.profile)
        return Path(folder).expanduser() / f"{self.chapter.slug}.json"

    @property
    def stamp(self) -> Path:
        """What the executed copy was made from."""
        return self.executed.with_suffix(".run.json")


class ChapterFailed(RuntimeError):
    """A chapter stopped with an error, or ended without its records."""


# --- finding --------------------------------------------------------------------------------------------------------


def find(layout: Layout | None = None) -> list[Chapter]:
    """All chapters, in order of their number. Raises `ValueError` where a notebook has no usable parameters cell."""
    paths = sorted(((layout or Layout()).root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    return [_read(path) for path in paths]


def choose(names: Sequence[str], chapters: Sequence[Chapter]) -> list[Chapter]:
    """The chapters called `names` (number or slug; none means all), in the book's order."""
    known = {key: c for c in chapters for key in (c.slug, str(c.number), f"{c.number:02d}")}
    for name in names:
        if name not in known:
            listed = "\n".join(f"  {c.number}  {c.slug}" for c in chapters)
            raise ValueError(f"chapter={name!r} is not in the book; allowed (number or slug):\n{listed}")
    wanted = {known[name].slug for name in names}
    return [c for c in chapters if not names or c.slug in wanted]


def _read(path: Path) -> Chapter:
    cells = nbformat.read(path, as_version=4).cells
    tagged = [c for c in cells if c.cell_type == "code" and "parameters" in c.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{path.name}: {len(tagged)} code cells are tagged 'parameters'; exactly one is needed")
    prose = "\n".join(c.source for c in cells if c.cell_type == "markdown")
    heading = re.search(r"^# (.+)$", prose, re.M)
    title = heading[1].strip() if heading else path.stem
    return Chapter(int(path.stem[:2]), path.stem, path, title, _constants(tagged[0].source, path))


def _constants(source: str, path: Path) -> dict[str, Any]:
    """Names and values of a parameters cell; only constants, since papermill does not recompute derived values."""
    values = {}
    for node in ast.parse(source).body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        try:
            values[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError):
            line = ast.get_source_segment(source, node)
            raise ValueError(f"{path.name}: the parameters cell holds constants only, not {line!r}") from None
    return values


# --- parameters -----------------------------------------------------------------------------------------------------


def parse_value(text: str) -> Any:
    """A value given on the command line, read as YAML (`[0, 1]`, `1e-3`, `null`); `None` is null too."""
    return None if text == "None" else yaml.load(text, Loader=_Yaml)


def read_profile(name: str, chapters: Sequence[Chapter], layout: Layout | None = None) -> dict[str, dict[str, Any]]:
    """Parameters of profile `name` by slug, the ones under `common:` given to every chapter that has them.

    Raises `ValueError` for a profile, chapter or parameter that does not exist.
    """
    folder = (layout or Layout()).root / "profiles"
    path = folder / f"{name}.yml"
    if not path.is_file():
        allowed = ", ".join(sorted(p.stem for p in folder.glob("*.yml")))
        raise ValueError(f"profile={name!r} does not exist; allowed: {allowed}")
    entries = yaml.load(path.read_text(encoding="utf-8"), Loader=_Yaml) or {}
    common = entries.pop("common", None) or {}
    _check_names(common, chapters, f"{path.name}, common", everywhere=False)
    for slug, values in entries.items():
        if slug not in {c.slug for c in chapters}:
            raise ValueError(f"{path.name}: chapter={slug!r} is not in the book; allowed: {[c.slug for c in chapters]}")
        _check_names(values or {}, [c for c in chapters if c.slug == slug], f"{path.name}, {slug}")
    shared = {c.slug: {k: v for k, v in common.items() if k in c.defaults} for c in chapters}
    return {c.slug: shared[c.slug] | (entries.get(c.slug) or {}) for c in chapters}


def plan(
    names: Sequence[str] = (),
    profile: str = "quick",
    overrides: Mapping[str, Any] | None = None,
    layout: Layout | None = None,
) -> list[Job]:
    """The jobs of the chapters called `names` under `profile`, everything checked before anything runs.

    `overrides` win over the profile. Their copies and records go to `<profile>+custom`, so that the book is never
    built from them. A chapter that is named must have every parameter given; with no chapter named, a parameter goes
    to all chapters that have it. Raises `ValueError` naming what is unknown and what is allowed.
    """
    layout, overrides = layout or Layout(), dict(overrides or {})
    every = find(layout)
    chapters = choose(names, every)
    entries = read_profile(profile, every, layout)
    _check_names(overrides, chapters, "-p", everywhere=bool(names))
    folder = f"{profile}+custom" if overrides else profile
    own = {c.slug: {k: v for k, v in overrides.items() if k in c.defaults} for c in chapters}
    return [Job(c, folder, entries[c.slug] | own[c.slug], layout) for c in chapters]


def _check_names(values: Mapping[str, Any], chapters: Sequence[Chapter], where: str, everywhere: bool = True) -> None:
    quantifier = all if everywhere else any
    for name in values:
        if not quantifier(name in c.defaults for c in chapters):
            lacking = [c for c in chapters if name not in c.defaults]
            allowed = "\n".join(f"  {c.slug}: {', '.join(c.defaults)}" for c in lacking)
            raise ValueError(f"{where}: parameter={name!r} is not one that these chapters have; allowed:\n{allowed}")


# --- validity -------------------------------------------------------------------------------------------------------


def fingerprint(job: Job) -> dict[str, str]:
    """What the executed copy of `job` follows from: the notebook, its parameters, the machinery; a hash of each."""
    notebook = nbformat.read(job.chapter.path, as_version=4)
    cells = [(c.cell_type, c.source, _lasting(c.metadata)) for c in notebook.cells]
    return {
        "notebook": _digest(cells),
        "parameters": _digest([job.parameters, _files_named(job.parameters)]),
        **{part: _digest_files(job.layout.root / part) for part in MACHINERY},
    }


def stale(job: Job) -> list[str]:
    """Why `job` must run: what changed since its executed copy was made, or is missing. Empty when it is valid."""
    try:
        stamp = json.loads(job.stamp.read_text(encoding="utf-8"))
        then, records = stamp["made_from"], stamp["results"]
    except (OSError, ValueError, KeyError):
        return ["not run yet"]
    if not job.executed.is_file():
        return ["executed copy missing"]
    if not job.results.is_file():
        return ["results missing"]
    changed = [part for part, digest in fingerprint(job).items() if then.get(part) != digest]
    # A chapter run by hand in Jupyter writes to the same place: its records are not this copy's.
    return changed + ([] if records == _digest_files(job.results) else ["results rewritten since"])


def _lasting(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Cell metadata without what executing a cell leaves there."""
    return {k: v for k, v in metadata.items() if k not in ("execution", "papermill", "ExecuteTime", "collapsed")}


def _files_named(parameters: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Size and time of the files that an input such as `corpus` or `teacher` names: editing one is a change too."""
    named = [Path(v).expanduser() for k, v in parameters.items() if k in INPUTS and isinstance(v, str) and v]
    found = [file for path in named for file in [path, *path.rglob("*")] if file.is_file()]
    return sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in found)


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def _digest_files(path: Path) -> str:
    files = sorted(p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file())
    kept = [p for p in files if "__pycache__" not in p.parts and not p.name.startswith(".")]
    return _digest([(p.relative_to(path).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in kept])


# --- running --------------------------------------------------------------------------------------------------------


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
            console.print(f"[{i + 1}/{len(jobs)}] {name}: {job.chapter.title} ({', '.join(why)}; {left})", markup=False)
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
    with _environment(RANK1_PROFILE=job.profile, TQDM_DISABLE="1", HF_HUB_DISABLE_PROGRESS_BARS="1"):
        _papermill(job, partial, console)
    if not job.results.is_file():
        raise ChapterFailed(f"{job.chapter.slug}: it ended, but wrote no records to {job.results}; copy: {partial}")
    os.replace(partial, job.executed)
    seconds = time.perf_counter() - started
    stamp = {
        "made_from": made_from,
        "parameters": job.parameters,
        "executed": datetime.now().isoformat(sep=" ", timespec="minutes"),
        "seconds": round(seconds, 1),
        "results": _digest_files(job.results),
    }
    unfinished = job.stamp.with_suffix(".tmp")
    unfinished.write_text(json.dumps(stamp, indent=1, default=str) + "\n", encoding="utf-8")
    os.replace(unfinished, job.stamp)
    return seconds


def _papermill(job: Job, partial: Path, console: Console) -> None:
    where = f"{job.chapter.slug}: {{}}\n  partial notebook: {partial}"
    manager = AsyncKernelManager(kernel_spec_manager=_ThisInterpreter())
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

    def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
        quiet = ["--log-level=ERROR"]  # else each kernel warns that loopback is not encrypted
        command = make_ipkernel_cmd(executable=sys.executable, extra_arguments=quiet)
        return KernelSpec(argv=command, display_name="book", language="python")


@contextmanager
def _progress(job: Job, console: Console) -> Iterator[Callable[..., None]]:
    """A bar over the cells on a terminal, else a line now and then; yields papermill's `on_cell_start`."""
    total = sum(c.cell_type == "code" for c in nbformat.read(job.chapter.path, as_version=4).cells) + bool(job.given)
    columns = (TextColumn("      {task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    begun, line, started, ended = 0, "", time.monotonic(), Event()

    def log_now_and_then() -> None:
        while not ended.wait(LOG_EVERY):
            seconds = time.monotonic() - started
            console.print(f"      {seconds:.0f} s, in code cell {begun} of {total}: {line}", markup=False)

    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=total)

        def on_cell_start(cell: Any, cell_index: int) -> None:
            nonlocal begun, line
            if cell.cell_type == "code":
                line = (cell.source.strip().splitlines() or [""])[0][:60]
                bar.update(task, completed=begun, description=escape(line))
                begun += 1

        if not console.is_terminal:
            Thread(target=log_now_and_then, daemon=True).start()
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


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value
