"""The rules by which atoms are chosen, on one bench (chapter 17): how a dictionary starts and is trained under each,
and what it does with the same number of codes a token on average.

A rule is a name of `dictionary.select.RULES`, or "gated" (gate rows of its own) or "nested" (Matryoshka: TopK that
reconstructs from its first atoms too).
"""

from __future__ import annotations

import copy
import timeit
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers.dictionary import RankOneDictionary, Select, gated_sae, topk_sae
from helpers.parts.audit import load
from helpers.parts.known_truth import ratio_of_means
from helpers.parts.language_model import Passage, SiteRows, rate_curve, reconstructions
from helpers.settings import generator, one_of
from helpers.study.scores import FEWEST, Comparison, Evaluation, Sums, Totals, by_group, evaluate, over_seeds
from helpers.study.study import Arm, Judged, Outcome, choose
from helpers.training.loop import as_tensor
from helpers.training.remedies import Balance, Gated, Moment, Nested, TargetL0

RULES = ("token", "batch", "threshold", "atom", "always", "groups", "gated", "nested")
TWIN = "atom, causal"
"""Expert choice with a threshold for each atom in use: trained as "atom", judged beside it."""
FIRST, COUNTED, BATCH = 512, 4096, 4096
"""Training rows at which thresholds start, those on which they are counted, and rows that are judged at a time."""
NOTICED = 256
"""Tokens of a batch of which the last is replaced."""

Key = tuple[str, int]


