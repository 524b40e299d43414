"""Data whose structure is known: sparse sums of a dictionary's atoms, worlds of features that fire at rates of their
own, and the Gaussian with the same covariance."""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from importlib.util import find_spec

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from helpers import settings
from helpers.dictionary import SparseCodes, weighted_sum
from helpers.models.activations import Moments
from helpers.settings import allowed, one_of


def random_atoms(
    n: int, d: int, generator: torch.Generator, dtype: torch.dtype = torch.float32
) -> Float[Tensor, "n d"]:
    """n directions drawn evenly from the unit sphere in d dimensions."""
    return F.normalize(torch.randn(n, d, generator=generator, device=generator.device, dtype=dtype), dim=1)


COEFFICIENTS = {
    "signs": lambda size, **how: torch.randint(0, 2, size, **how).mul_(2).sub_(1),
    "gaussian": torch.randn,
}
"""Laws of a coefficient, each with mean 0 and variance 1."""


MOST_SUPPORTS = 20_000
"""Supports that a density is summed over."""


class CodedRows:
    """What is drawn as codes first and as rows then, with `noise` (its standard deviation per dimension) on top."""

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """n samples without their codes: what `training.Fresh` draws."""
        return self.rows(self.codes(n, generator), generator)

    def with_noise(self, x: Float[Tensor, "n d"], generator: torch.Generator) -> Float[Tensor, "n d"]:
        if not self.noise:
            return x
        return x + self.noise * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)


@dataclass(frozen=True)
class SparseSource(CodedRows):
    """x = (E/k)^½ · Σ_{j ∈ S} c_j a_j + noise: S a uniform k-subset of the atoms, c_j independent with variance 1.

    Args:
        atoms: [n, d], the a_j.
        k: atoms in each sample.
        coefficients: a name in `COEFFICIENTS`.
        energy: E; with unit atoms it is the mean squared length of the sparse part.
        noise: standard deviation per dimension of Gaussian noise.
    """

    atoms: Float[Tensor, "n d"]
    k: int
    coefficients: str = "gaussian"
    energy: float = 1.0
    noise: float = 0.0

    def __post_init__(self):
        n = len(self.atoms)
        allowed(1 <= self.k <= n, f"k={self.k} cannot be drawn", f"1 to {n}, the number of atoms")
        one_of("coefficients", self.coefficients, COEFFICIENTS)
        good = self.energy > 0 and self.noise >= 0
        allowed(good, f"energy={self.energy}, noise={self.noise}", "energy above 0, noise at least 0")

    def codes(self, n: int, generator: torch.Generator) -> SparseCodes:
        """Supports and coefficients of n samples, on the generator's device."""
        how = {"generator": generator, "device": generator.device}
        indices = torch.rand(n, len(self.atoms), **how).topk(self.k, dim=1).indices
        values = COEFFICIENTS[self.coefficients]((n, self.k), **how).to(self.atoms.dtype)
        return SparseCodes(indices, values * (self.energy / self.k) ** 0.5)

    def rows(self, codes: SparseCodes, generator: torch.Generator) -> Float[Tensor, "batch d"]:
        """The samples with these codes, noise added."""
        return self.with_noise(weighted_sum(codes.values, codes.indices, self.atoms.to(codes.values.device)), generator)

    @property
    def moments(self) -> Moments:
        """Mean 0 and covariance E/n · Σ_j a_j a_jᵀ + noise² I, exact: `moments.sample` draws the matched Gaussian."""
        atoms = self.atoms.detach().cpu().double()
        n, d = atoms.shape
        cov = self.energy / n * atoms.T @ atoms + self.noise**2 * torch.eye(d, dtype=torch.float64)
        return Moments(n, torch.zeros(d, dtype=torch.float64), cov)

    def whitened(self, noise: float = 0.0) -> SparseSource:
        """The same codes over atoms a_j C^{−½}, C the covariance without noise, made so that with `noise` it is I.

        The matched Gaussian is then N(0, I). Raises `ValueError` when the atoms do not span the space, and for noise
        that leaves no room for them.
        """
        allowed(0 <= noise < 1, f"noise={noise}", "0 or more, and below 1")
        values, vectors = torch.linalg.eigh(replace(self, noise=0.0).moments.cov)
        good = values[0] > 1e-10 * values[-1]
        allowed(good, f"{len(self.atoms)} atoms leave directions empty", f"atoms that span all {len(values)}")
        root = (vectors * values.rsqrt()) @ vectors.T * (1 - noise**2) ** 0.5
        return replace(self, atoms=(self.atoms.double() @ root.to(self.atoms.device)).to(self.atoms.dtype), noise=noise)

    def log_density(self, x: Float[Tensor, "rows d"]) -> Float[Tensor, " rows"]:
        """ln p(x) in float64, exact: a mixture of Gaussians, one for each of the (n choose k) supports S, of covariance
        σ²I + (E/k) A_Sᵀ A_S. Raises `ValueError` without noise, for other coefficients, and for too many supports."""
        (n, d), k = self.atoms.shape, self.k
        good = self.noise > 0 and self.coefficients == "gaussian" and math.comb(n, k) <= MOST_SUPPORTS
        given = f"noise={self.noise}, coefficients={self.coefficients!r}, {math.comb(n, k):,} supports"
        allowed(good, given, f"noise above 0, 'gaussian', up to {MOST_SUPPORTS:,} supports")
        supports = torch.combinations(torch.arange(n), k)
        atoms, x = self.atoms.double(), x.double()
        of_noise = self.energy / k / self.noise**2
        gram = torch.eye(k) + of_noise * (atoms @ atoms.T)[supports[:, :, None], supports[:, None, :]]
        roots = torch.linalg.cholesky(gram)  # Woodbury and the determinant lemma: k × k in the place of d × d
        inverse, logs = torch.linalg.inv(roots), []
        for part in x.split(256):
            along = (atoms @ part.T)[supports] / self.noise**2  # supports × k × rows
            gain = self.energy / k * (inverse @ along).square().sum(1)
            squares = part.square().sum(1) / self.noise**2
            logs.append(torch.logsumexp((gain - squares) / 2 - roots.diagonal(dim1=1, dim2=2).log().sum(1)[:, None], 0))
        constant = d * math.log(2 * math.pi * self.noise**2) / 2 + math.log(len(supports))
        return torch.cat(logs) - constant


