"""Pages made from numbers: the scoreboard, the performance page, and where the book stands, for its first page."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from pydantic import BaseModel, ConfigDict, model_validator

from helpers import settings
from helpers.press.claims import REFERENCE, Results, load_results, read_json
from helpers.press.rules import BETWEEN, Claim, Paper, Register, register, validated
from helpers.press.verdicts import TABLE, Control, Record, Verdict, overall

SYMBOLS: dict[Verdict, str] = {
    "reproduced": "●",
    "holds here": "◉",
    "partly": "◐",
    "fails here": "◌",
    "not reproduced": "○",
    "too few": "?",
    "not tested": "–",
}

HOW_TO_READ = """
Every claim is judged by numbers that a chapter of this book computed, and by a rule that was fixed before.
{{doc}}`/notebooks/00_how_to_read` explains intervals and profiles.

- {reproduced}: the rule holds in the paper's own setting; for a theorem that is every setting.
- {holds here}: it holds on another model, text or size.
- {partly}: an interval lies across the threshold, some records agree and others do not, or a check was not run.
- {fails here}: the rule fails on another model, text or size, which does not refute the paper.
- {not reproduced}: the rule fails in the paper's own setting.
- {too few}: the interval rests on fewer than 3 seeds, or fewer than 5 articles or samples, and is not judged.
- {not tested}: no chapter has recorded it yet.

::::{{dropdown}} The rules, the scopes and the two kinds of run
- **Identity**: a largest difference is at most a tolerance.
- **Interval above or below**: the whole interval lies on one side of a stated value; **within**: between two.
- **Bound holds**: no sample violates the bound.
- **Trend**: the interval of a slope lies on one side of zero.

An interval that lies across the threshold settles nothing, and the verdict says so.

*Paper setting* is a record made with the paper's model under the paper's conditions.
*Analogue* is anything else, such as the embedded 4-bit copy of Gemma 3 270M; it is never shown as reproduced.

Several records make a claim's verdict by the first line that fits:

{table}

A *control* is the same quantity, by the same code, where the claim is false by construction: the rule must reject it.

*This build* are the numbers of the chapters as this book was built from them (profile `{profile}`).
*Reference run* are numbers of longer runs that are kept with the book, with their hardware and commit.
Where a check has a reference run the verdict rests on it, and the build's own number stands beside it.
::::
"""


def plain(text: str) -> str:
    """Text of a record or of the register's plain fields, with nothing in it that Markdown would act on."""
    return re.sub(r"([\\`*_{}\[\]<>$|~])", r"\\\1", " ".join(text.split()))


# -- the scoreboard ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Board:
    """The register with what was measured: by this build, and by the reference runs."""

    book: Register
    here: list[tuple[Results, list[Record]]]
    long: list[tuple[Results, list[Record]]]
    verdicts: dict[str, Verdict]

    @classmethod
    def read(cls, results: Path, reference: Path = REFERENCE) -> Board:
        """From two folders; raises `ValueError` for results that the register no longer knows."""
        book = register()
        here, long = load_results(results, book), load_results(reference, book)
        ours, theirs = ([record for _, records in runs for record in records] for runs in (here, long))
        return cls(book, here, long, overall(ours, theirs, book))

    def of(self, claim: Claim) -> tuple[list[tuple[Record, str]], list[tuple[Record, str]]]:
        """A claim's records, each with its chapter, from this build and from the reference runs."""
        here, long = (
            [(record, run.chapter) for run, records in runs for record in records if record.claim == claim.id]
            for runs in (self.here, self.long)
        )
        return here, long

    def controls(self, claim_id: str | None = None) -> list[Control]:
        """Controls of a claim, or of all, from this build and the reference runs."""
        controls = [control for run, _ in self.here + self.long for control in run.controls]
        return [control for control in controls if claim_id in (None, control.claim)]


def status_markdown(profile: str, root: Path = settings.ROOT) -> str:
    """Where the book stands, for its first page: how many claims have which verdict."""
    counts = Counter(Board.read(root / "_build" / "results" / profile).verdicts.values())
    items = "".join(f"<li><b>{counts[verdict]}</b> {verdict}</li>" for verdict in get_args(Verdict))
    return f'The {counts.total()} claims of the three papers, as of this build:\n\n<ul class="status">{items}</ul>\n'


def scoreboard_markdown(
    profile: str = "quick",
    *,
    results: Path | None = None,
    reference: Path = REFERENCE,
    notebooks: Path = settings.ROOT / "notebooks",
) -> str:
    """The scoreboard as a MyST page: a summary, how to read it, then every claim of the register once.

    Reads `_build/results/<profile>` (or `results`) and, labelled apart, `reference`. Raises `ValueError` for results
    that the register no longer knows, and for a chapter that the book no longer has.
    """
    board = Board.read(results or settings.ROOT / "_build" / "results" / profile, reference)
    chapters = {path.stem for path in Path(notebooks).glob("*.ipynb")}
    for run, _ in board.here + board.long:
        if run.chapter not in chapters:
            raise ValueError(
                f"results of chapter {run.chapter!r}, which the book does not have: delete {run.chapter}.json"
            )
    table = "\n".join(f"1. {row.words}: {row.verdict}" for row in TABLE)
    legend = HOW_TO_READ.format(
        profile=profile, table=table, **{verdict: _badge(verdict) for verdict in get_args(Verdict)}
    )
    papers = "\n".join(_paper(name, paper, board, chapters) for name, paper in board.book.papers.items())
    return f"# Scoreboard\n\n{_summary(board)}\n{legend}\n{papers}\n{_provenance(board)}"


