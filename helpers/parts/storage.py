"""How much of a language model's loss a dictionary keeps for each number it stores, and what earns that.

An `Arm` is a `language_model.Bench` whose dictionary has a shape of its own: packed atoms on a mask, dense atoms in
fewer columns, atoms that were dense and then pruned. `trial` trains one and measures on held-out articles what the
model loses with its reconstructions, by the encoder and by matching pursuit on the same decoder. `compare` turns
several trials into one number with an interval over seeds and articles.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from helpers import kept, settings
from helpers.dictionary import Packed, RankOneDictionary, Rows, expander_sae, save_packed, topk_sae
from helpers.dictionary.pursuit import least_squares, omp
from helpers.models import activations, teachers
from helpers.models.teachers import Splice
from helpers.parts import language_model
from helpers.parts.distilling import Distillation, Spec
from helpers.parts.known_truth import Setting
from helpers.parts.language_model import Bench
from helpers.parts.masks import clustered, informed, left_regular
from helpers.study.scores import Comparison, by_group, ce_recovered, compared, evaluate
from helpers.study.sweep import sweep
from helpers.training import Fit
from helpers.training.remedies import AuxK, Balance, Resample

FORMAT = 1
"""Version of what `trial` keeps: raise it when the same cell gives other numbers."""
CLIP = 1.0
"""Largest norm of a step's gradient, as in paper B's training."""
SAMPLES = 8192
"""Training rows that an informed mask and an adaptive degree look at."""
WIDEST = 4
"""An adaptive atom gets at most this many times the mean degree."""

FEWEST_ARTICLES = 5
"""A loss on fewer articles than these gets no interval that a verdict could rest on."""

WAYS = ("encoder", "solved", "pursuit")
"""How codes are found: the encoder's; its atoms with least-squares coefficients; matching pursuit's atoms."""
SPLICED = ("encoder", "pursuit")
"""Ways whose reconstructions are put into the model; the other one is judged by its error alone."""


# -- the dictionaries --------------------------------------------------------------------------------------------------

MASKS: dict[str, Callable[[Arm, torch.Generator], Tensor]] = {
    "expander": lambda arm, random: left_regular(arm.n_features, arm.width, arm.degree, random),
    "clustered": lambda arm, random: clustered(arm.n_features, arm.width, arm.degree, random),
    "released": lambda arm, random: clustered(arm.n_features, arm.width, arm.degree, random, every_row=False),
    "informed": lambda arm, random: informed(arm.some(random), arm.n_features, arm.degree, random),
}
"""Masks by name: uniform; blocks that reach all rows; blocks as released, which do not; rows large together in data."""

PHASES = {"pruned": 0.5, "adaptive": 0.25}
"""Shapes that are made from another dictionary, and the share of the steps that trains that one first."""

SHAPES = ("dense", "untied", "low-rank", "packed encoder", *MASKS, *PHASES)


@dataclass(frozen=True)
class Arm(Bench):
    """Rows of a site, and a dictionary of some shape that learns them.

    Args:
        shape: in `SHAPES`. "dense" is tied; "low-rank" and "packed encoder" have a dense decoder and an encoder of its
            own with `degree` numbers an atom (a low-rank one as many in all, rounded down).
        degree: numbers of an atom; None for dense and untied ones.
    """

    shape: str = "dense"
    degree: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} is unknown; allowed: {', '.join(map(repr, SHAPES))}")
        if (self.degree is None) != (self.shape in ("dense", "untied")):
            raise ValueError(f"degree={self.degree} with shape={self.shape!r}; allowed: a number unless it is dense")

    @property
    def width(self) -> int:
        """Length m of the rows and atoms."""
        return len(self.mean)

    @property
    def first_steps(self) -> int:
        """Steps that train what this dictionary is made from."""
        return round(PHASES.get(self.shape, 0) * self.steps)

    def some(self, random: torch.Generator) -> Float[Tensor, "rows m"]:
        """Some training rows, divided."""
        pick = torch.randperm(len(self.store("train")), generator=random)[:SAMPLES].sort().values.numpy()
        return self.store("train").tensor(self.site, pick) / self.scale

    def student(
        self,
        setting: Setting,
        seed: int,
        device: str | torch.device = "cpu",
        cache_dir: str | Path | None | Literal[False] = None,
    ) -> RankOneDictionary:
        """The dictionary before its (last) phase of training; a seed starts all of a kind from the same atoms."""
        random = settings.generator(seed)
        about = {"generator": random, "b_dec": self.mean if setting.centred else None, "activation": "identity"}
        about["selection_bias"] = setting.balance.needs_bias
        if self.shape in ("dense", "untied"):
            sae = topk_sae(self.width, self.n_features, self.k, tied=self.shape == "dense", **about)
        elif self.shape in MASKS:
            rows = MASKS[self.shape](self, random)
            sae = expander_sae(rows, self.width, self.k, **about)
        elif self.shape in PHASES:
            begun = train(self.first, setting, seed, device=device, cache_dir=cache_dir).student.cpu()
            sae = pruned(begun, self.degree) if self.shape == "pruned" else adapted(begun, self.some(random), random)
        else:
            sae = _with_encoder(self, topk_sae(self.width, self.n_features, self.k, tied=False, **about), random)
        return sae.to(device)

    @property
    def first(self) -> Arm:
        """What a dictionary of two phases is made from."""
        shape, degree = ("dense", None) if self.shape == "pruned" else ("expander", self.degree)
        return replace(self, shape=shape, degree=degree, steps=self.first_steps)


def equal_values(arm: Arm, shape: str = "dense") -> Arm:
    """Dense atoms, as many as have together the numbers of `arm`'s: ⌊degree·n/m⌋, or half as many if untied, whose
    encoder counts. Raises `ValueError` where that leaves fewer than k."""
    n = arm.degree * arm.n_features // (arm.width * (2 if shape == "untied" else 1))
    if n < arm.k:
        raise ValueError(f"degree={arm.degree} leaves n={n} atoms of full length; allowed: at least k={arm.k}")
    return replace(arm, shape=shape, degree=None, n_features=n)


def pruned(dense: RankOneDictionary, degree: int) -> RankOneDictionary:
    """A tied dense SAE with the `degree` entries of largest size kept in each atom, packed, scaled to length 1."""
    atoms = dense.decoder.weight.detach()
    rows = atoms.abs().topk(degree, dim=1).indices.sort(dim=1).values
    return _packed_as(dense, atoms.gather(1, rows), rows)


@torch.no_grad()
def adapted(begun: RankOneDictionary, samples: Float[Tensor, "rows m"], random: torch.Generator) -> RankOneDictionary:
    """A packed SAE with as many numbers in all, but more in atoms that fire often: ∝ √(firing rate on `samples`).

    An atom that shrinks keeps its largest numbers, one that grows gets random places with zeros.
    """
    atoms, counts = begun.decoder, torch.zeros(begun.n_atoms, dtype=torch.long)
    for part in samples.split(1024):
        counts += begun.encode(part).firing_counts(begun.n_atoms)
    n, degree = atoms.weight.shape
    widest = min(WIDEST * degree, atoms.width)
    degrees = allotted(counts.double().sqrt(), n * degree, widest)
    order = atoms.weight.abs().argsort(dim=1, descending=True)
    own = atoms.rows.long().gather(1, order)
    free = torch.rand(n, atoms.width, generator=random).scatter(1, own, -1.0)
    more = free.topk(widest - degree, dim=1).indices
    values = F.pad(atoms.weight.gather(1, order), (0, widest - degree))
    return _packed_as(begun, values, torch.cat([own, more], dim=1), degrees)


def allotted(weight: Float[Tensor, " n"], total: int, most: int) -> Int[Tensor, " n"]:
    """`total` units shared out ∝ `weight`, from 1 to `most` each: whole numbers that add up exactly.

    Raises `ValueError` where no such shares exist.
    """
    n = len(weight)
    if not n <= total <= n * most:
        raise ValueError(f"total={total} cannot be shared by {n} atoms of 1 to most={most}; allowed: {n} to {n * most}")
    weight = weight.double() / weight.double().mean().clamp_min(1e-30) + 1e-9
    low, high = 0.0, total / float(weight.min())
    for _ in range(100):  # the sum of the clamped shares rises with the factor: bisect
        middle = (low + high) / 2
        low, high = (middle, high) if (weight * middle).clamp(1, most).sum() < total else (low, middle)
    shares = (weight * high).clamp(1, most)
    whole = shares.floor().long()
    rest = (shares - whole).masked_fill(whole >= most, -1)
    whole[rest.topk(total - int(whole.sum())).indices] += 1
    return whole


@torch.no_grad()
def _packed_as(like: RankOneDictionary, values: Tensor, rows: Tensor, degrees: Tensor | None = None):
    """An expander SAE with these numbers and the biases of `like`."""
    sae = expander_sae(
        rows, like.d_in, like.k, generator=settings.generator(0), b_dec=like.b_out.detach(),
        activation=like.activation, degrees=degrees, selection_bias=like.selection_bias is not None,
    )  # fmt: skip
    sae.encoder.weight.copy_(values if degrees is None else values.masked_fill(sae.encoder._unused(), 0.0))
    sae.encoder.bias.copy_(like.encoder.bias)
    sae.encoder.normalise_()
    return sae


def _with_encoder(arm: Arm, sae: RankOneDictionary, random: torch.Generator) -> RankOneDictionary:
    """The untied SAE with a smaller encoder that starts as near to the decoder as it can."""
    atoms, bias = sae.decoder.weight.detach(), sae.encoder.bias.detach()
    if arm.shape == "packed encoder":
        rows = left_regular(arm.n_features, arm.width, arm.degree, random)
        encoder = Packed(atoms.gather(1, rows), rows, arm.width, bias)
    else:
        rank = arm.degree * arm.n_features // (arm.n_features + arm.width)
        left, sizes, right = torch.linalg.svd(atoms, full_matrices=False)
        roots = sizes[:rank].sqrt()
        encoder = Rows(left[:, :rank] * roots, bias, down=roots[:, None] * right[:rank])
    options = {"activation": sae.activation, "unit_norm": True, "selection_bias": sae.selection_bias is not None}
    return RankOneDictionary(encoder, Rows(atoms), k=arm.k, b_in=sae.b_out, b_out=sae.b_out, **options)


def recipe(arm: Arm, times: int = 5) -> Balance:
    """Paper B's resampling, `times` intervals in the run as in its 5000 steps, toward a residual ∝ squared error.

    A low-rank encoder has no row to resample, so both small encoders get AuxK in its place.
    """
    if arm.shape in ("low-rank", "packed encoder"):
        return AuxK(silent_for=max(1, arm.steps // 10))
    return Resample(max(2, arm.steps // times), toward="residual", power=1.0)


def train(
    arm: Arm,
    setting: Setting,
    seed: int,
    *,
    device: str | torch.device = "cpu",
    cache_dir: str | Path | None | Literal[False] = None,
) -> Fit:
    """Train one arm, both phases where there are two, or load it from the cache where that was done before."""
    second = arm.first_steps > 0
    degree = "" if arm.degree is None else f" {arm.degree}"
    done = language_model.train(
        arm, setting, settings.mix(seed, 1) if second else seed, student=arm.student(setting, seed, device, cache_dir),
        steps=arm.steps - arm.first_steps, clip=CLIP, log_every=max(1, arm.steps // 50), device=device,
        cache_dir=cache_dir, label=f"{arm.shape}{degree}, n = {arm.n_features}, seed {seed}",
    )  # fmt: skip
    if second:
        done.seconds += train(arm.first, setting, seed, device=device, cache_dir=cache_dir).seconds
    return done


# -- the model with a reconstruction in it -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Passage:
    """Held-out text, and the place in the model where its rows are replaced. Names only: it travels to a worker."""

    teacher: str
    corpus: str
    layer: int
    site: str
    n_tokens: int
    split: str = "test"
    device: str = "cpu"
    cache_dir: str | None = field(default=None, compare=False)

    @property
    def scene(self) -> Scene:
        """The model and its rows on this text: made once in a process."""
        return _scene(self)


@cache
def _scene(passage: Passage) -> Scene:
    return Scene(passage, teachers.load(passage.teacher, device=passage.device, cache_dir=passage.cache_dir))


class Scene:
    """A model on a passage: its rows at the site, in the order in which it meets them, and its loss with others there.

    `rows` [rows, m] in the model's own units, `articles` [rows]; `clean` [articles] are the sums of its loss in nats.
    """

    def __init__(self, passage: Passage, teacher: teachers.Teacher, batch_size: int = 8):
        self.passage, self.teacher, self.batch_size = passage, teacher, batch_size
        self._pieces = activations.texts(teacher, passage.corpus, n_tokens=passage.n_tokens, split=passage.split)
        parts: list[Tensor] = []

        def look(rows: Tensor) -> Tensor:
            parts.append(rows.float().cpu())
            return rows

        self.clean = self._nats(look)
        self.rows, self._sizes = torch.cat(parts), [len(part) for part in parts]
        pieces = self._pieces
        order = [i for batch in pieces.batches(batch_size) for i in batch]
        self.articles = torch.from_numpy(
            np.concatenate([np.full(len(pieces.tokens[i]) - pieces.bos, pieces.articles[i]) for i in order])
        )

    def nats(self, rows: Float[Tensor, "rows m"]) -> Float[np.ndarray, " articles"]:
        """The model's loss by article, with these in the place of `rows`."""
        if rows.shape != self.rows.shape:
            raise ValueError(f"rows has shape {tuple(rows.shape)}; allowed: {tuple(self.rows.shape)}, as the passage's")
        parts = iter(rows.split(self._sizes))
        return self._nats(lambda given: next(parts).to(given))

    def ablated(self, row: Float[Tensor, " m"]) -> Float[np.ndarray, " articles"]:
        """The loss with one row everywhere: zeros, or the mean of the training rows."""
        return self.nats(row.to(self.rows).expand_as(self.rows))

    def _nats(self, function: Callable[[Tensor], Tensor]) -> np.ndarray:
        splice = Splice(self.passage.layer, self.passage.site, function)
        frame = activations.losses(self.teacher, self._pieces, splice, batch_size=self.batch_size)
        return frame.groupby("article").nats.sum().to_numpy()


