"""The scoreboard: every claim on one line, its numbers against their thresholds; the same as CSV and JSON."""

from __future__ import annotations

import csv
import html
import io
import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, get_args

from helpers import settings
from helpers.press.claims import REFERENCE, Chapter, Results, load_results
from helpers.press.pages import machine, rich
from helpers.press.rules import BETWEEN, Bound, Check, Claim, Identity, IntervalWithin, Register, Trend, register
from helpers.press.tables import number, table
from helpers.press.verdicts import HOLDS, TABLE, Control, Record, Verdict, by_chance, combined, counted

SYMBOLS: dict[Verdict, str] = {
    "reproduced": "●",
    "holds here": "◉",
    "partly": "◐",
    "fails here": "◌",
    "not reproduced": "○",
    "too few": "?",
    "not tested": "–",
}
SAID: dict[Verdict, str] = {"partly": "open: ", "fails here": "not ", "not reproduced": "not ", "too few": "too few: "}
"""Before what was asked of a number, where that does not hold."""
FAMILIES = {"gemma": "Gemma 3", "smollm2": "SmolLM2", "pythia": "Pythia"}
"""Language models by the beginning of their names; another is a family of its own name."""
OWN = "book-moe"
"""The book's own mixture stands, as what needs no language model does, in the first column."""
PAGE = settings.ROOT / "book" / "scoreboard.md"
"""The page's prose; what is made from the records stands in the place of a comment such as `<!-- table -->`."""

LONG, BUILD, OTHER = "long", "build", "other"
"""Kinds of runs: a long one that is kept with the book, this build, or another profile on this machine."""
WHOSE = {LONG: "the book's run", BUILD: Chapter.whose, OTHER: "another run of yours"}
"""A run as pages name it, in the words of the figures."""


class Shown(NamedTuple):
    """A record with the run that made it, the check that it belongs to, and the left end, dot and right end of its
    line (`on_lines`)."""

    record: Record
    run: Results
    mark: str
    check: Check | None = None
    line: Sequence[float] = ()

    @property
    def column(self) -> str:
        """The family of its language model; empty where none is needed, or the book's own mixture is meant."""
        teacher = self.record.teacher
        name = "" if teacher in (None, OWN) else teacher.rsplit("/", 1)[-1]
        label = next((label for prefix, label in FAMILIES.items() if name.lower().startswith(prefix)), name)
        return "your run" if self.mark == OTHER and label in ("", FAMILIES["gemma"]) else label


@dataclass(frozen=True)
class Board:
    """The register with what was measured: by the reference runs, by this build, and on other models or texts."""

    book: Register
    runs: list[tuple[str, Results, list[Record]]]

    @classmethod
    def of_build(cls, profile: str, root: Path = settings.ROOT) -> Board:
        """What stands on the pages of a profile: its results, the kept runs, and others on this machine."""
        results = root / "_build" / "results" / profile
        others = sorted(other for other in results.parent.glob("*/") if other.name not in (profile, "nbval"))
        return cls.read(results, root / "results", others)

    @classmethod
    def read(cls, results: Path, reference: Path = REFERENCE, others: Iterable[Path] = ()) -> Board:
        """From folders of results; raises `ValueError` for some of the first two that the register no longer knows.

        Folders in `reference` hold the kept runs on further model families, which count as the first one's do. Of
        `others` those runs count that a reader changed (`…+custom`) or that are about another model; they have
        columns of their own and decide no verdict. What is stale there is passed over.
        """
        book, runs = register(), []
        families = [folder for folder in sorted(Path(reference).glob("*/")) if folder.name != "cells"]
        for mark, folders in ((LONG, [reference, *families]), (BUILD, [results])):
            runs += [(mark, *each) for folder in folders for each in load_results(folder, book)]
        for folder in others:
            with suppress(ValueError):
                for run, records in load_results(folder, book):
                    own = folder.name.endswith("+custom")
                    kept = [each for each in records if own or Shown(each, run, OTHER).column != "your run"]
                    runs += [(OTHER, run, kept)] if kept else []
        return cls(book, runs)

    def of(self, claim: Claim, check: str | None = None) -> list[Shown]:
        """A claim's records, or those of one of its checks: of long runs first."""
        return [
            Shown(record, run, mark, claim.checks[name])
            for mark, run, records in self.runs
            for record in records
            if record.claim == claim.id and check in (None, name := claim.check_of(record.metric))
        ]

    def deciding(self, claim: Claim, marks: Sequence[str] = (LONG, BUILD)) -> list[Shown]:
        """The records that a verdict rests on: of each check those of the first kind of runs that has some."""
        found = []
        for check in claim.checks:
            of_kinds = ([shown for shown in self.of(claim, check) if shown.mark == mark] for mark in marks)
            found += next(filter(None, of_kinds), [])
        return found

    def verdict(self, claim: Claim, marks: Sequence[str] = (LONG, BUILD)) -> Verdict:
        """A claim's, from what `deciding` finds."""
        return combined(claim, [shown.record for shown in self.deciding(claim, marks)])

    @cached_property
    def verdicts(self) -> dict[str, Verdict]:
        """The verdict of every claim of the register."""
        return {claim.id: self.verdict(claim) for claim in self.book.claims}

    def controls(self, claim_id: str | None = None) -> list[Control]:
        """Controls of a claim, or of all, from this build and the reference runs."""
        controls = [control for mark, run, _ in self.runs if mark != OTHER for control in run.controls]
        return [control for control in controls if claim_id in (None, control.claim)]

    @property
    def columns(self) -> list[str]:
        """Families of language models that some record is about, the book's own first; never none."""
        found = {Shown(record, run, mark).column for mark, run, records in self.runs for record in records} - {""}
        known = [name for name in FAMILIES.values() if name in found]
        return known + sorted(found - set(known)) or [FAMILIES["gemma"]]


