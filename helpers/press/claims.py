"""Records what a chapter measured and judges it by the register's rule.

The register is `book/claims.yml`: every claim the book tests, where a paper makes it, and for each quantity that
tests it (a *check*) one of four rules. A chapter hands over numbers; verdicts are always computed here:

    log = claims.Chapter("01_topk_sae_is_rank1_moe", parameters={...}, teacher="gemma-3-270m")
    log.record("duality.forward", error, variant="float64", n=4096, scope="paper setting")
    log.save()
"""

from __future__ import annotations

import ast
import html
import json
import math
import platform
import re
import subprocess
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import EllipsisType
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from helpers import settings

REGISTER = settings.ROOT / "book" / "claims.yml"
REFERENCE = settings.ROOT / "results"
"""Results of long runs, kept in the repository; what a reader's own run writes goes to `_build/results/<profile>`."""

Outcome = Literal["holds", "straddles", "fails"]
Verdict = Literal["reproduced", "holds here", "partly", "not reproduced", "not tested"]
Scope = Literal["paper setting", "analogue"]
Resampled = Literal["seeds", "articles", "seed × article", "random draws", "layers", "samples"]
SLUG = re.compile(r"\d\d_[a-z0-9_]+")
LONGEST_NOTE = 300
"""Characters of a record's note: it is a line on the page of claims."""
BETWEEN = " · "
"""Stands between the register's metric and what a chapter adds to tell two records of one check apart."""


# ---------------------------------------------------------------------------------------------------------- rules
class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(_Strict):
    """The value is a largest difference; it holds when that is at most `tolerance`."""

    name: Literal["identity"] = "identity"
    tolerance: float = Field(gt=0)
    needs_interval: ClassVar[bool] = False

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if abs(value) <= self.tolerance else "fails"

    def __str__(self) -> str:
        return f"≤ {self.tolerance:g}"


class Bound(_Strict):
    """A bound that must hold on every sample. The value is a count of `violations`, or the worst `margin`
    (bound minus measurement: negative is a violation). One violation refutes; there is no "partly"."""

    name: Literal["bound_holds"] = "bound_holds"
    value: Literal["violations", "margin"] = "violations"
    needs_interval: ClassVar[bool] = False

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if (value == 0 if self.value == "violations" else value >= 0) else "fails"

    def __str__(self) -> str:
        return "no violation" if self.value == "violations" else "worst margin ≥ 0"


class IntervalAbove(_Strict):
    """The whole interval lies above `value`; entirely at or below it fails; across it straddles."""

    name: Literal["interval_above"] = "interval_above"
    value: float
    needs_interval: ClassVar[bool] = True

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if low > self.value else "fails" if high <= self.value else "straddles"

    def __str__(self) -> str:
        return f"interval above {self.value:g}"


class IntervalBelow(_Strict):
    """The whole interval lies below `value`; entirely at or above it fails; across it straddles."""

    name: Literal["interval_below"] = "interval_below"
    value: float
    needs_interval: ClassVar[bool] = True

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if high < self.value else "fails" if low >= self.value else "straddles"

    def __str__(self) -> str:
        return f"interval below {self.value:g}"


class Trend(_Strict):
    """The value is a slope; its interval must lie on the stated side of zero."""

    name: Literal["trend"] = "trend"
    sign: Literal["positive", "negative"]
    needs_interval: ClassVar[bool] = True

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        low, high = (low, high) if self.sign == "positive" else (-high, -low)
        return "holds" if low > 0 else "fails" if high <= 0 else "straddles"

    def __str__(self) -> str:
        return f"slope {'>' if self.sign == 'positive' else '<'} 0"


Rule = Annotated[Identity | Bound | IntervalAbove | IntervalBelow | Trend, Field(discriminator="name")]


# ------------------------------------------------------------------------------------------------------- register
class Check(_Strict):
    """One measured quantity and the rule that judges it; `why` says where the rule's threshold comes from."""

    metric: str
    rule: Rule
    why: str
    unit: str = ""


class Paper(_Strict):
    letter: str
    title: str
    cite: str
    where: str


class Source(_Strict):
    paper: str
    where: str
    ours: bool = False
    """True for a finding of this book about the paper's runs, rather than a claim the paper makes."""


class PaperSays(_Strict):
    number: str
    setting: str


