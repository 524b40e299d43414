"""How much of a language model's loss a dictionary keeps for each number it stores, and what earns that.

`Shape` builds a dictionary: packed atoms on a mask, dense atoms in fewer columns, atoms pruned from dense ones.
`Spliced` is the `study.Problem`: it measures on held-out articles what the model loses with a dictionary's
reconstructions, by the encoder and by matching pursuit on the same decoder.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float, Int
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from helpers import settings
from helpers.dictionary import Packed, RankOneDictionary, Rows, expander_sae, save_packed, topk_sae
from helpers.parts.distilling import Spec
from helpers.parts.language_model import WAYS, Passage, SiteRows, codes_on, reconstructions
from helpers.parts.masks import clustered, informed, left_regular
from helpers.parts.worlds import clamped_to
from helpers.settings import allowed, one_of
from helpers.study.scores import Sums, by_group
from helpers.study.study import Arm, Judged, Outcome
from helpers.training.remedies import AuxK, Balance, Resample

CLIP = 1.0
"""Largest norm of a step's gradient, as in paper B's training."""
SAMPLES = 8192
"""Training rows that an informed mask and an adaptive degree look at."""
WIDEST = 4
"""An adaptive atom gets at most this many times the mean degree."""
NATS = {"encoder": "nats", "pursuit": "pursuit_nats"}
"""Ways whose reconstructions are put into the model, and the columns of its loss; others are judged by error alone."""


# -- the dictionaries --------------------------------------------------------------------------------------------------

MASKS = ("expander", "clustered", "released", "informed")
"""Uniform; blocks that reach all rows; blocks as released, which do not; rows large together in data."""

PHASES = {"pruned": 0.5, "adaptive": 0.25}
"""Shapes that are made from another dictionary, and the share of the steps that trains that one first."""

SHAPES = ("dense", "untied", "low-rank", "packed encoder", *MASKS, *PHASES)


@dataclass(frozen=True)
class Shape:
    """Builds the dictionary of an `Arm` before its (last) phase of training, with b_dec at the mean: a seed starts all
    of a kind from the same atoms.

    Args:
        shape: in `SHAPES`. "dense" is tied; "low-rank" and "packed encoder" have a dense decoder and an encoder of its
            own with `degree` numbers an atom (a low-rank one as many in all, rounded down).
        degree: numbers of an atom; None for dense and untied ones.
    """

    n_features: int
    k: int
    shape: str = "dense"
    degree: int | None = None

    def __post_init__(self):
        one_of("shape", self.shape, SHAPES)
        dense = self.shape in ("dense", "untied")
        given = f"degree={self.degree} with shape={self.shape!r}"
        allowed((self.degree is None) == dense, given, "a number unless it is dense")

    def __call__(self, problem: SiteRows, seed: int, begun: RankOneDictionary | None = None) -> RankOneDictionary:
        """`begun`: what a shape of two phases is made from, trained (see `arm`)."""
        random = settings.generator(seed)
        options = {"generator": random, "b_dec": problem.mean, "activation": "identity"}
        if self.shape == "pruned":
            return pruned(begun, self.degree)
        if self.shape == "adaptive":
            return adapted(begun, samples(problem, random), random)
        if self.shape in MASKS:
            return expander_sae(self._mask(problem, random), problem.d_model, self.k, **options)
        sae = topk_sae(problem.d_model, self.n_features, self.k, tied=self.shape == "dense", **options)
        return sae if self.shape in ("dense", "untied") else self._with_encoder(sae, random)

    def _mask(self, problem: SiteRows, random: torch.Generator) -> Int[Tensor, "n degree"]:
        sizes = self.n_features, problem.d_model, self.degree, random
        if self.shape == "expander":
            return left_regular(*sizes)
        if self.shape == "informed":
            return informed(samples(problem, random), self.n_features, self.degree, random)
        return clustered(*sizes, every_row=self.shape == "clustered")

    def _with_encoder(self, sae: RankOneDictionary, random: torch.Generator) -> RankOneDictionary:
        """The untied SAE with a smaller encoder that starts as near to the decoder as it can."""
        atoms, bias = sae.decoder.weight.detach(), sae.encoder.bias.detach()
        n, width = atoms.shape
        if self.shape == "packed encoder":
            rows = left_regular(n, width, self.degree, random)
            encoder = Packed(atoms.gather(1, rows), rows, width, bias)
        else:
            rank = self.degree * n // (n + width)
            left, sizes, right = torch.linalg.svd(atoms, full_matrices=False)
            roots = sizes[:rank].sqrt()
            encoder = Rows(left[:, :rank] * roots, bias, down=roots[:, None] * right[:rank])
        options = {"activation": sae.activation, "unit_norm": True}
        return RankOneDictionary(encoder, Rows(atoms), k=self.k, b_in=sae.b_out, b_out=sae.b_out, **options)


def samples(problem: SiteRows, random: torch.Generator) -> Float[Tensor, "rows d_model"]:
    """Some training rows, divided."""
    store = problem.store("train")
    pick = torch.randperm(len(store), generator=random)[:SAMPLES].sort().values.numpy()
    return store.tensor(problem.site, pick) / problem.scale


def equal_values(build: Shape, d_model: int, shape: str = "dense") -> Shape:
    """Dense atoms, as many as have together the numbers of `build`'s: ⌊degree·n/d_model⌋, or half as many if untied,
    whose encoder counts. Raises `ValueError` where that leaves fewer than k."""
    n = build.degree * build.n_features // (d_model * (2 if shape == "untied" else 1))
    allowed(n >= build.k, f"degree={build.degree} leaves n={n} atoms of full length", f"at least k={build.k}")
    return Shape(n, build.k, shape)


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
    atoms, counts = begun.decoder, codes_on(begun, samples).firing_counts(begun.n_atoms)
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
    """`total` units shared out ∝ `weight`, from 1 to `most` each: whole numbers that add up exactly."""
    n = len(weight)
    given = f"total={total} cannot be shared by {n} atoms of 1 to most={most}"
    allowed(n <= total <= n * most, given, f"{n} to {n * most}")
    shares = clamped_to(total, weight.double() / weight.double().mean().clamp_min(1e-30) + 1e-9, 1, most)
    whole = shares.floor().long()
    rest = (shares - whole).masked_fill(whole >= most, -1)
    whole[rest.topk(total - int(whole.sum())).indices] += 1
    return whole


@torch.no_grad()
def _packed_as(like: RankOneDictionary, values: Tensor, rows: Tensor, degrees: Tensor | None = None):
    """An expander SAE with these numbers and the biases of `like`."""
    options = {"b_dec": like.b_out.detach(), "activation": like.activation, "degrees": degrees}
    sae = expander_sae(rows, like.d_in, like.k, generator=settings.generator(0), **options)
    sae.encoder.weight.copy_(values if degrees is None else values.masked_fill(sae.encoder._unused(), 0.0))
    sae.encoder.bias.copy_(like.encoder.bias)
    sae.encoder.normalise_()
    return sae


def recipe(build: Shape, steps: int, times: int = 5) -> Balance:
    """Paper B's resampling, `times` intervals in the run as in its 5000 steps, toward a residual ∝ squared error.

    A low-rank encoder has no row to resample, so both small encoders get AuxK in its place.
    """
    if build.shape in ("low-rank", "packed encoder"):
        return AuxK(silent_for=max(1, steps // 10))
    return Resample(max(2, steps // times), toward="residual", power=1.0)


def arm(build: Shape, remedy: Balance, lr: float, steps: int) -> Arm:
    """How a shape is trained: at once, or in two phases of `steps` together, the second over batches of its own."""
    name = build.shape if build.degree is None else f"{build.shape} {build.degree}"
    one = Arm(name, build, remedy, lr, {"clip": CLIP})
    if build.shape not in PHASES:
        return one
    begin = round(PHASES[build.shape] * steps)
    begun = {"shape": "dense", "degree": None} if build.shape == "pruned" else {"shape": "expander"}
    first = replace(one, name=f"before {name}", build=replace(build, **begun), recipe=one.recipe | {"steps": begin})
    return replace(one, recipe=one.recipe | {"steps": steps - begin}, batches=1, first=first)


# -- what is measured, and stored --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Spliced(SiteRows):
    """Rows of a site, and a passage on which the model's loss is measured with a student's reconstructions in it, from
    codes that are found in the `ways` (of `language_model.WAYS`)."""

    passage: Passage | None = None
    ways: tuple[str, ...] = ("encoder",)

    def __post_init__(self):
        super().__post_init__()
        good = "encoder" in self.ways and set(self.ways) <= set(WAYS)
        allowed(good, f"ways={self.ways}", f"'encoder', and beside it {', '.join(WAYS[1:])}")
        allowed(self.passage is not None, "passage=None", "a Passage")

    @torch.no_grad()
    def judge(self, student: RankOneDictionary, seed: int) -> Judged:
        """As for `SiteRows`, and on the passage by article: the model's loss (`NATS`), `passage_norms`, and each way's
        squared errors. `spectrum`: the share of the variance left along principal directions, by the encoder."""
        judged, scene = super().judge(student, seed), self.passage.scene
        rows = scene.rows / self.scale
        guesses = {way: reconstructions(student, rows, way) for way in self.ways}
        sums = {"passage_norms": by_group((rows - rows.mean(0)).double().square().sum(1), scene.articles)}
        for way, guess in guesses.items():
            sums[f"{way}_errors"] = by_group((rows - guess).double().square().sum(1), scene.articles)
            if way in NATS:
                sums[NATS[way]] = scene.nats(guess * self.scale)
        own = {column: values for column, values in judged.sums.items() if column != "counts"}
        stored = bytes_of(student)
        about = {"values": stored_values(student.decoder), "parameters": student.n_parameters}
        about |= {f"{name}_bytes": stored[name] for name in ("file", "training")}
        about["spectrum"] = binned(spectrum(self, rows, guesses["encoder"]))
        return Judged(own | sums, judged.validation, judged.about | about)


def spectrum(
    problem: SiteRows, rows: Float[Tensor, "rows d_model"], guess: Float[Tensor, "rows d_model"]
) -> Float[np.ndarray, " d_model"]:
    """Share of the rows' variance that is left in the error, along each principal direction of the training rows."""
    axes = torch.linalg.eigh(problem.store("train").moments(problem.site).cov).eigenvectors.flip(1)
    error, spread = (rows - guess).double() @ axes, (rows - rows.mean(0)).double() @ axes
    return (error.square().mean(0) / spread.square().mean(0)).numpy()


