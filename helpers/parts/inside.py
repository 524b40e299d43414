"""The sparse dictionary inside a mixture-of-experts layer, and the ladder of controls that says what it is worth.

The implicit SAE (paper A) chooses by the layer's router and rebuilds with one direction an expert: d_j, the first
principal component of W_down,j. What it explains is judged on held-out rows y, with coefficients by least squares on
the chosen support S,

    explained(y) = ‖P_S (y − c)‖²,   total(y) = ‖y − c‖²,   FVE = Σ explained / Σ total,

P_S the projection on the chosen directions and c the mean of the FITTING rows (or zero: uncentred). With that fixed
c, k directions drawn at random have an expected FVE of exactly k/d, whatever the rows are. All that is fitted is
fitted on rows of other articles than those that judge.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from matplotlib.axes import Axes
from torch import Tensor
from torch.nn import functional as F

from helpers import dictionary, settings, training
from helpers.dictionary import RankOneDictionary, Rows, SparseCodes, pursuit, weighted_sum
from helpers.models import checkpoints, sources
from helpers.models.activations import ActivationStore
from helpers.models.checkpoints import MoELayer, Principal
from helpers.models.teachers import Teacher
from helpers.press import figures
from helpers.study.scores import bootstrap_interval, by_group, crossed_interval

SITES = ("mlp_in", "mlp_out")
WHICH = ("fitting", "judging")
CHUNK_BYTES = 64 * 2**20
"""Largest batch of Gram matrices of chosen atoms that a projection builds."""
FEWEST_ARTICLES = 5
"""A bootstrap over fewer units is no interval."""
DETERMINISTIC = ("implicit", "second", "w_up", "w_gate", "all_directions", "pca", "fitted_directions", "omp")
DRAWN = ("random", "random_directions", "random_router", "other_token", "shuffled")
RULES = ("score", "gate")
FITTED = ("none", "one", "each")


LABELS = {
    "implicit": "implicit SAE",
    "shuffled": "experts shuffled between router rows",
    "other_token": "choice made for another token",
    "random_router": "random router, trained directions",
    "second": "second component of W_down",
    "w_up": "first component of W_up",
    "w_gate": "first component of W_gate",
    "random_directions": "trained router, random directions",
    "random": "all random",
    "pca": "k fixed principal components",
    "sae": "trained TopK SAE's choice",
    "sae_own": "trained TopK SAE, its own codes",
    "fitted_directions": "router's choice, fitted directions",
    "omp": "trained directions, matching pursuit's choice",
    "all_directions": "all n directions at once",
}
"""Controls in the order in which figures show them; `ladder` says what each is."""
MARKS = dict.fromkeys(("other_token", "second", "w_up", "w_gate", "all_directions"), "dense") | {"sae_own": "sae"}
"""Marks of `figures` for those controls that have none of their own name."""


# -- before long work --------------------------------------------------------------------------------------------------


def check(
    experts: Sequence[MoELayer],
    *,
    seeds: Sequence[int],
    ranks: Sequence[int] = (1,),
    lrs: Sequence[float] | None = None,
    controls: Sequence[str] = (*DETERMINISTIC, *DRAWN),
    needed: Sequence[str] = (),
) -> None:
    """Looks at a chapter's parameters before anything is harvested.

    Raises `ValueError` that names the parameter, its value and what is allowed: no layers, ranks without 1 or too large
    for a layer, no seeds, no learning rates, controls that are unknown or lack a `needed` one, and layers that choose
    by more than their scores.
    """
    if not experts:
        raise ValueError("layers=[]; allowed: at least one layer that has experts")
    for moe in experts:
        _by_scores_alone(moe)
    most = min(moe.d_model // moe.top_k for moe in experts)
    if 1 not in ranks or not 1 <= min(ranks) <= max(ranks) <= most:
        raise ValueError(f"ranks={list(ranks)}; allowed: whole numbers, 1 to {most} = d_model // top_k, 1 among them")
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"seeds={list(seeds)}; allowed: at least one, each once; five or more for good intervals")
    if lrs is not None and (not lrs or min(lrs) <= 0):
        raise ValueError(f"lrs={list(lrs)}; allowed: at least one learning rate, all above 0")
    _known(controls)
    if missing := [control for control in needed if control not in controls]:
        raise ValueError(f"controls={list(controls)} lacks {missing}; allowed: any that hold {', '.join(needed)}")


def _known(controls: Sequence[str]) -> None:
    if unknown := set(controls) - {*DETERMINISTIC, *DRAWN}:
        raise ValueError(f"controls={sorted(unknown)}; allowed: {', '.join((*DETERMINISTIC, *DRAWN))}")


def _by_scores_alone(moe: MoELayer) -> None:
    if moe.correction is not None or moe.n_group > 1:
        raise ValueError(f"layer {moe.layer} chooses with a correction or in groups; allowed: by its scores alone")


# -- the dictionary ----------------------------------------------------------------------------------------------------


def implicit_sae(
    moe: MoELayer,
    directions: Float[Tensor, "experts rank d_model"],
    *,
    activation: str = "identity",
    b_out: Float[Tensor, " d_model"] | None = None,
) -> RankOneDictionary:
    """The layer's router with `rank` directions an expert as a member of the family: codes are the router's scores.

    Rank 1 has a tied router (the router's rows are the encoder's), so it is an SAE; at higher ranks all atoms of an
    expert read the same score. Raises `ValueError` where the layer chooses by more than its scores (a correction
    bias, groups of experts), and for directions of another shape.
    """
    _by_scores_alone(moe)
    n, rank, d = directions.shape
    if (n, d) != (moe.n_experts, moe.d_model):
        raise ValueError(f"directions are {n} × {d}; allowed: {moe.n_experts} × {moe.d_model}, experts × d_model")
    router = Rows(moe.router.clone(), None if moe.bias is None else moe.bias.clone())
    encoder = router
    if rank > 1:
        bias = None if moe.bias is None else moe.bias.repeat_interleave(rank)
        encoder = Rows(moe.router.repeat_interleave(rank, 0), bias)
    options = {"k": moe.top_k, "activation": activation, "b_out": b_out, "expert_rank": rank}
    return RankOneDictionary(encoder, Rows(directions.flatten(0, 1).clone()), router=router, **options)


def random_directions(n: int, d: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
    """Unit vectors, uniform on the sphere and independent: what PC1 is of a matrix of Gaussian noise."""
    return F.normalize(torch.randn(n, d, generator=generator), dim=1)


def random_router(moe: MoELayer, generator: torch.Generator) -> MoELayer:
    """The layer with Gaussian router rows as long, on average, as its own, and no biases."""
    rows = torch.randn(moe.router.shape, generator=generator)
    rows *= moe.router.norm(dim=1).square().mean().sqrt() / moe.d_model**0.5
    return dataclasses.replace(moe, router=rows, bias=None, correction=None, n_group=1, topk_group=1)


# -- projections -------------------------------------------------------------------------------------------------------


class Projection:
    """Projection of each row on the atoms chosen for it, through the Gram matrix of all atoms.

    Args:
        atoms: [n, d].
        support: [rows, m], the atoms of each row; they may depend on each other.
    """

    def __init__(self, atoms: Float[Tensor, "n d"], support: Int[Tensor, "rows m"]):
        if support.shape[1] > atoms.shape[1]:
            raise ValueError(f"{support.shape[1]} atoms a row in {atoms.shape[1]} dimensions; allowed: fewer")
        self.atoms, self.support = atoms, support
        self.gram = (atoms @ atoms.T).double()

    def explained(self, *targets: Float[Tensor, "rows d"]) -> list[Float[Tensor, " rows"]]:
        """‖P_S y‖² of each row of each target, in float64."""
        found = [y.new_zeros(len(y), dtype=torch.float64) for y in targets]
        products = [y @ self.atoms.T for y in targets]
        size = max(1, CHUNK_BYTES // (8 * self.support.shape[1] ** 2))
        for start in range(0, len(self.support), size):
            rows = slice(start, start + size)
            at = self.support[rows]
            along = torch.stack([p[rows].gather(1, at).double() for p in products], dim=2)
            squares = _energy(self.gram[at[:, :, None], at[:, None]], along)
            for each, values in zip(found, squares.T, strict=True):
                each[rows] = values
        return found


def _energy(gram: Float[Tensor, "rows m m"], along: Float[Tensor, "rows m targets"]) -> Float[Tensor, "rows targets"]:
    """bᵀ G⁺ b: the squared length of the projection on vectors with Gram matrix G, from the products b with them."""
    factor, failed = torch.linalg.cholesky_ex(gram)
    least = factor.diagonal(dim1=1, dim2=2).square().amin(1)
    weak = (failed != 0) | (least < 1e-6 * gram.diagonal(dim1=1, dim2=2).amax(1))
    squares = torch.linalg.solve_triangular(factor, along, upper=False).square().sum(1)
    if weak.any():  # atoms that depend on each other: leave out what rounding makes of the rest
        values, vectors = torch.linalg.eigh(gram[weak])
        inverse = torch.where(values > 1e-6 * values[:, -1:], 1 / values, 0)
        squares[weak] = ((vectors.mT @ along[weak]).square() * inverse[:, :, None]).sum(1)
    return squares


def in_span(y: Float[Tensor, "rows d"], vectors: Float[Tensor, "n d"]) -> Float[Tensor, " rows"]:
    """Squared length of each row's projection on the span of all vectors."""
    left, values, _ = torch.linalg.svd(vectors.double().T, full_matrices=False)
    basis = left[:, values > 1e-6 * values[0]].to(y.dtype)
    return (y @ basis).double().square().sum(1)