# -- a number's place against its rule ---------------------------------------------------------------------------------


def place(check: Check, value: float, scale: float = 1.0) -> float:
    """Where a value lies on its rule's line, from -1 to 1: positive holds, 0 is the threshold.

    Identities count digits; counts and margins know only their side; all else is an asinh of the distance to the
    threshold over the threshold's size, or over `scale` where that is zero.
    """
    rule = check.rule
    match rule:
        case Identity():
            far = math.log10(rule.tolerance / abs(value)) / 8 if value else 1.0
        case Bound():
            far = 0.6 if rule.outcome(value, value, value) == "holds" else -1.0
        case IntervalWithin():
            low, high = rule.value
            far = min(value - low, high - value) / (high - low)
        case _:
            threshold = 0.0 if isinstance(rule, Trend) else rule.value
            down = str(rule).startswith(("interval below", "slope <"))
            distance = (threshold - value if down else value - threshold) / (abs(threshold) or scale or 1.0)
            far = math.asinh(4 * distance) / 3
    return max(-1.0, min(1.0, far))


def on_lines(drawn: Sequence[Shown]) -> list[Shown]:
    """Each record with its line."""
    largest, placed = Counter(), []
    for shown in drawn:
        metric = shown.check.metric
        largest[metric] = max(largest[metric], *map(abs, shown.record.ci or (0.0,)))
    for shown in drawn:
        values = (shown.record.value, *(shown.record.ci or ()))
        at = [place(shown.check, value, largest[shown.check.metric]) for value in values]
        placed.append(shown._replace(line=[min(at), at[0], max(at)]))
    return placed


def weakest(placed: Sequence[Shown]) -> Shown:
    """The one whose line begins furthest left."""
    return min(placed, key=lambda shown: shown.line[:2])


def _strip(placed: Sequence[Shown], words: str) -> str:
    """An SVG of all records of a claim, a line each, with the paper's numbers."""
    width, height, inset = 260, 24, 7

    def across(position: float) -> float:
        return round(width / 2 + position * (width / 2 - inset), 1)

    step = min(5.0, (height - 6) / max(1, len(placed) - 1))
    top = height / 2 - step * (len(placed) - 1) / 2
    marks = []
    for row, shown in enumerate(placed):
        low, x, high = map(across, shown.line)
        y = round(top + row * step, 1)
        kind = f"v-{shown.record.verdict.replace(' ', '-')}"
        line = f'<path d="M{low} {y}H{high}"/>' if shown.line[2] > shown.line[0] else ""
        dot = f'<rect class="dot" x="{x - 2.6:.1f}" y="{y - 2.6:.1f}" width="5.2" height="5.2"/>'
        dot = dot if shown.mark == OTHER else f'<circle cx="{x}" cy="{y}" r="2.9"/>'
        marks.append(f'<g class="{kind}{" ring" if shown.mark == BUILD else ""}">{line}{dot}</g>')
    for check in {shown.check.metric: shown.check for shown in placed}.values():
        for said in check.paper:
            x = across(place(check, said))
            marks.append(f'<path class="paper" d="M{x - 4} 12l4-4 4 4-4 4z"/>')
    return (
        f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="{html.escape(words)}">'
        f'<rect x="{width // 2}" width="{width // 2}" height="{height}"/>'
        f'<path class="bar" d="M{width // 2} 0V{height}"/>{"".join(marks)}</svg>'
    )


