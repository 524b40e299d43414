"""What the Switch loss is held against where the truth is known: two newer remedies, and all entries of a contest."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from helpers.dictionary.rows import unit
from helpers.settings import allowed
from helpers.training import remedies
from helpers.training.remedies import Balance, Moment, load_shares


@dataclass(frozen=True)
class Frequency(Balance):
    """What the quadratic-frequency penalty of JumpReLU SAEs (Smith et al. 2025) leaves to a TopK SAE.

    It is Σ_i ω_i + ω_i²/ω_0, ω_i how often i fires; its gradient goes through a kernel to the thresholds. (Gemma Scope
    2, by the same group, penalises frequency too; this is the form that they published before.) With TopK the first
    sum is k, so that the squares are left, the variance of the frequencies: L = α·n·Σ_i f_i² with f_i = ω_i/k the share
    of the choices; uniform use gives α. No atom has a threshold here: a choice of k that is soft by a sigmoid of width
    τ around the smallest chosen score says how the shares move. They sum to 1, so pushes on an input sum to 0.
    """

    alpha: float = 0.01
    temperature: float = 1.0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self):
        allowed(self.temperature > 0, f"temperature={self.temperature} cannot act", "above 0")

    def loss(self, now: Moment) -> Tensor:
        scores, chosen = now.trace.scores, now.experts
        with torch.no_grad():
            fires = ((scores - scores.gather(1, chosen).amin(1, keepdim=True)) / self.temperature).sigmoid()
            slope = fires * (1 - fires) / self.temperature
            weight = slope / slope.sum(1, keepdim=True)  # how the sigmoid's centre follows, so that k stay chosen
        moved = (slope * (scores - (weight * scores).sum(1, keepdim=True))).mean(0) / chosen.shape[1]
        share = load_shares(chosen, scores.shape[1], scores.dtype) + (moved - moved.detach())
        return self.alpha * len(share) * share.square().sum()


@dataclass(frozen=True)
class Aligned(Balance):
    """Aligned training (Brzozowski & Chung 2026, arXiv 2605.18629): e_j·d_j = 1 for every atom, so that none drifts
    away from what it writes. They write the encoder so that it holds; here the nearest one is taken after a step."""

    @torch.no_grad()
    def after_step(self, now: Moment) -> None:
        encoder, decoder = now.dictionary.encoder, now.dictionary.decoder
        good = encoder is not decoder and encoder.weight.shape == decoder.weight.shape
        allowed(good, f"Aligned with {now.dictionary.knobs}", "an encoder of its own, with a row for each atom")
        write = decoder.weight
        missing = 1 - (encoder.weight * write).sum(1, keepdim=True)
        encoder.weight += (
            missing * unit(write) / write.norm(dim=1, keepdim=True).clamp(min=torch.finfo(write.dtype).tiny)
        )


REMEDIES: dict[str, Callable[[float, int], Balance]] = {
    "none": lambda strength, steps: Balance(),
    "auxk": lambda strength, steps: remedies.AuxK(strength, silent_for=max(1, steps // 20)),
    "ghost": lambda strength, steps: remedies.Ghost(strength, silent_for=max(1, steps // 20)),
    "resample": lambda strength, steps: remedies.Resample(max(2, steps // 8), strength, until=0.7),
    "anneal": lambda strength, steps: remedies.Anneal(strength),
    "zloss": lambda strength, steps: remedies.ZLoss(strength),
    "bias": lambda strength, steps: remedies.LossFree(strength),
    "frequency": lambda strength, steps: Frequency(strength),
    "aligned": lambda strength, steps: Aligned(),
    "switch": lambda strength, steps: remedies.Switch(strength),
    "switch_early": lambda strength, steps: remedies.During(remedies.Switch(strength), stop=0.5),
}
"""A remedy by its strength and the run's length, to which waits and intervals are scaled."""

STRENGTHS: dict[str, tuple[float, ...]] = {
    "auxk": (1 / 32, 1.0),
    "ghost": (0.1, 1.0),
    "resample": (0.2, 1.0),
    "anneal": (2.0, 4.0),
    "zloss": (1e-4, 1e-3),
    "bias": (1e-3, 1e-2),
    "frequency": (0.01, 0.1),
    "switch": (0.01, 0.1),
    "switch_early": (0.1, 0.01),
}
"""As many strengths for each: its authors' own value, where they give one that fits, and one more. What has none gets
learning rates in their place."""
