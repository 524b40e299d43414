"""One style for every figure of the book: a fixed colour for each method, direct labels, intervals drawn."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.container import ErrorbarContainer
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import ArrayLike
from scipy.optimize import isotonic_regression

from helpers.settings import allowed

BLUE, VERMILION, GREEN, PURPLE = "#0072B2", "#D55E00", "#00875F", "#B0569A"
AMBER, WINE, INDIGO, SLATE, INK = "#A87400", "#882255", "#4B4BC3", "#6B7280", "#1F2328"
BROWN, TEAL, ROSE = "#8A4B2A", "#00818F", "#C2306A"
"""Okabe and Ito's hues, darkened until each stands 3:1 or more against white; INK is for text, bounds and oracles."""


@dataclass(frozen=True)
class Mark:
    """How one method is drawn wherever it appears. Marker and dash tell it apart where colour does not."""

    colour: str
    label: str
    marker: str = "o"
    dash: str = "-"


METHODS = {
    # remedies for dead features
    "none": Mark(SLATE, "nothing done", "o", "--"),
    "auxk": Mark(BLUE, "AuxK", "s"),
    "ghost": Mark(PURPLE, "ghost gradients", "D"),
    "resample": Mark(GREEN, "resampling", "^"),
    "anneal": Mark(INDIGO, "k annealed", "<"),
    "switch": Mark(VERMILION, "Switch", "o"),
    "bias": Mark(AMBER, "loss-free bias", "p"),
    "zloss": Mark(BROWN, "z-loss", "X"),
    "frequency": Mark(TEAL, "frequency penalty", "v"),
    "aligned": Mark(WINE, "aligned", "P"),
    "switch_early": Mark(ROSE, "Switch, half the steps", "h"),
    "both": Mark(INK, "Switch and another", "*"),
    "center": Mark(WINE, "centred", "P"),
    # models
    "sae": Mark(BLUE, "TopK SAE", "o"),
    "moe": Mark(VERMILION, "MoE", "s"),
    "moe_lowrank": Mark(AMBER, "MoE, low-rank router", "v"),
    "dense": Mark(INK, "dense", "D", "--"),
    "expander": Mark(GREEN, "expander SAE", "^"),
    "implicit": Mark(PURPLE, "implicit SAE", "P"),
    "pca": Mark(INDIGO, "PCA", "X", "-."),
    "omp": Mark(WINE, "matching pursuit", "<"),
    "shuffled": Mark(VERMILION, "experts shuffled", "s"),
    "random_router": Mark(AMBER, "random router", "v"),
    "random_directions": Mark(BROWN, "random directions", "D"),
    "fitted_directions": Mark(GREEN, "fitted directions", "^"),
    # masks of expander SAEs; "expander" is the random one
    "clustered": Mark(VERMILION, "clustered mask", "s"),
    "informed": Mark(BROWN, "informed mask", "P"),
    "released": Mark(AMBER, "clustered mask, as released", "D"),
    "pruned": Mark(INDIGO, "pruned dense", "v"),
    # ways to train a layer, and the knobs between a TopK SAE and a production layer
    "posthoc": Mark(BLUE, "fitted afterwards", "o"),
    "joint": Mark(VERMILION, "fitted, then on the loss", "s"),
    "loss_alone": Mark(AMBER, "on the loss alone", "v"),
    "transcoder": Mark(VERMILION, "transcoder", "s"),
    "rank": Mark(GREEN, "rank"),
    "training": Mark(WINE, "training", "s", "--"),
    "objective": Mark(INDIGO, "objective", "^", "-."),
    # data
    "real": Mark(GREEN, "activations", "o"),
    "gaussian": Mark(PURPLE, "matched Gaussian", "s", "--"),
    "padding": Mark(WINE, "padding rows", "X", ":"),
    "synthetic": Mark(BLUE, "synthetic", "^"),
    # the teacher, and what is put in an activation's place
    "clean": Mark(INK, "intact", "o"),
    "zero": Mark(WINE, "zero ablation", "s", "--"),
    "mean": Mark(AMBER, "mean ablation", "^", "-."),
    # what is no method: sites, statistics, tokens
    "one": Mark(INK, "one", "o"),
    "two": Mark(SLATE, "two", "s", "--"),
    "three": Mark("#8A929C", "three", "^", "-."),
    # yardsticks
    "random": Mark(SLATE, "random", "x", ":"),
    "bound": Mark(INK, "bound", "", "--"),
    "paper": Mark(INK, "paper", "*", ""),
}
"""Every method of the book. A method keeps its mark in all chapters; methods that are compared never share a colour."""

