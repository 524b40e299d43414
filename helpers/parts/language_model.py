"""Remedies for dead features on trial, on a language model's activations.

A `Bench` names harvested rows of one site, and the dictionary that shall learn them. `trial` trains one setting
(`known_truth.Setting`: a remedy with its strength, a learning rate, centred or not) and counts on held-out rows,
article by article, how often each latent fires. What several trials say of a remedy is a `Comparison`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from helpers import kept, settings
from helpers.dictionary import RankOneDictionary, topk_sae
from helpers.models.activations import ActivationStore
from helpers.models.teachers import Splice
from helpers.parts.known_truth import Setting
from helpers.study.scores import Comparison, by_group, compared, evaluate
from helpers.study.sweep import sweep
from helpers.training import Fit, Shuffled, Stream, fit
from helpers.training.remedies import AuxK, Balance, Ghost, LossFree, Resample, Switch

SPLITS = ("train", "validation", "test")
FORMAT = 1
"""Version of what `trial` keeps: raise it when the same setting gives other numbers."""
DENSE = 0.1
"""A latent that fires on more than this share of the rows is dense."""
BUSIEST = 100
"""Latents that a bootstrap of the largest firing rate looks at: the most frequent ones of each run."""


# -- what is trained ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bench:
    """Rows of one site, and the dictionary that learns them: everything but the remedy and the seed.

    Rows are divided by one number, the root of the training rows' mean variance over dimensions, so that strengths
    mean the same at every site. `folders` are those of the harvests for train, validation and test: names, which
    travel to a worker, where rows are read from disk.
    """

    folders: Mapping[str, str]
    site: str
    n_features: int
    k: int
    steps: int
    batch_size: int = 1024

    def __post_init__(self):
        if missing := set(SPLITS) - set(self.folders):
            raise ValueError(f"folders has no {', '.join(sorted(missing))}; allowed: {', '.join(SPLITS)}")

    @property
    def nameless(self) -> Bench:
        """The same without the place of the cache, for keys."""
        return replace(self, folders={split: Path(folder).name for split, folder in self.folders.items()})

    def store(self, split: str) -> ActivationStore:
        return ActivationStore(Path(self.folders[split]), (self.site,))

    @cached_property
    def scale(self) -> float:
        """What rows are divided by."""
        return self.store("train").moments(self.site).variance ** 0.5

    @cached_property
    def mean(self) -> Float[Tensor, " d"]:
        """Mean of the training rows, divided as they are."""
        return (self.store("train").moments(self.site).mean / self.scale).float()

    def rows(self, split: str) -> Float[Tensor, "rows d"]:
        """All rows of a split, divided."""
        return self.store(split).tensor(self.site) / self.scale

    def student(self, setting: Setting, seed: int, device: str | torch.device = "cpu") -> RankOneDictionary:
        """The untrained SAE of a setting; all settings of a seed start from the same atoms."""
        return topk_sae(
            len(self.mean),
            self.n_features,
            self.k,
            generator=settings.generator(seed),
            b_dec=self.mean if setting.centred else None,
            selection_bias=setting.balance.needs_bias,
        ).to(device)


class Divided:
    """The batches of a stream of rows that reconstruct themselves, divided by one number."""

    def __init__(self, stream: Stream, by: float):
        self.stream, self.by = stream, by
        self.fingerprint = f"{stream.fingerprint}/{by!r}"

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = self.stream(step)[0] / self.by
        return rows, rows


def train(
    bench: Bench,
    setting: Setting,
    seed: int,
    *,
    student: RankOneDictionary | None = None,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None | Literal[False] = None,
    **recipe,
) -> Fit:
    """Train one setting, or load it from the cache where that was done before. `student` is the bench's own unless
    one is given; `recipe` goes to `training.fit`."""
    store, where = bench.store("train"), torch.device(device)
    stream = Shuffled(
        store[bench.site], batch_size=bench.batch_size, seed=seed, device=where, fingerprint=f"{store.key}/{bench.site}"
    )
    # matrix products in bfloat16 where there are units for them, float32 parameters and sums everywhere
    defaults = {
        "steps": bench.steps,
        "log_every": max(1, bench.steps // 50),
        "autocast": torch.bfloat16 if where.type == "cuda" else None,
        "label": f"{bench.site}, k = {bench.k}, seed {seed}: {setting.balance}",
    }
    return fit(
        bench.student(setting, seed, where) if student is None else student, Divided(stream, bench.scale),
        lr=setting.lr, balance=setting.balance, cache_dir=cache_dir, **(defaults | recipe),
    )  # fmt: skip


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What one trained dictionary does on held-out rows, by article, and on validation rows what chooses among
    candidates. `counts` says on how many of an article's rows each latent fires."""

    bench: Bench
    setting: Setting
    seed: int
    validation_fvu: float
    validation_dead: float
    validation_largest_rate: float
    errors: Float[np.ndarray, " articles"]
    norms: Float[np.ndarray, " articles"]
    rows: Float[np.ndarray, " articles"]
    counts: Int[np.ndarray, "articles n"]
    chosen_but_zero: float
    seconds: float

    @property
    def n(self) -> int:
        """Held-out rows."""
        return int(self.rows.sum())

    @property
    def fvu(self) -> float:
        return float(self.errors.sum() / self.norms.sum())

    @property
    def rates(self) -> Float[np.ndarray, " n"]:
        """Share of the held-out rows on which each latent fires."""
        return self.counts.sum(0) / self.n

    @property
    def dead(self) -> float:
        """Share of latents that fire on no held-out row."""
        return float((self.rates == 0).mean())

    @property
    def dense(self) -> float:
        """Share of latents that fire on more than a tenth of the held-out rows."""
        return float((self.rates > DENSE).mean())

    @property
    def largest_rate(self) -> float:
        return float(self.rates.max())

    def busiest(self, count: int = BUSIEST) -> Float[np.ndarray, "articles count"]:
        """Counts of the most frequent latents, the first the most frequent one."""
        return self.counts[:, np.argsort(-self.counts.sum(0), kind="stable")[:count]].astype(float)

    def row(self) -> dict[str, object]:
        """The trial as a results file has it. `curve` is the firing rate at ranks 1, 2, 3, 5, 9, … n."""
        ordered, n = np.sort(self.rates)[::-1], len(self.rates)
        ranks = sorted({*np.round(np.geomspace(1, n, 40)).astype(int).tolist()})
        return {
            "site": self.bench.site,
            "n_features": n,
            "k": self.bench.k,
            "centred": self.setting.centred,
            "balance": repr(self.setting.balance),
            "lr": self.setting.lr,
            "seed": self.seed,
            "steps": self.bench.steps,
            "fvu": self.fvu,
            "dead": self.dead,
            "dense": self.dense,
            "n_dense": int((self.rates > DENSE).sum()),
            "largest_rate": self.largest_rate,
            "chosen_but_zero": self.chosen_but_zero,
            "validation_fvu": self.validation_fvu,
            "validation_dead": self.validation_dead,
            "n_rows": self.n,
            "seconds": round(self.seconds, 1),
            "curve": [[rank, float(ordered[rank - 1])] for rank in ranks],
        }


