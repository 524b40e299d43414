"""Matching pursuit beside SPAMS, scikit-learn and omp-gpu; three ways to correlate packed atoms.

Peers are compared in runs of their own, each a process (`python -m benchmarks.pursuit once small FILE` is one of them).
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import common
from helpers import settings
from helpers.dictionary import GATHER_SHARE, Packed, pursuit, screening
from helpers.dictionary.rows import linear
from helpers.parts.masks import gaussian_values, left_regular

BATCH, RUNS, FEW = 256, 3, {"scikit-learn": 4, "omp-gpu": 64}
"""Signals; separate runs; and the signals of the large problem that slow peers are given, which solve some like all."""
PROBLEMS = {"small": (512, 4096, 32), "large": (2048, 16384, 64)}
"""Length of a signal m, atoms n, and how many are chosen, k."""
DEGREES = (7, 15, 30, 50, 100, 150, 200, 300)
SIZES = ((512, 1024), (512, 4096), (512, 16384), (2048, 16384))
BATCHES = (16, 256, 1024)


def problem(n: int = 4096, m: int = 512, batch: int = BATCH):
    """Random unit atoms and random signals: the hardest case, nothing is found early."""
    g = settings.generator(0)
    return F.normalize(torch.randn(n, m, generator=g), dim=1), torch.randn(batch, m, generator=g)


def packed(n: int, m: int, degree: int) -> Packed:
    g = settings.generator(0)
    return Packed(gaussian_values(n, degree, g).float(), left_regular(n, m, degree, g), m)


def peers(atoms: torch.Tensor, x: torch.Tensor, k: int, large: bool) -> dict:
    """What each is called with: its own layout, made beforehand; nothing normalised, no intercept.

    The Gram matrix is part of the time of all that use one. Of each peer it is the way that was the fastest of all it
    has: scikit-learn's precompute=True and orthogonal_mp_gram take three times as long, omp-gpu's v0 and v0_blas twice.
    """
    import spams
    from orthogonal_matching_pursuit_gpu import run_omp
    from sklearn.linear_model import orthogonal_mp

    # scikit-learn and SPAMS read columns; Fortran order is what they are fastest with
    columns, signals = np.asfortranarray(atoms.T.numpy()), np.asfortranarray(x.T.numpy())
    matrix, plain = atoms.T.contiguous(), {"normalize": False, "fit_intercept": False, "alg": "naive"}
    some = {peer: FEW[peer] if large else BATCH for peer in FEW}
    threads = torch.get_num_threads()
    # without eps SPAMS 2.6.14 returns empty codes; omp-gpu's naive form wants None where others say False
    return {
        "SPAMS": lambda turn: spams.omp(signals, columns, L=k, eps=0.0, numThreads=threads).T,
        "scikit-learn": lambda turn: orthogonal_mp(columns, signals[:, : some["scikit-learn"]], n_nonzero_coefs=k).T,
        "omp-gpu": lambda turn: run_omp(matrix, x[: some["omp-gpu"]], k, precompute=None, **plain),
    }


def ours(atoms: torch.Tensor, x: torch.Tensor, k: int, large: bool) -> dict:
    """All ways, and the floor: what k correlations with all atoms take alone, screened and in float32."""
    mine = {"this book": lambda turn: pursuit.omp(x, atoms, k)}
    if few := screening.screen(x, atoms):
        bits = few.rounded(x)[0]
        mine["floor: k screened products"] = lambda turn: [few._scores(bits) for _ in range(k)]
    if large:
        return mine
    mine["k products in float32"] = lambda turn: [linear(x, atoms, None) for _ in range(k)]
    thin = packed(len(atoms), x.shape[1], 7)
    mine["this book, by the Gram matrix"] = lambda turn: pursuit.omp(x, atoms, k, gram=True)
    return mine | {"this book, packed, d=7": lambda turn: pursuit.omp(x, thin, k)}


def agreement(codes, theirs, n: int) -> tuple[float, float]:
    """Share of signals with the same support, and the largest difference of their coefficients."""
    theirs = np.asarray(theirs.todense() if hasattr(theirs, "todense") else theirs)
    mine = codes.to_dense(n).numpy()[: len(theirs)]
    same = ((mine != 0) == (theirs != 0)).all(1)
    return float(same.mean()), float(np.abs(mine - theirs)[same].max(initial=0.0))


def left(atoms: torch.Tensor, x: torch.Tensor, codes) -> float:
    """Mean length of what the codes leave of the signals."""
    dense = codes.todense() if hasattr(codes, "todense") else codes
    dense = torch.as_tensor(np.asarray(dense), dtype=torch.float32)
    return float((x[: len(dense)] - dense @ atoms).norm(dim=1).mean())


def once(size: str) -> dict:
    """One run: milliseconds a signal by name, how the peers' codes agree with ours, and who does not run here."""
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    m, n, k = PROBLEMS[size]
    atoms, x = problem(n, m)
    theirs, own = peers(atoms, x, k, size == "large"), ours(atoms, x, k, size == "large")
    mine, agree, reasons = own["this book"](0), {}, []
    for name, call in list(theirs.items()):
        try:
            codes = call(0)
        except Exception as error:  # a peer that does not run here is reported, and the others are measured
            reasons.append(f"{name} does not run here ({type(error).__name__}: {error}).")
            theirs.pop(name)
            continue
        length = left(atoms, x, codes) / left(atoms, x[: codes.shape[0]], mine.to_dense(n)[: codes.shape[0]])
        agree[name] = [*agreement(mine, codes, n), length]
    seconds = common.interleave(own | theirs, {"small": 7, "large": 3}[size], warmup=0)
    few = FEW if size == "large" else {}
    times = {name: 1e3 * t["median"] / few.get(name, BATCH) for name, t in seconds.items()}
    return {"times": times, "agree": agree, "reasons": reasons, "cpu": common.processor()}


