"""What is minimised, and what is added to it to keep features alive.

A remedy is a small frozen dataclass with one interface (`Balance`), so that `fit(sae, stream, balance=Switch(0.1))`
reads like the sentence. What it may look at and change is a `Moment`: one step of one student.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from jaxtyping import Float, Int
from torch import Tensor

from helpers import settings
from helpers.dictionary import ACTIVATIONS
from helpers.dictionary.rows import unit, weighted_sum
from helpers.settings import allowed

if TYPE_CHECKING:
    from helpers.dictionary import RankOneDictionary, Trace


def normalised_mse(
    output: Float[Tensor, "batch d"], target: Float[Tensor, "batch d"], variance: float
) -> Float[Tensor, ""]:
    """Mean over the batch of ‖y − ŷ‖² over the targets' total variance: an estimate of FVU, so 1 is "the mean"."""
    return (output - target).square().sum() / (len(target) * variance)


# -- the interface -----------------------------------------------------------------------------------------------------


@dataclass
class Moment:
    """One training step of one student, as a remedy sees it.

    `loss` is the reconstruction loss of this batch; `silent` counts, for each atom, the steps since it last fired,
    this one included (since the start, if it never did). `optimiser` is there for what resets its state, `stream` for
    what more than rows there is to a batch, `variance`, of the targets, for losses beside `normalised_mse`.
    """

    dictionary: RankOneDictionary
    inputs: Float[Tensor, "batch d_in"]
    target: Float[Tensor, "batch d_out"]
    trace: Trace
    loss: Float[Tensor, ""]
    silent: Int[Tensor, " n_atoms"]
    step: int
    steps: int
    optimiser: torch.optim.Optimizer | None = None
    stream: Any = None
    variance: float = 1.0

    @property
    def residual(self) -> Float[Tensor, "batch d_out"]:
        """y − ŷ, without gradient."""
        return (self.target - self.trace.output).detach()

    @property
    def centred(self) -> Float[Tensor, "batch d_in"]:
        """The inputs without b_in, as the encoder is given them."""
        b_in = self.dictionary.b_in
        return self.inputs if b_in is None else self.inputs - b_in

    @property
    def experts(self) -> Int[Tensor, "batch k"]:
        """The router rows that were chosen; each brings `expert_rank` atoms."""
        rank = self.dictionary.expert_rank
        return self.trace.codes.indices[:, ::rank] // rank

    @property
    def rounding(self) -> Float[Tensor, ""]:
        """Squared residuals that sum to no more than this are rounding: the batch is perfect."""
        size = self.target.square().sum() + self.trace.output.detach().square().sum()
        return (4 * torch.finfo(size.dtype).eps) ** 2 * size

    def dead(self, silent_for: int) -> Int[Tensor, " n_dead"]:
        """Atoms that have not fired for that many steps."""
        return (self.silent >= silent_for).nonzero()[:, 0]

    def pre_acts(self, atoms: Int[Tensor, " n"]) -> Float[Tensor, "batch n"]:
        """Pre-activations of these atoms with a gradient: a product with their rows only."""
        return self.dictionary.encoder.scores(self.centred, atoms)


@dataclass(frozen=True)
class Balance:
    """A remedy for dead features (nothing by default). `fit` asks `k_at` before, `loss` in, `after_step` after a step.

    `needs_scores` asks for a gradient through the dense scores, which makes the step's backward pass dense.
    `needs_bias` asks for a model with a `selection_bias`. Fields in `positive` are above 0, or None.
    """

    needs_scores: ClassVar[bool] = False
    needs_bias: ClassVar[bool] = False
    positive: ClassVar[tuple[str, ...]] = ()

    def __post_init__(self):
        for name in self.positive:
            value = getattr(self, name)
            allowed(value is None or value > 0, f"{name}={value} cannot act", "above 0")

    def k_at(self, k: int, done: float) -> int:
        """How many features are chosen when the share `done` of the steps is over; the model's own `k` by default."""
        return k

    def loss(self, now: Moment) -> Tensor | float:
        """What is added to the training loss."""
        return 0.0

    def after_step(self, now: Moment) -> None:
        """What is done to the model behind the optimiser's step."""


