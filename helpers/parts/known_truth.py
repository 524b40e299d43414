"""Remedies for dead features on trial, where the true features are known.

A `Problem` is a kind of world and the student that shall learn it; a `Setting` is a remedy with its strength and
learning rate. `trial` trains every setting of one seed over one stream and judges each on rows that no training saw.
`contest` is a grid of trials with the same number of candidates for every method; what follows it chooses among them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from helpers import kept, settings
from helpers.dictionary import RankOneDictionary, topk_sae
from helpers.parts.worlds import World, world
from helpers.study.scores import bootstrap_interval, evaluate, recovery
from helpers.study.sweep import sweep
from helpers.training import Fit, Fresh, fit, remedies
from helpers.training.remedies import Balance

STARTS = ("tied", "untied", "small", "large")
"""How the encoder starts: as the decoder, as other random unit rows, or as the decoder's rows ×1/10 or ×4."""


@dataclass(frozen=True)
class Problem:
    """A kind of world (arguments of `worlds.world`), the SAE that learns it, and for how long.

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
    `scores.Recovery` for the live ones.
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
    sample as large as the validation one. `recipe` goes to `training.fit`. Trainings and outcomes are kept in the
    cache folder, unless that is False.
    """
    found = kept.keep(
        "trials", [problem, seed, given, recipe],
        lambda: {name: asdict(each) for name, each in _trial(problem, seed, given, cache_dir, **recipe).items()},
        cache_dir=cache_dir,
    )  # fmt: skip
    return {name: Outcome(**found[name]) for name in given}


@dataclass(frozen=True)
class Trained:
    """The settings of one cell after training, with the world they learnt and rows of it that no training saw."""

    fits: Mapping[str, Fit]
    source: World
    validation: Float[Tensor, "rows d"]
    test: Float[Tensor, "rows d"]

    def judge(self, name: str) -> Outcome:
        each = self.fits[name]
        return judge(each.student, self.validation, self.test, self.source.atoms, each.seconds)


