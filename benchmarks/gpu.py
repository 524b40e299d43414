"""What a borrowed GPU should do in a quarter of an hour: one command, the most useful first, nothing done twice.

`python -m benchmarks.gpu` runs the jobs below, each in a process of its own that ends with the time that is left, and
keeps what each printed in `_build/gpu15`: called again, it goes on with those that are missing or were cut off.
`python -m benchmarks.gpu rehearse` runs the same code on the CPU at about a hundredth of the size, into
`_build/gpu15_rehearsed`: do it before the GPU's time begins. Two jobs are chapters, with `profiles/gpu15.yml`; finished
cells of theirs are kept as ever. The record is written with as many jobs as there are: `benchmarks/results/gpu.json`.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn import functional as F

from benchmarks import common, students, training
from helpers import settings
from helpers.dictionary import pursuit
from helpers.models import activations, teachers
from helpers.parts import distilling
from helpers.settings import allowed, write_json
from helpers.study import study
from helpers.study.study import Arm
from helpers.training import Shuffled

BUDGET = 15 * 60
"""Seconds of all jobs together."""


@dataclass(frozen=True)
class Scale:
    """Sizes of a run; `REHEARSAL` is what two CPU cores do in a minute or two."""

    device: str
    saes: tuple[int, ...]
    students: tuple[tuple[int, int], ...]
    pursuits: tuple[tuple[int, int, int, int], ...]
    n_tokens: int
    passes: int
    cells: tuple[tuple[int, int], ...]
    batch: int
    repeats: int
    given: Mapping[int, Mapping[str, object]] = field(default_factory=dict)
    """Parameters of a chapter that are not the profile's."""


GPU = Scale(
    device="cuda",
    saes=(16_384, 65_536),
    students=((10_000, 64), (100_000, 64)),
    pursuits=((512, 4096, 32, 4096), (2048, 16_384, 64, 4096)),
    n_tokens=200_000,
    passes=100,
    cells=((64, 10_000), (128, 100_000)),
    batch=1024,
    repeats=21,
)
REHEARSAL = Scale(
    device="cpu",
    saes=(1024,),
    students=((1_000, 32),),
    pursuits=((64, 256, 8, 64),),
    n_tokens=2_000,
    passes=2,
    cells=((16, 200),),
    batch=256,
    repeats=3,
    given={
        5: dict.fromkeys(("n_tokens", "n_validation", "n_held_out", "n_untrained"), 1_200)
        | {"n_ce": 100, "dense_widths": [8], "students": [[8, 40]], "controls": [8, 40], "sixteenth": 200}
        | {"steps": 4, "batch_size": 64, "device": "cpu"},
        9: dict.fromkeys(("n_tokens", "n_validation", "n_held_out"), 1_200)
        | {"n_ce": 100, "n_features": 64, "k": 8, "steps": 6, "batch_size": 64, "device": "cpu"},
    },
)


def steps(of: Scale) -> list[dict]:
    """A step of a TopK SAE beside its peers and one product of its encoder."""
    rows = []
    for n in of.saes:
        stream = Shuffled(training.data(), batch_size=of.batch, fingerprint="bench", device=of.device)
        calls = {"this book": training.ours(n, stream)[0], "plain dense": training.plain_dense(n, stream, True)}
        calls["encoder's product"] = training.floor(n, stream)["floor: encoder GEMM"]
        try:
            calls["eai-sparsify"] = training.sparsify(n, stream, fused=True)
        except ImportError as error:  # a peer of the benchmarks: without it the others are measured
            print(f"eai-sparsify is left out: {error}", flush=True)
        rows += _rows(f"SAE step, n={n:,}", calls, of)
    return rows


def student_steps(of: Scale) -> list[dict]:
    """A step of a sparse student beside one that gathers its experts' weights."""
    rows = []
    for n, k in of.students:
        calls = {"this book": students.ours(n, k, of.device), "gathers": students.gathering(n, k, True, of.device)}
        rows += _rows(f"student's step, E={n:,}, k={k}", calls, of)
    return rows


def pursuits(of: Scale) -> list[dict]:
    """Orthogonal matching pursuit beside omp-gpu, which was written for a GPU."""
    rows = []
    for m, n, k, batch in of.pursuits:
        random = settings.generator(0)
        atoms = F.normalize(torch.randn(n, m, generator=random), dim=1).to(of.device)
        x = torch.randn(batch, m, generator=random).to(of.device)
        calls = {"this book": lambda turn, x=x, atoms=atoms, k=k: pursuit.omp(x, atoms, k)}
        try:
            from orthogonal_matching_pursuit_gpu import run_omp

            theirs = partial(run_omp, precompute=None, normalize=False, fit_intercept=False, alg="naive")
            given = atoms.T.contiguous(), x, k
            calls["omp-gpu"] = lambda turn, theirs=theirs, given=given: theirs(*given)
        except ImportError as error:
            print(f"omp-gpu is left out: {error}", flush=True)
        rows += _rows(f"OMP of {batch:,} signals, {m}×{n:,}, k={k}", calls, of)
    return rows


def _rows(what: str, calls: Mapping[str, Callable[[int], object]], of: Scale) -> list[dict]:
    times = common.interleave(calls, of.repeats)
    mine = times["this book"]["median"]
    return [
        {"what": what, "who": who, "ms": 1e3 * t["median"], "/ ours": t["median"] / mine} for who, t in times.items()
    ]


