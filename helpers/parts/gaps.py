"""Three knobs between a TopK SAE and the layer of a mixture of experts, each turned alone: rank, training, objective.

A `FrozenLayer` holds one layer of a frozen language model with rows and texts. A `StandIn` is the problem of a student
with a place in it: its output stands for what enters the MLP, or for what leaves it. The remedy `EndToEnd` says what
trains it: the squared error of that site, or the model's own loss. Every student sees the same pieces of text and is
judged on held-out articles: FVU, nats added to the model's loss, dead atoms.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helpers import settings
from helpers.dictionary import RankOneDictionary, Rows, SparseCodes, Trace, secret_moe, topk_sae
from helpers.models import activations
from helpers.models.teachers import Splice, Teacher
from helpers.parts.language_model import SPLITS, ablated, by_article
from helpers.settings import allowed, one_of
from helpers.study.scores import FEWEST, by_group, evaluate
from helpers.study.study import Arm, Judged, Outcome, sums
from helpers.training import Shuffled
from helpers.training.remedies import Balance, Moment

SITE = {"reconstruct": "mlp_in", "predict": "mlp_out"}
"""Where a student's output stands: a reconstruction goes into the MLP, a prediction takes the MLP's place."""
SIGNALS = {"local": 1.0, "fine-tuned": 0.5, "end to end": 0.0}
"""What trains a student: up to this share of the steps its own squared error, from there on the model's loss."""


# -- students ----------------------------------------------------------------------------------------------------------


class Scaled(Rows):
    """Decoder rows whose sum is multiplied by one number, so that gates which add to 1 can average 1."""

    def __init__(self, weight: Tensor, scale: float):
        super().__init__(weight)
        self.register_buffer("scale", torch.full((1,), float(scale), dtype=weight.dtype))  # as part of a key

    def combine(self, values: Float[Tensor, "batch k"], indices: Int[Tensor, "batch k"]) -> Float[Tensor, "batch d"]:
        return super().combine(values * self.scale, indices)

    def vectors(self, only: Tensor | None = None) -> Float[Tensor, "n d"]:
        return super().vectors(only) * self.scale