def _summary(board: Board) -> str:
    counts = {part: Counter() for part in board.book.parts}
    for claim in board.book.claims:
        counts[claim.part][board.verdicts[claim.id]] += 1
    total = sum(counts.values(), Counter())
    tested = total.total() - total["not tested"]
    lines = [f"- {part}. {title}: {_counted(counts[part])}" for part, title in board.book.parts.items()]
    return "\n".join(
        [
            f"**{tested} of {total.total()} claims have been tested so far**: {_counted(total)}\n",
            *lines,
            f"\n{_controls_in_all(board)}\n",
        ]
    )


def _controls_in_all(board: Board) -> str:
    """How many checks have a control, and how many would pass where the claim is false."""
    checks = [check for claim in board.book.claims for check in claim.checks.values()]
    waiting = sum(check.no_control.startswith("not run yet") for check in checks)
    stated, found = sum(bool(check.control) for check in checks), board.controls()
    passed = sum(not control.rejected for control in found)
    return (
        f"Of {len(checks)} checks {stated} have a negative control, {waiting} have one that was not run yet, "
        f"{len(checks) - stated - waiting} can have none. {len(found)} controls were recorded; {passed} of them passed "
        "the rule that should reject it."
    )


def _control_lines(claim: Claim, board: Board) -> list[str]:
    """A line for each check: its control with the number, or why there is none."""
    lines = []
    for name, check in claim.checks.items():
        found = [control for control in board.controls(claim.id) if control.check == name]
        said = "; ".join(f"**{c.measured()}**, {'rejected' if c.rejected else 'PASSES'}" for c in found)
        about = f"{check.control}: {said or 'not in this build'}" if check.control else f"none, {check.no_control}"
        lines.append(f"- <small>Control of “{plain(name)}”: {about}</small>")
    return lines


def _counted(counts: Counter) -> str:
    return " ".join(_badge(verdict, f"{counts[verdict]} ") for verdict in get_args(Verdict) if counts[verdict])


def _paper(name: str, paper: Paper, board: Board, chapters: set[str]) -> str:
    claims = [claim for claim in board.book.claims if claim.source.paper == name]
    head = f"## Paper {paper.letter}: {paper.title}\n\n{{cite:t}}`{paper.cite}`, {paper.where}.\n"
    return "\n".join([head, *(_card(claim, board, chapters) for claim in claims)])


def _card(claim: Claim, board: Board, chapters: set[str]) -> str:
    (here, long), verdict = board.of(claim), board.verdicts[claim.id]
    run = {record.metric.split(BETWEEN)[0] for record, _ in here + long}
    missing = [
        f"- not run: {plain(check.metric)}; asked for {plain(str(check.rule))}"
        for check in claim.checks.values()
        if check.metric not in run
    ]
    ours = _lines([record for record, _ in here]) + _lines([record for record, _ in long], "reference run: ")
    tested = sorted({chapter for _, chapter in here + long} & chapters)
    planned = [claim.chapter] if claim.chapter in chapters and claim.chapter not in tested else []
    links = " ".join(f"{{doc}}`/notebooks/{chapter}`" for chapter in tested + planned)
    audit = "our audit of the paper's runs" if claim.source.ours else claim.source.where
    reasons = plain("; ".join(dict.fromkeys(check.why for check in claim.checks.values())))
    return f"""
({anchor(claim.id)})=
:::::{{div}} claim claim-{verdict.replace(" ", "-")}
::::{{div}} claim-what
{claim.statement}

<small>`{claim.id}` · {audit}</small>
::::
::::{{div}} claim-paper
<span class="claim-label">The paper</span>
{claim.paper_says.number}

<small>{claim.paper_says.setting}</small>
::::
::::{{div}} claim-ours
<span class="claim-label">This book</span>

{chr(10).join(ours + missing + _control_lines(claim, board))}

<small>Thresholds: {reasons}.</small>
::::
::::{{div}} claim-verdict
{_badge(verdict)}

<small>{links or "Chapter to come: " + plain(claim.chapter) + "."}</small>
::::
:::::
"""