@dataclass(frozen=True)
class TargetL0(Balance):
    """weight · (L0 / target − 1)², which moves the thresholds θ of the rule "threshold" to `target` codes on average.

    Its gradient is the straight-through one and reaches θ alone (Rajamanoharan et al. 2024, appendix F).
    """

    target: float
    weight: float = 1.0
    positive: ClassVar[tuple[str, ...]] = ("target", "weight")

    def loss(self, now: Moment) -> Tensor:
        # with one, what is chosen is not all that lies above θ
        allowed(now.dictionary.selection_bias is None, "TargetL0 with a selection bias", "a dictionary without one")
        above = now.dictionary.select.l0(now.trace.scores.gather(1, now.experts), now.experts)
        return self.weight * (above / self.target - 1) ** 2


@dataclass(frozen=True, init=False)
class Together(Balance):
    """Several remedies at once: their losses add, and the largest `k_at` counts."""

    parts: tuple[Balance, ...]

    def __init__(self, *parts: Balance):
        object.__setattr__(self, "parts", parts)

    @property
    def needs_scores(self) -> bool:  # type: ignore[override]
        return any(part.needs_scores for part in self.parts)

    @property
    def needs_bias(self) -> bool:  # type: ignore[override]
        return any(part.needs_bias for part in self.parts)

    def acting(self, done: float) -> tuple[Balance, ...]:
        """The parts that act when the share `done` of the steps is over."""
        return self.parts

    def k_at(self, k: int, done: float) -> int:
        return max((part.k_at(k, done) for part in self.acting(done)), default=k)

    def loss(self, now: Moment) -> Tensor | float:
        return sum(part.loss(now) for part in self.acting(now.step / now.steps))

    def after_step(self, now: Moment) -> None:
        for part in self.acting(now.step / now.steps):
            part.after_step(now)


@dataclass(frozen=True, init=False)
class During(Together):
    """A remedy that acts only from the share `start` of the steps on and before `stop`, 0 ≤ start < stop ≤ 1."""

    start: float
    stop: float

    def __init__(self, what: Balance, start: float = 0.0, stop: float = 1.0):
        allowed(0 <= start < stop <= 1, f"start={start}, stop={stop}", "0 ≤ start < stop ≤ 1")
        super().__init__(what)
        object.__setattr__(self, "start", start)
        object.__setattr__(self, "stop", stop)

    def acting(self, done: float) -> tuple[Balance, ...]:
        return self.parts if self.start <= done < self.stop else ()


# -- from mixtures of experts ------------------------------------------------------------------------------------------


def load_shares(indices: Int[Tensor, "batch k"], n: int, dtype: torch.dtype = torch.float32) -> Float[Tensor, " n"]:
    """f_i: the share of the batch's k·T choices that fell on i. Sums to 1."""
    return torch.bincount(indices.reshape(-1), minlength=n).to(dtype) / indices.numel()


@dataclass(frozen=True)
class Switch(Balance):
    """Load balancing of the Switch Transformer (Fedus et al. 2021, eq. 4–6) on a dictionary's scores.

    L = α·n·Σ_i f_i P_i with f_i the share of the batch's k·T choices that fell on i (no gradient) and P_i the mean
    softmax probability of i at temperature τ. Uniform use gives α.
    """

    alpha: float = 0.01
    temperature: float = 1.0
    needs_scores: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("temperature",)

    def loss(self, now: Moment) -> Tensor:
        scores = now.trace.scores
        share = load_shares(now.experts, scores.shape[1], scores.dtype)
        probability = (scores / self.temperature).softmax(-1).mean(0)
        return self.alpha * len(share) * (share * probability).sum()


@dataclass(frozen=True)
class ZLoss(Balance):
    """Router z-loss of ST-MoE (Zoph et al. 2022, eq. 5): coefficient · mean_b (log Σ_j exp s_bj)².

    It keeps scores small; it was made for stability, not for balance.
    """

    coefficient: float = 1e-3
    needs_scores: ClassVar[bool] = True

    def loss(self, now: Moment) -> Tensor:
        return self.coefficient * now.trace.scores.logsumexp(-1).square().mean()


@dataclass(frozen=True)
class LossFree(Balance):
    """Loss-free balancing (Wang et al. 2024, algorithm 1): b_i += γ·sign(mean load − load_i) behind each step.

    The model chooses by s + b and weighs by s, so it needs a `selection_bias`. Loads are the batch's choices.
    """

    gamma: float = 1e-3
    needs_bias: ClassVar[bool] = True
    positive: ClassVar[tuple[str, ...]] = ("gamma",)

    @torch.no_grad()
    def after_step(self, now: Moment) -> None:
        bias, chosen = now.dictionary.selection_bias, now.experts
        allowed(bias is not None, "the model has selection_bias=False", "True with loss-free balancing")
        load = torch.bincount(chosen.reshape(-1), minlength=len(bias))
        bias += self.gamma * torch.sign(chosen.numel() - load * len(bias))  # whole numbers: a mean load moves nothing