def compare(runs: Mapping[str, Sequence[dict]]) -> None:
    """The record of several runs of each problem: medians, and the lowest ratio of any."""
    rows, targets = [], []
    for size, (m, n, k) in PROBLEMS.items():
        times = common.over_runs([run["times"] for run in runs[size]], "this book")
        for name, found in times.items():
            agree = runs[size][0]["agree"].get(name, [None] * 3)
            rows.append(
                {
                    "m": m,
                    "n": n,
                    "k": k,
                    "who": name,
                    "ms a signal": found["median"],
                    "lowest ratio to ours": found["lowest"],
                    "highest": found["highest"],
                    "same support as ours": agree[0],
                    "largest difference": agree[1],
                    "length of what is left / ours": agree[2],
                }
            )
        for peer, goal in {"SPAMS": 1.3, "scikit-learn": 8, "omp-gpu": 1.0}.items():
            best = [row for row in rows if row["who"] == peer and row["n"] == n]
            if best:
                lowest = min(row["lowest ratio to ours"] for row in best)
                targets.append(
                    common.at_least(f"n={n}: the best of {peer} / ours, lowest of {RUNS} runs", lowest, goal)
                )
    exact = [row for row in rows if row["same support as ours"] is not None and row["who"] != "SPAMS"]
    smallest, gap = min(r["same support as ours"] for r in exact), max(r["largest difference"] for r in exact)
    targets += [
        common.at_least("smallest share of equal supports", smallest, 0.99),
        common.at_most("largest difference of coefficients", gap, 1e-4),
    ]
    common.write(
        "pursuit",
        title="Matching pursuit",
        question=f"How long does OMP take, {BATCH} signals in one call, float32, random atoms and signals?",
        rows=rows,
        targets=targets,
        note=" ".join(
            [
                f"{runs['small'][0]['cpu']}. Medians of {RUNS} runs of 7 rounds (large problem: 3), ratios within.",
                "Time includes the Gram matrix where one is used; SPAMS always makes one.",
                f"Of the large problem scikit-learn solves {FEW['scikit-learn']} signals and omp-gpu {FEW['omp-gpu']}.",
                "SPAMS (spams-bin 2.6.14) chooses by |d·r| over the atom's length outside the span of those before",
                "(order-recursive matching pursuit), so its supports are others, and leave about as much. Without",
                "eps=0 it returns empty codes, in the time of the Gram matrix alone.",
                "omp-gpu is orthogonal-matching-pursuit-gpu on the CPU. The packed dictionary is another one.",
                "The floor: with all atoms k products, 2kmn operations a signal, in 8 bits or bfloat16",
                "(`dictionary.screening`); beside it are 4·k²/2·m for the basis and reading the scores.",
                *runs["small"][0]["reasons"],
            ]
        ),
    )


