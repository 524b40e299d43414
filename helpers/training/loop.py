"""One training loop for every model of the family.

A stream is a function of the step: the same step always gives the same batch, so a run that was interrupted goes on
where it stopped, several students see the same batches, and nothing depends on who asked first.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from helpers import kept, settings
from helpers.dictionary import RankOneDictionary
from helpers.dictionary.screening import Halved, forms
from helpers.kept import Kept
from helpers.settings import allowed
from helpers.training.remedies import Balance, Moment, normalised_mse

# -- streams -----------------------------------------------------------------------------------------------------------


@runtime_checkable
class Stream(Protocol):
    """`stream(step)` gives (inputs, targets); `fingerprint` names everything that determines them."""

    fingerprint: str

    def __call__(self, step: int) -> tuple[Tensor, Tensor]: ...


class Shuffled:
    """Batches of stored rows, each epoch in a new order; the last incomplete batch of an epoch is left out.

    Args:
        inputs: [rows, d] tensor or memory-mapped array; only the rows of a batch are read.
        targets: as `inputs`, same length; None reconstructs the inputs.
        fingerprint: what identifies the data (a store's key); hashed from the content if not given.
        divided_by: a number by which all rows are divided.
    """

    def __init__(
        self, inputs, targets=None, *, batch_size: int, seed=0, device="cpu", fingerprint="", divided_by: float = 1.0
    ):
        n = len(inputs)
        if targets is not None:
            allowed(len(targets) == n, f"targets has {len(targets)} rows", f"{n}, as many as inputs")
        allowed(1 <= batch_size <= n, f"batch_size={batch_size} cannot be filled", f"1 to {n}, the rows there are")
        self.arrays, self.batch_size, self.seed = [inputs] if targets is None else [inputs, targets], batch_size, seed
        self.device, self._identity, self.divided_by = torch.device(device), fingerprint, divided_by
        self.n, self.steps_per_epoch = n, n // batch_size
        self._epoch: tuple[int, Tensor] | None = None

    @cached_property
    def fingerprint(self) -> str:
        identity = f"{self._identity or kept.digest(*self.arrays)}, divided by {self.divided_by!r}"
        return f"shuffled({identity}, n={self.n}, batch={self.batch_size}, seed={self.seed})"

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            random = settings.generator(settings.mix(self.seed, epoch))
            self._epoch = epoch, torch.randperm(self.n, generator=random)
        rows = self._epoch[1][position * self.batch_size : (position + 1) * self.batch_size].numpy()
        batch = [as_tensor(each, rows).to(self.device) for each in self.arrays]
        if self.divided_by != 1:
            batch = [each / self.divided_by for each in batch]
        return batch[0], batch[-1]


class Fresh:
    """Batches drawn anew at every step: `draw(n, generator)` gives rows, or (inputs, targets).

    Args:
        fingerprint: names the distribution and its parameters.
    """

    def __init__(
        self, draw: Callable, *, batch_size: int, fingerprint: str, seed: int = 0, device: str | torch.device = "cpu"
    ):
        self.draw, self.batch_size, self.seed, self.device = draw, batch_size, seed, torch.device(device)
        self.fingerprint = f"fresh({fingerprint}, batch={batch_size}, seed={seed})"

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        drawn = self.draw(self.batch_size, settings.generator(settings.mix(self.seed, step), self.device))
        return drawn if isinstance(drawn, tuple) else (drawn, drawn)


# -- the loop ----------------------------------------------------------------------------------------------------------

SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}
"""Learning rate as a share of `lr`, for the share of the steps that is done; warm-up multiplies it."""


@dataclass(frozen=True)
class Recipe:
    """Everything that `fit` does to one student."""

    steps: int
    lr: float = 1e-3
    schedule: str = "cosine"
    warmup: int = 0
    betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0
    clip: float | None = None
    balance: Balance = field(default_factory=Balance)

    def __post_init__(self):
        allowed(self.steps >= 1, f"steps={self.steps} is no training", "at least 1")
        allowed(self.lr > 0, f"lr={self.lr} does not learn", "above 0")
        settings.one_of("schedule", self.schedule, SCHEDULES)

    def lr_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * SCHEDULES[self.schedule](step / self.steps)


@dataclass
class Fit:
    """A trained student, its loss curve (`steps`, `loss`: normalised MSE without what the remedy adds), its cost, and
    for each atom the steps that it has been `silent`."""

    student: RankOneDictionary
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    from_cache: bool = False
    silent: Tensor | None = None


def fit(
    students: RankOneDictionary | Mapping[str, RankOneDictionary],
    stream: Stream,
    *,
    steps: int,
    lr: float | Mapping[str, float] = 1e-3,
    balance: Balance | Mapping[str, Balance] | None = None,
    cache_dir: str | Path | None | Literal[False] = False,
    label: str = "fit",
    log_every: int = 10,
    checkpoint_seconds: float = 60.0,
    autocast: torch.dtype | None = None,
    screen: bool = False,
    **recipe,
) -> Fit | dict[str, Fit]:
    """Train one student, or several by name over one stream of batches, and return a `Fit` for each.

    Students are trained in place by Adam on the normalised mean squared error; constraints of the family (unit-norm
    rows) are kept at every step. Unless `cache_dir` is False each student is stored under everything that determines it
    (its initial parameters, stream, recipe, and their code), whoever trains beside it: a finished one is loaded instead
    of repeated, an interrupted one goes on from its last checkpoint.

    Args:
        students: each on the device where it shall be trained.
        steps, lr, and by keyword schedule, warmup, betas, weight_decay, clip: see `Recipe`. `lr` and `balance` may be
            mappings by the student's name.
        cache_dir: where runs are stored; None for the user's cache folder, False for nowhere.
        log_every: loss is recorded (and read back from the device) every so many steps.
        autocast: dtype of matrix products (torch.bfloat16, on any device); None for the parameters' own.
        screen: choose atoms in bfloat16, certified (`dictionary.screening`), where that is faster.

    Raises:
        ValueError: for a bad recipe, or students that do not fit the stream's batches, before any training.
        FloatingPointError: when a loss stops being finite, naming the student and the step.
    """
    named = students if isinstance(students, Mapping) else {"": students}
    each = {name: {"lr": _of(lr, name), "balance": _of(balance, name) or Balance()} for name in named}
    recipes = {name: Recipe(steps, **own, **recipe) for name, own in each.items()}
    _check(named, recipes, stream)
    run = Run(named, stream, recipes, autocast=autocast, log_every=log_every, screen=screen)
    with contextlib.ExitStack() as locks:
        if cache_dir is not False:
            run.take_up(cache_dir, locks)
        run.advance(label, checkpoint_seconds)
    return run.fits if isinstance(students, Mapping) else run.fits[""]


def _of(value, name: str):
    if not isinstance(value, Mapping):
        return value
    allowed(name in value, f"no value is given for student {name!r}", f"one of {sorted(value)}")
    return value[name]


def _check(students: Mapping[str, RankOneDictionary], recipes: Mapping[str, Recipe], stream: Stream) -> None:
    d_in, d_out = (part.shape[1] for part in stream(0))
    for name, student in students.items():
        given, balance = f"student {name!r} maps {student.d_in} to {student.d_out} numbers", recipes[name].balance
        allowed((student.d_in, student.d_out) == (d_in, d_out), given, f"{d_in} to {d_out}, as the stream's batches")
        given = f"student {name!r} has selection_bias=False with {balance}"
        allowed(not balance.needs_bias or student.selection_bias is not None, given, "True")


class Run:
    """State of a training: what is needed to go on, and what identifies it. `fit` is the way to use it."""

    def __init__(
        self,
        students: Mapping[str, RankOneDictionary],
        stream: Stream,
        recipes: Mapping[str, Recipe],
        *,
        autocast: torch.dtype | None = None,
        log_every: int = 10,
        screen: bool = False,
    ):
        self.students, self.stream, self.recipes = students, stream, recipes
        self.autocast, self.log_every = autocast, log_every
        self.steps, self.stores, self.screens = dict.fromkeys(students, 0), {}, {} if screen else None
        self.ks = {name: student.k for name, student in students.items()}
        self.fits, self.optimisers, self.silent = {}, {}, {}
        for name, student in students.items():
            recipe, where = recipes[name], next(student.parameters()).device
            how = {"lr": recipe.lr, "betas": recipe.betas, "weight_decay": recipe.weight_decay}
            self.optimisers[name] = torch.optim.Adam(student.parameters(), fused=where.type in ("cpu", "cuda"), **how)
            self.silent[name] = torch.zeros(student.n_atoms, dtype=torch.long, device=where)
            self.fits[name] = Fit(student, silent=self.silent[name])

    def kept(self, name: str, cache_dir: str | Path | None) -> Kept:
        """Where a student lies in the cache: under everything that determines it, the code included."""
        student, where = self.students[name], next(self.students[name].parameters()).device.type
        start = [student.knobs, kept.digest(*student.state_dict().values()), where]
        what = [start, self.recipes[name], self.stream.fingerprint, self.autocast, self.log_every]
        what += [] if self.screens is None else ["screened"]
        kinds = {type(module) for module in student.modules()}
        drawn = [self.stream.draw] if hasattr(self.stream, "draw") else []
        return Kept("fits", what, Run, *kinds, type(self.stream), *drawn, cache_dir=cache_dir)

    def take_up(self, cache_dir: str | Path | None, locks: contextlib.ExitStack) -> None:
        """Load what is stored, and lock what is left to do. Equal students are one file, and have one lock."""
        self.stores = {name: self.kept(name, cache_dir) for name in self.students}
        self.load()
        waiting = {self.stores[name].key: self.stores[name] for name in self.unfinished}
        for key in sorted(waiting):  # in one order, so that no two processes wait for each other
            locks.enter_context(waiting[key].lock())
        self.load()  # whoever waited for a lock may find the training done

    @property
    def unfinished(self) -> list[str]:
        """Students with steps left."""
        return [name for name, recipe in self.recipes.items() if self.steps[name] < recipe.steps]

    def advance(self, label: str, checkpoint_seconds: float) -> None:
        """Train to the end, keeping the stores up to date."""
        training = self.unfinished
        if not training:
            return
        saved = started = time.perf_counter()
        before = {name: self.fits[name].seconds for name in training}
        first = min(self.steps[name] for name in training)
        last = max(self.recipes[name].steps for name in training)
        for step in settings.progress(range(first, last), label, initial=first, total=last, delay=2):
            self.train_step(step)
            now = time.perf_counter()
            for name in training:
                self.fits[name].seconds = before[name] + (now - started) / len(training)
            if now - saved > checkpoint_seconds:
                self.save(training)
                saved = now
        self.save(training)

    def train_step(self, step: int) -> None:
        """One optimiser step of every student that has come to this one, on one batch."""
        inputs, targets = self.stream(step)
        for name in self.students:
            if self.steps[name] == step < self.recipes[name].steps:
                self._update(name, inputs, targets, step)
                self.steps[name] = step + 1

    @cached_property
    def variance(self) -> float:
        """Total variance of the targets, from the first batches: the constant that makes the loss scale-free."""
        targets = torch.cat([self.stream(step)[1] for step in range(4)]).cpu().double()
        variance = float((targets - targets.mean(0)).square().sum(1).mean())
        dtypes = {next(student.parameters()).dtype for student in self.students.values()} or {torch.float32}
        most = min(torch.finfo(dtype).max for dtype in dtypes)
        cure = "targets that vary and are finite, with squares whose sums the students' dtype holds"
        allowed(0 < variance * len(targets) < most, f"the stream's targets have variance {variance}", cure)
        return variance

    def _update(self, name: str, inputs: Tensor, targets: Tensor, step: int) -> None:
        student, recipe, optimiser = self.students[name], self.recipes[name], self.optimisers[name]
        fit = self.fits[name]
        like = next(student.parameters())
        inputs, targets = inputs.to(like.device, like.dtype), targets.to(like.device, like.dtype)
        student.k = min(recipe.balance.k_at(self.ks[name], step / recipe.steps), student.n_features)
        with torch.autocast(like.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            screen = self._screen(name, student, len(inputs))
            how = {} if screen is None else {"screen": screen}
            trace = student.trace(inputs, score_gradient=recipe.balance.needs_scores, **how)
        student.k = self.ks[name]
        loss = normalised_mse(trace.output.to(targets.dtype), targets, self.variance)
        silent = self.silent[name].add_(1)
        silent[trace.codes.indices[trace.codes.fires]] = 0
        more = recipe.steps, optimiser, self.stream, self.variance
        now = Moment(student, inputs, targets, trace, loss, silent, step, *more)
        if step % self.log_every == 0 or step == recipe.steps - 1:
            fit.steps.append(step)
            fit.loss.append(float(loss.detach()))
            if not math.isfinite(fit.loss[-1]):
                cure = "lower lr, and see that all rows are finite and none is far longer than the others"
                raise FloatingPointError(f"the loss of student {name!r} is {fit.loss[-1]} at step {step}; {cure}")
        optimiser.zero_grad(set_to_none=True)
        (loss + recipe.balance.loss(now)).backward()
        student.constrain_gradient_()
        if recipe.clip is not None:
            torch.nn.utils.clip_grad_norm_(student.parameters(), recipe.clip)
        for group in optimiser.param_groups:
            group["lr"] = recipe.lr_at(step)
        optimiser.step()
        student.constrain_()
        recipe.balance.after_step(now)

    def _screen(self, name: str, student: RankOneDictionary, batch: int) -> Halved | None:
        """What this student's atoms are screened in, if that was asked for, can be and pays."""
        if self.screens is None or self.autocast is not None or self.recipes[name].balance.needs_scores:
            return None
        pays = student.screenable and torch.bfloat16 in forms(student.encoder.weight, batch)
        return self.screens.setdefault(name, Halved()) if pays else None

    def save(self, names: Iterable[str]) -> None:
        """Keep the state of these students, without an optimiser's where nothing is left to do."""
        for name in names if self.stores else ():
            fit, done = self.fits[name], self.steps[name] >= self.recipes[name].steps
            state = {"step": self.steps[name], "silent": self.silent[name], "fit": [fit.steps, fit.loss, fit.seconds]}
            state |= {"student": dict(self.students[name].state_dict())}
            state |= {"optimiser": None if done else self.optimisers[name].state_dict()}
            self.stores[name].write(state)

    def load(self) -> None:
        """Take up what is stored of the students that have steps left; a damaged file is named, never half used."""
        for name in self.unfinished:
            if (state := self.stores[name].read()) is None:
                continue
            self.steps[name] = state["step"]
            self.students[name].load_state_dict(state["student"])
            if state["optimiser"] is not None:
                self.optimisers[name].load_state_dict(state["optimiser"])
            self.silent[name].copy_(state["silent"])
            self.fits[name] = Fit(self.students[name], *state["fit"], state["optimiser"] is None, self.silent[name])


def as_tensor(array, rows) -> Tensor:
    """Rows of a tensor or of a memory-mapped NumPy array, as a tensor."""
    part = array[rows]
    return part if isinstance(part, Tensor) else torch.from_numpy(np.array(part))