def trial(
    bench: Bench,
    setting: Setting,
    seed: int,
    device: str = "cpu",
    cache_dir: str | Path | None | Literal[False] = None,
) -> Trial:
    """Train one setting and judge it: a task for `sweep`. Both are kept in the cache folder, unless that is False."""
    found = kept.keep(
        "trials", [bench.nameless, setting, seed, torch.device(device).type],
        lambda: _columns(_trial(bench, setting, seed, device, cache_dir), 3), cache_dir=cache_dir,
    )  # fmt: skip
    return Trial(bench, setting, seed, **found)


def _columns(trial, first: int) -> dict:
    """The fields of a trial from number `first` on."""
    return {f.name: getattr(trial, f.name) for f in fields(trial)[first:]}


def _trial(bench: Bench, setting: Setting, seed: int, device: str, cache_dir) -> Trial:
    done = train(bench, setting, seed, device=device, cache_dir=cache_dir)
    before, test = evaluate(done.student, bench.rows("validation")), bench.rows("test")
    after, article = evaluate(done.student, test), torch.from_numpy(bench.store("test").article.astype(np.int64))
    return Trial(
        bench=bench,
        setting=setting,
        seed=seed,
        validation_fvu=before.fvu,
        validation_dead=before.dead,
        validation_largest_rate=before.largest_rate,
        errors=by_group(after.squared_error, article),
        norms=by_group(after.squared_norm, article),
        rows=by_group(torch.ones(len(test)), article),
        counts=firings(done.student, test, article),
        chosen_but_zero=after.chosen_but_zero,
        seconds=done.seconds,
    )


