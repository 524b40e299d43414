"""Distil a language model's MLP into students, dense and sparse, on its inputs and on inputs with less structure.

A `Task` is a teacher's MLP with inputs for training, validation and test; `distil` trains one kind of student on it,
chooses the learning rate on validation rows and reports test rows. What is done to the inputs is a `Change`.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from helpers import settings
from helpers.dictionary import RankOneDictionary, dense_mlp, secret_moe
from helpers.models.activations import ActivationStore, Moments
from helpers.models.teachers import Teacher
from helpers.study.scores import Comparison, Evaluation, by_group, compared, crossed_interval, evaluate
from helpers.training import Fit, Shuffled, fit
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
    return Change(
        f"recoloured({seed})", lambda rows, generator: (rows - moments.mean.float()) @ move.T + moments.mean.float()
    )


def without_top(moments: Moments, count: int) -> Change:
    """The `count` principal directions of largest variance removed: along them every row is at the mean."""
    if not 0 <= count < len(moments.mean):
        raise ValueError(f"count={count} directions cannot go; allowed: 0 to {len(moments.mean) - 1}")
    top = _spectrum(moments)[1][:, len(moments.mean) - count :]
    return Change(f"without_top({count})", lambda rows, generator: rows - (rows - moments.mean.float()) @ top @ top.T)


def with_padding(row: Float[Tensor, " d"], share: float) -> Change:
    """A share of the rows, chosen at random, replaced by one padding row."""
    if not 0 <= share < 1:
        raise ValueError(f"share={share} is not a share of padding; allowed: 0 up to below 1")

    def apply(rows: Tensor, generator: torch.Generator) -> Tensor:
        lost = torch.randperm(len(rows), generator=generator)[: round(share * len(rows))]
        return rows.index_copy(0, lost, row.float().expand(len(lost), -1))

    return Change(f"with_padding({share:g})", apply)


def _spectrum(moments: Moments) -> tuple[Float[Tensor, " d"], Float[Tensor, "d d"]]:
    """Eigenvalues in rising order (float64) and eigenvectors as columns (float32)."""
    values, axes = torch.linalg.eigh(moments.cov)
    return values, axes.float()


# -- the task ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pairs:
    """Rows in and out of the MLP; `group` is the article each row comes from, or took the place of."""

    inputs: Float[Tensor, "n d_in"]
    outputs: Float[Tensor, "n d_out"]
    group: Int[Tensor, " n"]


@dataclass(frozen=True)
class Task:
    """What a student learns and is judged by. `fingerprint` names all that determines the training rows.

    Outputs are the MLP's divided by `scale`: FVU does not depend on it, but where training starts does.
    """

    name: str
    train: Pairs
    validation: Pairs
    test: Pairs
    fingerprint: str
    scale: float = 1.0

    @property
    def widths(self) -> tuple[int, int]:
        return self.train.inputs.shape[1], self.train.outputs.shape[1]


def task(
    teacher: Teacher,
    layer: int,
    stores: Mapping[str, ActivationStore],
    change: Change = REAL,
    *,
    judged_on: Change | None = None,
    scaled: bool = True,
    cache_dir: str | Path | None = None,
) -> Task:
    """The MLP's inputs, changed, with what the MLP itself returns for them: computed once, for every student.

    The three splits are changed with draws of their own. What the MLP returns is kept in the cache folder (4·n·d bytes
    for each change); inputs and outputs are held in memory (8·n·d bytes).

    Args:
        stores: `train`, `validation` and `test`, with the site `mlp_in` of this teacher and layer.
        judged_on: another change for validation and test (`REAL` for students that trained with padding).
        scaled: divide outputs by the standard deviation of the training ones (one number, the root of their mean
            variance over dimensions), so that a student with PyTorch's usual start begins with outputs of their size.
    """
    if missing := {"train", "validation", "test"} - set(stores):
        raise ValueError(f"stores has no {', '.join(sorted(missing))}; allowed: train, validation and test")
    folder, splits = settings.cache_dir(cache_dir) / "targets", {}
    for number, split in enumerate(("train", "validation", "test")):
        how = change if split == "train" or judged_on is None else judged_on
        store, seed = stores[split], 1000 + number
        inputs = how.apply(store.tensor("mlp_in"), settings.generator(seed))
        name = hashlib.sha256(f"{store.key} {how.name} {seed}".encode()).hexdigest()[:24]
        outputs = _kept(folder / f"{name}.npy", partial(outputs_of, teacher.mlp(layer), inputs), inputs)
        if split == "train":
            scale = float(outputs.var(0).mean()) ** 0.5 if scaled else 1.0
        splits[split] = Pairs(inputs, outputs.div_(scale), torch.from_numpy(np.array(store.article, np.int64)))
    name = change.name if scaled else f"{change.name}, unscaled"
    return Task(name, **splits, fingerprint=f"{name} of {stores['train'].key}", scale=scale)


def _kept(path: Path, make: Callable[[], Tensor], inputs: Tensor) -> Float[Tensor, "n d_out"]:
    """The rows of a file that is made when it is not there, or when it belongs to other inputs."""
    mark = hashlib.sha256(inputs[:: max(1, len(inputs) // 64)].contiguous().numpy().tobytes()).hexdigest()
    about = path.with_suffix(".txt")
    if not (path.is_file() and about.is_file() and about.read_text() == mark):
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}.npy")
        try:
            np.save(aside, make().numpy())
            about.unlink(missing_ok=True)
            os.replace(aside, path)
            about.write_text(mark)
        finally:
            aside.unlink(missing_ok=True)
    return torch.from_numpy(np.load(path))


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
        if self.active < 1 or self.experts < 0:
            raise ValueError(f"active={self.active}, experts={self.experts}; allowed: at least 1 and at least 0")
        if self.experts and not 1 <= self.k <= self.experts:
            raise ValueError(
                f"shared={self.shared} of active={self.active} leaves k={self.k} of experts={self.experts} to choose; "
                f"allowed: 1 to {self.experts}"
            )

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
        return secret_moe(
            d_in,
            d_out,
            self.experts,
            self.k,
            generator=generator,
            router_rank=self.router_rank,
            shared_neurons=self.active - self.k,
            selection_bias=self.balance.needs_bias,
        )


@dataclass(frozen=True)
class Distilled:
    """One trained student. `errors` and `norms` are sums over the test rows of each article (`by_group`)."""

    spec: Spec
    seed: int
    lr: float
    fit: Fit
    test: Evaluation
    errors: Float[np.ndarray, " articles"]
    norms: Float[np.ndarray, " articles"]

    @property
    def fvu(self) -> float:
        return self.test.fvu


@dataclass(frozen=True)
class Distillation:
    """Students of one kind on one task: one for each seed. For every learning rate that was tried with the first seed,
    its FVU on validation rows, its FVU on test rows (which choose nothing) and its curve (steps, training loss)."""

    task: str
    spec: Spec
    students: list[Distilled]
    validation: dict[float, float]
    on_test: dict[float, float]
    curves: dict[float, tuple[list[int], list[float]]]

    @property
    def lr(self) -> float:
        return min(self.validation, key=self.validation.get)

    @property
    def fvu(self) -> float:
        """Mean over seeds of the test FVU."""
        return float(np.mean([student.fvu for student in self.students]))

    def interval(self, **bootstrap) -> tuple[float, float]:
        """95 % interval of `fvu`, resampling seeds and articles."""
        both = np.stack([self.errors, np.broadcast_to(self.norms, self.errors.shape)], axis=-1)
        return crossed_interval(both, lambda sums: sums[..., 0].sum() / sums[..., 1].sum(), **bootstrap)

    @property
    def errors(self) -> Float[np.ndarray, "seeds articles"]:
        return np.stack([student.errors for student in self.students])

    @property
    def norms(self) -> Float[np.ndarray, " articles"]:
        return self.students[0].norms

    def row(self) -> dict[str, object]:
        """The point as a reader's table and a results file have it: settings, FVU of every seed, costs."""
        student = self.students[0].fit.student
        tests = [s.test for s in self.students]
        return {
            "inputs": self.task,
            "student": self.spec.label,
            "active": self.spec.active,
            "experts": self.spec.experts,
            "k": self.spec.k,
            "router_rank": self.spec.router_rank if self.spec.experts else None,
            "balance": type(self.spec.balance).__name__,
            "lr": self.lr,
            "validation": {f"{lr:g}": value for lr, value in self.validation.items()},
            "on_test": {f"{lr:g}": value for lr, value in self.on_test.items()},
            "seeds": [s.seed for s in self.students],
            "fvu": [test.fvu for test in tests],
            "ci": self.interval(),
            "dead": [test.dead if self.spec.experts else None for test in tests],
            "largest_rate": [test.largest_rate if self.spec.experts else None for test in tests],
            "multiply_adds": student.multiply_adds,
            "parameters": student.n_parameters,
            "steps": self.students[0].fit.steps[-1] + 1,
            "seconds": [round(s.fit.seconds, 1) for s in self.students],
        }


