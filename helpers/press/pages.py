"""What pages made from numbers share, a table and a number as a reader sees it, and the performance page."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from helpers import settings
from helpers.press.claims import read_json
from helpers.press.rules import validated


def plain(text: str) -> str:
    """Text of a record or of the register's plain fields, with nothing in it that Markdown would act on."""
    return re.sub(r"([\\`*_{}\[\]<>$|~])", r"\\\1", " ".join(text.split()))


def number(value: float, ci: tuple[float, float] | None = None) -> str:
    """A value with its interval, all with as many decimals as give the larger of value and half-width three digits."""
    low, high = ci or (value, value)
    size = max(abs(value), (high - low) / 2)
    if size and not 1e-4 <= size < 1e6:
        power = math.floor(math.log10(size))
        shown = [f"{each / 10**power:.2g}" for each in (value, low, high)]
        unit = "×10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    else:
        whole = all(each == int(each) for each in (value, low, high))
        decimals = 0 if whole else max(0, 2 - math.floor(math.log10(size)))
        shown, unit = [f"{each:,.{decimals}f}" for each in (value, low, high)], ""
    value_shown, low_shown, high_shown = (each.replace("-", "−") for each in shown)
    return f"{value_shown} [{low_shown}, {high_shown}]{unit}" if ci else value_shown + unit


def table(rows: Sequence[dict[str, Any]], numeric: dict[str, bool] | None = None) -> str:
    """Rows as an HTML table, numbers set to the right; strings are HTML. Scrolls by itself on a narrow screen.

    `numeric` says which columns hold numbers where their values are written already.
    """
    columns = numeric or {name: all(isinstance(row[name], int | float | None) for row in rows) for name in rows[0]}
    kinds = {name: ' class="number"' if numeric else "" for name, numeric in columns.items()}
    head = "".join(f'<th scope="col"{kinds[name]}>{html.escape(name)}</th>' for name in columns)
    body = ["<tr>" + "".join(f"<td{kinds[name]}>{_cell(row[name])}</td>" for name in columns) + "</tr>" for row in rows]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"
    return f'<div class="wide-table" tabindex="0" role="group" aria-label="table">{table}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def machine(environment: dict[str, Any]) -> str:
    """Where and when a run was made, in a line."""
    device, threads, torch, commit, date = map(environment.get, ("device", "threads", "torch", "commit", "date"))
    return f"{device}, {threads} threads, torch {torch}, commit {commit or 'unknown'}, {date}"


# -- performance -------------------------------------------------------------------------------------------------------

BENCHMARKS = settings.ROOT / "benchmarks" / "results"

INTRODUCTION = """# Performance

How fast the book's own code is, beside its peers, how long the book takes, and what faults it survives (Reliability).

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
    parts = [f"## {plain(benchmark.title)}\n", f"{plain(benchmark.question)}\n", "```{raw} html"]
    targets = [
        {"Target": t.what, "Asked": t.target, "Measured": t.measured, "Met": "✓ met" if t.met else "✗ missed"}
        for t in benchmark.targets
    ]
    for rows in filter(None, (targets, benchmark.rows)):
        escaped = [{k: html.escape(v) if isinstance(v, str) else v for k, v in row.items()} for row in rows]
        parts.append(table(escaped))
    about = f"{plain(benchmark.note)} Measured on: {plain(machine(benchmark.environment))}."
    return "\n".join([*parts, "```\n", f"<small>{about}</small>\n"])
