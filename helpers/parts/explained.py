"""What a dictionary explains of held-out rows, by article: shares, their ratios, and how sure we are of them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import pandas as pd
from jaxtyping import Float

from helpers.settings import allowed
from helpers.study.scores import FEWEST, Comparison, Sums


@dataclass(frozen=True, eq=False)
class Explained:
    """Sums of squares over held-out rows, by article: `explained` [draws, articles] and `total` [articles].

    What involves no chance has one draw.
    """

    explained: Float[np.ndarray, "draws articles"]
    total: Float[np.ndarray, " articles"]

    @property
    def fve(self) -> float:
        """Σ explained / Σ total, averaged over draws."""
        return float(self.explained.mean(0).sum() / self.total.sum())

    @property
    def by_draw(self) -> list[float]:
        return (self.explained.sum(1) / self.total.sum()).tolist()


class Key(NamedTuple):
    """What was judged: a control (with its rank, directions an expert) at a site, centred or not."""

    control: str
    site: str
    centred: bool
    rank: int = 1


def estimate(statistic: Callable[[np.ndarray], float], *parts: Explained, **options) -> Comparison:
    """`statistic` of the parts' FVEs, an array; the interval is over draws and articles. None over fewer than five
    articles, or where `level` is None.

    All parts are judged on the same articles. Draw i of one part goes with draw i of the others; a part without
    chance goes with every draw. Raises `ValueError` for parts with other articles, or other numbers of draws.
    """
    draws, articles = max(len(part.explained) for part in parts), len(parts[0].total)
    for part in parts:
        fits = len(part.explained) in (1, draws) and len(part.total) == articles
        allowed(fits, f"a part has {part.explained.shape} draws × articles", f"{(draws, articles)}, or 1 draw")
    cells = {}
    for i, part in enumerate(parts):
        some = np.broadcast_to(part.explained, (draws, articles))
        cells[i] = {draw: {"explained": row, "total": part.total} for draw, row in enumerate(some)}

    def of(*totals) -> float:
        return statistic(np.array([each.total("explained") / each.total("total") for each in totals]))

    return Sums(cells).compare(of, fewest=FEWEST, **options)


def fve(part: Explained, **options) -> Comparison:
    """FVE with its interval; unlike a `ratio` it may be negative."""
    return estimate(lambda shares: shares[0], part, **options)


def ratio(of: Sequence[Explained], to: Sequence[Explained] | float) -> Comparison:
    """FVE over FVE of others, or over a number: the geometric mean of layers, for each of which one is given."""
    if isinstance(to, float):
        return estimate(lambda shares: geometric(shares / to), *of, scale="log")
    allowed(len(of) == len(to), f"{len(to)} parts to divide {len(of)} by", "as many")
    return estimate(lambda shares: geometric(shares[: len(of)] / shares[len(of) :]), *of, *to, scale="log")


def over_layers(of: Sequence[Explained], to: float) -> Comparison:
    """`ratio` of parts without chance, one for each layer, with an interval over layers × articles. Few layers make a
    rough interval; with one layer it is over articles only."""
    draws = [len(part.explained) for part in of]
    allowed(set(draws) == {1}, f"parts of {draws} draws", "one draw each")
    layers = {i: {"explained": part.explained[0], "total": part.total} for i, part in enumerate(of)}
    table = Sums({"": layers})
    found = table.compare(lambda cell: geometric(cell["explained"] / cell["total"] / to), fewest=FEWEST, scale="log")
    return replace(found, resampled="layer × article") if len(of) > 1 else found


def geometric(numbers: np.ndarray) -> float:
    """Geometric mean: 0 where something explains nothing."""
    with np.errstate(divide="ignore"):
        return float(np.exp(np.log(numbers).mean()))


def factors(found: Sequence[Mapping[Key, Explained]], site: str, expected: float) -> dict[str, Comparison]:
    """The centred ratio implicit / `expected` as a product of what directions, routing and pairing add, in this order.

    directions   random router, trained directions  /  all random, whose expectation is `expected` = k/d
    routing      trained router and directions, shuffled pairing  /  random router, trained directions
    pairing      implicit  /  shuffled pairing

    Where the ladders hold it, noise with the rows' covariance splits the first factor in two: `covariance`, what
    directions gain that know where the rows lie and nothing else, and `trained`, what trained ones gain beyond.
    Geometric means over the ladders in `found`, one for each layer, so that the product is exact. Shuffling leaves some
    pairs together (`inside.overlap`), so the factor of pairing is too low rather than too high.
    """
    steps = {"directions": ("random_router", None), "routing": ("shuffled", "random_router")}
    steps |= {"pairing": ("implicit", "shuffled"), "ratio": ("implicit", None)}
    if all(Key("covariance", site, True) in each for each in found):
        steps |= {"covariance": ("covariance", None), "trained": ("random_router", "covariance")}

    def of(control: str) -> list[Explained]:
        return [each[Key(control, site, True)] for each in found]

    return {name: ratio(of(over), of(under) if under else expected) for name, (over, under) in steps.items()}


def listed(found: Comparison) -> list[float | None]:
    """Value, low and high end as a results file has them; None where there is no interval."""
    return [found.value, *(found.ci or (None, None))]


def mean_loss(losses: pd.DataFrame, unit: str = "tokens") -> Comparison:
    """Nats a token (or another column) of `activations.losses`, with its interval over articles."""
    sums = losses.groupby("article")[["nats", unit]].sum()
    table = Sums({"": {0: {name: column.to_numpy() for name, column in sums.items()}}})
    return table.compare(lambda cell: cell.total("nats") / cell.total(unit), fewest=FEWEST)


def ladder_rows(found: Mapping[Key, Explained], expected: float, **about) -> list[dict]:
    """A ladder as plain numbers: FVE and its ratio to what random directions are expected to explain, `expected` = k/d
    times the rank; centred ones with their intervals."""
    rows = []
    for key, part in found.items():
        share = listed(fve(part, level=0.95 if key.centred else None))
        row = about | key._asdict() | {"fve": share, "by_draw": part.by_draw}
        base = expected * key.rank
        rows.append(row | {"ratio": [None if each is None else each / base for each in share]})
    return rows


def above(found: Sequence[float | None], threshold: float) -> bool | None:
    """Whether a number with its interval (see `listed`) lies above a threshold; None where the interval holds it."""
    value, low, high = found
    low, high = (value, value) if low is None else (low, high)
    return True if low > threshold else False if high <= threshold else None
