"""How long the book takes: its chapters as last executed in the quick profile, and the teacher's first conversion."""

from __future__ import annotations

import heapq
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from threading import Event
from types import SimpleNamespace

from benchmarks import common
from helpers.models import sources
from helpers.press import chapters, execution, pages

PROFILE = "quick"


def chapters_took() -> tuple[list[dict], dict]:
    """What each chapter's last execution took (kernel start and imports included), and all of them in one run."""
    jobs = chapters.plan((), PROFILE)
    whole = jobs[0].executed.parent / execution.WHOLE
    if not whole.is_file() or any(not job.stamp.is_file() for job in jobs):
        sys.exit("error: not all chapters were run at once; run `make clean book` with an empty cache first")
    if "teachers" not in "".join(row["of these"] for row in pages.spent(jobs)):
        sys.exit("error: the cache was not empty when the chapters ran; run the book with another RANK1_CACHE first")
    return pages.spent(jobs), json.loads(whole.read_text(encoding="utf-8"))


def simulated(jobs: Sequence[chapters.Job], seconds: Sequence[float], at_once: int) -> float:
    """Seconds from the first to the last where `at_once` chapters have a core each, in the order of the book's queue,
    and none waits for what another makes."""
    queue = execution.Queue([(job, ()) for job in jobs], SimpleNamespace(halted=Event()))
    took, running, now = dict(zip([job.chapter.number for job in jobs], seconds, strict=True)), [], 0.0
    while True:
        while len(running) < at_once and (taken := queue.take()):
            heapq.heappush(running, (now + took[taken[1].chapter.number], taken[0], taken[1]))
        if not running:
            return now
        now, _, job = heapq.heappop(running)
        queue.taken.remove(job)


def conversion_seconds() -> float:
    """Converts the embedded teacher into an empty cache, which is thrown away after."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        sources.gemma(cache)
        return time.perf_counter() - started


def main(repeats: int = 3) -> None:
    each, whole = chapters_took()
    converted = statistics.median(conversion_seconds() for _ in range(repeats))
    longest = max(each[:-1], key=lambda row: row["seconds"])
    computed = each[-1]["computed"]
    jobs, seconds = chapters.plan((), PROFILE), [row["seconds"] for row in each[:-1]]
    more = ", ".join(f"{simulated(jobs, seconds, n):.0f} s for {n}" for n in (1, 2, 4, 8, 16))
    common.write(
        "book",
        title="The whole book",
        question=f"How long does `make book` take, profile {PROFILE}?",
        rows=each,
        targets=[
            common.at_most("all chapters, seconds from the first to the last", whole["seconds"], 600),
            common.at_most(f"longest chapter ({longest['chapter']}), seconds", longest["seconds"], 60),
            common.at_most("one core's seconds, over those to compute for good", each[-1]["seconds"] / computed, 2.2),
            common.at_most("first conversion of the teacher, seconds", converted, 60),
        ],
        note=f"All chapters anew, {whole['at_once']} side by side on {whole['cores']} cores: each one's seconds are "
        f"longer than alone. Simulated from these seconds, a core for each chapter that runs: {more} side by side; "
        f"the longest chapter is the end of that. Conversion: median of {repeats}, each into an empty cache. Building "
        "the pages from the executed chapters comes on top.",
    )


if __name__ == "__main__":
    main()
