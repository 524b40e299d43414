"""One training loop for every model of the family.

A stream is a function of the step: the same step always gives the same batch, so a run that was interrupted goes on
where it stopped, several students see the same batches, and nothing depends on who asked first.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from helpers import dictionary, losses, settings
from helpers.dictionary import RankOneDictionary
from helpers.losses import Balance, Moment, normalised_mse
from helpers.metrics import as_tensor

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
        fingerprint: what identifies the data (a store's key); hashed from the content if None.
    """

    def __init__(
        self, inputs, targets=None, *, batch_size: int, seed: int = 0, device="cpu", fingerprint: str | None = None
    ):
        if targets is not None and len(targets) != len(inputs):
            raise ValueError(f"targets has {len(targets)} rows; allowed: {len(inputs)}, as many as inputs")
        if not 1 <= batch_size <= len(inputs):
            raise ValueError(
                f"batch_size={batch_size} cannot be filled; allowed: 1 to {len(inputs)}, the rows there are"
            )
        self.inputs, self.targets, self.batch_size, self.seed = inputs, targets, batch_size, seed
        self.device, self._identity = torch.device(device), fingerprint
        self._epoch: tuple[int, Tensor] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return len(self.inputs) // self.batch_size

    @cached_property
    def fingerprint(self) -> str:
        arrays = [self.inputs] if self.targets is None else [self.inputs, self.targets]
        identity = self._identity or _hash(*(np.ascontiguousarray(np.asarray(a)) for a in arrays))
        return f"shuffled({identity}, n={len(self.inputs)}, batch={self.batch_size}, seed={self.seed})"

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        epoch, position = divmod(step, self.steps_per_epoch)
        if self._epoch is None or self._epoch[0] != epoch:
            self._epoch = (
                epoch,
                torch.randperm(len(self.inputs), generator=settings.generator(settings.mix(self.seed, epoch))),
            )
        rows = self._epoch[1][position * self.batch_size : (position + 1) * self.batch_size].numpy()
        inputs = as_tensor(self.inputs, rows).to(self.device)
        return inputs, inputs if self.targets is None else as_tensor(self.targets, rows).to(self.device)


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
        if self.steps < 1:
            raise ValueError(f"steps={self.steps} is no training; allowed: at least 1")
        if not self.lr > 0:
            raise ValueError(f"lr={self.lr} does not learn; allowed: above 0")
        if self.schedule not in SCHEDULES:
            raise ValueError(f"schedule={self.schedule!r} is unknown; allowed: {', '.join(map(repr, SCHEDULES))}")

    def lr_at(self, step: int) -> float:
        warm = min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0
        return self.lr * warm * SCHEDULES[self.schedule](step / self.steps)


@dataclass
class Fit:
    """A trained student, its loss curve (`steps`, `loss`: normalised MSE without what the remedy adds) and its cost."""

    student: RankOneDictionary
    steps: list[int] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)
    seconds: float = 0.0
    from_cache: bool = False


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
    **recipe,
) -> Fit | dict[str, Fit]:
    """Train one student, or several by name over one stream of batches, and return a `Fit` for each.

    Students are trained in place by Adam on the normalised mean squared error; constraints of the family (unit-norm
    rows) are kept at every step. Unless `cache_dir` is False the run is stored under everything that determines it
    (students' initial parameters, stream, recipe, the code of this loop): a finished run is loaded instead of
    repeated, an interrupted one goes on from its last checkpoint.

    Args:
        students: each on the device where it shall be trained.
        steps, lr, and by keyword schedule, warmup, betas, weight_decay, clip: see `Recipe`. `lr` and `balance` may be
            mappings by the student's name.
        cache_dir: where runs are stored; None for the user's cache folder, False for nowhere.
        log_every: loss is recorded (and read back from the device) every so many steps.
        autocast: dtype for mixed precision on a GPU; None for the parameters' own.

    Raises:
        ValueError: for a bad recipe, or students that do not fit the stream's batches, before any training.
        FloatingPointError: when a loss stops being finite, naming the student and the step.
    """
    single = not isinstance(students, Mapping)
    named = {"": students} if single else dict(students)
    recipes = {
        name: Recipe(steps, lr=_of(lr, name), balance=_of(balance, name) or Balance(), **recipe) for name in named
    }
    _check_widths(named, stream)
    for name, student in named.items():
        if recipes[name].balance.needs_bias and student.selection_bias is None:
            raise ValueError(f"student {name!r} has selection_bias=False; allowed with {recipes[name].balance}: True")
    run = Run(named, stream, recipes, autocast=autocast, log_every=log_every)
    store = None if cache_dir is False else settings.cache_dir(cache_dir) / "fits" / f"{run.key()}.pt"
    if store is not None and store.is_file():
        run.load(store)
    run.advance(label, store, checkpoint_seconds)
    return run.fits[""] if single else run.fits


