"""Matching pursuit beside scikit-learn and orthogonal-matching-pursuit-gpu; three ways to correlate packed atoms."""

from __future__ import annotations

import sys
import time
import warnings

import numpy as np
import torch
from torch.nn import functional as F

from benchmarks import common
from helpers import settings
from helpers.dictionary import GATHER_SHARE, Packed, pursuit
from helpers.parts.masks import gaussian_values, left_regular

M, N, K, BATCH = 512, 4096, 32, 256
"""Signals of 512 numbers, 4096 atoms, 32 of them for each of 256 signals."""
DEGREES = (7, 15, 30, 50, 100, 150, 200, 300)
SIZES = ((512, 1024), (512, 4096), (512, 16384), (2048, 16384))
BATCHES = (16, 256, 1024)


def problem(n: int = N, m: int = M, batch: int = BATCH):
    """Random unit atoms and random signals: the hardest case, nothing is found early."""
    g = settings.generator(0)
    return F.normalize(torch.randn(n, m, generator=g), dim=1), torch.randn(batch, m, generator=g)


def packed(n: int, m: int, degree: int) -> Packed:
    g = settings.generator(0)
    return Packed(gaussian_values(n, degree, g).float(), left_regular(n, m, degree, g), m)


def peers(atoms: torch.Tensor, x: torch.Tensor) -> dict:
    """What each is called with: its own layout, made beforehand; nothing normalised, no intercept.

    Everyone solves the same batch. The Gram matrix is part of the time of all that use one.
    """
    from orthogonal_matching_pursuit_gpu import run_omp
    from sklearn.linear_model import orthogonal_mp, orthogonal_mp_gram

    # scikit-learn reads columns; Fortran order is what it is fastest with
    columns, signals = np.asfortranarray(atoms.T.numpy()), np.asfortranarray(x.T.numpy())
    matrix, plain = atoms.T.contiguous(), {"normalize": False, "fit_intercept": False}
    doubled = matrix.double(), x.double()

    def by_gram(turn):
        return orthogonal_mp_gram(columns.T @ columns, columns.T @ signals, n_nonzero_coefs=K).T

    # its v0_blas takes double precision only, its naive form wants None where others say False
    return {
        "sklearn, precompute=False": lambda turn: orthogonal_mp(columns, signals, n_nonzero_coefs=K).T,
        "sklearn, precompute=True": lambda turn: orthogonal_mp(columns, signals, n_nonzero_coefs=K, precompute=True).T,
        "sklearn, gram": by_gram,
        "omp-gpu, v0": lambda turn: run_omp(matrix, x, K, alg="v0", **plain),
        "omp-gpu, v0_blas (double)": lambda turn: run_omp(*doubled, K, alg="v0_blas", **plain),
        "omp-gpu, naive": lambda turn: run_omp(matrix, x, K, precompute=None, alg="naive", **plain),
    }


def ours(atoms: torch.Tensor, x: torch.Tensor, thin: Packed) -> dict:
    return {
        "ours": lambda turn: pursuit.omp(x, atoms, K),
        "ours, by residual": lambda turn: pursuit.omp(x, atoms, K, gram=False),
        "ours, packed, d=7": lambda turn: pursuit.omp(x, thin, K),
    }


def agreement(codes, theirs) -> tuple[float, float]:
    """Share of signals with the same support, and the largest difference of their coefficients."""
    mine, theirs = codes.to_dense(N).numpy(), np.asarray(theirs)
    same = ((mine != 0) == (theirs != 0)).all(1)
    return float(same.mean()), float(np.abs(mine - theirs)[same].max(initial=0.0))


def compare(repeats: int) -> None:
    atoms, x = problem()
    theirs, own = peers(atoms, x), ours(atoms, x, packed(N, M, 7))
    warnings.filterwarnings("ignore", category=RuntimeWarning)
    first, reasons = {}, []
    for name, call in list(theirs.items()):
        try:
            first[name] = call(0)
        except Exception as error:  # a peer that does not run here is reported, and the others are measured
            reasons.append(f"{name} does not run here ({type(error).__name__}: {error}).")
            theirs.pop(name)
    mine = own["ours"](0)
    agree = {name: agreement(mine, result) for name, result in first.items()}
    seconds = common.interleave(own | theirs, repeats)
    rows = [
        {
            "who": name,
            "ms a signal": 1e3 * time_["median"] / BATCH,
            "iqr": 1e3 * time_["iqr"] / BATCH,
            "ours is faster by": time_["median"] / seconds["ours"]["median"],
            "same support as ours": agree.get(name, (None, None))[0],
            "largest difference": agree.get(name, (None, None))[1],
        }
        for name, time_ in seconds.items()
    ]
    best = {
        peer: min(t["median"] for name, t in seconds.items() if name.startswith(peer))
        for peer in ("sklearn", "omp-gpu")
    }
    targets = [
        common.at_least("scikit-learn's best time / ours", best["sklearn"] / seconds["ours"]["median"], 10),
        common.at_least("omp-gpu's best time / ours", best["omp-gpu"] / seconds["ours"]["median"], 1.5),
        common.at_least("smallest share of equal supports", min(share for share, _ in agree.values()), 0.99),
        common.at_most("largest difference of coefficients", max(gap for _, gap in agree.values()), 1e-4),
    ]
    common.write(
        "pursuit",
        title="Matching pursuit",
        question=f"How long does OMP take, m={M}, n={N}, k={K}, batch {BATCH}, float32, random atoms and signals?",
        rows=rows,
        targets=targets,
        note=" ".join(
            [
                "All solve the same 256 signals in one call, and time includes the Gram matrix where one is used.",
                "omp-gpu is orthogonal-matching-pursuit-gpu on the CPU with normalize and fit_intercept off; its",
                "v0_blas exists in double precision only. The packed dictionary is another one, of the same n and m.",
                "Supports can differ where two correlations are equal to rounding.",
                *reasons,
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
        f"The gather is faster at: {'; '.join(crossings)}. `dictionary.GATHER_SHARE` is {GATHER_SHARE}.",
    )


def main(repeats: int = 7) -> None:
    warnings.filterwarnings("ignore", message="Sparse")
    started = time.perf_counter()
    correlations(max(repeats, 11))
    compare(repeats)
    print(f"{time.perf_counter() - started:.0f} s", file=sys.stderr)


if __name__ == "__main__":
    main()