# -- one layer, its rows, and what is judged ---------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Explained:
    """Sums of squares over held-out rows, by article: `explained` [draws, articles] and `total` [articles].

    What involves no chance has one draw.
    """

    explained: Float[np.ndarray, "draws articles"]
    total: Float[np.ndarray, " articles"]

    @property
    def fve(self) -> float:
        """Σ explained / Σ total, averaged over draws."""
        return float(self.explained.mean(0).sum() / self.total.sum())

    @property
    def by_draw(self) -> list[float]:
        return (self.explained.sum(1) / self.total.sum()).tolist()


class Estimate(NamedTuple):
    """A number and its 95 % interval over random draws × articles; no interval over fewer than five articles."""

    value: float
    low: float | None
    high: float | None

    @property
    def ci(self) -> tuple[float, float] | None:
        return None if self.low is None else (self.low, self.high)


def estimate(
    statistic: Callable[[np.ndarray], float], *parts: Explained, seed: int = 0, n_resamples: int = 1000
) -> Estimate:
    """`statistic` of the parts' FVEs, an array, with its interval: draws and articles are resampled, each as a whole
    (not at all where `n_resamples` is 0).

    All parts are judged on the same articles. Draw i of one part goes with draw i of the others; a part without
    chance goes with every draw. Raises `ValueError` for parts with other articles, or other numbers of draws.
    """
    draws = max(len(part.explained) for part in parts)
    for part in parts:
        if len(part.explained) not in (1, draws) or len(part.total) != len(parts[0].total):
            shape = part.explained.shape
            raise ValueError(f"a part has {shape} draws × articles; allowed: {(draws, len(parts[0].total))}, or 1 draw")
    stacked = [(np.broadcast_to(p.explained, (draws, len(p.total))), p.total[None].repeat(draws, 0)) for p in parts]
    data = np.stack([np.stack(pair, -1) for pair in stacked], 2)  # draws, articles, parts, (explained, total)

    def of(sample: np.ndarray) -> float:
        sums = sample.sum((0, 1))
        return statistic(sums[:, 0] / sums[:, 1])

    if data.shape[1] < FEWEST_ARTICLES or not n_resamples:
        return Estimate(of(data), None, None)
    return Estimate(of(data), *crossed_interval(data, of, seed=seed, n_resamples=n_resamples))


