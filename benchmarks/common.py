"""What every benchmark shares: timing side by side in one run, and the form of its results (see README.md)."""

from __future__ import annotations

import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm

from helpers.press.claims import environment
from helpers.settings import write_json

RESULTS = Path(__file__).resolve().parent / "results"


def interleave(
    callables: Mapping[str, Callable[[int], Any]], repeats: int = 11, warmup: int = 1
) -> dict[str, dict[str, float]]:
    """Times every callable once per round, so that a slow moment of the machine falls on all of them alike.

    Each is called with the number of the round; the first `warmup` rounds are not counted. Returns seconds, by name:
    `median`, `iqr` (the width of the middle half) and `min`.
    """
    if repeats < 3:
        raise ValueError(f"repeats={repeats}: allowed: 3 or more, since quartiles are reported")
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for turn in tqdm(range(warmup + repeats), desc="rounds", mininterval=2):
        for name, call in callables.items():
            _wait()
            started = time.perf_counter()
            call(turn)
            _wait()
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - started)
    return {name: _summary(times) for name, times in seconds.items()}


def processor() -> str:
    """The CPU's name, how many threads are used, and what it multiplies in few bits."""
    names = [line.partition(":")[2].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")]
    fast = {"int8": torch.cpu._is_vnni_supported(), "bfloat16": torch.cpu._is_avx512_bf16_supported()}
    halves = " and ".join(name for name, has in fast.items() if has) or "nothing below float32"
    name = names[0] if names else platform.processor() or "an unnamed processor"
    return f"{name}, {torch.get_num_threads()} threads, which multiplies {halves} itself"


def _lines(path: str) -> list[str]:
    return Path(path).read_text().splitlines() if Path(path).exists() else []


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def memory(field: str) -> float:
    """MiB of this process: `VmRSS` now, `VmHWM` at most so far (Linux; `ru_maxrss` would count its parent's)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(lines[field].split()[0]) / 2**10


def separately(module: str, names: Sequence[str], runs: int = 3) -> dict[str, list[Any]]:
    """What `python -m benchmarks.MODULE once NAME FILE` wrote, `runs` times for each name, a process each time."""
    found: dict[str, list[Any]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "found.json"
        for _ in range(runs):
            for name in names:
                command = [sys.executable, "-m", f"benchmarks.{module}", "once", name, str(path)]
                subprocess.run(command, check=True)
                found[name].append(json.loads(path.read_text(encoding="utf-8")))
    return found


def over_runs(times: Sequence[Mapping[str, float]], ours: str) -> dict[str, dict[str, float]]:
    """By name the median over separate runs, and the lowest and the highest ratio to `ours` of any run."""
    found = {}
    for name in times[0]:
        ratios = [run[name] / run[ours] for run in times]
        found[name] = {"median": statistics.median(run[name] for run in times)}
        found[name] |= {"lowest": min(ratios), "highest": max(ratios)}
    return found


def _summary(times: Sequence[float]) -> dict[str, float]:
    low, median, high = statistics.quantiles(times, n=4, method="inclusive")
    return {"median": median, "iqr": high - low, "min": min(times)}


def at_least(what: str, measured: float, target: float) -> dict[str, Any]:
    return {"what": what, "target": f"≥ {target:g}", "measured": measured, "met": bool(measured >= target)}


def at_most(what: str, measured: float, target: float) -> dict[str, Any]:
    return {"what": what, "target": f"≤ {target:g}", "measured": measured, "met": bool(measured <= target)}


def write(
    name: str,
    *,
    title: str,
    question: str,
    rows: Sequence[Mapping[str, Any]],
    targets: Sequence[Mapping[str, Any]] = (),
    note: str = "",
    device: str = "auto",
) -> Path:
    """Writes `results/<name>.json` (atomically) and prints which targets were met."""
    path = RESULTS / f"{name}.json"
    content = {"name": name, "title": title, "question": question, "environment": environment(device)}
    write_json(path, {**content, "rows": list(rows), "targets": list(targets), "note": note})
    for target in targets:
        print(
            f"{'met   ' if target['met'] else 'MISSED'} {target['what']}: {target['measured']:.3g} ({target['target']})"
        )
    return path
