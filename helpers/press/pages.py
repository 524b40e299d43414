"""What pages made from records share, and the performance page."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure
from pydantic import model_validator

from helpers import settings
from helpers.press import figures
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


def rich(text: str) -> str:
    """Text of the register as HTML: `$…$` is typeset, `` `…` `` is code, everything else is as it stands."""
    text = html.escape(" ".join(text.split()))
    text = re.sub(r"\$([^$]+)\$", r'<span class="math notranslate nohighlight">\\(\1\\)</span>', text)
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", text)


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
            gone = {name for name in row if "iqr" in name or name.startswith("range of") or name == "points"}
        shown.append({name: value for name, value in row.items() if name not in gone})
    width = {"d": "width"} if "k" not in rows[0] and "m" not in rows[0] else {}
    return Table([dict(list(row.items())[:MOST_COLUMNS]) for row in shown], HEADS | width)


def _section(benchmark: Benchmark) -> str:
    parts = [f"## {plain(benchmark.title)}\n", f"{plain(benchmark.question)}\n"]
    if benchmark.targets:
        met = {True: "✓ met", False: "✗ missed"}
        what = ((rich(t.what), html.escape(t.target), t.measured, met[t.met]) for t in benchmark.targets)
        targets = [dict(zip(("target", "asked", "measured", "met"), each, strict=True)) for each in what]
        parts += ["```{raw} html", table(targets), "```\n"]
    if rows := benchmark.rows:
        parts += [_figure(benchmark.name, number, *each) for number, each in enumerate(_kernels(rows))]
        lines = ["```{raw} html", measured(rows)._repr_html_(), "```"]
        if len(rows) > LONGEST:
            lines = [f":::{{dropdown}} All {len(rows)} rows", *lines, ":::"]
        parts += [*lines, f"\nAll columns: {{download}}`{benchmark.name}.json <benchmarks/{benchmark.name}.json>`\n"]
    about = f"{plain(benchmark.note)} Measured on: {plain(machine(benchmark.environment))}."
    return "\n".join([*parts, f"<small>{about}</small>\n"])


# -- how times grow ----------------------------------------------------------------------------------------------------


def _kernels(rows: Sequence[dict[str, Any]]) -> list[tuple[str, list[dict[str, Any]]]]:
    """Rows that have `points` (what was varied, milliseconds), by their kernel; none where rows have no points."""
    timed = [row for row in rows if "points" in row]
    return [(kernel, list(each)) for kernel, each in groupby(timed, lambda row: row["kernel"])]


def _figure(name: str, number: int, kernel: str, rows: Sequence[dict[str, Any]]) -> str:
    """A figure of `draw_growth` on the page; its caption says how many times as long as ours the best peer takes."""
    peers: dict[tuple, float] = {}  # the best one's milliseconds, by what was varied and its value
    for row in (row for row in rows if "this book" not in row["who"]):
        for value, ms in row["points"]:
            peers[row["varied"], value] = min(ms, peers.get((row["varied"], value), ms))
    ours = {(row["varied"], value): ms for row in rows if row["who"] == "this book" for value, ms in row["points"]}
    times = [peers[where] / ms for where, ms in ours.items() if where in peers] or [1.0]
    best = f": the best peer takes {min(times):.2g} to {max(times):.2g} times as long as this book" if peers else ""
    alt = "Milliseconds over sizes, both on logarithmic axes: a line for this book and one for each peer."
    figure = f"```{{figure}} benchmarks/{name}-{number}.svg\n:alt: {alt}\n\n"
    figure += f"**One {plain(kernel)} over two decades of each size{best}.** The rest stays as noted below.\n```\n"
    opened, closed = (f"```{{raw}} html\n{tag}\n```\n" for tag in ('<div class="cell_output">', "</div>"))
    return opened + figure + closed


def draw_growth(folder: Path, results: Path = BENCHMARKS) -> None:
    """Draw times over sizes, a figure a kernel, into `folder`, for every benchmark whose rows have `points`."""
    for path in sorted(results.glob("*.json")):
        rows = read_json(path, "run `make bench` again or delete it")["rows"]
        for number, (_, each) in enumerate(_kernels(rows)):
            with rc_context(figures.STYLE):
                _drawn(each).savefig(folder / f"{path.stem}-{number}.svg", metadata={"Date": None})


def _drawn(rows: Sequence[dict[str, Any]]) -> Figure:
    """A panel for each size that was varied, a curve for everyone who was timed: at most three."""
    varied, everyone = (list(dict.fromkeys(row[name] for row in rows)) for name in ("varied", "who"))
    figure = Figure(figsize=(9.6, 3.4))
    panels = figure.subplots(1, len(varied), sharey=True)
    for panel, size in zip(panels, varied, strict=True):
        for row in (row for row in rows if row["varied"] == size):
            look = figures.line(("one", "two", "three")[everyone.index(row["who"])], label=row["who"])
            panel.plot(*zip(*row["points"], strict=True), **look)
        panel.set(xscale="log", yscale="log", xlabel=size)
    panels[0].set_ylabel("milliseconds")
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper left", ncols=len(everyone))
    return figure