def _of(value, name: str):
    if not isinstance(value, Mapping):
        return value
    if name not in value:
        raise ValueError(f"no value is given for student {name!r}; allowed: one of {sorted(value)}")
    return value[name]


def _check_widths(students: Mapping[str, RankOneDictionary], stream: Stream) -> None:
    inputs, targets = stream(0)
    for name, student in students.items():
        if (student.d_in, student.d_out) != (inputs.shape[1], targets.shape[1]):
            raise ValueError(
                f"student {name!r} maps {student.d_in} to {student.d_out} numbers; "
                f"allowed: {inputs.shape[1]} to {targets.shape[1]}, as the stream's batches"
            )


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
    ):
        self.students, self.stream, self.recipes = students, stream, recipes
        self.autocast, self.log_every, self.step = autocast, log_every, 0
        self.total = max(r.steps for r in recipes.values())
        self.optimisers = {
            name: torch.optim.Adam(
                student.parameters(),
                lr=recipes[name].lr,
                betas=recipes[name].betas,
                weight_decay=recipes[name].weight_decay,
                fused=next(student.parameters()).device.type in ("cpu", "cuda"),
            )
            for name, student in students.items()
        }
        self.fits = {name: Fit(student) for name, student in students.items()}
        self.ks = {name: student.k for name, student in students.items()}
        self.silent = {
            name: torch.zeros(student.n_atoms, dtype=torch.long, device=next(student.parameters()).device)
            for name, student in students.items()
        }

    def key(self) -> str:
        """Hash of everything that determines the outcome."""
        parts = {
            name: (
                repr(sorted(s.knobs.items())),
                repr(self.recipes[name]),
                _hash(*(p.cpu() for p in s.state_dict().values())),
            )
            for name, s in self.students.items()
        }
        where = {name: next(s.parameters()).device.type for name, s in self.students.items()}
        modules = {dictionary.__name__, losses.__name__, __name__}
        modules |= {type(part).__module__ for recipe in self.recipes.values() for part in _parts(recipe.balance)}
        code = [Path(sys.modules[module].__file__).read_bytes() for module in sorted(modules)]
        text = json.dumps(
            [parts, where, self.stream.fingerprint, str(self.autocast), self.log_every, torch.__version__]
        )
        return _hash(text.encode(), *code)

    def advance(self, label: str, store: Path | None, checkpoint_seconds: float) -> None:
        """Train to the end, keeping `store` up to date."""
        if self.step >= self.total:
            return
        saved = started = time.perf_counter()
        before = {name: fit.seconds for name, fit in self.fits.items()}
        bar = tqdm(range(self.step, self.total), label, initial=self.step, total=self.total, mininterval=2, delay=2)
        for step in bar:
            self.train_step(step)
            now = time.perf_counter()
            for name, fit in self.fits.items():
                fit.seconds = before[name] + (now - started) / len(self.fits)
            if store is not None and now - saved > checkpoint_seconds:
                self.save(store)
                saved = now
        if store is not None:
            self.save(store)

    def train_step(self, step: int) -> None:
        """One optimiser step of every student, on one batch."""
        inputs, targets = self.stream(step)
        for name in self.students:
            if step < self.recipes[name].steps:
                self._update(name, inputs, targets, step)
        self.step = step + 1

    @cached_property
    def variance(self) -> float:
        return _variance(self.stream)

    def _update(self, name: str, inputs: Tensor, targets: Tensor, step: int) -> None:
        student, recipe, optimiser, fit = (
            self.students[name],
            self.recipes[name],
            self.optimisers[name],
            self.fits[name],
        )
        like = next(student.parameters())
        inputs, targets = inputs.to(like.device, like.dtype), targets.to(like.device, like.dtype)
        student.k = min(recipe.balance.k_at(self.ks[name], step / recipe.steps), student.n_features)
        with torch.autocast(like.device.type, self.autocast or torch.bfloat16, enabled=self.autocast is not None):
            trace = student.trace(inputs, score_gradient=recipe.balance.needs_scores)
        student.k = self.ks[name]
        loss = normalised_mse(trace.output.to(targets.dtype), targets, self.variance)
        silent = self.silent[name].add_(1)
        silent[trace.codes.indices[trace.codes.fires]] = 0
        now = Moment(student, inputs, targets, trace, loss, silent, step, recipe.steps, optimiser)
        if step % self.log_every == 0 or step == recipe.steps - 1:
            fit.steps.append(step)
            fit.loss.append(float(loss.detach()))
            if not math.isfinite(fit.loss[-1]):
                raise FloatingPointError(f"the loss of student {name!r} is {fit.loss[-1]} at step {step}; lower lr")
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

    def save(self, store: Path) -> None:
        """Write aside and move into place: a killed process leaves the last good file."""
        done = self.step >= self.total
        state = {
            "step": self.step,
            "students": {name: s.state_dict() for name, s in self.students.items()},
            "optimisers": None if done else {name: o.state_dict() for name, o in self.optimisers.items()},
            "fits": {name: (f.steps, f.loss, f.seconds) for name, f in self.fits.items()},
            "silent": self.silent,
        }
        store.parent.mkdir(parents=True, exist_ok=True)
        aside = store.with_suffix(f".{os.getpid()}.part")
        try:
            torch.save(state, aside)
            os.replace(aside, store)
        finally:
            aside.unlink(missing_ok=True)

    def load(self, store: Path) -> None:
        """Take up a stored run; a damaged file is named, never half used."""
        try:
            state = torch.load(store, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"the stored training {store} is damaged ({error}); delete it to train again") from error
        self.step = state["step"]
        for name, student in self.students.items():
            student.load_state_dict(state["students"][name])
            if state["optimisers"] is not None:
                self.optimisers[name].load_state_dict(state["optimisers"][name])
            self.silent[name].copy_(state["silent"][name])
            steps, loss, seconds = state["fits"][name]
            self.fits[name] = Fit(student, steps, loss, seconds, from_cache=state["optimisers"] is None)


def _parts(balance: Balance) -> list[Balance]:
    """A remedy and all those inside it."""
    inside = [
        value for name in vars(balance) for value in _listed(getattr(balance, name)) if isinstance(value, Balance)
    ]
    return [balance, *(part for each in inside for part in _parts(each))]


def _listed(value) -> tuple:
    return value if isinstance(value, tuple) else (value,)


def _variance(stream: Stream, batches: int = 4) -> float:
    """Total variance of the targets, from the stream's first batches: the constant that makes the loss scale-free."""
    targets = torch.cat([stream(step)[1] for step in range(batches)]).double()
    variance = float((targets - targets.mean(0)).square().sum(1).mean())
    if not variance > 0:
        raise ValueError(f"the stream's targets have variance {variance}; allowed: targets that vary and are finite")
    return variance


def _hash(*parts) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, Tensor):
            part = part.detach().contiguous().view(torch.uint8).numpy()
        digest.update(part)
    return digest.hexdigest()