# -- the page ----------------------------------------------------------------------------------------------------------


def badge(verdict: Verdict, count: str = "") -> str:
    """A verdict as it looks everywhere in the book."""
    mark = f'<span aria-hidden="true">{SYMBOLS[verdict]}</span>'
    return f'<span class="verdict verdict-{verdict.replace(" ", "-")}">{mark} {count}{verdict}</span>'


def anchor(claim_id: str) -> str:
    """Target of a claim on the scoreboard: `scoreboard.html#claim-duality-forward`."""
    return "claim-" + claim_id.replace(".", "-")


def tidy(note: str) -> str:
    """A record's note without Python's spelling: `AuxK(k_aux=None, coefficient=0.03)` is "AuxK, coefficient 0.03"."""
    note = re.sub(r"\w+=None(, )?", "", note)
    note = re.sub(r"\b([A-Z]\w*)\(([^()]*)\)", lambda call: ", ".join(filter(None, call.groups())), note)
    return re.sub(r"(?<=\w)[=_](?=\w)", " ", note).replace(", :", ":")


def pages(board: Board, profile: str = "quick", *, notebooks: Path = settings.ROOT / "notebooks") -> dict[str, str]:
    """Files made from the records, by name: the scoreboard as a MyST page, `.csv` and `.json`; a small one to include.

    Raises `ValueError` for a chapter that the book no longer has.
    """
    chapters = {path.stem for path in Path(notebooks).glob("*.ipynb")}
    for _, run, _ in board.runs:
        gone = f"results of chapter {run.chapter!r}, which the book does not have"
        settings.allowed(run.chapter in chapters, gone, f"none: delete {run.chapter}.json")
    made = {verdict: badge(verdict) for verdict in get_args(Verdict)} | {
        "profile": profile,
        "summary": _summary(board),
        "verdicts": "\n".join(f"1. {row.words}: {row.verdict}" for row in TABLE),
        "table": _table(board, chapters),
        "runs": _runs(board),
    }
    text = re.sub("<!-- (.*?) -->", lambda place: made[place[1]], PAGE.read_text(encoding="utf-8"))
    taken = {"scoreboard.csv": _csv(board), "scoreboard.json": _json(board)}
    return {"scoreboard.md": text, "status.md": _small(board)} | taken


def _small(board: Board) -> str:
    """The scoreboard on the first page: a row of marks for each part, a mark for each claim, linked to its row."""
    rows = []
    for part, title in board.book.parts.items():
        marks = []
        for claim in board.book.claims:
            if claim.part == part:
                verdict = board.verdicts[claim.id]
                said = html.escape(f"{claim.title or claim.id}: {verdict}")
                where = f'href="scoreboard.html#{anchor(claim.id)}" title="{said}" aria-label="{said}"'
                marks.append(f'<a class="v-{verdict.replace(" ", "-")}" {where}>{SYMBOLS[verdict]}</a>')
        rows.append(f'<li><span>{part} · {rich(title)}</span><span class="marks">{"".join(marks)}</span></li>')
    body = f'<p class="counts">{_counts(board)}</p>\n<ul class="small-board">\n' + "\n".join(rows) + "\n</ul>"
    said = f"The {len(board.verdicts)} claims, ours included, as of this build; each mark leads to its numbers:"
    return f"{said}\n\n```{{raw}} html\n{body}\n```\n"


def _counts(board: Board, own: bool = True) -> str:
    counts = Counter(board.verdicts.values())
    shown = " ".join(badge(verdict, f"{counts[verdict]} ") for verdict in get_args(Verdict) if counts[verdict])
    ours = sum(board.verdicts[c.id] == "reproduced" for c in board.book.claims if c.source.paper == "book")
    return f"{shown} <small>({ours} of the reproduced are claims of our own)</small>" if ours and own else shown


