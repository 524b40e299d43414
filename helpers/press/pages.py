"""What pages made from records share, and the performance page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pydantic import model_validator

from helpers import settings
from helpers.press.chapters import Job
from helpers.press.claims import read_json
from helpers.press.rules import Strict, validated
from helpers.press.tables import MOST_COLUMNS, Table, table

CODE = re.compile(r"(`[^`<>]+`)")


def plain(text: str) -> str:
    """Text of a record or of the register's plain fields, with nothing in it that Markdown would act on but code."""
    parts = CODE.split(" ".join(text.split()))
    parts[::2] = [re.sub(r"([\\`*_{}\[\]<>$|~])", r"\\\1", part) for part in parts[::2]]
    return "".join(parts)


def _coded(text: str) -> str:
    return CODE.sub(lambda found: f"<code>{found[1].strip('`')}</code>", html.escape(text))


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
NO_GPU = "No GPU has run this; what one should do in 15 minutes (`python -m benchmarks.gpu`) is rehearsed on a CPU.\n"


class Target(Strict):
    what: str
    target: str
    measured: float
    met: bool


class Benchmark(Strict):
    """One file of `benchmarks/results` (its form is in `benchmarks/README.md`)."""

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


def spent(jobs: Sequence[Job]) -> list[dict[str, Any]]:
    """Seconds of each chapter's last run, and of what it computed for good: converted, harvested, trained.

    Grids compute in several processes at once, so this can be more than the chapter took. The last row is of all.
    """
    rows = []
    for job in jobs:
        stamp = read_json(job.stamp, "delete it, and its chapter runs again")
        computed = stamp.get("made", {})
        kinds = ", ".join(f"{kind} {seconds:.0f}" for kind, seconds in sorted(computed.items()) if seconds >= 0.5)
        row = {"chapter": str(job.chapter.number), "seconds": stamp["seconds"]}
        rows.append(row | {"computed": round(sum(computed.values()), 1), "of these": kinds})
    sums = {each: round(sum(row[each] for row in rows), 1) for each in ("seconds", "computed")}
    return [*rows, {"chapter": "all"} | sums | {"of these": ""}]


def performance_markdown(results: Path = BENCHMARKS, jobs: Sequence[Job] = ()) -> str:
    """The page: a section a benchmark, and one on the last runs of `jobs`.

    Raises `ValueError` naming a file that is damaged or of another form.
    """
    cure = "run `make bench` again or delete it"
    benchmarks = [validated(Benchmark, read_json(path, cure), path.name) for path in sorted(results.glob("*.json"))]
    own = _this_copy(jobs) if jobs else ""
    if not benchmarks:
        return f"{INTRODUCTION}\n{own}\nNo benchmark has been run in this copy of the book.\n"
    targets = [target for benchmark in benchmarks for target in benchmark.targets]
    met = sum(target.met for target in targets)
    count = f"**{met} of {len(targets)} targets are met.**\n" if targets else ""
    gpu = NO_GPU * all(each.name != "gpu" for each in benchmarks)
    return "\n".join([INTRODUCTION, count + gpu, own, *map(_section, benchmarks)])


def _this_copy(jobs: Sequence[Job]) -> str:
    rows = spent(jobs)
    what = "Seconds of each chapter when it last ran here, and of what it computed for good in them: the teachers it "
    what += "converted, the activations it harvested, the students it trained. A chapter that finds these in the cache "
    what += "computes nothing; grids compute in several processes at once."
    return "\n".join(["## This copy of the book\n", what, "\n```{raw} html", table(rows), "```\n"])


WRONG = ("half files", "left over", "processes left", "without our sentence", "not noticed", "ends that differ")
"""Columns of the faults that must be zero."""
HEADS = {
    "m": "width",
    "d_model": "width",
    "n": "features",
    "n_features": "features",
    "k": "active",
    "d": "values a feature",
    "W_down": "down weights",
    "PC1 (s)": "first direction (s)",
    "ε": "error bound",
    "work of 8 at once / alone": "work of 8 at once",
}
"""What a benchmark's column is called on the page."""
LONGEST = 12  # rows of a table that stands open


def measured(rows: Sequence[dict[str, Any]]) -> Table:
    """A benchmark's rows as a table: without widths of middle halves, and no more columns than fit; what went wrong
    under faults is one column, and how many flipped bytes were named is told beside how many there were."""
    shown = []
    for row in rows:
        row = dict(row)
        if set(WRONG) <= set(row):
            row["what went wrong in all"] = sum(row[name] or 0 for name in WRONG)
            if row["named"] is not None:  # none is flipped in a sweep
                row["flipped bytes"] = f"{row['flipped bytes']:g} ({row['named']:g} named)"
            row["work of 8 at once / alone"] = row.pop("work of 8 at once / alone")
            gone = {*WRONG, "named", "ends compared"}
        else:
            gone = {name for name in row if "iqr" in name or name.startswith("range of")}
        shown.append({name: value for name, value in row.items() if name not in gone})
    width = {"d": "width"} if "k" not in rows[0] and "m" not in rows[0] else {}
    return Table([dict(list(row.items())[:MOST_COLUMNS]) for row in shown], HEADS | width)


def _section(benchmark: Benchmark) -> str:
    parts = [f"## {plain(benchmark.title)}\n", f"{plain(benchmark.question)}\n"]
    if benchmark.targets:
        met = {True: "✓ met", False: "✗ missed"}
        what = ((_coded(t.what), html.escape(t.target), t.measured, met[t.met]) for t in benchmark.targets)
        targets = [dict(zip(("target", "asked", "measured", "met"), each, strict=True)) for each in what]
        parts += ["```{raw} html", table(targets), "```\n"]
    if rows := benchmark.rows:
        lines = ["```{raw} html", measured(rows)._repr_html_(), "```"]
        if len(rows) > LONGEST:
            lines = [f":::{{dropdown}} All {len(rows)} rows", *lines, ":::"]
        parts += [*lines, f"\nAll columns: {{download}}`{benchmark.name}.json <benchmarks/{benchmark.name}.json>`\n"]
    about = f"{plain(benchmark.note)} Measured on: {plain(machine(benchmark.environment))}."
    return "\n".join([*parts, f"<small>{about}</small>\n"])
