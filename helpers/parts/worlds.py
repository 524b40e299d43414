"""Data whose structure is known: sparse sums of a dictionary's atoms, worlds of features that fire at rates of their
own, and the Gaussian with the same covariance."""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from helpers.dictionary import SparseCodes, weighted_sum
from helpers.models.activations import Moments


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


@dataclass(frozen=True)
class SparseSource:
    """x = (E/k)^½ · Σ_{j ∈ S} c_j a_j + noise: S a uniform k-subset of the atoms, c_j independent with variance 1.

    Args:
        atoms: [n, d], the a_j.
        k: atoms in each sample.
        coefficients: a name in `COEFFICIENTS`.
        energy: E; with unit atoms it is the mean squared length of the sparse part.
        noise: standard deviation per dimension of Gaussian noise.

    Raises `ValueError` for k, coefficients, energy or noise outside what is allowed.
    """

    atoms: Float[Tensor, "n d"]
    k: int
    coefficients: str = "gaussian"
    energy: float = 1.0
    noise: float = 0.0

    def __post_init__(self):
        if not 1 <= self.k <= len(self.atoms):
            raise ValueError(f"k={self.k} cannot be drawn; allowed: 1 to {len(self.atoms)}, the number of atoms")
        if self.coefficients not in COEFFICIENTS:
            raise ValueError(f"coefficients={self.coefficients!r} is unknown; allowed: {', '.join(COEFFICIENTS)}")
        if not (self.energy > 0 and self.noise >= 0):
            raise ValueError(f"energy={self.energy}, noise={self.noise}; allowed: energy above 0, noise at least 0")

    def codes(self, n: int, generator: torch.Generator) -> SparseCodes:
        """Supports and coefficients of n samples, on the generator's device."""
        how = {"generator": generator, "device": generator.device}
        indices = torch.rand(n, len(self.atoms), **how).topk(self.k, dim=1).indices
        values = COEFFICIENTS[self.coefficients]((n, self.k), **how).to(self.atoms.dtype)
        return SparseCodes(indices, values * (self.energy / self.k) ** 0.5)

    def rows(self, codes: SparseCodes, generator: torch.Generator) -> Float[Tensor, "batch d"]:
        """The samples with these codes, noise added."""
        x = weighted_sum(codes.values, codes.indices, self.atoms.to(codes.values.device))
        if not self.noise:
            return x
        noise = torch.randn(x.shape, generator=generator, device=generator.device, dtype=x.dtype)
        return x + self.noise * noise

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """n samples without their codes: what `training.Fresh` draws."""
        return self.rows(self.codes(n, generator), generator)

    @property
    def moments(self) -> Moments:
        """Mean 0 and covariance E/n · Σ_j a_j a_jᵀ + noise² I, exact: `moments.sample` draws the matched Gaussian."""
        atoms = self.atoms.detach().cpu().double()
        n, d = atoms.shape
        return Moments(
            n, torch.zeros(d, dtype=torch.float64), self.energy / n * atoms.T @ atoms + self.noise**2 * torch.eye(d)
        )

    def whitened(self) -> SparseSource:
        """The same codes over atoms a_j C^{−½}, C the covariance without noise: without noise, the new one is I.

        The matched Gaussian is then N(0, I). Raises `ValueError` when the atoms do not span the space.
        """
        values, vectors = torch.linalg.eigh(replace(self, noise=0.0).moments.cov)
        if values[0] <= 1e-10 * values[-1]:
            raise ValueError(
                f"{len(self.atoms)} atoms leave directions empty; allowed: atoms that span all {len(values)}"
            )
        root = (vectors * values.rsqrt()) @ vectors.T
        return replace(self, atoms=(self.atoms.double() @ root.to(self.atoms.device)).to(self.atoms.dtype), noise=0.0)


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
    if not 0 < active <= cap * n:
        raise ValueError(f"active={active} cannot be reached; allowed: above 0, at most {cap * n:g} = {cap:g}·n_true")
    law = torch.arange(1, n + 1, dtype=torch.float64) ** -exponent
    low, high = 0.0, active / float(law.min()) + 1.0
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if float((middle * law).clamp(max=cap).sum()) < active else (low, middle)
    return (high * law).clamp(max=cap)


