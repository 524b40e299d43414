"""One TopK-SAE training step, Adam included, beside four peers and beside its floor, all in one run.

Every peer is timed twice: as shipped, and with PyTorch's fused Adam in place of its own, since that alone is a gain
that has nothing to do with sparsity. Ratios are against the faster of the two.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import types
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F

from benchmarks import common
from helpers import dictionary, settings, training
from helpers.training import remedies

D_MODEL, K, BATCH, STEPS = 640, 32, 1024, 50
SWITCH, RUNS = 0.01, 3
"""Weight of the balance loss; and separate runs, each a process (`python -m benchmarks.training once 5120 FILE`)."""
LR = 2e-4
"""What Gao et al. (2024) take at 16384 latents. At a rate where training is unstable, two runs that differ by rounding
soon choose differently on a near-tie, and losses can no longer be compared to four digits."""


class PlainDense(nn.Module):
    """The obvious implementation: dense codes, dense products, autograd."""

    def __init__(self, sae: dictionary.RankOneDictionary):
        super().__init__()
        self.k = sae.k
        self.w_enc = nn.Parameter(sae.encoder.weight.detach().clone())
        self.b_enc = nn.Parameter(sae.encoder.bias.detach().clone())
        self.w_dec = nn.Parameter(sae.decoder.weight.detach().clone())
        self.b_dec = nn.Parameter(sae.b_out.detach().clone())

    def forward(self, x):
        pre_acts = F.linear(x - self.b_dec, self.w_enc, self.b_enc)
        values, indices = pre_acts.topk(self.k, dim=1)
        self.pre_acts, self.chosen = pre_acts, indices
        codes = torch.zeros_like(pre_acts).scatter(1, indices, values.relu())
        return codes @ self.w_dec + self.b_dec

    def step(self, x, variance, optimiser, switch: float = 0.0) -> float:
        """The error. With `switch` as its weight the Switch Transformer's balance loss is learned too."""
        error = loss = (self(x) - x).square().sum() / (len(x) * variance)
        if switch:
            share = torch.bincount(self.chosen.reshape(-1), minlength=len(self.w_enc)) / self.chosen.numel()
            loss = loss + switch * len(share) * (share * self.pre_acts.softmax(1).mean(0)).sum()
        optimiser.zero_grad()
        loss.backward()
        with torch.no_grad():
            grad, rows = self.w_dec.grad, self.w_dec
            grad -= (grad * rows).sum(1, keepdim=True) * rows
            optimiser.step()
            rows /= rows.norm(dim=1, keepdim=True)
        return float(error.detach())


def new_sae(n: int, k: int = K) -> dictionary.RankOneDictionary:
    return dictionary.topk_sae(D_MODEL, n, k, generator=settings.generator(0))


def data(rows: int = 8 * BATCH) -> torch.Tensor:
    """Rows with a decaying spectrum, so that the loss moves."""
    g = settings.generator(1)
    scales = torch.arange(1, D_MODEL + 1).float().rsqrt()
    return (
        torch.randn(rows, D_MODEL, generator=g) * scales @ torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=g)).Q
    )


def ours(n: int, stream, screen: bool = False, k: int = K, switch: float = 0.0) -> tuple:
    balance = remedies.Switch(switch) if switch else remedies.Balance()
    recipe = training.Recipe(10**6, lr=LR, schedule="constant", balance=balance)
    run = training.Run({"": new_sae(n, k).to(stream.device)}, stream, {"": recipe}, log_every=1, screen=screen)
    return run.train_step, run


def plain_dense(n: int, stream, fused: bool, k: int = K, switch: float = 0.0):
    model = PlainDense(new_sae(n, k).to(stream.device))
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, fused=fused)
    variance = training.Run({"": new_sae(n)}, stream, {"": training.Recipe(1)}).variance
    return lambda step: model.step(stream(step)[0], variance, optimiser, switch)


def sparsify(n: int, stream, fused: bool, k: int = K):
    with contextlib.redirect_stdout(io.StringIO()):
        from sparsify import SparseCoder, SparseCoderConfig
    model = SparseCoder(D_MODEL, SparseCoderConfig(num_latents=n, k=k)).to(stream.device)
    optimiser = torch.optim.Adam(model.parameters(), lr=LR, fused=fused)

    def step(i):
        model.set_decoder_norm_to_unit_norm()
        model(stream(i)[0]).fvu.backward()
        model.remove_gradient_parallel_to_decoder_directions()
        optimiser.step()
        optimiser.zero_grad()

    return step


def dictionary_learning(n: int, stream, fused: bool):
    sys.modules.setdefault("nnsight", types.ModuleType("nnsight")).LanguageModel = object  # imported, never used here
    from dictionary_learning.trainers.top_k import TopKTrainer

    trainer = TopKTrainer(10**6, D_MODEL, n, K, layer=0, lm_name="none", lr=LR, device="cpu")
    if fused:
        trainer.optimizer = torch.optim.Adam(trainer.ae.parameters(), lr=LR, fused=True)
        trainer.scheduler = torch.optim.lr_scheduler.ConstantLR(trainer.optimizer, factor=1.0)
    trainer.update(0, stream(0)[0])  # its first step also sets the bias
    return lambda step: trainer.update(step + 1, stream(step)[0])


def sae_lens(n: int, stream, fused: bool):
    from sae_lens import TopKTrainingSAE, TopKTrainingSAEConfig
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    sae = TopKTrainingSAE(TopKTrainingSAEConfig(d_in=D_MODEL, d_sae=n, k=K))
    trainer = SAETrainer(SAETrainerConfig(BATCH * 10**6, BATCH, lr=LR, lr_end=LR), sae, data_provider=iter(()))
    if fused:
        trainer.optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
    return lambda step: trainer._train_step(sae, stream(step)[0])