# -- what is measured --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Trial:
    """What one trained dictionary does on held-out rows.

    `errors`, `norms` (‖x − x̄‖²), `relative` (‖x − x̂‖/‖x‖) and `rows` are sums over each article's test rows; `rates`
    is how often each latent fires there. On the passage: `nats` [ways, articles] the model's loss by `SPLICED`,
    `way_errors` the squared errors, and `spectrum` the share of the variance left along each principal direction.
    """

    arm: Arm
    setting: Setting
    seed: int
    ways: tuple[str, ...]
    validation_fvu: float
    errors: Float[np.ndarray, " articles"]
    norms: Float[np.ndarray, " articles"]
    relative: Float[np.ndarray, " articles"]
    rows: Float[np.ndarray, " articles"]
    rates: Float[np.ndarray, " n"]
    spectrum: Float[np.ndarray, " m"]
    nats: Float[np.ndarray, "spliced places"]
    way_errors: Float[np.ndarray, "codings places"]
    way_norms: Float[np.ndarray, " places"]
    values: int
    parameters: int
    file_bytes: int
    training_bytes: int
    seconds: float

    @property
    def fvu(self) -> float:
        return float(self.errors.sum() / self.norms.sum())

    @property
    def relative_error(self) -> float:
        """Mean of ‖x − x̂‖/‖x‖, the paper's `rel_err`."""
        return float(self.relative.sum() / self.rows.sum())

    @property
    def dead(self) -> float:
        """Share of latents that fire on none of the held-out rows."""
        return float((self.rates == 0).mean())

    def way_fvu(self, way: str) -> float:
        """FVU on the passage's rows."""
        return float(self.way_errors[self.ways.index(way)].sum() / self.way_norms.sum())

    def nats_of(self, way: str) -> Float[np.ndarray, " places"]:
        """The model's loss by article with these reconstructions."""
        return self.nats[[each for each in self.ways if each in SPLICED].index(way)]

    def row(self) -> dict[str, object]:
        """The trial as a results file has it."""
        return {
            "shape": self.arm.shape,
            "degree": self.arm.degree,
            "n_features": self.arm.n_features,
            "k": self.arm.k,
            "lr": self.setting.lr,
            "balance": repr(self.setting.balance),
            "seed": self.seed,
            "steps": self.arm.steps,
            "values": self.values,
            "parameters": self.parameters,
            "file_bytes": self.file_bytes,
            "training_bytes": self.training_bytes,
            "fvu": self.fvu,
            "relative_error": self.relative_error,
            "dead": self.dead,
            "n_rows": int(self.rows.sum()),
            "way_fvu": {way: self.way_fvu(way) for way in self.ways},
            "validation_fvu": self.validation_fvu,
            "seconds": round(self.seconds, 1),
        }


