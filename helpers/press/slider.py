"""Sliders that are live in Jupyter and still work, with the keyboard too, on a page that has no kernel."""

from __future__ import annotations

import base64
import html
import io
import itertools
import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from helpers.settings import allowed

MOST_FRAMES = 150
"""A page holds every frame of its sliders: about 15 kB each."""

_numbers = itertools.count(1)


class Slider:
    """A figure with one slider for each entry of `values`, e.g. `{"k": [1, 2, 4, 8]}`; two entries make a grid.
    An entry whose values are names has buttons in its place.

    `draw(*point)` returns the Matplotlib figure at a point of the grid, `alt(*point)` what it shows, in words.
    `label` names a slider for the reader (a mapping when there are several), `start` is where it stands at first,
    `caption` is shown below. All frames are drawn at once, each kept once. As the last line of a cell the result is
    a live widget in Jupyter, and plain HTML on a page.

    Raises `ValueError` for no values, more than `MOST_FRAMES` points, a start that is not among the values, or
    frames of different sizes.
    """

    def __init__(
        self,
        draw: Callable[..., Figure],
        values: Mapping[str, Sequence[Any]],
        *,
        alt: Callable[..., str],
        label: str | Mapping[str, str] | None = None,
        start: Mapping[str, Any] | None = None,
        caption: str = "",
        dpi: int = 160,
    ) -> None:
        labels = {next(iter(values), ""): label} if isinstance(label, str) else label or {}
        self.values, start = {name: list(choices) for name, choices in values.items()}, start or {}
        _check(self.values, labels, start)
        grid = list(itertools.product(*self.values.values()))
        images, sizes, letters = zip(*(_frame(draw(*point), dpi, point) for point in grid), strict=True)
        sizes_differ = f"draw returned figures of different sizes, {sorted(set(sizes))}"
        allowed(len(set(sizes)) == 1, sizes_differ, "the same figsize for all")
        self.labels = {name: labels.get(name, name) for name in values}
        self.images = list(dict.fromkeys(images))
        self.order = [self.images.index(image) for image in images]
        self.alts = [alt(*point) for point in grid]
        self.size, self.caption = sizes[0], caption
        self.at = [choices.index(start.get(name, choices[0])) for name, choices in self.values.items()]
        self.letters = min(letters)  # the smallest of all frames, as a share of a frame's width

    def index(self, places: Sequence[int]) -> int:
        """Row number in the grid, the last slider running fastest."""
        return int(np.ravel_multi_index(places, [len(choices) for choices in self.values.values()]))

    def image(self, places: Sequence[int]) -> str:
        """The `<img>` element at a point of the grid."""
        row, (width, height) = self.index(places), self.size
        source, alt = self.images[self.order[row]], html.escape(self.alts[row])
        return f'<img src="{source}" alt="{alt}" width="{width}" height="{height}" style="max-width:100%;height:auto">'

    def widget(self) -> ipywidgets.Widget:
        """The live form: the same frames under `ipywidgets` sliders."""
        picture = ipywidgets.HTML(self.image(self.at))
        knobs = []
        for (name, choices), place in zip(self.values.items(), self.at, strict=True):
            options = [(_text(choice), i) for i, choice in enumerate(choices)]
            look = {"description": self.labels[name], "style": {"description_width": "initial"}}
            if not _named(choices):
                look["layout"] = ipywidgets.Layout(width="min(100%, 32em)")
            kind = ipywidgets.ToggleButtons if _named(choices) else ipywidgets.SelectionSlider
            knobs.append(kind(options=options, value=place, **look))
        for knob in knobs:
            knob.observe(lambda _: setattr(picture, "value", self.image([k.value for k in knobs])), "value")
        return ipywidgets.VBox([picture, *knobs])

    def html(self) -> str:
        """The form for a page: `<input>`s over the frames, and a few lines of script; needs no kernel."""
        name = f"book-slider-{next(_numbers)}"
        places = zip(self.values.items(), self.at, strict=True)
        knobs = "".join(self._knob(f"{name}-{knob}", knob, choices, place) for (knob, choices), place in places)
        data = {
            "images": self.images,
            "order": self.order,
            "alts": self.alts,
            "values": [[_text(c) for c in choices] for choices in self.values.values()],
        }
        return _PAGE.format(
            id=name,
            letters=f"{self.letters:.4f}",
            image=self.image(self.at),
            knobs=knobs,
            caption=f"<figcaption>{html.escape(self.caption)}</figcaption>" if self.caption else "",
            data=json.dumps(data).replace("<", "\\u003c"),  # nothing in it ends or nests a script
        )

    def _knob(self, name: str, knob: str, choices: Sequence[Any], at: int) -> str:
        """Buttons for names, and a slider for all else."""
        label, texts = html.escape(self.labels[knob]), [html.escape(_text(choice)) for choice in choices]
        if not _named(choices):
            return _KNOB.format(id=name, label=label, last=len(choices) - 1, at=at, text=texts[at])
        chosen = [" checked" if i == at else "" for i in range(len(texts))]
        buttons = "".join(
            f'<label><input type="radio" name="{name}" value="{i}"{chosen[i]}> {text}</label>'
            for i, text in enumerate(texts)
        )
        return f'\n<fieldset class="book-choice"><legend>{label}</legend>{buttons}</fieldset>'

    def _repr_mimebundle_(self, include: Any = None, exclude: Any = None) -> dict[str, Any]:
        """Both forms at once: Jupyter prefers the widget, `helpers.press.build` keeps the HTML."""
        return self.widget()._repr_mimebundle_() | {
            "text/html": self.html(),
            "text/plain": self.alts[self.index(self.at)],
        }


