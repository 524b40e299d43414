"""SAEs on a language model's activations: what they learn from, what counts, what remedies make of the busiest, and
what the model loses with their reconstructions in the place of its rows.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from helpers import settings
from helpers.dictionary import RankOneDictionary, SparseCodes, topk_sae
from helpers.dictionary.pursuit import least_squares, omp
from helpers.models import activations, teachers
from helpers.models.activations import ActivationStore
from helpers.models.corpora import SPLITS, Texts
from helpers.models.teachers import Splice, Teacher
from helpers.settings import allowed
from helpers.study.scores import Sums, by_group, evaluate
from helpers.study.study import Judged, Outcome, choose
from helpers.training import Shuffled, Stream
from helpers.training.remedies import AuxK, Balance, Ghost, LossFree, Resample, Switch

DENSE = 0.1
"""A latent that fires on more than this share of the rows is dense."""
BUSIEST = 100
"""Latents that a bootstrap of the largest firing rate looks at: the most frequent ones of each run."""


# -- what is learned, and how it is judged -----------------------------------------------------------------------------


@dataclass(frozen=True)
class SiteRows:
    """Harvested rows of one site that a student learns to give back, and which judge it article by article.

    Rows are divided by one number, the root of the training rows' mean variance over dimensions, so that strengths
    mean the same at every site. `folders` are those of the harvests for train, validation and test: names, which
    travel to a worker, where rows are read from disk.
    """

    folders: Mapping[str, str]
    site: str
    steps: int
    batch_size: int = 1024

    def __post_init__(self):
        missing = sorted(set(SPLITS) - set(self.folders))
        allowed(not missing, f"folders has no {', '.join(missing)}", ", ".join(SPLITS))

    @property
    def asked(self) -> dict[str, object]:
        """All fields, for keys, without the place of the cache."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        return own | {"folders": {split: Path(folder).name for split, folder in self.folders.items()}}

    def store(self, split: str) -> ActivationStore:
        return ActivationStore(Path(self.folders[split]), (self.site,))

    @cached_property
    def scale(self) -> float:
        """What rows are divided by."""
        return self.store("train").moments(self.site).variance ** 0.5

    @cached_property
    def mean(self) -> Float[Tensor, " d_model"]:
        """Mean of the training rows, divided as they are."""
        return (self.store("train").moments(self.site).mean / self.scale).float()

    @property
    def d_model(self) -> int:
        return len(self.mean)

    def rows(self, split: str) -> Float[Tensor, "rows d_model"]:
        """All rows of a split, divided."""
        return self.store(split).tensor(self.site) / self.scale

    def stream(self, seed: int, device: torch.device) -> Stream:
        store = self.store("train")
        about = {"batch_size": self.batch_size, "seed": seed, "device": device, "divided_by": self.scale}
        return Shuffled(store[self.site], fingerprint=f"{store.key}/{self.site}", **about)

    def judge(self, student: RankOneDictionary, seed: int) -> Judged:
        """Sums by article of the test rows: `errors` ‖x − x̂‖², `norms` ‖x − x̄‖², `relative` ‖x − x̂‖/‖x‖, `rows`, and
        `counts`: on how many rows each of the busiest latents fires."""
        validation, test = self.rows("validation"), self.rows("test")
        before, after = evaluate(student, validation), evaluate(student, test)
        article = self.store("test").article
        counts = firings(student, test, article)
        by_row = {"errors": after.squared_error, "norms": after.squared_norm, "rows": torch.ones(len(test))}
        by_row["relative"] = after.squared_error.sqrt() / test.double().norm(dim=1)
        sums = {column: by_group(values, article) for column, values in by_row.items()}
        sums["counts"] = counts[:, np.argsort(-counts.sum(0), kind="stable")[:BUSIEST]]
        chosen_by = {name: getattr(before, name) for name in ("fvu", "dead", "largest_rate")}
        chosen_by["relative_error"] = float((before.squared_error.sqrt() / validation.double().norm(dim=1)).mean())
        about = {name: getattr(after, name) for name in ("dead", "dense", "largest_rate", "chosen_but_zero")}
        about |= {"n_dense": int((after.rates > DENSE).sum()), "curve": rate_curve(after.rates.numpy())}
        return Judged(sums, chosen_by, about)


