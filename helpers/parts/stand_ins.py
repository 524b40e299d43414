"""Students in a layer's place: of the family with any rank, a transcoder of the MLP's own weights, a model's own layer.

`EndToEnd` says what trains them: the squared error of their site, or the model's own loss.
"""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn

from helpers import settings
from helpers.dictionary import RankOneDictionary, Rows, SparseCodes, Trace, secret_moe, topk_sae
from helpers.models.teachers import Splice, Teacher
from helpers.settings import allowed, one_of
from helpers.study.study import Arm
from helpers.training.remedies import Balance, Moment, Switch

if TYPE_CHECKING:
    from helpers.parts.gaps import StandIn

SIGNALS = {"local": 1.0, "fine-tuned": 0.5, "end to end": 0.0}
"""What trains a student: up to this share of the steps its own squared error, from there on the model's loss."""


def family(kind: str, active: int, total: int, rank: int = 1, signal: str = "local") -> Arm:
    """An arm of the family: `mixture` of any rank, `topk` (untied: a TopK SAE, or transcoder), `tied`, or a transcoder
    `from weights`, which starts from the MLP's own.

    Raises `ValueError` for another kind or signal, for more active neurons than there are, and for a rank that does not
    divide both numbers, or that is not 1 where there is no mixture.
    """
    builders = {"topk": partial(topk, tied=False), "tied": partial(topk, tied=True), "from weights": from_weights}
    one_of("kind", kind, ("mixture", *builders))
    allowed(kind == "mixture" or rank == 1, f"rank={rank} has no pre-activation to choose by", f"1 for kind={kind!r}")
    allowed(1 <= active <= total, f"active={active} neurons cannot be chosen", f"1 to total={total}")
    divides = rank >= 1 and active % rank == 0 == total % rank
    allowed(divides, f"rank={rank} does not divide", f"a divisor of active={active} and total={total}")
    name = f"{kind} {active // rank} of {total // rank}" + (f" × {rank}" if rank > 1 else "")
    build = partial(mixture, active, total, rank) if kind == "mixture" else partial(builders[kind], active, total)
    return Arm(name, build, EndToEnd(signal))


def balanced(arm: Arm, strength: float) -> Arm:
    """The same arm with the Switch loss on its router's scores."""
    return replace(arm, remedy=replace(arm.remedy, switch=strength))