class Claim(_Strict):
    """A claim. `teachers` are the hub ids of the paper's own setting, or `any` where no teacher is involved
    (a theorem, synthetic data); an empty list says that the paper's setting is not public."""

    id: str = Field(pattern=r"^[a-z0-9]+(\.[a-z0-9]+)+$")
    statement: str
    source: Source
    paper_says: PaperSays
    part: str
    chapter: str
    teachers: list[str] | Literal["any"]
    checks: dict[str, Check] = Field(min_length=1)

    @model_validator(mode="after")
    def _metrics_differ(self) -> Claim:
        metrics = [check.metric for check in self.checks.values()]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"claim {self.id}: two checks have the same metric")
        if bad := [metric for metric in metrics if BETWEEN in metric]:
            raise ValueError(f"claim {self.id}: metric {bad[0]!r} holds {BETWEEN!r}, which is kept for records")
        return self

    def check_of(self, metric: str) -> str | None:
        """Name of the check a recorded metric belongs to."""
        own = metric.split(BETWEEN)[0]
        return next((name for name, check in self.checks.items() if check.metric == own), None)


class Register(_Strict):
    papers: dict[str, Paper]
    parts: dict[str, str]
    claims: list[Claim]

    @model_validator(mode="after")
    def _names_resolve(self) -> Register:
        twice = [name for name, count in Counter(claim.id for claim in self.claims).items() if count > 1]
        if twice:
            raise ValueError(f"claim ids given twice: {', '.join(twice)}")
        for claim in self.claims:
            _one_of(f"paper of {claim.id}", claim.source.paper, self.papers)
            _one_of(f"part of {claim.id}", claim.part, self.parts)
        return self

    def __getitem__(self, claim_id: str) -> Claim:
        by_id = {claim.id: claim for claim in self.claims}
        _one_of("claim", claim_id, by_id)
        return by_id[claim_id]


class _UniqueKeys(yaml.SafeLoader):
    """YAML keeps the last of two equal keys without a word; a register must not lose a check that way."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


def register(path: Path = REGISTER) -> Register:
    """Reads and checks the register; raises `ValueError` that says which claim and field is wrong."""
    return _read_register(Path(path), Path(path).stat().st_mtime_ns)


@cache
def _read_register(path: Path, changed: int) -> Register:
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_UniqueKeys)
    except yaml.YAMLError as error:
        raise ValueError(f"{path.name} is not valid YAML: {error}") from error
    return validated(Register, content, path.name)


def validated(model: type[BaseModel], content: Any, name: str) -> Any:
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [f"{_place(content, each['loc'])}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"{name} does not fit the schema:\n  " + "\n  ".join(lines)) from error


def _place(content: Any, steps: Sequence[int | str]) -> str:
    """`claims[3]` is hard to find in a long file: name the claim instead."""
    if len(steps) > 1 and steps[0] == "claims" and isinstance(steps[1], int):
        claim = content["claims"][steps[1]]
        name = claim.get("id", f"number {steps[1] + 1}") if isinstance(claim, dict) else f"number {steps[1] + 1}"
        return ".".join(["claim " + name, *map(str, steps[2:])])
    return ".".join(map(str, steps)) or "the file"


def _one_of(what: str, given: Any, allowed: Iterable[str]) -> None:
    if given not in (allowed := list(allowed)):
        raise ValueError(f"{what} {given!r} is unknown; allowed: {', '.join(map(repr, allowed))}")


# -------------------------------------------------------------------------------------------------------- verdicts
COLOURS: dict[Verdict, str] = {
    "reproduced": "#009E73",
    "holds here": "#56B4E9",
    "partly": "#E69F00",
    "not reproduced": "#D55E00",
    "not tested": "#999999",
}


@dataclass(frozen=True)
class Record:
    """One measured number and its verdict: the rows of a results file, field by field."""

    claim: str
    metric: str
    value: float
    ci: tuple[float, float] | None
    n: int
    resampled: Resampled | None
    unit: str
    scope: Scope
    teacher: str | None
    expected: str
    verdict: Verdict
    note: str = ""

    def __str__(self) -> str:
        return f"{self.claim} | {self.metric}: {self.measured()} | expected {self.expected} | {self.verdict}"

    def measured(self) -> str:
        """`0.0176 [0.0170, 0.0181] FVU, n = 3 (seeds)`"""
        interval = f" [{_number(self.ci[0])}, {_number(self.ci[1])}]" if self.ci else ""
        unit = f" {self.unit}" if self.unit else ""
        over = f" ({self.resampled})" if self.resampled else ""
        return f"{_number(self.value)}{interval}{unit}, n = {self.n:,}{over}"

    def _repr_html_(self) -> str:
        note = f"<br><small>{html.escape(self.note)}</small>" if self.note else ""
        return (
            f'<div style="border-left:.25em solid {COLOURS[self.verdict]};padding:.2em .8em;margin:.4em 0">'
            f"<strong>{html.escape(self.verdict)}</strong> · <code>{html.escape(self.claim)}</code><br>"
            f"{html.escape(self.metric)}: <strong>{html.escape(self.measured())}</strong>; "
            f"expected {html.escape(self.expected)}; {html.escape(self.scope)}{note}</div>"
        )


def _number(value: float) -> str:
    """Three significant digits, without an exponent where a plain number is short."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}"