def _lines(records: list[Record], label: str = "") -> list[str]:
    """A line for each record; several records of one check share its wording, and stand below it."""
    lines, together = [], {}
    for record in records:
        metric, _, which = record.metric.partition(BETWEEN)
        together.setdefault((metric, record.expected), []).append((which, record))
    for (metric, expected), group in together.items():
        head, asked = f"- {label}{plain(metric)}", f"asked for {plain(expected)}"
        if len(group) == 1:
            which, record = group[0]
            lines.append(f"{head}{BETWEEN + plain(which) if which else ''}: {_measured(record, asked)}")
        else:
            lines += [f"{head}; {asked}", *(f"  - {plain(which)}: {_measured(record)}" for which, record in group)]
    return lines


def _measured(record: Record, *first: str) -> str:
    about = ", ".join([*first, record.scope, *([plain(record.teacher)] if record.teacher else [])])
    return f"**{plain(record.measured())}**; {about} {_badge(record.verdict)} {plain(record.note)}".rstrip()


def _provenance(board: Board) -> str:
    lines = []
    for kind, runs in (("this build", board.here), ("reference run", board.long)):
        for run, _ in runs:
            took = f"{run.seconds:.0f} s on {_machine(run.environment)}"
            lines.append("- " + plain(f"{run.chapter}, {kind}, profile {run.profile}: {took}"))
    return "\n".join(["## Where the numbers come from\n", *(lines or ["No chapter has run."])])


def _machine(environment: dict[str, Any]) -> str:
    device, threads, torch, commit, date = map(environment.get, ("device", "threads", "torch", "commit", "date"))
    return f"{device}, {threads} threads, torch {torch}, commit {commit or 'unknown'}, {date}"


def _badge(verdict: Verdict, count: str = "") -> str:
    mark = f'<span aria-hidden="true">{SYMBOLS[verdict]}</span>'
    return f'<span class="verdict verdict-{verdict.replace(" ", "-")}">{mark} {count}{verdict}</span>'


def anchor(claim_id: str) -> str:
    """Target of a claim on the scoreboard: chapters link to it as `[…](claim-duality-forward)`."""
    return "claim-" + claim_id.replace(".", "-")


# -- performance -------------------------------------------------------------------------------------------------------

BENCHMARKS = settings.ROOT / "benchmarks" / "results"

INTRODUCTION = """# Performance

How fast the book's own code is, beside its peers, and how long the book takes.

`make bench` measures all of this again on your machine and writes `benchmarks/results/`.
Everything that is compared was timed in turns in one process; the figures are medians.
A target that was missed is shown as missed.
"""


class Target(BaseModel):
    model_config = ConfigDict(extra="forbid")
    what: str
    target: str
    measured: float
    met: bool


class Benchmark(BaseModel):
    """One file of `benchmarks/results` (its form is in `benchmarks/README.md`)."""

    model_config = ConfigDict(extra="forbid")
    name: str
    title: str
    question: str
    environment: dict[str, Any]
    rows: list[dict[str, Any]]
    targets: list[Target]
    note: str

    @model_validator(mode="after")
    def _one_table(self) -> Benchmark:
        if len({tuple(row) for row in self.rows}) > 1:
            raise ValueError("rows do not all have the same columns in the same order")
        return self


def performance_markdown(results: Path = BENCHMARKS) -> str:
    """The page, one section a benchmark. Raises `ValueError` naming a file that is damaged or of another form."""
    cure = "run `make bench` again or delete it"
    benchmarks = [validated(Benchmark, read_json(path, cure), path.name) for path in sorted(results.glob("*.json"))]
    if not benchmarks:
        return f"{INTRODUCTION}\nNo benchmark has been run in this copy of the book.\n"
    targets = [target for benchmark in benchmarks for target in benchmark.targets]
    met = sum(target.met for target in targets)
    count = f"**{met} of {len(targets)} targets are met.**\n" if targets else ""
    return "\n".join([INTRODUCTION, count, *map(_section, benchmarks)])


def _section(benchmark: Benchmark) -> str:
    parts = [f"## {plain(benchmark.title)}\n", f"{plain(benchmark.question)}\n"]
    if benchmark.targets:
        rows = [
            {"Target": t.what, "Asked": t.target, "Measured": t.measured, "": "✓ met" if t.met else "✗ missed"}
            for t in benchmark.targets
        ]
        parts.append(_table(rows))
    if benchmark.rows:
        parts.append(_table(benchmark.rows))
    parts.append(f"<small>{plain(benchmark.note)} Measured on: {plain(_machine(benchmark.environment))}.</small>\n")
    return "\n".join(parts)


def _table(rows: list[dict[str, Any]]) -> str:
    """A Markdown table that scrolls by itself on a narrow screen; numbers are set to the right."""
    columns = list(rows[0])
    numeric = {name: all(isinstance(row[name], int | float | None) for row in rows) for name in columns}
    head = "| " + " | ".join(map(plain, columns)) + " |"
    rule = "|" + "|".join("--:" if numeric[name] else ":--" for name in columns) + "|"
    body = ["| " + " | ".join(_cell(row[name]) for name in columns) + " |" for row in rows]
    return "\n".join([":::{div} wide-table", head, rule, *body, ":::\n"])


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else plain(str(value))
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