# -- how each rule starts and is trained -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ruled:
    """Builds the untrained dictionary of an `Arm`: the atoms are those of the seed under every rule, and thresholds
    start where the first training rows have k codes each."""

    rule: str
    n_features: int
    k: int

    def __post_init__(self):
        one_of("rule", self.rule, RULES)

    def __call__(self, problem: RuleRows, seed: int) -> RankOneDictionary:
        size = problem.d_model, self.n_features, self.k
        about = {"generator": generator(seed), "b_dec": problem.mean}
        if self.rule == "gated":
            sae = gated_sae(*size, **about)
            sae.router.bias.data -= self.cut(sae, problem)
            return sae
        sae = topk_sae(*size, **about)
        rule = "token" if self.rule == "nested" else self.rule
        sae.select = Select(rule, self.n_features, **self.numbers(sae, problem))
        sae.select.check(self.k, self.n_features)
        return sae

    def numbers(self, sae: RankOneDictionary, problem: RuleRows) -> dict[str, Any]:
        """What its `Select` has beside the rule: an eighth of the codes is always on, half of 16 groups are open."""
        if self.rule == "threshold":
            cut = self.cut(sae, problem)
            return {"threshold": cut, "bandwidth": 0.2 * cut}
        fixed = {"always": {"always": max(1, self.k // 8)}, "groups": {"n_groups": 16, "groups": 8}}
        return fixed.get(self.rule, {})

    def cut(self, sae: RankOneDictionary, problem: RuleRows) -> float:
        """The score that the first rows have k times each on average."""
        rows = problem.first(FIRST)
        scores = sae.router.scores(rows - sae.b_in).detach()
        return float(scores.flatten().topk(self.k * len(rows)).values[-1])


@dataclass(frozen=True)
class GatedToward(Gated):
    """The loss of a Gated SAE, its penalty times (L0 / target)², which pulls the batch's L0 towards `target`: what is
    trained with half or twice as many codes is a poor dictionary when its gates are moved to `target`."""

    target: float = 1.0

    def loss(self, now: Moment) -> Tensor:
        pull = float(now.trace.codes.fires.sum()) / (len(now.inputs) * self.target)
        return Gated(self.sparsity * max(0.1, pull) ** 2, self.frozen).loss(now)


def remedy(build: Ruled, sparsity: float = 1.0) -> Balance:
    """What is minimised beside the error, as the papers have it: nothing for most rules."""
    match build.rule:
        case "threshold":
            return TargetL0(build.k)
        case "gated":
            return GatedToward(sparsity, target=build.k)
        case "nested":
            return Nested((build.n_features // 16, build.n_features // 4))
    return Balance()


def arms(ks: Sequence[int], n_features: int, sparsities: Sequence[float]) -> dict[tuple[str, int, float], Arm]:
    """An arm for each rule and average number of codes, and for each weight that a Gated SAE tries."""
    found = {}
    for k in ks:
        for rule in RULES:
            for sparsity in sparsities if rule == "gated" else [0.0]:
                build = Ruled(rule, n_features, k)
                name = f"{rule}, k = {k}" + (f", sparsity {sparsity:g}" if sparsity else "")
                found[rule, k, sparsity] = Arm(name, build, remedy(build, sparsity), recipe={"log_every": 10})
    return found


def best(tuned: Mapping[tuple[str, int, float], Mapping[float, Outcome]]) -> dict[Key, Arm]:
    """Of each rule and number of codes the arm with the least FVU on validation rows."""
    tried: dict[Key, list[Outcome]] = {}
    for (rule, k, _), at_rates in tuned.items():
        tried.setdefault((rule, k), []).extend(at_rates.values())
    return {key: some[choose(dict(enumerate(some)))].arm for key, some in tried.items()}


# -- at the same average number of codes -------------------------------------------------------------------------------


@torch.no_grad()
def calibrated(sae: RankOneDictionary, rows: Float[Tensor, "rows d"]) -> RankOneDictionary:
    """A copy whose thresholds, or gates, are moved together until the rows have k scores each above them on average; a
    score below zero that is above them gives no code. Under other rules as it is."""
    sae = copy.deepcopy(sae).eval()
    rule, x = sae.select.rule, rows - sae.b_in
    if rule not in ("batch", "threshold", "positive"):
        return sae
    margins = sae.router.scores(x)
    if rule == "threshold":
        margins = margins - sae.select.threshold
    elif rule == "positive" and sae.router is not sae.encoder:  # an open gate with nothing behind it is no code
        margins = margins.masked_fill(sae.encoder.scores(x) <= 0, -torch.inf)
    cut = margins.flatten().topk(sae.k * len(rows)).values[-1]
    cut = cut - 1e-6 * cut.abs()
    if rule == "positive":
        sae.router.bias -= cut
    else:
        sae.select.threshold.data = cut + (sae.select.threshold if rule == "threshold" else 0)
    return sae


@torch.no_grad()
def causal_twin(sae: RankOneDictionary, rows: Float[Tensor, "rows d"]) -> RankOneDictionary:
    """Expert choice with each atom's own cut on these rows as its threshold."""
    twin = copy.deepcopy(sae)
    scores = sae.encoder.scores(rows - sae.b_in)
    m = max(1, round(sae.k * len(scores) / sae.n_features))
    twin.select = Select("threshold", sae.n_features)
    twin.select.threshold.data = scores.topk(m, 0).values[-1]
    return twin.eval()


@torch.no_grad()
def noticed(sae: RankOneDictionary, rows: Float[Tensor, "rows d"], training_rule: bool = False) -> int:
    """How many earlier tokens of a batch have other codes when its last one is replaced."""
    sae = copy.deepcopy(sae).train(training_rule)
    changed = rows.clone()
    changed[-1] = 4 * rows[-1]
    one, other = (sae.encode(x).to_dense(sae.n_atoms)[:-1] for x in (rows, changed))
    return int(((one != 0) != (other != 0)).any(1).sum())


@torch.no_grad()
def milliseconds(sae: RankOneDictionary, rows: Float[Tensor, "rows d"]) -> float:
    """Of a forward pass of a thousand rows: the fastest of three runs."""
    return 1e6 * min(timeit.repeat(lambda: sae(rows), number=1, repeat=3)) / len(rows)


measured = partial(evaluate, batch_size=BATCH)
"""A dictionary on rows, batch by batch: under expert choice a batch is what an atom chooses from."""


def numbers(found: Evaluation) -> dict[str, float]:
    """FVU, codes a token, their spread over tokens, and the load of the atoms."""
    own = {"fvu": found.fvu, "codes": float(found.codes.mean()), "spread": float(found.codes.std())}
    return own | load(found.rates.numpy() * len(found.codes), len(found.codes))


def curves(found: Evaluation) -> dict[str, list]:
    """Firing rates by rank, and codes a token at every twentieth of the tokens, in rising order."""
    shares = np.linspace(0, 1, 21)
    by_token = np.stack([shares, np.quantile(found.codes.numpy(), shares)], 1)
    return {"rates": rate_curve(found.rates.numpy()), "codes by token": by_token.tolist()}


# -- the bench ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RuleRows(SiteRows):
    """Rows of one site that every rule learns to give back, all with the same number of codes a token when judged.

    Args:
        divided: by one number, as `SiteRows` are; else the rows as the model has them.
        closer: whether all is looked at that a chapter shows of a dictionary that was chosen.
        passage: where the model's loss with reconstructions is measured, looking closer; None for nowhere.
    """

    divided: bool = True
    closer: bool = False
    passage: Passage | None = None

    @cached_property
    def scale(self) -> float:
        return super().scale if self.divided else 1.0

    def first(self, n: int) -> Float[Tensor, "n d_model"]:
        """The first training rows, divided."""
        return as_tensor(self.store("train")[self.site], slice(n)).float() / self.scale

    def judge(self, student: RankOneDictionary, seed: int) -> Judged:
        """Sums by article of the test rows: `errors` and `norms`. `about` has `numbers` of them and, looking closer,
        what `closely` adds for the student and, under "twin", for expert choice's causal twin."""
        student, validation, test = student.cpu().eval(), self.rows("validation"), self.rows("test")
        found = measured(calibrated(student, test), test)
        article = self.store("test").article
        sums = {"errors": by_group(found.squared_error, article), "norms": by_group(found.squared_norm, article)}
        about: dict[str, Any] = numbers(found)
        if self.closer:
            about |= curves(found) | self.closely(student, test) | {"noticed": noticed(student, test[:NOTICED], True)}
            if student.select.rule == "atom":
                twin = causal_twin(student, self.first(COUNTED))
                found = measured(calibrated(twin, test), test)
                about["twin"] = numbers(found) | curves(found) | self.closely(twin, test)
        return Judged(sums, {"fvu": measured(calibrated(student, validation), validation).fvu}, about)

    def closely(self, sae: RankOneDictionary, test: Float[Tensor, "rows d"]) -> dict[str, Any]:
        """Tokens that notice another one in use, cost, what thresholds from training text and none that are moved
        make of it, and the model's loss with its reconstructions, in nats by article."""
        about = {"noticed in use": noticed(sae, test[:NOTICED]), "ms": milliseconds(sae, test[:COUNTED])}
        about["multiply_adds"] = sae.multiply_adds
        for way, each in {"unmoved": sae, "from training": calibrated(sae, self.first(COUNTED))}.items():
            about[way] = numbers(measured(each, test))
        if self.passage is not None:
            scene = self.passage.scene
            rows = scene.rows / self.scale
            about["nats"] = scene.nats(reconstructions(calibrated(sae, rows), rows) * self.scale).tolist()
        return about


# -- what is said of it ------------------------------------------------------------------------------------------------

SAID = ("fvu", "codes", "spread", "dead", "busiest", "max_violation", "in_effect", "ms", "multiply_adds")
"""Numbers of an outcome that a row of `reported` has as means over seeds."""


def reported(
    runs: Mapping[Key, Sequence[Outcome]], steps: int, yardstick: Mapping[str, np.ndarray] | None = None
) -> list[dict[str, Any]]:
    """A row for each rule and number of codes, expert choice's causal twin included: means over seeds, curves of the
    first one, and with a `yardstick` (`Scene.yardstick`) CE recovered with its interval."""
    rows = []
    for (rule, k), some in runs.items():
        found = {rule: [each.about for each in some]}
        if rule == "atom":
            found[TWIN] = [each.about["twin"] for each in some]
        for name, abouts in found.items():
            row = {"k": k, "rule": name, "lr": some[0].arm.lr, "fvu_by_seed": [each["fvu"] for each in abouts]}
            remedy = some[0].arm.remedy
            row |= {"sparsity": getattr(remedy, "sparsity", None), "pull": getattr(remedy, "weight", None)}
            row |= {measure: _mean(abouts, measure) for measure in SAID}
            row["ms_step"] = float(np.mean([1e3 * each.seconds / steps for each in some]))
            for way in ("unmoved", "from training"):
                within = [each[way] for each in abouts]
                row[way] = {measure: _mean(within, measure) for measure in ("fvu", "codes")}
            rows.append(row | _recovered(abouts, yardstick) | {c: abouts[0][c] for c in ("rates", "codes by token")})
    return rows


def _mean(abouts: Sequence[Mapping[str, Any]], measure: str) -> float:
    return float(np.mean([each[measure] for each in abouts]))


def _nats(abouts: Sequence[Mapping[str, Any]]) -> dict[int, dict[str, np.ndarray]]:
    """A cell of `Sums`, by seed."""
    return {seed: {"nats": np.array(each["nats"])} for seed, each in enumerate(abouts)}


def _recovered(abouts: Sequence[Mapping[str, Any]], yardstick: Mapping[str, np.ndarray] | None) -> dict[str, Any]:
    """CE recovered against both ablations: value and, where there are enough articles, interval."""
    if yardstick is None:
        return {"ce_zero": None, "ce_mean": None}
    table, found = Sums({"": _nats(abouts)}, yardstick), {}
    for ablation in ("zero", "mean"):
        one = table.compare(lambda cell, a=ablation: cell.ce_recovered(a), fewest=FEWEST)
        found[f"ce_{ablation}"] = [one.value, *(one.ci or ())]
    return found


def recovered_beyond_token(
    runs: Mapping[Key, Sequence[Outcome]], yardstick: Mapping[str, np.ndarray]
) -> dict[Key, Comparison]:
    """CE recovered against the mean under each rule minus that under TopK with as many codes, on the same articles."""
    table = Sums({key: _nats([each.about for each in some]) for key, some in runs.items()}, yardstick)

    def beyond(one: Totals, other: Totals) -> float:
        return one.ce_recovered("mean") - other.ce_recovered("mean")

    others = [key for key in runs if key[0] != "token"]
    return {(rule, k): table.compare(beyond, (rule, k), ("token", k), fewest=FEWEST) for rule, k in others}


def against_token(rows: Sequence[Mapping[str, Any]]) -> dict[Key, Comparison]:
    """FVU of each rule over that of TopK with as many codes, means over seeds."""
    by_seed = {(row["rule"], row["k"]): row["fvu_by_seed"] for row in rows}
    return {
        (rule, k): over_seeds(some, by_seed["token", k], statistic=ratio_of_means)
        for (rule, k), some in by_seed.items()
        if rule != "token"
    }
