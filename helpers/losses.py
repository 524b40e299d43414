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


@dataclass(frozen=True)
class ZLoss(Balance):
    """Router z-loss of ST-MoE (Zoph et al. 2022, eq. 5): coefficient · mean_b (log Σ_j exp s_bj)².

    It keeps scores small; it was made for stability, not for balance.
    """

    coefficient: float = 1e-3
    needs_scores: ClassVar[bool] = True

    def loss(self, trace: Trace, target: Tensor) -> Tensor:
        return self.coefficient * trace.scores.logsumexp(-1).square().mean()


@dataclass(frozen=True)
class LossFree(Balance):
    """Loss-free balancing (Wang et al. 2024, algorithm 1): b_i += γ·sign(mean load − load_i) behind each step.

    The model chooses by s + b and weighs by s, so it needs a `selection_bias`. Loads are the batch's choices.
    """

    gamma: float = 1e-3

    @torch.no_grad()
    def after_step(self, dictionary: RankOneDictionary, trace: Trace, step: int) -> None:
        bias, chosen = dictionary.selection_bias, trace.codes.indices[:, :: dictionary.expert_rank]
        if bias is None:
            raise ValueError("the model has selection_bias=False; allowed with loss-free balancing: True")
        load = torch.bincount((chosen // dictionary.expert_rank).reshape(-1), minlength=len(bias)).to(bias.dtype)
        bias += self.gamma * torch.sign(load.mean() - load)


def zloss(coefficient: float = 1e-3) -> ZLoss:
    """Router z-loss with weight `coefficient`."""
    return ZLoss(coefficient)


def loss_free(gamma: float = 1e-3) -> LossFree:
    """Loss-free balancing with update `gamma` > 0."""
    if not gamma > 0:
        raise ValueError(f"gamma={gamma} never moves a bias; allowed: above 0")
    return LossFree(gamma)