_KNOB = """
<div class="book-slider-knob"><label for="{id}">{label}</label>
<input type="range" id="{id}" min="0" max="{last}" step="1" value="{at}" aria-label="{label}" aria-valuetext="{text}">
<output for="{id}" aria-live="polite">{text}</output></div>"""

_PAGE = """<figure class="book-slider" id="{id}" data-letters="{letters}">{image}{knobs}{caption}
<script type="application/json">{data}</script>
<script>(() => {{
  const root = document.getElementById("{id}");
  const data = JSON.parse(root.querySelector("script").textContent);
  const image = root.querySelector("img"), knobs = [...root.querySelectorAll(".book-slider-knob, .book-choice")];
  const show = () => {{
    const inputs = knobs.map((k) => k.querySelector("input:checked, input[type=range]"));
    const row = inputs.reduce((r, k, i) => r * data.values[i].length + Number(k.value), 0);
    image.src = data.images[data.order[row]];
    image.alt = data.alts[row];
    inputs.forEach((k, i) => {{
      const text = data.values[i][Number(k.value)], output = knobs[i].querySelector("output");
      if (output) {{ k.setAttribute("aria-valuetext", text); output.textContent = text; }}
    }});
  }};
  knobs.forEach((k) => k.addEventListener("input", show));
  show(); // a browser may bring back where a slider stood before a reload
}})();</script></figure>"""


slider = Slider
"""As chapters call it."""


def _check(values: Mapping[str, Sequence[Any]], labels: Mapping[str, str], start: Mapping[str, Any]) -> None:
    count = math.prod(map(len, values.values()))
    if not values or not count:
        raise ValueError(f"values={values!r}: every slider needs at least one value")
    allowed(count <= MOST_FRAMES, f"values make {count} frames", f"{MOST_FRAMES}. Offer fewer values")
    for what, given in (("label", labels), ("start", start)):
        unknown = sorted(set(given) - set(values))
        allowed(not unknown, f"{what} names {unknown}", f"{sorted(values)}")
    for name, value in start.items():
        allowed(value in values[name], f"start={value!r} for {name} is not one of its values", f"{values[name]}")


def _frame(figure: Any, dpi: int, point: tuple[Any, ...]) -> tuple[str, tuple[int, int], float]:
    """One frame as a data address, at `dpi`, with the size (width, height) at which it is shown, and its smallest
    letters as a share of its width; closes the figure."""
    if not isinstance(figure, Figure):
        raise ValueError(f"draw returned {type(figure).__name__} at {point}; it must return a Matplotlib Figure")
    raw, packed = io.BytesIO(), io.BytesIO()
    figure.savefig(raw, format="png", dpi=dpi, bbox_inches=None)
    plt.close(figure)
    Image.open(raw).convert("RGB").save(packed, format="webp", lossless=True, method=4)
    inches = figure.get_size_inches()
    address = "data:image/webp;base64," + base64.b64encode(packed.getvalue()).decode()
    letters = [text.get_fontsize() / 72 for text in figure.findobj(Text) if text.get_text().strip()]
    return address, (round(inches[0] * 100), round(inches[1] * 100)), min(letters, default=1.0) / inches[0]


def _named(choices: Sequence[Any]) -> bool:
    return all(isinstance(choice, str) for choice in choices)


def _text(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
