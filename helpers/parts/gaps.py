"""Three knobs between a TopK SAE and the layer of a mixture of experts, each turned alone: rank, training, objective.

A `Bench` holds one layer of a frozen language model with rows and texts; a `Cell` is a student with a place in the
model (its output stands for what enters the MLP, or for what leaves it) and a signal that trains it (the squared error
of that site, or the model's own loss). `trial` trains a cell on the same batches as every other cell, chooses the
learning rate on validation text and judges on held-out text: FVU, nats added to the model's loss, dead atoms.
"""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helpers import settings
from helpers.dictionary import RankOneDictionary, Rows, SparseCodes, Trace, secret_moe, topk_sae
from helpers.models import activations
from helpers.models.activations import ActivationStore, Texts
from helpers.models.teachers import Splice, Teacher
from helpers.study.scores import Comparison, by_group, compared, evaluate
from helpers.training import Fit, fit
from helpers.training.remedies import Balance, Moment

SPLITS = ("train", "validation", "test")
SITE = {"reconstruct": "mlp_in", "predict": "mlp_out"}
"""Where a student's output stands: a reconstruction goes into the MLP, a prediction takes the MLP's place."""
SIGNALS = {"local": 1.0, "fine-tuned": 0.5, "end to end": 0.0}
"""What trains a student: up to this share of the steps its own squared error, from there on the model's loss."""
KNOBS = ("rank", "training", "objective")
FEWEST = 5
"""Articles that an interval is given over."""


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