@torch.no_grad()
def firings(
    sae: RankOneDictionary, rows: Float[Tensor, "rows d"], groups: Int[Tensor, " rows"], *, batch_size: int = 4096
) -> Int[np.ndarray, "groups n"]:
    """On how many rows of each group each latent fires (has a code that is not zero); groups in rising order."""
    where = next(sae.parameters())
    names, index = torch.unique(groups, return_inverse=True)
    counts = torch.zeros(len(names) * sae.n_atoms, dtype=torch.int32)
    for part, group in zip(rows.split(batch_size), index.split(batch_size), strict=True):
        codes = sae.encode(part.to(where.device, where.dtype))
        cells = group[:, None] * sae.n_atoms + codes.indices.cpu()
        cells = cells[codes.fires.cpu()]
        counts.index_add_(0, cells, torch.ones(len(cells), dtype=torch.int32))
    return counts.view(len(names), -1).numpy()


def in_place(sae: RankOneDictionary, bench: Bench, layer: int) -> Splice:
    """The dictionary's reconstruction in the place of what it reconstructs, in the model's own units."""
    where = next(sae.parameters())

    @torch.no_grad()
    def reconstruct(rows: Tensor) -> Tensor:
        return sae(rows.to(where.device, where.dtype) / bench.scale) * bench.scale

    return Splice(layer, bench.site, reconstruct)


# -- choosing, and comparing -------------------------------------------------------------------------------------------

EQUAL = 0.01
"""Candidates within this share of the lowest validation FVU count as equal."""


def chosen(candidates: Sequence[Trial]) -> Trial:
    """The book's rule for every remedy: the lowest validation FVU; of those within 1 % of it, the fewest dead on
    validation rows."""
    if not candidates:
        raise ValueError("candidates is empty; allowed: at least one trial")
    lowest = min(each.validation_fvu for each in candidates)
    equal = [each for each in candidates if each.validation_fvu <= (1 + EQUAL) * lowest]
    return min(equal, key=lambda each: each.validation_dead)


def capping(candidates: Sequence[Trial]) -> Trial:
    """The candidate whose busiest latent fires least on validation rows, whatever that costs in error."""
    return min(candidates, key=lambda each: each.validation_largest_rate)


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
    if unknown := set(strengths) - set(make):
        raise ValueError(f"strengths names {', '.join(sorted(unknown))}; allowed: {', '.join(make)}")
    return {name: [make[name](strength) for strength in some] for name, some in strengths.items()}


@dataclass(frozen=True)
class Entry:
    """One remedy at one site, centred or not: every candidate with the first seed, and the chosen one with all seeds.
    `capped` are the trials of the candidate that `capping` takes."""

    candidates: list[Trial]
    trials: list[Trial]
    capped: list[Trial]

    @property
    def setting(self) -> Setting:
        return self.trials[0].setting


def contest(
    benches: Sequence[Bench],
    candidates: Mapping[str, Sequence[Balance]],
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    cap_seeds: Sequence[int] = (),
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    workers: int | None = None,
) -> dict[tuple[str, bool, str], Entry]:
    """Every remedy on every bench, centred and not: an `Entry` for each (site, centred, name).

    With the first seed and nothing done (`none`) all learning rates are tried, and then, at the one chosen, every
    candidate of every remedy. The chosen ones (`chosen`) are trained with the other seeds, and those of `capping` with
    those of `cap_seeds` too. Trials are kept: a contest that was stopped goes on.
    """
    if not (lrs and seeds and benches):
        raise ValueError(f"lrs={list(lrs)}, seeds={list(seeds)}, {len(benches)} benches; allowed: at least one of each")
    options = {"device": device, "cache_dir": cache_dir}

    def run(label: str, cells: Sequence[tuple[tuple, Bench, Setting, int]]) -> dict[tuple, list[Trial]]:
        arguments = [{"bench": b, "setting": s, "seed": i} | options for _, b, s, i in cells]
        found: dict[tuple, list[Trial]] = {}
        for (key, *_), each in zip(cells, sweep(trial, arguments, label=label, workers=workers), strict=True):
            found.setdefault(key, []).append(each)
        return found

    cases = {(bench.site, centred): bench for bench in benches for centred in (False, True)}
    tried = run("learning rates", [
        ((*case, "none"), bench, Setting(lr=lr, centred=case[1]), seeds[0])
        for case, bench in cases.items() for lr in lrs
    ])  # fmt: skip
    rate = {case: chosen(tried[*case, "none"]).setting.lr for case in cases}
    tried |= run("strengths", [
        ((*case, name), bench, Setting(balance, rate[case], case[1]), seeds[0])
        for case, bench in cases.items() for name, some in candidates.items() for balance in some
    ])  # fmt: skip
    picks = {key: chosen(some) for key, some in tried.items()}
    others = run("seeds", [(key, p.bench, p.setting, i) for key, p in picks.items() for i in seeds[1:]])
    caps = {key: capping(some) for key, some in tried.items()}
    more = run("strongest", [(key, p.bench, p.setting, i) for key, p in caps.items() for i in cap_seeds[1:]])
    return {
        key: Entry(some, [picks[key], *others.get(key, [])], [caps[key], *more.get(key, [])])
        for key, some in tried.items()
    }


