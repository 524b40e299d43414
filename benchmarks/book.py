"""How long the book takes: its chapters as last executed in the quick profile, and the teacher's first conversion."""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time

from benchmarks import common
from helpers.models import sources
from helpers.press import chapters

PROFILE = "quick"


def chapter_seconds() -> dict[str, float]:
    """Wall time of each chapter's last execution (kernel start and imports included), by slug."""
    jobs = chapters.plan((), PROFILE)
    if missing := [job.chapter.slug for job in jobs if not job.stamp.is_file()]:
        sys.exit(f"error: not executed yet: {', '.join(missing)}; run `make book` first")
    return {job.chapter.slug: json.loads(job.stamp.read_text(encoding="utf-8"))["seconds"] for job in jobs}


def conversion_seconds() -> float:
    """Converts the embedded teacher into an empty cache, which is thrown away after."""
    with tempfile.TemporaryDirectory() as cache:
        started = time.perf_counter()
        sources.gemma(cache)
        return time.perf_counter() - started


def main(repeats: int = 3) -> None:
    chapters_took = chapter_seconds()
    converted = [conversion_seconds() for _ in range(repeats)]
    longest = max(chapters_took, key=chapters_took.get)
    total, median = sum(chapters_took.values()), statistics.median(converted)
    rows = [{"what": slug, "seconds": seconds} for slug, seconds in chapters_took.items()]
    rows += [{"what": "all chapters", "seconds": total}, {"what": "conversion of the teacher", "seconds": median}]
    common.write(
        "book",
        title="The whole book",
        question=f"How long does `make book` take, profile {PROFILE}?",
        rows=rows,
        targets=[
            common.at_most("all chapters so far, seconds", total, 15 * 60),
            common.at_most(f"longest chapter ({longest}), seconds", chapters_took[longest], 90),
            common.at_most("first conversion of the teacher, seconds", median, 60),
        ],
        note="Chapters: their last execution, with the teacher converted; the first one also harvests activations, "
        f"which later runs find in the cache. Conversion: median of {repeats}, each into an empty cache. "
        "Building the pages from the executed chapters comes on top.",
    )


if __name__ == "__main__":
    main()
