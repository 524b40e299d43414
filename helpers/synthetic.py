"""Data whose structure is known: sparse sums of a dictionary's atoms, and the Gaussian with the same covariance."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

from helpers.activations import Moments
from helpers.dictionary import SparseCodes, weighted_sum


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
