"""How matching pursuit, a training step and a sparse student's step grow over two decades of atoms or experts, choices
and batch, beside the best peer of each.

An exponent is the slope of the logarithm of the time, with its interval: 1 is proportional, 0 does not depend on it.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import common, students, training
from benchmarks.pursuit import problem
from helpers.dictionary import pursuit
from helpers.study.scores import slope
from helpers.training import Shuffled

M = 256
"""Length of a signal of matching pursuit."""

PURSUIT = {"n": 4096, "k": 16, "batch": 128}
STEP = {"n": 4096, "k": 32, "batch": 256}
STUDENT = {"E": 10_000, "k": 32, "batch": 256}
SWEEPS = {
    "n": (160, 512, 1024, 2048, 4096, 8192, 16384),
    "E": (1000, 2000, 5000, 10_000, 20_000, 50_000, 100_000),
    "k": (1, 2, 4, 8, 16, 32, 64, 100),
    "batch": (16, 32, 64, 128, 256, 512, 1024, 1600),
}
"""Where the others stay while one is varied, and what it takes: two decades each."""


def omp(n: int, k: int, batch: int) -> dict:
    atoms, x = problem(n, M, batch)
    calls = {"this book": lambda turn: pursuit.omp(x, atoms, k)}
    try:
        import spams
    except ImportError:  # a peer of the benchmarks; without it ours is measured alone
        return calls
    columns, signals = (np.asfortranarray(part.T.numpy()) for part in (atoms, x))
    threads = torch.get_num_threads()
    return calls | {"SPAMS": lambda turn: spams.omp(signals, columns, L=k, eps=0.0, numThreads=threads)}


def step(n: int, k: int, batch: int) -> dict:
    stream = Shuffled(training.data(4 * batch), batch_size=batch, fingerprint="growth")
    return {
        "this book": training.ours(n, stream, k=k)[0],
        "eai-sparsify + fused Adam": training.sparsify(n, stream, fused=True, k=k),
        "plain dense + fused Adam": training.plain_dense(n, stream, fused=True, k=k),
    }


def student(E: int, k: int, batch: int) -> dict:  # experts are E in the papers and on the page
    return {
        "this book": students.ours(E, k, batch=batch),
        "gathers weights + fused Adam": students.gathering(E, k, fused=True, batch=batch),
    }


KERNELS = {
    "matching pursuit": (omp, PURSUIT),
    "training step": (step, STEP),
    "sparse student's step": (student, STUDENT),
}


def sweep(make, at: dict[str, int], varied: str, repeats: int) -> dict[str, list[tuple[int, float]]]:
    """Seconds of everyone at each value of what is varied."""
    found: dict[str, list[tuple[int, float]]] = {}
    for value in SWEEPS[varied]:
        for who, time_ in common.interleave(make(**(at | {varied: value})), repeats).items():
            found.setdefault(who, []).append((value, time_["min"]))
    return found


def main(repeats: int = 5) -> None:
    rows = []
    for kernel, (make, at) in KERNELS.items():
        for varied in at:
            for who, points in sweep(make, at, varied, repeats).items():
                values, seconds = zip(*points, strict=True)
                fitted, upper = (slope(np.log(values[-last:]), np.log(seconds[-last:])) for last in (len(values), 4))
                row = {"kernel": kernel, "who": who, "varied": varied}
                row |= {"exponent": fitted.value, "low": fitted.ci[0], "high": fitted.ci[1]}
                row |= {"exponent of the last four": upper.value}
                rows.append(row | {"points": [[value, 1e3 * second] for value, second in points]})
    others = "; ".join(
        f"{kernel}: {', '.join(f'{a}={b}' for a, b in at.items())}" for kernel, (_, at) in KERNELS.items()
    )
    common.write(
        "growth",
        title="How times grow",
        question="With what power of atoms n or experts E, choices k and batch does the time of a call grow, float32?",
        rows=rows,
        note=f"{common.processor()}. One is varied, the others stay ({others}; signals of {M} numbers, d_model="
        f"{training.D_MODEL}). Least times of {repeats} rounds; least squares through logarithms, with 95 % intervals. "
        f"SPAMS forms all products of atoms in every call, which the signals of a call share.",
    )


if __name__ == "__main__":
    main()
