"""What is minimised, and what is added to it to keep features alive.

A remedy is a small frozen dataclass with one interface (`Balance`), so that `fit(sae, stream, balance=switch(0.1))`
reads like the sentence.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

if TYPE_CHECKING:
    from helpers.dictionary import RankOneDictionary, Trace


def normalised_mse(
    output: Float[Tensor, "batch d"], target: Float[Tensor, "batch d"], variance: float
) -> Float[Tensor, ""]:
    """Mean over the batch of ‖y − ŷ‖² over the targets' total variance: an estimate of FVU, so 1 is "the mean"."""
    return (output - target).square().sum() / (len(target) * variance)


@dataclass(frozen=True)
class Balance:
    """A remedy for dead features: nothing by default. `fit` calls `loss` on every step and `after_step` behind it.

    `needs_scores` asks for a gradient through the dense scores, which makes the step's backward pass dense.
    """

    needs_scores: ClassVar[bool] = False

    def loss(self, trace: Trace, target: Tensor) -> Tensor | float:
        """What is added to the training loss."""
        return 0.0

    def after_step(self, dictionary: RankOneDictionary, trace: Trace, step: int) -> None:
        """What is done to the model behind the optimiser's step."""


@dataclass(frozen=True)
class Switch(Balance):
    """Load balancing of the Switch Transformer (Fedus et al. 2021, eq. 4–6) on a dictionary's scores.

    L = α·n·Σ_i f_i P_i with f_i the share of the batch's k·T choices that fell on i (no gradient) and P_i the mean
    softmax probability of i at temperature τ. Uniform use gives α.
    """

    alpha: float = 0.01
    temperature: float = 1.0
    needs_scores: ClassVar[bool] = True

    def loss(self, trace: Trace, target: Tensor) -> Tensor:
        n = trace.scores.shape[1]
        chosen = trace.codes.indices
        share = torch.bincount(chosen.reshape(-1), minlength=n).to(trace.scores.dtype) / chosen.numel()
        probability = (trace.scores / self.temperature).softmax(-1).mean(0)
        return self.alpha * n * (share * probability).sum()


def switch(alpha: float = 0.01, temperature: float = 1.0) -> Switch:
    """Switch balancing with weight `alpha` at softmax temperature `temperature` > 0."""
    if temperature <= 0:
        raise ValueError(f"temperature={temperature} is not one; allowed: above 0")
    return Switch(alpha, temperature)