def validation_error(arm: Arm, setting: Setting, seed: int, device: str = "cpu", cache_dir=None) -> float:
    """Train one arm and return its mean ‖x − x̂‖/‖x‖ on validation rows: a task for `sweep`.

    Learning rates are chosen by it and not by FVU, because a handful of outlier rows can make most of an FVU.
    """
    sae, rows = train(arm, setting, seed, device=device, cache_dir=cache_dir).student, arm.rows("validation")
    return float((evaluate(sae, rows).squared_error.sqrt() / rows.double().norm(dim=1)).mean())


def trial(
    arm: Arm,
    setting: Setting,
    seed: int,
    passage: Passage,
    ways: Sequence[str] = ("encoder",),
    device: str = "cpu",
    cache_dir: str | Path | None | Literal[False] = None,
) -> Trial:
    """Train one arm and measure it by the `ways` to find codes: a task for `sweep`. Both are kept in the cache folder,
    unless that is False."""
    if unknown := set(ways) - set(WAYS):
        raise ValueError(f"ways names {', '.join(sorted(unknown))}; allowed: {', '.join(WAYS)}")
    if "encoder" not in ways:
        raise ValueError(f"ways={tuple(ways)} leaves out 'encoder'; allowed: it, and others beside it")
    ways = tuple(ways)
    where = replace(passage, device=torch.device(passage.device).type)
    found = kept.keep(
        "trials", [arm.nameless, setting, seed, where, ways, torch.device(device).type],
        lambda: language_model._columns(_trial(arm, setting, seed, passage, ways, device, cache_dir), 4),
        cache_dir=cache_dir,
    )  # fmt: skip
    return Trial(arm, setting, seed, ways, **found)