@dataclass(frozen=True)
class World:
    """x = mean + Σ_j b_j m_j a_j + noise: more true features a_j than dimensions, each firing (b_j) at its own rate.

    Features of one group fire together: b_j = [z_j < Φ⁻¹(r_j)] with standard normal z_j that have correlation
    `correlation` within a group. A feature with a parent fires only where the parent does. Both leave every marginal
    rate exactly at `rates`. Made by `world`; magnitudes m_j are independent.

    Args:
        atoms: [n_true, d] unit features.
        rates: [n_true] marginal firing rates, float64.
        groups: [n_true] number of each feature's group.
        parents: [n_true], −1 for a feature without a parent; a parent has none itself, is of another group and fires
            more often.
        mean: [d], added to every sample.
    """

    atoms: Float[Tensor, "n_true d"]
    rates: Float[Tensor, " n_true"]
    groups: Int[Tensor, " n_true"]
    parents: Int[Tensor, " n_true"]
    mean: Float[Tensor, " d"]
    correlation: float = 0.0
    magnitudes: str = "exponential"
    noise: float = 0.0

    @cached_property
    def _thresholds(self) -> Float[Tensor, " n_true"]:
        given = torch.where(self.parents >= 0, self.rates[self.parents.clamp(min=0)], torch.ones_like(self.rates))
        return torch.special.ndtri((self.rates / given).clamp(1e-12, 1 - 1e-12)).to(self.atoms.dtype)

    def codes(self, n: int, generator: torch.Generator) -> Float[Tensor, "n n_true"]:
        """b_j m_j of n samples, as a matrix: a world is small."""
        how = {"generator": generator, "device": generator.device, "dtype": self.atoms.dtype}
        z = torch.randn(n, len(self.atoms), **how)
        if self.correlation:
            common = torch.randn(n, int(self.groups.max()) + 1, **how)[:, self.groups.to(generator.device)]
            z = math.sqrt(self.correlation) * common + math.sqrt(1 - self.correlation) * z
        fires = z < self._thresholds.to(generator.device)
        child = (self.parents >= 0).to(generator.device)
        above = self.parents.clamp(min=0).to(generator.device)
        fires &= fires[:, above] | ~child
        return fires * MAGNITUDES[self.magnitudes](z, generator)

    def rows(self, codes: Float[Tensor, "n n_true"], generator: torch.Generator) -> Float[Tensor, "n d"]:
        """The samples with these codes, mean and noise added."""
        x = self.mean.to(codes.device) + codes @ self.atoms.to(codes.device)
        if not self.noise:
            return x
        return x + self.noise * torch.randn(x.shape, generator=generator, device=x.device, dtype=x.dtype)

    def sample(self, n: int, generator: torch.Generator) -> Float[Tensor, "n d"]:
        """n samples without their codes: what `training.Fresh` draws."""
        return self.rows(self.codes(n, generator), generator)

    @property
    def expected(self) -> Float[Tensor, " d"]:
        """E[x] = mean + Σ_j r_j a_j, exact, since magnitudes have mean 1."""
        return self.mean + (self.rates.to(self.atoms.dtype) @ self.atoms)

    @cached_property
    def fingerprint(self) -> str:
        """Names everything that determines the samples."""
        digest = hashlib.blake2b(digest_size=8)
        for part in (self.atoms, self.rates, self.groups, self.parents, self.mean):
            digest.update(part.contiguous().numpy().tobytes())
        return f"world({digest.hexdigest()}, {self.correlation}, {self.magnitudes}, {self.noise})"


def world(
    n_true: int,
    d: int,
    *,
    generator: torch.Generator,
    active: float = 6.0,
    zipf: float = 0.7,
    group_size: int = 8,
    correlation: float = 0.0,
    hierarchy: float = 0.0,
    magnitudes: str = "exponential",
    noise: float = 0.0,
    mean: float = 0.0,
) -> World:
    """A `World` with random unit features.

    Args:
        active: how many features fire on average.
        zipf: exponent of the firing rates (`zipf_rates`); 0 makes all alike.
        group_size, correlation: groups are drawn at random and fire together with this latent correlation in [0, 1).
        hierarchy: share of the features, drawn at random, that get a parent of higher rate among the others, where
            there is one outside their own group.
        magnitudes: a name in `MAGNITUDES`.
        noise: standard deviation per dimension.
        mean: length of the constant that is added to every sample, where a feature's mean contribution has length 1.

    Raises `ValueError` for any of them outside what is allowed.
    """
    for name, value in {"n_true": n_true, "d": d, "group_size": group_size}.items():
        if value < 1:
            raise ValueError(f"{name}={value} is no world; allowed: at least 1")
    if not (0 <= correlation < 1 and 0 <= hierarchy < 1):
        raise ValueError(f"correlation={correlation}, hierarchy={hierarchy}; allowed: from 0 to below 1")
    if magnitudes not in MAGNITUDES:
        raise ValueError(f"magnitudes={magnitudes!r} is unknown; allowed: {', '.join(MAGNITUDES)}")
    if noise < 0 or mean < 0 or zipf < 0:
        raise ValueError(f"noise={noise}, mean={mean}, zipf={zipf}; allowed: at least 0")
    rates = zipf_rates(n_true, active, zipf)
    order = torch.randperm(n_true, generator=generator, device=generator.device).cpu()
    groups = torch.empty(n_true, dtype=torch.long)
    groups[order] = torch.arange(n_true) // group_size
    parents = torch.full((n_true,), -1)
    shuffled = torch.randperm(n_true, generator=generator, device=generator.device).cpu().tolist()
    children, roots = sorted(shuffled[: round(hierarchy * n_true)]), sorted(shuffled[round(hierarchy * n_true) :])
    for child in children:
        above = [root for root in roots if rates[root] > rates[child] and groups[root] != groups[child]]
        if above:
            drawn = torch.randint(len(above), (1,), generator=generator, device=generator.device)
            parents[child] = above[int(drawn)]
    atoms = random_atoms(n_true, d, generator).cpu()
    constant = mean * random_atoms(1, d, generator).cpu()[0]
    return World(atoms, rates, groups, parents, constant, correlation, magnitudes, noise)
