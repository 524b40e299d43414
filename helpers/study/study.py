"""One bench for every training of the book: problems, arms, runs that are kept, one rule of choosing, one grid.

A *problem* gives a stream of batches for a seed and judges a student on rows that no training saw. An *arm* is a kind
of student: how it is built, its remedy, its learning rate. `run` fits and judges arms of one seed, `study` is the grid
of arms and seeds on `sweep`, `tune` tries learning rates, and `choose` is the rule by which everything is chosen.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from helpers import settings
from helpers.kept import Kept, digest
from helpers.settings import CacheDir, allowed
from helpers.study.scores import Sums, quotient
from helpers.study.sweep import sweep
from helpers.training.loop import Fit, Stream, fit
from helpers.training.remedies import Balance


class Problem(Protocol):
    """What students learn and are judged by. A frozen dataclass: it travels to workers, and its fields, or its property
    `asked`, are part of the key of every result."""

    steps: int

    def stream(self, seed: int, device: torch.device) -> Stream:
        """Batches of training rows; a seed is an order of them, or a world."""

    def judge(self, student: nn.Module, seed: int) -> Judged:
        """A student on validation rows, for choosing, and on test rows, for reporting."""


@dataclass(frozen=True)
class Judged:
    """What a problem says of a student.

    `sums`: columns [units] or [units, width] over the test rows of each unit, as `scores.Sums` takes them; `validation`
    what choices may look at; `about` whatever else a chapter shows (numbers, texts, arrays).
    """

    sums: dict[str, np.ndarray]
    validation: dict[str, float]
    about: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Arm:
    """A kind of student and how it is trained.

    Args:
        name: for tables; it is no part of a key.
        build: `build(problem, seed)` gives the untrained student, on the CPU. A function of a module, a `partial` of
            one or a dataclass with `__call__`, since arms travel. What the remedy needs (a selection bias) is added.
        recipe: further arguments of `training.fit`, such as `schedule`, `clip` or `steps`.
        batches: which order of the batches, if not the seed's own: `mix(seed, batches)`.
        first: an arm that is trained before; its student is the third argument of `build`. Time is that of both.
    """

    name: str = field(compare=False)
    build: Callable[[Any, int], nn.Module]
    remedy: Balance = field(default_factory=Balance)
    lr: float = 1e-3
    recipe: Mapping[str, Any] = field(default_factory=dict)
    batches: int = 0
    first: Arm | None = None


@dataclass(frozen=True)
class Outcome(Judged):
    """An arm with a seed, judged; `curve` has the logged steps and the training losses there."""

    arm: Arm | None = None
    seed: int = 0
    curve: tuple[list[int], list[float]] = ((), ())
    seconds: float = 0.0

    @property
    def fvu(self) -> float:
        """On test rows. Raises `ValueError` where they do not vary."""
        return quotient(self.sums["errors"].sum(), self.sums["norms"].sum())


def fits(
    problem: Problem, arms: Sequence[Arm], seed: int, *, device: str = "cpu", cache_dir: CacheDir = None
) -> list[Fit]:
    """The arms trained with this seed, side by side over one stream; finished ones are loaded."""
    where, found = torch.device(device), {}
    how = {"device": device, "cache_dir": cache_dir}
    begun = {str(i): trained(problem, arm.first, seed, **how) for i, arm in enumerate(arms) if arm.first}
    for one in arms:  # with those that see the same batches by the same recipe, if it was not with others before
        alike = {str(i): arm for i, arm in enumerate(arms) if (arm.batches, arm.recipe) == (one.batches, one.recipe)}
        if found.keys() & alike.keys():
            continue
        stream = problem.stream(settings.mix(seed, one.batches) if one.batches else seed, where)
        students = {i: _start(problem, arm, seed, begun.get(i)).to(where) for i, arm in alike.items()}
        # matrix products in bfloat16 where there are units for them, float32 parameters and sums everywhere
        options = {"steps": problem.steps, "autocast": torch.bfloat16 if where.type == "cuda" else None} | one.recipe
        options = {"log_every": max(1, options["steps"] // 50), "cache_dir": cache_dir} | options
        options["label"] = f"seed {seed}: {', '.join(arm.name for arm in alike.values())[:60]}"
        lr, balance = ({i: getattr(arm, name) for i, arm in alike.items()} for name in ("lr", "remedy"))
        found |= fit(students, stream, lr=lr, balance=balance, **options)
    for i, each in begun.items():
        found[i].seconds += each.seconds
    return [found[str(i)] for i in range(len(arms))]


def _start(problem: Problem, arm: Arm, seed: int, begun: Fit | None) -> nn.Module:
    student = arm.build(problem, seed) if begun is None else arm.build(problem, seed, begun.student.cpu())
    if arm.remedy.needs_bias and student.selection_bias is None:
        student.selection_bias = torch.zeros(student.n_features, dtype=student.encoder.weight.dtype)
    return student


def trained(problem: Problem, arm: Arm, seed: int, **options) -> Fit:
    """One arm trained with this seed; `options` of `fits`."""
    return fits(problem, [arm], seed, **options)[0]


def run(
    problem: Problem,
    arms: Sequence[Arm],
    seed: int,
    *,
    device: str = "cpu",
    cache_dir: CacheDir = None,
    cells: str | Path | None = None,
) -> list[Outcome]:
    """Fit and judge arms of one seed: a task for `sweep`. Those that were done before are not done again.

    Outcomes lie in the cache, under what was asked for and the code that made them; and, where `cells` names a folder,
    there as small files that go with the book, under what was asked for alone (`python -m helpers verify` checks them).
    """
    places = [Kept("runs", [problem, arm, seed, torch.device(device).type], run, cache_dir=cache_dir) for arm in arms]
    files = [None if cells is None else _cell_file(Path(cells), *each, seed) for each in zip(arms, places, strict=True)]
    found = [
        _from_file(file) or (None if cache_dir is False else place.read())
        for file, place in zip(files, places, strict=True)
    ]
    missing = [i for i, each in enumerate(found) if each is None]
    done = fits(problem, [arms[i] for i in missing], seed, device=device, cache_dir=cache_dir) if missing else []
    for i, each in zip(missing, done, strict=True):
        judged = problem.judge(each.student, seed)
        found[i] = vars(judged) | {"curve": (each.steps, each.loss), "seconds": each.seconds}
        if cache_dir is not False:
            with places[i].lock():  # under it what a killed process left of this file is cleared away
                places[i].write(found[i])
    for file, place, each in zip(files, places, found, strict=True):
        if file is not None and not file.is_file():
            outcome = json.loads(json.dumps(each, default=settings.as_json))
            about = {"asked": json.loads(place.what), "check": _check(outcome)}
            with place.lock() if cache_dir is not False else contextlib.nullcontext():
                for left in file.parent.glob(f".{file.name}.*.part"):
                    left.unlink(missing_ok=True)
                settings.write_json(file, about | {"outcome": outcome})
    return [Outcome(**each, arm=arm, seed=seed) for each, arm in zip(found, arms, strict=True)]


def _cell_file(folder: Path, arm: Arm, place: Kept, seed: int) -> Path:
    name = re.sub(r"[^a-z0-9.]+", "-", f"{arm.name} seed {seed}".lower()).strip("-")
    return folder / f"{name}-{place.asked[:12]}.json"


def _check(outcome: dict) -> str:
    return digest(json.dumps(outcome, sort_keys=True))


def _from_file(file: Path | None) -> dict | None:
    if file is None or not file.is_file():
        return None
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        found = content["outcome"]
        allowed(content["check"] == _check(found), "its checksum is wrong", "what was written")
        return found | {"sums": {column: np.array(values) for column, values in found["sums"].items()}}
    except (ValueError, KeyError, AttributeError) as error:
        raise ValueError(f"{file} is damaged ({error}); restore it from the repository, or delete it") from error


def study(
    problem: Problem | Mapping[str, Problem],
    arms: Mapping[Any, Arm] | Sequence[Arm],
    seeds: Sequence[int],
    *,
    together: int = 1,
    workers: int | None = None,
    label: str = "study",
    **options,
) -> dict[Any, list[Outcome]]:
    """Every arm with every seed, by the arm's name (or key), its outcomes in the order of the seeds.

    Args:
        problem: one for all arms, or one for each key.
        together: arms of a cell of the sweep: what trains side by side shares the cost of drawing batches.
        workers: see `sweep`.
        options: of `run`.
    """
    arms = dict(arms) if isinstance(arms, Mapping) else {arm.name: arm for arm in arms}
    allowed(bool(arms) and bool(seeds), f"{len(arms)} arms, seeds={list(seeds)}", "at least one of each")
    groups: dict[int, tuple[Any, list]] = {}
    for key in arms:
        own = problem[key] if isinstance(problem, Mapping) else problem
        groups.setdefault(id(own), (own, []))[1].append(key)
    parts = [
        (own, seed, keys[i : i + together])
        for seed in seeds  # seeds outside, so that a grid that is stopped has whole seeds first
        for own, keys in groups.values()
        for i in range(0, len(keys), together)
    ]
    cells = [{"problem": own, "arms": [arms[key] for key in keys], "seed": seed} | options for own, seed, keys in parts]
    found: dict[Any, list[Outcome]] = {key: [] for key in arms}
    for (_, _, keys), outcomes in zip(parts, sweep(run, cells, label=label, workers=workers), strict=True):
        for key, outcome in zip(keys, outcomes, strict=True):
            found[key].append(outcome)
    return found


def sums(found: Mapping[Any, Sequence[Outcome]], **shared: np.ndarray) -> Sums:
    """The outcomes of a study as one table."""
    return Sums({key: {each.seed: each.sums for each in some} for key, some in found.items()}, shared)


# -- choosing ----------------------------------------------------------------------------------------------------------

EQUAL = 0.01
"""Candidates within this share of the best count as equal, where a second measure decides among equals."""


def choose(candidates: Mapping[Any, Outcome | Sequence[Outcome]], by: str = "fvu", ties: str | None = None) -> Any:
    """The book's one rule: the key of the candidate with the least `by` on validation rows, means over its seeds.

    With `ties` those within 1 % of it count as equal, and of them the one with the least `ties` is taken.
    """
    allowed(bool(candidates), "candidates is empty", "at least one")

    def mean(some: Outcome | Sequence[Outcome], measure: str) -> float:
        return float(np.mean([each.validation[measure] for each in (some if isinstance(some, Sequence) else [some])]))

    least = min(mean(some, by) for some in candidates.values())
    if ties is None:
        return min(candidates, key=lambda key: mean(candidates[key], by))
    equal = [key for key, some in candidates.items() if mean(some, by) <= (1 + EQUAL) * least]
    return min(equal, key=lambda key: mean(candidates[key], ties))


def tune(
    problem: Problem | Mapping[str, Problem],
    arms: Mapping[Any, Arm] | Sequence[Arm],
    lrs: Sequence[float],
    seed: int,
    *,
    by: str = "fvu",
    ties: str | None = None,
    further: int = 0,
    together: int = 1,
    **options,
) -> dict[Any, dict[float, Outcome]]:
    """Every arm at every learning rate in place of its own, with one seed; `best` is the arm at the rate to take.

    Where an arm's best rate is the first or the last of its grid, the grid is continued there by the factor between the
    two rates at that end, `further` times at most. Raises `ValueError` for rates that do not rise.
    """
    allowed(bool(lrs) and list(lrs) == sorted(set(lrs)) and lrs[0] > 0, f"lrs={list(lrs)}", "positive rates that rise")
    arms = dict(arms) if isinstance(arms, Mapping) else {arm.name: arm for arm in arms}
    found: dict[Any, dict[float, Outcome]] = {key: {} for key in arms}
    wanted = [(key, float(lr)) for key in arms for lr in lrs]
    for extension in range(further + 1):
        problems = {(k, lr): problem[k] for k, lr in wanted} if isinstance(problem, Mapping) else problem
        cells = {(key, lr): replace(arms[key], lr=lr) for key, lr in wanted}
        label = "learning rates" if not extension else f"further learning rates ({extension})"
        if cells:
            outcomes = study(problems, cells, [seed], together=together, label=label, **options)
            for (key, lr), (outcome,) in outcomes.items():
                found[key][lr] = outcome
        beyond = {key: _beyond(tried, choose(tried, by, ties)) for key, tried in found.items()}
        wanted = [(key, lr) for key, lr in beyond.items() if lr is not None]
    return {key: dict(sorted(tried.items())) for key, tried in found.items()}


def _beyond(tried: Mapping[float, Any], best: float) -> float | None:
    """The next rate on the side where the best one is an end of the grid; None where it is inside."""
    rates = sorted(tried)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    end, before = (rates[0], rates[1]) if best == rates[0] else (rates[-1], rates[-2])
    return float(f"{end * end / before:.2g}")


def at_best(arms: Mapping[Any, Arm], tuned: Mapping[Any, Mapping[float, Outcome]], **rule) -> dict[Any, Arm]:
    """Each arm at the rate that `choose` takes of those in `tuned`."""
    return {key: replace(arms[key], lr=choose(tried, **rule)) for key, tried in tuned.items()}
