"""One training step of an expander SAE with packed atoms beside the dense tied step, and the memory of both.

Two ways to hold masked columns: packed (n, q) numbers, as here, and, as the released class of paper B does, a full
matrix under a mask. Memory is counted from the tensors that live between steps, and what a step adds on top is measured
as the growth of the process's peak in a process of its own.
"""

from __future__ import annotations

import multiprocessing
import tempfile
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from benchmarks import common
from benchmarks.training import D_MODEL, LR, K, data
from helpers import dictionary, settings, training
from helpers.parts.masks import left_regular

DEGREES, SIZES = (7, 30), ((640, 5120), (2048, 16384))
BATCHES = (256, 1024)


def expander(m: int, n: int, q: int) -> dictionary.RankOneDictionary:
    rows = left_regular(n, m, q, settings.generator(2))
    return dictionary.expander_sae(rows, m, K, generator=settings.generator(0))


def dense(m: int, n: int) -> dictionary.RankOneDictionary:
    return dictionary.topk_sae(m, n, K, generator=settings.generator(0), tied=True, activation="identity")


class Masked(torch.nn.Module):
    """The released way in short: an [n, m] parameter times a mask, at each step normalised by autograd."""

    def __init__(self, like: dictionary.RankOneDictionary):
        super().__init__()
        full = like.encoder.vectors().detach()
        self.weight, self.mask = torch.nn.Parameter(full.clone()), full != 0
        self.b_enc, self.b_dec = (torch.nn.Parameter(b.detach().clone()) for b in (like.encoder.bias, like.b_out))

    def forward(self, x):
        atoms = F.normalize(self.weight * self.mask, dim=1)
        scores = F.linear(x - self.b_dec, atoms, self.b_enc)
        values, indices = scores.topk(K, dim=1)
        return torch.zeros_like(scores).scatter(1, indices, values) @ atoms + self.b_dec


class MaskedRun:
    """Training steps of `Masked`, with the names that `training.Run` has."""

    def __init__(self, m: int, n: int, q: int, stream):
        self.students = {"": Masked(expander(m, n, q))}
        self.optimisers = {"": torch.optim.Adam(self.students[""].parameters(), lr=LR, fused=True)}
        self.stream = stream

    def train_step(self, step: int) -> None:
        x, model, adam = self.stream(step)[0], self.students[""], self.optimisers[""]
        adam.zero_grad()
        (model(x) - x).square().sum().div(len(x)).backward()
        adam.step()


def run_of(sae, stream) -> training.Run:
    return training.Run({"": sae}, stream, {"": training.Recipe(10**6, lr=LR, schedule="constant")}, log_every=10**6)


def rows_of(m: int, batch: int) -> torch.Tensor:
    if m == D_MODEL:
        return data(4 * batch)
    return torch.randn(4 * batch, m, generator=settings.generator(1)) * torch.arange(1, m + 1).float().rsqrt()


def make(what: str, m: int, n: int, stream):
    """A run by its name in the table."""
    if what == "dense tied":
        return run_of(dense(m, n), stream)
    if what.startswith("packed"):
        return run_of(expander(m, n, int(what.split("=")[1])), stream)
    return MaskedRun(m, n, int(what.split("=")[1]), stream)


WHAT = ("dense tied", *(f"packed, d={q}" for q in DEGREES), f"full matrix under a mask, d={DEGREES[0]}")


def kept_bytes(run) -> tuple[int, int]:
    """Bytes of parameters, gradients and optimiser state after a step; and of the row numbers, or of the mask."""
    model = run.students[""]
    moving = [p for p in model.parameters()] + [p.grad for p in model.parameters()]
    moving += [t for state in run.optimisers[""].state.values() for t in state.values()]
    fixed = [model.encoder.rows] if isinstance(getattr(model, "encoder", None), dictionary.Packed) else []
    fixed += [model.mask] if isinstance(model, Masked) else []
    return tuple(sum(t.numel() * t.element_size() for t in tensors) for tensors in (moving, fixed))