# -- from the literature on sparse autoencoders ------------------------------------------------------------------------


@dataclass(frozen=True)
class AuxK(Balance):
    """Auxiliary loss of Gao et al. (2024, §A.2): the strongest dead atoms reconstruct what the live ones leave.

    ê = Σ over the `k_aux` largest dead pre-activations of a(z_j) d_j, and L = coefficient · ‖ê − e‖² over the variance
    of the residual e itself, which carries no gradient. Dead: silent for `silent_for` steps. They waited 10 M tokens;
    a shorter run needs a shorter wait, or the remedy never acts.
    """

    coefficient: float = 1 / 32
    silent_for: int = 100
    k_aux: int | None = None
    positive: ClassVar[tuple[str, ...]] = ("silent_for", "k_aux")

    def loss(self, now: Moment) -> Tensor | float:
        dead = now.dead(self.silent_for)
        if not len(dead):
            return 0.0
        wanted = self.k_aux or now.dictionary.d_out // 2
        top = now.pre_acts(dead).topk(min(wanted, len(dead)), dim=1)
        values = ACTIVATIONS[now.dictionary.activation](top.values)
        residual = now.residual
        guess = now.dictionary.decoder.combine(values, dead[top.indices])
        variance = (residual - residual.mean(0)).square().sum()
        variance = torch.where(variance > now.rounding, variance, torch.inf)  # nothing is left to explain
        return self.coefficient * (guess - residual).square().sum() / variance


@dataclass(frozen=True)
class Gated(Balance):
    """What trains a Gated SAE's gates (Rajamanoharan et al. 2024, arXiv 2404.16014, eq. 8): the π_j = ReLU(w_j·x + γ_j)
    shall be few and rebuild the input by themselves.

    L = sparsity · mean_b Σ_j π_bj / σ + mean_b ‖x − b_dec − Σ_j π_bj d_j‖² / σ², σ² the targets' variance, so that
    `sparsity` has no unit. In the last term decoder and b_dec are `frozen`, as published; SAELens trains them too.
    """

    sparsity: float
    frozen: bool = True
    positive: ClassVar[tuple[str, ...]] = ("sparsity",)

    def loss(self, now: Moment) -> Tensor:
        model, indices = now.dictionary, now.trace.codes.indices
        gated = model.select.rule == "positive" and model.router is not model.encoder and model.expert_rank == 1
        allowed(gated, f"{self} with {model.knobs}", "what gated_sae makes")
        known = now.trace.scores.gather(1, indices)
        gates = model.router.chosen(now.centred, indices, known).relu()  # all that are above zero
        write, bias = model.decoder.vectors(), now.inputs.new_zeros(()) if model.b_out is None else model.b_out
        write, bias = (write.detach(), bias.detach()) if self.frozen else (write, bias)
        guess = weighted_sum(gates, indices, write) + bias
        sparsity = self.sparsity * gates.sum() / (len(gates) * now.variance**0.5)
        return sparsity + normalised_mse(guess, now.target, now.variance)


@dataclass(frozen=True)
class Nested(Balance):
    """Matryoshka (Bussmann et al. 2025, arXiv 2503.17547): the errors of the first atoms alone, as many as `widths`.

    The choice is that of the whole dictionary, whose own error is the loss that is there already.
    """

    widths: tuple[int, ...]

    def __post_init__(self):
        good = bool(self.widths) and self.widths == tuple(sorted({*self.widths})) and self.widths[0] > 0
        allowed(good, f"widths={self.widths}", "a tuple of whole numbers that rise, from 1 on")

    def loss(self, now: Moment) -> Tensor:
        codes, model = now.trace.codes, now.dictionary
        allowed(self.widths[-1] < model.n_atoms, f"widths={self.widths}", f"less than {model.n_atoms}, all atoms")
        total = now.loss.new_zeros(())
        for width in self.widths:
            behind = model.decoder.combine(codes.values.where(codes.indices >= width, 0), codes.indices)
            total = total + normalised_mse(now.trace.output - behind, now.target, now.variance)
        return total