def fve(part: Explained, **options) -> Estimate:
    """FVE with its interval."""
    return estimate(lambda f: float(f[0]), part, **options)


def ratio(of: Explained | Sequence[Explained], to: Explained | Sequence[Explained] | float, **options) -> Estimate:
    """FVE of one over FVE of another, or over a number; of lists, one for each layer, the layers' geometric mean."""
    of = [of] if isinstance(of, Explained) else list(of)
    if isinstance(to, float):
        return estimate(lambda f: _geometric(f / to), *of, **options)
    to = [to] if isinstance(to, Explained) else list(to)
    if len(of) != len(to):
        raise ValueError(f"{len(to)} parts to divide {len(of)} by; allowed: as many")
    return estimate(lambda f: _geometric(f[: len(of)] / f[len(of) :]), *of, *to, **options)


def over_layers(
    of: Sequence[Explained], to: Sequence[Explained] | float, *, seed: int = 0, n_resamples: int = 1000
) -> Estimate:
    """`ratio` of parts without chance, one for each layer, with an interval over layers × articles, each resampled as
    a whole. Few layers make a rough interval; with one layer it is over articles only.

    Raises `ValueError` for parts of several draws, and for lists of other lengths.
    """
    parts = [*of, *([] if isinstance(to, float) else to)]
    if any(len(part.explained) > 1 for part in parts) or len(parts) not in (len(of), 2 * len(of)):
        raise ValueError(f"{len(parts)} parts for {len(of)} layers; allowed: parts of one draw, one or two for each")
    data = np.stack([np.stack([part.explained[0], part.total], -1) for part in parts])
    data = data.reshape(-1, len(of), *data.shape[1:]).transpose(1, 2, 0, 3)  # layers, articles, (of, to), sums

    def statistic(sample: np.ndarray) -> float:
        sums = sample.sum(1)
        shares = sums[..., 0] / sums[..., 1]
        return _geometric(shares[:, 0] / (to if isinstance(to, float) else shares[:, 1]))

    if data.shape[1] < FEWEST_ARTICLES:
        return Estimate(statistic(data), None, None)
    return Estimate(statistic(data), *crossed_interval(data, statistic, seed=seed, n_resamples=n_resamples))


def above(found: Sequence[float | None], threshold: float) -> bool | None:
    """Whether a number with its interval lies above a threshold; None where the interval holds the threshold."""
    value, low, high = found
    low, high = (value, value) if low is None else (low, high)
    return True if low > threshold else False if high <= threshold else None


def graded(predictions: Mapping[str, bool | None]) -> str:
    """A line for each prediction with what became of it; None is an interval that holds the threshold."""
    words = {True: "as predicted", False: "NOT as predicted", None: "undecided"}
    return "\n".join(f"{words[outcome]:17} {text}" for text, outcome in predictions.items())


def _geometric(numbers: np.ndarray) -> float:
    with np.errstate(divide="ignore"):  # where something explains nothing the mean is 0
        return float(np.exp(np.log(numbers).mean()))


def mean_loss(losses: pd.DataFrame, *, seed: int = 0) -> Estimate:
    """Mean cross-entropy in nats a token of `activations.losses`, with its interval over articles."""
    sums = losses.groupby("article")[["nats", "tokens"]].sum().to_numpy()
    value = float(sums[:, 0].sum() / sums[:, 1].sum())
    if len(sums) < FEWEST_ARTICLES:
        return Estimate(value, None, None)
    return Estimate(value, *bootstrap_interval(sums, lambda s: s[:, 0].sum() / s[:, 1].sum(), seed=seed))


