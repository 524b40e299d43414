"""Sliders: both forms show the same frames, the page form is labelled, and what cannot be drawn is refused."""

import base64
import io
import json

import matplotlib.pyplot as plt
import numpy as np
import pytest
from bs4 import BeautifulSoup
from IPython.core.formatters import DisplayFormatter
from PIL import Image

from helpers.press import slider

WIDGET = "application/vnd.jupyter.widget-view+json"


def draw(k, power=1):
    """A figure whose left pixels are darker for larger k: the frame can be recognised in the output."""
    figure = plt.figure(figsize=(2, 1))
    figure.add_axes((0, 0, 1, 1)).imshow([[k * power]], cmap="gray_r", vmin=0, vmax=10, aspect="auto")
    return figure


def grey(source):
    """Mean lightness of a frame's middle, from its data address."""
    pixels = np.asarray(Image.open(io.BytesIO(base64.b64decode(source.split(",", 1)[1]))).convert("L"), dtype=float)
    return pixels[40:-40, 80:-80].mean()


@pytest.fixture
def one():
    return slider.slider(
        draw, {"k": [1, 5, 9]}, alt=lambda k: f'k is {k} & "quoted" </script>', label="k (active)", start={"k": 5}
    )


def page(slider):
    return BeautifulSoup(slider.html(), "html.parser")


def test_the_bundle_holds_a_live_widget_and_html(one):
    bundle, _ = DisplayFormatter().format(one)
    assert set(bundle) == {WIDGET, "text/html", "text/plain"}
    assert "model_id" in bundle[WIDGET]


def test_the_page_form_is_a_labelled_slider(one):
    soup = page(one)
    knob, label, output = soup.find("input"), soup.find("label"), soup.find("output")
    assert knob["type"] == "range" and (knob["min"], knob["max"], knob["value"]) == ("0", "2", "1")
    assert knob["aria-label"] == label.text == "k (active)"
    assert label["for"] == output["for"][0] == knob["id"]
    assert knob["aria-valuetext"] == output.text == "5" and output["aria-live"] == "polite"
    assert soup.find("img")["alt"] == 'k is 5 & "quoted" </script>'
    assert not soup.find_all(src=lambda s: s and not s.startswith("data:")), "the page form loads nothing"


def test_the_page_form_holds_the_right_frame_for_each_value(one):
    data = json.loads(page(one).find("script").string)
    shown = [grey(data["images"][i]) for i in data["order"]]
    assert shown == sorted(shown, reverse=True) and len(set(shown)) == 3
    assert grey(page(one).find("img")["src"]) == pytest.approx(shown[1])
    assert data["values"] == [["1", "5", "9"]]
    assert data["alts"][2].startswith("k is 9")


def test_the_live_form_follows_its_slider(one):
    picture, knob = one.widget().children
    before = BeautifulSoup(picture.value, "html.parser").img
    knob.value = 2
    after = BeautifulSoup(picture.value, "html.parser").img
    assert before["alt"].startswith("k is 5") and after["alt"].startswith("k is 9")
    assert grey(after["src"]) < grey(before["src"])
    assert knob.description == "k (active)"


def test_two_sliders_make_a_grid_whose_equal_frames_are_kept_once():
    made = slider.slider(draw, {"k": [1, 2], "power": [1, 2, 4]}, alt=lambda k, p: f"{k} times {p}")
    assert made.alts == [f"{k} times {p}" for k in (1, 2) for p in (1, 2, 4)]
    assert len(made.images) == 4, "1·2 = 2·1 and 1·4 = 2·2 look alike"
    assert made.index([1, 2]) == 5
    picture, k, power = made.widget().children
    k.value, power.value = 1, 2
    assert "2 times 4" in picture.value


def test_names_have_buttons_in_both_forms():
    made = slider.slider(
        lambda site, k: draw(k), {"site": ["in", "<out>"], "k": [1, 5]}, alt="{} {}".format, label={"site": "read at"}
    )
    choice = page(made).find("fieldset")
    assert choice.legend.text == "read at" and [each.text.strip() for each in choice.find_all("label")] == [
        "in",
        "<out>",
    ]
    buttons = choice.find_all("input")
    assert [b["type"] for b in buttons] == ["radio"] * 2 and len({b["name"] for b in buttons}) == 1
    assert [b.has_attr("checked") for b in buttons] == [True, False]
    assert len(page(made).find_all(type="range")) == 1
    picture, site, k = made.widget().children
    site.value, k.value = 1, 1
    assert 'alt="&lt;out&gt; 5"' in picture.value


def test_several_sliders_on_a_page_have_different_ids(one):
    both = BeautifulSoup(one.html() + one.html(), "html.parser")
    ids = [e["id"] for e in both.find_all(id=True)]
    assert len(ids) == len(set(ids)) == 4


def test_a_page_knows_how_small_the_letters_of_a_slider_are():
    def draw(size):
        figure = plt.figure(figsize=(6, 2))
        figure.text(0, 0, "small", fontsize=size)
        figure.text(0, 0.5, "large", fontsize=24)
        return figure

    figure = page(slider.slider(draw, {"size": [18, 9, 12]}, alt=str)).find("figure")
    assert float(figure["data-letters"]) == pytest.approx(9 / 72 / 6, abs=1e-4)


def test_no_figure_is_left_open():
    plt.close("all")
    slider.slider(draw, {"k": [1, 5]}, alt=str)
    assert plt.get_fignums() == []


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ({}, {}, "every slider needs at least one value"),
        ({"k": []}, {}, "every slider needs at least one value"),
        ({"k": range(1000)}, {}, "make 1000 frames; allowed: 150"),
        ({"k": [1]}, {"start": {"k": 7}}, "start=7 for k is not one of its values"),
        ({"k": [1]}, {"label": {"q": "what"}}, "label names \\['q'\\]; allowed: \\['k'\\]"),
    ],
)
def test_what_cannot_be_a_slider_is_refused_before_drawing(values, options, message):
    def never(*point):
        raise AssertionError("drawn before the values were checked")

    with pytest.raises(ValueError, match=message):
        slider.slider(never, values, alt=str, **options)


def test_draw_must_return_figures_of_one_size():
    with pytest.raises(ValueError, match="must return a Matplotlib Figure"):
        slider.slider(lambda k: None, {"k": [1]}, alt=str)
    with pytest.raises(ValueError, match="different sizes"):
        slider.slider(lambda k: plt.figure(figsize=(k, 1)), {"k": [1, 2]}, alt=str)
    plt.close("all")