def _harvested(of: Scale) -> tuple[teachers.Teacher, dict]:
    teacher = teachers.load(device=of.device)
    sizes = {"train": of.n_tokens, "validation": of.n_tokens // 10, "test": of.n_tokens // 10}
    how = {"layer": 9, "sites": ["mlp_in"]}
    return teacher, {split: activations.harvest(teacher, **how, n_tokens=n, split=split) for split, n in sizes.items()}


def harvests(of: Scale) -> list[dict]:
    """Tokens a second of a harvest to layer 9; the rows stay for `contrast`."""
    started = time.perf_counter()
    rows = sum(len(store) for store in _harvested(of)[1].values())
    seconds = time.perf_counter() - started
    return [
        {"what": f"harvest of {rows:,} tokens", "who": "this book", "ms": 1e3 * seconds, "tokens / s": rows / seconds}
    ]


def contrast(of: Scale) -> list[dict]:
    """Chapter 5's cells at the paper's sizes and passes: what sparsity gains, on real rows and on the Gaussian."""
    teacher, stores = _harvested(of)
    how = {"steps": of.passes * len(stores["train"]) // of.batch, "batch_size": of.batch}
    noise, rows = distilling.gaussian(stores["train"].moments("mlp_in")), []
    for active, experts in of.cells:
        kinds = [distilling.Spec(active), distilling.Spec(active, experts)]
        for change in (distilling.REAL, noise):
            task = distilling.Task(teacher, 9, stores, change, **how)
            arms = [Arm(f"{task.name}: {spec.label}", spec, lr=1e-3) for spec in kinds]
            found = study.study(task, arms, [0], workers=1, device=of.device)
            for name, (outcome,) in found.items():
                rows.append(
                    {"what": f"{how['steps']:,} steps", "who": name, "FVU": outcome.fvu, "seconds": outcome.seconds}
                )
    return rows


def chapter(number: int, of: Scale) -> list[dict]:
    """A chapter with `profiles/gpu15.yml`; its records lie in `_build/results/gpu15`."""
    command = [sys.executable, "-m", "helpers", "run", str(number), "--profile", "gpu15", "--force"]
    for name, value in of.given.get(number, {}).items():
        command += ["-p", name, json.dumps(value)]
    started = time.perf_counter()
    subprocess.run(command, cwd=settings.ROOT, check=True)
    return [{"what": f"chapter {number}", "who": "the book", "seconds": time.perf_counter() - started}]


JOBS: dict[str, Callable[[Scale], list[dict]]] = {
    "steps": steps,
    "students": student_steps,
    "pursuits": pursuits,
    "harvests": harvests,
    "contrast": contrast,
    "chapter-9": partial(chapter, 9),
    "chapter-5": partial(chapter, 5),
}


def one(name: str, of: Scale, folder: Path) -> None:
    """Do a job, and keep what it found."""
    write_json(folder / f"{name}.json", JOBS[name](of))


def everything(of: Scale, folder: Path, budget: float = BUDGET, jobs: Sequence[str] = tuple(JOBS)) -> dict[str, str]:
    """What became of each job: `kept` from before, `done`, `failed` (its text stands above), or `no time left`."""
    ends, became = time.monotonic() + budget, {}
    mode = ["rehearse"] if of is REHEARSAL else []
    for name in jobs:
        if (folder / f"{name}.json").exists():
            became[name] = "kept"
            continue
        left = ends - time.monotonic()
        if left <= 0:
            became[name] = "no time left"
            continue
        print(f"== {name}, {left:.0f} s left", flush=True)
        process = subprocess.Popen([sys.executable, "-m", "benchmarks.gpu", "one", name, *mode], start_new_session=True)
        try:
            became[name] = "failed" if process.wait(left) else "done"
        except subprocess.TimeoutExpired:
            became[name] = "no time left"
        finally:
            with contextlib.suppress(ProcessLookupError):  # with the kernels and workers that it started
                os.killpg(process.pid, signal.SIGKILL)
    return became


def record(folder: Path, became: Mapping[str, str]) -> None:
    """`benchmarks/results/gpu.json`, from all jobs that are there."""
    files = [file for name in JOBS if (file := folder / f"{name}.json").exists()]
    rows = [row for file in files for row in json.loads(file.read_text())]
    by = {(row["what"], row["who"]): row["/ ours"] for row in rows if "/ ours" in row}
    goals = {"eai-sparsify": 1.2, "omp-gpu": 1.0}
    targets = [
        common.at_least(f"{what}: {who} / ours", ratio, goals[who]) for (what, who), ratio in by.items() if who in goals
    ]
    columns = dict.fromkeys(column for row in rows for column in row)
    common.write(
        "gpu",
        title="A quarter of an hour on a GPU",
        question="What do steps, pursuits, a harvest and the paper's own sizes of chapter 5 take on a GPU?",
        rows=[{column: row.get(column) for column in columns} for row in rows],
        targets=targets,
        note=" ".join(f"{name}: {how}." for name, how in became.items()),
    )


def main(how: str = "", *rest: str) -> int:
    allowed(how in ("", "rehearse", "one"), f"how={how!r}", "nothing, or rehearse")
    rehearsed = "rehearse" in (how, *rest)
    of, folder = (REHEARSAL, "gpu15_rehearsed") if rehearsed else (GPU, "gpu15")
    settings.device(of.device)
    folder = settings.ROOT / "_build" / folder
    folder.mkdir(parents=True, exist_ok=True)
    if how == "one":
        one(rest[0], of, folder)
        return 0
    became = everything(of, folder)
    for name, what in became.items():
        print(f"{name}: {what}")
    if not rehearsed:
        record(folder, became)
    return int("failed" in became.values())


if __name__ == "__main__":
    try:
        sys.exit(main(*sys.argv[1:]))
    except ValueError as error:
        sys.exit(f"error: {error}")