@dataclass(frozen=True, eq=False)
class Bench:
    """One MoE layer, rows of it to fit on, and rows of other articles to judge on.

    Args:
        moe: from `checkpoints.read`.
        fitting, judging: harvests of the sites `SITES` at this layer.
        rank: how many directions an expert, at most.
    """

    moe: MoELayer
    fitting: ActivationStore
    judging: ActivationStore
    rank: int = 1
    device: str = "cpu"
    _own: dict[str, SparseCodes] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self):
        if self.fitting.d != self.moe.d_model:
            raise ValueError(f"rows have {self.fitting.d} numbers; allowed: {self.moe.d_model}, as the router's rows")
        if not 1 <= self.rank * self.moe.top_k <= self.moe.d_model:
            most = self.moe.d_model // self.moe.top_k
            raise ValueError(f"rank={self.rank} with top_k={self.moe.top_k}; allowed: 1 to {most} = d_model // top_k")
        if shared := set(self.fitting.article.tolist()) & set(self.judging.article.tolist()):
            raise ValueError(f"articles {sorted(shared)[:5]} both fit and judge; allowed: splits that share none")

    @cached_property
    def principal(self) -> Principal:
        """The `rank` leading directions of each expert's W_down."""
        return checkpoints.principal(self.moe, self.rank, device=self.device)

    @cached_property
    def directions(self) -> Float[Tensor, "experts rank d_model"]:
        return self.principal.directions.to(self.device)

    def rows(self, which: str, site: str, centred: bool = True) -> Float[Tensor, "rows d_model"]:
        """Rows of `which` ("fitting" or "judging") at a site, less the mean of the fitting rows if `centred`.

        Read from disk when asked for: only what is in use is in memory.
        """
        if which not in WHICH:
            raise ValueError(f"which={which!r} is unknown; allowed: {', '.join(map(repr, WHICH))}")
        rows = getattr(self, which).tensor(site).to(self.device)
        return rows.sub_(self.mean(site)) if centred else rows

    def mean(self, site: str) -> Float[Tensor, " d_model"]:
        return self.fitting.moments(site).mean.to(self.device, torch.float32)

    def choice(self, which: str = "judging", moe: MoELayer | None = None) -> SparseCodes:
        """What a router (the layer's own unless given) chooses for the rows, and with what weights."""
        if moe is not None:
            return moe.route(self.rows(which, "mlp_in", False))
        if which not in self._own:
            self._own[which] = self.moe.route(self.rows(which, "mlp_in", False))
        return self._own[which]

    def judged(self, explained: Iterable[Float[Tensor, " rows"]], site: str, centred: bool) -> Explained:
        """Sums by article of what each draw explains of the judging rows."""
        groups = torch.from_numpy(np.array(self.judging.article))
        total = self.rows("judging", site, centred).double().square().sum(1)
        sums = np.stack([by_group(each.cpu(), groups) for each in explained])
        return Explained(sums, by_group(total.cpu(), groups))

    @cached_property
    def load(self) -> Float[Tensor, " experts"]:
        """Share of the judging rows' choices that goes to each expert."""
        counts = torch.bincount(self.choice().indices.flatten(), minlength=self.moe.n_experts)
        return (counts / counts.sum()).cpu()


def effective_experts(load: Float[Tensor, " experts"]) -> float:
    """exp(entropy) of the load: n where it is even, 1 where one expert gets all."""
    return float(torch.special.entr(load.double()).sum().exp())


def participation(bench: Bench, site: str) -> float:
    """Participation ratio (tr C)² / tr C² of the fitting rows' covariance: d where all directions have as much
    variance, 1 where one has all. The number of rows bounds it too.
    """
    cov = bench.fitting.moments(site).cov
    return float(cov.diagonal().sum() ** 2 / cov.square().sum())


# -- the ladder --------------------------------------------------------------------------------------------------------


class Key(NamedTuple):
    """What was judged: a control (with its rank, directions an expert) at a site, centred or not."""

    control: str
    site: str
    centred: bool
    rank: int = 1


def ladder(
    bench: Bench,
    seeds: Sequence[int],
    *,
    controls: Sequence[str] = (*DETERMINISTIC, *DRAWN),
    ranks: Sequence[int] = (1,),
    centrings: Sequence[bool] = (True, False),
) -> dict[Key, Explained]:
    """What each control explains of the layer's input and output, with least squares on the chosen support.

    implicit            the layer's router and W_down's leading directions (at every rank of `ranks`)
    shuffled            the same, each expert's directions at another expert's router row (at every rank; beyond 1 only
                        for the first two seeds); some of the directions a row gets belong to others of its experts
                        all the same, see `overlap`
    other_token         the same, each row with the choice made for another row
    random_router       Gaussian router rows, trained directions
    random_directions   the layer's router, random directions
    random              both random: the paper's control
    second              the second component of W_down, and w_up, w_gate: the first of those matrices
    all_directions      no choice: the span of all first directions
    pca                 the k·r leading principal components of the fitting rows, the same for every row
    fitted_directions   the layer's router, directions fitted to the fitting rows (centred only)
    omp                 first directions, chosen one by one for each row by matching pursuit, which sees the row
                        (greedy, so not the best choice there is; centred only)

    Those with chance in them are drawn once for each seed. Raises `ValueError` for an unknown control, ranks beyond
    the bench's, and fewer than one seed.
    """
    _known(controls)
    if not ranks or not 1 <= min(ranks) <= max(ranks) <= bench.rank:
        raise ValueError(f"ranks={list(ranks)}; allowed: 1 to {bench.rank}, the bench's rank")
    if not seeds:
        raise ValueError("seeds is empty; allowed: one for each random draw")
    sites = [(site, centred) for site in SITES for centred in centrings]
    targets = [bench.rows("judging", *site) for site in sites]
    found: dict[Key, list[Tensor]] = {}
    for control, rank, atoms, support in _chosen(bench, seeds, controls, ranks):
        explained = Projection(atoms, support).explained(*targets)
        for site, each in zip(sites, explained, strict=True):
            found.setdefault(Key(control, *site, rank), []).append(each)
    for (site, centred), y in zip(sites, targets, strict=True):
        for control, rank, explained in _of_site(bench, site, centred, y, controls, ranks):
            found[Key(control, site, centred, rank)] = [explained]
    return {key: bench.judged(each, key.site, key.centred) for key, each in found.items()}