def plain(text: str) -> str:
    """Text of a record or of the register's plain fields, with nothing in it that Markdown would act on."""
    return re.sub(r"([\\`*_{}\[\]<>$|~])", r"\\\1", " ".join(text.split()))


def judge(claim: Claim, check: str, value: float, ci: tuple[float, float] | None, scope: Scope) -> Verdict:
    """The verdict of one number: what the check's rule says, under the scope it was measured in."""
    low, high = ci or (value, value)
    match claim.checks[check].rule.outcome(value, low, high):
        case "holds":
            return "reproduced" if scope == "paper setting" else "holds here"
        case "straddles":
            return "partly"
    return "not reproduced"


def overall(records: Iterable[Record], book: Register | None = None) -> dict[str, Verdict]:
    """One verdict for every claim of the register.

    A claim holds when every record of it holds and every check was run; it is `reproduced` only where each check
    was met in the paper's own setting. Records that disagree, or a check that was not run, make it `partly`.
    """
    book, records = book or register(), list(records)
    return {
        claim.id: combined(claim, [record for record in records if record.claim == claim.id]) for claim in book.claims
    }


def combined(claim: Claim, records: Sequence[Record]) -> Verdict:
    if not records:
        return "not tested"
    verdicts = {record.verdict for record in records}
    if verdicts == {"not reproduced"}:
        return "not reproduced"
    met = {claim.check_of(record.metric) for record in records}
    if verdicts <= {"reproduced", "holds here"} and met == set(claim.checks):
        at_scale = {claim.check_of(record.metric) for record in records if record.verdict == "reproduced"}
        return "reproduced" if at_scale == met else "holds here"
    return "partly"


# ------------------------------------------------------------------------------------------------------- recording
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
        if not SLUG.fullmatch(slug):
            raise ValueError(f"slug={slug!r} is not a chapter's file stem such as '01_topk_sae_is_rank1_moe'")
        self.slug, self.parameters, self.teacher = slug, dict(parameters), teacher
        self.path = settings.results_dir(results_dir) / f"{slug}.json"
        self.environment = environment(self.parameters.get("device", "auto"))
        self.records: list[Record] = []
        self.points: dict[str, list[dict[str, Any]]] = {}
        """Points of the chapter's curves by name, kept in its results file so that a longer run can be drawn beside."""
        self._started = time.perf_counter()

    @classmethod
    def of(cls, slug: str, namespace: Mapping[str, Any], **options: Any) -> Chapter:
        """The chapter of a notebook, with every parameter of its parameters cell as it stands in `namespace`.

        A chapter calls it with its `globals()`. Teacher and results_dir are the parameters of these names, unless
        given. Raises `ValueError` where the notebook has no parameters cell, or the namespace lacks a parameter.
        """
        names = parameter_names(settings.ROOT / "notebooks" / f"{slug}.ipynb")
        if missing := [name for name in names if name not in namespace]:
            raise ValueError(f"{slug}: the namespace has no {', '.join(missing)}; allowed: the chapter's own globals()")
        given = {name: namespace[name] for name in names}
        options = {name: given.get(name) for name in ("teacher", "results_dir")} | options
        return cls(slug, given, **options)

    def record(
        self,
        claim: str,
        value: float,
        *,
        scope: Scope,
        n: int,
        ci: Sequence[float] | None = None,
        resampled: Resampled | None = None,
        unit: str | None = None,
        variant: str | None = None,
        metric: str | None = None,
        teacher: str | EllipsisType | None = ...,
        note: str = "",
    ) -> Record:
        """Judges a number by the register's rule and keeps it.

        `variant` names the check (it may be left out where a claim has one); `metric` is added to the register's
        wording to tell several records of one check apart ("k = 8"). `n` counts what the number rests on, and with
        an interval `ci` what was resampled. `teacher` is the chapter's unless given: None for random or synthetic
        inputs. Raises `ValueError` for an unknown claim, variant or scope, a number that is not finite, an interval
        that is missing, reversed or does not hold the value, a note of more than `LONGEST_NOTE` characters, and for
        `scope="paper setting"` with a teacher that is not the paper's.
        """
        entry, teacher = register()[claim], self.teacher if teacher is ... else teacher
        check = _variant(entry, variant)
        value, ci = _finite("value", value), _interval(value, ci, resampled)
        if len(note) > LONGEST_NOTE:
            raise ValueError(f"note={note[:40]!r}… has {len(note):,} characters; allowed: up to {LONGEST_NOTE}")
        _one_of("scope", scope, get_args(Scope))
        _can_be_judged(entry, check, value, ci, n)
        if scope == "paper setting" and entry.teachers != "any" and teacher not in entry.teachers:
            allowed = ", ".join(entry.teachers) or "none, the setting is not public"
            raise ValueError(f"scope='paper setting' for {claim} with teacher={teacher!r}; the paper's: {allowed}")
        rules = entry.checks[check]
        result = Record(
            claim=claim,
            metric=rules.metric + (BETWEEN + metric if metric else ""),
            value=value,
            ci=ci,
            n=int(n),
            resampled=resampled,
            unit=rules.unit if unit is None else unit,
            scope=scope,
            teacher=teacher,
            expected=str(rules.rule),
            verdict=judge(entry, check, value, ci, scope),
            note=note,
        )
        if result not in self.records:  # a cell that is run again says the same thing twice
            self.records.append(result)
        return result

    def sides(self, name: str) -> dict[str, list[dict[str, Any]]]:
        """`points[name]` of this run, and of the longer run where one is kept, each under what a page calls it."""
        longer = reference(self.slug)
        found = {f"{settings.profile()} run, here": self.points[name]}
        return found | ({longer.origin: longer.points[name]} if longer and longer.points.get(name) else {})

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
            "records": [asdict(record) for record in self.records],
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