def at_other_k(
    found: Mapping[tuple[str, bool, str], Entry],
    ks: Sequence[int],
    names: Sequence[str],
    *,
    device: str = "cpu",
    cache_dir: str | Path | None = None,
    workers: int | None = None,
) -> dict[tuple[str, bool, str, int], Trial]:
    """What `contest` chose, trained once more (first seed) with another k; nothing is chosen anew."""
    first = {key: entry.trials[0] for key, entry in found.items() if key[2] in names}
    cells = {
        (*key, k): {"bench": replace(each.bench, k=k), "setting": each.setting, "seed": each.seed}
        for k in ks
        for key, each in first.items()
    }
    options = {"device": device, "cache_dir": cache_dir}
    trials = sweep(trial, [cell | options for cell in cells.values()], label="other k", workers=workers)
    return dict(zip(cells, trials, strict=True))


def largest_rates(
    runs: Mapping[str, Sequence[Trial]],
    statistic: Callable[[dict[str, float]], float],
    **bootstrap,
) -> Comparison:
    """A statistic of largest firing rates, one rate for each name: the mean over its seeds.

    Seeds (those that all have) and articles are resampled together for all names. The largest rate of a resample is
    that of whichever latent fires most in it.

    Raises:
        ValueError: when the runs have no seed in common.
    """
    names = list(runs)
    seeds = sorted(set.intersection(*({each.seed for each in some} for some in runs.values())))
    if not seeds:
        raise ValueError(f"no seed is common to {', '.join(names)}; allowed: at least one")
    found = [[next(t for t in runs[name] if t.seed == seed) for name in names] for seed in seeds]
    width = min(BUSIEST, *(len(t.rates) for t in found[0]))
    data = np.stack(
        [np.concatenate([*(t.busiest(width) for t in some), some[0].rows[:, None]], axis=1) for some in found]
    )  # [seeds, articles, names × width + 1]

    def of(some: np.ndarray) -> float:
        sums = some.sum(1)  # [seeds, …]
        rates = (sums[:, :-1] / sums[:, -1:]).reshape(len(some), len(names), width).max(-1).mean(0)
        return statistic(dict(zip(names, rates.tolist(), strict=True)))

    return compared(data, of, **bootstrap)


def error(runs: Sequence[Trial], **bootstrap) -> Comparison:
    """FVU over the seeds of one setting."""
    data = np.stack([np.stack([each.errors, each.norms], axis=1) for each in runs])

    def of(some: np.ndarray) -> float:
        return float(some[..., 0].sum() / some[..., 1].sum())

    return compared(data, of, **bootstrap)


MEASURES = ("fvu", "largest_rate", "dead", "dense")


def points(found: Mapping[tuple[str, bool, str], Entry], **bootstrap) -> list[dict[str, object]]:
    """The entries of a contest as a results file has them: what was chosen with all its seeds, and every candidate."""
    rows = []
    for (_, _, method), entry in found.items():
        rate = largest_rates({method: entry.trials}, lambda rates, name=method: rates[name], **bootstrap)
        fvu = error(entry.trials, **bootstrap)
        rows.append(
            entry.trials[0].row()
            | {"method": method, "seeds": [each.seed for each in entry.trials]}
            | {"fvu": fvu.value, "fvu_ci": fvu.ci, "largest_rate": rate.value, "rate_ci": rate.ci}
            | {f"{name}_by_seed": [getattr(each, name) for each in entry.trials] for name in MEASURES}
            | {"candidates": [_short(each) for each in entry.candidates], "capped": _short(entry.capped[0])}
        )
    return rows