@torch.no_grad()
def _trial(arm: Arm, setting: Setting, seed: int, passage: Passage, ways: tuple[str, ...], device, cache_dir) -> Trial:
    with torch.enable_grad():
        done = train(arm, setting, seed, device=device, cache_dir=cache_dir)
    sae, test = done.student, arm.rows("test")
    article = torch.from_numpy(arm.store("test").article.astype(np.int64))
    after = evaluate(sae, test)
    scene = passage.scene
    rows = scene.rows / arm.scale
    guesses = {way: reconstructions(sae, rows, way) for way in ways}
    spliced = [scene.nats(guess * arm.scale) for way, guess in guesses.items() if way in SPLICED]
    stored = bytes_of(sae)
    return Trial(
        arm=arm,
        setting=setting,
        seed=seed,
        ways=ways,
        validation_fvu=evaluate(sae, arm.rows("validation")).fvu,
        errors=by_group(after.squared_error, article),
        norms=by_group(after.squared_norm, article),
        relative=by_group(after.squared_error.sqrt() / test.double().norm(dim=1), article),
        rows=by_group(torch.ones(len(test)), article),
        rates=after.rates.numpy(),
        spectrum=spectrum(arm, rows, guesses[ways[0]]),
        nats=np.stack(spliced),
        way_errors=np.stack(
            [by_group((rows - guess).double().square().sum(1), scene.articles) for guess in guesses.values()]
        ),
        way_norms=by_group((rows - rows.mean(0)).double().square().sum(1), scene.articles),
        values=decoder_values(sae),
        parameters=sae.n_parameters,
        file_bytes=stored["file"],
        training_bytes=stored["training"],
        seconds=done.seconds,
    )