def family(kind: str, active: int, total: int, rank: int = 1, signal: str = "local") -> Arm:
    """An arm of the family: `mixture` of any rank, `topk` (untied: a TopK SAE, or transcoder) or `tied`.

    Raises `ValueError` for another kind or signal, for more active neurons than there are, and for a rank that does not
    divide both numbers, or that is not 1 where there is no mixture.
    """
    one_of("kind", kind, ("mixture", "topk", "tied"))
    allowed(kind == "mixture" or rank == 1, f"rank={rank} has no pre-activation to choose by", f"1 for kind={kind!r}")
    allowed(1 <= active <= total, f"active={active} neurons cannot be chosen", f"1 to total={total}")
    divides = rank >= 1 and active % rank == 0 == total % rank
    allowed(divides, f"rank={rank} does not divide", f"a divisor of active={active} and total={total}")
    name = f"{kind} {active // rank} of {total // rank}" + (f" × {rank}" if rank > 1 else "")
    build = partial(mixture, active, total, rank) if kind == "mixture" else partial(topk, active, total, kind == "tied")
    return Arm(name, build, EndToEnd(signal))


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
        Scaled(plain.decoder.weight.detach(), active // rank),
        k=active // rank,
        router=Rows(plain.router.weight.detach()[: total // rank].clone()),
        gate="softmax",
        activation="gelu",
        b_in=b_in,
        b_out=b_out,
        expert_rank=rank,
    )


def topk(active: int, total: int, tied: bool, problem: StandIn, seed: int) -> RankOneDictionary:
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


# -- the layer, and students in it -------------------------------------------------------------------------------------


class FrozenLayer:
    """One layer of a frozen model, harvested: by split `stores` of the rows that enter and leave its MLP, the `pieces`
    of text they come from (cut by `activations.texts(teacher, **texts[split])`), and the model's loss there.

    Students see rows divided by one number for each site (the root of the training rows' mean variance). `sizes` are
    the tokens of train, validation and test. Raises `ValueError` for a split without a size, for test text of fewer
    than five articles, over which no interval can be given, and what `activations.harvest` raises.
    """

    def __init__(
        self,
        teacher: Teacher,
        corpus: str,
        *,
        layer: int,
        sizes: Mapping[str, int],
        max_length: int = 128,
        cache_dir: str | Path | None = None,
    ):
        allowed(set(sizes) == set(SPLITS), f"sizes={dict(sizes)}", f"one for each of {', '.join(SPLITS)}")
        self.teacher, self.number, how = teacher, layer, {"corpus": corpus, "max_length": max_length}
        self.texts = {split: how | {"split": split, "n_tokens": n} for split, n in sizes.items()}
        self.pieces = {split: activations.texts(teacher, **each) for split, each in self.texts.items()}
        articles = len(np.unique(self.pieces["test"].articles))
        given = f"corpus={corpus!r}: {sizes['test']} held-out tokens come from {articles} documents"
        allowed(articles >= FEWEST, given, f"at least {FEWEST}, by more tokens or a corpus of {3 * FEWEST} documents")
        where = {"layer": layer, "sites": list(SITE.values()), "cache_dir": cache_dir}
        self.stores = {split: activations.harvest(teacher, **where, **each) for split, each in self.texts.items()}

    @property
    def asked(self) -> list:
        """What determines it, for keys."""
        return [self.teacher.fingerprint, self.number, {split: store.key for split, store in self.stores.items()}]

    @cached_property
    def scale(self) -> dict[str, float]:
        return {site: self.stores["train"].moments(site).variance ** 0.5 for site in SITE.values()}

    def mean(self, site: str) -> Float[Tensor, " d"]:
        """Mean of the training rows, divided as they are."""
        return (self.stores["train"].moments(site).mean / self.scale[site]).float()

    def rows(self, split: str, site: str) -> Float[Tensor, "rows d"]:
        return self.stores[split].tensor(site) / self.scale[site]

    def nats(self, split: str, splice: Splice | None = None, model: Teacher | None = None) -> pd.DataFrame:
        """`by_article` of this model, or another, on a split."""
        return by_article(model or self.teacher, self.pieces[split], splice)

    @cached_property
    def unspliced(self) -> dict[str, Float[np.ndarray, " articles"]]:
        """What every splice is compared with, by test article: the loss `clean`, with the MLP's output at `zero` and
        at its training `mean`, and the `tokens` predicted."""
        clean, mean = self.nats("test"), self.stores["train"].moments("mlp_out").mean
        columns = {"clean": clean.nats.to_numpy(), "tokens": clean.tokens.to_numpy(float)}
        return columns | ablated(self.teacher, self.pieces["test"], self.number, "mlp_out", mean)


@dataclass(frozen=True, eq=False)
class StandIn:
    """The problem of a student in a layer (`study.Problem`): it reads what enters the MLP, and its output goes into the
    MLP ("reconstruct"), or takes the place of what the MLP returns ("predict").

    Args:
        batch_size: pieces of text in a batch.
    """

    layer: FrozenLayer
    objective: str
    steps: int
    batch_size: int

    def __post_init__(self):
        one_of("objective", self.objective, SITE)

    @property
    def site(self) -> str:
        return SITE[self.objective]

    @property
    def biases(self) -> tuple[Float[Tensor, " d"], Float[Tensor, " d"]]:
        """Where b_in and b_out start."""
        return self.layer.mean("mlp_in"), self.layer.mean(self.site)

    def stream(self, seed: int, device: torch.device) -> PieceStream:
        return PieceStream(self, seed)

    def splice(self, student: nn.Module) -> Splice:
        """The student in its place in the model."""
        where, scale = next(student.parameters()), self.layer.scale

        def put(rows: Tensor) -> Tensor:
            return student(rows.to(where.device, where.dtype) / scale["mlp_in"]) * scale[self.site]

        return Splice(self.layer.number, "mlp_in" if self.objective == "reconstruct" else "mlp", put)

    def judge(self, student: nn.Module, seed: int) -> Judged:
        """Sums by test article: `errors` and `norms` of the site, `nats` of the spliced model and of `unspliced` ones.

        `about`: how often each atom is active, parameters, multiply-adds of a token and the router's part of them
        (those are of the family's members; None elsewhere).
        """
        seen, spliced, splice = {}, {}, self.splice(student)
        for split in SPLITS[1:]:
            seen[split] = evaluate(student, *(self.layer.rows(split, site) for site in ("mlp_in", self.site)))
            spliced[split] = self.layer.nats(split, splice)
        rows = {"errors": seen["test"].squared_error, "norms": seen["test"].squared_norm}
        found = {name: by_group(values, self.layer.stores["test"].article) for name, values in rows.items()}
        found |= {"nats": spliced["test"].nats.to_numpy()} | self.layer.unspliced
        unseen = spliced["validation"]
        own = student if isinstance(student, RankOneDictionary) and student.k else None
        about = {
            "objective": self.objective,
            "rates": seen["test"].rates.numpy(),
            "parameters": sum(p.numel() for p in student.parameters()),
            "multiply_adds": own and own.multiply_adds,
            "router": own and own.router.weight.numel(),
        }
        validation = {"fvu": seen["validation"].fvu, "nats": float(unseen.nats.sum() / unseen.tokens.sum())}
        return Judged(found, validation, about)


class PieceStream:
    """Batches of whole pieces of text, each epoch in a new order: the rows of a problem, and the tokens behind them.

    Squared errors need only rows; the model's loss needs the texts. Both signals get these batches.
    """

    def __init__(self, problem: StandIn, seed: int):
        self.layer, self.site, rows = problem.layer, problem.site, problem.layer.stores["train"].rows
        self.lengths = np.bincount(rows["text"], minlength=len(self.layer.pieces["train"].tokens))
        self.starts = np.cumsum(self.lengths) - self.lengths
        about = {"batch_size": problem.batch_size, "seed": seed, "fingerprint": f"pieces of {self.layer.asked}"}
        self.numbers = Shuffled(np.arange(len(self.lengths)), **about)
        self.fingerprint = f"{self.numbers.fingerprint} at {self.site}"

    def pieces(self, step: int) -> list[int]:
        """Numbers of the pieces of this step's batch."""
        return self.numbers(step)[0].tolist()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in self.pieces(step)])
        store, scale = self.layer.stores["train"], self.layer.scale
        inputs, targets = (store.tensor(site, rows) / scale[site] for site in ("mlp_in", self.site))
        return inputs, targets

    def tokens(self, step: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Ids and mask of the same batch, whose kept tokens are the rows of `__call__` in the same order."""
        return self.layer.pieces["train"].padded(self.pieces(step))


@dataclass(frozen=True)
class EndToEnd(Balance):
    """Trains a student in its place in the model, over a `PieceStream`: from the share `SIGNALS[signal]` of the steps
    on it adds cross-entropy (nats per token) minus the squared error, so that the model's loss alone is left.

    Half-way Adam forgets its moments, whatever the signal is: those of the squared error would hold back the gradients
    of the loss, and a student that goes on with the squared error is to be equal in everything else.
    """

    signal: str = "local"

    def __post_init__(self):
        one_of("signal", self.signal, SIGNALS)

    @property
    def chosen_by(self) -> str:
        """The validation measure of what trains it, by which its learning rate is chosen."""
        return "fvu" if self.signal == "local" else "nats"

    def loss(self, now: Moment) -> Tensor | float:
        if now.optimiser is not None and now.step == math.ceil(now.steps / 2):
            now.optimiser.state.clear()
        if now.step < SIGNALS[self.signal] * now.steps:
            return 0.0
        layer, site = now.stream.layer, now.stream.site
        rows = now.trace.output.to(now.target.dtype) * layer.scale[site]
        splice = Splice(layer.number, site, lambda _: rows)
        found = layer.teacher.loss_with_gradient(*now.stream.tokens(now.step), splice)
        return found.nats[found.mask].mean() - now.loss


# -- what is said of students ------------------------------------------------------------------------------------------


def whole(model: Teacher, on: FrozenLayer, seeds: Sequence[int]) -> list[Outcome]:
    """Another model on the layer's held-out text, as if its loss were that of a splice; it has no FVU.

    Raises `ValueError` where it cuts the text into other tokens: nats per token would be of different things.
    """
    cut = activations.texts(model, **on.texts["test"]), on.pieces["test"]
    theirs, ours = ([piece.tolist() for piece in pieces.tokens] for pieces in cut)
    allowed(theirs == ours, f"model={model.name!r} has another tokenizer", f"that of {on.teacher.name!r}")
    columns = {"nats": on.nats("test", model=model).nats.to_numpy()} | on.unspliced
    return [Outcome(columns, {}, seed=seed) for seed in seeds]


def row(outcomes: Sequence[Outcome], tried: Mapping[float, Outcome]) -> dict[str, object]:
    """A student as a table and a results file have it; intervals are 95 %, over articles and seeds. `tried` are the
    outcomes at each learning rate, first seed."""
    first, table = outcomes[0], sums({"": outcomes})
    fvu, added = table.fvu(""), table.compare(lambda cell: cell.added)
    rates = [np.asarray(each.about["rates"]) for each in outcomes]
    return {
        "cell": first.arm.name,
        "objective": first.about["objective"],
        "signal": first.arm.remedy.signal,
        "fvu": fvu.value,
        "fvu_ci": fvu.ci,
        "added": added.value,
        "added_ci": added.ci,
        "recovered": table.compare(lambda cell: cell.ce_recovered(), level=None).value,
        "recovered_mean": table.compare(lambda cell: cell.ce_recovered("mean"), level=None).value,
        "dead": float(np.mean([(each == 0).mean() for each in rates])) if all(map(len, rates)) else None,
        "lr": first.arm.lr,
        "tried": {f"{lr:g}": [each.validation["nats"], each.validation["fvu"]] for lr, each in tried.items()},
        **{name: first.about[name] for name in ("parameters", "multiply_adds", "router")},
        "seeds": len(outcomes),
        "seconds": round(sum(each.seconds for each in outcomes), 1),
    }
