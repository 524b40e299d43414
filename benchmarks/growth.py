"""How matching pursuit and a training step grow with atoms, choices and batch over two decades, beside the best peer.

An exponent is the slope of the logarithm of the time, with its interval: 1 is proportional, 0 does not depend on it.
"""

from __future__ import annotations

import numpy as np
import torch

from benchmarks import common, training
from benchmarks.pursuit import problem
from helpers.dictionary import pursuit
from helpers.study.scores import slope
from helpers.training import Shuffled

M = 256
"""Length of a signal of matching pursuit."""

PURSUIT = {"n": 4096, "k": 16, "batch": 128}
STEP = {"n": 4096, "k": 32, "batch": 256}
SWEEPS = {
    "n": (160, 512, 1024, 2048, 4096, 8192, 16384),
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
        "this book, screened": training.ours(n, stream, screen=True, k=k)[0],
        "plain dense + fused Adam": training.plain_dense(n, stream, fused=True, k=k),
    }


KERNELS = {"matching pursuit": (omp, PURSUIT), "training step": (step, STEP)}


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
        for varied in SWEEPS:
            for who, points in sweep(make, at, varied, repeats).items():
                values, seconds = zip(*points, strict=True)
                fitted, upper = (slope(np.log(values[-last:]), np.log(seconds[-last:])) for last in (len(values), 4))
                row = {"kernel": kernel, "who": who, "varied": varied, "from": values[0], "to": values[-1]}
                row |= {"first (ms)": 1e3 * seconds[0], "last (ms)": 1e3 * seconds[-1]}
                row |= {"exponent": fitted.value, "low": fitted.ci[0], "high": fitted.ci[1]}
                rows.append(row | {"exponent of the last four": upper.value})
    others = "; ".join(
        f"{kernel}: {', '.join(f'{a}={b}' for a, b in at.items())}" for kernel, (_, at) in KERNELS.items()
    )
    common.write(
        "growth",
        title="How times grow",
        question="With what power of atoms n, choices k and batch does the time of a call grow, float32?",
        rows=rows,
        note=f"{common.processor()}. One is varied, the others stay ({others}; signals of {M} numbers, d_model="
        f"{training.D_MODEL}). Least times of {repeats} rounds; least squares through logarithms, with 95 % intervals.",
    )


if __name__ == "__main__":
    main()