def distil(
    given: Task,
    spec: Spec,
    *,
    lrs: Sequence[float],
    seeds: Sequence[int],
    steps: int,
    batch_size: int = 1024,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None | Literal[False] = None,
    **recipe,
) -> Distillation:
    """Train students of one kind: every learning rate with the first seed, then the one that is best on the
    validation rows with the other seeds. The test rows are looked at only after that.

    The first seed's students train over one stream of batches; a seed is a start and an order of the batches, the
    same order for every kind of student. Finished runs are loaded (see `training.fit`), so a grid that was
    interrupted goes on.

    Args:
        recipe: further arguments of `training.fit`, such as `schedule`, `warmup` or `autocast`.
    """
    if not lrs or not seeds:
        raise ValueError(f"lrs={list(lrs)}, seeds={list(seeds)}; allowed: at least one of each")
    run = partial(train, given, spec, steps=steps, batch_size=batch_size, device=device, cache_dir=cache_dir, **recipe)
    first = run(lrs, seeds[0])
    validation = {lr: judge(given, "validation", fit.student).fvu for lr, fit in first.items()}
    best = min(validation, key=validation.get)
    fits = {seeds[0]: first[best]} | {seed: run([best], seed)[best] for seed in seeds[1:]}
    students = [judged(given, spec, seed, best, trained) for seed, trained in fits.items()]
    on_test = {lr: judge(given, "test", fit.student).fvu for lr, fit in first.items()}
    curves = {lr: (each.steps, each.loss) for lr, each in first.items()}
    return Distillation(given.name, spec, students, validation, on_test, curves)


