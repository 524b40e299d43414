"""Which part of the Switch loss keeps features alive: its gradient, written out, so that parts of it can be held back.

The Switch loss (`remedies.Switch`) acts on a dictionary through one matrix, its gradient for the scores (`pull`).
`Pinned` applies that matrix and nothing else, to all of what it reaches or to a part.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from helpers import settings
from helpers.parts import known_truth
from helpers.parts.known_truth import Outcome, Problem, Setting
from helpers.parts.worlds import random_atoms
from helpers.study.scores import evaluate, recovery
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
    """

    alpha: float = 0.1
    temperature: float = 1.0
    acts_on: Literal["scores", "encoder", "rows", "bias", "b_dec"] = "scores"
    half: Literal["both", "lift", "push"] = "both"
    load: Literal["own", "permuted", "random"] = "own"
    seed: int = 0
    needs_scores: ClassVar[bool] = True

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
        scores, indices = now.trace.scores, now.trace.codes.indices
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


def pinned(
    alpha: float = 0.1,
    temperature: float = 1.0,
    *,
    acts_on: str = "scores",
    half: str = "both",
    load: str = "own",
    seed: int = 0,
) -> Pinned:
    """The Switch loss with part of its gradient held back, or with other loads; see `Pinned`.

    Raises `ValueError` for alpha or temperature not above 0, and for acts_on, half or load that is not one of those.
    """
    for name, value in {"alpha": alpha, "temperature": temperature}.items():
        if not value > 0:
            raise ValueError(f"{name}={value} cannot act; allowed: above 0")
    for name, value, allowed in (("acts_on", acts_on, PLACES), ("half", half, HALVES), ("load", load, LOADS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")
    return Pinned(alpha, temperature, acts_on, half, load, seed)


# -- what a run looked like --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """A trained student: its `Outcome`, and what the outcome averages over.

    `rates` are the features' firing rates on the test rows; `true_rates` the rates at which the world's features fire
    and `cosines` each one's best cosine over the live learned features, both in the world's order.
    """

    outcome: Outcome
    rates: Float[np.ndarray, " n_features"]
    true_rates: Float[np.ndarray, " n_true"]
    cosines: Float[np.ndarray, " n_true"]


def watch(
    problem: Problem,
    seed: int,
    given: Mapping[str, Setting],
    cache_dir: str | Path | None | Literal[False] = None,
    **recipe,
) -> dict[str, Seen]:
    """`known_truth.trial` with a closer look: the same worlds, streams, students and outcomes."""
    done, found = known_truth.train(problem, seed, given, cache_dir, **recipe), {}
    for name, each in done.fits.items():
        rates = evaluate(each.student, done.test).rates
        match = recovery(each.student.decoder.weight.detach()[rates > 0], done.source.atoms)
        told = (rates, done.source.rates, match.of_truth)
        found[name] = Seen(done.judge(name), *(numbers.numpy() for numbers in told))
    return found