def _summary(board: Board) -> str:
    """How many claims and controls there are, and how many would pass where the claim is false."""
    tested = sum(verdict != "not tested" for verdict in board.verdicts.values())
    checks = [check for claim in board.book.claims for check in claim.checks.values()]
    waiting = sum(check.no_control.startswith("not run yet") for check in checks)
    stated, found = sum(bool(check.control) for check in checks), board.controls()
    passed = sum(not control.rejected for control in found)
    deciding = [shown.record for claim in board.book.claims for shown in board.deciding(claim)]
    expected, controlled = by_chance(deciding, found, board.book)
    by_luck = f" By chance alone {number(expected)} of the {controlled} numbers so controlled would hold."
    none_left = f", {waiting} have one that was not run yet" if waiting else ""
    return (
        f"**{tested} of {len(board.verdicts)} claims of three papers and this book are tested here**, each by a rule "
        f"that could fail: {_counts(board, own=False)}\n\n"
        f"Of {len(checks)} checks {stated} have a negative control{none_left}, {len(checks) - stated - waiting} can "
        f"have none. {len(found)} controls were recorded; {passed} of them passed the rule that should reject it."
        f"{by_luck if controlled else ''}\n"
    )


def _table(board: Board, chapters: set[str]) -> str:
    columns = board.columns
    ours = ["ours"] if len(columns) == 1 else columns
    heads = {"claim": "claim", "paper": "the paper", "strip": "fails ◂ │ ▸ holds"}
    heads |= {f"ours ours-{at}": name for at, name in enumerate(ours)} | {"judged": "verdict", "chapters": "chapter"}
    bodies = []
    for part, title in board.book.parts.items():
        span = f'<th colspan="{len(heads)}" scope="rowgroup">Part {part} · {rich(title)}</th>'
        bodies.append(f'<tbody class="part" data-part="{part}"><tr>{span}</tr></tbody>')
        for claim in board.book.claims:
            if claim.part == part:
                bodies.append(_row(claim, board, chapters, columns, len(bodies)))
    head = "".join(f'<th scope="col" class="{kind}">{name}</th>' for kind, name in heads.items())
    caption = "Every claim: the paper's number, ours against the threshold, and the verdict"
    several = ' class="several"' if len(columns) > 1 else ""
    top = f'<div class="scoreboard"><table{several}><caption>{caption}</caption><thead><tr>{head}</tr></thead>\n'
    return top + "\n".join(bodies) + "\n</table></div>"


def _row(claim: Claim, board: Board, chapters: set[str], columns: list[str], order: int) -> str:
    verdict, placed = board.verdicts[claim.id], on_lines(board.deciding(claim) + board.deciding(claim, [OTHER]))
    leftmost = min((shown.line[0] for shown in placed), default=-2.0)
    held = sum(shown.record.verdict in HOLDS for shown in placed)
    words = f"{held} of {len(placed)} numbers hold: {verdict}" if placed else "no number yet"
    ours = sorted(chapters & ({claim.chapter} | {shown.run.chapter for shown in board.of(claim)}))
    links = " ".join(f'<a href="notebooks/{chapter}.html">{int(chapter[:2])}</a>' for chapter in ours)
    paper = board.book.papers[claim.source.paper]
    cells = [
        f'<th scope="row"><span class="title">{rich(claim.title or claim.id)}</span></th>',
        f'<td class="paper"><span>{rich(claim.paper_says.number)}</span></td>',
        f'<td class="strip">{_strip(placed, words)}</td>',
        *_ours(placed, columns),
        f'<td class="verdict-cell">{badge(verdict)}</td>',
        f'<td class="chapters">{links or "to come"}</td>',
    ]
    keys = {"verdict": verdict, "paper": f"{paper.letter}. {paper.title}", "part": claim.part, "order": order}
    keys |= {"at": f"{leftmost:.3f}", "rank": list(SYMBOLS).index(verdict), "title": claim.title or claim.id}
    data = " ".join(f'data-{name}="{html.escape(str(value))}"' for name, value in keys.items())
    return (
        f'<tbody class="claim" id="{anchor(claim.id)}" {data}><tr>{"".join(cells)}</tr>\n'
        f'<tr class="more"><td colspan="{5 + len(columns)}"><details><summary>records, controls, provenance of '
        f"{claim.id}</summary>\n{_details(claim, board)}</details></td></tr></tbody>"
    )


def _ours(placed: Sequence[Shown], columns: list[str]) -> Iterator[str]:
    """The weakest number for each family; one cell for all where no language model is needed."""
    of = {name: [shown for shown in placed if shown.column == name] for name in ["", *columns]}
    if not any(of[name] for name in columns):
        yield f'<td class="ours" colspan="{len(columns)}">{_weakest(of[""])}</td>'
        return
    of[columns[0]] += of[""]
    for name in columns:
        yield f'<td class="ours" data-family="{html.escape(name)}">{_weakest(of[name])}</td>'