PEERS = {
    "plain dense": plain_dense,
    "eai-sparsify": sparsify,
    "dictionary-learning": dictionary_learning,
    "sae-lens": sae_lens,
}
PEERS_GOALS = {"plain dense": (2, 3), "eai-sparsify": (1.2, 1.4), "dictionary-learning": (2, 3), "sae-lens": (2, 3)}
"""How many times as long as ours they are to take, at the smaller and at the larger size."""


def floor(n: int, stream) -> dict:
    """The three things no step can do without, each alone: one encoder GEMM, one top-k, one optimiser pass."""
    sae, x = new_sae(n).to(stream.device), stream(0)[0]
    scores = sae.encoder.scores(x).detach()
    weights = [nn.Parameter(p.detach().clone()) for p in sae.parameters()]
    for p in weights:
        p.grad = torch.full_like(p, 1e-3)
    adam = torch.optim.Adam(weights, lr=LR, fused=True)
    rows = sae.encoder.weight.detach()
    return {
        "floor: encoder GEMM": lambda step: F.linear(x, rows, sae.encoder.bias.detach()),
        "floor: top-k": lambda step: scores.topk(K, dim=1),
        "floor: Adam pass": lambda step: adam.step(),
    }


def same_losses(n: int, stream, switch: float = 0.0) -> float:
    """Largest relative difference of the losses of our step and the plain dense one over `STEPS` steps, without what
    the remedy adds."""
    step, run = ours(n, stream, switch=switch)
    dense, theirs = plain_dense(n, stream, fused=True, switch=switch), []
    for i in range(STEPS):
        step(i)
        theirs.append(dense(i))
    return max(abs(a - b) / b for a, b in zip(run.fits[""].loss, theirs, strict=True))


def once(n: int, repeats: int = 11) -> dict:
    """One run: milliseconds by name, and how far losses are from the plain dense ones."""
    stream = training.Shuffled(data(), batch_size=BATCH, fingerprint="bench")
    callables = {"this book": ours(n, stream)[0], "this book, screened": ours(n, stream, True)[0], **floor(n, stream)}
    for name, make in PEERS.items():
        callables[name] = make(n, stream, fused=False)
        callables[f"{name} + fused Adam"] = make(n, stream, fused=True)
    times = common.interleave(callables, repeats)
    del callables  # at n = 16384 they hold gigabytes
    balanced = {"this book, Switch": ours(n, stream, switch=SWITCH)[0]}
    balanced |= {"plain dense, Switch": plain_dense(n, stream, fused=True, switch=SWITCH)}
    times |= common.interleave(balanced, repeats)
    differences = [same_losses(n, stream), same_losses(n, stream, SWITCH)]
    return {"times": {name: 1e3 * t["median"] for name, t in times.items()}, "differences": differences}


def compare(runs: Mapping[str, Sequence[dict]]) -> tuple[list[dict], list[dict]]:
    """Rows and targets of several runs of each size: medians, and the lowest ratio of any."""
    rows, targets = [], []
    for size, some in runs.items():
        n, times = int(size), [run["times"] for run in some]
        for run in times:
            run["the floor's three"] = sum(run[name] for name in run if name.startswith("floor"))
            for name in PEERS:
                run[f"{name}, the better of two"] = min(run[name], run[f"{name} + fused Adam"])
            run["the best peer"] = min(run[f"{name}, the better of two"] for name in PEERS)
        found, screened = (common.over_runs(times, f"this book{how}") for how in ("", ", screened"))
        with_switch = common.over_runs(times, "this book, Switch")
        rows += [
            {
                "n_features": n,
                "what": name,
                "ms": t["median"],
                "lowest / ours": t["lowest"],
                "highest / ours": t["highest"],
            }
            for name, t in found.items()
        ]
        large = n == max(map(int, runs))
        for name, goals in PEERS_GOALS.items():
            lowest = found[f"{name}, the better of two"]["lowest"]
            targets.append(common.at_least(f"n={n}: {name}, the better of two, / ours, lowest", lowest, goals[large]))
        best = screened["the best peer"]["lowest"]
        targets.append(common.at_least(f"n={n}: the best peer / ours, screened, lowest", best, 1.6 if large else 1.4))
        dense = with_switch["plain dense, Switch"]["lowest"]
        targets.append(common.at_least(f"n={n}: plain dense / ours, both with Switch, lowest", dense, 3))
        highest = 1 / found["the floor's three"]["lowest"]
        targets.append(common.at_most(f"n={n}: ours / floor, highest", highest, 1.25))
        worst = max(difference for run in some for difference in run["differences"])
        what = f"n={n}: largest relative loss difference to plain dense, {STEPS} steps, without and with Switch"
        targets.append(common.at_most(what, worst, 1e-4))
    return rows, targets


def main(how: str = "", *rest: str, sizes: tuple[int, ...] = (5120, 16384)) -> None:
    if how == "once":
        Path(rest[1]).write_text(json.dumps(once(int(rest[0]))))
        return
    rows, targets = compare(common.separately("training", list(map(str, sizes)), RUNS))
    common.write(
        "training",
        title="One training step of a TopK SAE",
        question=f"How long is a step with Adam, d_model={D_MODEL}, k={K}, batch={BATCH}, float32?",
        rows=rows,
        targets=targets,
        note=f"{common.processor()}. Screened: `fit(…, screen=True)`, the choice of float32 found in bfloat16. Peers: "
        "their own training step without evaluation or logging. Medians of interleaved repeats, and of those the "
        f"median of {RUNS} separate runs; ratios are within runs, and goals are for the worst. Losses are those of the "
        "reconstruction.",
    )


if __name__ == "__main__":
    main(*sys.argv[1:])
