"""Remedies for dead features on trial, where the true features are known (chapters 7 and 8).

`contest` trains candidates into a table with a line for each and each seed; what follows chooses among its lines and
compares them. At the end the Switch loss's gradient for the scores, whole or in part (`pull`, `Pinned`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import ClassVar, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from helpers import settings
from helpers.dictionary import RankOneDictionary, topk_sae
from helpers.parts.rivals import REMEDIES, STRENGTHS
from helpers.parts.worlds import SynthSaeBench, World, random_atoms
from helpers.settings import allowed, one_of
from helpers.study.scores import Comparison, evaluate, over_seeds, recovery, relabelled
from helpers.study.study import EQUAL, Arm, Judged, Outcome, choose, study
from helpers.training import Fresh, remedies
from helpers.training.remedies import Balance, Moment, load_shares

# -- the problem -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class KnownTruth:
    """A kind of world, the SAE that learns it, and for how long.

    A seed draws the world (whose own seed does not count), the start of the student and the samples. `n_rows` are drawn
    for validation and as many for the test; a feature is dead when it fires on none of them.
    """

    world: World | SynthSaeBench
    n_features: int
    k: int
    steps: int
    batch_size: int = 256
    n_rows: int = 20_000

    def stream(self, seed: int, device: torch.device) -> Fresh:
        world = _drawn(self, seed)[0]
        return Fresh(
            world.sample, batch_size=self.batch_size, fingerprint=str(world), seed=10 * seed + 5, device=device
        )

    def judge(self, student: RankOneDictionary, seed: int) -> Judged:
        """Choices may look at FVU and dead share. `about` the test rows: shares of the features that are `dead` and
        `dense`, their `rates` [n_features], each truth's best cosine over the live ones (`cosines` [n_true]), and what
        `scores.Recovery` says of those.
        """
        world, _, validation, test = _drawn(self, seed)
        before, after = evaluate(student, validation), evaluate(student, test)
        match = recovery(student.decoder.weight.detach()[after.rates > 0].cpu(), world.atoms)
        about = {name: getattr(after, name) for name in ("dead", "dense", "largest_rate")}
        about |= {name: getattr(match, name) for name in ("found", "matched", "mmcs", "mcc", "duplicates")}
        about |= {"rates": after.rates.numpy(), "cosines": match.of_truth.numpy()}
        sums = {"errors": after.squared_error.sum(0, True).numpy(), "norms": after.squared_norm.sum(0, True).numpy()}
        return Judged(sums, {"fvu": before.fvu, "dead": before.dead}, about)


@lru_cache(maxsize=4)
def _drawn(problem: KnownTruth, seed: int) -> tuple[World | SynthSaeBench, Tensor, Tensor, Tensor]:
    """The seed's world and three samples of it: for its mean, for validation and for the test."""
    world = replace(problem.world, seed=10 * seed)
    return world, *(world.sample(problem.n_rows, settings.generator(10 * seed + i)) for i in (2, 3, 4))


STARTS = ("tied", "untied", "small", "large")
"""How the encoder starts: as the decoder, as other random unit rows, or as the decoder's rows ×1/10 or ×4."""


@dataclass(frozen=True)
class StartingSae:
    """Builds the untrained SAE of an arm; all of a seed have the same atoms. `centred`: b_dec starts at the data's mean
    and not at zero."""

    centred: bool = False
    start: str = "tied"

    def __post_init__(self):
        one_of("start", self.start, STARTS)

    def __call__(self, problem: KnownTruth, seed: int) -> RankOneDictionary:
        random = settings.generator(10 * seed + 1)
        b_dec = _drawn(problem, seed)[1].mean(0) if self.centred else None
        sae = topk_sae(problem.world.d, problem.n_features, problem.k, generator=random, b_dec=b_dec)
        with torch.no_grad():
            if self.start == "untied":
                sae.encoder.weight.copy_(F.normalize(torch.randn(sae.encoder.weight.shape, generator=random), dim=1))
            sae.encoder.weight.mul_({"small": 0.1, "large": 4.0}.get(self.start, 1.0))
        return sae