@dataclass(frozen=True)
class Sae:
    """Builds the untrained SAE of an `Arm`: all of a seed start from the same atoms, b_dec at zero or at the mean."""

    n_features: int
    k: int
    centred: bool = False

    def __call__(self, problem: SiteRows, seed: int) -> RankOneDictionary:
        b_dec = problem.mean if self.centred else None
        return topk_sae(problem.d_model, self.n_features, self.k, generator=settings.generator(seed), b_dec=b_dec)


@torch.no_grad()
def codes_on(sae: RankOneDictionary, rows: Float[Tensor, "rows d"], *, batch_size: int = 4096) -> SparseCodes:
    """The codes of all rows, found batch by batch on the model's device, held on the CPU. Where batches have different
    numbers of codes, those with fewer are filled up with zeros."""
    where = next(sae.parameters())
    parts = [sae.encode(part.to(where.device, where.dtype)) for part in rows.split(batch_size)]
    most = max((part.values.shape[1] for part in parts), default=0)
    indices = [_filled(part.indices, most, sae.n_atoms).cpu() for part in parts]
    values = [F.pad(part.values, (0, most - part.values.shape[1])).cpu() for part in parts]
    return SparseCodes(torch.cat(indices), torch.cat(values))


def _filled(indices: Int[Tensor, "rows k"], most: int, n: int) -> Int[Tensor, "rows most"]:
    """Up to `most` numbers below n in each row, all different."""
    if indices.shape[1] == most:
        return indices
    free = torch.ones(len(indices), n, device=indices.device).scatter_(1, indices, 0)
    return torch.cat([indices, free.topk(most - indices.shape[1], dim=1).indices], dim=1)


def firings(
    sae: RankOneDictionary, rows: Float[Tensor, "rows d"], groups: Int[np.ndarray, " rows"]
) -> Int[np.ndarray, "groups n"]:
    """On how many rows of each group each latent fires (has a code that is not zero); groups in rising order."""
    names, index = np.unique(groups, return_inverse=True)
    codes = codes_on(sae, rows)
    cells = torch.from_numpy(index)[:, None] * sae.n_atoms + codes.indices
    counts = torch.bincount(cells[codes.fires], minlength=len(names) * sae.n_atoms)
    return counts.view(len(names), -1).int().numpy()


def rate_curve(rates: Float[np.ndarray, " n"]) -> list[list[float]]:
    """Firing rates in falling order, at ranks 1, 2, 3, 5, 9, … n: pairs of rank and rate."""
    ordered = np.sort(rates)[::-1]
    ranks = sorted({*np.round(np.geomspace(1, len(rates), 40)).astype(int).tolist()})
    return [[rank, float(ordered[rank - 1])] for rank in ranks]


# -- remedies on trial -------------------------------------------------------------------------------------------------