def train(
    given: Task, spec: Spec, lrs: Sequence[float], seed: int, *, steps, batch_size, device, cache_dir, **recipe
) -> dict[float, Fit]:
    """One student for each learning rate, from one start, over one stream of batches."""
    students = {
        f"{lr:g}": spec.build(*given.widths, settings.generator(seed)).to(device) for lr in lrs
    }  # each lr starts alike
    # matrix products in bfloat16 where there are units for them, float32 parameters and sums everywhere
    recipe.setdefault("autocast", torch.bfloat16 if torch.device(device).type == "cuda" else None)
    pairs = given.train
    stream = Shuffled(
        pairs.inputs, pairs.outputs, batch_size=batch_size, seed=seed, device=device, fingerprint=given.fingerprint
    )
    fits = fit(
        students, stream, steps=steps, lr={f"{lr:g}": lr for lr in lrs}, balance=spec.balance, cache_dir=cache_dir,
        label=f"{given.name}: {spec.label}, seed {seed}", **recipe,
    )  # fmt: skip
    return {lr: fits[f"{lr:g}"] for lr in lrs}


def judged(given: Task, spec: Spec, seed: int, lr: float, trained: Fit) -> Distilled:
    """A trained student with its errors on the test rows."""
    test, groups = judge(given, "test", trained.student), given.test.group
    sums = (by_group(part, groups) for part in (test.squared_error, test.squared_norm))
    return Distilled(spec, seed, lr, trained, test, *sums)


def judge(given: Task, split: str, student: RankOneDictionary) -> Evaluation:
    """A student on the rows of `split`."""
    pairs = getattr(given, split)
    return evaluate(student, pairs.inputs, pairs.outputs)


# -- what sparsity gains -----------------------------------------------------------------------------------------------

