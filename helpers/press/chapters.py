"""Find the chapters, settle their parameters, and say which are no longer valid, and why."""

from __future__ import annotations

import ast
import errno
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from helpers import settings
from helpers.press import claims, rules
from helpers.settings import allowed, one_of

INPUTS = ("teacher", "corpus", "checkpoint", "sae")
TEXT_FILE = re.compile(r"(?i)[^.].*\.(txt|jsonl|json|csv|parquet)(\.gz|\.zst)?")
"""Parameters that may name a file or folder of the reader's."""
NO_PATH = re.compile(r"book|.+:.+")
"""What a parameter `sae` may be beside a path: the book's own, or release:sae_id."""
FOLDERS = ("cache_dir", "results_dir")
"""Parameters that name a folder to write to, where they are not null."""
FILLED = ("dims", "layers", "lrs", "seeds", "sites")
"""Lists that every chapter which has them goes through: an empty one leaves nothing to measure."""


@dataclass(frozen=True)
class Chapter:
    """One notebook: `notebooks/NN_slug.ipynb`, with its cells and the defaults of the one tagged `parameters`."""

    path: Path
    title: str
    defaults: dict[str, Any]
    cells: list[dict[str, Any]] = field(repr=False)

    @property
    def slug(self) -> str:
        return self.path.stem

    @property
    def number(self) -> int:
        return int(self.slug[:2])


@dataclass(frozen=True)
class Job:
    """A chapter of the book in `root`, to run with the parameters `given` in place of the notebook's own `defaults`."""

    chapter: Chapter
    profile: str
    given: dict[str, Any]
    root: Path

    @property
    def parameters(self) -> dict[str, Any]:
        """Every parameter, as the notebook will see it."""
        return self.chapter.defaults | self.given

    @property
    def executed(self) -> Path:
        """The executed copy."""
        return self.root / "_build" / "executed" / self.profile / f"{self.chapter.slug}.ipynb"

    @property
    def results(self) -> Path:
        """The records the chapter writes."""
        folder = self.parameters.get("results_dir") or self.root / "_build" / "results" / self.profile
        return settings.place("results_dir", folder) / f"{self.chapter.slug}.json"

    @property
    def stamp(self) -> Path:
        """What the executed copy was made from."""
        return self.executed.with_suffix(".run.json")


# -- finding -----------------------------------------------------------------------------------------------------------


def find(root: Path = settings.ROOT) -> list[Chapter]:
    """All chapters, in order of their number. Raises `ValueError` where a notebook has no usable parameters cell."""
    paths = sorted((root / "notebooks").glob("[0-9][0-9]_*.ipynb"))
    found = []
    for path in paths:
        cells = claims.cells(path)
        prose = "\n".join(cell["source"] for cell in cells if cell["cell_type"] == "markdown")
        heading = re.search(r"^# (.+)$", prose, re.M)
        title = heading[1].strip() if heading else path.stem
        found.append(Chapter(path, title, claims.parameters(path), cells))
    return found


def choose(names: Sequence[str], chapters: Sequence[Chapter]) -> list[Chapter]:
    """The chapters called `names` (number or slug; none means all), in the book's order."""
    known = {key: c for c in chapters for key in (c.slug, str(c.number), f"{c.number:02d}")}
    for name in names:
        if name not in known:
            listed = "\n".join(f"  {c.number}  {c.slug}" for c in chapters)
            raise ValueError(f"chapter={name!r} is not in the book; allowed (number or slug):\n{listed}")
    wanted = {known[name].slug for name in names}
    return [c for c in chapters if not names or c.slug in wanted]


# -- parameters --------------------------------------------------------------------------------------------------------


def parse_value(name: str, text: str) -> Any:
    """A value given on the command line, read as YAML (`[0, 1]`, `1e-3`, `null`); `None` is null too."""
    shown = f"-p: {name}={text[:60]!r}"
    return None if text == "None" else rules.read_yaml(text, shown, "allowed: such as 3, [0, 1] or null")


