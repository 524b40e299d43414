"""The checks that take minutes, run whole, and how long each took: `make soak`.

`python -m benchmarks.soak tests/press/test_inputs.py` runs some of them, and writes no record.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

from benchmarks import common
from helpers import settings

OUTCOMES = ("passed", "failed", "skipped")


def files() -> list[str]:
    """Those with such tests; that of the faults takes half of the time and comes first."""
    tests = (settings.ROOT / "tests").rglob("test_*.py")
    marked = [path for path in tests if re.search("mark.(soak|whole)", path.read_text("utf-8"))]
    return sorted(map(str, marked), key=lambda name: (not name.endswith("test_faults.py"), name))


def run(report: Path, *chosen: str) -> None:
    """All tests that are marked `soak` or `whole`, or those of files that are `chosen`; what came of them goes to
    `report`. Files run side by side, a thread each."""
    spread = ["-n", "auto", "--dist", "loadfile", "--no-loadscope-reorder"]
    options = ["-m", "soak or whole", "--timeout=0", f"--junitxml={report}", *(chosen or files())]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "pytest", *spread, *options], cwd=settings.ROOT, env=environment, check=False)


def rows(report: Path) -> tuple[list[dict[str, Any]], list[str]]:
    """For each test its cases by outcome and their seconds together, and why cases were skipped."""
    found: dict[str, Counter] = {}
    why: set[str] = set()
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        skipped = case.find("skipped")
        bad = case.find("failure") is not None or case.find("error") is not None
        counts = found.setdefault(name, Counter())
        counts["failed" if bad else "passed" if skipped is None else "skipped"] += 1
        counts["seconds"] += float(case.get("time", 0))
        if skipped is not None:
            why.add(f"{name}: {skipped.get('message', '')}")
    columns = ("seconds", *OUTCOMES)
    return [{"check": name} | {each: counts[each] for each in columns} for name, counts in found.items()], sorted(why)


def write(found: list[dict[str, Any]], why: list[str]) -> None:
    cases, bad = (sum(sum(row[each] for each in of) for row in found) for of in (OUTCOMES, ("failed",)))
    reasons = f" Skipped: {'; '.join(why)}." if why else " No case was skipped."
    common.write(
        "soak",
        title="What takes minutes to check",
        question="Are wrong questions refused, stops survived and texts read in every case, not in a sample alone?",
        rows=found,
        targets=[common.at_most(f"cases that fail, of {cases}", bad, 0)],
        note=f"Every command of the tables of wrong questions, stops at many moments, every chapter on every kind of "
        f"text, every causal class of transformers, and all faults of the section Reliability.{reasons}",
        device="cpu",
    )


def main() -> int:
    chosen = sys.argv[1:]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run(report, *chosen)
        found, why = rows(report)
    if chosen:
        print(*found, *why, sep="\n")
    else:
        write(found, why)
    return int(any(row["failed"] for row in found) or not found)


if __name__ == "__main__":
    sys.exit(main())