def parameter_names(notebook: Path) -> list[str]:
    """Names that the parameters cell of a notebook sets; `ValueError` where there is no such notebook or cell."""
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except OSError as error:
        raise ValueError(f"{notebook.name} is not in {notebook.parent.name}; allowed: a chapter of the book") from error
    tagged = [cell for cell in cells if "parameters" in cell["metadata"].get("tags", [])]
    if len(tagged) != 1:
        raise ValueError(f"{notebook.name}: {len(tagged)} cells are tagged 'parameters'; allowed: exactly one")
    body = ast.parse("".join(tagged[0]["source"])).body
    return [target.id for node in body if isinstance(node, ast.Assign) for target in node.targets]


def _variant(claim: Claim, variant: str | None) -> str:
    if variant is None and len(claim.checks) == 1:
        return next(iter(claim.checks))
    _one_of(f"{claim.id}: variant", variant, claim.checks)
    return variant


def _finite(what: str, value: float) -> float:
    if not math.isfinite(number := float(value)):
        raise ValueError(f"{what}={number} is not a finite number")
    return number


def _interval(value: float, ci: Sequence[float] | None, resampled: str | None) -> tuple[float, float] | None:
    if ci is None:
        if resampled is not None:
            raise ValueError(f"resampled={resampled!r} without an interval: give ci=(low, high)")
        return None
    _one_of("resampled", resampled, get_args(Resampled))
    if len(ci) != 2:
        raise ValueError(f"ci={ci!r} is not a pair (low, high)")
    low, high = _finite("ci low", ci[0]), _finite("ci high", ci[1])
    slack = 1e-9 * max(abs(low), abs(high))  # percentiles of equal numbers differ from their mean by rounding
    if not low - slack <= float(value) <= high + slack:
        raise ValueError(f"ci=({low}, {high}) does not hold value={float(value)}")
    return low, high


def _can_be_judged(claim: Claim, check: str, value: float, ci: tuple[float, float] | None, n: int) -> None:
    rule = claim.checks[check].rule
    if int(n) != n or n < 1:
        raise ValueError(f"n={n} is not a positive whole number")
    if rule.needs_interval and ci is None:
        raise ValueError(f"{claim.id}/{check}: the rule {rule.name} needs ci=(low, high) and resampled=…")
    if isinstance(rule, Bound) and rule.value == "violations" and (value < 0 or value != int(value) or value > n):
        raise ValueError(f"{claim.id}/{check}: value={value} is not a count of violations among n={n} samples")
    if isinstance(rule, Identity) and value < 0:
        raise ValueError(f"{claim.id}/{check}: value={value} is not a largest difference; give its absolute value")


