"""The style: every mark can be seen in light, dark and grey, and labels do not lie on each other."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb

from helpers.press import figures

COMPARED = [
    (
        "none",
        "auxk",
        "ghost",
        "resample",
        "switch",
        "bias",
        "zloss",
        "frequency",
        "aligned",
        "switch_early",
        "anneal",
        "both",
    ),
    ("sae", "moe", "moe_lowrank", "dense", "expander", "implicit", "pca"),
    ("real", "gaussian", "padding", "synthetic", "random"),
    ("one", "two", "three"),
]


def luminance(rgb):
    """Relative luminance of the WCAG."""
    c = np.where(np.asarray(rgb) <= 0.03928, np.asarray(rgb) / 12.92, ((np.asarray(rgb) + 0.055) / 1.055) ** 2.4)
    return float(c @ [0.2126, 0.7152, 0.0722])


def contrast(a, b):
    bright, dark = sorted((luminance(a), luminance(b)), reverse=True)
    return (bright + 0.05) / (dark + 0.05)


def in_dark_mode(rgb):
    """What `invert(0.93) hue-rotate(180deg)` of book.css makes of a colour (filter-effects specification)."""
    inverted = np.asarray(rgb) * (1 - 2 * 0.93) + 0.93
    grey = np.array([0.213, 0.715, 0.072])
    return np.clip(2 * grey @ inverted - inverted, 0, 1)  # a half turn mirrors a colour at its grey


@pytest.mark.parametrize("method", figures.METHODS)
def test_every_mark_stands_out_in_light_and_dark(method):
    rgb = to_rgb(figures.colour(method))
    assert contrast(rgb, (1, 1, 1)) >= 3
    assert contrast(in_dark_mode(rgb), in_dark_mode((1, 1, 1))) >= 3


@pytest.mark.parametrize("group", COMPARED)
def test_methods_that_are_compared_differ_in_colour_and_in_marker_or_dash(group):
    marks = [figures.mark(m) for m in group]
    assert len({m.colour for m in marks}) == len(marks)
    assert len({(m.marker, m.dash) for m in marks}) == len(marks), "in grey, form must tell them apart"


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match="method='swich' has no mark; allowed: none, auxk"):
        figures.line("swich")


def test_line_gives_plot_its_arguments_and_changes_win():
    _, ax = plt.subplots()
    (curve,) = ax.plot([0, 1], [0, 1], **figures.line("switch", label="ours"))
    assert curve.get_color() == figures.colour("switch") and curve.get_label() == "ours"
    plt.close("all")


def test_points_draw_their_intervals_and_refuse_a_point_outside_its_own():
    _, ax = plt.subplots()
    figures.points(ax, [1, 2], [0.5, 0.6], [0.4, 0.5], [0.7, 0.6], "sae")
    low, high = np.array([segment[:, 1] for segment in ax.containers[0].lines[2][0].get_segments()]).T
    assert low == pytest.approx([0.4, 0.5]) and high == pytest.approx([0.7, 0.6])
    with pytest.raises(ValueError, match=r"y=0.5 at x=1 is outside its interval \[0.6, 0.7\]"):
        figures.points(ax, [1], [0.5], [0.6], [0.7], "sae")
    plt.close("all")


def test_curves_and_points_are_labelled_at_their_end_without_overlap():
    _, ax = plt.subplots()
    ax.plot([0, 1, 2], [0, 1, 2.00], **figures.line("sae"))
    ax.plot([0, 1, np.nan], [0, 1, np.nan], **figures.line("moe"))
    figures.points(ax, [0, 2], [0, 2.01], [0, 1.9], [0, 2.1], "switch")
    ax.axhline(0, color="k")
    figures.label_lines(ax)
    notes = {t.get_text(): t for t in ax.texts}
    assert set(notes) == {"TopK SAE", "MoE", "Switch"}
    assert notes["MoE"].xy == (1, 1), "a curve ends where its last number is"
    scale = 72 / ax.figure.dpi
    heights = [ax.transData.transform(t.xy)[1] * scale + t.xyann[1] for t in notes.values()]
    assert min(abs(a - b) for i, a in enumerate(heights) for b in heights[:i]) >= 13.9
    plt.close("all")


@given(st.lists(st.floats(-300, 300), max_size=8))
def test_spread_keeps_order_and_distance_and_moves_as_little_as_needed(heights):
    heights = np.array(heights)
    placed = figures._spread(heights, 14.0)
    order = np.argsort(heights, kind="stable")
    assert (np.diff(placed[order]) >= 14 - 1e-6).all()
    assert placed.sum() == pytest.approx(heights.sum(), abs=1e-6), "no drift up or down"
    if (np.diff(heights[order]) >= 14).all():
        assert placed == pytest.approx(heights, abs=1e-9)


def test_a_forest_has_a_line_for_each_name_and_marks_of_the_book():
    lines = {"implicit": ("implicit SAE", "implicit"), "w_up": ("first of W_up", "dense")}
    rows = [
        {"name": "w_up", "estimate": [0.4, 0.3, 0.5], "filled": True, "note": "×3.2"},
        {"name": "implicit", "estimate": [-0.2, None, None], "filled": False, "note": ""},
        {"name": "pca", "estimate": [0.9, None, None], "filled": True, "note": ""},
    ]
    ax = plt.subplots()[1]
    figures.forest(ax, rows, lines)
    bar, dot, hollow = ax.get_lines()
    assert list(bar.get_xdata()) == [0.3, 0.5] and list(bar.get_ydata()) == [1, 1]
    assert (dot.get_xdata()[0], dot.get_marker()) == (0.4, figures.mark("dense").marker)
    assert hollow.get_xdata()[0] == 0 and hollow.get_markerfacecolor() == "white"
    assert [text.get_text() for text in ax.get_yticklabels()] == ["implicit SAE", "first of W_up"]
    assert [text.get_text() for text in ax.texts] == ["×3.2", ""]
    assert all(figures.mark(method) for _, method in figures.LADDER.values())