def measured(outcome: Outcome) -> dict[str, float]:
    """An outcome as numbers: on validation rows what needs no truth, on test rows everything."""
    found = {f"validation_{name}": value for name, value in outcome.validation.items()} | {"fvu": outcome.fvu}
    found |= {name: value for name, value in outcome.about.items() if np.ndim(value) == 0}
    return found | {"seconds": outcome.seconds}


# -- a contest of methods ----------------------------------------------------------------------------------------------

TOGETHER = 16
"""Students trained side by side: they share the cost of drawing samples, and their state still fits in a cache."""


class Candidate(NamedTuple):
    """A method at one strength and learning rate, `centred` or not; `a+b` with strength (x, y) is both at once."""

    method: str
    strength: float | tuple[float, float]
    lr: float
    centred: bool

    def arm(self, steps: int) -> Arm:
        names, strengths = self.method.split("+"), np.atleast_1d(self.strength).tolist()
        parts = [REMEDIES[name](strength, steps) for name, strength in zip(names, strengths, strict=True)]
        remedy = parts[0] if len(parts) == 1 else remedies.Together(*parts)
        return Arm(self.method, StartingSae(bool(self.centred)), remedy, float(self.lr))


CANDIDATE = list(Candidate._fields)
"""The columns of a contest that name a candidate."""


def candidates(
    lrs: Sequence[float],
    extra_lrs: Sequence[float],
    centred: Sequence[bool] = (False, True),
    brief: Sequence[str] = (),
) -> list[Candidate]:
    """Every method at each of its strengths, learning rates and centrings; those of `brief` at their first.

    What has no strength gets `extra_lrs` besides, as many as make its number of candidates that of the others.
    """
    wanted = (len(next(iter(STRENGTHS.values()))) - 1) * len(lrs)
    what = f"{wanted}, so that what has no strength is tuned as much as anything else"
    allowed(len(extra_lrs) == wanted, f"extra_lrs has {len(extra_lrs)} values", what)
    for name in brief:
        one_of("brief", name, REMEDIES)
    grid = []
    for name in REMEDIES:
        strengths = STRENGTHS.get(name, (0.0,))
        rates = lrs if name in STRENGTHS or name in brief else sorted([*lrs, *extra_lrs])
        tried = strengths[:1] if name in brief else strengths
        grid += [Candidate(name, strength, lr, centre) for centre in centred for strength in tried for lr in rates]
    return grid


def contest(
    problem: KnownTruth,
    tried: Mapping[int, Sequence[Candidate]],
    seeds: Sequence[int],
    choosing: Sequence[int] = (),
    **options,
) -> pd.DataFrame:
    """Every candidate of each k trained with each seed: a table by k and `CANDIDATE`. `options` go to `study`.

    The seeds of `choosing` are for the choice among candidates alone, and the others then only judge.
    """
    both = sorted({*seeds} & {*choosing})
    allowed(not both, f"choosing={list(choosing)} has seeds {both} that judge", "none of `seeds`")
    problems = {k: replace(problem, k=k) for k in tried}
    arms = {(k, *each): each.arm(problem.steps) for k, some in tried.items() for each in some}
    options = {"together": TOGETHER, "label": "contest"} | options
    found = study({key: problems[key[0]] for key in arms}, arms, [*seeds, *choosing], **options)
    frame = as_table(found, "k", *CANDIDATE)
    return frame.assign(judges=~frame.seed.isin(choosing)) if choosing else frame


def as_table(found: Mapping[tuple, Sequence[Outcome]], *names: str) -> pd.DataFrame:
    """A study as a table with a line for each key and seed: the parts of the key under `names`, what was measured."""
    flat = [(dict(zip(names, key, strict=True)), each) for key, outcomes in found.items() for each in outcomes]
    return pd.DataFrame([about | {"seed": each.seed} | measured(each) for about, each in flat])