def ways(atoms: Packed, x: torch.Tensor) -> dict:
    """Three ways to the same [batch, n] correlations; what depends on the atoms alone is made beforehand."""
    dense = atoms.vectors().detach()
    n, degree = atoms.weight.shape
    order = atoms.rows.long().sort(1)
    csr = torch.sparse_csr_tensor(
        torch.arange(0, n * degree + 1, degree),
        order.values.reshape(-1),
        atoms.weight.detach().gather(1, order.indices).reshape(-1),
        (n, atoms.width),
    )
    return {
        "gather": lambda turn: pursuit.correlations(x, atoms, method="gather"),
        "CSR": lambda turn: (csr @ x.T.contiguous()).T.contiguous(),
        "GEMM": lambda turn: pursuit.correlations(x, dense),
    }


def correlations(repeats: int) -> None:
    rows, crossings = [], []
    for m, n in SIZES:
        for batch in BATCHES:
            if n * batch > 16384 * 256:  # half a gigabyte of correlations and minutes of time, for the same answer
                continue
            at, x = {}, problem(1, m, batch)[1]
            for degree in DEGREES:
                calls = ways(packed(n, m, degree), x)
                reference = calls["GEMM"](0)
                gap = max(float((call(0) - reference).abs().max()) for call in calls.values())
                seconds = common.interleave(calls, repeats)
                at[degree] = seconds
                row = {"m": m, "n": n, "batch": batch, "d": degree}
                row |= {f"{name} (ms)": 1e3 * time_["median"] for name, time_ in seconds.items()}
                row |= {f"{name} iqr": 1e3 * time_["iqr"] for name, time_ in seconds.items()}
                rows.append(row | {"largest difference": gap / float(reference.abs().max())})
            pays = [d for d in DEGREES if at[d]["gather"]["median"] < at[d]["GEMM"]["median"]]
            crossings.append(f"m={m}, n={n}, batch {batch}: d ≤ {max(pays) if pays else 'none'}")
    worst = max(row["largest difference"] for row in rows)
    common.write(
        "correlations",
        title="Correlations of packed atoms",
        question="How long does it take to correlate a batch with all atoms of d numbers each, float32?",
        rows=rows,
        targets=[common.at_most("largest relative difference of the three", worst, 1e-5)],
        note="gather: `pursuit.correlations`, one embedding bag over the transposed batch; CSR: PyTorch's sparse "
        "product; GEMM: the dense matrix, which stands ready. Times include bringing the result into rows of samples. "
        f"The gather is faster than GEMM at: {'; '.join(crossings)}. `dictionary.GATHER_SHARE` is {GATHER_SHARE}.",
    )


def main(how: str = "", *rest: str, repeats: int = 7) -> None:
    warnings.filterwarnings("ignore", message="Sparse")
    started = time.perf_counter()
    if how == "once":
        Path(rest[1]).write_text(json.dumps(once(rest[0])))
    else:
        correlations(max(repeats, 11))
        compare(common.separately("pursuit", list(PROBLEMS), RUNS))
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main(*sys.argv[1:])