def mixture(active: int, total: int, rank: int, problem: StandIn, seed: int) -> RankOneDictionary:
    """active/rank of total/rank experts of `rank` GELU neurons each, chosen by router rows of their own:

        y = b_out + Σ_{j chosen} g_j Σ_{i in expert j} GELU(e_i·(x − b_in) + β_i) d_i.

    The gates g are a softmax over the chosen experts' scores times their number, so that they average 1 at every rank.
    A seed gives the same neurons at every rank; the router of a higher rank is the beginning of that of rank 1.
    Biases start at the problem's means.
    """
    b_in, b_out = problem.biases
    noise = settings.generator(seed)
    plain = secret_moe(len(b_in), len(b_out), total, active, generator=noise, shared_neurons=0)
    return RankOneDictionary(
        plain.encoder,
        plain.decoder,
        k=active // rank,
        router=Rows(plain.router.weight.detach()[: total // rank].clone()),
        gate="softmax times k",
        activation="gelu",
        b_in=b_in,
        b_out=b_out,
        expert_rank=rank,
    )


def topk(active: int, total: int, problem: StandIn, seed: int, *, tied: bool) -> RankOneDictionary:
    """A TopK SAE, or with another target a TopK transcoder: `topk_sae` with a bias of its own on each side.

    With `tied` (d_j = e_j, and one bias for both sides) it is the strict identification: E_j = d_j d_jᵀ; that cannot
    predict, and `ValueError` says so.
    """
    can_be = not tied or problem.objective == "reconstruct"
    allowed(can_be, "kind='tied' shares one bias between input and output", "objective='reconstruct'")
    b_in, b_out = problem.biases
    sae = topk_sae(len(b_in), total, active, generator=settings.generator(seed), b_dec=b_in, tied=tied)
    if tied:
        return sae
    return RankOneDictionary(sae.encoder, sae.decoder, k=active, unit_norm=True, b_in=b_in, b_out=b_out)


def from_weights(active: int, total: int, problem: StandIn, seed: int) -> RankOneDictionary:
    """A transcoder of `topk` that starts from the MLP's own weights: each neuron as two latents.

    They write ± its column of W_down and read ± its row of W_up, times the slope of its activation over what that row
    reads (of a gated neuron, its mean gate; least squares on the first training rows): together the neuron made linear.
    The neurons that write the most come first. If there are latents left, they start as those of `topk`, with readings
    as long as the others' median.
    """
    allowed(problem.objective == "predict", f"objective={problem.objective!r} has no such start", "'predict'")
    student, layer = topk(active, total, problem, seed, tied=False), problem.layer
    up, last = _up_and_down(layer.teacher.mlp(layer.number))
    down = last.weight.detach().float().cpu()
    rows = layer.stores["train"].tensor("mlp_in", slice(SLOPE_ROWS))
    activations = _read_by(layer.teacher.mlp(layer.number), last, rows)
    centred = rows - layer.mean("mlp_in") * layer.scale["mlp_in"]
    read = centred @ up.T
    slope = ((activations - activations.mean(0)) * read).sum(0) / read.square().sum(0)
    length = down.norm(dim=0)
    order = (activations.square().mean(0) * length**2).argsort(descending=True)[: total // 2]
    reads = ((slope * length)[:, None] * up)[order] * (layer.scale["mlp_in"] / layer.scale["mlp_out"])
    writes = (down / length).T[order]
    with torch.no_grad():
        own = 2 * len(order)
        student.encoder.weight.mul_(reads.norm(dim=1).median())
        student.encoder.weight[:own] = torch.cat((reads, -reads))
        student.decoder.weight[:own] = torch.cat((writes, -writes))
    return student


SLOPE_ROWS = 4096
"""Training rows on which `from_weights` fits the slopes of neurons."""


def _up_and_down(mlp: nn.Module) -> tuple[Float[Tensor, "d_ff d"], nn.Linear]:
    """The rows that an MLP's neurons read (of gated ones those that are no gates), and its last linear map."""
    linear = [module for module in mlp.modules() if isinstance(module, nn.Linear)]
    given = f"{type(mlp).__name__} has linear maps {[tuple(each.weight.shape) for each in linear]}"
    shapes = {tuple(each.weight.shape) for each in linear[:-1]}
    good = bool(shapes) and shapes == {tuple(linear[-1].weight.shape[::-1])}
    allowed(good, given, "one or two that read its input, and behind them one that writes its output")
    return linear[-2].weight.detach().float().cpu(), linear[-1]


def _read_by(mlp: nn.Module, linear: nn.Linear, rows: Float[Tensor, "rows d"]) -> Float[Tensor, "rows d_ff"]:
    """What a linear map in an MLP reads where the MLP reads these rows."""
    found: list[Tensor] = []
    hook = linear.register_forward_pre_hook(lambda module, args: found.append(args[0].float().cpu()))
    with hook, torch.no_grad():
        mlp(rows.to(linear.weight.device, linear.weight.dtype))
    return found[0]


class Block(nn.Module):
    """A model's own kind of MoE layer as a student of `training.fit`; its atoms are its experts.

    `block` is any module with a router called `gate` or `router` that returns the chosen experts' numbers, or scores
    of all experts. Raises `ValueError` where there is none.
    """

    expert_rank, selection_bias = 1, None

    def __init__(self, block: nn.Module, d: int):
        super().__init__()
        self.block, self.d_in, self.d_out = block, d, d
        router = getattr(block, "gate", getattr(block, "router", None))
        allowed(router is not None, f"block={type(block).__name__} has no router", "an MoE layer, not a dense MLP")
        router.register_forward_hook(self._note)
        with torch.no_grad():
            self.trace(next(block.parameters()).new_zeros(1, d))
        scores, chosen = self._noted
        self.n_features = self.n_atoms = scores.shape[1]
        self.k = chosen.shape[1]

    def _note(self, module: nn.Module, inputs: tuple, output: Tensor | tuple) -> None:
        """Scores [rows, experts] and choices [rows, k] of the last forward pass."""
        parts = [output] if isinstance(output, Tensor) else [part for part in output if isinstance(part, Tensor)]
        chosen = [part for part in parts if not part.is_floating_point()]
        scores = max((part for part in parts if part.is_floating_point()), key=lambda part: part.shape[-1])
        if not chosen:
            k = getattr(self.block, "top_k", None) or getattr(module, "top_k", None)
            if k is None:
                raise ValueError(f"block={type(self.block).__name__} does not say how many experts it chooses")
            chosen = [scores.topk(k, dim=-1).indices]
        self._noted = scores.flatten(0, -2), chosen[0].flatten(0, -2)

    def forward(self, x: Float[Tensor, "batch d"]) -> Float[Tensor, "batch d"]:
        return self.trace(x).output

    def trace(self, x: Float[Tensor, "batch d"], *, score_gradient: bool = False) -> Trace:
        output = self.block(x[None])
        output = (output[0] if isinstance(output, tuple) else output)[0]
        scores, chosen = self._noted
        return Trace(output, SparseCodes(chosen, torch.ones_like(chosen, dtype=x.dtype)), scores.detach())

    @property
    def knobs(self) -> dict[str, object]:
        return {"block": type(self.block).__name__, "n_features": self.n_features, "k": self.k}

    def constrain_gradient_(self) -> None:
        """A production layer has no constraint."""

    constrain_ = constrain_gradient_


def fresh(mixture: Teacher, layer: int, problem: StandIn | None, seed: int) -> Block:
    """A model's MoE layer with new random weights, trainable: equal in class, shape and start. See `Arm.build`."""
    block = copy.deepcopy(mixture.mlp(layer))  # which keeps how its experts are computed
    block.load_state_dict(mixture.randomised(seed).mlp(layer).state_dict())
    return Block(block.requires_grad_(True), mixture.d_model)


class _Units(nn.Module):
    """A module that reads rows divided by one number and whose output is divided by another."""

    def __init__(self, module: nn.Module, given: float, returned: float):
        super().__init__()
        self.module, self.given, self.returned = module, given, returned

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return self.module(x * self.given) / self.returned


def own(problem: StandIn, seed: int) -> RankOneDictionary:
    """The model's own dense MLP as a student, with its trained weights: the family's member without atoms."""
    layer = problem.layer
    mlp = copy.deepcopy(layer.teacher.mlp(layer.number)).requires_grad_(True)
    none = Rows(torch.empty(0, layer.teacher.d_model)), Rows(torch.empty(0, layer.teacher.d_model))
    return RankOneDictionary(*none, k=0, shared=_Units(mlp, layer.scale["mlp_in"], layer.scale["mlp_out"]))


@dataclass(frozen=True)
class EndToEnd(Balance):
    """Trains a student in its place in the model, over a `PieceStream`: from the share `SIGNALS[signal]` of the steps
    on it adds cross-entropy (nats per token) minus the squared error, so that the model's loss alone is left.

    Half-way Adam forgets its moments, whatever the signal is: those of the squared error would hold back the gradients
    of the loss, and a student that goes on with the squared error is to be equal in everything else.

    Args:
        switch: strength of a Switch loss besides, all the time; 0 for none.
    """

    signal: str = "local"
    switch: float = 0.0

    def __post_init__(self):
        one_of("signal", self.signal, SIGNALS)

    @property
    def needs_scores(self) -> bool:  # type: ignore[override]
        return self.switch > 0

    @property
    def chosen_by(self) -> str:
        """The validation measure of what trains it, by which its learning rate is chosen."""
        return "fvu" if self.signal == "local" else "nats"

    def loss(self, now: Moment) -> Tensor | float:
        if now.optimiser is not None and now.step == math.ceil(now.steps / 2):
            now.optimiser.state.clear()
        even = Switch(self.switch).loss(now) if self.switch else 0.0
        if now.step < SIGNALS[self.signal] * now.steps:
            return even
        layer, site = now.stream.layer, now.stream.site
        rows = now.trace.output.to(now.target.dtype) * layer.scale[site]
        splice = Splice(layer.number, site, lambda _: rows)
        with layer.resumed((now.stream.fingerprint, now.step)):
            found = layer.teacher.loss_with_gradient(*now.stream.tokens(now.step), splice)
        return found.nats[found.mask].mean() - now.loss + even