def file_bytes(run) -> int:
    """Bytes of the saved model: packed values with their row numbers, or the full matrix, and the biases."""
    model = run.students[""]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model")
        if isinstance(getattr(model, "encoder", None), dictionary.Packed):
            dictionary.save_packed(model, path)
        else:
            save_file({name: p.detach() for name, p in model.named_parameters()}, path)
        return path.stat().st_size


def peak_growth(what: str, m: int, n: int, batch: int) -> float:
    """MiB that a fresh process holds at most in four steps, above what it holds before the model is made."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(_peak, (what, m, n, batch))


def _peak(what: str, m: int, n: int, batch: int) -> float:
    stream = training.Shuffled(rows_of(m, batch), batch_size=batch, fingerprint="bench")
    before = common.memory("VmRSS")
    run = make(what, m, n, stream)
    for step in range(4):
        run.train_step(step)
    return common.memory("VmHWM") - before


def same_output(m: int, n: int) -> float:
    """Largest difference of the outputs of packed and masked atoms, relative to the largest output."""
    sae, x = expander(m, n, DEGREES[0]), rows_of(m, 64)
    with torch.no_grad():
        mine, theirs = sae(x), Masked(sae)(x)
    return float((mine - theirs).abs().max() / theirs.abs().max())


def measure(m: int, n: int, batch: int, repeats: int) -> tuple[list[dict], list[dict]]:
    stream = training.Shuffled(rows_of(m, batch), batch_size=batch, fingerprint="bench")
    peaks = {what: peak_growth(what, m, n, batch) for what in WHAT}
    runs = {what: make(what, m, n, stream) for what in WHAT}
    times = common.interleave({what: run.train_step for what, run in runs.items()}, repeats=repeats)
    kept = {what: kept_bytes(run) for what, run in runs.items()}
    files = {what: file_bytes(run) for what, run in runs.items()}
    rows = [
        {
            "m": m,
            "n_features": n,
            "batch": batch,
            "what": what,
            "ms": 1e3 * times[what]["median"],
            "iqr_ms": 1e3 * times[what]["iqr"],
            "kept MB": sum(kept[what]) / 2**20,
            "peak MB": peaks[what],
            "file MB": files[what] / 2**20,
        }
        for what in WHAT
    ]
    case, targets = f"m={m}, n={n}, batch {batch}", []
    for q in DEGREES:
        what, numbers = f"packed, d={q}", q * n + n + m
        ratio = times[what]["median"] / times["dense tied"]["median"]
        targets.append(common.at_most(f"{case}, d={q}: packed step / dense tied step", ratio, 1.0))
        floor = 4 * 4 * numbers + kept[what][1]  # values, gradients, two moments: four bytes each
        memory = sum(kept[what]) / floor
        targets.append(common.at_most(f"{case}, d={q}: memory kept / least possible", memory, 1.2))
        if batch == BATCHES[0]:
            smaller = files["dense tied"] / files[what]  # values alone: m/d
            label = f"m={m}, n={n}, d={q}: file of the dense tied SAE / packed file (values alone: {m / q:.0f})"
            targets.append(common.at_least(label, smaller, round(0.9 * 4 * m / (6 * q + 4), 1)))
    if batch == BATCHES[0]:
        what = f"m={m}, n={n}: largest relative difference of packed and masked outputs"
        targets.append(common.at_most(what, same_output(m, n), 1e-5))
    return rows, targets


def main(repeats: int = 9) -> None:
    rows, targets = [], []
    for m, n in SIZES:
        for batch in BATCHES:
            more_rows, more_targets = measure(m, n, batch, repeats)
            rows += more_rows
            targets += more_targets
    common.write(
        "packed",
        title="One training step of an expander SAE",
        question=f"How long is a step with packed atoms, k={K}, float32, and what does it keep in memory?",
        rows=rows,
        targets=targets,
        note="Kept: parameters, gradients, Adam's two moments, and row numbers (2 bytes each) or the mask. "
        "Least possible: 4·4·(dn + n + m) bytes and the row numbers. Peak: of a fresh process in four steps, dense "
        "scores and gathered numbers included, above what it holds before the model is made.",
    )


if __name__ == "__main__":
    main()