def as_points(frame: pd.DataFrame) -> list[dict]:
    """A table for a results file: one entry for all seeds of a line, what was measured as lists of five digits."""
    keys = [name for name in frame if name in ("situation", "axis", "value", "k", *CANDIDATE)]
    short = frame.map(lambda value: float(f"{value:.5g}") if isinstance(value, float) else value)
    short[keys] = frame[keys]
    return short.groupby(keys, sort=False).agg(list).reset_index().to_dict("records")


def from_points(points: Sequence[Mapping]) -> pd.DataFrame:
    """The inverse of `as_points`; points with one entry for each seed are taken as they are."""
    frame = pd.DataFrame(points)
    if "strength" in frame:
        frame["strength"] = [tuple(each) if isinstance(each, list) else each for each in frame.strength]
    lists = [name for name, value in points[0].items() if isinstance(value, list) and name != "strength"]
    return frame.explode(lists, ignore_index=True).infer_objects() if lists else frame


def contest_of(points: Mapping[str, Sequence[Mapping]]) -> pd.DataFrame:
    """The contest among a run's points, with the seeds that only choose where there are some."""
    frame = from_points(points["contest"])
    if "choosing" not in points:
        return frame
    return pd.concat([frame.assign(judges=True), from_points(points["choosing"]).assign(judges=False)])


# -- choosing, and comparing -------------------------------------------------------------------------------------------


def judging(frame: pd.DataFrame) -> pd.DataFrame:
    """The lines of the seeds that judge: all, where no other seeds choose."""
    return frame[frame.judges].drop(columns="judges") if "judges" in frame else frame


def degenerate(frame: pd.DataFrame, findable: float = 1.0) -> bool:
    """Whether no candidate finds a tenth of the truths that can be found, a share `findable` of all: counts of dead
    features say nothing there."""
    return bool(judging(frame).groupby(CANDIDATE, sort=False).found.mean().max() < 0.1 * findable)


def means(frame: pd.DataFrame) -> pd.DataFrame:
    """`fvu` and `dead` of each candidate on validation rows, means over the seeds that choose, by rising FVU."""
    frame = frame[~frame.judges] if "judges" in frame else frame
    columns = {"validation_fvu": "fvu", "validation_dead": "dead"}
    found = frame.groupby(CANDIDATE, sort=False)[list(columns)].mean().rename(columns=columns)
    return found.sort_values(["fvu", "dead"])


def chosen(frame: pd.DataFrame) -> tuple:
    """The candidate that `study.choose` takes: lowest validation FVU, of those within 1 % of it the fewest dead."""
    return choose({each: Judged({}, line.to_dict()) for each, line in means(frame).iterrows()}, ties="dead")


def lines_of(frame: pd.DataFrame, candidate: tuple) -> pd.DataFrame:
    """The lines of one candidate, a seed that judges each, in the order of the seeds."""
    frame = judging(frame)
    wanted = tuple(value.item() if isinstance(value, np.generic) else value for value in candidate)
    same = [line == wanted for line in frame[CANDIDATE].itertuples(index=False, name=None)]
    return frame[same].sort_values("seed")


def pareto_front(frame: pd.DataFrame) -> list[tuple]:
    """Candidates that no other beats in both validation FVU and dead share (means over seeds), by rising FVU."""
    found = means(frame)
    return list(found.index[found.dead < found.dead.cummin().shift(fill_value=math.inf)])


def fewest_dead(frame: pd.DataFrame, fvu: float) -> tuple | None:
    """Of the candidates whose validation FVU is at most `fvu`, or equal by the rule, the one with the fewest dead."""
    near = means(frame).query("fvu <= @limit", local_dict={"limit": (1 + EQUAL) * fvu})
    return None if near.empty else near.sort_values(["dead", "fvu"]).index[0]


def lowest_fvu(frame: pd.DataFrame, dead: float) -> tuple | None:
    """Of the candidates whose validation dead share is at most `dead`, the one with the lowest validation FVU."""
    near = means(frame).query("dead <= @dead")
    return None if near.empty else near.index[0]


def validation(frame: pd.DataFrame, candidate: tuple) -> tuple[float, float]:
    """FVU and dead share of a candidate on validation rows, means over the seeds that choose."""
    found = means(frame)
    return tuple(found[[each == tuple(candidate) for each in found.index]].iloc[0])


