"""`python -m benchmarks [NAME …]`: run the benchmarks one after another, each in a fresh process."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
LAST = "book"  # it collects what the others wrote
APART = {"__init__", "__main__", "common", "soak", "mutations", "gpu"}  # hours, and a GPU


def names() -> list[str]:
    found = sorted(path.stem for path in HERE.glob("*.py") if path.stem not in APART)
    return [name for name in found if name != LAST] + [name for name in found if name == LAST]


def main(wanted: list[str]) -> int:
    if unknown := [name for name in wanted if name not in names()]:
        print(f"error: no benchmark {', '.join(unknown)}; there are: {', '.join(names())}", file=sys.stderr)
        return 2
    chosen, failed = wanted or names(), []
    for number, name in enumerate(chosen, 1):
        print(f"== {number}/{len(chosen)} {name}", flush=True)
        started = time.perf_counter()
        if subprocess.run([sys.executable, "-m", f"benchmarks.{name}"], cwd=HERE.parent, check=False).returncode:
            failed.append(name)
        print(f"   {time.perf_counter() - started:.0f} s", flush=True)
    if failed:
        print(f"error: failed: {', '.join(failed)}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
