"""The head and the foot of a chapter's page: its verdicts with their numbers, and how a reader's own run compares."""

from __future__ import annotations

import ast
import html
import json
from collections.abc import Iterator, Sequence
from contextlib import suppress
from typing import Any, Literal, NamedTuple

import nbformat

from helpers.press.pages import rich
from helpers.press.rules import Check, Claim
from helpers.press.scoreboard import BUILD, LONG, WHOSE, Board, Shown, anchor, badge, on_lines, weakest
from helpers.press.tables import number, table
from helpers.press.verdicts import VERDICTS, Verdict

HERO, OWN = "hero", "own"
"""Tags of the cell that draws the finding from the book's run, and of the last one, which draws this run alike."""
SIDES: dict[Verdict, str] = {verdict: side for of in VERDICTS.values() for side, verdict in of.items()}
Word = Literal["agrees", "differs", "cannot tell"]


class Compared(NamedTuple):
    """One check of a chapter in the book's run and in the reader's."""

    check: Check
    book: list[Shown]
    own: list[Shown]

    @property
    def word(self) -> Word:
        """Two runs differ where one holds and the other fails; what is open in one of them only says nothing."""
        sides = [_side(self.book), _side(self.own)]
        if sides[0] == sides[1]:
            return "agrees"
        return "differs" if set(sides) == {"holds", "fails"} else "cannot tell"


def _side(records: Sequence[Shown]) -> str:
    found = {SIDES.get(shown.record.verdict, "open") for shown in records}
    return found.pop() if len(found) == 1 else "open"


def compared(slug: str, board: Board) -> list[Compared]:
    """Every check that both runs of a chapter recorded; of the book's runs the one on the same teacher, if there is."""
    found, teachers = [], [(mark, run.parameters.get("teacher")) for mark, run, _ in board.runs if run.chapter == slug]
    own = next((teacher for mark, teacher in teachers if mark == BUILD), None)
    wanted = own if (LONG, own) in teachers else next((teacher for mark, teacher in teachers if mark == LONG), None)
    for claim in board.book.claims:
        for name, check in claim.checks.items():
            records = [shown for shown in board.of(claim, name) if shown.run.chapter == slug]
            book = [s for s in records if s.mark == LONG and s.run.parameters.get("teacher") == wanted]
            reader = [s for s in records if s.mark == BUILD]
            if book and reader:
                found.append(Compared(check, book, reader))
    return found


def page(notebook: nbformat.NotebookNode, slug: str, board: Board) -> nbformat.NotebookNode:
    """The chapter with its verdicts under the hero figure, and the reader's own run beside the book's at the foot.

    Where the run is not the quick one that comes with the book, its own figure and numbers lead, and a line under the
    title says how it differs from the book's.
    """
    notebook.cells = list(_joined(notebook.cells))
    rows = compared(slug, board)
    run, book = (
        next((run for kind, run, _ in board.runs if kind == mark and run.chapter == slug), None)
        for mark in (BUILD, LONG)
    )
    heroes = [place for place, cell in enumerate(notebook.cells) if HERO in cell.metadata.get("tags", [])]
    for cell in notebook.cells if book else ():
        if "parameters" in cell.metadata.get("tags", []):
            cell.source = _beside(cell.source, book.parameters)
    own = run is not None and run.profile != "quick"
    if own:
        _swap(notebook.cells)
        notebook.cells[0].source = _with_banner(notebook.cells[0].source, run.profile, run.parameters, rows)
    at = heroes[0] + 1 if heroes else 1
    if chips := _verdicts(slug, board, rows, own):
        notebook.cells.insert(at, nbformat.v4.new_markdown_cell(f"```{{raw}} html\n{chips}\n```"))
    if rows:
        notebook.cells.append(nbformat.v4.new_markdown_cell(_foot(rows, run.seconds)))
    return notebook


def _beside(source: str, book: dict[str, Any]) -> str:
    """The cell of parameters with, at the end of a line, what the book's run had there, where it was something else."""
    lines = source.split("\n")
    for node in ast.parse(source).body:
        name = ast.unparse(node.targets[0]) if isinstance(node, ast.Assign) else None
        with suppress(ValueError):  # no literal
            if name in book and book[name] != json.loads(json.dumps(ast.literal_eval(node.value))):
                end = node.end_lineno - 1
                lines[end] += f"{'' if '  # ' in lines[end] else '  #'} (the book's run: {book[name]})"
    return "\n".join(lines)


def _joined(cells: Sequence[nbformat.NotebookNode]) -> Iterator[nbformat.NotebookNode]:
    """Folded cells of code that show nothing are one with the folded cell after them: one line to click, not four."""
    before: list[nbformat.NotebookNode] = []
    for cell in cells:
        if set(cell.metadata.get("tags", [])) - {HERO} == {"hide-input"} and cell.cell_type == "code":
            cell.source = "\n\n\n".join(each.source for each in [*before, cell])
            before = [] if cell.outputs else [cell]
            if before:
                continue
        else:
            yield from before
            before = []
        yield cell
    yield from before


def _swap(cells: list[nbformat.NotebookNode]) -> None:
    """The reader's own figure takes the place of the book's, and the other way round."""
    pair = {tag: cell for cell in cells for tag in (HERO, OWN) if tag in cell.metadata.get("tags", [])}
    if len(pair) == 2:
        pair[HERO].outputs, pair[OWN].outputs = pair[OWN].outputs, pair[HERO].outputs
        pair[OWN].metadata.setdefault("mystnb", {})["code_prompt_show"] = "The book's own run in the same figure"


