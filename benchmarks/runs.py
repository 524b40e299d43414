"""Many small runs: one after another, in processes side by side, or as one tensor with a leading run axis.

All train the same SAEs with the Switch loss on the same batches; losses are compared before anything is timed.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks import common
from helpers import dictionary, settings, training
from helpers.study.sweep import sweep
from helpers.training import loop, remedies

ALPHA, RUNS, STEPS = 0.1, 8, 60
SIZES = ((128, 16, 4, 128), (512, 64, 8, 256), (2048, 256, 16, 512))
"""n_features, d_model, k, batch."""


def students(n: int, d: int, k: int) -> dict[str, dictionary.RankOneDictionary]:
    return {str(i): dictionary.topk_sae(d, n, k, generator=settings.generator(i)) for i in range(RUNS)}


class Same:
    """One batch again and again, so that drawing it is not timed."""

    fingerprint = "one batch"

    def __init__(self, d: int, batch: int):
        self.batch = torch.randn(batch, d, generator=settings.generator(0))

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        return self.batch, self.batch


def one_by_one(n: int, d: int, k: int, batch: int):
    recipe = training.Recipe(10**6, schedule="constant", balance=remedies.Switch(ALPHA))
    models = students(n, d, k)
    return training.Run(models, Same(d, batch), dict.fromkeys(models, recipe), log_every=1)


class Stacked:
    """The same training with parameters [runs, n, d], dense codes and PyTorch's autograd."""

    def __init__(self, n: int, d: int, k: int, batch: int):
        models, self.k, self.x = students(n, d, k).values(), k, Same(d, batch).batch
        parts = [(m.encoder.weight, m.encoder.bias, m.decoder.weight, m.b_out) for m in models]
        parts = [torch.stack(same).detach().requires_grad_() for same in zip(*parts, strict=True)]
        self.w_enc, self.b_enc, self.w_dec, self.b_dec = self.parameters = parts
        self.optimiser = torch.optim.Adam(parts, lr=1e-3, fused=True)
        self.variance = loop.Run({}, Same(d, batch), {}).variance

    def step(self, _: int) -> Tensor:
        x = self.x - self.b_dec[:, None]
        scores = torch.baddbmm(self.b_enc[:, None], x, self.w_enc.mT)
        values, chosen = scores.topk(self.k, dim=2)
        codes = torch.zeros_like(scores).scatter(2, chosen, values.relu())
        output = torch.baddbmm(self.b_dec[:, None], codes, self.w_dec)
        loss = (output - self.x).square().sum((1, 2)) / (len(self.x) * self.variance)
        share = torch.zeros_like(scores).scatter(2, chosen, 1.0).mean(1) / self.k
        balance = ALPHA * scores.shape[2] * (share * scores.softmax(2).mean(1)).sum(1)
        self.optimiser.zero_grad()
        (loss + balance).sum().backward()
        with torch.no_grad():
            grad = self.w_dec.grad
            grad -= (grad * self.w_dec).sum(2, keepdim=True) * self.w_dec
            self.optimiser.step()
            self.w_dec.copy_(F.normalize(self.w_dec, dim=2))
        return loss.detach()


def alone(n: int, d: int, k: int, batch: int) -> float:
    """Seconds a step of all the runs, in a worker on one thread."""
    run = one_by_one(n, d, k, batch)
    for step in range(5):
        run.train_step(step)
    started = time.perf_counter()
    for step in range(5, STEPS):
        run.train_step(step)
    return (time.perf_counter() - started) / (STEPS - 5)


def difference(n: int, d: int, k: int, batch: int, steps: int = 5) -> float:
    """Largest relative difference of losses over the first steps and runs."""
    run, stacked = one_by_one(n, d, k, batch), Stacked(n, d, k, batch)
    seen = torch.stack([stacked.step(i) for i in range(steps)])
    for i in range(steps):
        run.train_step(i)
    ours = torch.tensor([fit.loss for fit in run.fits.values()]).T
    return float(((seen - ours) / ours).abs().max())


def main(repeats: int = 9) -> None:
    rows, targets, workers = [], [], settings.cores()
    for size in SIZES:
        n, d, k, batch = size
        run, stacked = one_by_one(*size), Stacked(*size)
        turns = {"one after another": run.train_step, "a leading run axis": stacked.step}
        times = {name: t["median"] for name, t in common.interleave(turns, repeats=repeats).items()}
        cell = dict(zip(("n", "d", "k", "batch"), size, strict=True))
        seconds = sweep(alone, [cell] * workers, workers=workers, label="side by side")
        times[f"{workers} processes, a thread each"] = max(seconds) / workers
        where = f"n={n}, d={d}, batch={batch}"
        targets.append(common.at_most(f"{where}: largest relative difference of losses", difference(*size), 1e-3))
        for name, t in times.items():
            row = {"n": n, "d_model": d, "k": k, "batch": batch, "what": name, "ms a run and step": 1e3 * t / RUNS}
            rows.append(row | {"times as fast": times["one after another"] / t})
    common.write(
        "runs",
        title="Many small runs",
        question=f"How long is a step of one of {RUNS} SAEs with the Switch loss and Adam, float32?",
        rows=rows,
        targets=targets,
        note="Medians of interleaved repeats; processes were timed apart, on all cores at once. The run axis has dense "
        "codes: remedies whose dead features differ in number from run to run do not fit it.",
    )


if __name__ == "__main__":
    main()
