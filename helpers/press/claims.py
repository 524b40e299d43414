"""Records what a chapter measured and judges it by the register's rule (`helpers.press.rules`).

A chapter hands over numbers; verdicts are always computed here:

    log = claims.Chapter.of("01_topk_sae_is_rank1_moe", globals())
    log.record("duality.forward", error, variant="float64", n=4096, scope="paper setting")
    log.save()
"""

from __future__ import annotations

import ast
import json
import math
import platform
import re
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from types import EllipsisType
from typing import Any, get_args

from pydantic import BaseModel

from helpers import settings
from helpers.press.rules import BETWEEN, Bound, Claim, Identity, IntervalAbove, Register, register, validated
from helpers.press.verdicts import LONGEST_NOTE, Control, Counted, Record, Resampled, Scope
from helpers.settings import allowed, one_of

__all__ = ["Chapter", "IntervalAbove", "Record", "Results", "reference", "register"]

REFERENCE = settings.ROOT / "results"
"""Results of long runs, kept in the repository; what a reader's own run writes goes to `_build/results/<profile>`."""


# -- a chapter's records -----------------------------------------------------------------------------------------------


class Chapter:
    """Collects a chapter's records and writes them to `<results_dir>/<slug>.json`.

    `parameters` are those of the notebook's parameters cell, `teacher` the model its records are about (None where
    there is none), `results_dir` None means `settings.results_dir()`. `seconds` counts from the construction.
    """

    def __init__(
        self,
        slug: str,
        parameters: Mapping[str, Any],
        teacher: str | None = None,
        results_dir: str | Path | None = None,
    ) -> None:
        allowed(bool(re.fullmatch(r"\d\d_[a-z0-9_]+", slug)), f"slug={slug!r}", "a file stem such as '01_topk_sae'")
        self.slug, self.parameters, self.teacher = slug, dict(parameters), teacher
        self.path = settings.results_dir(results_dir) / f"{slug}.json"
        self.environment = environment(self.parameters.get("device", "auto"))
        self.records: list[Record] = []
        self.controls: list[Control] = []
        self.points: dict[str, list[dict[str, Any]]] = {}
        """Points of the chapter's curves by name, kept in its results file so that a longer run can be drawn beside."""
        self._started = time.perf_counter()

    @classmethod
    def of(cls, slug: str, namespace: Mapping[str, Any], **options: Any) -> Chapter:
        """The chapter of a notebook, with every parameter of its parameters cell as it stands in `namespace`.

        A chapter calls it with its `globals()`. Teacher and results_dir are the parameters of these names, unless
        given. Raises `ValueError` where the notebook has no parameters cell, or the namespace lacks a parameter, and
        for sizes that no training can have, before anything is harvested for it.
        """
        names = parameters(settings.ROOT / "notebooks" / f"{slug}.ipynb")
        missing = [name for name in names if name not in namespace]
        allowed(not missing, f"{slug}: the namespace has no {', '.join(missing)}", "the chapter's own globals()")
        given = {name: namespace[name] for name in names}
        for name in (each for each in ("steps", "batch_size", "n_features") if each in given):
            allowed(given[name] >= 1, f"{name}={given[name]}", "at least 1")
        most = given.get("n_features", math.inf)
        for k in (*([given["k"]] if "k" in given else []), *given.get("ks", [])):
            allowed(1 <= k <= most, f"k={k}", f"1 to n_features={most}")
        options = {name: given.get(name) for name in ("teacher", "results_dir")} | options
        return cls(slug, given, **options)

    whose = "your run"
    """Who made the numbers, as figures say it."""

    @property
    def leading(self) -> Chapter | Results:
        """The run that the figures show: the book's kept one, unless this is a run of the reader's own choice."""
        kept = reference(self.slug)
        return kept if kept and settings.profile() == "quick" else self

    @property
    def cells(self) -> Path | None:
        """Where a long run keeps each finished cell of a study, as files that go with the book; else None."""
        long = re.fullmatch(r"long(-\w+)?", settings.profile())
        return REFERENCE / "cells" / (self.slug + (long[1] or "")) if long else None

    def record(
        self,
        claim: str,
        value: Any,
        *,
        scope: Scope,
        n: Counted | None = None,
        ci: Sequence[float] | None = None,
        resampled: Resampled | None = None,
        variant: str | None = None,
        metric: str | None = None,
        teacher: str | EllipsisType | None = ...,
        note: str = "",
    ) -> Record:
        """Judges a number by the register's rule and keeps it.

        `value` is a number, or a comparison that has `value`, `ci`, `n` and `resampled`; what is given beside it wins.
        `variant` names the check (it may be left out where a claim has one); `metric` is added to the register's
        wording to tell several records of one check apart ("k = 8"). `n` counts what the number rests on: with
        an interval `ci` the units that were `resampled`, of each kind where two were. `teacher` is the chapter's
        unless given: None for random or synthetic inputs. Raises `ValueError` for what cannot be judged, such as an
        unknown claim, an interval that does not hold the value, or `scope="paper setting"` with a teacher that is not
        the paper's.
        """
        entry, teacher = register()[claim], self.teacher if teacher is ... else teacher
        check = _variant(entry, variant)
        value, ci, n, resampled = _measured(value, ci, n, resampled)
        allowed(len(note) <= LONGEST_NOTE, f"note={note[:40]!r}… has {len(note):,} characters", f"up to {LONGEST_NOTE}")
        _check_scope(entry, scope, teacher)
        _can_be_judged(entry, check, value, ci, n)
        asked = entry.checks[check]
        about = {"claim": claim, "metric": asked.metric + (BETWEEN + metric if metric else ""), "unit": asked.unit}
        about |= {"value": value, "ci": ci, "n": n, "resampled": resampled, "scope": scope, "teacher": teacher}
        about |= {"note": note, "jackknife": getattr(ci, "jackknife", None)}
        result = Record(**about, expected="", verdict="not tested").judged(asked.rule)
        if result not in self.records:  # a cell that is run again says the same thing twice
            self.records.append(result)
        return result

    def control(
        self,
        claim: str,
        variant: str | None,
        value: Any,
        *,
        ci: Sequence[float] | None = None,
        n: Counted | None = None,
        resampled: Resampled | None = None,
    ) -> Control:
        """Keeps what a check's quantity is where the claim is false by construction, judged by the same rule.

        The code is that of the record; the arguments are those of `record`, and `value` may be a list of comparisons
        of data that were relabelled at random. Raises `ValueError` also where the register does not say what the
        check's control is.
        """
        entry = register()[claim]
        check = _variant(entry, variant)
        allowed(bool(entry.checks[check].control), f"{claim}/{check} has no `control`", "a check that says what it is")
        several = isinstance(value, list)
        given = value if several else [value]
        found = sorted((_measured(each, ci, n, resampled) for each in given), key=lambda each: each[0])
        for each in found:
            _can_be_judged(entry, check, *each[:3])
        value, ci, n, resampled = found[len(found) // 2]
        draws = [(each, *interval) for each, interval, *_ in found] if several else []
        about = {"claim": claim, "check": check, "value": value, "ci": ci, "n": n, "resampled": resampled}
        result = Control(**about, draws=draws, rejected=True).judged(entry.checks[check])
        if result not in self.controls:
            self.controls.append(result)
        return result

    def save(self) -> Chapter:
        """Writes the results file (atomically) and returns the chapter, so that a last line shows its verdicts.

        Raises `ValueError` for points that are no lists of mappings, which nothing could read again.
        """
        content = {
            "chapter": self.slug,
            "profile": settings.profile(),
            "parameters": self.parameters,
            "environment": self.environment,
            "seconds": round(time.perf_counter() - self._started, 2),
            "records": [each.model_dump(exclude=set() if each.jackknife else {"jackknife"}) for each in self.records],
            **({"controls": [control.model_dump() for control in self.controls]} if self.controls else {}),
            **({"points": self.points} if self.points else {}),
        }
        validated(Results, content, self.path.name)
        settings.write_json(self.path, content)
        return self

    def __str__(self) -> str:
        return "\n".join([f"{self.slug}: {len(self.records)} records", *map(str, self.records)])

    __repr__ = __str__

    def _repr_html_(self) -> str:
        return "".join(record._repr_html_() for record in self.records) or "<em>This chapter tests no claim.</em>"


def cells(notebook: Path) -> list[dict[str, Any]]:
    """The cells of a notebook, each with its source as one text; `ValueError` naming a file that is not one."""
    try:
        found = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        whole = {"cell_type": "", "metadata": {}}
        return [whole | cell | {"source": "".join(cell["source"])} for cell in found]
    except FileNotFoundError as error:
        raise ValueError(f"{notebook.name} is not in {notebook.parent.name}; allowed: a chapter of the book") from error
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ValueError(f"{notebook.name} cannot be read ({why}); allowed: a notebook of format 4") from error


def parameters(notebook: Path) -> dict[str, Any]:
    """Names and defaults in the parameters cell of a notebook; `ValueError` where there is no such notebook or cell.

    Only constants are allowed there, since papermill does not recompute derived values.
    """
    code = [cell for cell in cells(notebook) if cell["cell_type"] == "code"]
    tagged = [cell for cell in code if "parameters" in cell["metadata"].get("tags", [])]
    allowed(len(tagged) == 1, f"{notebook.name}: {len(tagged)} code cells are tagged 'parameters'", "exactly one")
    source, found = tagged[0]["source"], {}
    try:
        body = settings.parsed(source).body
    except SyntaxError as error:
        where = f"{notebook.name}: line {error.lineno} of the parameters cell: {error.msg}"
        raise ValueError(f"{where}; allowed: constants") from None
    for node in body:
        target = node.targets[0] if isinstance(node, ast.Assign) else getattr(node, "target", None)
        try:
            found[target.id] = ast.literal_eval(node.value)
        except (AttributeError, ValueError, TypeError):
            line = ast.get_source_segment(source, node)
            raise ValueError(f"{notebook.name}: the parameters cell holds constants only, not {line!r}") from None
    return found


def _variant(claim: Claim, variant: str | None) -> str:
    if variant is None and len(claim.checks) == 1:
        return next(iter(claim.checks))
    one_of(f"{claim.id}: variant", variant, claim.checks)
    return variant


def _check_scope(claim: Claim, scope: Scope, teacher: str | None) -> None:
    one_of("scope", scope, get_args(Scope))
    if scope == "paper setting" and claim.teachers != "any":
        theirs = ", ".join(claim.teachers) or "none, the setting is not public"
        allowed(teacher in claim.teachers, f"scope='paper setting' for {claim.id} with teacher={teacher!r}", theirs)


def _measured(value: Any, ci: Any, n: Any, resampled: Any) -> tuple[float, tuple[float, float] | None, Counted, Any]:
    """Value, interval, n and what was resampled: as given, else as the comparison `value` has them."""
    if hasattr(value, "value") and hasattr(value, "ci"):
        comparison, value = value, value.value
        if ci is None and comparison.ci is not None:
            ci, resampled = comparison.ci, resampled or comparison.resampled
        n = comparison.n if n is None else n
    value, n = _finite("value", value), _counted(n)
    if ci is None:
        allowed(resampled is None, f"resampled={resampled!r} without an interval", "give ci=(low, high)")
        return value, None, n, None
    one_of("resampled", resampled, get_args(Resampled))
    both = " × " in resampled
    allowed(isinstance(n, tuple) == both, f"n={n} of resampled={resampled!r}", "a pair" if both else "one number")
    allowed(len(ci) == 2, f"ci={ci!r} is not a pair", "(low, high)")
    low, high = _finite("ci low", ci[0]), _finite("ci high", ci[1])
    slack = 1e-9 * max(abs(low), abs(high))  # percentiles of equal numbers differ from their mean by rounding
    inside = low - slack <= value <= high + slack
    allowed(inside, f"ci=({low}, {high}) does not hold value={value}", "low ≤ value ≤ high")
    return value, ci if hasattr(ci, "jackknife") else (low, high), n, resampled


def _counted(n: Any) -> Counted:
    numbers = tuple(n) if isinstance(n, Sequence) else (n,)
    whole = all(each is not None and int(each) == each and each >= 1 for each in numbers)
    allowed(whole, f"n={n}", "a positive whole number, or one of each kind of unit")
    return tuple(map(int, numbers)) if isinstance(n, Sequence) else int(n)


def _finite(what: str, value: float) -> float:
    allowed(math.isfinite(number := float(value)), f"{what}={number}", "a finite number")
    return number


def _can_be_judged(claim: Claim, check: str, value: float, ci: tuple[float, float] | None, n: Counted) -> None:
    rule, where = claim.checks[check].rule, f"{claim.id}/{check}"
    _counted(n)
    if rule.needs_interval and ci is None:
        raise ValueError(f"{where}: the rule {rule.name} needs ci=(low, high) and resampled=…")
    if isinstance(rule, Bound) and rule.value == "violations" and (value < 0 or value != int(value) or value > n):
        raise ValueError(f"{where}: value={value} is not a count of violations among n={n} samples")
    if isinstance(rule, Identity) and value < 0:
        raise ValueError(f"{where}: value={value} is not a largest difference; give its absolute value")


def environment(device: str = "auto") -> dict[str, Any]:
    """What a run depended on; `commit` is None outside git and ends in `-dirty` with uncommitted changes to other
    files than runs write."""
    import torch  # takes a second, which the command line does without

    chosen = settings.device(str(device))
    on_gpu = chosen.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "device": f"{chosen} ({torch.cuda.get_device_name(chosen)})" if on_gpu else str(chosen),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _commit() -> str | None:
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != settings.ROOT:
            return None  # unpacked inside somebody else's repository
        changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!results/cells")
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(settings.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


# -- reading them again ------------------------------------------------------------------------------------------------


class Results(BaseModel):
    """A results file. Further keys are allowed: reference files also carry the points of their curves."""

    chapter: str
    profile: str
    parameters: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    records: list[Record]
    controls: list[Control] = []
    points: dict[str, list[dict[str, Any]]] = {}

    @property
    def whose(self) -> str:
        """Who made the numbers, as figures say it."""
        return "the book's run" + (f", {self.parameters['teacher']}" if self.profile.endswith("smollm2") else "")


def read_json(path: Path, cure: str) -> Any:
    """The content of a JSON file; `ValueError` naming one that is damaged, with what to do about it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}); {cure}") from error


def reference(slug: str, folder: Path = REFERENCE) -> Results | None:
    """The longer run of a chapter that is kept in the repository, or None: its `points` stand beside the chapter's own.

    Raises `ValueError` for a damaged file, naming it.
    """
    path = Path(folder) / f"{slug}.json"
    if not path.is_file():
        return None
    return validated(Results, read_json(path, "restore it from the repository"), path.name)


def load_results(folder: Path, book: Register | None = None) -> list[tuple[Results, list[Record]]]:
    """Every results file of a folder with its records, judged again by the register as it stands now.

    Raises `ValueError` naming the file for damaged files and for records whose claim or metric the register no
    longer has. JSON files that hold no `records` (curves, grids) are passed over.
    """
    book, found = book or register(), []
    for path in sorted(Path(folder).glob("*.json")):
        content = read_json(path, "delete it and run its chapter again")
        if isinstance(content, dict) and "records" in content:
            results = validated(Results, content, path.name)
            results.controls = [_control_again(control, book, path.name) for control in results.controls]
            found.append((results, [_judged_again(row, book, path.name) for row in results.records]))
    return found


def passing_controls(folder: Path, book: Register | None = None) -> Iterator[str]:
    """Recorded controls that their rule does not reject: it could not have told the claim from its opposite."""
    for run, _ in load_results(folder, book):
        for control in run.controls:
            if not control.rejected:
                where = f"{control.claim}/{control.check}"
                yield f"{run.chapter}: the control of {where} passes with {control.measured()}"


def _control_again(control: Control, book: Register, name: str) -> Control:
    asked = next((claim.checks.get(control.check) for claim in book.claims if claim.id == control.claim), None)
    there = f"{name} is stale: control of {control.claim}/{control.check}"
    allowed(asked is not None, there, "a check of the register: run its chapter again or delete it")
    return control.judged(asked)


def _judged_again(row: Record, book: Register, name: str) -> Record:
    try:
        claim = book[row.claim]
        check = claim.check_of(row.metric)
        metrics = ", ".join(each.metric for each in claim.checks.values())
        allowed(check is not None, f"metric {row.metric!r} is not one of {row.claim}", metrics)
        _can_be_judged(claim, check, row.value, row.ci, row.n)
    except ValueError as error:
        raise ValueError(f"{name} is stale: run its chapter again or delete it ({error})") from error
    return row.judged(claim.checks[check].rule)