# -- a world of features -----------------------------------------------------------------------------------------------

MAGNITUDES = {
    "constant": lambda like, generator: torch.ones_like(like),
    "exponential": lambda like, generator: torch.empty_like(like).exponential_(generator=generator),
    "halfnormal": lambda like, generator: (
        torch.empty_like(like).normal_(generator=generator).abs_() * math.sqrt(math.pi / 2)
    ),
    "lognormal": lambda like, generator: torch.empty_like(like).normal_(-0.125, 0.5, generator=generator).exp_(),
}
"""Laws of an active feature's magnitude, each positive with mean 1."""


def zipf_rates(n: int, active: float, exponent: float, cap: float = 0.5) -> Float[Tensor, " n"]:
    """Firing rates r_i = min(cap, c·i^−exponent), c such that `active` features fire on average; float64.

    Raises `ValueError` where `active` is more than n features of rate `cap` can give.
    """
    most = f"above 0, at most {cap * n:g} = {cap:g}·n_true"
    allowed(0 < active <= cap * n, f"active={active} cannot be reached", most)
    return clamped_to(active, torch.arange(1, n + 1, dtype=torch.float64) ** -exponent, 0.0, cap)


def clamped_to(total: float, law: Float[Tensor, " n"], least: float, most: float) -> Float[Tensor, " n"]:
    """c·law, each number from `least` to `most`, with the c that makes their sum `total` (which rises with c)."""
    low, high = 0.0, total / float(law.min()) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * law).clamp(least, most).sum()) < total else (low, middle)
    return (high * law).clamp(least, most)