def _weakest(placed: Sequence[Shown]) -> str:
    if not placed:
        return '<span class="none">not run</span>'
    shown = weakest(placed)
    said, what = SAID.get(shown.record.verdict, ""), html.escape(shown.record.metric)
    asked = f"<small>{said}{_asked(shown.check)}</small>"
    return f'<span title="{what}">{number(shown.record.value, shown.record.ci)}</span> {asked}'


def _asked(check: Check) -> str:
    """The rule as a reader sees it in a narrow column."""
    if isinstance(check.rule, Identity):
        return f"≤ {number(check.rule.tolerance)}"
    words = str(check.rule).replace("interval above", ">").replace("interval below", "<").removeprefix("interval ")
    return html.escape(words)


def _details(claim: Claim, board: Board) -> str:
    audit = "our audit of the paper's runs" if claim.source.ours else claim.source.where
    parts = [
        f"<p>{rich(claim.statement)}</p>",
        f"<p><b>The paper</b> ({rich(audit)}): {rich(claim.paper_says.number)}; {rich(claim.paper_says.setting)}</p>",
    ]
    for name, check in claim.checks.items():
        unit = f" ({rich(check.unit)})" if check.unit else ""
        parts.append(f"<h4>{rich(check.metric)}{unit}</h4><p>Asked: {_asked(check)}; {rich(check.why)}.</p>")
        parts += [f"<p>Changed {rich(check.changed)}</p>"] if check.changed else []
        rows = [_record_row(shown) for shown in board.of(claim, name)]
        parts.append(table(rows) if rows else "<p>Not run.</p>")
        found = [control for control in board.controls(claim.id) if control.check == name]
        said = "; ".join(f"<b>{c.measured()}</b>, {'rejected' if c.rejected else '<b>PASSES</b>'}" for c in found)
        about = f"none, {rich(check.no_control)}"
        if check.control:
            about = f"{rich(check.control)}: {said or 'not in this build'}"
        parts.append(f'<p class="control">Negative control: {about}.</p>')
    return "\n".join(parts)


def _record_row(shown: Shown) -> dict[str, Any]:
    record = shown.record
    about = "; ".join(filter(None, [record.scope, record.teacher or "", tidy(record.note)]))
    return {
        "case": html.escape(record.metric.partition(BETWEEN)[2] or "–"),
        "ours": f'<span class="whole">{number(record.value, record.ci)}</span>',
        "n": f"{counted(record.n)} {record.resampled or ''}",
        "verdict": badge(record.verdict),
        "run": f'{WHOSE[shown.mark]}, <span class="whole">ch. {int(shown.run.chapter[:2])}</span>',
        "setting": f"<small>{html.escape(about)}</small>",
    }


def _runs(board: Board) -> str:
    rows = []
    for mark, run, _ in board.runs:
        row = {"chapter": f"{int(run.chapter[:2])}", "run": f"{WHOSE[mark]}, profile {html.escape(run.profile)}"}
        rows.append(row | {"seconds": round(run.seconds), "machine": html.escape(machine(run.environment))})
    body = table(rows) if rows else "<p>No chapter has run.</p>"
    return f"::::{{dropdown}} {len(rows)} runs\n```{{raw}} html\n{body}\n```\n::::\n"


# -- to take away ------------------------------------------------------------------------------------------------------


def _flat(board: Board) -> Iterator[dict[str, Any]]:
    for claim in board.book.claims:
        for record, run, mark, *_ in board.of(claim):
            low, high = record.ci or (None, None)
            yield {
                **{"claim": claim.id, "title": claim.title, "paper": claim.source.paper, "part": claim.part},
                **{"claim_verdict": board.verdicts[claim.id], "check": claim.check_of(record.metric)},
                **{"metric": record.metric, "value": record.value, "low": low, "high": high, "n": record.n},
                **{"resampled": record.resampled, "unit": record.unit, "asked": record.expected},
                **{"verdict": record.verdict, "scope": record.scope, "teacher": record.teacher, "note": record.note},
                **{"chapter": run.chapter, "run": mark},
                **{"profile": run.profile, "seconds": run.seconds, "commit": run.environment.get("commit")},
            }


def _csv(board: Board) -> str:
    rows, stream = list(_flat(board)), io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    writer.writerows([list(rows[0]), *(row.values() for row in rows)] if rows else [])
    return stream.getvalue()


def _json(board: Board) -> str:
    claims = []
    for claim in board.book.claims:
        controls = [control.model_dump(mode="json") for control in board.controls(claim.id)]
        claims.append(claim.model_dump(mode="json") | {"verdict": board.verdicts[claim.id], "controls": controls})
    return json.dumps({"claims": claims, "records": list(_flat(board))}, ensure_ascii=False) + "\n"
