"""How well a dictionary reconstructs, what its features do, and how sure we are.

Definitions follow the book's glossary: FVU is centred on the mean of the same rows and summed in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float, Int, Num
from scipy.optimize import linear_sum_assignment
from scipy.special import expit, logit, stdtrit
from torch import Tensor

from helpers.dictionary.rows import unit
from helpers.settings import allowed, one_of
from helpers.training.loop import as_tensor


def fvu(output: Float[Tensor, "rows d"], target: Float[Tensor, "rows d"]) -> float:
    """Σ‖y − ŷ‖² / Σ‖y − ȳ‖², ȳ the per-dimension mean of the SAME rows; float64. 0 is perfect, 1 is the mean."""
    target, output = target.double(), output.double()
    shifted = target - target[:1]  # a constant leaves exact zeros, which its rounded mean would not
    return quotient((target - output).square().sum(), (shifted - shifted.mean(0)).square().sum())


def quotient(errors: float | Tensor, norms: float | Tensor) -> float:
    """FVU of two sums; `ValueError` where the targets do not vary, since it divides by their variance."""
    allowed(bool(norms != 0), "targets are constant", "rows that vary, since FVU divides by their variance")
    return float(errors / norms)


@dataclass(frozen=True)
class Evaluation:
    """What a dictionary does on held-out rows.

    `squared_error` and `squared_norm` are per row (‖y − ŷ‖² and ‖y − ȳ‖², ȳ the mean of all rows), so that FVU can have
    an interval over articles, as is `codes`, how many atoms fire; `rates` [n_atoms] is the share of rows on which each
    atom fires. What is said of atoms is NaN for a model without any.
    """

    squared_error: Float[Tensor, " rows"]
    squared_norm: Float[Tensor, " rows"]
    codes: Float[Tensor, " rows"]
    rates: Float[Tensor, " n_atoms"]
    chosen_but_zero: float

    @property
    def fvu(self) -> float:
        """Raises `ValueError` where the targets do not vary."""
        return quotient(self.squared_error.sum(), self.squared_norm.sum())

    @property
    def dead(self) -> float:
        """Share of atoms that never fired on these rows; state how many rows with it."""
        return float((self.rates == 0).double().mean())

    @property
    def dense(self) -> float:
        """Share of atoms that fire on more than a tenth of the rows."""
        return float((self.rates > 0.1).double().mean())

    @property
    def largest_rate(self) -> float:
        return float(self.rates.max()) if len(self.rates) else math.nan


@torch.no_grad()
def evaluate(model, inputs, targets=None, *, batch_size: int = 4096) -> Evaluation:
    """Run `model.trace` over all rows, in batches on the model's device.

    Args:
        inputs, targets: [rows, d] tensors or memory-mapped arrays; `targets` defaults to `inputs`.
    """
    targets = inputs if targets is None else targets
    given = f"inputs has {len(inputs)} rows, targets {len(targets)}"
    allowed(0 < len(inputs) == len(targets), given, "as many, at least one")
    where = next(model.parameters())
    first = as_tensor(targets, slice(1)).to(where.dtype).cpu().double()  # from which a constant differs by exact zeros
    batches = [slice(start, start + batch_size) for start in range(0, len(inputs), batch_size)]
    beyond = sum((as_tensor(targets, rows).to(where.dtype).cpu().double() - first).sum(0) for rows in batches)
    mean = first + beyond / len(targets)
    errors, norms, codes, silent = [], [], [], 0
    fired = torch.zeros(model.n_atoms, dtype=torch.long, device=where.device)
    for rows in batches:
        x, y = (as_tensor(a, rows).to(where.device, where.dtype) for a in (inputs, targets))
        trace = model.trace(x)
        errors.append((trace.output - y).cpu().double().square().sum(1))  # an mps has no float64
        norms.append((y.cpu().double() - mean).square().sum(1))
        codes.append(trace.codes.fires.sum(1).cpu().double())
        fired += trace.codes.firing_counts(model.n_atoms)
        silent += int((~trace.codes.fires).sum())
    slots = len(inputs) * model.k * model.expert_rank
    share = silent / slots if slots else math.nan
    return Evaluation(*map(torch.cat, (errors, norms, codes)), fired.cpu().double() / len(inputs), share)


def ce_recovered(ablated: float, spliced: float, clean: float) -> float:
    """(CE_ablated − CE_spliced) / (CE_ablated − CE_clean): 1 loses nothing, 0 is as bad as ablating (zero or mean)."""
    allowed(ablated != clean, f"ablated={ablated} equals clean", "an ablation that changes the loss")
    return (ablated - spliced) / (ablated - clean)


# -- intervals ---------------------------------------------------------------------------------------------------------

SCALES: dict[str, tuple[Callable, Callable, float, float]] = {
    "plain": (np.asarray, np.asarray, -math.inf, math.inf),
    "log": (np.log, np.exp, 0.0, math.inf),
    "logit": (logit, expit, 0.0, 1.0),
}
"""Where an interval is symmetric, how to come back, and the range: `log` for positive ratios, `logit` for shares."""


class Interval(tuple):
    """(low, high), with what a record keeps so that it can be made again: what the number is `without` each unit."""

    def __new__(cls, low: float, high: float, *without: np.ndarray, **options):
        self = super().__new__(cls, (low, high))
        self.jackknife = options | {"without": [np.asarray(each, float).tolist() for each in without]}
        return self


def interval(value: float, *without: np.ndarray, level: float = 0.95, scale: str = "plain") -> Interval:
    """Jackknife interval (Tukey 1958) of a statistic from what it is without each unit; where units of two kinds vary,
    such as seeds and articles, from what it is without each of either. A statistic must not grow with their number.

    On a `scale` of `SCALES` the ends stay in its range; where a number lies on the range's edge, the plain interval is
    cut there. Raises `ValueError` for a value outside the range.
    """
    one_of("scale", scale, SCALES)
    to, back, low, high = SCALES[scale]
    allowed(not (value < low or value > high), f"value={value} on scale={scale!r}", f"{low} to {high}")
    with np.errstate(divide="ignore", invalid="ignore"):
        moved = [to(np.asarray(each, float)) for each in (value, *without)]
    if not all(np.isfinite(each).all() for each in moved):
        moved, back = [value, *without], lambda ends: np.clip(ends, low, high)
    off = margin(*moved[1:], level=level)
    return Interval(*map(float, back(np.array([moved[0] - off, moved[0] + off]))), *without, scale=scale, level=level)


def t_interval(data: Num[np.ndarray, "units ..."], statistic: Callable = np.mean, **options) -> Interval:
    """Interval (of a mean, Student's) of `statistic(data)` over the FIRST axis of `data`; `options` of `interval`.

    For a ratio of sums, let the columns be numerator and denominator:
    `t_interval(np.c_[errors, norms], lambda a: a[:, 0].sum() / a[:, 1].sum())`.
    """
    data = np.asarray(data)
    allowed(len(data) > 1, f"data has {len(data)} units", "at least 2, since one is left out at a time")
    without = np.array([statistic(np.delete(data, i, axis=0)) for i in range(len(data))])
    return interval(float(statistic(data)), without, **options)


def margin(*without: np.ndarray, level: float) -> np.ndarray | np.float64:
    """Half an interval's width, from what a statistic is without each seed, and without each unit (one, or both).

    The two jackknife variances are added, and Student's t has the degrees of freedom of Satterthwaite (1946). With few
    seeds that alone holds too little (.88 at 2 × 30, .92 at 3 × 30): seeds that happen to lie close together leave the
    degrees to the units. So no interval is narrower than that over seeds alone, or over units alone: .945 or more,
    whichever vary (`parts.coverage`). Each variance counts the noise of single cells, so that it is too wide (.99)
    where nothing else varies. Adding the squares of the two margins (Banerjee 1961; Graybill and Wang 1980 for
    variances) holds .95 too, and is wider.
    """
    variances = [(left.shape[-1] - 1) * left.var(-1) for left in without]
    degrees = [left.shape[-1] - 1 for left in without]
    total = sum(variances)
    shares = sum(variance**2 / n for variance, n in zip(variances, degrees, strict=True))
    joint = np.divide(total**2, shares, out=np.ones_like(total), where=shares > 0)
    pairs = [(total, joint), *zip(variances, degrees, strict=True)]
    return np.max([stdtrit(n, (1 + level) / 2) * np.sqrt(variance) for variance, n in pairs], axis=0)


def by_group(values: Float[Tensor, " rows"], groups: Int[Tensor | np.ndarray, " rows"]) -> Float[np.ndarray, " units"]:
    """Sums of `values` per group (article), in the order of the sorted group ids."""
    _, index = np.unique(np.asarray(groups), return_inverse=True)
    return np.bincount(index, weights=np.asarray(values.cpu(), dtype=np.float64))


@dataclass(frozen=True)
class Recovery:
    """How well learned directions match true ones. What is a share of the learned ones is NaN where there are none."""

    of_truth: Float[Tensor, " n_true"]
    """Each true feature's largest cosine over the learned ones."""
    found: float
    """Share of the true features that some learned one matches (recall)."""
    matched: float
    """Share of the learned features that match some true one (precision)."""
    mmcs: float
    """Mean over true features of the largest cosine; it ignores duplicates."""
    mcc: float
    duplicates: float
    """Share of the learned features that match another learned one."""


def recovery(
    learned: Float[Tensor, "n_learned d"], truth: Float[Tensor, "n_true d"], *, threshold: float = 0.9
) -> Recovery:
    """Compare learned directions (those of LIVE features) with the true ones; a match is a cosine above `threshold`.

    MCC is the mean cosine of the best one-to-one matching (Hungarian), summed over min(n_learned, n_true) pairs and
    divided by n_true, so that a true feature without a partner counts 0.
    """
    truth, learned = unit(truth), unit(learned)
    cosines = truth @ learned.T
    if not len(learned):
        return Recovery(learned.new_zeros(len(truth)), 0.0, math.nan, 0.0, 0.0, math.nan)
    pairs = linear_sum_assignment(cosines.clamp(min=0).double().cpu().numpy(), maximize=True)
    mcc = float(cosines[pairs].clamp(min=0).double().sum() / len(truth))
    among = learned @ learned.T
    among.fill_diagonal_(-1)
    best = cosines.amax(1), cosines.amax(0), among.amax(1)
    found, matched, duplicates = (float((each > threshold).double().mean()) for each in best)
    return Recovery(best[0], found, matched, float(best[0].double().mean()), mcc, duplicates)


FEWEST = 5
"""Over fewer articles there is no interval."""


@dataclass(frozen=True)
class Comparison:
    """A number made of sums over articles, or other units, and over seeds. `claims.Chapter.record` takes it.

    `ci` is its 95 % interval, `by_seed` its value for each seed; `n` counts what was `resampled`: "articles",
    or "seeds", or (seeds, articles) for "seed × article".
    """

    value: float
    ci: tuple[float, float] | None
    by_seed: list[float]
    n: int | tuple[int, int]
    resampled: str


def over_seeds(*columns: Iterable[float], statistic: Callable[..., float] = np.mean, **options) -> Comparison:
    """`statistic(*columns)` of one value a seed each; a seed is left out of all at once. `options` of `interval`."""
    values = np.stack([np.asarray(column, float) for column in columns], axis=1)

    def of(rows: Float[np.ndarray, "seeds columns"]) -> float:
        return float(statistic(*rows.T))

    ci = t_interval(values, of, **options)
    return Comparison(of(values), ci, [of(row[None]) for row in values], len(values), "seeds")


def slope(x: Iterable[float], y: Iterable[float], *, level: float = 0.95) -> Comparison:
    """Least-squares slope of y over x with its t interval of n − 2 degrees of freedom, from the scatter about the line.

    For an exponent give logarithms. Raises `ValueError` for fewer than three different x.
    """
    sizes = len(np.unique(x))
    allowed(sizes >= 3, f"x has {sizes} different values", "at least 3, or any line fits")
    (value, _), covariance = np.polyfit(x, y, 1, cov=True)
    margin = stdtrit(len(x) - 2, (1 + level) / 2) * covariance[0, 0] ** 0.5
    return Comparison(float(value), (float(value - margin), float(value + margin)), [], sizes, "sizes")


def over_sizes(found: Comparison, sizes: Iterable[float]) -> Comparison:
    """A slope over `sizes`: fewer than three are what it rests on, whatever its interval was made of."""
    few = len(set(sizes))
    return found if few >= 3 else replace(found, n=few, resampled="sizes")


RELABELLINGS = 40
"""How often labels are dealt afresh for a negative control."""


def relabelled(*columns: Iterable[float], draws: int = RELABELLINGS) -> Iterator[Float[np.ndarray, "columns seeds"]]:
    """Columns with their labels dealt afresh for each seed: alike but for noise. Dealings that are alike for all seeds
    only rename the columns, and are left out. Raises `ValueError` for fewer than two seeds."""
    values, random = np.array([list(column) for column in columns], float), np.random.default_rng(0)
    seeds = values.shape[1]
    allowed(seeds > 1, f"columns have {seeds} seeds", "at least 2, so that labels can be dealt")
    while draws:
        places = random.permuted(np.indices(values.shape)[0], axis=0)
        if (places != places[:, :1]).any():
            draws -= 1
            yield np.take_along_axis(values, places, axis=0)


# -- one table of sums -------------------------------------------------------------------------------------------------


class Totals:
    """One cell's sums over units: `totals["errors"]` is [seeds] (or [seeds, width] where a column has a width).

    Args:
        columns: [seeds, units] or [seeds, units, width], by name.
        seeds: numbers of the seeds that count; `weights`: how often each unit counts.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], seeds: np.ndarray, weights: Float[np.ndarray, " units"]):
        self.columns, self.seeds, self.weights = columns, seeds, weights

    def __getitem__(self, column: str) -> Float[np.ndarray, "seeds ..."]:
        values, units = self.columns[column], len(self.weights)
        allowed(values.shape[1] == units, f"column {column!r} has {values.shape[1]} units", f"{units}, as the others")
        return np.tensordot(values[self.seeds], self.weights, ([1], [0]))

    def total(self, column: str) -> float:
        """A column over all seeds."""
        return float(self[column].sum())

    @property
    def fvu(self) -> float:
        """Σ errors / Σ norms, over seeds and units. Raises `ValueError` where the norms are zero."""
        return quotient(self.total("errors"), self.total("norms"))

    @property
    def largest_rate(self) -> float:
        """Mean over seeds of the largest share of `rows` on which one of the `counts` fires."""
        return float((self["counts"] / self["rows"][:, None]).max(1).mean())

    @property
    def added(self) -> float:
        """Nats per token that a splice adds to the model's loss."""
        return (self.total("nats") - self.total("clean")) / self.total("tokens")

    def ce_recovered(self, ablation: str = "zero", spliced: str = "nats") -> float:
        """CE recovered by the loss in the column `spliced`, against that in `ablation` (`zero` or `mean`)."""
        return ce_recovered(self.total(ablation), self.total(spliced), self.total("clean"))


@dataclass(frozen=True)
class Sums:
    """Named cells × seeds × units × columns: sums over the rows of each unit (article), from which all that is said of
    cells is made, so that a seed or a unit is left out of all of them at once.

    Args:
        cells: by name and seed, columns [units] or [units, width]; all of one number of units.
        shared: columns that are the same for every cell and seed, such as the clean model's loss. Their units are
            those that are left out, and columns over other units stay aside.
    """

    cells: Mapping[Hashable, Mapping[int, Mapping[str, np.ndarray]]]
    shared: Mapping[str, Float[np.ndarray, " units"]] = field(default_factory=dict)

    def seeds(self, *names: Hashable) -> list[int]:
        """Seeds that all of these cells have; `ValueError` where there is none, or a name is unknown."""
        unknown = [name for name in names if name not in self.cells]
        allowed(not unknown, f"cells={unknown} are not in the table", ", ".join(map(str, self.cells)))
        common = set.intersection(*(set(self.cells[name]) for name in names))
        allowed(bool(common), f"no seed is common to {', '.join(map(str, names))}", "at least one")
        return sorted(common)

    def compare(
        self,
        statistic: Callable[..., float],
        *names: Hashable,
        level: float | None = 0.95,
        fewest: int = 2,
        scale: str = "plain",
    ) -> Comparison:
        """`statistic(*totals)`, one `Totals` for each name, with its interval (none over fewer than `fewest` units, or
        where `level` is None): each seed that all have, and each unit, is left out once, the same of all cells. A
        statistic must not grow with the numbers of them. `scale` is that of `interval`. Raises `ValueError` for fewer
        than two units (unless `fewest` is more), or cells that differ in their units.
        """
        names = names or tuple(self.cells)
        seeds = self.seeds(*names)
        data = [self._stacked(name, seeds) for name in names]
        sizes = {data[0][column].shape[1] for column in self.shared}
        sizes = sizes or {array.shape[1] for columns in data for array in columns.values()}
        units = min(sizes)
        good = len(sizes) == 1 and (units > 1 or fewest > 2)
        allowed(good, f"cells have {sorted(sizes)} units", "the same for all, at least 2")

        def of(at: np.ndarray, weights: np.ndarray) -> float:
            return float(statistic(*(Totals(columns, at, weights) for columns in data)))

        every, alike = np.arange(len(seeds)), np.ones(units)
        value, by_seed = of(every, alike), [of(every[i : i + 1], alike) for i in every]
        about = (units, "articles") if len(seeds) == 1 else ((len(seeds), units), "seed × article")
        if units < fewest or level is None:
            return Comparison(value, None, by_seed, *about)
        without = [[of(every, (np.arange(units) != j).astype(float)) for j in range(units)]]
        if len(seeds) > 1:
            without.append([of(np.delete(every, i), alike) for i in every])
        return Comparison(value, interval(value, *map(np.array, without), level=level, scale=scale), by_seed, *about)

    def fvu(self, name: Hashable, **options) -> Comparison:
        """FVU of one cell."""
        return self.compare(lambda cell: cell.fvu, name, scale="log", **options)

    def ratio(self, over: Hashable, under: Hashable, **options) -> Comparison:
        """FVU of one cell over that of another."""
        return self.compare(lambda a, b: a.fvu / b.fvu, over, under, scale="log", **options)

    def relabelled(self, *groups: Sequence[Hashable], draws: int = RELABELLINGS) -> Iterator[Sums]:
        """Tables in which the labels of groups of cells are dealt afresh for each seed and unit, so that nothing but
        noise sets one group apart from another: a negative control for what compares them. Groups are of one length,
        their cells in one order. Columns that they do not share are left out."""
        random, names = np.random.default_rng(0), [name for group in groups for name in group]
        for _ in range(draws):
            cells: dict[Hashable, dict[int, dict[str, np.ndarray]]] = {name: {} for name in names}
            for seed in self.seeds(*names):
                order: dict[int, np.ndarray] = {}  # by the number of units: the same for all columns over these
                for alike in zip(*groups, strict=True):
                    own = [self.cells[name][seed] for name in alike]
                    for column in own[0]:
                        if len({np.shape(each.get(column)) for each in own}) > 1:
                            continue  # not in all of them, or of another width
                        values = np.stack([each[column] for each in own])
                        units = values.shape[1]
                        places = np.tile(np.arange(len(groups)), (units, 1))
                        dealt = order.setdefault(units, random.permuted(places, axis=1).T)
                        for name, place in zip(alike, dealt, strict=True):
                            cells[name].setdefault(seed, {})[column] = values[place, np.arange(units)]
            yield Sums(cells, self.shared)

    def _stacked(self, name: Hashable, seeds: Sequence[int]) -> dict[str, np.ndarray]:
        own = [self.cells[name][seed] for seed in seeds]
        columns = {column: np.stack([np.asarray(each[column], float) for each in own]) for column in own[0]}
        return columns | {c: np.repeat(np.asarray(v, float)[None], len(seeds), 0) for c, v in self.shared.items()}