def fitted(where: str, name: str, value: Any, default: Any) -> Any:
    """`value` for a parameter whose default is `default`, as its type: `1e4` is taken for a whole number, and kept so.

    A list's elements have the type of one of the default's elements, a mapping's values that of its value under the
    same name, or of any. None as a default takes everything, but a folder is a text. Raises `ValueError` saying what is
    allowed.
    """
    such = f"such as {default!r} (the default)"
    allowed(value != [] or name not in FILLED, f"{where}: {name}=[]", f"at least one, {such}")
    try:
        return _as(value, "" if name in FOLDERS and value is not None else default)
    except TypeError as error:
        raise ValueError(f"{where}: {name}={value!r}; allowed: {error}, {such}") from None


def _as(value: Any, default: Any) -> Any:
    """`value` as the type of `default`; `TypeError` that says what was wanted."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    match default:
        case None:
            return value
        case bool():
            return _if(isinstance(value, bool), value, "true or false")
        case int():
            whole = number and math.isfinite(value) and value == int(value)
            return int(_if(whole, value, "a whole number"))
        case float():
            return float(_if(number and math.isfinite(value), value, "a finite number"))
        case str():
            return _if(isinstance(value, str), value, "a text")
        case dict():
            _if(isinstance(value, dict), value, "a mapping")
            models = {key: [default[key]] if key in default else list(default.values()) for key in value}
            return {key: _as_one_of(each, models[key]) for key, each in value.items()}
    return type(default)(_as_one_of(each, default) for each in _if(isinstance(value, list | tuple), value, "a list"))


def _if(good: bool, value: Any, wanted: str) -> Any:
    if not good:
        raise TypeError(wanted)
    return value


def _as_one_of(value: Any, models: Sequence[Any]) -> Any:
    """`value` as the type of the first of `models` that it fits; one of them that is equal in type comes first."""
    wanted = []
    for model in sorted(models, key=lambda model: type(model) is not type(value)):
        if model is None and value is not None and len(models) > 1:
            continue  # null beside others allows null, and nothing else
        try:
            return _as(value, model)
        except TypeError as error:
            wanted.append(f"{error}")
    return _if(not wanted, value, " or ".join(dict.fromkeys(f"in it {each}" for each in wanted)))


def read_profile(name: str, chapters: Sequence[Chapter], root: Path = settings.ROOT) -> dict[str, dict[str, Any]]:
    """Parameters of profile `name` by slug, the ones under `common:` given to every chapter that has them.

    Raises `ValueError` for a file that is no YAML mapping, and for a profile, chapter or parameter that is not there.
    """
    path = root / "profiles" / f"{name}.yml"
    there = sorted(p.stem for p in path.parent.glob("*.yml"))
    allowed(name in there, f"profile={name!r} does not exist", ", ".join(there))
    entries = rules.read_yaml(path, path.name, "allowed: names with their values") or {}
    by_slug = {c.slug: c for c in chapters}
    for entry, values in entries.items() if isinstance(entries, dict) else [("the file", entries)]:
        allowed(isinstance(values, dict | None), f"{path.name}: {entry} is {values!r}", "names with their values")
        if entry != "common":
            one_of(f"{path.name}: chapter", entry, by_slug)
    common = entries.pop("common", None) or {}
    _check_names(common, chapters, f"{path.name}, common", everywhere=False)
    found = {}
    for slug, chapter in by_slug.items():
        own = entries.get(slug) or {}
        _check_names(own, [chapter], f"{path.name}, {slug}")
        given = {key: value for key, value in common.items() if key in chapter.defaults} | own
        found[slug] = {k: fitted(f"{path.name}, {slug}", k, v, chapter.defaults[k]) for k, v in given.items()}
    return found


def side_by_side(asked: int | None, book: bool) -> int:
    """Chapters at once: two of the `book` in its quick sizes, since small models do not fill two cores and two kernels
    take some 6 GB; one where a profile or a parameter may ask for many times that."""
    allowed(asked is None or asked > 0, f"jobs={asked}", "a whole number, at least 1")
    return asked or (min(settings.cores(), 2) if book else 1)


def plan(
    names: Sequence[str] = (),
    profile: str = "quick",
    overrides: Mapping[str, Any] | None = None,
    root: Path = settings.ROOT,
) -> list[Job]:
    """The jobs of the chapters called `names` under `profile`, everything checked before anything runs.

    `overrides` win over the profile. Their copies and records go to `<profile>+custom`, so that the book is never
    built from them. A chapter that is named must have every parameter given; with no chapter named, a parameter goes
    to all chapters that have it. Raises `ValueError` naming what is unknown or of another type, and what is allowed.
    """
    overrides, every = dict(overrides or {}), find(root)
    chapters = choose(names, every)
    entries = read_profile(profile, every, root)
    _check_names(overrides, chapters, "-p", everywhere=bool(names))
    folder, jobs = f"{profile}+custom" if overrides else profile, []
    for chapter in chapters:
        own = {k: v for k, v in overrides.items() if k in chapter.defaults}
        own = {k: fitted("-p", k, v, chapter.defaults[k]) for k, v in own.items()}
        jobs.append(Job(chapter, folder, entries[chapter.slug] | own, root))
        _check_given(jobs[-1].given)
    return jobs


def make_ready(jobs: Sequence[Job]) -> None:
    """Read the register and make the folders that are written to; `ValueError` naming what cannot be used."""
    allowed(bool(jobs), "no chapter is in notebooks/", "a copy of the repository")
    rules.register(jobs[0].root / "book" / "claims.yml")
    for job in jobs:
        if "cache_dir" in job.parameters:
            settings.cache_dir(job.parameters["cache_dir"] or None)
        settings.made("results_dir", job.results.parent, to_write=True)
        settings.made("_build", job.executed.parent, to_write=True)


def _check_given(values: Mapping[str, Any]) -> None:
    """A device must be the name of one; an input that is given as a path must be there, and be the reader's to read."""
    if "device" in values:
        settings.check_device(values["device"])
    for name in INPUTS:
        if isinstance(value := values.get(name), str):
            before = value.rpartition(":")[0]  # what follows a colon may say how a file is read
            path = settings.place(name, before if before and os.path.exists(os.path.expanduser(before)) else value)
            try:
                path.stat()
                why = None if os.access(path, os.R_OK) else "you may not read it"
                if name == "corpus" and not why and path.is_dir() and value not in ("wikipedia-sample", "book-texts"):
                    found = any(TEXT_FILE.fullmatch(each.name) and each.is_file() for each in path.rglob("*"))
                    why = None if found else "no .txt, .jsonl, .json, .csv or .parquet file is in this folder"
            except OSError as error:
                other = error.errno in (errno.ENOENT, errno.ENOTDIR) and not value.startswith(("/", "./", "../", "~"))
                other = other and (name != "sae" or NO_PATH.fullmatch(value))
                why = None if other else error.strerror  # a name that is no path is one of the hub, or of the book
            allowed(why is None, f"{name}={value!r}: {why}", "a file or folder that you can read, or a name")


