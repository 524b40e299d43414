"""Kills, full disks, flipped bytes and eight processes at once: a sample of `benchmarks faults`, and its record."""

import json
import os
import subprocess
import sys

import pytest

from benchmarks import common
from helpers import settings

pytest.importorskip("resource", reason="no limits of resources here, by which a disk is full")
from benchmarks import faults  # noqa: E402

SAMPLE = [name for name, work in faults.WORKS.items() if not work.slow]
SCRIPT = """
import json, sys
from benchmarks import faults
for row, bad in faults.measure(sys.argv[1:], 1):
    print("found", json.dumps([row, bad]))
"""


@pytest.fixture(scope="module")
def sample():
    """Each fault once for each work that takes seconds."""
    code = [sys.executable, "-c", SCRIPT, *SAMPLE]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(code, capture_output=True, text=True, cwd=settings.ROOT, env=quiet)
    assert not done.returncode, done.stderr
    found = [json.loads(line.removeprefix("found ")) for line in done.stdout.splitlines() if line.startswith("found ")]
    return {row["work"]: (row, bad) for row, bad in found}


@pytest.mark.parametrize("name", SAMPLE)
def test_one_of_each_fault_is_survived(sample, name):
    row, bad = sample[name]
    assert not bad and not any(row[column] for column in faults.NEVER)
    assert row["kills"] == row["full disks"] == 1 and row["named"] > 0
    assert row["work of 8 at once / alone"] == 1 or name == "trial"


def test_nothing_was_missed_in_the_record():
    record = json.loads((common.RESULTS / "faults.json").read_text(encoding="utf-8"))
    assert all(target["met"] for target in record["targets"])
    assert [row["work"] for row in record["rows"]] == list(faults.WORKS)