def reconstructions(
    sae: RankOneDictionary, rows: Float[Tensor, "rows m"], way: str = "encoder", *, batch_size: int = 4096
) -> Float[Tensor, "rows m"]:
    """b_dec + Σ values · d_j with codes found in a way of `WAYS`; matching pursuit chooses by SIGNED correlation, as
    paper B does, and solves for coefficients of either sign."""
    where, parts = next(sae.parameters()), []
    for part in rows.split(batch_size):
        x = part.to(where.device, where.dtype)
        codes = None if way == "pursuit" else sae.encode(x)
        if way == "pursuit":
            codes = omp(x - sae.b_out, sae.decoder, sae.k, select="signed")
        elif way == "solved":
            codes = replace(codes, values=least_squares(x - sae.b_out, sae.decoder, codes.indices))
        parts.append(sae.decode(codes).cpu())
    return torch.cat(parts).to(rows)


def spectrum(arm: Arm, rows: Float[Tensor, "rows m"], guess: Float[Tensor, "rows m"]) -> Float[np.ndarray, " m"]:
    """Share of the rows' variance that is left in the error, along each principal direction of the training rows."""
    axes = torch.linalg.eigh(arm.store("train").moments(arm.site).cov).eigenvectors.flip(1)
    error, spread = (rows - guess).double() @ axes, (rows - rows.mean(0)).double() @ axes
    return (error.square().mean(0) / spread.square().mean(0)).numpy()


# -- what is stored ----------------------------------------------------------------------------------------------------


def decoder_values(sae: RankOneDictionary) -> int:
    """Numbers in the decoder's atoms, biases not counted."""
    return sae.decoder.n_values if isinstance(sae.decoder, Packed) else sae.decoder.weight.numel()


