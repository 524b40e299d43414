"""One training step under each rule of choosing, beside the TopK step and the steps of SAELens, all in one run."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator

import torch
from torch.nn import functional as F

from benchmarks import common
from benchmarks.harvest import own_peak
from benchmarks.training import BATCH, D_MODEL, LR, K, data
from helpers import settings, training
from helpers.dictionary import RankOneDictionary, Select, gated_sae, topk_sae
from helpers.training.remedies import Balance, Gated, Nested, TargetL0

N = 16384
CHOICES = ("token", "batch", "threshold", "groups", "always", "atom")
"""Rules that differ in what is chosen alone; a Gated SAE and nested prefixes compute more beside it."""
COST, MEMORY = 1.3, 1.2
"""What a rule may cost, in steps of TopK and in the memory of one."""


def stream() -> training.Shuffled:
    """Rows of one length, as what leaves a norm: with others the longest have many times more codes than most."""
    return training.Shuffled(F.normalize(data(), dim=1), batch_size=BATCH, fingerprint="bench")


def student(rule: str) -> tuple[RankOneDictionary, Balance]:
    """A dictionary that has `K` codes an input on average at the start, and what is minimised beside the error."""
    g = settings.generator(0)
    if rule == "gated":
        sae = gated_sae(D_MODEL, N, K, generator=g)
        sae.router.bias.data -= cut(sae)
        return sae, Gated(0.3)
    sae = topk_sae(D_MODEL, N, K, generator=g)
    beside = Nested((N // 16, N // 4)) if rule == "nested" else Balance()
    numbers = {"groups": {"n_groups": 16, "groups": 8}, "always": {"always": K // 8}}.get(rule, {})
    if rule == "threshold":
        numbers, beside = {"threshold": cut(sae), "bandwidth": 0.2 * cut(sae)}, TargetL0(K)
    sae.select = Select("token" if rule == "nested" else rule, N, **numbers)
    return sae, beside


def cut(sae: RankOneDictionary) -> float:
    """The score that some rows have `K` times each on average: few, since to sort a batch's would take more memory than
    a step, which is what is measured."""
    scores = sae.router.scores(stream()(0)[0][:64]).detach()
    return float(scores.flatten().topk(K * len(scores)).values[-1])


def ours(rule: str) -> Callable[[int], object]:
    sae, beside = student(rule)
    recipe = training.Recipe(10**6, lr=LR, schedule="constant", balance=beside)
    return training.Run({"": sae}, stream(), {"": recipe}).train_step


def sae_lens() -> Iterator[tuple[str, Callable[[int], object]]]:
    """SAELens' own steps, as shipped and with PyTorch's fused Adam."""
    import sae_lens as peer
    from sae_lens.config import SAETrainerConfig
    from sae_lens.training.sae_trainer import SAETrainer

    batches, start = stream(), cut(topk_sae(D_MODEL, N, K, generator=settings.generator(0)))
    batchtopk = peer.BatchTopKTrainingSAEConfig(d_in=D_MODEL, d_sae=N, k=K)
    about = {"jumprelu_init_threshold": start, "jumprelu_bandwidth": 0.2 * start, "target_l0": float(K)}
    jumprelu = peer.JumpReLUTrainingSAEConfig(d_in=D_MODEL, d_sae=N, decoder_init_norm=1.0, **about)
    for rule, made in (("batch", peer.BatchTopKTrainingSAE), ("threshold", peer.JumpReLUTrainingSAE)):
        for fused in (False, True):
            sae = made(batchtopk if rule == "batch" else jumprelu)
            trainer = SAETrainer(SAETrainerConfig(BATCH * 10**6, BATCH, lr=LR, lr_end=LR), sae, data_provider=iter(()))
            if fused:
                trainer.optimizer = torch.optim.Adam(sae.parameters(), lr=LR, fused=True)
            name = f"sae-lens: {rule}" + (" + fused Adam" if fused else "")
            yield name, lambda step, trainer=trainer, sae=sae: trainer._train_step(sae, batches(step)[0])


def peak_bytes(rule: str) -> int:
    """Peak resident memory of a process of its own that takes three steps."""
    done = subprocess.run([sys.executable, "-m", "benchmarks.rules", rule], capture_output=True, text=True, check=True)
    return int(done.stdout.split()[-1])


def main(repeats: int = 11) -> None:
    named = (*CHOICES, "gated", "nested")
    times = common.interleave({rule: ours(rule) for rule in named} | dict(sae_lens()), repeats)
    memory = {rule: peak_bytes(rule) for rule in named}
    rows = [
        {
            "what": name,
            "ms": 1e3 * t["median"],
            "iqr_ms": 1e3 * t["iqr"],
            "× TopK's step": t["median"] / times["token"]["median"],
            "peak memory (GB)": memory[name] / 1e9 if name in memory else None,
        }
        for name, t in times.items()
    ]
    targets = []
    for rule in CHOICES[1:]:
        slower = times[rule]["median"] / times["token"]["median"]
        targets.append(common.at_most(f"{rule} / TopK's step", slower, COST))
        targets.append(common.at_most(f"{rule} / TopK's memory", memory[rule] / memory["token"], MEMORY))
    for rule in ("batch", "threshold"):
        theirs = min(t["median"] for name, t in times.items() if name.startswith(f"sae-lens: {rule}"))
        what = f"sae-lens' {rule}, the better of two, / ours"
        targets.append(common.at_least(what, theirs / times[rule]["median"], 3))
    common.write(
        "rules",
        title="One training step under each rule of choosing",
        question=f"What does a rule cost beside TopK, at n={N}, d_model={D_MODEL}, k={K}, batch={BATCH}, float32?",
        rows=rows,
        targets=targets,
        note=f"{common.processor()}. Every rule has {K} codes an input on average at the start; `threshold` with its "
        "loss on L0, Gated and nested with theirs. eai-sparsify has neither BatchTopK nor JumpReLU. Memory: peak of a "
        "process of its own that takes three steps, imports and data included. Medians of interleaved repeats.",
    )


if __name__ == "__main__":
    if len(sys.argv) > 1:
        step = ours(sys.argv[1])
        for i in range(3):
            step(i)
        print(own_peak())
    else:
        main()
