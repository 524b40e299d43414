"""Distil a language model's MLP into students, dense and sparse, on its inputs and on inputs with less structure."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helpers import kept, settings
from helpers.dictionary import RankOneDictionary, dense_mlp, secret_moe
from helpers.models.activations import ActivationStore, Moments
from helpers.models.corpora import SPLITS
from helpers.models.teachers import Teacher
from helpers.parts.language_model import codes_on
from helpers.settings import CacheDir, allowed, one_of
from helpers.study import study
from helpers.study.scores import Comparison, Sums, Totals, by_group, evaluate
from helpers.study.study import Arm, Judged, Outcome
from helpers.training import Shuffled
from helpers.training.remedies import Balance

ROWS = 8192
"""Rows that pass through the teacher's MLP at once."""


# -- what is done to the inputs ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Change:
    """A way to make other inputs out of a model's. `apply(rows, generator)` gives as many rows."""

    name: str
    apply: Callable[[Float[Tensor, "n d"], torch.Generator], Float[Tensor, "n d"]]


REAL = Change("real", lambda rows, generator: rows)


def gaussian(moments: Moments) -> Change:
    """Draws of the Gaussian with the same mean and covariance, one for each row."""
    return Change("gaussian", lambda rows, generator: moments.sample(len(rows), generator))


def shuffled(moments: Moments) -> Change:
    """Each principal coordinate permuted over the rows, independently of the others.

    Mean, covariance and every coordinate's own distribution stay; which coordinates are large together does not.
    """
    _, axes = _spectrum(moments)

    def apply(rows: Tensor, generator: torch.Generator) -> Tensor:
        coordinates = (rows - moments.mean.float()) @ axes
        for column in coordinates.T:
            column.copy_(column[torch.randperm(len(rows), generator=generator)])
        return coordinates @ axes.T + moments.mean.float()

    return Change("shuffled", apply)


def recoloured(moments: Moments, seed: int = 0) -> Change:
    """x → μ + C^½ Q C^−½ (x − μ) with one random rotation Q, which is the same for every row.

    Mean and covariance stay, and so does sparsity (in another dictionary, C^½ Q C^−½ times the old one); what is lost
    is the alignment of that dictionary with the teacher's weights.
    """
    values, axes = _spectrum(moments)
    normal = torch.randn(len(values), len(values), generator=settings.generator(seed), dtype=torch.float64)
    q, r = torch.linalg.qr(normal)
    rotation = q * torch.diagonal(r).sign()
    roots = values.clamp(min=values[-1] * 1e-9).sqrt()
    basis = axes.double()
    move = ((basis * roots) @ basis.T @ rotation @ (basis / roots) @ basis.T).float()
    mean = moments.mean.float()
    return Change(f"recoloured({seed})", lambda rows, generator: (rows - mean) @ move.T + mean)


def without_top(moments: Moments, count: int) -> Change:
    """The `count` principal directions of largest variance removed: along them every row is at the mean."""
    allowed(0 <= count < len(moments.mean), f"count={count} directions", f"0 to {len(moments.mean) - 1}")
    top = _spectrum(moments)[1][:, len(moments.mean) - count :]
    return Change(f"without_top({count})", lambda rows, generator: rows - (rows - moments.mean.float()) @ top @ top.T)


def with_padding(row: Float[Tensor, " d"], share: float) -> Change:
    """A share of the rows, chosen at random, replaced by one padding row."""
    allowed(0 <= share < 1, f"share={share} of padding", "0 up to below 1")

    def apply(rows: Tensor, generator: torch.Generator) -> Tensor:
        lost = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]
        return rows.index_copy(0, lost, row.float().expand(len(lost), -1))

    return Change(f"with_padding({share:g})", apply)