def bytes_of(sae: RankOneDictionary) -> dict[str, int]:
    """Bytes, by doing it: of the saved `file`, of parameters and buffers in `memory`, and in `training`, where each
    parameter has a gradient and Adam's two moments too."""
    parameters = list(sae.parameters())
    buffers = {id(b): b for b in sae.buffers()}.values()
    numbers = sum(p.numel() * p.element_size() for p in parameters)
    extra = sum(b.numel() * b.element_size() for b in buffers)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saved")
        if isinstance(sae.decoder, Packed):
            save_packed(sae, path)
        else:
            tensors = {name: p.detach().cpu().contiguous() for name, p in sae.named_parameters()}
            save_file(tensors | {f"buffer{i}": b.cpu().contiguous() for i, b in enumerate(buffers)}, path)
        return {"file": path.stat().st_size, "memory": numbers + extra, "training": 4 * numbers + extra}


# -- grids, and numbers made of them -----------------------------------------------------------------------------------

Name = tuple[str, int | None]
"""A cell of the chapter: what is special about it, and the degree that it is about (None: dense)."""


def tuned(
    cells: Mapping[Name, tuple[Arm, Setting]],
    lrs: Sequence[float],
    seed: int,
    *,
    further: int = 0,
    device: str,
    cache_dir,
    workers: int | None,
) -> dict[Name, dict[float, float]]:
    """Validation error of every cell at every learning rate in place of its own, with one seed.

    Where a cell's best rate is the first or the last of its grid, the grid is continued there by the factor between
    its last two rates, `further` times at most. Raises `ValueError` for rates that do not rise.
    """
    if not lrs or list(lrs) != sorted(set(lrs)) or lrs[0] <= 0:
        raise ValueError(f"lrs={list(lrs)}; allowed: positive rates that rise")
    found: dict[Name, dict[float, float]] = {name: {} for name in cells}
    wanted = [(name, lr) for name in cells for lr in lrs]
    for extension in range(further + 1):
        arguments = [
            {"arm": cells[name][0], "setting": replace(cells[name][1], lr=lr), "seed": seed} for name, lr in wanted
        ]
        arguments = [each | {"device": device, "cache_dir": cache_dir} for each in arguments]
        label = "learning rates" if not extension else f"further learning rates ({extension})"
        errors = sweep(validation_error, arguments, label=label, workers=workers) if wanted else []
        for (name, lr), error in zip(wanted, errors, strict=True):
            found[name][lr] = error
        wanted = [(name, lr) for name, errors in found.items() if (lr := _beyond(errors)) is not None]
    return {name: dict(sorted(errors.items())) for name, errors in found.items()}


def _beyond(errors: Mapping[float, float]) -> float | None:
    """The next rate on the side where the best one is an end of the grid; None where it is inside."""
    rates, best = sorted(errors), min(errors, key=errors.get)
    if len(rates) < 2 or best not in (rates[0], rates[-1]):
        return None
    end, before = (rates[0], rates[1]) if best == rates[0] else (rates[-1], rates[-2])
    return float(f"{end * end / before:.2g}")


def trials(
    cells: Mapping[Name, tuple[Arm, Setting]],
    seeds: Sequence[int],
    passage: Passage,
    *,
    ways: Mapping[str, Sequence[str]],
    label: str,
    device: str,
    cache_dir,
    workers: int | None,
) -> dict[Name, list[Trial]]:
    """Every cell with every seed, seeds outside so that a run that is stopped has whole seeds first. `ways` by the
    name's first part; the encoder alone where it says nothing."""
    options = {"passage": passage, "device": device, "cache_dir": cache_dir}
    order = [(name, seed) for seed in seeds for name in cells]
    arguments = [
        {"arm": cells[name][0], "setting": cells[name][1], "seed": seed, "ways": tuple(ways.get(name[0], ("encoder",)))}
        | options
        for name, seed in order
    ]
    found: dict[Name, list[Trial]] = {name: [] for name in cells}
    for (name, _), each in zip(order, sweep(trial, arguments, label=label, workers=workers), strict=True):
        found[name].append(each)
    return found