def _short(found: Trial) -> dict[str, object]:
    numbers = {name: getattr(found, name) for name in MEASURES}
    return {"balance": repr(found.setting.balance), "lr": found.setting.lr} | numbers


def whereabouts(bench: Bench, seed: int = 0) -> dict[str, float | str]:
    """Where the rows of a bench lie, and what the untrained dictionary makes of it on held-out rows.

    `mean_share` is ‖μ‖²/(‖μ‖² + tr C); `top_share` the share of the variance along its largest principal direction,
    and `aligned` the cosine, without its sign, of that direction with μ; `coordinate` the largest coordinate of the
    divided mean. `fires_at_zero` and `fires_at_mean` are shares of the
    latents that fire at all before training, by where b_dec starts.
    """
    moments = bench.store("train").moments(bench.site)
    mean, spread = float(moments.mean.square().sum()), float(moments.cov.trace())
    values, axes = torch.linalg.eigh(moments.cov)
    rows = bench.rows("test")
    one = torch.zeros(len(rows), dtype=torch.long)
    fires = {
        name: float((firings(bench.student(Setting(centred=centred), seed), rows, one) > 0).mean())
        for name, centred in (("fires_at_zero", False), ("fires_at_mean", True))
    }
    return {
        "site": bench.site,
        "mean_share": mean / (mean + spread),
        "top_share": float(values[-1]) / spread,
        "aligned": abs(float(axes[:, -1] @ moments.mean)) / mean**0.5,
        "coordinate": float(bench.mean.abs().max()),
    } | fires


# -- what the busiest latents are --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class MeanShares:
    """Who carries the mean μ of the rows: shares of ‖μ‖² along μ in b_dec, in dense latents and in the others.

    They add to 1 but for the error of the reconstruction's mean.
    """

    bias: float
    dense: float
    others: float


def mean_shares(sae: RankOneDictionary, rows: Float[Tensor, "rows d"], rates: Float[np.ndarray, " n"]) -> MeanShares:
    """Split the mean reconstruction of `rows` along their mean; `rates` are the latents' firing rates."""
    mean = rows.double().mean(0)
    along = sae.decoder.weight.detach().cpu().double() @ mean / mean.square().sum()
    parts, dense = mean_codes(sae, rows) * along, torch.from_numpy(np.asarray(rates) > DENSE)
    bias = float(sae.b_out.detach().cpu().double() @ mean / mean.square().sum())
    return MeanShares(bias, float(parts[dense].sum()), float(parts[~dense].sum()))


@torch.no_grad()
def mean_codes(sae: RankOneDictionary, rows: Float[Tensor, "rows d"], *, batch_size: int = 4096) -> Float[Tensor, " n"]:
    """Each latent's code averaged over all rows, 0 where it does not fire; float64."""
    where, total = next(sae.parameters()), torch.zeros(sae.n_atoms, dtype=torch.float64)
    for part in rows.split(batch_size):
        codes = sae.encode(part.to(where.device, where.dtype))
        total.index_add_(0, codes.indices.flatten().cpu(), codes.values.flatten().double().cpu())
    return total / len(rows)


@torch.no_grad()
def codes_of(
    sae: RankOneDictionary, rows: Float[Tensor, "rows d"], latents: Sequence[int], *, batch_size: int = 4096
) -> Float[Tensor, "rows chosen"]:
    """The codes of a few latents on every row, 0 where they do not fire."""
    where, parts = next(sae.parameters()), []
    for part in rows.split(batch_size):
        codes = sae.encode(part.to(where.device, where.dtype))
        parts.append(torch.stack([(codes.values * (codes.indices == j)).sum(1) for j in latents], dim=1).float().cpu())
    return torch.cat(parts)


def cosines(sae: RankOneDictionary, direction: Float[Tensor, " d"]) -> Float[np.ndarray, " n"]:
    """Cosine of each latent's decoder row with a direction."""
    rows = sae.decoder.weight.detach().cpu().float()
    return (F.normalize(rows, dim=1) @ F.normalize(direction.float(), dim=0)).numpy()