NEWER = ("frequency", "aligned")
"""Remedies that are newer than the paper, whose claim is of the others. They are shown beside them."""


def rivals_of(frame: pd.DataFrame, method: str) -> pd.DataFrame:
    """Candidates of the other methods that the paper's claim is about."""
    return frame[~frame.method.str.contains(method) & ~frame.method.isin(NEWER)]


def matched(frame: pd.DataFrame) -> tuple[tuple, tuple, bool]:
    """Switch's chosen candidate, the other methods' with the fewest dead at no larger FVU, and whether there is one.

    All by validation rows. Where no other method comes within 1 % of that FVU, the others' chosen candidate stands in:
    by the same rule as Switch's own, ties included.
    """
    mine = chosen(frame[frame.method == "switch"])
    others = rivals_of(frame, "switch")
    rival = fewest_dead(others, validation(frame, mine)[0])
    return mine, rival or chosen(others), rival is not None


def dominance(frame: pd.DataFrame, n_features: int) -> tuple[tuple, tuple]:
    """The candidate of the other methods' Pareto front that is hardest to match, and Switch's answer to it.

    For each candidate on that front the answer is Switch's candidate of lowest validation FVU with at most one
    dead feature more (or its fewest dead, if none has so few); hardest is where the answer's FVU is largest in ratio.
    """
    mine, others = frame[frame.method == "switch"], rivals_of(frame, "switch")
    pairs = []
    for rival in pareto_front(others):
        fvu, dead = validation(frame, rival)
        answer = lowest_fvu(mine, dead + 1 / n_features) or means(mine).dead.idxmin()
        pairs.append((validation(frame, answer)[0] / fvu, rival, answer))
    _, rival, answer = max(pairs, key=lambda pair: pair[0])
    return rival, answer


def finalists(frame: pd.DataFrame) -> dict[str, tuple]:
    """Chosen candidates, each by the rule: nothing done, Switch, the best of the others, and it with Switch."""
    parts = {name: frame[frame.method == name] for name in ("none", "switch")}
    parts["other"] = rivals_of(frame, "switch").query("method != 'none'")
    parts["both"] = frame[frame.method.str.contains("+", regex=False)]
    return {name: chosen(part) for name, part in parts.items() if len(part)}


def ratio_of_means(first: np.ndarray, second: np.ndarray) -> float:
    return first.mean() / second.mean()


def difference_of_means(first: np.ndarray, second: np.ndarray) -> float:
    return first.mean() - second.mean()


def paired(
    first: pd.DataFrame,
    second: pd.DataFrame,
    column: str,
    statistic: Callable[..., float] = ratio_of_means,
    *,
    dealt: bool = False,
) -> Comparison | list[Comparison]:
    """A `statistic` of one column of two candidates' lines, with an interval over pairs of seeds: of a difference, or
    of a positive ratio; with `dealt` a list of what it is where their labels are dealt afresh for each seed
    (`scores.relabelled`)."""
    columns = [each.sort_values("seed")[column] for each in (first, second)]
    options = {"statistic": statistic, "scale": "plain" if statistic is difference_of_means else "log"}
    found = [over_seeds(*some, **options) for some in (relabelled(*columns) if dealt else [columns])]
    return found if dealt else found[0]


def mean(lines: pd.DataFrame, column: str) -> Comparison:
    """Mean over seeds of a share, such as of dead features, or of FVU; the interval stays in their range."""
    return over_seeds(lines[column], scale="log" if column == "fvu" else "logit")


def times_fewer(more: pd.DataFrame, fewer: pd.DataFrame, n_features: int, **options) -> Comparison | list[Comparison]:
    """Dead features of the first candidate over those of the second, summed over paired seeds, on test rows.

    A count of zero is taken as one, on both sides: below, it makes the ratio a lower bound. `options` of `paired`.
    """

    in_all = n_features * len(more)  # means times this, so that what is left without a seed is no smaller

    def fold(first: np.ndarray, second: np.ndarray) -> float:
        return max(in_all * first.mean(), 1.0) / max(in_all * second.mean(), 1.0)

    return paired(more, fewer, "dead", fold, **options)


