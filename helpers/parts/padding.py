"""What padding rows do to the variances of a layer, and which share of padding explains a variance that was published.

A row of text has moments (μ, Σ); a padding row is always the same vector p. With a share s of padding the rows have

    mean (1−s) μ + s p        covariance (1−s) Σ + s (1−s) (μ−p)(μ−p)ᵀ

so the variance of inputs and outputs follows from the text's own moments. What the MLP returns for a Gaussian with this
mean and covariance does not, and is measured on draws of it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import settings
from helpers.models.activations import Moments
from helpers.settings import one_of

RELEASED = settings.ROOT / "data" / "secret_moe_released.csv"
QUANTITIES = ("input", "output", "gaussian")
GRID, COARSE = np.linspace(0, 0.95, 191), np.linspace(0, 0.95, 20)
AROUND = 0.06
"""A Gaussian curve costs forward passes: that without an article is measured only this far beside the estimate."""


def released(teacher: str, layer: int) -> dict[str, tuple[float, float, float]] | None:
    """Variances in the released logs of *Secret mixtures of experts inside your LLM*: median, lowest, highest.

    By quantity: `input`, `output`, and `gaussian`, the output for the matched Gaussian. None where the paper did not
    study this layer of this model.
    """
    runs = released_runs(teacher, layer)
    if runs.empty:
        return None
    text, noise = (runs[runs.inputs == inputs] for inputs in ("activations", "gaussian"))
    columns = (text.val_input_variance, text.val_output_variance, noise.val_output_variance)
    return {name: (each.median(), each.min(), each.max()) for name, each in zip(QUANTITIES, columns, strict=True)}


def released_runs(teacher: str, layer: int) -> pd.DataFrame:
    """Final figures of the runs that paper C's author released for a layer of a model; no rows where there are none.

    `fvu_best_lr` is at the best of the author's learning rates ON the rows that are reported.
    """
    table = pd.read_csv(RELEASED, comment="#")
    return table[(table.model == teacher.rsplit("/", 1)[-1].lower()) & (table.layer == layer)].reset_index(drop=True)


class ByArticle:
    """Sums over each article's rows. Moments of any resample of articles follow from them without the rows.

    `full` keeps a [d, d] matrix for each article (float32, about the mean of all rows), else its diagonal only.
    """

    def __init__(self, rows: Float[np.ndarray, "n d"], articles: Int[np.ndarray, " n"], *, full: bool = False):
        _, index = np.unique(articles, return_inverse=True)
        self.count = torch.from_numpy(np.bincount(index))
        self.centre = torch.from_numpy(rows.mean(0, dtype=np.float64))
        sums, squares = [], []
        for article in range(len(self.count)):
            part = torch.from_numpy(np.asarray(rows[index == article], np.float64)) - self.centre
            sums.append(part.sum(0))
            squares.append((part.T @ part if full else part.square().sum(0)).float())
        self.sums, self.squares = torch.stack(sums), torch.stack(squares)

    def __len__(self) -> int:
        return len(self.count)

    def moments(self, times: Int[Tensor, " articles"] | None = None) -> Moments:
        """Moments of the rows with each article taken so many times (once). Off the diagonal 0 unless `full`."""
        times = torch.ones(len(self), dtype=torch.long) if times is None else times
        n = int((times * self.count).sum())
        shift = times.double() @ self.sums / n
        second = torch.tensordot(times.float(), self.squares, 1).double() / n
        cov = second - torch.outer(shift, shift) if second.ndim == 2 else torch.diag(second - shift.square())
        return Moments(n, self.centre + shift, cov)


@dataclass(frozen=True)
class Mixture:
    """Text, and a share of rows that are all one padding row; `mlp` maps inputs to outputs.

    A variance is the mean over dimensions of each dimension's variance, as in FVU; with `overall`, of all numbers about
    their one common mean.
    """

    inputs: Moments
    outputs: Moments
    input_row: Float[Tensor, " d"]
    output_row: Float[Tensor, " d"]
    mlp: Callable[[Tensor], Tensor]
    noise: tuple[Float[Tensor, "draws d"], Float[Tensor, " draws"]]
    overall: bool = False

    def curve(self, quantity: str, shares: Float[np.ndarray, " shares"]) -> Float[np.ndarray, " shares"]:
        """Variance of `input`, `output` or `gaussian` at each share of padding."""
        one_of("quantity", quantity, QUANTITIES)
        if quantity == "gaussian":
            return self._gaussian(shares)
        text, row = getattr(self, f"{quantity}s"), getattr(self, f"{quantity}_row")
        gap = text.mean - row.double()
        variance = (1 - shares) * text.variance + shares * (1 - shares) * float(gap.square().mean())
        if self.overall:
            variance = variance + [float((text.mean - s * gap).var(unbiased=False)) for s in shares]
        return variance

    @torch.inference_mode()
    def _gaussian(self, shares: np.ndarray) -> np.ndarray:
        """The same draws at every share: x = mean + √(1−s) L z + √(s(1−s)) w (μ−p), with L Lᵀ = Σ."""
        z, w = self.noise
        ridge = 1e-6 * self.inputs.variance * torch.eye(z.shape[1], dtype=torch.float64)
        spread = z @ torch.linalg.cholesky(self.inputs.cov + ridge).T.to(z)
        mean, gap = self.inputs.mean.to(z), (self.inputs.mean - self.input_row.double()).to(z)
        found = []
        for s in shares.tolist():
            x = mean - s * gap + (1 - s) ** 0.5 * spread + (s * (1 - s)) ** 0.5 * w[:, None] * gap
            y = self.mlp(x).double()
            found.append(float(y.var(unbiased=False) if self.overall else y.var(0, unbiased=False).mean()))
        return np.array(found)


def noise(draws: int, d: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Normal draws z [draws, d], and w [draws] along the padding direction: evenly spaced quantiles, since most of a
    Gaussian's variance lies there and random ones would blur it."""
    quantiles = (torch.arange(draws, dtype=torch.float64) + 0.5) / draws
    w = torch.special.ndtri(quantiles)[torch.randperm(draws, generator=generator)]
    return torch.randn(draws, d, generator=generator), (w / w.square().mean().sqrt()).float()