def _check_names(values: Mapping[str, Any], chapters: Sequence[Chapter], where: str, everywhere: bool = True) -> None:
    quantifier = all if everywhere else any
    for name in values:
        if not quantifier(name in c.defaults for c in chapters):
            lacking = [c for c in chapters if name not in c.defaults]
            there = "\n".join(f"  {c.slug}: {', '.join(c.defaults)}" for c in lacking)
            raise ValueError(f"{where}: parameter={name!r} is not one that these chapters have; allowed:\n{there}")


# -- validity ----------------------------------------------------------------------------------------------------------


def fingerprint(job: Job) -> dict[str, str]:
    """What the executed copy of `job` follows from, part by part, with a hash of each.

    The notebook, and its code alone; its parameters; the modules that its cells import, directly or not, as syntax
    trees (so `press.figures` is a part of every chapter that draws, and its kept results stay); the register's entries
    that `entries` names; `data/` where one of the modules reads it; and the pins.
    """
    from helpers import kept  # brings torch, which settling parameters does without

    root, cells = job.root, job.chapter.cells
    coded = [c for c in cells if c["cell_type"] == "code"]
    code = "\n".join(re.sub(r"^\s*[%!].*", "", c["source"], flags=re.M) for c in coded)
    modules = kept.closure(*kept.imports_in(_parsed(code)), root=root)
    trees = {module: kept.tree_of(module, root) for module in modules}
    found = {
        "notebook": digest([(c["cell_type"], c["source"], _lasting(c["metadata"])) for c in cells]),
        "code": digest([(c["source"], "parameters" in c["metadata"].get("tags", [])) for c in coded]),
        "parameters": digest([job.parameters, _files_named(job.parameters)]),
        "requirements.txt": digest_files(root / "requirements.txt"),
        **{module: digest(tree) for module, tree in trees.items()},
        **entries(job),
    }
    if any("ROOT" in tree and re.search(r"Constant\(value='data['/]", tree) for tree in trees.values()):
        found["data"] = digest_files(root / "data")
    return found


