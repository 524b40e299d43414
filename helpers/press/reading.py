"""The map: what each chapter needs, as its own words say, three ways through the book, and how long each takes."""

from __future__ import annotations

import html
import json
import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from helpers.press.chapters import Chapter, Job
from helpers.press.tables import table

PATHS = {
    "researcher": ("an interpretability researcher", (0, 1, 7, 8, 9, 13, 14, 15, 17, 18)),
    "engineer": ("a mixture-of-experts engineer", (0, 1, 2, 3, 5, 6, 10, 11, 12, 17)),
    "student": ("a student", (0, 1, 2, 3, 4, 13)),
}
"""Who reads which chapters: whatever one of them needs is among them."""
WORDS_A_MINUTE = 200
WIDE, HIGH, STEP, ROW = 166, 60, 200, 72
"""A chapter's box in the drawing, and the distances from box to box."""


def needs(chapter: Chapter) -> list[int]:
    """Numbers of the chapters that the paragraph "You need" links to."""
    prose = "\n\n".join(cell["source"] for cell in chapter.cells if cell["cell_type"] == "markdown")
    said = re.search(r"^\W*You need\b.*?(?=\n\s*\n|\Z)", prose, re.M | re.S)
    return sorted({int(number) for number in re.findall(r"\]\((\d\d)_\w+\.ipynb\)", said[0] if said else "")})


def prose(chapter: Chapter) -> str:
    """What a chapter says in words, without what is folded, shown as code or set as a formula of its own."""
    said = "\n".join(cell["source"] for cell in chapter.cells if cell["cell_type"] == "markdown")
    folded = (
        r"^(`{3,}|:{3,}) *\{(?:dropdown\}|[^\n]*\n:class: dropdown).*?^\1 *$|^`{3}.*?^`{3} *$|\$\$.*?\$\$|<!--.*?-->"
    )
    return re.sub(folded, "", said, flags=re.M | re.S)


def minutes(job: Job) -> tuple[int, float | None]:
    """To read a chapter, without what is folded, and to run it as it was run here."""
    words = len(re.findall(r"\w+", prose(job.chapter)))
    try:
        seconds = json.loads(job.stamp.read_text(encoding="utf-8"))["seconds"]
    except (OSError, ValueError, KeyError):
        seconds = None
    return max(1, round(words / WORDS_A_MINUTE)), None if seconds is None else seconds / 60


def page(jobs: Sequence[Job]) -> str:
    """`book/map.md` with the drawing, the ways and the chapters in it."""
    root = jobs[0].root
    parts = parts_of(yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8")))
    taken = {job.chapter.number: minutes(job) for job in jobs}
    chapters = {job.chapter.number: job.chapter for job in jobs}
    text = (root / "book" / "map.md").read_text(encoding="utf-8")
    text = text.replace("<!-- drawing -->", drawing(chapters, parts))
    text = text.replace("<!-- paths -->", table(_ways(taken)))
    return text.replace("<!-- chapters -->", table([_row(chapters[number], taken[number]) for number in chapters]))


def parts_of(toc: Mapping[str, Any]) -> dict[int, str]:
    """Each chapter's part, as the table of contents has them."""
    files = {file["file"]: part["caption"] for part in toc["parts"] for file in part["chapters"]}
    return {int(name[10:12]): caption for name, caption in files.items() if name.startswith("notebooks/")}


def _ways(taken: Mapping[int, tuple[int, float | None]]) -> list[dict[str, Any]]:
    rows = []
    for who, numbers in PATHS.values():
        there = [number for number in numbers if number in taken]
        read, run = sum(taken[number][0] for number in there), [taken[number][1] for number in there]
        links = ", ".join(str(number) for number in numbers)
        rows.append({"you are": who, "chapters": links, "to read": f"{read} min", "to run": _shown(run)})
    return rows


def _shown(run: Sequence[float | None]) -> str:
    return "–" if None in run else f"{max(1, sum(run)):.0f} min"


def _row(chapter: Chapter, taken: tuple[int, float | None]) -> dict[str, Any]:
    title = f'<a href="notebooks/{chapter.slug}.html">{chapter.number} · {html.escape(_plain(chapter.title))}</a>'
    needed = ", ".join(map(str, needs(chapter))) or "nothing"
    return {"chapter": title, "needs": needed, "to read": f"{taken[0]} min", "to run": _shown([taken[1]])}


def _plain(title: str) -> str:
    return re.sub(r"[$`*\\]", "", title)


# -- the drawing -------------------------------------------------------------------------------------------------------


def places(wanted: Mapping[int, Sequence[int]], parts: Mapping[int, str]) -> dict[int, tuple[int, int]]:
    """Column and row of each chapter: as far right as what it needs is long, its part's chapters below each other."""
    column: dict[int, int] = {}
    for number in sorted(wanted):
        column[number] = 1 + max((column[needed] for needed in wanted[number] if needed in column), default=-1)
    found, first = {}, 0
    for part in dict.fromkeys(parts[number] for number in sorted(wanted, key=list(parts).index)):
        taken: dict[int, int] = {}
        for number in (number for number in parts if parts[number] == part and number in wanted):
            row = taken.get(column[number], first)
            found[number], taken[column[number]] = (column[number], row), row + 1
        first = max(taken.values())
    return found


def drawing(chapters: Mapping[int, Chapter], parts: Mapping[int, str]) -> str:
    """The chapters as boxes that lead to their pages, with an arrow from each to those that need it."""
    wanted = {number: needs(chapter) for number, chapter in chapters.items()}
    at = {number: (STEP * x + 4, ROW * y + 4) for number, (x, y) in places(wanted, parts).items()}
    arrows = [_arrow(at[needed], at[number]) for number in at for needed in wanted[number] if needed in at]
    boxes = [_box(chapters[number], at[number]) for number in at]
    size = f"0 0 {max(x for x, _ in at.values()) + WIDE + 4} {max(y for _, y in at.values()) + HIGH + 4}"
    head = f'<svg viewBox="{size}" role="group" aria-label="Chapters, with arrows from each to those that need it">'
    return "\n".join([head, *arrows, *boxes, "</svg>"])


def _arrow(start: tuple[int, int], end: tuple[int, int]) -> str:
    x, y, to_x, to_y = start[0] + WIDE, start[1] + HIGH // 2, end[0] - 1, end[1] + HIGH // 2
    bend = to_x - (STEP - WIDE)
    return f'<path class="arrow" d="M{x} {y}H{bend}C{bend + 16} {y} {to_x - 18} {to_y} {to_x} {to_y}m-6-4 6 4-6 4"/>'


def _box(chapter: Chapter, place: tuple[int, int]) -> str:
    x, y = place
    lines = textwrap.wrap(f"{chapter.number} · {_plain(chapter.title)}", 22, max_lines=3, placeholder=" …")
    top = y + HIGH / 2 + 4 - 7.5 * (len(lines) - 1)
    rows = [f'<tspan x="{x + 8}" y="{top + 15 * i}">{html.escape(line)}</tspan>' for i, line in enumerate(lines)]
    ways = " ".join(name for name, (_, numbers) in PATHS.items() if chapter.number in numbers)
    box = f'<rect x="{x}" y="{y}" width="{WIDE}" height="{HIGH}" rx="7"/><text>{"".join(rows)}</text>'
    return f'<a class="{ways}" href="notebooks/{chapter.slug}.html">{box}</a>'