# -- the Switch gradient, in parts -------------------------------------------------------------------------------------


def pull(
    scores: Float[Tensor, "batch n"], load: Float[Tensor, " n"], alpha: float, temperature: float = 1.0
) -> Float[Tensor, "batch n"]:
    """∂L/∂z of the Switch loss L = α n Σ_j f_j P_j at scores z and loads f (which carry no gradient):

    G_bj = (α n / (T τ)) · p_bj · (f_j − Σ_i f_i p_bi), with p_b the softmax of z_b/τ and T the size of the batch.
    Each row sums to 0. A step of descent moves z_bj by −G_bj: negative entries lift, positive ones push down.
    """
    batch, n = scores.shape
    p = (scores / temperature).softmax(-1)
    return alpha * n / (batch * temperature) * p * (load - (p * load).sum(-1, keepdim=True))


@dataclass(frozen=True)
class Pinned(Balance):
    """The Switch loss's gradient, restricted: as a loss it is Σ_bj G_bj z_bj with G from `pull` held fixed.

    With the defaults every parameter gets the gradient that `remedies.Switch` gives it.

    Args:
        acts_on: where the gradient goes. "scores": to all that the scores depend on, which are the encoder's rows and
            biases and b_dec, because the SAE reads x − b_dec. "encoder": rows and biases; "rows", "bias", "b_dec":
            that one. These three add up to "scores". b_dec gets the reconstruction's gradient in any case.
        half: "lift" keeps the entries that raise a score (G < 0), "push" those that lower one (G > 0).
        load: whose load is balanced. "permuted": the batch's loads in a new random order at every step. "random": the
            loads that a fixed random dictionary of the same n and k has on the same batch.
        seed: of the permutations and of the random dictionary.
    """

    alpha: float = 0.1
    temperature: float = 1.0
    acts_on: str = "scores"
    half: str = "both"
    load: str = "own"
    seed: int = 0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self):
        allowed(self.alpha > 0, f"alpha={self.alpha} cannot act", "above 0")
        allowed(self.temperature > 0, f"temperature={self.temperature} cannot act", "above 0")
        one_of("acts_on", self.acts_on, ("scores", "encoder", "rows", "bias", "b_dec"))
        one_of("half", self.half, ("both", "lift", "push"))
        one_of("load", self.load, ("own", "permuted", "random"))

    def loss(self, now: Moment) -> Tensor:
        force = pull(now.trace.scores.detach(), self.balanced(now), self.alpha, self.temperature)
        if self.half != "both":
            force = force.clamp(max=0) if self.half == "lift" else force.clamp(min=0)
        encoder, b_dec = now.dictionary.encoder, now.dictionary.b_in
        x = now.inputs if b_dec is None else now.inputs - b_dec.detach()
        # each part is linear in one parameter, and the parts' gradients add up to that of the scores
        match self.acts_on:
            case "scores":
                return (force * now.trace.scores).sum()
            case "encoder":
                return (force * encoder.scores(x)).sum()
            case "rows":
                return (force * (x @ encoder.weight.T)).sum()
            case "bias":
                return (force.sum(0) * encoder.bias).sum()
        return -(force @ encoder.weight.detach()).sum(0) @ b_dec

    def balanced(self, now: Moment) -> Float[Tensor, " n"]:
        """The loads f that are put in the formula; they sum to 1."""
        scores, indices = now.trace.scores, now.experts
        n = scores.shape[1]
        if self.load == "random":
            rows = _random_rows(n, now.inputs.shape[1], self.seed).to(now.inputs)
            indices = (now.centred @ rows.T).topk(indices.shape[1], dim=1).indices
        share = load_shares(indices, n, scores.dtype)
        if self.load == "permuted":
            order = torch.randperm(n, generator=settings.generator(settings.mix(self.seed, now.step)))
            share = share[order.to(share.device)]
        return share


@lru_cache(maxsize=16)
def _random_rows(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    return random_atoms(n, d, settings.generator(seed))