@dataclass(frozen=True)
class Yardstick:
    """The model's loss by article on a passage: untouched, with zeros at the site, with the training rows' mean."""

    clean: Float[np.ndarray, " articles"]
    zero: Float[np.ndarray, " articles"]
    mean: Float[np.ndarray, " articles"]

    @classmethod
    def of(cls, scene: Scene, mean: Float[Tensor, " m"]) -> Yardstick:
        """`mean` in the model's own units."""
        return cls(scene.clean, scene.ablated(torch.zeros_like(mean)), scene.ablated(mean))

    def compare(
        self,
        series: Mapping[Hashable, Mapping[int, Float[np.ndarray, " articles"]]],
        statistic: Callable[[dict[Hashable, float]], float],
        ablation: str = "zero",
        **bootstrap,
    ) -> Comparison:
        """A statistic of CE recovered, one number for each name: losses are averaged over seeds, summed over articles.

        `series` holds, by name and seed, the model's loss by article. Seeds (those that all have) and articles are
        resampled together for all names.

        Raises `ValueError` for another ablation, or when the names have no seed in common.
        """
        if ablation not in ("zero", "mean"):
            raise ValueError(f"ablation={ablation!r} is unknown; allowed: 'zero', 'mean'")
        names, ablated = list(series), getattr(self, ablation)
        seeds = sorted(set.intersection(*(set(each) for each in series.values())))
        if not seeds:
            raise ValueError(f"no seed is common to {', '.join(map(str, names))}; allowed: at least one")
        columns = [[*(series[name][seed] for name in names), ablated, self.clean] for seed in seeds]
        data = np.stack([np.stack(each, axis=1) for each in columns])  # [seeds, articles, names + 2]

        def of(some: np.ndarray) -> float:
            *spliced, worst, intact = some.sum((0, 1))
            return statistic({name: ce_recovered(worst, x, intact) for name, x in zip(names, spliced, strict=True)})

        return compared(data, of, **bootstrap)

    def recovered(self, runs: Sequence[Trial], way: str = "encoder", ablation: str = "zero", **bootstrap) -> Comparison:
        """CE recovered by one cell."""
        return self.compare({"": by_seed(runs, way)}, lambda found: found[""], ablation, **bootstrap)


def by_seed(runs: Sequence[Trial], way: str = "encoder") -> dict[int, Float[np.ndarray, " articles"]]:
    """The model's loss by article, by seed, as `Yardstick.compare` takes it."""
    return {each.seed: each.nats_of(way) for each in runs}


def slope(recovered: Mapping[int, float]) -> float:
    """Least-squares slope of CE recovered against log10 of the degree: per factor of ten in stored values."""
    degrees, values = zip(*recovered.items(), strict=True)
    return float(np.polyfit(np.log10(degrees), values, 1)[0])


def falls(values: Sequence[float]) -> int:
    """How many of the steps from one value to the next go down."""
    return sum(after < before for before, after in pairwise(values))


BY_SEED = ("fvu", "relative_error", "dead", "seconds")


def points(found: Mapping[Name, Sequence[Trial]], yardstick: Yardstick, **bootstrap) -> list[dict[str, object]]:
    """Every cell as a results file has it: CE recovered by way and ablation with intervals, and what all seeds say."""
    rows = []
    for (cell, degree), runs in found.items():
        row = runs[0].row() | {"cell": cell, "degree": degree, "seeds": [each.seed for each in runs]}
        row |= {f"{name}_by_seed": [getattr(each, name) for each in runs] for name in BY_SEED}
        for ablation in ("zero", "mean"):
            for way in set(runs[0].ways) & set(SPLICED):
                told = yardstick.recovered(runs, way, ablation, **bootstrap)
                row[f"{way}_{ablation}"] = [told.value, *told.ci]
                row[f"{way}_{ablation}_by_seed"] = told.by_seed
        row["way_fvu"] = {way: float(np.mean([each.way_fvu(way) for each in runs])) for way in runs[0].ways}
        rows.append(row | _curves(runs[0]))
    return rows


def _curves(one: Trial) -> dict[str, list]:
    """The first seed's spectrum (averaged within bins of rank) and firing rates (at ranks), 40 points each."""
    m, rates = len(one.spectrum), np.sort(one.rates)[::-1]
    edges = sorted({*np.round(np.geomspace(1, m + 1, 41)).astype(int).tolist()})
    bins = [[math.sqrt(a * (b - 1)), float(one.spectrum[a - 1 : b - 1].mean())] for a, b in pairwise(edges)]
    ranks = sorted({*np.round(np.geomspace(1, len(rates), 40)).astype(int).tolist()})
    return {"spectrum": bins, "curve": [[rank, float(rates[rank - 1])] for rank in ranks]}


# -- what a page shows of them -----------------------------------------------------------------------------------------