def mixture(
    active: int,
    total: int,
    rank: int,
    *,
    b_in: Float[Tensor, " d_in"],
    b_out: Float[Tensor, " d_out"],
    generator: torch.Generator,
) -> RankOneDictionary:
    """active/rank of total/rank experts of `rank` GELU neurons each, chosen by router rows of their own:

        y = b_out + Σ_{j chosen} g_j Σ_{i in expert j} GELU(e_i·(x − b_in) + β_i) d_i.

    The gates g are a softmax over the chosen experts' scores times their number, so that they average 1 at every rank.
    A seed gives the same neurons at every rank; the router of a higher rank is the beginning of that of rank 1.

    Raises:
        ValueError: for a rank that does not divide both `active` and `total`, or more active neurons than there are.
    """
    _check_shape(active, total, rank)
    plain = secret_moe(len(b_in), len(b_out), total, active, generator=generator, shared_neurons=0)
    return RankOneDictionary(
        plain.encoder,
        Scaled(plain.decoder.weight.detach(), active // rank),
        k=active // rank,
        router=Rows(plain.router.weight.detach()[: total // rank].clone()),
        gate="softmax",
        activation="gelu",
        b_in=b_in.clone(),
        b_out=b_out.clone(),
        expert_rank=rank,
    )


def _check_shape(active: int, total: int, rank: int) -> None:
    if not 1 <= active <= total:
        raise ValueError(f"active={active} neurons cannot be chosen; allowed: 1 to total={total}")
    if rank < 1 or active % rank or total % rank:
        raise ValueError(f"rank={rank} does not divide; allowed: a divisor of active={active} and total={total}")


def topk(
    active: int,
    total: int,
    *,
    b_in: Float[Tensor, " d"],
    b_out: Float[Tensor, " d"],
    generator: torch.Generator,
    tied: bool = False,
) -> RankOneDictionary:
    """A TopK SAE, or with another target a TopK transcoder: `topk_sae` with a bias of its own on each side.

    With `tied` (d_j = e_j, and one bias for both sides) it is the strict identification: E_j = d_j d_jᵀ.
    """
    sae = topk_sae(len(b_in), total, active, generator=generator, b_dec=b_in, tied=tied)
    if tied:
        return sae
    biases = {"b_in": b_in.clone(), "b_out": b_out.clone()}
    return RankOneDictionary(sae.encoder, sae.decoder, k=active, unit_norm=True, **biases)


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
        if router is None:
            raise ValueError(f"block={type(block).__name__} has no router; allowed: an MoE layer, not a dense MLP")
        router.register_forward_hook(self._note)
        self._noted: tuple[Tensor, Tensor] | None = None
        with torch.no_grad():
            self.trace(next(block.parameters()).new_zeros(1, d))
        self.n_features, self.k = self._noted[0].shape[1], self._noted[1].shape[1]
        self.n_atoms = self.n_features

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

    @property
    def n_parameters(self) -> int:
        return sum(p.numel() for p in self.parameters())

    def constrain_gradient_(self) -> None:
        """A production layer has no constraint."""

    def constrain_(self) -> None:
        """A production layer has no constraint."""


def fresh(mixture: Teacher, layer: int, seed: int) -> Block:
    """A model's MoE layer with new random weights, trainable: equal in class, shape and start."""
    block = copy.deepcopy(mixture.mlp(layer))  # which keeps how its experts are computed
    block.load_state_dict(mixture.randomised(seed).mlp(layer).state_dict())
    return Block(block.requires_grad_(True), mixture.d_model)


class _Units(nn.Module):
    """A module that is given rows divided by one number and whose output is divided by another."""

    def __init__(self, module: nn.Module, given: float, returned: float):
        super().__init__()
        self.module, self.given, self.returned = module, given, returned

    def forward(self, x: Float[Tensor, "batch d_in"]) -> Float[Tensor, "batch d_out"]:
        return self.module(x * self.given) / self.returned


def own(bench: Bench, seed: int) -> RankOneDictionary:
    """The model's own dense MLP as a student, with its trained weights: the family's member without atoms."""
    mlp = copy.deepcopy(bench.teacher.mlp(bench.layer)).requires_grad_(True)
    none = Rows(torch.empty(0, bench.teacher.d_model)), Rows(torch.empty(0, bench.teacher.d_model))
    units = _Units(mlp, bench.scale["mlp_in"], bench.scale["mlp_out"])
    return RankOneDictionary(*none, k=0, shared=units)


def equal_cost(active: int, total: int, rank: int) -> tuple[int, int]:
    """(active, total) neurons of the rank-1 mixture that costs as many multiply-adds as this one of rank `rank`.

    With d numbers a row both cost (router rows + 2·active)·d; the ratio total/active stays, so active' is
    active·(total/(rank·active) + 2)/(total/active + 2), rounded down.
    """
    ratio = total / active
    fewer = max(1, math.floor(active * (ratio / rank + 2) / (ratio + 2) + 1e-9))
    return fewer, round(fewer * ratio)


# -- the bench ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Bench:
    """One layer of a frozen model: rows that enter and leave its MLP, the texts they come from, and the model's loss.

    Students see rows divided by one number for each site (the root of the training rows' mean variance).
    """

    teacher: Teacher
    layer: int
    corpus: str
    stores: Mapping[str, ActivationStore]
    pieces: Mapping[str, Texts]
    sizes: Mapping[str, int]
    max_length: int

    def __repr__(self) -> str:  # part of a run's key, through `EndToEnd`
        keys = ", ".join(f"{split} {store.key}" for split, store in self.stores.items())
        return f"Bench({self.teacher.fingerprint}, layer {self.layer}, {keys})"

    @cached_property
    def scale(self) -> dict[str, float]:
        return {site: self.stores["train"].moments(site).variance ** 0.5 for site in SITE.values()}

    @cached_property
    def mean(self) -> dict[str, Float[Tensor, " d"]]:
        """Means of the training rows, divided as they are."""
        return {s: (self.stores["train"].moments(s).mean / self.scale[s]).float() for s in SITE.values()}

    def rows(self, split: str, site: str) -> Float[Tensor, "rows d"]:
        return self.stores[split].tensor(site) / self.scale[site]

    def nats(self, split: str, splice: Splice | None = None) -> pd.DataFrame:
        """Cross-entropy by article: columns `nats` (sums) and `tokens`."""
        return nats(self.teacher, self.pieces[split], splice)

    @cached_property
    def clean(self) -> dict[str, pd.DataFrame]:
        return {split: self.nats(split) for split in SPLITS[1:]}

    @cached_property
    def ablated(self) -> dict[str, pd.DataFrame]:
        """The test text's loss with the MLP's output at `zero`, and at its training `mean`."""
        mean = self.stores["train"].moments("mlp_out").mean
        return {
            "zero": self.nats("test", Splice.zero(self.layer, "mlp_out")),
            "mean": self.nats("test", Splice.mean(self.layer, "mlp_out", mean)),
        }

    def splice(self, student: nn.Module, objective: str) -> Splice:
        """The student in the model: its reconstruction goes into the MLP, its prediction takes the MLP's place."""
        where, site = next(student.parameters()), SITE[objective]

        def put(rows: Tensor) -> Tensor:
            return student(rows.to(where.device, where.dtype) / self.scale["mlp_in"]) * self.scale[site]

        return Splice(self.layer, "mlp_in" if objective == "reconstruct" else "mlp", put)


def nats(teacher: Teacher, pieces: Texts, splice: Splice | None = None) -> pd.DataFrame:
    """A model's cross-entropy by article: columns `nats` (sums) and `tokens`, indexed by article."""
    return activations.losses(teacher, pieces, splice).groupby("article")[["nats", "tokens"]].sum()


def bench(
    teacher: Teacher,
    corpus: str,
    *,
    layer: int,
    sizes: Mapping[str, int],
    max_length: int = 128,
    cache_dir: str | Path | None = None,
) -> Bench:
    """Harvest one layer; `sizes` are the tokens of train, validation and test.

    Raises `ValueError` for a split without a size, for test text of fewer than five articles, over which no interval
    can be given, and what `activations.harvest` raises.
    """
    if set(sizes) != set(SPLITS):
        raise ValueError(f"sizes={dict(sizes)}; allowed: one for each of {', '.join(SPLITS)}")
    how = {"max_length": max_length}
    pieces = {split: activations.texts(teacher, corpus, n_tokens=n, split=split, **how) for split, n in sizes.items()}
    if (articles := len(np.unique(pieces["test"].articles))) < FEWEST:
        raise ValueError(f"{sizes['test']} test tokens hold {articles} articles; allowed: at least {FEWEST}")
    stores = {
        split: activations.harvest(
            teacher, corpus, layer=layer, sites=list(SITE.values()), n_tokens=n, split=split, cache_dir=cache_dir, **how
        )
        for split, n in sizes.items()
    }
    return Bench(teacher, layer, corpus, stores, pieces, dict(sizes), max_length)


class Pieces:
    """Batches of whole pieces of text, each epoch in a new order: the rows of `objective`, and the tokens behind them.

    Squared errors need only rows; the model's loss needs the texts. Both signals get these batches.
    """

    def __init__(self, bench: Bench, objective: str, *, batch_size: int, seed: int):
        lengths = np.bincount(bench.stores["train"].rows["text"], minlength=len(bench.pieces["train"].tokens))
        if not 1 <= batch_size <= len(lengths):
            raise ValueError(f"batch_size={batch_size} pieces cannot be filled; allowed: 1 to {len(lengths)}")
        self.bench, self.site, self.batch_size, self.seed = bench, SITE[objective], batch_size, seed
        self.starts, self.lengths = np.cumsum(lengths) - lengths, lengths
        self.fingerprint = f"pieces({bench!r}, {objective}, batch={batch_size}, seed={seed})"

    def pieces(self, step: int) -> list[int]:
        """Numbers of the pieces of this step's batch."""
        epoch, at = divmod(step, len(self.lengths) // self.batch_size)
        order = torch.randperm(len(self.lengths), generator=settings.generator(settings.mix(self.seed, epoch)))
        return order[at * self.batch_size : (at + 1) * self.batch_size].tolist()

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        rows = np.concatenate([np.arange(self.starts[i], self.starts[i] + self.lengths[i]) for i in self.pieces(step)])
        store, scale = self.bench.stores["train"], self.bench.scale
        inputs, targets = (store.tensor(site, rows) / scale[site] for site in ("mlp_in", self.site))
        return inputs, targets

    def tokens(self, step: int) -> tuple[Int[Tensor, "batch seq"], Int[Tensor, "batch seq"]]:
        """Ids and mask of the same batch, whose kept tokens are the rows of `__call__` in the same order."""
        return self.bench.pieces["train"].padded(self.pieces(step))


@dataclass(frozen=True)
class EndToEnd(Balance):
    """Trains a student in its place in the model on the model's loss alone, from the share `start` of the steps on:
    what it adds to the squared error is cross-entropy (nats per token) minus that squared error.

    Half-way Adam forgets its moments, whatever `start` is: those of the squared error would hold back the gradients of
    the loss, and a student that goes on with the squared error is to be equal in everything else.
    """

    stream: Pieces = field(repr=False, compare=False)
    named: str
    start: float = 0.0

    def loss(self, now: Moment) -> Tensor | float:
        if now.optimiser is not None and now.step == math.ceil(now.steps / 2):
            now.optimiser.state.clear()
        if now.step < self.start * now.steps:
            return 0.0
        bench, site = self.stream.bench, self.stream.site
        rows = now.trace.output * bench.scale[site]
        splice = Splice(bench.layer, site, lambda _: rows)
        found = bench.teacher.loss_with_gradient(*self.stream.tokens(now.step), splice)
        return found.nats[found.mask].mean() - now.loss


# -- cells -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A student with its place and its signal. `build` is given the bench and a seed."""

    name: str
    build: Callable[[Bench, int], nn.Module]
    objective: str = "predict"
    signal: str = "local"

    def __post_init__(self):
        for what, value, allowed in (("objective", self.objective, SITE), ("signal", self.signal, SIGNALS)):
            if value not in allowed:
                raise ValueError(f"{what}={value!r} is unknown; allowed: {', '.join(map(repr, allowed))}")


def family(kind: str, active: int, total: int, rank: int = 1, **place: str) -> Cell:
    """A cell of the family: `mixture` of any rank, `topk` (untied) or `tied`, with means for its biases at the start.

    Raises `ValueError` for another kind, a shape that it cannot have, and `tied` where it cannot be.
    """
    if kind not in ("mixture", "topk", "tied"):
        raise ValueError(f"kind={kind!r} is unknown; allowed: 'mixture', 'topk', 'tied'")
    if kind == "tied" and place.get("objective") != "reconstruct":
        raise ValueError("kind='tied' shares one bias between input and output; allowed: objective='reconstruct'")
    if kind != "mixture" and rank != 1:
        raise ValueError(f"rank={rank} has no pre-activation to choose by; allowed for kind={kind!r}: 1")
    _check_shape(active, total, rank)

    def build(bench: Bench, seed: int) -> RankOneDictionary:
        site = SITE[place.get("objective", "predict")]
        how = {"b_in": bench.mean["mlp_in"], "b_out": bench.mean[site], "generator": settings.generator(seed)}
        if kind == "mixture":
            return mixture(active, total, rank, **how)
        return topk(active, total, tied=kind == "tied", **how)

    of = f"{active // rank} of {total // rank}" + (f" × {rank}" if rank > 1 else "")
    return Cell(f"{kind} {of}, {', '.join(place.values())}".rstrip(", "), build, **place)


@dataclass(frozen=True)
class Outcome:
    """A trained cell on held-out text: sums by article, for each seed.

    `errors`, `norms`: squared errors of the site and squared distances from its mean; `nats`: the spliced model's
    loss. `tried`: for each learning rate its validation nats and FVU, first seed.
    """

    cell: Cell
    lr: float
    tried: dict[float, tuple[float, float]]
    fits: list[Fit]
    errors: Float[np.ndarray, "seeds articles"]
    norms: Float[np.ndarray, " articles"]
    nats: Float[np.ndarray, "seeds articles"]
    dead: list[float]
    base: Reference

    @property
    def student(self) -> nn.Module:
        return self.fits[0].student

    @property
    def fvu(self) -> float:
        return float(self.errors.mean(0).sum() / self.norms.sum())

    @property
    def added(self) -> float:
        """Nats per token that the splice adds to the model's loss."""
        return float((self.nats.mean(0) - self.base.clean).sum() / self.base.tokens.sum())

    def recovered(self, ablation: str = "zero") -> float:
        """CE recovered against `zero` or `mean` ablation of the MLP's output, whatever site the student stands at."""
        worst = getattr(self.base, ablation).sum()
        return float((worst - self.nats.mean(0).sum()) / (worst - self.base.clean.sum()))

    def row(self) -> dict[str, object]:
        """The cell as a table and a results file have it; intervals are 95 %, over articles and seeds.

        `multiply_adds` of one token, and the router's part of them, are those of the family's members; None elsewhere.
        """
        own = self.student if isinstance(self.student, RankOneDictionary) and self.student.k else None
        return {
            "cell": self.cell.name,
            "objective": self.cell.objective,
            "signal": self.cell.signal,
            "fvu": self.fvu,
            "fvu_ci": estimate({"": self}, lambda sums: fvu(sums[""]), n_resamples=1000).ci,
            "added": self.added,
            "added_ci": estimate({"": self}, lambda sums: added(sums[""]), n_resamples=1000).ci,
            "recovered": self.recovered(),
            "recovered_mean": self.recovered("mean"),
            "dead": None if np.isnan(self.dead).any() else float(np.mean(self.dead)),
            "lr": self.lr,
            "tried": {f"{lr:g}": pair for lr, pair in self.tried.items()},
            "parameters": self.student.n_parameters,
            "multiply_adds": own and own.multiply_adds,
            "router": own and own.router.weight.numel(),
            "seeds": len(self.fits),
            "seconds": round(sum(fit.seconds for fit in self.fits), 1),
        }


@dataclass(frozen=True)
class Reference:
    """The unspliced model's loss by article, and with the MLP ablated; `tokens` are those predicted."""

    clean: Float[np.ndarray, " articles"]
    zero: Float[np.ndarray, " articles"]
    mean: Float[np.ndarray, " articles"]
    tokens: Float[np.ndarray, " articles"]


def trial(
    on: Bench,
    cell: Cell,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    device: str | torch.device = "cpu",
    further: int = 0,
    cache_dir: str | Path | None | Literal[False] = None,
    **recipe,
) -> Outcome:
    """Train a cell: every learning rate with the first seed, then with the other seeds the one that is best on
    validation text in what trains the cell, FVU or the loss of the spliced model. Every cell of a seed sees the same
    batches, and is judged alike.

    Args:
        lrs: rising; where the best is the first or the last, the grid is continued there by the factor between its
            last two rates, `further` times at most.
        batch_size: pieces of text in a batch.
        recipe: further arguments of `training.fit`.
    """
    if not seeds:
        raise ValueError(f"seeds={list(seeds)}; allowed: at least one")
    if not lrs or list(lrs) != sorted(set(lrs)) or lrs[0] <= 0:
        raise ValueError(f"lrs={list(lrs)}; allowed: positive rates that rise")
    if not 0 <= further <= (20 if len(lrs) > 1 else 0):
        raise ValueError(f"further={further} with lrs={list(lrs)}; allowed: 0 to 20, and 0 with a single rate")

    def train(rates: Sequence[float], seed: int) -> dict[float, Fit]:
        stream = Pieces(on, cell.objective, batch_size=batch_size, seed=seed)
        start = SIGNALS[cell.signal]
        balance = EndToEnd(stream, stream.fingerprint, start)
        named = {f"{lr:g}": cell.build(on, seed).to(device) for lr in rates}
        fits = fit(
            named, stream, steps=steps, lr={f"{lr:g}": lr for lr in rates}, balance=balance, cache_dir=cache_dir,
            label=f"{cell.name}, seed {seed}", **recipe,
        )  # fmt: skip
        return {lr: fits[f"{lr:g}"] for lr in rates}

    first, tried, wanted = {}, {}, list(lrs)
    for _ in range(further + 1):
        first |= train(wanted, seeds[0])
        tried |= {lr: _tried(on, cell, first[lr].student) for lr in wanted}
        best = min(tried, key=lambda lr: tried[lr][cell.signal == "local"])
        if best not in (min(tried), max(tried)) or len(lrs) == 1:
            break
        factor = lrs[-1] / lrs[-2]
        wanted = [best / factor if best == min(tried) else best * factor]
    fits = [first[best], *(train([best], seed)[best] for seed in seeds[1:])]
    errors, norms, losses, dead = zip(*(_judge(on, cell, each.student) for each in fits), strict=True)
    return Outcome(cell, best, tried, fits, np.stack(errors), norms[0], np.stack(losses), list(dead), reference(on))


def whole(model: Teacher, on: Bench, name: str, n_seeds: int = 1) -> Outcome:
    """Another model on the bench's held-out text, as if its loss were that of a splice; it has no FVU.

    Raises `ValueError` where it cuts the text into other tokens: nats per token would be of different things.
    """
    how = {"n_tokens": on.sizes["test"], "split": "test", "max_length": on.max_length}
    theirs, ours = activations.texts(model, on.corpus, **how), on.pieces["test"]
    if [t.tolist() for t in theirs.tokens] != [t.tolist() for t in ours.tokens]:
        raise ValueError(f"model={model.name!r} has another tokenizer; allowed: that of {on.teacher.name!r}")
    found = nats(model, ours).nats.to_numpy()
    nothing, many = np.full(len(found), np.nan), (n_seeds, len(found))
    cell = Cell(name, lambda bench, seed: model.mlp(on.layer))
    return Outcome(
        cell, math.nan, {}, [], np.full(many, np.nan), nothing, np.broadcast_to(found, many), [], reference(on)
    )


def reference(on: Bench) -> Reference:
    """What every splice of this bench is compared with."""
    clean = on.clean["test"]
    ablated = {name: frame.nats.to_numpy() for name, frame in on.ablated.items()}
    return Reference(clean.nats.to_numpy(), tokens=clean.tokens.to_numpy(float), **ablated)


def _tried(on: Bench, cell: Cell, student: nn.Module) -> tuple[float, float]:
    found = on.nats("validation", on.splice(student, cell.objective))
    rows = (on.rows("validation", site) for site in ("mlp_in", SITE[cell.objective]))
    return float(found.nats.sum() / found.tokens.sum()), evaluate(student, *rows).fvu


def _judge(on: Bench, cell: Cell, student: nn.Module) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Errors, norms and nats by article on the test text, and the share of dead atoms."""
    seen = evaluate(student, *(on.rows("test", site) for site in ("mlp_in", SITE[cell.objective])))
    article = torch.from_numpy(np.array(on.stores["test"].article, np.int64))
    errors, norms = (by_group(part, article) for part in (seen.squared_error, seen.squared_norm))
    spliced = on.nats("test", on.splice(student, cell.objective))
    return errors, norms, spliced.nats.to_numpy(), seen.dead


# -- what is said of several cells -------------------------------------------------------------------------------------


def estimate(cells: Mapping[str, Outcome], statistic: Callable[[dict], float], **bootstrap) -> Comparison:
    """A statistic of several cells' sums over articles; articles and seeds are resampled together for all of them.

    `statistic` is given `{name: {"errors", "norms", "nats", "clean", "zero", "mean", "tokens"}}`: sums over articles
    and seeds. All cells must have the same articles and as many seeds.
    """
    shapes = {each.nats.shape for each in cells.values()}
    if len(shapes) != 1:
        raise ValueError(f"cells have seeds × articles {sorted(shapes)}; allowed: the same for all")
    names, columns = list(cells), ("errors", "norms", "nats", "clean", "zero", "mean", "tokens")

    def sums(each: Outcome) -> np.ndarray:
        base = each.base
        parts = (each.errors, each.norms, each.nats, base.clean, base.zero, base.mean, base.tokens)
        return np.stack([np.broadcast_to(part, each.nats.shape) for part in parts], axis=-1)

    data = np.stack([sums(each) for each in cells.values()], axis=-2)  # [seeds, articles, cells, columns]

    def of(some: np.ndarray) -> float:
        table = some.sum((0, 1))
        return statistic({name: dict(zip(columns, row, strict=True)) for name, row in zip(names, table, strict=True)})

    return compared(data, of, **bootstrap)


def added(sums: Mapping[str, float]) -> float:
    """Nats per token that a splice adds."""
    return (sums["nats"] - sums["clean"]) / sums["tokens"]


def recovered(sums: Mapping[str, float], ablation: str = "zero") -> float:
    """CE recovered of a splice."""
    return (sums[ablation] - sums["nats"]) / (sums[ablation] - sums["clean"])


def fvu(sums: Mapping[str, float]) -> float:
    return sums["errors"] / sums["norms"]


# -- walks -------------------------------------------------------------------------------------------------------------

Corner = tuple[bool, bool, bool]
CORNERS: list[Corner] = list(itertools.product((False, True), repeat=3))
"""Which of `KNOBS` are turned: (full rank, joint, predict)."""


def walks(values: Mapping[Corner, float]) -> dict[tuple[str, ...], dict[str, float]]:
    """For each of the six orders of the knobs, what each step adds to the value; the steps of an order add up to the
    value of the last corner minus that of the first.

    Raises `ValueError` where a corner has no value.
    """
    step, found = edges(values), {}
    for order in itertools.permutations(KNOBS):
        turned, found[order] = [False] * 3, {}
        for knob in order:
            found[order][knob] = step[knob, tuple(turned)]
            turned[KNOBS.index(knob)] = True
    return found


def averages(values: Mapping[Corner, float]) -> dict[str, float]:
    """Each knob's step averaged over the six orders (its Shapley value)."""
    orders = walks(values).values()
    return {knob: float(np.mean([steps[knob] for steps in orders])) for knob in KNOBS}


def edges(values: Mapping[Corner, float]) -> dict[tuple[str, Corner], float]:
    """The steps that orders are made of: for each knob and each state of the two others (its own is off), what turning
    it adds. Twelve numbers, four a knob.

    Raises `ValueError` where a corner has no value.
    """
    if missing := [corner for corner in CORNERS if corner not in values]:
        raise ValueError(f"values has no {missing}; allowed: all eight corners")
    found = {}
    for at, knob in enumerate(KNOBS):
        for corner in CORNERS:
            if not corner[at]:
                found[knob, corner] = values[*corner[:at], True, *corner[at + 1 :]] - values[corner]
    return found


def interactions(values: Mapping[Corner, float]) -> dict[tuple[str, str, bool], float]:
    """For each pair of knobs, with the third off and on: the step of the first with the second turned minus its step
    without. Six numbers, all 0 exactly where gaps add."""
    steps, found = edges(values), {}
    for a, b in itertools.combinations(range(3), 2):
        third = 3 - a - b
        for on in (False, True):
            off = tuple(on if i == third else False for i in range(3))
            with_b = tuple(on if i == third else i == b for i in range(3))
            found[KNOBS[a], KNOBS[b], on] = steps[KNOBS[a], with_b] - steps[KNOBS[a], off]
    return found
