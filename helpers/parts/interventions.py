"""Which part of the Switch loss keeps features alive: its gradient, written out, so that parts of it can be held back.

The Switch loss (`remedies.Switch`) acts on a dictionary through one matrix, its gradient for the scores (`pull`).
`Pinned` applies that matrix and nothing else, to all of what it reaches or to a part.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from helpers import settings
from helpers.parts.worlds import random_atoms
from helpers.settings import allowed, one_of
from helpers.training.remedies import Balance, Moment, load_shares

PLACES = ("scores", "encoder", "rows", "bias", "b_dec")
HALVES = ("both", "lift", "push")
LOADS = ("own", "permuted", "random")


def pull(
    scores: Float[Tensor, "batch n"], load: Float[Tensor, " n"], alpha: float, temperature: float = 1.0
) -> Float[Tensor, "batch n"]:
    """∂L/∂z of the Switch loss L = α n Σ_j f_j P_j at scores z and loads f (which carry no gradient):

    G_bj = (α n / (T τ)) · p_bj · (f_j − Σ_i f_i p_bi), with p_b the softmax of z_b/τ and T the size of the batch.
    Each row sums to 0. A step of descent moves z_bj by −G_bj: negative entries lift, positive ones push down.
    """
    batch, n = scores.shape
    p = (scores / temperature).softmax(-1)
    return alpha * n / (batch * temperature) * p * (load - (p * load).sum(-1, keepdim=True))


@dataclass(frozen=True)
class Pinned(Balance):
    """The Switch loss's gradient, restricted: as a loss it is Σ_bj G_bj z_bj with G from `pull` held fixed.

    With the defaults every parameter gets the gradient that `remedies.Switch` gives it.

    Args:
        acts_on: where the gradient goes. "scores": to all that the scores depend on, which are the encoder's rows and
            biases and b_dec, because the SAE reads x − b_dec. "encoder": rows and biases; "rows", "bias", "b_dec":
            that one. These three add up to "scores". b_dec gets the reconstruction's gradient in any case.
        half: "lift" keeps the entries that raise a score (G < 0), "push" those that lower one (G > 0).
        load: whose load is balanced. "permuted": the batch's loads in a new random order at every step. "random": the
            loads that a fixed random dictionary of the same n and k has on the same batch.
        seed: of the permutations and of the random dictionary.

    Raises `ValueError` for alpha or temperature not above 0, and for acts_on, half or load that is not one of those.
    """

    alpha: float = 0.1
    temperature: float = 1.0
    acts_on: str = "scores"
    half: str = "both"
    load: str = "own"
    seed: int = 0
    needs_scores: ClassVar[bool] = True

    def __post_init__(self):
        allowed(self.alpha > 0, f"alpha={self.alpha} cannot act", "above 0")
        allowed(self.temperature > 0, f"temperature={self.temperature} cannot act", "above 0")
        one_of("acts_on", self.acts_on, PLACES)
        one_of("half", self.half, HALVES)
        one_of("load", self.load, LOADS)

    def loss(self, now: Moment) -> Tensor:
        force = pull(now.trace.scores.detach(), self.balanced(now), self.alpha, self.temperature)
        if self.half != "both":
            force = force.clamp(max=0) if self.half == "lift" else force.clamp(min=0)
        encoder, b_dec = now.dictionary.encoder, now.dictionary.b_in
        x = now.inputs if b_dec is None else now.inputs - b_dec.detach()
        # each part is linear in one parameter, and the parts' gradients add up to that of the scores
        match self.acts_on:
            case "scores":
                return (force * now.trace.scores).sum()
            case "encoder":
                return (force * encoder.scores(x)).sum()
            case "rows":
                return (force * (x @ encoder.weight.T)).sum()
            case "bias":
                return (force.sum(0) * encoder.bias).sum()
        return -(force @ encoder.weight.detach()).sum(0) @ b_dec

    def balanced(self, now: Moment) -> Float[Tensor, " n"]:
        """The loads f that are put in the formula; they sum to 1."""
        scores, indices = now.trace.scores, now.experts
        n = scores.shape[1]
        if self.load == "random":
            rows = _random_rows(n, now.inputs.shape[1], self.seed).to(now.inputs)
            b_in = now.dictionary.b_in
            centred = now.inputs if b_in is None else now.inputs - b_in.detach()
            indices = (centred @ rows.T).topk(indices.shape[1], dim=1).indices
        share = load_shares(indices, n, scores.dtype)
        if self.load == "permuted":
            order = torch.randperm(n, generator=settings.generator(settings.mix(self.seed, now.step)))
            share = share[order.to(share.device)]
        return share


@lru_cache(maxsize=16)
def _random_rows(n: int, d: int, seed: int) -> Float[Tensor, "n d"]:
    return random_atoms(n, d, settings.generator(seed))
