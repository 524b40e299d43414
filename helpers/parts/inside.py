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

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from helpers import settings
from helpers.dictionary import RankOneDictionary, Rows, SparseCodes, pursuit
from helpers.dictionary.family import atoms_of
from helpers.models import checkpoints, sources
from helpers.models.activations import ActivationStore
from helpers.models.checkpoints import MoELayer, Principal
from helpers.parts.explained import Explained, Key
from helpers.parts.worlds import random_atoms
from helpers.settings import allowed, one_of
from helpers.study.scores import by_group

SITES = ("mlp_in", "mlp_out")
WHICH = ("fitting", "judging")
CHUNK_BYTES = 64 * 2**20
"""Largest batch of Gram matrices of chosen atoms that a projection builds."""
CONTROLS = ("implicit", "second", "w_up", "w_gate", "all_directions", "pca", "fitted_directions", "omp")
CONTROLS += ("random", "random_directions", "covariance", "in_w_down")  # these, and the next, are drawn
CONTROLS += ("random_router", "other_token", "shuffled")


# -- before long work --------------------------------------------------------------------------------------------------


def check(
    experts: Sequence[MoELayer],
    *,
    seeds: Sequence[int],
    ranks: Sequence[int] = (1,),
    lrs: Sequence[float] | None = None,
    controls: Sequence[str] = CONTROLS,
    needed: Sequence[str] = (),
) -> None:
    """`ValueError` before anything is harvested: for no layers, ranks without 1 or too large for a layer, no seeds, no
    learning rates, controls that are unknown or lack a `needed` one, and layers that choose by more than their scores.
    """
    allowed(bool(experts), "layers=[]", "at least one layer that has experts")
    for moe in experts:
        _by_scores_alone(moe)
    most = min(moe.d_model // moe.top_k for moe in experts)
    good = 1 in ranks and 1 <= min(ranks) <= max(ranks) <= most
    allowed(good, f"ranks={list(ranks)}", f"whole numbers, 1 to {most} = d_model // top_k, 1 among them")
    once = bool(seeds) and len(set(seeds)) == len(seeds)
    allowed(once, f"seeds={list(seeds)}", "at least one, each once; five or more for good intervals")
    allowed(lrs is None or (bool(lrs) and min(lrs) > 0), f"lrs={lrs}", "at least one learning rate, all above 0")
    for control in controls:
        one_of("controls", control, CONTROLS)
    missing = [control for control in needed if control not in controls]
    allowed(not missing, f"controls={list(controls)} lacks {missing}", f"any that hold {', '.join(needed)}")


def _by_scores_alone(moe: MoELayer) -> None:
    plain = moe.correction is None and moe.n_group <= 1
    allowed(plain, f"layer {moe.layer} chooses with a correction or in groups", "by its scores alone")


def read(teacher: str, layers: Sequence[int], *, cache_dir: str | Path | None = None) -> list[MoELayer]:
    """`checkpoints.read` of a teacher by the name that `teachers.load` knows; bad layers are named before long work."""
    shipped = teacher.startswith("book-")
    return checkpoints.read(sources.folder(teacher, cache_dir=cache_dir) if shipped else teacher, layers)


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
    fits = (n, d) == (moe.n_experts, moe.d_model)
    allowed(fits, f"directions are {n} × {d}", f"{moe.n_experts} × {moe.d_model}, experts × d_model")

    def rows(times: int) -> Rows:
        bias = None if moe.bias is None else moe.bias.repeat_interleave(times)
        return Rows(moe.router.repeat_interleave(times, 0), bias)

    router = rows(1)
    encoder = router if rank == 1 else rows(rank)
    options = {"k": moe.top_k, "activation": activation, "b_out": b_out, "expert_rank": rank}
    return RankOneDictionary(encoder, Rows(directions.flatten(0, 1).clone()), router=router, **options)


def random_router(moe: MoELayer, generator: torch.Generator) -> MoELayer:
    """The layer with Gaussian router rows as long, on average, as its own, and no biases."""
    rows = torch.randn(moe.router.shape, generator=generator)
    rows *= moe.router.norm(dim=1).square().mean().sqrt() / moe.d_model**0.5
    return replace(moe, router=rows, bias=None, correction=None, n_group=1, topk_group=1)


# -- projections -------------------------------------------------------------------------------------------------------


def projected(
    atoms: Float[Tensor, "n d"], support: Int[Tensor, "rows m"], *targets: Float[Tensor, "rows d"]
) -> list[Float[Tensor, " rows"]]:
    """‖P_S y‖² of each row y of each target, in float64: P_S projects on the m atoms that `support` has for the row.

    Atoms of a row may depend on each other. As bᵀ G⁺ b, G the Gram matrix of the row's atoms and b their products with
    y, which is the length of what `pursuit.least_squares` rebuilds; through the Gram matrix of all atoms no row needs
    its atoms gathered, and all targets share its factors.
    """
    (_, m), (_, d) = support.shape, atoms.shape
    allowed(m <= d, f"{m} atoms a row in {d} dimensions", "fewer")
    size, gram, parts = max(1, CHUNK_BYTES // (8 * m**2)), (atoms @ atoms.T).double(), []
    products = [(y @ atoms.T).split(size) for y in targets]
    for at, *near in zip(support.split(size), *products, strict=True):
        along = torch.stack([each.gather(1, at).double() for each in near], dim=2)
        parts.append(_energy(gram[at[:, :, None], at[:, None]], along))
    return list(torch.cat(parts).T)


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
class LayerRows:
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
        d, k = self.moe.d_model, self.moe.top_k
        allowed(self.fitting.d == d, f"rows have {self.fitting.d} numbers", f"{d}, as the router's rows")
        allowed(1 <= self.rank <= d // k, f"rank={self.rank} with top_k={k}", f"1 to {d // k} = d_model // top_k")
        shared = set(self.fitting.article.tolist()) & set(self.judging.article.tolist())
        allowed(not shared, f"articles {sorted(shared)[:5]} both fit and judge", "splits that share none")

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
        one_of("which", which, WHICH)
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
        total, article = self.rows("judging", site, centred).double().square().sum(1), self.judging.article
        return Explained(np.stack([by_group(each, article) for each in explained]), by_group(total, article))

    @cached_property
    def load(self) -> Float[Tensor, " experts"]:
        """Share of the judging rows' choices that goes to each expert."""
        counts = torch.bincount(self.choice().indices.flatten(), minlength=self.moe.n_experts)
        return (counts / counts.sum()).cpu()


def effective_experts(load: Float[Tensor, " experts"]) -> float:
    """exp(entropy) of the load: n where it is even, 1 where one expert gets all."""
    return float(torch.special.entr(load.double()).sum().exp())


def participation(bench: LayerRows, site: str) -> float:
    """Participation ratio (tr C)² / tr C² of the fitting rows' covariance: d where all directions have as much
    variance, 1 where one has all. The number of rows bounds it too."""
    cov = bench.fitting.moments(site).cov
    return float(cov.diagonal().sum() ** 2 / cov.square().sum())


# -- the ladder --------------------------------------------------------------------------------------------------------


def ladder(
    bench: LayerRows,
    seeds: Sequence[int],
    *,
    controls: Sequence[str] = CONTROLS,
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
    covariance          random router, directions drawn from the Gaussian with the fitting rows' covariance (centred) or
                        second moments (uncentred): they know where the data lie, and nothing of experts
    in_w_down           the layer's router, of each expert W_down g with Gaussian g: what it writes for random neurons
    random              both random: the paper's control
    second              the second component of W_down, and w_up, w_gate: the first of those matrices
    all_directions      no choice: the span of all first directions
    pca                 the k·r leading principal components of the fitting rows, the same for every row
    fitted_directions   the layer's router, directions fitted to the fitting rows (centred only)
    omp                 first directions, chosen one by one for each row by matching pursuit, which sees the row
                        (greedy, so not the best choice there is; centred only)

    Those with chance in them are drawn once for each seed.
    """
    check([bench.moe], seeds=seeds, ranks=ranks, controls=controls)
    allowed(max(ranks) <= bench.rank, f"ranks={list(ranks)}", f"1 to {bench.rank}, the bench's rank")
    sites = [(site, centred) for site in SITES for centred in centrings]
    targets = [bench.rows("judging", *site) for site in sites]
    found: dict[Key, list[Tensor]] = {}
    for control, rank, atoms, support in _chosen(bench, seeds, controls, ranks):
        for site, each in zip(sites, projected(atoms, support, *targets), strict=True):
            found.setdefault(Key(control, *site, rank), []).append(each)
    for (site, centred), y in zip(sites, targets, strict=True):
        for control, rank, explained in _of_site(bench, site, centred, y, seeds, controls, ranks):
            found.setdefault(Key(control, site, centred, rank), []).append(explained)
    return {key: bench.judged(each, key.site, key.centred) for key, each in found.items()}


def _chosen(bench: LayerRows, seeds, controls, ranks) -> Iterator[tuple[str, int, Tensor, Tensor]]:
    """Controls that choose without seeing the target: name, rank, atoms, and the atoms of each judging row."""
    moe, own = bench.moe, bench.choice().indices
    first = bench.directions[:, 0]
    for rank in ranks if "implicit" in controls else ():
        yield "implicit", rank, bench.directions[:, :rank].flatten(0, 1), atoms_of(own, rank)
    if "second" in controls:
        second = bench.directions if bench.rank > 1 else checkpoints.principal(moe, 2, device=bench.device).directions
        yield "second", 1, second[:, 1].to(own.device), own
    for which in ("w_up", "w_gate"):
        if which in controls:
            other = checkpoints.principal(moe, 1, which, device=bench.device).directions[:, 0]
            yield which, 1, other.to(own.device), own
    for seed in settings.progress(seeds, "random draws", delay=2):
        drawn, router, moved, rows, _ = _draw(bench, seed)
        elsewhere = bench.choice(moe=router).indices
        for rank in ranks if "shuffled" in controls else ():
            if rank == 1 or seed in seeds[:2]:
                yield "shuffled", rank, bench.directions[moved, :rank].flatten(0, 1), atoms_of(own, rank)
        simple = {
            "random": (drawn, elsewhere),
            "random_directions": (drawn, own),
            "random_router": (first, elsewhere),
            "other_token": (first, own[rows]),
        }
        for control, (atoms, support) in simple.items():
            if control in controls:
                yield control, 1, atoms, support
    if "in_w_down" in controls:
        for atoms in _written(bench, seeds):
            yield "in_w_down", 1, atoms, own


def _written(bench: LayerRows, seeds: Sequence[int]) -> Float[Tensor, "seeds experts d_model"]:
    """What each expert writes for Gaussian neurons, of length one. The experts are read once, for all seeds."""
    moe, noises = bench.moe, [_draw(bench, seed)[-1] for seed in seeds]
    neurons = [torch.randn(moe.n_experts, moe.d_ff, generator=noise) for noise in noises]
    stacked, written, at = torch.stack(neurons), [], 0
    for w_down in moe.weights("w_down"):
        written.append(torch.einsum("edf,sef->sed", w_down, stacked[:, at : at + len(w_down)]))
        at += len(w_down)
    return F.normalize(torch.cat(written, 1), dim=2).to(bench.directions)


def _draw(bench: LayerRows, seed: int) -> tuple[Tensor, MoELayer, Tensor, Tensor, torch.Generator]:
    """All that chance decides for a seed, the same few numbers for every layer, in this order: directions [experts, d],
    a router, which expert's directions each router row is handed, which row's choice each row is given; and the
    generator, for what is drawn after these.
    """
    noise, like = settings.generator(seed), bench.directions
    directions = random_atoms(bench.moe.n_experts, bench.moe.d_model, noise).to(like)
    router = random_router(bench.moe, noise)
    moved = derangement(bench.moe.n_experts, noise).to(like.device)
    rows = torch.randperm(bench.judging.n, generator=noise).to(like.device)
    return directions, router, moved, rows, noise


def overlap(bench: LayerRows, seeds: Sequence[int]) -> list[float]:
    """What *shuffled* does not take away: of the directions that a judged row is handed there, the share that belongs
    to another of the experts chosen for that row; one number for each seed.

    With even and independent choices it would be (k − 1)/(n − 1).
    """
    chosen = bench.choice().indices
    handed = (_draw(bench, seed)[2][chosen] for seed in seeds)
    return [float((each[:, :, None] == chosen[:, None]).any(2).double().mean()) for each in handed]


def _of_site(bench: LayerRows, site, centred, y, seeds, controls, ranks) -> Iterator[tuple[str, int, Tensor]]:
    """Controls that are fitted to the site, or see the very row: name, rank, what each judging row has explained."""
    k, first = bench.moe.top_k, bench.directions[:, 0]
    if "all_directions" in controls:
        yield "all_directions", 1, in_span(y, first)
    moments = bench.fitting.moments(site)
    matrix = moments.cov if centred else moments.cov + torch.outer(moments.mean, moments.mean)
    variances, components = (each.to(bench.device, torch.float32) for each in torch.linalg.eigh(matrix))
    for rank in ranks if "pca" in controls else ():
        yield "pca", rank, (y @ components.flip(1)[:, : k * rank]).double().square().sum(1)
    draws = seeds if "covariance" in controls else ()
    for seed in settings.progress(draws, "draws with the covariance", delay=2):
        _, router, _, _, noise = _draw(bench, seed)
        drawn = torch.randn(bench.moe.n_experts, bench.moe.d_model, generator=noise).to(components)
        root = (components * variances.clamp(min=0).sqrt()) @ components.T  # symmetric: free of the vectors' signs
        atoms = F.normalize(drawn @ root, dim=1)
        yield "covariance", 1, projected(atoms, bench.choice(moe=router).indices, y)[0]
    if "fitted_directions" in controls and centred:
        fitted = fit_directions(bench.rows("fitting", site), first, bench.choice("fitting").indices)
        yield "fitted_directions", 1, projected(fitted, bench.choice().indices, y)[0]
    if "omp" in controls and centred:
        yield "omp", 1, projected(first, pursuit.omp(y, first, k).indices, y)[0]


def derangement(n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
    """A random permutation that leaves nothing in its place (uniform among them: drawn until one comes)."""
    allowed(n >= 2, f"n={n} has no derangement", "at least 2")
    while True:
        order = torch.randperm(n, generator=generator)
        if (order != torch.arange(n)).all():
            return order


def fit_directions(
    y: Float[Tensor, "rows d"], start: Float[Tensor, "n d"], support: Int[Tensor, "rows k"], *, rounds: int = 10
) -> Float[Tensor, "n d"]:
    """Directions for a GIVEN choice: coefficients by least squares, then directions by least squares, in turn.

    The method of optimal directions (Engan et al. 1999) without its pursuit step. The error on `y` never grows, so
    the result is at least as good there as `start`; it is a local optimum. A direction that is never used stays.
    """
    atoms, n = start, len(start)
    for _ in settings.progress(range(rounds), "fitting directions", delay=2):
        values = pursuit.least_squares(y, atoms, support)
        codes = SparseCodes(support, values).to_dense(n).double()
        gram = codes.T @ codes
        used = gram.diagonal() > 0
        gram.diagonal().add_(1e-9 * gram.diagonal().mean() + (~used).double())
        solved = torch.linalg.solve(gram, codes.T @ y.double()).float()
        atoms = torch.where(used[:, None], F.normalize(solved, dim=1), atoms)
    return atoms