def _chosen(bench: Bench, seeds, controls, ranks) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Controls that choose without seeing the target: name, rank, atoms, and the atoms of each judging row."""
    moe, own = bench.moe, bench.choice().indices
    first = bench.directions[:, 0]
    for rank in ranks if "implicit" in controls else ():
        yield "implicit", rank, *_flat(bench.directions[:, :rank], own)
    if "second" in controls:
        second = bench.directions if bench.rank > 1 else checkpoints.principal(moe, 2, device=bench.device).directions
        yield "second", 1, second[:, 1].to(own.device), own
    for which in ("w_up", "w_gate"):
        if which in controls:
            other = checkpoints.principal(moe, 1, which, device=bench.device).directions[:, 0]
            yield which, 1, other.to(own.device), own
    for seed in seeds:
        draw = _draw(bench, seed)
        drawn, elsewhere, moved = draw.directions, bench.choice(moe=draw.router).indices, draw.moved
        for rank in ranks if "shuffled" in controls else ():
            if rank == 1 or seed in seeds[:2]:
                yield "shuffled", rank, *_flat(bench.directions[moved, :rank], own)
        simple = {
            "random": (drawn, elsewhere),
            "random_directions": (drawn, own),
            "random_router": (first, elsewhere),
            "other_token": (first, own[draw.rows]),
        }
        for control, (atoms, support) in simple.items():
            if control in controls:
                yield control, 1, atoms, support


class _Draw(NamedTuple):
    directions: Float[Tensor, "experts d_model"]
    router: MoELayer
    moved: Int[Tensor, " experts"]
    rows: Int[Tensor, " rows"]


def _draw(bench: Bench, seed: int) -> _Draw:
    """All that chance decides for a seed: the same few numbers for every layer, in this order."""
    noise, like = settings.generator(seed), bench.directions
    directions = random_directions(bench.moe.n_experts, bench.moe.d_model, noise).to(like)
    router = random_router(bench.moe, noise)
    moved = derangement(bench.moe.n_experts, noise).to(like.device)
    rows = torch.randperm(bench.judging.n, generator=noise).to(like.device)
    return _Draw(directions, router, moved, rows)


def overlap(bench: Bench, seeds: Sequence[int]) -> list[float]:
    """What *shuffled* does not take away: of the directions that a judged row is handed there, the share that belongs
    to another of the experts chosen for that row; one number for each seed.

    With even and independent choices it would be (k − 1)/(n − 1).
    """
    chosen, shares = bench.choice().indices, []
    member = torch.zeros(len(chosen), bench.moe.n_experts, dtype=torch.bool, device=chosen.device)
    member.scatter_(1, chosen, True)
    for seed in seeds:
        handed = _draw(bench, seed).moved[chosen]
        shares.append(float(member.gather(1, handed).double().mean()))
    return shares


def _of_site(bench: Bench, site, centred, y, controls, ranks) -> Iterator[tuple[str, int, Tensor]]:
    """Controls that are fitted to the site, or see the very row: name, rank, what each judging row has explained."""
    k, first = bench.moe.top_k, bench.directions[:, 0]
    if "all_directions" in controls:
        yield "all_directions", 1, in_span(y, first)
    if "pca" in controls:
        components = principal_components(bench, site, centred, k * max(ranks))
        for rank in ranks:
            yield "pca", rank, (y @ components[: k * rank].T).double().square().sum(1)
    if "fitted_directions" in controls and centred:
        fitted = fit_directions(bench.rows("fitting", site), first, bench.choice("fitting").indices)
        yield "fitted_directions", 1, Projection(fitted, bench.choice().indices).explained(y)[0]
    if "omp" in controls and centred:
        yield "omp", 1, Projection(first, pursuit.omp(y, first, k).indices).explained(y)[0]


def _flat(directions: Float[Tensor, "experts rank d"], experts: Int[Tensor, "rows k"]) -> tuple[Tensor, Tensor]:
    """Atoms of all experts one after another, and the numbers of those that belong to the chosen experts."""
    rank = directions.shape[1]
    inside = torch.arange(rank, device=experts.device)
    return directions.flatten(0, 1), (experts[:, :, None] * rank + inside).flatten(1)


def derangement(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """A random permutation that leaves nothing in its place (uniform among them: drawn until one comes)."""
    if n < 2:
        raise ValueError(f"n={n} has no derangement; allowed: at least 2")
    while True:
        order = torch.randperm(n, generator=generator)
        if (order != torch.arange(n)).all():
            return order


def principal_components(bench: Bench, site: str, centred: bool, n: int) -> Float[Tensor, "n d"]:
    """Leading eigenvectors of the fitting rows' covariance, or second moment if not `centred`."""
    moments = bench.fitting.moments(site)
    matrix = moments.cov if centred else moments.cov + torch.outer(moments.mean, moments.mean)
    return torch.linalg.eigh(matrix).eigenvectors.flip(1).T[:n].to(bench.device, torch.float32)


def fit_directions(
    y: Float[Tensor, "rows d"], start: Float[Tensor, "n d"], support: Int[Tensor, "rows k"], *, rounds: int = 10
) -> Float[Tensor, "n d"]:
    """Directions for a GIVEN choice: coefficients by least squares, then directions by least squares, in turn.

    The method of optimal directions (Engan et al. 1999) without its pursuit step. The error on `y` never grows, so
    the result is at least as good there as `start`; it is a local optimum. A direction that is never used stays.
    """
    atoms, n = start, len(start)
    for _ in range(rounds):
        values = pursuit.least_squares(y, atoms, support)
        codes = SparseCodes(support, values).to_dense(n).double()
        gram = codes.T @ codes
        used = gram.diagonal() > 0
        gram.diagonal().add_(1e-9 * gram.diagonal().mean() + (~used).double())
        solved = torch.linalg.solve(gram, codes.T @ y.double()).float()
        atoms = torch.where(used[:, None], F.normalize(solved, dim=1), atoms)
    return atoms