COSTS = {
    "neurons": lambda student: student.active_neurons,
    "multiply_adds": lambda student: student.multiply_adds,
    "parameters": lambda student: student.n_parameters,
}
"""What two students may have equal when their errors are compared."""


@dataclass(frozen=True)
class Gain(Comparison):
    """FVU of a dense student over FVU of a sparse one of the same cost; `width` is the dense student's."""

    width: float


def gain(dense: Sequence[Distillation], sparse: Distillation, equal: str = "neurons", **bootstrap) -> Gain:
    """How many times the sparse student's error a dense student of equal cost makes.

    The dense student's error at that cost is that of the dense student that has it, or else interpolated, linearly in
    logarithms, between the next below and above. The seeds are those that these were all trained with.

    Raises:
        ValueError: when the sparse student costs less or more than every dense one, or tasks differ.
    """
    errors, ratio, width, _ = _compared(dense, sparse, equal)
    return _gain(errors, ratio, width, bootstrap)


def contrast(
    dense: Sequence[Sequence[Distillation]], sparse: Sequence[Distillation], equal: str = "neurons", **bootstrap
) -> Gain:
    """The gain on the first task over the gain on the second, as `dense` and `sparse` are given: two tasks in turn.

    Seeds (those that all have) and articles are resampled together for both; a Gaussian's "articles" are the rows that
    stand in their places.
    """
    parts = [_compared(d, s, equal) for d, s in zip(dense, sparse, strict=True)]
    (one, first, width, here), (two, second, _, there) = parts
    cut, both_have = one.shape[-1], sorted({*here} & {*there})
    both = np.concatenate([one[[here.index(i) for i in both_have]], two[[there.index(i) for i in both_have]]], axis=-1)
    return _gain(both, lambda errors: first(errors[..., :cut]) / second(errors[..., cut:]), width, bootstrap)


def _common(students: Sequence[Distillation]) -> list[int]:
    """The seeds that all of them were trained with."""
    common = set.intersection(*({student.seed for student in each.students} for each in students))
    if not common:
        raise ValueError(f"no seed is common to {[each.spec.label for each in students]}; allowed: at least one")
    return sorted(common)


def _gain(errors: np.ndarray, ratio: Callable[[np.ndarray], float], width: float, bootstrap: dict) -> Gain:
    return Gain(**vars(compared(errors, ratio, **bootstrap)), width=width)


def _compared(dense: Sequence[Distillation], sparse: Distillation, equal: str):
    """Errors [seeds, articles, dense students and the sparse one], their ratio at equal cost, the dense width there,
    and the seeds."""
    if equal not in COSTS:
        raise ValueError(f"equal={equal!r} is unknown; allowed: {', '.join(map(repr, COSTS))}")
    dense = sorted(dense, key=lambda each: each.spec.active)
    if any(each.task != sparse.task for each in dense):
        raise ValueError(f"dense students are of task {dense[0].task!r}; allowed: {sparse.task!r}, as the sparse ones")
    cost = COSTS[equal]
    costs = [cost(each.students[0].fit.student) for each in dense]
    wanted = cost(sparse.students[0].fit.student)
    if not costs[0] <= wanted <= costs[-1]:
        raise ValueError(
            f"{sparse.spec.label} has {wanted:,} {equal}; allowed: {costs[0]:,} to {costs[-1]:,}, as dense"
        )
    below, above = max(c for c in costs if c <= wanted), min(c for c in costs if c >= wanted)
    dense, costs = zip(*((each, c) for each, c in zip(dense, costs, strict=True) if c in (below, above)), strict=True)
    seeds = _common([*dense, sparse])
    errors = np.stack(
        [[next(s.errors for s in each.students if s.seed == seed) for seed in seeds] for each in (*dense, sparse)],
        axis=-1,
    )  # [seeds, articles, students]

    def ratio(some: np.ndarray) -> float:
        *wide, ours = some.sum((0, 1))
        return float(np.exp(np.interp(np.log(wanted), np.log(costs), np.log(wide))) / ours)

    widths = np.log([each.spec.active for each in dense])
    return errors, ratio, float(np.exp(np.interp(np.log(wanted), np.log(costs), widths))), seeds
