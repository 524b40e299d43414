"""The performance page, made from `benchmarks/results/*.json` (their form is in `benchmarks/README.md`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from helpers import settings
from helpers.press.claims import plain, validated

RESULTS = settings.ROOT / "benchmarks" / "results"

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
    """One file of `benchmarks/results`."""

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


def performance_markdown(results: Path = RESULTS) -> str:
    """The page, one section a benchmark. Raises `ValueError` naming a file that is damaged or of another form."""
    benchmarks = [_read(path) for path in sorted(Path(results).glob("*.json"))]
    if not benchmarks:
        return f"{INTRODUCTION}\nNo benchmark has been run in this copy of the book.\n"
    targets = [target for benchmark in benchmarks for target in benchmark.targets]
    met = sum(target.met for target in targets)
    count = f"**{met} of {len(targets)} targets are met.**\n" if targets else ""
    return "\n".join([INTRODUCTION, count, *map(_section, benchmarks)])


def _read(path: Path) -> Benchmark:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path.name} is damaged ({error}); run `make bench` again or delete it") from error
    return validated(Benchmark, content, path.name)


def _section(benchmark: Benchmark) -> str:
    where = benchmark.environment
    machine = (
        f"{where.get('device')}, {where.get('threads')} threads, torch {where.get('torch')}, "
        f"commit {where.get('commit') or 'unknown'}, {where.get('date')}"
    )
    parts = [f"## {plain(benchmark.title)}\n", f"{plain(benchmark.question)}\n"]
    if benchmark.targets:
        rows = [
            {"Target": t.what, "Asked": t.target, "Measured": t.measured, "": "✓ met" if t.met else "✗ missed"}
            for t in benchmark.targets
        ]
        parts.append(_table(rows))
    if benchmark.rows:
        parts.append(_table(benchmark.rows))
    parts.append(f"<small>{plain(benchmark.note)} Measured on: {plain(machine)}.</small>\n")
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