# -- coefficients that are not chosen for each row ---------------------------------------------------------------------


def weighed(bench: Bench, which: str, rule: str, moe: MoELayer | None = None) -> SparseCodes:
    """Codes by a fixed rule: "score", the router's logit e_j·x (+ bias); "gate", the weight the layer gives the expert.

    Raises `ValueError` for another rule.
    """
    if rule not in RULES:
        raise ValueError(f"rule={rule!r} is unknown; allowed: {', '.join(map(repr, RULES))}")
    layer = moe or bench.moe
    choice = bench.choice(which, layer)
    if rule == "gate":
        return choice
    router = Rows(layer.router, layer.bias).to(bench.device).requires_grad_(False)
    return SparseCodes(choice.indices, router.scores(bench.rows(which, "mlp_in", False)).gather(1, choice.indices))


def scaled(
    atoms: Float[Tensor, "n d"], codes: SparseCodes, y: Float[Tensor, "rows d"], fitted: str
) -> Float[Tensor, "n d"]:
    """Atoms times what makes Σ z_j d_j fit `y` best: nothing ("none"), "one" scalar, or one for "each" atom.

    With c_j: Σ_t ‖y_t − Σ_j c_j z_tj d_j‖² is least where A c = b, A_ij = (ZᵀZ)_ij d_i·d_j and b_j = d_j·(Zᵀy)_j.
    """
    if fitted not in FITTED:
        raise ValueError(f"fitted={fitted!r} is unknown; allowed: {', '.join(map(repr, FITTED))}")
    if fitted == "none":
        return atoms
    dense, d = codes.to_dense(len(atoms)).double(), atoms.double()
    a, b = (dense.T @ dense) * (d @ d.T), (d * (dense.T @ y.double())).sum(1)
    if fitted == "one":
        return atoms * float(b.sum() / a.sum())
    used = a.diagonal() > 0
    a.diagonal().add_((~used).double())
    return atoms * torch.linalg.lstsq(a, b[:, None]).solution.to(atoms)


def by_rule(
    bench: Bench, seeds: Sequence[int], *, rules: Sequence[str] = RULES, fitted: Sequence[str] = FITTED
) -> dict[tuple[str, str, str, str], Explained]:
    """What fixed coefficients explain (centred), by control, site, rule and what was fitted to the fitting rows.

    Controls: implicit, shuffled, random. Explained is ‖y‖² − ‖y − ŷ‖², which may be negative.
    """
    first, found = bench.directions[:, 0], {}
    n, d = first.shape
    variants: list[tuple[str, Tensor, MoELayer]] = [("implicit", first, bench.moe)]
    for seed in seeds:
        noise = settings.generator(seed)
        variants.append(("random", random_directions(n, d, noise).to(first), random_router(bench.moe, noise)))
        variants.append(("shuffled", first[derangement(n, noise).to(first.device)], bench.moe))
    coded = []
    for rule in rules:
        for control, atoms, moe in variants:
            coded.append((control, rule, atoms, *(weighed(bench, which, rule, moe) for which in WHICH)))
    for site in SITES:
        fitting, judging = (bench.rows(which, site) for which in WHICH)
        for control, rule, atoms, codes, unseen in coded:
            for how in fitted:
                left = judging - weighted_sum(unseen.values, unseen.indices, scaled(atoms, codes, fitting, how))
                explained = judging.double().square().sum(1) - left.double().square().sum(1)
                found.setdefault((control, site, rule, how), []).append(explained)
    return {key: bench.judged(each, key[1], True) for key, each in found.items()}


# -- a dictionary that is trained --------------------------------------------------------------------------------------


def train_saes(
    bench: Bench,
    site: str,
    lrs: Sequence[float],
    *,
    steps: int,
    batch_size: int,
    seed: int,
    cache_dir: str | Path | None | Literal[False] = None,
) -> dict[float, RankOneDictionary]:
    """TopK SAEs of the implicit one's shape (n = experts, k = top_k) on the fitting rows, one for each learning rate.

    Rows are divided by one number so that their mean variance is 1, b_dec starts at their mean.
    """
    scale = float(bench.fitting.moments(site).variance) ** 0.5
    moe, rows = bench.moe, bench.rows("fitting", site, False) / scale
    identity = f"{bench.fitting.key}/{site}/{scale!r}"
    stream = training.Shuffled(rows, batch_size=batch_size, seed=seed, fingerprint=identity, device=bench.device)
    students = {}
    for lr in lrs:
        shape = (moe.d_model, moe.n_experts, moe.top_k)
        start = dictionary.topk_sae(*shape, generator=settings.generator(seed), b_dec=(bench.mean(site) / scale).cpu())
        students[str(lr)] = start.to(bench.device)
    options = {"steps": steps, "lr": {str(lr): lr for lr in lrs}, "cache_dir": cache_dir}
    fits = training.fit(students, stream, label=f"SAE of layer {moe.layer}, {site}", **options)
    return {lr: fits[str(lr)].student for lr in lrs}