LADDER = {
    "implicit": ("implicit SAE", "implicit"),
    "shuffled": ("experts shuffled", "shuffled"),
    "other_token": ("another token's choice", "dense"),
    "random_router": ("random router", "random_router"),
    "second": ("2nd component of W_down", "dense"),
    "w_up": ("1st component of W_up", "dense"),
    "w_gate": ("1st component of W_gate", "dense"),
    "random_directions": ("random directions", "random_directions"),
    "in_w_down": ("random vectors of W_down", "random_directions"),
    "covariance": ("noise with the rows' covariance", "random_directions"),
    "random": ("all random", "random"),
    "pca": ("k principal components", "pca"),
    "sae": ("TopK SAE's choice", "sae"),
    "sae_own": ("TopK SAE's own codes", "sae"),
    "fitted_directions": ("fitted directions", "fitted_directions"),
    "omp": ("matching pursuit's choice", "omp"),
    "all_directions": ("all n directions", "dense"),
}
"""Controls of chapters 10 and 11 in the order in which `forest` shows them: label, and method of the mark."""

OVER = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}
"""Behind words that stand on a line."""

STYLE: dict[str, Any] = {  # letters of a figure 6.4 inches wide are 9 pixels high where a phone shows it at 350
    "figure.figsize": (6.4, 3.4),
    "figure.dpi": 100,
    "figure.facecolor": "white",
    "figure.constrained_layout.use": True,
    "savefig.facecolor": "white",
    "svg.hashsalt": "book",
    "font.size": 12,
    "axes.titlesize": 12.5,
    "axes.titlelocation": "left",
    "axes.titleweight": "bold",
    "axes.labelcolor": INK,
    "axes.edgecolor": "#8C959F",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E5E8EB",
    "grid.linewidth": 0.8,
    "text.color": INK,
    "xtick.color": "#57606A",
    "ytick.color": "#57606A",
    "lines.linewidth": 1.9,
    "lines.markersize": 5.5,
    "legend.frameon": False,
    "image.cmap": "cividis",
    "axes.prop_cycle": plt.cycler(color=[BLUE, VERMILION, GREEN, PURPLE, AMBER, INDIGO, WINE, SLATE]),
}


def use() -> None:
    """Set the book's style: call it once at the top of a chapter. In Jupyter, figures come out as SVG.

    Figures are drawn on white; a page has a dark version of each beside it (`press.build`).
    """
    plt.rcParams.update(STYLE)
    try:
        from matplotlib_inline.backend_inline import set_matplotlib_formats
    except ImportError:
        return
    set_matplotlib_formats("svg", bbox_inches=None, metadata={"Date": None})  # the same figure is the same file


def mark(method: str) -> Mark:
    """The fixed mark of `method`; raises `ValueError` for one that the book does not have."""
    allowed(method in METHODS, f"method={method!r} has no mark", ", ".join(METHODS))
    return METHODS[method]


def colour(method: str) -> str:
    """The fixed colour of `method` in the whole book, as `#RRGGBB`."""
    return mark(method).colour


def line(method: str, **changes: Any) -> dict[str, Any]:
    """Keyword arguments of `Axes.plot` for `method`: colour, marker, dash and label; `changes` win."""
    m = mark(method)
    return {"color": m.colour, "marker": m.marker, "linestyle": m.dash or "none", "label": m.label} | changes


def band(ax: Axes, x: ArrayLike, low: ArrayLike, high: ArrayLike, method: str) -> None:
    """Shade an interval around a curve of `method`."""
    ax.fill_between(x, low, high, color=colour(method), alpha=0.18, linewidth=0)


