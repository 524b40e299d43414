"""Choosing the k largest of n scores in bfloat16, certified, beside float32: the same choice, sooner.

A numerical check of the theorem of `helpers.dictionary.screening` goes with it: how far products are off, as a share of
the bound, on random rows and on a layer of the embedded teacher, after some steps of training.
"""

from __future__ import annotations

import torch

from benchmarks import common
from benchmarks.training import BATCH, D_MODEL, LR, K, data, new_sae
from helpers import training
from helpers.dictionary.rows import gather_dots, linear
from helpers.dictionary.screening import UNIT, Halved, bound, forms
from helpers.models import activations, teachers

STEPS, CHECKED = 50, 128
"""Training before the check, and the samples of the batch whose products are all computed in re-scoring's order."""


def gemma() -> torch.Tensor:
    """Rows of a layer's output at unit variance."""
    teacher = teachers.load(device="cpu")
    about = {"layer": 9, "sites": ["mlp_in", "resid_post"], "n_tokens": 10_000, "split": "train"}
    store = activations.harvest(teacher, "wikipedia-sample", **about)
    return store.tensor("resid_post") / store.moments("resid_post").variance ** 0.5 * D_MODEL**0.5


def trained(rows: torch.Tensor, n: int, screen: bool) -> training.Run:
    stream = training.Shuffled(rows, batch_size=BATCH, fingerprint="bench")
    recipe = training.Recipe(10**6, lr=LR, schedule="constant")
    run = training.Run({"": new_sae(n)}, stream, {"": recipe}, log_every=1, screen=screen)
    for step in range(STEPS):
        run.train_step(step)
    return run


@torch.no_grad()
def check(run: training.Run) -> dict:
    """Of one more batch: the share of the bound that the worst product takes, and whether all choices are the same."""
    sae, half = run.students[""], Halved()
    x = (run.stream(STEPS)[0] - sae.b_in)[:CHECKED]
    weight, bias, k = sae.encoder.weight.detach(), sae.encoder.bias.detach(), sae.k
    near = x.to(torch.bfloat16)
    error = bound(x, (x - near).norm(dim=1), *half.take(weight))
    screened = (near @ half.half.T).double()
    off = (screened - x.double() @ weight.double().T).abs() - UNIT[torch.bfloat16] * screened.abs()
    found = half.top(x, weight, bias, k)
    every = gather_dots(x, weight, torch.arange(len(weight)).expand(len(x), -1)) + bias
    wanted = every.sort(dim=1, descending=True, stable=True).indices[:, :k]
    # where too many samples would fall back, nothing is screened: all choices are float32's own
    same = (found[1].sort(1).values == wanted.sort(1).values).all(1) if found else torch.ones(1)
    share = (error[:, 0] / (x.norm(dim=1) * weight.norm(dim=1).amax())).median()
    return {
        "ε": float(share),
        "worst product / bound": float((off / error).max()),
        "same choice": float(same.float().mean()),
    }


def timed(run: training.Run, repeats: int) -> dict[str, float]:
    """Milliseconds of scores and choice for one batch."""
    sae, half = run.students[""], Halved()
    x = (run.stream(0)[0] - sae.b_in).detach()
    weight, bias = sae.encoder.weight.detach(), sae.encoder.bias.detach()
    ways = {
        "float32 (ms)": lambda turn: linear(x, weight, bias).topk(K, dim=1),
        "screened (ms)": lambda turn: half.top(x, weight, bias, K),
    }
    with torch.no_grad():
        return {name: 1e3 * t["median"] for name, t in common.interleave(ways, repeats).items()}


def main(sizes: tuple[int, ...] = (5120, 16384), repeats: int = 11) -> None:
    rows, targets = [], []
    for name, inputs in {"random, decaying spectrum": data(), "gemma-3-270m, layer 9": gemma()}.items():
        for n in sizes:
            run = trained(inputs, n, screen=True)
            usual = trained(inputs, n, screen=False)
            half = run.screens.get("")
            pairs = zip(run.fits[""].loss, usual.fits[""].loss, strict=True)
            row = {"inputs": name, "n": n} | timed(run, repeats) | check(run)
            row["fell back"] = half.fallen / half.seen if half else None
            row["losses differ by"] = max(abs(a - b) / b for a, b in pairs)
            rows.append(row)
            gain = row["float32 (ms)"] / row["screened (ms)"]
            targets.append(common.at_least(f"{name}, n={n}: float32 / screened", gain, 1.2))
    targets.append(common.at_least("samples with the very choice of float32", min(r["same choice"] for r in rows), 1.0))
    targets.append(
        common.at_most("worst product as a share of its bound", max(r["worst product / bound"] for r in rows), 1)
    )
    used = torch.bfloat16 in forms(new_sae(sizes[-1]).encoder.weight, BATCH)
    common.write(
        "screening",
        title="Choosing in half precision, certified",
        question=f"How long do scores and the choice of k={K} take, d={D_MODEL}, batch={BATCH}, after {STEPS} steps?",
        rows=rows,
        targets=targets,
        note=f"{common.processor()}; so `fit(…, screen=True)` {'uses it' if used else 'does not use it'}. "
        "Theorem: with inputs and result rounded to bfloat16 and sums in float32, a score is off by at most "
        "E = ‖x̃ − x‖‖w̃‖ + ‖x‖‖w̃ − w‖ + 3γ‖x‖‖w‖, γ = 2mv/(1 − 2mv), and 2⁻⁸ of itself; so the k largest float32 scores "
        "are among the 2k that seem the largest wherever the k-th of those is above the next one and its E. There the "
        "choice is certified; elsewhere all float32 scores decide. ε = E/(‖x‖ max‖w‖), median. The check takes all "
        f"products of {CHECKED} samples in double precision, and their choice in the order of summation of re-scoring. "
        "Losses are beside a run whose scores are sums in another order, which chooses otherwise where two are equal "
        "to rounding.",
    )


if __name__ == "__main__":
    main()