def best_sae(
    bench: Bench, validation: ActivationStore, site: str, lrs: Sequence[float], **training_options
) -> tuple[float, RankOneDictionary]:
    """The learning rate, and its SAE of `train_saes`, that explains most of the validation rows by its own codes."""
    check = dataclasses.replace(bench, judging=validation)
    saes = train_saes(bench, site, lrs, **training_options)
    best = max(lrs, key=lambda lr: judge_sae(check, saes[lr], site, own_codes=True).fve)
    return best, saes[best]


@torch.no_grad()
def judge_sae(bench: Bench, sae: RankOneDictionary, site: str, *, own_codes: bool = False) -> Explained:
    """What an SAE of `train_saes` explains of the judging rows: by least squares on its choice, or by its own codes.

    Least squares starts from where the SAE does, its own b_dec, so its own codes can do no better. The total is that
    of all other controls, about the mean of the fitting rows.
    """
    scale = float(bench.fitting.moments(site).variance) ** 0.5
    rows, y = bench.rows("judging", site, False) / scale, bench.rows("judging", site)
    if own_codes:
        left = (rows - sae(rows)).double().square().sum(1)
    else:
        rest = rows if sae.b_out is None else rows - sae.b_out
        found = Projection(sae.decoder.weight.detach(), sae.encode(rows).indices).explained(rest)[0]
        left = rest.double().square().sum(1) - found
    return bench.judged([y.double().square().sum(1) - scale**2 * left], site, True)


# -- what experts write ------------------------------------------------------------------------------------------------


@torch.no_grad()
def lens(teacher: Teacher, directions: Float[Tensor, "n d_model"]) -> Float[Tensor, "n vocabulary"]:
    """Logit lens (nostalgebraist 2020): the model's final norm and unembedding applied to a direction by itself.

    What is left out: every layer in between, and the rest of the residual stream, whose length sets the norm's scale.
    Only the order within a row means something. Raises `ValueError` where no final norm is found.
    """
    norms = [module for name, module in teacher.model.base_model.named_children() if "norm" in name]
    if not norms:
        raise ValueError(f"teacher={teacher.name!r} has no final norm; allowed: a model that ends in one")
    long = directions.to(teacher.device, teacher.dtype) * directions.shape[1] ** 0.5
    return teacher.model.get_output_embeddings()(norms[-1](long)).float().cpu()


def oriented(bench: Bench) -> Float[Tensor, "experts d_model"]:
    """First directions with the sign in which each expert's tokens have them on average (fitting rows, centred).

    A principal component has no sign of its own. An expert that was never chosen keeps the one it has.
    """
    chosen, first = bench.choice("fitting").indices, bench.directions[:, 0]
    along = (bench.rows("fitting", "mlp_out") @ first.T).gather(1, chosen)
    total = along.new_zeros(len(first)).scatter_add(0, chosen.flatten(), along.flatten())
    return first * torch.where(total < 0, -1.0, 1.0)[:, None]


class Hits(NamedTuple):
    """How often the next token is among the `top` words of a lens; each an `Estimate` over experts × articles."""

    own: Estimate
    """Where the expert is chosen, by its own direction."""
    base: Estimate
    """By the same directions on all tokens: what common words give."""
    shuffled: Estimate
    """Where the expert is chosen, by the directions of experts that are not, less what those have on all tokens."""
    lift: Estimate
    """own − base − shuffled: what the pairing of expert and direction is worth."""


def next_tokens(store: ActivationStore) -> tuple[Int[np.ndarray, " n"], Int[np.ndarray, " n"]]:
    """Rows that have a next token in the same piece of text, and that token."""
    rows = np.flatnonzero(store.rows["text"][:-1] == store.rows["text"][1:])
    return rows, np.array(store.token_id)[rows + 1]


def lens_hits(bench: Bench, logits: Float[Tensor, "experts vocabulary"], top: int, *, n_resamples: int = 1000) -> Hits:
    """Whether an expert's direction, read by the lens, says what comes next where that expert is chosen.

    For row t let h_ti say whether its next token is among the `top` words of direction i, and b_i be the mean of h_ti
    over all rows. Over all pairs of a row and an expert j chosen there: own is the mean of h_tj, base that of b_j,
    shuffled that of h_ti − b_i over the n − k directions i whose experts are NOT chosen there, lift what own − base
    has beyond shuffled. Judging rows only.
    """
    if not 1 <= top < logits.shape[1]:
        raise ValueError(f"top={top} words; allowed: 1 to {logits.shape[1] - 1}")
    rows, after = next_tokens(bench.judging)
    n, k = len(logits), bench.moe.top_k
    listed = torch.zeros(logits.shape, dtype=torch.bool).scatter_(1, logits.topk(top, dim=1).indices, True)
    hit = listed[:, torch.from_numpy(after).long()].T.double().numpy()  # rows × directions
    chosen = bench.choice().indices.cpu().numpy()[rows]
    chose = np.zeros((len(rows), n))
    np.put_along_axis(chose, chosen, 1.0, axis=1)
    stranger = (hit * (1 - chose)).sum(1) / (n - k)
    _, article = np.unique(np.array(bench.judging.article)[rows], return_inverse=True)
    data = np.zeros((n, article.max() + 1, 4 + 2 * n))  # experts, articles, sums
    for a in range(data.shape[1]):
        here = article == a
        h, c = hit[here], chose[here]
        data[:, a, 0], data[:, a, 1], data[:, a, 2] = (h * c).sum(0), c.sum(0), here.sum()
        data[:, a, 3], data[:, a, 4 : 4 + n] = c.T @ stranger[here], c.T @ (1 - c) / (n - k)
        data[:, a, 4 + n :] = h.sum(0)

    def parts(sample: np.ndarray, experts: np.ndarray) -> np.ndarray:
        sums = sample.sum(1)
        b = sums[0, 4 + n :] / sums[0, 2]  # of every direction, whichever experts were drawn
        total = max(sums[:, 1].sum(), 1.0)
        own, base = sums[:, 0].sum() / total, (sums[:, 1] * b[experts]).sum() / total
        shuffled = (sums[:, 3].sum() - (sums[:, 4 : 4 + n] @ b).sum()) / total
        return np.array([own, base, shuffled, own - base - shuffled])

    value = parts(data, np.arange(n))
    if data.shape[1] < FEWEST_ARTICLES:
        return Hits(*(Estimate(float(v), None, None) for v in value))
    random = np.random.default_rng(0)
    drawn = []
    for _ in range(n_resamples):  # as `crossed_interval`, for four numbers at once
        experts = random.integers(n, size=n)
        drawn.append(parts(data[experts][:, random.integers(data.shape[1], size=data.shape[1])], experts))
    low, high = np.quantile(drawn, [0.025, 0.975], axis=0)
    return Hits(*(Estimate(*map(float, each)) for each in zip(value, low, high, strict=True)))