def _spectrum(moments: Moments) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues in rising order (float64) and eigenvectors as columns (float32)."""
    values, axes = torch.linalg.eigh(moments.cov)
    return values, axes.float()


# -- the task ----------------------------------------------------------------------------------------------------------

COSTS = {"neurons": "active_neurons", "multiply_adds": "multiply_adds", "parameters": "n_parameters"}
"""What two students may have equal when their errors are compared, and where a student says it."""


class Pairs(NamedTuple):
    """Rows in and out of the MLP; `article` is the one that each row comes from, or took the place of."""

    inputs: Float[Tensor, "n d_in"]
    outputs: Float[Tensor, "n d_out"]
    article: Int[np.ndarray, " n"]


class Task:
    """What students learn and are judged by, a problem for `study`: the MLP's inputs, changed, with what the MLP itself
    returns for them, computed once, for every student.

    The three splits (`train`, `validation` and `test`: `Pairs`) are changed with draws of their own. What the MLP
    returns is kept in the cache folder (4·n·d bytes for each change); rows are held in memory (8·n·d bytes).

    Args:
        stores: `train`, `validation` and `test`, with the site `mlp_in` of this teacher and layer.
        judged_on: another change for validation and test (`REAL` for students that trained with padding).
        scaled: divide outputs by the standard deviation of the training ones (`scale`: the root of their mean variance
            over dimensions), so that a student with PyTorch's usual start begins with outputs of their size. FVU does
            not depend on it, but where training starts does.
    """

    def __init__(
        self,
        teacher: Teacher,
        layer: int,
        stores: Mapping[str, ActivationStore],
        change: Change = REAL,
        *,
        steps: int,
        batch_size: int,
        judged_on: Change | None = None,
        scaled: bool = True,
        cache_dir: CacheDir = None,
    ):
        missing = sorted(set(SPLITS) - set(stores))
        allowed(not missing, f"stores has no {', '.join(missing)}", ", ".join(SPLITS))
        self.name = change.name if scaled else f"{change.name}, unscaled"
        self.steps, self.batch_size, self.scale = steps, batch_size, 1.0
        for number, split in enumerate(SPLITS):
            how = change if split == "train" or judged_on is None else judged_on
            inputs = how.apply(stores[split].tensor("mlp_in"), settings.generator(1000 + number))
            make = partial(outputs_of, teacher.mlp(layer), inputs)
            outputs = kept.keep("targets", [stores[split].key, inputs], make, cache_dir=cache_dir)
            if split == "train" and scaled:
                self.scale = float(outputs.var(0).mean()) ** 0.5
            setattr(self, split, Pairs(inputs, outputs.div_(self.scale), np.array(stores[split].article)))

    @property
    def widths(self) -> tuple[int, int]:
        return self.train.inputs.shape[1], self.train.outputs.shape[1]

    @cached_property
    def asked(self) -> list:
        """All that determines results: for keys."""
        return [kept.digest(*self.train, *self.validation, *self.test), self.steps, self.batch_size]

    def stream(self, seed: int, device: torch.device) -> Shuffled:
        """A seed is an order of the batches, the same for every kind of student."""
        about = {"batch_size": self.batch_size, "seed": seed, "device": device, "fingerprint": self.asked[0]}
        return Shuffled(self.train.inputs, self.train.outputs, **about)

    def judge(self, student: RankOneDictionary, seed: int) -> Judged:
        """FVU on validation rows, sums over the rows of each test article, and what the student costs."""
        validation, test = (evaluate(student, each.inputs, each.outputs) for each in (self.validation, self.test))
        parts = {"errors": test.squared_error, "norms": test.squared_norm}
        sums = {column: by_group(values, self.test.article) for column, values in parts.items()}
        about = {name: getattr(student, cost) for name, cost in COSTS.items()}
        about |= {name: getattr(test, name) if student.k else None for name in ("dead", "largest_rate")}
        return Judged(sums, {"fvu": validation.fvu}, about)


@torch.no_grad()
def outputs_of(mlp: nn.Module, inputs: Float[Tensor, "n d_in"]) -> Float[Tensor, "n d_out"]:
    """What the MLP returns for every row, in float32 on the inputs' device."""
    where = next(mlp.parameters())
    parts = settings.progress(inputs.split(ROWS), "teacher's MLP", delay=2)
    return torch.cat([mlp(part.to(where.device, where.dtype)).float().to(inputs.device) for part in parts])