def binned(spectrum: Float[np.ndarray, " d_model"]) -> list[list[float]]:
    """Means within 40 bins of rank that widen: pairs of rank and share."""
    edges = sorted({*np.round(np.geomspace(1, len(spectrum) + 1, 41)).astype(int).tolist()})
    return [[math.sqrt(a * (b - 1)), float(spectrum[a - 1 : b - 1].mean())] for a, b in pairwise(edges)]


def stored_values(rows: Rows | Packed) -> int:
    """Numbers in atoms, biases not counted."""
    return rows.n_values if isinstance(rows, Packed) else rows.weight.numel()


def bytes_of(sae: RankOneDictionary) -> dict[str, int]:
    """Bytes, by doing it: of the saved `file`, of parameters and buffers in `memory`, and in `training`, where each
    parameter has a gradient and Adam's two moments too."""
    numbers, extra = (sum(t.numel() * t.element_size() for t in some) for some in (sae.parameters(), sae.buffers()))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "saved")
        if isinstance(sae.decoder, Packed):
            save_packed(sae, path)
        else:
            named = dict(sae.named_parameters()) | {f"buffer{i}": b for i, b in enumerate(sae.buffers())}
            save_file({name: t.detach().cpu().contiguous() for name, t in named.items()}, path)
        return {"file": path.stat().st_size, "memory": numbers + extra, "training": 4 * numbers + extra}