def train(
    problem: Problem,
    seed: int,
    given: Mapping[str, Setting],
    cache_dir: str | Path | None | Literal[False] = None,
    **recipe,
) -> Trained:
    """Train the settings over one stream of the seed's world; `trial` judges what comes out."""
    source = problem.draw(seed)
    mean, validation, test = (source.sample(problem.n_rows, settings.generator(10 * seed + i)) for i in (2, 3, 4))
    stream = Fresh(source.sample, batch_size=problem.batch_size, fingerprint=source.fingerprint, seed=10 * seed + 5)
    fits = fit(
        {name: student(problem, setting, seed, mean.mean(0)) for name, setting in given.items()},
        stream,
        steps=problem.steps,
        lr={name: setting.lr for name, setting in given.items()},
        balance={name: setting.balance for name, setting in given.items()},
        log_every=max(1, problem.steps // 20),
        label=f"seed {seed}, k = {problem.k}",
        cache_dir=cache_dir,
        **recipe,
    )
    return Trained(fits, source, validation, test)


def _trial(problem: Problem, seed: int, given: Mapping[str, Setting], cache_dir, **recipe) -> dict[str, Outcome]:
    done = train(problem, seed, given, cache_dir, **recipe)
    return {name: done.judge(name) for name in given}


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


# -- a contest of methods ----------------------------------------------------------------------------------------------

METHODS: dict[str, Callable[[float, int], Balance]] = {
    "none": lambda strength, steps: Balance(),
    "auxk": lambda strength, steps: remedies.AuxK(strength, silent_for=max(1, steps // 20)),
    "ghost": lambda strength, steps: remedies.Ghost(strength, silent_for=max(1, steps // 20)),
    "resample": lambda strength, steps: remedies.Resample(max(2, steps // 8), strength, until=0.7),
    "anneal": lambda strength, steps: remedies.Anneal(strength),
    "zloss": lambda strength, steps: remedies.ZLoss(strength),
    "bias": lambda strength, steps: remedies.LossFree(strength),
    "switch": lambda strength, steps: remedies.Switch(strength),
}
"""A remedy by its strength and the run's length, to which waits and intervals are scaled."""

STRENGTHS: dict[str, tuple[float, ...]] = {
    "auxk": (1 / 32, 1.0),
    "ghost": (0.1, 1.0),
    "resample": (0.2, 1.0),
    "anneal": (2.0, 4.0),
    "zloss": (1e-4, 1e-3),
    "bias": (1e-3, 1e-2),
    "switch": (0.01, 0.1),
}
"""As many strengths for each: its authors' own value, where they give one that fits, and one more."""

CELL = 16
"""Students trained side by side: they share the cost of drawing samples, and their state still fits in a cache."""

CANDIDATE = ["method", "strength", "lr", "centred"]
"""The columns of a contest that name a candidate."""


def candidates(lrs: Sequence[float], extra_lrs: Sequence[float], centred: Sequence[bool] = (False, True)) -> list[dict]:
    """Every method at each of its strengths, learning rates and centrings, as rows of `CANDIDATE`.

    "none" has no strength: it gets `extra_lrs` besides, as many as make its number of candidates that of the others.
    """
    each = len(next(iter(STRENGTHS.values())))
    if len(lrs) + len(extra_lrs) != each * len(lrs):
        raise ValueError(
            f"extra_lrs has {len(extra_lrs)} values; allowed: {(each - 1) * len(lrs)}, so that doing nothing is tuned "
            "as much as anything else"
        )
    rows = [
        {"method": method, "strength": strength, "lr": lr, "centred": centre}
        for centre in centred
        for method, strengths in STRENGTHS.items()
        for strength in strengths
        for lr in lrs
    ]
    nothing = [
        {"method": "none", "strength": 0.0, "lr": lr, "centred": centre}
        for centre in centred
        for lr in sorted([*lrs, *extra_lrs])
    ]
    return nothing + rows


def setting(row: Mapping[str, float | str | bool], steps: int) -> Setting:
    """The `Setting` of a candidate; a method `a+b` with strength (x, y) is both at once."""
    names, strengths = str(row["method"]).split("+"), np.atleast_1d(row["strength"]).tolist()
    parts = [METHODS[name](strength, steps) for name, strength in zip(names, strengths, strict=True)]
    balance = parts[0] if len(parts) == 1 else remedies.Together(*parts)
    return Setting(balance, float(row["lr"]), bool(row["centred"]))


def contest(
    problem: Problem,
    rows: Mapping[int, Sequence[Mapping]] | Sequence[Mapping],
    *,
    ks: Sequence[int],
    seeds: Sequence[int],
    cache_dir: str | Path | None | Literal[False] = None,
    **options,
) -> pd.DataFrame:
    """Train every candidate at each k and seed; a line each, with k, seed, the candidate and its `Outcome`.

    `rows` may differ by k. A cell of the sweep trains up to `CELL` candidates of one k and seed over one stream;
    `options` go to `sweep`.
    """
    given = {k: list(rows[k] if isinstance(rows, Mapping) else rows) for k in ks}
    grid = [(k, seed, given[k][i : i + CELL]) for k in ks for seed in seeds for i in range(0, len(given[k]), CELL)]
    cells = [
        {
            "problem": replace(problem, k=k),
            "seed": seed,
            "given": {str(i): setting(row, problem.steps) for i, row in enumerate(part)},
            "cache_dir": cache_dir,
        }
        for k, seed, part in grid
    ]
    results = sweep(trial, cells, **{"label": "contest"} | options)
    lines = [
        {"k": k, "seed": seed} | dict(row) | asdict(outcomes[str(i)])
        for (k, seed, part), outcomes in zip(grid, results, strict=True)
        for i, row in enumerate(part)
    ]
    return pd.DataFrame(lines)


def choose(frame: pd.DataFrame, tolerance: float = 0.01) -> tuple:
    """The candidate (a tuple of `CANDIDATE`) with the lowest validation FVU, means over seeds; candidates within
    `tolerance` of it count as equal, and of them the one with the fewest dead on validation rows is taken."""
    means = _means(frame)
    near = means[means.validation_fvu <= (1 + tolerance) * means.validation_fvu.min()]
    return near.sort_values(["validation_dead", "validation_fvu"]).index[0]


def front(frame: pd.DataFrame) -> list[tuple]:
    """Candidates that no other beats in both validation FVU and dead share (means over seeds), by rising FVU."""
    means = _means(frame).sort_values(["validation_fvu", "validation_dead"])
    best, kept = math.inf, []
    for candidate, line in means.iterrows():
        if line.validation_dead < best:
            best = line.validation_dead
            kept.append(candidate)
    return kept


def of(frame: pd.DataFrame, candidate: tuple) -> pd.DataFrame:
    """The lines of one candidate, a seed each, in the order of the seeds."""
    wanted = tuple(value.item() if isinstance(value, np.generic) else value for value in candidate)
    same = [line == wanted for line in frame[CANDIDATE].itertuples(index=False, name=None)]
    return frame[same].sort_values("seed")


def fewest_dead(frame: pd.DataFrame, fvu: float, tolerance: float = 0.01) -> tuple | None:
    """Of the candidates whose validation FVU is at most `fvu`·(1 + tolerance), the one with the fewest dead."""
    means = _means(frame)
    near = means[means.validation_fvu <= (1 + tolerance) * fvu]
    return None if near.empty else near.sort_values(["validation_dead", "validation_fvu"]).index[0]


def lowest_fvu(frame: pd.DataFrame, dead: float) -> tuple | None:
    """Of the candidates whose validation dead share is at most `dead`, the one with the lowest validation FVU."""
    means = _means(frame)
    near = means[means.validation_dead <= dead]
    return None if near.empty else near.validation_fvu.idxmin()


def validation(frame: pd.DataFrame, candidate: tuple) -> tuple[float, float]:
    """FVU and dead share of a candidate on validation rows, means over seeds."""
    lines = of(frame, candidate)
    return float(lines.validation_fvu.mean()), float(lines.validation_dead.mean())


def over_seeds(values: Sequence[float] | np.ndarray, **bootstrap) -> tuple[float, float, float]:
    """Mean over the seeds with its bootstrap interval: (mean, low, high)."""
    values = np.asarray(values, dtype=float)
    return (float(values.mean()), *bootstrap_interval(values, **bootstrap))


def _means(frame: pd.DataFrame) -> pd.DataFrame:
    return frame.groupby(CANDIDATE, sort=False)[["validation_fvu", "validation_dead"]].mean()


# -- comparisons -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Paired:
    """A number from paired seeds with its bootstrap interval. `bound`: the number is only a lower bound."""

    value: float
    ci: tuple[float, float]
    n: int
    bound: bool = False


def paired(
    first: pd.DataFrame, second: pd.DataFrame, column: str, how: Literal["ratio", "difference"] = "ratio", **bootstrap
) -> Paired:
    """Mean of `column` of the first candidate over (or minus) that of the second, seeds resampled in pairs."""
    pairs = np.c_[first.sort_values("seed")[column], second.sort_values("seed")[column]].astype(float)

    def statistic(data: np.ndarray) -> float:
        a, b = data.mean(0)
        return float(a / b if how == "ratio" else a - b)

    return Paired(statistic(pairs), bootstrap_interval(pairs, statistic, **bootstrap), len(pairs))


def times_fewer(more: pd.DataFrame, fewer: pd.DataFrame, n_features: int, **bootstrap) -> Paired:
    """Dead features of the first candidate over those of the second, summed over paired seeds, on test rows.

    A count of zero is taken as one, on both sides: below, it makes the ratio a lower bound.
    """
    pairs = np.c_[more.sort_values("seed").dead, fewer.sort_values("seed").dead] * n_features

    def ratio(counts: np.ndarray) -> float:
        return float(max(counts[:, 0].sum(), 1.0) / max(counts[:, 1].sum(), 1.0))

    none_dead = bool(pairs[:, 1].sum() < 0.5)
    return Paired(ratio(pairs), bootstrap_interval(pairs, ratio, **bootstrap), len(pairs), none_dead)


def matched(frame: pd.DataFrame, method: str = "switch") -> tuple[tuple, tuple, bool]:
    """A method's chosen candidate, the other methods' with the fewest dead at no larger FVU, and whether there is one.

    All by validation rows. Where no other method comes within 1 % of that FVU, the one that comes nearest stands in.
    """
    mine = choose(frame[frame.method == method])
    others = frame[~frame.method.str.contains(method)]
    rival = fewest_dead(others, validation(frame, mine)[0])
    return mine, rival or _means(others).validation_fvu.idxmin(), rival is not None


def dominance(frame: pd.DataFrame, n_features: int, method: str = "switch") -> tuple[tuple, tuple]:
    """The candidate of the other methods' Pareto front that is hardest to match, and the method's answer to it.

    For each candidate on that front the answer is the method's candidate of lowest validation FVU with at most one
    dead feature more (or its fewest dead, if none has so few); hardest is where the answer's FVU is largest in ratio.
    """
    mine, others = frame[frame.method == method], frame[~frame.method.str.contains(method)]
    pairs = []
    for rival in front(others):
        fvu, dead = validation(frame, rival)
        answer = lowest_fvu(mine, dead + 1 / n_features) or _means(mine).validation_dead.idxmin()
        pairs.append((validation(frame, answer)[0] / fvu, rival, answer))
    _, rival, answer = max(pairs, key=lambda pair: pair[0])
    return rival, answer


def finalists(frame: pd.DataFrame, method: str = "switch") -> dict[str, tuple]:
    """Chosen candidates, each by the rule: nothing done, the method, the best of the others, and it with the method."""
    other = frame[~frame.method.str.contains(method) & (frame.method != "none")]
    found = {"none": frame[frame.method == "none"], method: frame[frame.method == method], "other": other}
    found["both"] = frame[frame.method.str.contains("+", regex=False)]
    return {name: choose(part) for name, part in found.items() if len(part)}


def packed(frame: pd.DataFrame) -> list[dict]:
    """A contest as points for a results file: one entry a candidate and k, its outcomes as lists over seeds."""
    keys = [name for name in frame if name in ("situation", "k", *CANDIDATE)]
    points = []
    for values, lines in frame.groupby(keys, sort=False):
        rest = lines.sort_values("seed").drop(columns=keys)
        points.append(dict(zip(keys, values, strict=True)) | {n: [_short(v) for v in rest[n].tolist()] for n in rest})
    return points


def unpacked(points: Sequence[Mapping]) -> pd.DataFrame:
    """The inverse of `packed`."""
    lines = []
    for point in points:
        keys = {name: value for name, value in point.items() if not isinstance(value, list) or name == "strength"}
        if isinstance(keys["strength"], list):
            keys["strength"] = tuple(keys["strength"])
        lists = {name: value for name, value in point.items() if name not in keys}
        lines += [keys | dict(zip(lists, values, strict=True)) for values in zip(*lists.values(), strict=True)]
    return pd.DataFrame(lines)


def _short(value: float) -> float:
    return float(f"{value:.5g}") if isinstance(value, float) else value


def regimes(
    axes: Mapping[str, Mapping[float | str, tuple[Problem, Setting]]],
    seeds: Sequence[int],
    *,
    cache_dir: str | Path | None | Literal[False] = None,
    **options,
) -> pd.DataFrame:
    """Outcomes of one setting under changed conditions: a line for each axis, its value, and the seed."""
    grid = [(axis, value, seed) for axis, values in axes.items() for value in values for seed in seeds]
    cells = [
        {"problem": problem, "seed": seed, "given": {"": given}, "cache_dir": cache_dir}
        for axis, value, seed in grid
        for problem, given in (axes[axis][value],)
    ]
    results = sweep(trial, cells, **{"label": "regimes"} | options)
    lines = [
        {"axis": axis, "value": value, "seed": seed} | {n: _short(v) for n, v in asdict(outcome[""]).items()}
        for (axis, value, seed), outcome in zip(grid, results, strict=True)
    ]
    return pd.DataFrame(lines)