def environment(device: str | torch.device = "auto") -> dict[str, Any]:
    """What a run depended on; `commit` is None outside git and ends in `-dirty` with uncommitted changes."""
    chosen = settings.device(str(device))
    on_gpu = chosen.type == "cuda"
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": _version("transformers"),
        "device": f"{chosen} ({torch.cuda.get_device_name(chosen)})" if on_gpu else str(chosen),
        "threads": torch.get_num_threads(),
        "commit": _commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        if Path(_git("rev-parse", "--show-toplevel")).resolve() != settings.ROOT:
            return None  # unpacked inside somebody else's repository
        return _git("rev-parse", "--short=12", "HEAD") + ("-dirty" if _git("status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(*arguments: str) -> str:
    command = ["git", "-C", str(settings.ROOT), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()


# --------------------------------------------------------------------------------------------------------- reading
class _Row(BaseModel):
    model_config = ConfigDict(extra="forbid")
    claim: str
    metric: str
    value: float
    ci: tuple[float, float] | None
    n: int
    resampled: Resampled | None
    unit: str
    scope: Scope
    teacher: str | None
    expected: str
    verdict: Verdict
    note: str = Field(max_length=LONGEST_NOTE)


class Results(BaseModel):
    """A results file. Further keys are allowed: reference files also carry the points of their curves."""

    chapter: str
    profile: str
    parameters: dict[str, Any]
    environment: dict[str, Any]
    seconds: float
    records: list[_Row]
    points: dict[str, list[dict[str, Any]]] = {}

    @property
    def origin(self) -> str:
        """Where the numbers come from, for a caption: profile, device, threads and date."""
        run = self.environment
        several = "" if run.get("threads") == 1 else "s"
        device = f"{run.get('threads')} CPU thread{several}" if run.get("device") == "cpu" else run.get("device")
        return f"{self.profile} run, {device}, {str(run.get('date'))[:10]}, commit {run.get('commit')}"


def reference(slug: str, folder: Path = REFERENCE) -> Results | None:
    """The longer run of a chapter that is kept in the repository, or None: its `points` stand beside the chapter's own.

    Raises `ValueError` for a damaged file, naming it.
    """
    path = Path(folder) / f"{slug}.json"
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}); restore it from the repository") from error
    return validated(Results, content, path.name)


def load_results(folder: Path, book: Register | None = None) -> list[tuple[Results, list[Record]]]:
    """Every results file of a folder with its records, judged again by the register as it stands now.

    Raises `ValueError` naming the file for damaged files and for records whose claim or metric the register no
    longer has. JSON files that hold no `records` (curves, grids) are passed over.
    """
    book, found = book or register(), []
    for path in sorted(Path(folder).glob("*.json")):
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{path.name} is damaged ({error}); delete it and run its chapter again") from error
        if isinstance(content, dict) and "records" in content:
            results = validated(Results, content, path.name)
            found.append((results, [_judged_again(row, book, path.name) for row in results.records]))
    return found


def _judged_again(row: _Row, book: Register, name: str) -> Record:
    stale = f"{name} is stale: run its chapter again or delete it"
    if row.claim not in {claim.id for claim in book.claims}:
        raise ValueError(f"{stale} (claim {row.claim!r} is not in the register)")
    claim = book[row.claim]
    check = claim.check_of(row.metric)
    if check is None:
        raise ValueError(f"{stale} (metric {row.metric!r} is not one of {row.claim})")
    try:
        _can_be_judged(claim, check, row.value, row.ci, row.n)
    except ValueError as error:
        raise ValueError(f"{stale} ({error})") from error
    fields = row.model_dump() | {
        "expected": str(claim.checks[check].rule),
        "verdict": judge(claim, check, row.value, row.ci, row.scope),
    }
    return Record(**fields)


def headline(claim: Claim, ours: Sequence[Record], reference: Sequence[Record]) -> list[Record]:
    """The records a claim's verdict rests on: for each check the reference run's where there are any, else ours."""
    kept = []
    for check in claim.checks:
        long, short = ([r for r in records if claim.check_of(r.metric) == check] for records in (reference, ours))
        kept += long or short
    return kept


# ------------------------------------------------------------------------------------------------------------ pages
def scoreboard_markdown(profile: str = "quick") -> str:
    """The scoreboard page; see `helpers.press.scoreboard`."""
    from helpers.press.scoreboard import scoreboard_markdown as render

    return render(profile)


def performance_markdown() -> str:
    """The performance page; see `helpers.press.performance`."""
    from helpers.press.performance import performance_markdown as render

    return render()