@dataclass(frozen=True)
class World(CodedRows):
    """x = constant + Σ_j b_j m_j a_j + noise: more true features a_j than dimensions, each firing (b_j) at a rate r_j.

    Features of one group fire together: b_j = [z_j < Φ⁻¹(r_j)] with standard normal z_j that have correlation
    `correlation` within a group. A feature with a parent fires only where the parent does. Both leave every marginal
    rate exactly at r_j (`rates` [n_true], which fall). Magnitudes m_j are independent.

    Args:
        n_true, d: how many features there are, and in how many dimensions.
        active: how many features fire on average.
        zipf: exponent of the firing rates (`zipf_rates`); 0 makes all alike.
        group_size, correlation: groups are drawn at random and fire together with this latent correlation in [0, 1).
        hierarchy: share of the features, drawn at random, that get a parent of higher rate among the others, where
            there is one outside their own group.
        magnitudes: a name in `MAGNITUDES`.
        noise: standard deviation per dimension.
        mean: length of the constant that is added to every sample, where a feature's mean contribution has length 1.
        seed: of the features' unit directions `atoms` [n_true, d], of `groups` [n_true], of `parents` [n_true] (−1
            where there is none; a parent has none itself) and of `constant` [d].
    """

    n_true: int
    d: int
    active: float = 6.0
    zipf: float = 0.7
    group_size: int = 8
    correlation: float = 0.0
    hierarchy: float = 0.0
    magnitudes: str = "exponential"
    noise: float = 0.0
    mean: float = 0.0
    seed: int = 0
    rates: Float[Tensor, " n_true"] = field(init=False, repr=False, compare=False)
    groups: Int[Tensor, " n_true"] = field(init=False, repr=False, compare=False)
    parents: Int[Tensor, " n_true"] = field(init=False, repr=False, compare=False)
    atoms: Float[Tensor, "n_true d"] = field(init=False, repr=False, compare=False)
    constant: Float[Tensor, " d"] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        for name in ("n_true", "d", "group_size"):
            allowed(getattr(self, name) >= 1, f"{name}={getattr(self, name)}", "at least 1")
        for name in ("correlation", "hierarchy"):
            allowed(0 <= getattr(self, name) < 1, f"{name}={getattr(self, name)}", "from 0 to below 1")
        for name in ("noise", "mean", "zipf"):
            allowed(getattr(self, name) >= 0, f"{name}={getattr(self, name)}", "at least 0")
        one_of("magnitudes", self.magnitudes, MAGNITUDES)
        vars(self)["rates"] = zipf_rates(self.n_true, self.active, self.zipf)
        vars(self).update(self._drawn(settings.generator(self.seed)))

    def _drawn(self, random: torch.Generator) -> dict[str, Tensor]:
        groups, parents = torch.empty(self.n_true, dtype=torch.long), torch.full((self.n_true,), -1)
        groups[torch.randperm(self.n_true, generator=random)] = torch.arange(self.n_true) // self.group_size
        shuffled, n_children = torch.randperm(self.n_true, generator=random), round(self.hierarchy * self.n_true)
        roots = shuffled[n_children:].sort().values
        for child in shuffled[:n_children].sort().values:
            above = roots[(self.rates[roots] > self.rates[child]) & (groups[roots] != groups[child])]
            if len(above):
                parents[child] = above[torch.randint(len(above), (1,), generator=random)]
        atoms = random_atoms(self.n_true, self.d, random)
        constant = self.mean * random_atoms(1, self.d, random)[0]
        return {"groups": groups, "parents": parents, "atoms": atoms, "constant": constant}

    def codes(self, n: int, generator: torch.Generator) -> Float[Tensor, "n n_true"]:
        """b_j m_j of n samples, as a matrix: a world is small."""
        how = {"generator": generator, "device": generator.device}
        z = torch.randn(n, self.n_true, **how)
        if self.correlation:
            common = torch.randn(n, int(self.groups.max()) + 1, **how)[:, self.groups.to(generator.device)]
            z = math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * z
        child, above = self.parents >= 0, self.parents.clamp(min=0)
        given = torch.where(child, self.rates[above], 1.0)  # the rate among the samples where a feature may fire
        fires = z < torch.special.ndtri((self.rates / given).clamp(1e-12, 1 - 1e-12)).to(z)
        fires &= fires[:, above.to(z.device)] | ~child.to(z.device)
        return fires * MAGNITUDES[self.magnitudes](z, generator)

    def rows(self, codes: Float[Tensor, "n n_true"], generator: torch.Generator) -> Float[Tensor, "n d"]:
        """The samples with these codes, constant and noise added."""
        return self.with_noise(self.constant.to(codes.device) + codes @ self.atoms.to(codes.device), generator)