def solutions(shares: np.ndarray, variances: np.ndarray, wanted: float) -> list[float]:
    """Shares at which a curve, linear between its points, takes the value `wanted`; it rises and falls, so often two.

    0 is among them where text alone is there already; the highest point stands in where the curve stays below.
    """
    found = [float(shares[0])] if variances[0] >= wanted else []
    for i in np.flatnonzero((variances[:-1] < wanted) != (variances[1:] < wanted)):
        low, high = sorted((i, i + 1), key=lambda j: variances[j])
        found.append(float(np.interp(wanted, variances[[low, high]], shares[[low, high]])))
    return found or [float(shares[np.argmax(variances)])]


def implied_shares(mixture: Mixture, wanted: Mapping[str, float]) -> dict[str, float]:
    """For each quantity a share of padding that gives the wanted variance: of all solutions, those that agree best."""
    grids = [COARSE if quantity == "gaussian" else GRID for quantity in wanted]
    curves = [mixture.curve(quantity, grid) for quantity, grid in zip(wanted, grids, strict=True)]
    found = map(solutions, grids, curves, wanted.values())
    best = min(itertools.product(*found), key=lambda shares: (max(shares) - min(shares), sum(shares)))
    return dict(zip(wanted, best, strict=True))


def shares_without_each(
    mixture: Mixture, inputs: ByArticle, outputs: ByArticle, wanted: Mapping[str, float]
) -> pd.DataFrame:
    """Implied shares, a column for each quantity, with one article left out (a row each).

    Of several solutions the one nearest to the estimate is followed.
    """
    estimate = implied_shares(mixture, wanted)
    beside = {q: np.unique(np.clip([s - AROUND, s, s + AROUND], 0, 0.95)) for q, s in estimate.items()}
    grids = {q: beside[q] if q == "gaussian" else GRID for q in wanted}
    rows = []
    for article in range(len(inputs)):
        times = (torch.arange(len(inputs)) != article).long()
        rest = replace(mixture, inputs=inputs.moments(times), outputs=outputs.moments(times))
        found = {q: solutions(grids[q], rest.curve(q, grids[q]), value) for q, value in wanted.items()}
        rows.append({q: min(s, key=lambda share, q=q: abs(share - estimate[q])) for q, s in found.items()})
    return pd.DataFrame(rows)