def _with_banner(source: str, profile: str, parameters: dict[str, Any], rows: Sequence[Compared]) -> str:
    title, _, rest = source.partition("\n")
    model = f", teacher {parameters['teacher']}" if parameters.get("teacher") else ""
    said = f"The figure and the numbers marked *your run* are yours (profile {profile}{model}). {summary(rows)}"
    said += " The text tells the book's finding."
    return f"{title}\n\n:::{{admonition}} Your own run\n:class: note own-run\n{said}\n:::\n{rest}"


def summary(rows: Sequence[Compared]) -> str:
    """`It agrees with the book on 5 of 7 checks, cannot tell on 1, and differs on 1: gain on activations.`"""
    words = [row.word for row in rows]
    if not rows:
        return "The book's run has no check that yours has."
    parts = [f"It agrees with the book on {words.count('agrees')} of {len(rows)} checks"]
    if "cannot tell" in words:
        parts.append(f"cannot tell on {words.count('cannot tell')}")
    if "differs" in words:
        which = "; ".join(row.check.metric for row in rows if row.word == "differs")
        parts.append(f"differs on {words.count('differs')}: {which}")
    return ", ".join(parts) + "."


def _verdicts(slug: str, board: Board, rows: Sequence[Compared], own: bool = False) -> str:
    """A line a claim: verdict, what is claimed, the weakest number against its threshold; then one on controls."""
    lines = list(_lines(slug, board, own))
    if not lines:
        return ""
    runs = [run for mark, run, _ in board.runs if mark in (LONG, BUILD) and run.chapter == slug]
    controls = {(c.claim, c.check): c.rejected for run in runs for c in run.controls}
    about = [f"{sum(controls.values())} of {len(controls)} negative controls rejected"] if controls else []
    about += [html.escape(f"your run {summary(rows)[3:-1]}")] if rows else []
    foot = f'<p class="about">{" · ".join(about)}</p>' if about else ""
    return f'<ul class="findings">{"".join(lines)}</ul>{foot}'


def _lines(slug: str, board: Board, own: bool = False) -> Iterator[str]:
    """Of a reader's `own` run its numbers, and the verdicts as they would be by them; the book's where it has none."""
    for claim in board.book.claims:
        theirs = board.deciding(claim, [BUILD]) if own else []
        deciding = [each for each in theirs or board.deciding(claim) if each.run.chapter == slug]
        if not deciding:
            continue
        verdict = board.verdict(claim, (BUILD, LONG) if own else (LONG, BUILD))
        families = {}
        for each in on_lines(deciding):
            families.setdefault(each.column or board.columns[0], []).append(each)
        first, *others = (name for name in board.columns if name in families)
        shown = weakest(families[first])
        title = f'<a href="../scoreboard.html#{anchor(claim.id)}">{rich(claim.title or claim.id)}</a>'
        measured = f'<span class="measured">{number(shown.record.value, shown.record.ci)}</span>'
        more = f"weakest of {len(families[first])}: " if len(families[first]) > 1 else ""
        small = f"{more}{rich(shown.record.metric)}; asked {html.escape(str(shown.check.rule))}; {WHOSE[shown.mark]}"
        small += _of_all(claim, deciding, board) if verdict == "partly" else ""
        small += "".join(_there(html.escape(name), families[name], shown.record.metric) for name in others)
        yield f"<li>{badge(verdict)}<span>{title}</span>{measured}<small>{small}</small></li>"


def _of_all(claim: Claim, deciding: Sequence[Shown], board: Board) -> str:
    """How many of the numbers behind a verdict hold, and whether a check has none: "partly" may be either."""
    held = sum(SIDES.get(shown.record.verdict) == "holds" for shown in deciding)
    without = sum(not board.of(claim, name) for name in claim.checks)
    said = f"; {held} of {len(deciding)} numbers hold"
    return said + (f", {without} of {len(claim.checks)} checks not run" if without else "")


def _there(name: str, placed: Sequence[Shown], metric: str) -> str:
    """What another family has for the same measurement, and its weakest number where that says something else."""
    same = [each for each in placed if each.record.metric == metric]
    first, shown = weakest(same or placed).record, weakest(placed)
    worst = shown.record
    said = f"; on {name} {number(first.value, first.ci)}, {first.verdict}" if same else ""
    if not same or worst.verdict != first.verdict:
        said += f"; weakest on {name} {number(worst.value, worst.ci)}, {worst.verdict}: "
        said += f"{rich(worst.metric)}; asked {html.escape(str(shown.check.rule))}"
    return said


def _foot(rows: Sequence[Compared], seconds: float) -> str:
    """Both runs side by side, folded."""
    listed = [
        {
            "check": rich(row.check.metric),
            "asked": html.escape(str(row.check.rule)),
            "the book's run": _numbers(row.book),
            "your run": _numbers(row.own),
            "": row.word,
        }
        for row in rows
    ]
    title = f"Your run ({seconds:.0f} s) beside the book's: {summary(rows)}"
    return f"## Your run\n\n:::{{dropdown}} {title}\n```{{raw}} html\n{table(listed)}\n```\n:::\n"


def _numbers(records: Sequence[Shown]) -> str:
    shown = [f'<span class="whole">{number(s.record.value, s.record.ci)}</span>' for s in records[:3]]
    more = [f"and {len(records) - 3} more"] if len(records) > 3 else []
    return "<br>".join([*shown, *more])