def entries(job: Job) -> dict[str, str]:
    """The register's entries a chapter depends on: those that say so, that it names, or that its last run recorded."""
    texts = [path.read_text(encoding="utf-8") for path in (job.chapter.path, job.results) if path.is_file()]
    register = rules.register(job.root / "book" / "claims.yml")
    return {
        f"claim {claim.id}": digest(claim.model_dump(exclude_defaults=True))
        for claim in register.claims
        if claim.chapter == job.chapter.slug or any(claim.id in text for text in texts)
    }


def stale(job: Job) -> list[str]:
    """Why `job` must run: what changed since its executed copy was made, or is missing. Empty when it is valid."""
    try:
        stamp = json.loads(job.stamp.read_text(encoding="utf-8"))
        then, records, copy, _ = dict(stamp["made_from"]), stamp["results"], stamp["copy"], stamp["executed"]
    except (OSError, ValueError, KeyError, TypeError):
        return ["not run yet"]
    if not job.executed.is_file():
        return ["executed copy missing"]
    if not job.results.is_file():
        return ["results missing"]
    now = fingerprint(job)
    changed = [
        f"{part} {'gone' if part not in now else 'changed' if part in then else 'new'}"
        for part in now | then
        if then.get(part) != now.get(part)
    ]
    # A chapter run by hand in Jupyter writes to the same place: its records are not this copy's.
    changed += [] if copy == digest_files(job.executed) else ["executed copy changed since"]
    return changed + ([] if records == digest_files(job.results) else ["results rewritten since"])


def shortened(reasons: Sequence[str], most: int = 3) -> str:
    """The first few reasons, and how many more there are."""
    more = f" and {len(reasons) - most} more" if len(reasons) > most else ""
    return ", ".join(reasons[:most]) + more


def _parsed(code: str) -> ast.AST:
    try:
        return settings.parsed(code)
    except SyntaxError:
        return ast.Module([], [])  # running it will say so, with the cell


def _lasting(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Cell metadata without what executing a cell leaves there."""
    return {k: v for k, v in metadata.items() if k not in ("execution", "papermill", "ExecuteTime", "collapsed")}


def _files_named(parameters: Mapping[str, Any]) -> list[tuple[str, int, int]]:
    """Size and time of the files that an input such as `corpus` or `teacher` names: editing one is a change too."""
    values = [v for k, v in parameters.items() if k in INPUTS and isinstance(v, str)]
    names = {name for v in values for name in (v, v.rpartition(":")[0]) if name}  # as in my.txt:lines
    named = [Path(name).expanduser() for name in names]
    return _states(file for path in named for file in [path, *path.rglob("*")] if file.is_file())


def _states(files: Iterable[Path]) -> list[tuple[str, int, int]]:
    return sorted((str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files)


def digest(value: Any) -> str:
    """Hash of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def digest_files(path: Path) -> str:
    """Hash of a file, or of all files of a folder; byte code and hidden files do not count."""
    files = [p for p in ([path] if path.is_file() else path.rglob("*")) if p.is_file()]
    counted = [p for p in files if "__pycache__" not in p.parts and not p.name.startswith(".")]
    return _digest_states(path, tuple(_states(counted)))


@cache  # chapters share `data`, which is large
def _digest_states(path: Path, states: tuple[tuple[str, int, int], ...]) -> str:
    files = [Path(name) for name, _, _ in states]
    return digest([(p.relative_to(path).as_posix(), hashlib.sha256(p.read_bytes()).hexdigest()) for p in files])