def contexts(bench: Bench, expert: int, count: int, *, before: int = 6, after: int = 3) -> list[tuple[str, str, str]]:
    """The judging rows on which the layer weighs an expert most: text before, the token, text after."""
    choice = bench.choice()
    weight = torch.where(choice.indices == expert, choice.values, 0.0).amax(1)
    best = weight.topk(min(count, len(weight)))
    found = zip(best.values.tolist(), best.indices.tolist(), strict=True)
    return [bench.judging.context(row, before, after) for value, row in found if value > 0]


def read(teacher: str, layers: Sequence[int], *, cache_dir: str | Path | None = None) -> list[MoELayer]:
    """`checkpoints.read` of a teacher by the name that `teachers.load` knows; bad layers are named before long work."""
    shipped = teacher.startswith("book-")
    return checkpoints.read(sources.folder(teacher, cache_dir=cache_dir) if shipped else teacher, layers)


def points(found: Mapping[Key, Explained], expected: float, **about) -> list[dict]:
    """A ladder as plain numbers: FVE and its ratio to what random directions are expected to explain, `expected` = k/d
    times the rank; centred ones with their intervals."""
    rows = []
    for key, part in found.items():
        share = fve(part, n_resamples=400 if key.centred else 0)
        row = about | key._asdict() | {"fve": list(share), "by_draw": part.by_draw}
        base = expected * key.rank
        rows.append(row | {"ratio": [None if each is None else each / base for each in share]})
    return rows


def draw_ladder(ax: Axes, rows: Sequence[dict], controls: Sequence[str] = tuple(LABELS)) -> None:
    """Dots of FVE, one line a control: filled where centred, hollow where not; intervals, and at the right the ratio
    to k/d of the centred ones. What has an FVE below zero stands at the left edge."""
    order = list(controls)
    for row in rows:
        if row["control"] not in order:
            continue
        look = figures.mark(MARKS.get(row["control"], row["control"]))
        place, (value, low, high) = order.index(row["control"]), row["fve"]
        if low is not None:
            ax.plot([low, high], [place] * 2, color=look.colour, lw=1.4)
        fill = look.colour if row["centred"] else "white"
        ax.plot(max(value, 0.0), place, look.marker, color=look.colour, mfc=fill, ms=6)
        if row["centred"]:
            text = {"xycoords": ("axes fraction", "data"), "fontsize": 7, "va": "center", "ha": "left"}
            ax.annotate(f"×{row['ratio'][0]:.1f}", (1.01, place), **text)
    ax.set(ylim=(len(order) - 0.5, -0.5), xlim=(0, 1))
    ax.set_yticks(range(len(order)), [LABELS[control] for control in order], fontsize=8)


def factors(
    found: Sequence[Mapping[Key, Explained]], site: str, expected: float, *, centred: bool = True, **options
) -> dict[str, Estimate]:
    """The ratio implicit / `expected` as a product of three: what directions, routing and pairing add, in this order.

    directions   random router, trained directions  /  all random, whose expectation is `expected` = k/d
    routing      trained router and directions, shuffled pairing  /  random router, trained directions
    pairing      implicit  /  shuffled pairing

    Geometric means over the ladders in `found`, one for each layer, so that the product is exact. Shuffling leaves some
    pairs together (`overlap`), so the factor of pairing is too low rather than too high.
    """
    of = {c: [f[Key(c, site, centred)] for f in found] for c in ("random_router", "shuffled", "implicit")}
    steps = {"directions": ("random_router", None), "routing": ("shuffled", "random_router")}
    steps |= {"pairing": ("implicit", "shuffled"), "ratio": ("implicit", None)}
    return {
        name: ratio(of[over], expected if under is None else of[under], **options)
        for name, (over, under) in steps.items()
    }


def pairing_growth(
    after: Sequence[Mapping[Key, Explained]], before: Sequence[Mapping[Key, Explained]], site: str, **options
) -> Estimate:
    """The factor of pairing after training over that before it, with its interval over draws × articles.

    `after` and `before` are ladders on the same articles and seeds, one for each layer.
    """
    parts = [f[Key(control, site, True)] for f in (*after, *before) for control in ("implicit", "shuffled")]

    def statistic(shares: np.ndarray) -> float:
        pairing = shares[::2] / shares[1::2]
        return _geometric(pairing[: len(after)]) / _geometric(pairing[len(after) :])

    return estimate(statistic, *parts, **options)
