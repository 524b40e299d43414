"""Sparse decode (read k rows per sample) beside the dense one (multiply all n codes, nearly all of them zero)."""

from __future__ import annotations

import torch

from benchmarks import common
from helpers import settings
from helpers.dictionary import weighted_sum

BATCH, K = 1024, 32
SIZES = ((512, 4096), (512, 16384), (640, 4096), (640, 16384))


def measure(d: int, n: int, repeats: int) -> tuple[dict, list[dict]]:
    generator = settings.generator(0)
    weight = torch.randn(n, d, generator=generator)
    scores = torch.rand(BATCH, n, generator=generator)
    values, indices = scores.topk(K, dim=1)
    codes = torch.zeros(BATCH, n).scatter(1, indices, values)
    calls = {
        "sparse": lambda turn: weighted_sum(values, indices, weight),
        "dense": lambda turn: codes @ weight,
        "dense, codes built": lambda turn: torch.zeros(BATCH, n).scatter_(1, indices, values) @ weight,
    }
    with torch.no_grad():
        difference = (calls["sparse"](0) - calls["dense"](0)).abs().max() / calls["dense"](0).abs().max()
        seconds = common.interleave(calls, repeats)
    ratio = seconds["dense"]["median"] / seconds["sparse"]["median"]
    row = {"d": d, "n": n}
    row |= {f"{name} (ms)": 1e3 * time["median"] for name, time in seconds.items()}
    row |= {"sparse iqr (ms)": 1e3 * seconds["sparse"]["iqr"], "dense / sparse": ratio}
    targets = [common.at_most(f"d={d}, n={n}: relative difference of the outputs", float(difference), 1e-5)]
    if n == 16384:
        targets.append(common.at_least(f"d={d}, n={n}: dense time / sparse time", ratio, 10))
    return row, targets


def main(repeats: int = 41) -> None:
    results = [measure(d, n, repeats) for d, n in SIZES]
    common.write(
        "decode",
        title="Sparse decode",
        question=f"How long does the decoder take, batch={BATCH}, k={K}, float32, forward only?",
        rows=[row for row, _ in results],
        targets=[target for _, targets in results for target in targets],
        note="“dense” has its [batch, n] codes at hand; “dense, codes built” also scatters them from the top-k. "
        "The ratio is against the first, which favours dense.",
    )


if __name__ == "__main__":
    main()