def points(ax: Axes, x: ArrayLike, y: ArrayLike, low: ArrayLike, high: ArrayLike, method: str, **changes: Any) -> None:
    """Points of `method`, joined in its dash, each with its interval `[low, high]` as a bar.

    Raises `ValueError` where a point lies outside its interval, since such a bar cannot be drawn.
    """
    x, y, low, high = (np.asarray(v, dtype=float) for v in (x, y, low, high))
    if (outside := (y < low) | (y > high)).any():
        i = int(outside.argmax())
        raise ValueError(f"y={y[i]:g} at x={x[i]:g} is outside its interval [{low[i]:g}, {high[i]:g}]")
    ax.errorbar(x, y, yerr=[y - low, high - y], capsize=3, elinewidth=1.2, **line(method, **changes))


def signed(figure: Figure, run: Any) -> Figure:
    """The figure with, at its upper right, whose run it shows (`run.whose` of `claims`)."""
    figure.suptitle(run.whose, x=0.995, ha="right", fontsize=12, fontweight="normal", color=SLATE)
    return figure


def forest(ax: Axes, rows: Iterable[Mapping[str, Any]], lines: Mapping[str, tuple[str, str]]) -> None:
    """Dots with their intervals on a scale from 0 to 1, one line a name, from the top in the order of `lines`.

    Args:
        rows: each with `name`, `estimate` (value, low and high end; these None where there is no interval), `filled`,
            and `note`, which stands at the right. A value below zero stands at the left edge; names that `lines` does
            not have are left out.
        lines: the label of each name, and the method whose mark it bears.
    """
    order = list(lines)
    for row in rows:
        if row["name"] not in order:
            continue
        place, (value, low, high) = order.index(row["name"]), row["estimate"]
        look = mark(lines[row["name"]][1])
        if low is not None:
            ax.plot([low, high], [place] * 2, color=look.colour, lw=1.4)
        fill = look.colour if row["filled"] else "white"
        ax.plot(max(value, 0.0), place, look.marker, color=look.colour, mfc=fill, ms=6)
        beside = {"xycoords": ("axes fraction", "data"), "fontsize": 12, "va": "center", "ha": "left"}
        ax.annotate(row["note"], (1.01, place), **beside)
    ax.set(ylim=(len(order) - 0.5, -0.5), xlim=(0, 1))
    ax.set_yticks(range(len(order)), [label for label, _ in lines.values()])


def label_lines(ax: Axes, gap: float = 14.0, **text: Any) -> None:
    """Write each labelled curve's name at its right end in its own colour, in place of a legend.

    Labels closer than `gap` points are moved apart. Call it last: it reads the final limits of the axes.
    """
    ax.figure.canvas.draw()
    ends = []
    for named, name in zip(*ax.get_legend_handles_labels(), strict=True):
        curve = named.lines[0] if isinstance(named, ErrorbarContainer) else named
        if isinstance(curve, Line2D):
            x, y = (np.asarray(v, dtype=float) for v in curve.get_data())
            if (seen := np.isfinite(x) & np.isfinite(y)).any():
                ends.append((name, curve.get_color(), (x[seen][-1], y[seen][-1])))
    scale = 72 / ax.figure.dpi
    heights = np.array([ax.transData.transform(end)[1] * scale for *_, end in ends])
    for (name, color, end), height, place in zip(ends, heights, _spread(heights, gap), strict=True):
        style = {"color": color, "va": "center", "fontsize": 10, "annotation_clip": False} | text
        ax.annotate(name, end, xytext=(8, place - height), textcoords="offset points", **style)


def _spread(heights: np.ndarray, gap: float) -> np.ndarray:
    """The nearest heights, in the sense of least squares, that keep their order and stand `gap` apart."""
    order = np.argsort(heights, kind="stable")
    steps = gap * np.arange(len(heights))
    placed = np.empty(len(heights))
    placed[order] = (isotonic_regression(heights[order] - steps).x if len(heights) else heights) + steps
    return placed