# -- an external benchmark ---------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class SynthSaeBench:
    """SynthSAEBench-16k v2 (Chanin & Garriga-Alonso 2026, arXiv 2602.14687), built anew by `sae_lens.synthetic`.

    16,384 features in 768 dimensions fire at Zipf-like rates, 34 at a time, with a correlation of rank 25. Two thirds
    of them stand in trees: of a node's children at most one fires, with its parent, scaled by it. `seed` 0 asks for the
    published model's numbers (drawn on the CPU), others for another dictionary, trees and correlation. With fewer
    features (`n_true` a multiple of 128, in `d` dimensions) it is a small likeness. `library`: the version that draws
    it, so that no result of another one is taken for its own. Raises `ValueError` for other sizes, and without SAELens.
    """

    n_true: int = 16_384
    d: int = 768
    seed: int = 0
    library: str = field(init=False)

    def __post_init__(self):
        good = self.n_true >= 128 and self.n_true % 128 == 0
        allowed(good, f"n_true={self.n_true}", "a multiple of 128, the size of a tree with its share of loose features")
        allowed(self.d >= 1, f"d={self.d}", "at least 1")
        there = find_spec("sae_lens") is not None
        allowed(there, "SynthSAEBench without sae-lens", "`pip install -r requirements-dev.txt` first")
        vars(self)["library"] = version("sae-lens")

    @property
    def atoms(self) -> Float[Tensor, "n_true d"]:
        """The true features' unit directions."""
        return _synth_sae_bench(self).feature_dict.feature_vectors.detach()

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """n samples, on the generator's device. The library draws from the global generator; it stays as it was."""
        model, parts = _synth_sae_bench(self), []
        with torch.random.fork_rng(devices=[]), torch.no_grad():
            torch.manual_seed(int(torch.randint(2**62, (1,), generator=generator, device=generator.device)))
            for start in range(0, n, 1024):  # the features of a sample are a dense row there
                parts.append(model.sample(min(1024, n - start)))
        return torch.cat(parts).to(generator.device)


@lru_cache(maxsize=2)
def _synth_sae_bench(world: SynthSaeBench):
    """The library's model of a world. Its orthogonalisation is ours: the same loss, without n × n cosines."""
    from sae_lens import synthetic

    tree = {"branching_factor": 4, "max_depth": 3, "mutually_exclusive_portion": 1.0, "mutually_exclusive_min_depth": 0}
    tree |= {"compensate_probabilities": True, "scale_children_by_parent": True}
    asked = synthetic.SyntheticModelConfig(
        num_features=world.n_true,
        hidden_dim=world.d,
        firing_probability=synthetic.ZipfianFiringProbabilityConfig(exponent=0.5, max_prob=0.4, min_prob=5e-4),
        hierarchy=synthetic.HierarchyConfig(total_root_nodes=world.n_true // 128, **tree),
        correlation=synthetic.LowRankCorrelationConfig(rank=25, correlation_scale=0.1),
        mean_firing_magnitudes=synthetic.LinearMagnitudeConfig(start=5.0, end=4.0),
        std_firing_magnitudes=synthetic.FoldedNormalMagnitudeConfig(mean=0.5, std=0.5),
        bias=0.5,
        seed=42 + world.seed,
    )
    own = synthetic.FeatureDictionary(world.n_true, world.d, bias=asked.bias, seed=asked.seed, initializer=None)
    own.feature_vectors.data = orthogonalised(own.feature_vectors.data)
    with torch.random.fork_rng(devices=[]):
        return synthetic.SyntheticModel(asked, feature_dict=own)


def orthogonalised(atoms: Float[Tensor, "n d"], steps: int = 100, lr: float = 3e-4) -> Float[Tensor, "n d"]:
    """Unit atoms after Adam's steps on Σ_{i≠j} (a_i·a_j)² + n Σ_i (‖a_i‖² − 1)².

    The first sum is ‖AᵀA‖² − Σ_i ‖a_i‖⁴, so that a step takes 6·n·d² operations in place of 6·n²·d.
    """
    atoms = F.normalize(atoms, dim=1).requires_grad_()
    adam = torch.optim.Adam([atoms], lr=lr)
    for _ in range(steps):
        squares = atoms.square().sum(1)
        loss = (atoms.T @ atoms).square().sum() - squares.square().sum() + len(atoms) * (squares - 1).square().sum()
        adam.zero_grad()
        loss.backward()
        adam.step()
    return F.normalize(atoms.detach(), dim=1)