def reported_cell(cell: tuple[str, int | None], runs: Sequence[Outcome], table: Sums, steps: int) -> dict[str, object]:
    """A cell (what is special about it, and the degree that it is about) as a results file has it: the first seed, what
    all seeds say, and CE recovered by way and ablation with intervals."""
    one, build = runs[0], runs[0].arm.build
    totals = [{column: float(each.sums[column].sum()) for column in ("relative", "rows")} for each in runs]
    by_seed = {
        "fvu": [each.fvu for each in runs],
        "relative_error": [each["relative"] / each["rows"] for each in totals],  # mean ‖x − x̂‖/‖x‖: the paper's rel_err
        "dead": [each.about["dead"] for each in runs],
        "seconds": [round(each.seconds, 1) for each in runs],
    }
    row = {"cell": cell[0], "degree": cell[1], "shape": build.shape, "n_features": build.n_features, "k": build.k}
    row |= {"lr": one.arm.lr, "balance": repr(one.arm.remedy), "steps": steps, "n_rows": int(totals[0]["rows"])}
    row |= {"seed": one.seed, "seeds": [each.seed for each in runs], "validation_fvu": one.validation["fvu"]}
    row |= {name: values[0] for name, values in by_seed.items()} | one.about
    row |= {f"{name}_by_seed": values for name, values in by_seed.items()}
    ways = [way for way in WAYS if f"{way}_errors" in one.sums]
    norms = [each.sums["passage_norms"].sum() for each in runs]
    errors = {way: [each.sums[f"{way}_errors"].sum() for each in runs] for way in ways}
    row["way_fvu"] = {way: float(np.mean(np.divide(errors[way], norms))) for way in ways}
    for ablation in ("zero", "mean"):
        for way in (way for way in ways if way in NATS):
            ce = table.compare(lambda it, way=way, ablation=ablation: it.ce_recovered(ablation, NATS[way]), cell)
            row |= {f"{way}_{ablation}": [ce.value, *ce.ci], f"{way}_{ablation}_by_seed": ce.by_seed}
    return row


# -- what a page shows of them -----------------------------------------------------------------------------------------

NAMES = {
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
        student = super().build(d_in, d_out, generator)
        student.encoder = self._sparse(student.encoder, generator)
        student.decoder = self._sparse(student.decoder, generator)
        return student

    def _sparse(self, dense: Rows, random: torch.Generator) -> Packed:
        """Random places of dense rows, packed, as much larger as they are fewer."""
        (n, width), bias = dense.weight.shape, None if dense.bias is None else dense.bias.detach()
        rows = left_regular(n, width, self.degree, random)
        return Packed((width / self.degree) ** 0.5 * dense.weight.detach().gather(1, rows), rows, width, bias)


def packed_experts(spec: Spec, degree: int, d_in: int, d_out: int) -> PackedSpec:
    """Packed experts, as many as have the stored numbers of `spec`'s dense ones."""
    experts = spec.experts * (d_in + d_out) // (2 * degree)
    allowed(experts >= spec.experts, f"degree={degree} leaves {experts} experts", f"at most {(d_in + d_out) // 2}")
    return PackedSpec(spec.active, experts, spec.shared, spec.router_rank, spec.balance, degree)
