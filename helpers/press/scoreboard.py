"""The scoreboard page: every claim of the register with what this book measured and the verdict."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from helpers import settings
from helpers.press.claims import (
    BETWEEN,
    REFERENCE,
    Claim,
    Paper,
    Record,
    Register,
    Results,
    Verdict,
    combined,
    headline,
    load_results,
    plain,
    register,
)

SYMBOLS: dict[Verdict, str] = {
    "reproduced": "●",
    "holds here": "◉",
    "partly": "◐",
    "not reproduced": "○",
    "not tested": "–",
}

HOW_TO_READ = """
Every claim is judged by numbers that a chapter of this book computed, and by a rule that was fixed before.
{{doc}}`/notebooks/00_how_to_read` explains intervals and profiles.

- {reproduced}: the rule holds in the paper's own setting; for a theorem that is every setting.
- {holds here}: it holds on another model, text or size.
- {partly}: an interval lies across the threshold, some records agree and others do not, or a check was not run.
- {not reproduced}: the rule fails.
- {not tested}: no chapter has recorded it yet.

::::{{dropdown}} The four rules, the scopes and the two kinds of run
- **Identity**: a largest difference is at most a tolerance.
- **Interval above or below**: the whole interval lies on one side of a stated value.
- **Bound holds**: no sample violates the bound.
- **Trend**: the interval of a slope lies on one side of zero.

An interval that lies across the threshold settles nothing, and the verdict says so.

*Paper setting* is a record made with the paper's model under the paper's conditions.
*Analogue* is anything else, such as the embedded 4-bit copy of Gemma 3 270M; it is never shown as reproduced.

*This build* are the numbers of the chapters as this book was built from them (profile `{profile}`).
*Reference run* are numbers of longer runs that are kept with the book, with their hardware and commit.
Where a check has a reference run the verdict rests on it, and the build's own number stands beside it.
::::
"""


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
    book = register()
    here = load_results(results or settings.ROOT / "_build" / "results" / profile, book)
    long = load_results(reference, book)
    chapters = {path.stem for path in Path(notebooks).glob("*.ipynb")}
    for run, _ in here + long:
        if run.chapter not in chapters:
            raise ValueError(
                f"results of chapter {run.chapter!r}, which the book does not have: delete {run.chapter}.json"
            )
    board = _Board(book, _with_chapter(here), _with_chapter(long), chapters)
    legend = HOW_TO_READ.format(profile=profile, **{verdict: _badge(verdict) for verdict in get_args(Verdict)})
    papers = "\n".join(_paper(name, paper, board) for name, paper in book.papers.items())
    return f"# Scoreboard\n\n{_summary(board)}\n{legend}\n{papers}\n{_provenance(here, long)}"


@dataclass(frozen=True)
class _Board:
    book: Register
    here: list[tuple[Record, str]]
    long: list[tuple[Record, str]]
    chapters: set[str]

    def of(self, claim: Claim) -> tuple[list[tuple[Record, str]], list[tuple[Record, str]], Verdict]:
        """A claim's records (with their chapters) from this build and from reference runs, and its verdict."""
        here, long = ([pair for pair in pairs if pair[0].claim == claim.id] for pairs in (self.here, self.long))
        return here, long, combined(claim, headline(claim, [r for r, _ in here], [r for r, _ in long]))


def _with_chapter(runs: list[tuple[Results, list[Record]]]) -> list[tuple[Record, str]]:
    return [(record, run.chapter) for run, records in runs for record in records]


def _summary(board: _Board) -> str:
    counts = {part: Counter(board.of(c)[2] for c in board.book.claims if c.part == part) for part in board.book.parts}
    total = sum(counts.values(), Counter())
    tested = total.total() - total["not tested"]
    lines = [f"- {part}. {title}: {_counted(counts[part])}" for part, title in board.book.parts.items()]
    return "\n".join(
        [f"**{tested} of {total.total()} claims have been tested so far**: {_counted(total)}\n", *lines, ""]
    )


def _counted(counts: Counter) -> str:
    return " ".join(_badge(verdict, f"{counts[verdict]} ") for verdict in get_args(Verdict) if counts[verdict])


def _paper(name: str, paper: Paper, board: _Board) -> str:
    claims = [claim for claim in board.book.claims if claim.source.paper == name]
    head = f"## Paper {paper.letter}: {paper.title}\n\n{{cite:t}}`{paper.cite}`, {paper.where}.\n"
    return "\n".join([head, *(_card(claim, board) for claim in claims)])


def _card(claim: Claim, board: _Board) -> str:
    here, long, verdict = board.of(claim)
    told = {record.metric.split(BETWEEN)[0] for record, _ in here + long}
    missing = [
        f"- not run: {plain(check.metric)}; asked for {plain(str(check.rule))}"
        for check in claim.checks.values()
        if check.metric not in told
    ]
    ours = _lines([record for record, _ in here]) + _lines([record for record, _ in long], "reference run: ")
    tested = sorted({chapter for _, chapter in here + long} & board.chapters)
    planned = [claim.chapter] if claim.chapter in board.chapters and claim.chapter not in tested else []
    links = " ".join(f"{{doc}}`/notebooks/{chapter}`" for chapter in tested + planned)
    audit = "our audit of the paper's runs" if claim.source.ours else claim.source.where
    return f"""
({anchor(claim.id)})=
:::::{{div}} claim claim-{_slug(verdict)}
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

{chr(10).join(ours + missing)}

<small>{_reasons(claim)}</small>
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
            lines.append(f"{head}{BETWEEN + plain(which) if which else ''}: {_told(record, asked)}")
        else:
            lines += [f"{head}; {asked}", *(f"  - {plain(which)}: {_told(record)}" for which, record in group)]
    return lines


def _told(record: Record, *first: str) -> str:
    about = ", ".join([*first, record.scope, *([plain(record.teacher)] if record.teacher else [])])
    return f"**{plain(record.measured())}**; {about} {_badge(record.verdict)} {plain(record.note)}".rstrip()


def _reasons(claim: Claim) -> str:
    return "Thresholds: " + plain("; ".join(dict.fromkeys(check.why for check in claim.checks.values()))) + "."


def _provenance(here: list[tuple[Results, list[Record]]], long: list[tuple[Results, list[Record]]]) -> str:
    def line(run: Results, kind: str) -> str:
        where = run.environment
        return (
            f"- {run.chapter}, {kind}, profile {run.profile}: {run.seconds:.0f} s on {where.get('device')}, "
            f"torch {where.get('torch')}, commit {where.get('commit') or 'unknown'}, {where.get('date')}"
        )

    lines = [line(run, "this build") for run, _ in here] + [line(run, "reference run") for run, _ in long]
    return "\n".join(
        ["## Where the numbers come from\n", *(map(_plain_line, lines) if lines else ["No chapter has run."])]
    )


def _plain_line(line: str) -> str:
    return "- " + plain(line.removeprefix("- "))


def _badge(verdict: Verdict, count: str = "") -> str:
    mark = f'<span aria-hidden="true">{SYMBOLS[verdict]}</span>'
    return f'<span class="verdict verdict-{_slug(verdict)}">{mark} {count}{verdict}</span>'


def _slug(verdict: Verdict) -> str:
    return verdict.replace(" ", "-")


def anchor(claim_id: str) -> str:
    """Target of a claim on the scoreboard: chapters link to it as `[…](claim-duality-forward)`."""
    return "claim-" + claim_id.replace(".", "-")