@dataclass(frozen=True)
class Ghost(Balance):
    """Ghost gradients (Jermyn & Templeton 2024): dead atoms predict the residual through an exponential.

    g = Σ_dead exp(z_j) d_j is scaled to half the residual's length, sample by sample, and its squared error to the
    reconstruction loss; both scales carry no gradient.
    """

    coefficient: float = 1.0
    silent_for: int = 100
    positive: ClassVar[tuple[str, ...]] = ("silent_for",)

    def loss(self, now: Moment) -> Tensor | float:
        dead = now.dead(self.silent_for)
        if not len(dead):
            return 0.0
        pre_acts = now.pre_acts(dead)
        # a factor per sample drops out in the rescaling below, so exp need not overflow
        ghost = (pre_acts - pre_acts.detach().amax(1, keepdim=True)).exp() @ now.dictionary.decoder.vectors(dead)
        residual = now.residual
        length = ghost.detach().norm(dim=1, keepdim=True)
        scale = residual.norm(dim=1, keepdim=True) / (2 * torch.where(length > 0, length, torch.inf))
        error = (scale * ghost - residual).square().sum()
        perfect = residual.square().sum() <= now.rounding
        return self.coefficient * error * (now.loss / torch.where(perfect, torch.inf, error)).detach()


@dataclass(frozen=True)
class Resample(Balance):
    """Neuron resampling (Bricken et al. 2023, appendix): dead atoms start anew at inputs that are badly reconstructed.

    At every `every`-th step until the share `until` of the run, each atom that was silent for half of `every` draws a
    sample of the batch with probability ∝ (its squared error)^`power`: 2, or 1 in paper B. Decoder: the sample, centred
    by b_in, at length 1 (or its residual: `toward`), a packed atom's part of it. Encoder: the same direction at `scale`
    times the mean length of the live rows; bias 0; Adam's moments of these rows 0. Atoms that cannot have any of their
    sample, packed ones, stay as they are, and all do on a batch that is rebuilt perfectly.
    """

    every: int = 250
    scale: float = 0.2
    until: float = 0.8
    toward: str = "input"
    seed: int = 0
    power: float = 2.0
    positive: ClassVar[tuple[str, ...]] = ("every", "scale")

    def __post_init__(self):
        super().__post_init__()
        settings.one_of("toward", self.toward, ("input", "residual"))

    @torch.no_grad()
    def after_step(self, now: Moment) -> None:
        done = now.step + 1
        dead = now.dead(max(1, self.every // 2))
        if done % self.every or done > self.until * now.steps or not len(dead):
            return
        if not now.residual.square().sum() > now.rounding:  # nor where it is no number: the loss says so
            return
        model, alive = now.dictionary, torch.ones_like(now.silent, dtype=torch.bool)
        alive[dead] = False
        start = self._starts(now, len(dead))
        lengths = model.encoder.weight[alive if alive.any() else ~alive].norm(dim=1)
        rows, same = (unit(part.restrict(start, dead)) for part in (model.decoder, model.encoder))
        able = rows.any(1) & same.any(1)  # a packed atom may have no place where its sample is not zero
        dead = dead[able]
        model.decoder.weight[dead] = rows[able]
        if model.encoder is not model.decoder:
            model.encoder.weight[dead] = self.scale * lengths.mean() * same[able]
        same_rows = [rows for rows in (model.encoder, model.router) if rows.weight is model.encoder.weight]
        biases = [rows.bias for rows in same_rows if rows.bias is not None]
        for bias in biases:
            bias[dead] = 0
        for parameter in (model.decoder.weight, model.encoder.weight, *biases):
            state = {} if now.optimiser is None else now.optimiser.state.get(parameter, {})
            for name in {"exp_avg", "exp_avg_sq"} & set(state):
                state[name][dead] = 0
        now.silent[dead] = 0

    def _starts(self, now: Moment, n: int) -> Float[Tensor, "n d_in"]:
        """Samples of the batch that are badly reconstructed, or what is left of them."""
        chances = now.residual.cpu().double().square().sum(1) ** self.power  # the same draws on every device
        random = settings.generator(settings.mix(self.seed, now.step))
        rows = torch.multinomial(chances, n, replacement=True, generator=random).to(now.inputs.device)
        return (now.residual if self.toward == "residual" else now.centred)[rows]


@dataclass(frozen=True)
class Anneal(Balance):
    """k-annealing (Makhzani & Frey 2013, §4.2): start with `start`·k chosen features and fall to k on a straight line
    over the first share `over` of the run, so that every feature is trained before the choice gets tight."""

    start: float = 4.0
    over: float = 0.5

    def __post_init__(self):
        good = self.start >= 1 and 0 < self.over <= 1
        allowed(good, f"start={self.start}, over={self.over}", "start at least 1, over above 0 and at most 1")

    def k_at(self, k: int, done: float) -> int:
        return round(k * (1 + (self.start - 1) * max(0.0, 1 - done / self.over)))