# -- students ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spec:
    """A kind of student: `active` neurons work on each input.

    Args:
        experts: single-neuron experts; 0 is the dense MLP.
        shared: neurons of the shared part; half of `active` if None. The rest of the active ones are experts.
        router_rank: rank of the router; None is a full one.
        balance: what is added to the loss against unused experts.
    """

    active: int
    experts: int = 0
    shared: int | None = None
    router_rank: int | None = 64
    balance: Balance = field(default_factory=Balance)

    def __post_init__(self):
        given = f"active={self.active}, experts={self.experts}"
        allowed(self.active >= 1 and self.experts >= 0, given, "at least 1 and at least 0")
        fits = not self.experts or 1 <= self.k <= self.experts
        allowed(fits, f"{given}, shared={self.shared} leave k={self.k} to choose", f"1 to {self.experts}")

    @property
    def k(self) -> int:
        """Experts that are chosen for each input."""
        return self.active - (self.active // 2 if self.shared is None else self.shared) if self.experts else 0

    @property
    def label(self) -> str:
        if not self.experts:
            return f"dense {self.active}"
        router = "full" if self.router_rank is None else f"rank {self.router_rank}"
        balance = "" if self.balance == Balance() else f", {self.balance}"
        return f"{self.active - self.k}+{self.k} of {self.experts}, {router}{balance}"

    def build(self, d_in: int, d_out: int, generator: torch.Generator) -> RankOneDictionary:
        if not self.experts:
            return dense_mlp(d_in, d_out, self.active, generator=generator)
        options = {"router_rank": self.router_rank, "selection_bias": self.balance.needs_bias}
        shared = self.active - self.k
        return secret_moe(d_in, d_out, self.experts, self.k, generator=generator, shared_neurons=shared, **options)

    def __call__(self, problem: Task, seed: int) -> RankOneDictionary:
        """The untrained student, as an arm of a study builds it."""
        return self.build(*problem.widths, settings.generator(seed))


@dataclass(frozen=True)
class Distillation:
    """Students of one kind on one task: `outcomes`, one for each seed, at the best of the learning rates that were
    `tried` with the first seed. Of those the validation rows chose; their FVU on test rows is there to be shown."""

    task: str
    spec: Spec
    tried: dict[float, Outcome]
    outcomes: list[Outcome]

    @property
    def fvu(self) -> Comparison:
        """On test rows: mean over seeds, with an interval over seeds and articles."""
        return errors_of(self).fvu(0)

    def row(self) -> dict[str, object]:
        """The point as a reader's table and a results file have it: settings, FVU of every seed, costs."""
        spec, first, fvu = self.spec, self.outcomes[0], self.fvu
        return {
            "inputs": self.task,
            "student": spec.label,
            "active": spec.active,
            "experts": spec.experts,
            "k": spec.k,
            "router_rank": spec.router_rank if spec.experts else None,
            "balance": type(spec.balance).__name__,
            "lr": first.arm.lr,
            "validation": {f"{lr:g}": each.validation["fvu"] for lr, each in self.tried.items()},
            "on_test": {f"{lr:g}": each.fvu for lr, each in self.tried.items()},
            "seeds": [each.seed for each in self.outcomes],
            "fvu": fvu.by_seed,
            "ci": fvu.ci,
            "dead": [each.about["dead"] for each in self.outcomes],
            "largest_rate": [each.about["largest_rate"] for each in self.outcomes],
            "multiply_adds": first.about["multiply_adds"],
            "parameters": first.about["parameters"],
            "steps": first.curve[0][-1] + 1,
            "seconds": [round(each.seconds, 1) for each in self.outcomes],
        }


def distil(
    given: Task,
    spec: Spec,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    recipe: Mapping | None = None,
    further: int = 0,
    **options,
) -> Distillation:
    """Students of one kind: every learning rate with the first seed, then the one that is best on the validation rows
    with the other seeds. Finished runs are loaded, so a grid that was interrupted goes on.

    `recipe` goes to `training.fit`, `further` to `study.tune`, `options` to `study.run`.
    """
    allowed(bool(seeds), f"seeds={list(seeds)}", "at least one")
    arm = Arm(f"{given.name}: {spec.label}", spec, spec.balance, recipe=recipe or {})
    options |= {"workers": 1}  # in this process, which holds the rows
    tried = study.tune(given, [arm], lrs, seeds[0], further=further, together=len(lrs), **options)[arm.name]
    best = replace(arm, lr=study.choose(tried))
    others = study.study(given, [best], seeds[1:], **options)[arm.name] if seeds[1:] else []
    return Distillation(given.name, spec, tried, [tried[best.lr], *others])


# -- what sparsity gains -----------------------------------------------------------------------------------------------


def errors_of(*students: Distillation) -> Sums:
    """Test errors by seed and article, a cell for each place among `students`. Where inputs are Gaussian, an "article"
    is the rows that stand in for its own."""
    return study.sums({place: each.outcomes for place, each in enumerate(students)})


def ratio(over: Distillation, under: Distillation) -> Comparison:
    """FVU of the first students over FVU of the second, in pairs. Raises `ValueError` where tasks differ."""
    allowed(over.task == under.task, f"students are of tasks {over.task!r} and {under.task!r}", "one task")
    return errors_of(over, under).ratio(0, 1)


def dense_alike(
    dense: Sequence[Distillation], sparse: Distillation, equal: str = "neurons"
) -> list[tuple[Distillation, float]]:
    """The dense student that costs what the sparse one does, with share 1, or the next below and above, with shares by
    which logarithms are read between them.

    Raises `ValueError` where the sparse student costs less or more than every dense one, or tasks differ.
    """
    one_of("equal", equal, COSTS)
    other = [each.task for each in dense if each.task != sparse.task]
    allowed(not other, f"dense students are of task {other}", f"{sparse.task!r}, as the sparse ones")
    dense = sorted(dense, key=lambda each: each.outcomes[0].about[equal])
    costs = [each.outcomes[0].about[equal] for each in dense]
    wanted = sparse.outcomes[0].about[equal]
    given = f"{sparse.spec.label} has {wanted:,} {equal}"
    allowed(costs[0] <= wanted <= costs[-1], given, f"{costs[0]:,} to {costs[-1]:,}, as dense")
    place = float(np.interp(np.log(wanted), np.log(costs), range(len(dense))))
    below, share = int(place), place % 1
    return [(dense[below], 1 - share), *([(dense[below + 1], share)] if share else [])]


def dense_width(dense: Sequence[Distillation], sparse: Distillation, equal: str = "neurons") -> float:
    """Neurons of the dense student that `gain` compares with."""
    return math.prod(each.spec.active**share for each, share in dense_alike(dense, sparse, equal))


def gain(dense: Sequence[Distillation], sparse: Distillation, equal: str = "neurons") -> Comparison:
    """How many times the sparse student's error a dense student of equal cost makes.

    Where no dense student costs exactly as much, its error is read between two that do not, linearly in logarithms.
    Seeds are those that these were all trained with. Raises `ValueError` as `dense_alike` does.
    """
    return contrast([dense], [sparse], equal)


def contrast(
    dense: Sequence[Sequence[Distillation]], sparse: Sequence[Distillation], equal: str = "neurons"
) -> Comparison:
    """The gain on the first task over the gain on the second, as `dense` and `sparse` are given: two tasks in turn.

    The interval is over seeds (those that all have) and articles, the same for both.
    """
    powers = []
    for others, ours, sign in zip(dense, sparse, (1, -1)[: len(sparse)], strict=True):
        powers += [(each, sign * share) for each, share in dense_alike(others, ours, equal)] + [(ours, -sign)]
    students, exponents = zip(*powers, strict=True)

    def product(*cells: Totals) -> float:
        return math.prod(cell.fvu**power for cell, power in zip(cells, exponents, strict=True))

    return errors_of(*students).compare(product, scale="log")


# -- what an expert responds to ----------------------------------------------------------------------------------------


def strongest(model: RankOneDictionary, inputs: Float[Tensor, "n d_in"], count: int) -> list[Int[np.ndarray, " rows"]]:
    """For each atom the rows of `inputs` on which its value is largest in size, the strongest first; at most `count`,
    fewer where it fires on fewer."""
    allowed(count >= 1, f"count={count}", "at least 1")
    codes = codes_on(model, inputs)
    row, place = codes.fires.numpy().nonzero()
    atom, size = (each.numpy()[row, place] for each in (codes.indices, codes.values.abs()))
    order = np.lexsort((-size, atom))
    starts = np.searchsorted(atom[order], np.arange(model.n_atoms + 1))
    return [row[order[a : min(b, a + count)]] for a, b in itertools.pairwise(starts)]


def concentration(rows: Sequence[Int[np.ndarray, " _"]], labels: Int[np.ndarray, " n"]) -> Float[np.ndarray, " a"]:
    """For each list of rows, the share of its commonest label (token, article)."""
    return np.array([np.unique(labels[some], return_counts=True)[1].max() / len(some) for some in rows])