def strengths_to_try(strengths: Mapping[str, Sequence], steps: int) -> dict[str, list[Balance]]:
    """Candidates for each remedy, by name: `auxk`, `ghost`, `resample`, `switch`, `bias`.

    A strength is a coefficient, except for resampling: the new encoder rows' length and what they aim at. What waits
    is scaled to the run: dead means silent for a tenth of the steps, and resampling comes at every eighth part of
    the run, up to its middle.
    """
    wait, every = max(1, steps // 10), max(2, steps // 8)
    make = {
        "auxk": lambda strength: AuxK(strength, silent_for=wait),
        "ghost": lambda strength: Ghost(strength, silent_for=wait),
        "resample": lambda strength: Resample(every, scale=strength[0], toward=strength[1], until=0.5),
        "switch": Switch,
        "bias": LossFree,
    }
    unknown = sorted(set(strengths) - set(make))
    allowed(not unknown, f"strengths names {', '.join(unknown)}", ", ".join(make))
    return {name: [make[name](strength) for strength in some] for name, some in strengths.items()}


MEASURES = ("fvu", "largest_rate", "dead", "dense")


def reported(problem: SiteRows, outcome: Outcome) -> dict[str, object]:
    """An outcome as a results file has it."""
    build, validation = outcome.arm.build, outcome.validation
    row = {"site": problem.site, "n_features": build.n_features, "k": build.k, "centred": build.centred}
    row |= {"seed": outcome.seed, "steps": problem.steps, "n_rows": int(outcome.sums["rows"].sum())}
    row |= {"validation_fvu": validation["fvu"], "validation_dead": validation["dead"]}
    return row | {"seconds": round(outcome.seconds, 1)} | outcome.about | _measures(outcome)


def reported_method(
    problem: SiteRows, table: Sums, key: tuple[str, bool, str], runs: Sequence[Outcome], tried: Sequence[Outcome]
) -> dict[str, object]:
    """A method at a site as a results file has it: what was chosen with all its seeds, all candidates that were
    `tried` with the first, and of them the one that caps the most."""
    rate, fvu = table.compare(lambda cell: cell.largest_rate, key, scale="logit"), table.fvu(key)
    by_seed = {f"{name}_by_seed": [_measures(each)[name] for each in runs] for name in MEASURES}
    capped = tried[choose(dict(enumerate(tried)), "largest_rate")]
    return (
        reported(problem, runs[0])
        | {"method": key[2], "seeds": [each.seed for each in runs]}
        | {"fvu": fvu.value, "fvu_ci": fvu.ci, "largest_rate": rate.value, "rate_ci": rate.ci}
        | {"candidates": [_measures(each) for each in tried], "capped": _measures(capped)}
        | by_seed
    )


def _measures(outcome: Outcome) -> dict[str, object]:
    numbers = {"fvu": outcome.fvu} | {name: outcome.about[name] for name in MEASURES[1:]}
    return {"balance": repr(outcome.arm.remedy), "lr": outcome.arm.lr} | numbers


def whereabouts(problem: SiteRows, sae: Sae, seed: int = 0) -> dict[str, float | str]:
    """Where a site's rows lie, and what the untrained dictionary makes of it on held-out rows.

    `mean_share` is ‖μ‖²/(‖μ‖² + tr C); `top_share` the share of the variance along its largest principal direction,
    and `aligned` the cosine, without its sign, of that direction with μ; `coordinate` the largest coordinate of the
    divided mean. `fires_at_zero` and `fires_at_mean` are shares of the latents that fire at all before training, by
    where b_dec starts.
    """
    moments = problem.store("train").moments(problem.site)
    mean, spread = float(moments.mean.square().sum()), float(moments.cov.trace())
    values, axes = torch.linalg.eigh(moments.cov)
    rows = problem.rows("test")
    fires = {
        name: 1 - evaluate(replace(sae, centred=centred)(problem, seed), rows).dead
        for name, centred in (("fires_at_zero", False), ("fires_at_mean", True))
    }
    return {
        "site": problem.site,
        "mean_share": mean / (mean + spread),
        "top_share": float(values[-1]) / spread,
        "aligned": abs(float(axes[:, -1] @ moments.mean)) / mean**0.5,
        "coordinate": float(problem.mean.abs().max()),
    } | fires


# -- what the busiest latents are --------------------------------------------------------------------------------------


def mean_shares(sae: RankOneDictionary, rows: Float[Tensor, "rows d"], rates: Float[Tensor, " n"]) -> dict[str, float]:
    """Who carries the mean μ of the rows: shares of ‖μ‖² along μ in b_dec (`bias`), in `dense` latents and in the
    `others`; `rates` are the latents' firing rates. They add to 1 but for the error of the reconstruction's mean."""
    mean, codes = rows.double().mean(0), codes_on(sae, rows)
    along, bias = (
        each.detach().cpu().double() @ mean / mean.square().sum() for each in (sae.decoder.weight, sae.b_out)
    )
    total = torch.bincount(codes.indices.flatten(), codes.values.flatten().double(), minlength=sae.n_atoms)
    parts, dense = total / len(rows) * along, rates > DENSE
    return {"bias": float(bias), "dense": float(parts[dense].sum()), "others": float(parts[~dense].sum())}


# -- what the model loses with reconstructions in the place of its rows ------------------------------------------------

WAYS = ("encoder", "solved", "pursuit")
"""How codes are found: the encoder's; its atoms with least-squares coefficients; matching pursuit's atoms."""

BATCH = 8
"""Pieces of text in a forward pass."""


@dataclass(frozen=True)
class Passage:
    """Held-out text, and the place in the model where its rows are replaced. Names only: it travels to a worker."""

    teacher: str
    corpus: str
    layer: int
    site: str
    n_tokens: int
    split: str = "test"
    device: str = "cpu"
    cache_dir: str | None = field(default=None, compare=False)

    @property
    @cache  # noqa: B019 (passages are names: few, and for as long as the process)
    def scene(self) -> Scene:
        """The model and its rows on this text: made once in a process."""
        return Scene(self, teachers.load(self.teacher, device=self.device, cache_dir=self.cache_dir))


def by_article(teacher: Teacher, pieces: Texts, splice: Splice | None = None) -> pd.DataFrame:
    """A model's cross-entropy on pieces of text, by article: columns `nats` (sums) and `tokens`."""
    found = activations.losses(teacher, pieces, splice, batch_size=BATCH)
    return found.groupby("article")[["nats", "tokens"]].sum()


def ablated(
    teacher: Teacher, pieces: Texts, layer: int, site: str, mean: Float[Tensor, " d_model"]
) -> dict[str, Float[np.ndarray, " articles"]]:
    """Nats by article with `zero` in the place of a site's rows, and with their `mean` (in the model's own units)."""
    splices = {"zero": Splice.zero(layer, site), "mean": Splice.mean(layer, site, mean)}
    return {name: by_article(teacher, pieces, each).nats.to_numpy() for name, each in splices.items()}


class Scene:
    """A model on a passage: its rows at the site, in the order in which it meets them, and its loss with others there.

    `rows` [rows, d_model] in the model's own units, `articles` [rows]; `clean` [articles] is its loss in nats.
    """

    def __init__(self, passage: Passage, teacher: Teacher):
        self.passage, self.teacher = passage, teacher
        self._pieces = pieces = activations.loss_texts(teacher, passage.corpus, passage.n_tokens, passage.split)
        parts: list[Tensor] = []

        def look(rows: Tensor) -> Tensor:
            parts.append(rows.float().cpu())
            return rows

        self.clean = self._nats(look)
        self.rows, self._sizes = torch.cat(parts), [len(part) for part in parts]
        order = [i for batch in pieces.batches(BATCH) for i in batch]
        self.articles = np.repeat(pieces.articles[order], pieces.lengths[order])

    def nats(self, rows: Float[Tensor, "rows d_model"]) -> Float[np.ndarray, " articles"]:
        """The model's loss by article, with these in the place of `rows`."""
        shape, own = tuple(rows.shape), tuple(self.rows.shape)
        allowed(shape == own, f"rows has shape {shape}", f"{own}, as the passage's")
        parts = iter(rows.split(self._sizes))
        return self._nats(lambda given: next(parts).to(given))

    def yardstick(self, mean: Float[Tensor, " d_model"]) -> dict[str, Float[np.ndarray, " articles"]]:
        """Columns for `scores.Sums`: the loss `clean`, and those of `ablated`."""
        return {"clean": self.clean} | ablated(self.teacher, self._pieces, self.passage.layer, self.passage.site, mean)

    def _nats(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        splice = Splice(self.passage.layer, self.passage.site, function)
        return by_article(self.teacher, self._pieces, splice).nats.to_numpy()


@torch.no_grad()
def reconstructions(
    sae: RankOneDictionary, rows: Float[Tensor, "rows d_model"], way: str = "encoder", *, batch_size: int = 4096
) -> Float[Tensor, "rows d_model"]:
    """b_dec + Σ values · d_j with codes found in a way of `WAYS`; matching pursuit chooses by SIGNED correlation, as
    paper B does, and solves for coefficients of either sign."""
    where, parts = next(sae.parameters()), []
    for part in rows.split(batch_size):
        x = part.to(where.device, where.dtype)
        codes = omp(x - sae.b_out, sae.decoder, sae.k, select="signed") if way == "pursuit" else sae.encode(x)
        if way == "solved":
            codes = replace(codes, values=least_squares(x - sae.b_out, sae.decoder, codes.indices))
        parts.append(sae.decode(codes).cpu())
    return torch.cat(parts).to(rows)