NAMES = {
    "expander": "expander",
    "dense": "dense, tied",
    "untied": "dense, untied",
    "equal": "dense, as many values",
    "equal, untied": "dense, untied, as many",
    "clustered": "clustered, all rows",
    "released": "clustered, as released",
    "informed": "co-occurrence",
    "pruned": "pruned and retuned",
    "adaptive": "adaptive degree",
}
"""What a reader calls a cell."""


def named(point: Mapping[str, object]) -> str:
    """A point's cell and degree, for a label."""
    return f"{NAMES.get(point['cell'], point['cell'])}, d = {point['degree']}"


def table(points: Sequence[Mapping[str, object]], columns: Sequence[str]) -> pd.DataFrame:
    """Cells in rows: of a value with its interval the value, of a value by seed the mean over seeds."""

    def number(name: str, value):
        if not isinstance(value, list):
            return value
        return float(np.mean(value)) if name.endswith("_by_seed") else value[0]

    rows = [{name.removesuffix("_by_seed"): number(name, p[name]) for name in columns} for p in points]
    index = pd.Index([NAMES.get(p["cell"], p["cell"]) for p in points], name="cell")
    return pd.DataFrame(rows, index=index).round(3)


def outcomes(differences: Sequence[Mapping[str, object]]) -> dict[str, list[str]]:
    """Controls that the expander beats, ties with, loses to: the difference's `ci` is above, about or below 0."""
    found: dict[str, list[str]] = {"beats": [], "ties with": [], "loses to": []}
    for point in differences:
        low, high = point["ci"]
        found["beats" if low > 0 else "loses to" if high < 0 else "ties with"].append(named(point))
    return found


def best(points: Sequence[Mapping[str, object]], budget: float) -> Mapping[str, object] | None:
    """The cell that recovers most CE (zero ablation, encoder) in at most `budget` bytes of file; None if none fits."""
    fits = [point for point in points if point["file_bytes"] <= budget]
    return max(fits, key=lambda point: point["encoder_zero"][0], default=None)


# -- packed experts ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackedSpec(Spec):
    """A secret-MoE student whose experts read `degree` coordinates of the input and write `degree` of the output."""

    degree: int = 32

    @property
    def label(self) -> str:
        return f"{super().label}, packed {self.degree}"

    def build(self, d_in: int, d_out: int, generator: torch.Generator) -> RankOneDictionary:
        """As `secret_moe`, with PyTorch's usual start for neurons that read `degree` numbers."""
        dense = super().build(d_in, d_out, generator)
        encoder = _sparse(dense.encoder.weight, self.degree, (d_in / self.degree) ** 0.5, dense.encoder.bias, generator)
        decoder = _sparse(dense.decoder.weight, self.degree, (d_out / self.degree) ** 0.5, None, generator)
        return RankOneDictionary(
            encoder, decoder, k=dense.k, router=dense.router, gate="softmax", activation="gelu", b_out=dense.b_out,
            shared=dense.shared, selection_bias=dense.selection_bias is not None,
        )  # fmt: skip


def _sparse(weight: Tensor, degree: int, scale: float, bias: Tensor | None, random: torch.Generator) -> Packed:
    """Random places of dense rows, packed, times `scale`."""
    rows = left_regular(len(weight), weight.shape[1], degree, random)
    return Packed(scale * weight.detach().gather(1, rows), rows, weight.shape[1], bias)


def expert_values(student: RankOneDictionary) -> int:
    """Stored numbers of the experts, in and out, without biases, router and shared part."""
    parts = (student.encoder, student.decoder)
    return sum(part.n_values if isinstance(part, Packed) else part.weight.numel() for part in parts)


def expert_row(name: str, found: Distillation) -> dict[str, object]:
    """A kind of experts as a results file has it."""
    one = found.students[0]
    return {
        "experts": name,
        "count": found.spec.experts,
        "fvu": found.fvu,
        "lr": found.lr,
        "expert values": expert_values(one.fit.student),
        "parameters": one.fit.student.n_parameters,
        "dead": one.test.dead,
    }


def packed_experts(spec: Spec, degree: int, d_in: int, d_out: int) -> PackedSpec:
    """Packed experts, as many as have the stored numbers of `spec`'s dense ones."""
    experts = spec.experts * (d_in + d_out) // (2 * degree)
    if not math.isfinite(experts) or experts < spec.experts:
        raise ValueError(f"degree={degree} leaves {experts} experts; allowed: at most {(d_in + d_out) // 2}")
    return PackedSpec(spec.active, experts, spec.shared, spec.router_rank, spec.balance, degree)
