"""Remedies for dead features on trial, where the true features are known.

A `Problem` is a kind of world and the student that shall learn it; a `Setting` is a remedy with its strength and
learning rate. `trial` trains every setting of one seed over one stream and judges each on rows that no training saw.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch.nn import functional as F

from helpers import settings
from helpers.dictionary import RankOneDictionary, topk_sae
from helpers.losses import Balance
from helpers.metrics import evaluate, recovery
from helpers.synthetic import World, world
from helpers.training import Fresh, fit

STARTS = ("tied", "untied", "small", "large")
"""How the encoder starts: as the decoder, as other random unit rows, or as the decoder's rows ×1/10 or ×4."""


@dataclass(frozen=True)
class Problem:
    """A kind of world (arguments of `synthetic.world`), the SAE that learns it, and for how long.

    A seed draws the world, the start of the student and the samples. `n_rows` are drawn for validation and as many
    for the test; a feature is dead when it fires on none of them.
    """

    n_features: int
    k: int
    steps: int
    n_true: int = 256
    d: int = 32
    batch_size: int = 256
    n_rows: int = 20_000
    world: Mapping[str, float | str] = field(default_factory=dict)

    def draw(self, seed: int) -> World:
        return world(self.n_true, self.d, generator=settings.generator(10 * seed), **self.world)


@dataclass(frozen=True)
class Setting:
    """One remedy at one strength and learning rate. `centred`: b_dec starts at the data's mean and not at zero."""

    balance: Balance = field(default_factory=Balance)
    lr: float = 1e-2
    centred: bool = False
    start: Literal["tied", "untied", "small", "large"] = "tied"

    def __post_init__(self):
        if self.start not in STARTS:
            raise ValueError(f"start={self.start!r} is unknown; allowed: {', '.join(map(repr, STARTS))}")


@dataclass(frozen=True)
class Outcome:
    """What a trained student does: on validation rows what needs no truth (for choosing), on test rows everything.

    `dead` and `dense` are shares of the features; `found`, `matched`, `mmcs`, `mcc` and `duplicates` are those of
    `metrics.Recovery` for the live ones.
    """

    validation_fvu: float
    validation_dead: float
    fvu: float
    dead: float
    dense: float
    largest_rate: float
    found: float
    matched: float
    mmcs: float
    mcc: float
    duplicates: float
    seconds: float


def student(problem: Problem, setting: Setting, seed: int, b_dec: torch.Tensor) -> RankOneDictionary:
    """The untrained SAE of a setting; all settings of a seed start from the same atoms."""
    random = settings.generator(10 * seed + 1)
    sae = topk_sae(
        problem.d,
        problem.n_features,
        problem.k,
        generator=random,
        b_dec=b_dec if setting.centred else None,
        selection_bias=setting.balance.needs_bias,
    )
    with torch.no_grad():
        if setting.start == "untied":
            sae.encoder.weight.copy_(F.normalize(torch.randn(sae.encoder.weight.shape, generator=random), dim=1))
        sae.encoder.weight.mul_({"small": 0.1, "large": 4.0}.get(setting.start, 1.0))
    return sae


def trial(
    problem: Problem,
    seed: int,
    given: Mapping[str, Setting],
    cache_dir: str | Path | None | Literal[False] = None,
    **recipe,
) -> dict[str, Outcome]:
    """Train the settings (by name) over one stream of the seed's world and judge them.

    A task for `sweep`: one cell is one problem and seed. The data's mean, where a setting asks for it, is that of a
    sample as large as the validation one. `recipe` goes to `training.fit`.
    """
    source = problem.draw(seed)
    rows = {
        name: source.sample(problem.n_rows, settings.generator(10 * seed + i))
        for i, name in enumerate(("mean", "validation", "test"), 2)
    }
    mean = rows["mean"].mean(0)
    stream = Fresh(source.sample, batch_size=problem.batch_size, fingerprint=source.fingerprint, seed=10 * seed + 5)
    students = {name: student(problem, setting, seed, mean) for name, setting in given.items()}
    trained = fit(
        students,
        stream,
        steps=problem.steps,
        lr={name: setting.lr for name, setting in given.items()},
        balance={name: setting.balance for name, setting in given.items()},
        log_every=max(1, problem.steps // 20),
        label=f"seed {seed}, k = {problem.k}",
        cache_dir=cache_dir,
        **recipe,
    )
    return {
        name: judge(each.student, rows["validation"], rows["test"], source.atoms, each.seconds)
        for name, each in trained.items()
    }


def judge(
    sae: RankOneDictionary, validation: torch.Tensor, test: torch.Tensor, truth: torch.Tensor, seconds: float = 0.0
) -> Outcome:
    """An `Outcome` from rows of the world and its true features."""
    before, after = evaluate(sae, validation), evaluate(sae, test)
    live = sae.decoder.weight.detach()[after.rates > 0]
    match = recovery(live, truth)
    return Outcome(
        before.fvu,
        before.dead,
        after.fvu,
        after.dead,
        after.dense,
        after.largest_rate,
        match.found,
        match.matched,
        match.mmcs,
        match.mcc,
        match.duplicates,
        seconds,
    )
