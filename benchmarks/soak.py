"""The checks that take minutes, run whole, and how long each took: `make soak`.

`python -m benchmarks.soak tests/press/test_inputs.py` runs some of them; lines of the others stay in the record.
"""

from __future__ import annotations

import json
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
from helpers.press.claims import environment

OUTCOMES = ("passed", "failed", "skipped")


def files() -> list[str]:
    """Those with such tests."""
    tests = (settings.ROOT / "tests").rglob("test_*.py")
    return sorted(str(path) for path in tests if re.search("mark.(soak|whole)", path.read_text("utf-8")))


def run(report: Path, *chosen: str) -> None:
    """All tests that are marked `soak` or `whole`, or those of files that are `chosen`, side by side, a thread each;
    what came of them goes to `report`."""
    spread = ["-n", "auto", "--dist", "worksteal"]
    options = ["-m", "soak or whole", "--timeout=0", f"--junitxml={report}", *(chosen or files())]
    threads = os.environ | {"OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, "-m", "pytest", *spread, *options], cwd=settings.ROOT, env=threads, check=False)


def rows(report: Path) -> list[dict[str, Any]]:
    """For each test its cases by outcome, their seconds together, and why some were skipped."""
    found: dict[str, Counter] = {}
    why: dict[str, set[str]] = {}
    for case in ElementTree.parse(report).iter("testcase"):
        name = case.get("name", "").partition("[")[0].removeprefix("test_").replace("_", " ")
        skipped = case.find("skipped")
        bad = case.find("failure") is not None or case.find("error") is not None
        counts = found.setdefault(name, Counter())
        counts["failed" if bad else "passed" if skipped is None else "skipped"] += 1
        counts["seconds"] += float(case.get("time", 0))
        why.setdefault(name, set()).update([] if skipped is None else [skipped.get("message", "")])
    commit = environment("cpu")["commit"]
    return [
        {"check": name} | {each: counts[each] for each in ("seconds", *OUTCOMES)}
        | {"skipped because": ", ".join(sorted(why[name])), "commit": commit}
        for name, counts in found.items()
    ]  # fmt: skip


def write(found: list[dict[str, Any]]) -> None:
    """The record; checks that did not run again stay in it."""
    path = common.RESULTS / "soak.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    found = list({row["check"]: row for row in (*before, *found)}.values())
    cases, bad = (sum(sum(row[each] for each in of) for row in found) for of in (OUTCOMES, ("failed",)))
    common.write(
        "soak",
        title="What takes minutes to check",
        question="Are wrong questions refused, stops survived and texts read in every case, not in a sample alone?",
        rows=found,
        targets=[common.at_most(f"cases that fail, of {cases}", bad, 0)],
        note="Every command of the tables of wrong questions, stops at many moments, every chapter on every kind of "
        "text, every causal class of transformers. Seconds are those of one core that others share; each line was made "
        "at its own commit. Kills, full disks and flipped bytes are the section Reliability.",
        device="cpu",
    )


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        run(report, *sys.argv[1:])
        found = rows(report)
    write(found)
    return int(any(row["failed"] for row in found) or not found)


if __name__ == "__main__":
    sys.exit(main())
