"""Figures for dark pages: a version of each SVG in which every colour stands out as it does by day."""

from __future__ import annotations

import colorsys
import copy
import re
from functools import cache
from pathlib import Path

from bs4 import BeautifulSoup
from matplotlib.colors import to_hex, to_rgb

NEEDLESS = re.compile(r"(?<!scale\()(?<![\d.])(-?\d+\.\d\d)\d+|(?<=\n)[ ]+")
"""A number of an SVG with more decimals than an eye can see, scales apart, and indentation: an eighth of all bytes."""
HEX = re.compile(r"#[0-9a-fA-F]{6}\b")
PAPER = "#121212"
"""A dark page's own."""


def page(text: str, folder: Path) -> str:
    """A page of `folder` in which every figure that is an SVG has a dark version beside it, written beside its file,
    and a width below which it scrolls instead."""
    soup = BeautifulSoup(text, "html.parser")
    found = soup.select("article .cell_output img[src$='.svg']")
    for image in found:
        day = folder / image["src"]
        svg = NEEDLESS.sub(r"\1", day.read_text(encoding="utf-8"))
        day.write_text(svg, encoding="utf-8")
        day.with_suffix(".dark.svg").write_text(night(svg), encoding="utf-8")
        wide = float(re.search(r'<svg[^>]* width="([\d.]+)pt"', svg)[1]) * 4 / 3
        least = 350 if wide <= 640 else 0.75 * wide  # letters of 12 points, 9 in a wide one, stay legible
        image["style"] = f"--wide: {wide:.0f}px; --least: {least:.0f}px"
        if wide > 350 and (box := image.find_parent(class_="cell_output")):  # it scrolls: keys must reach it
            box["tabindex"], box["role"], box["aria-label"] = "0", "group", "figure"
        other = copy.copy(image)
        other["src"] = image["src"].removesuffix(".svg") + ".dark.svg"
        for each, when in ((image, "by-day"), (other, "by-night")):
            each["class"] = [*each.get("class", []), when]
        other["loading"] = "lazy"  # not asked for where it is not shown
        image.insert_after(other)
    return str(soup) if found else text


def night(svg: str) -> str:
    """The figure for dark pages: each colour keeps its hue, and its contrast with the paper."""
    return HEX.sub(lambda colour: _by_night(colour[0].lower()), svg)


@cache
def _by_night(colour: str) -> str:
    """The colour of the same hue that stands out from dark paper as this one does from white, or as far as one can."""
    hue, _, saturation = colorsys.rgb_to_hls(*to_rgb(colour))
    wanted, low, high = 1.05 / (_luminance(colour) + 0.05), 0.0, 1.0
    for _ in range(12):
        middle = (low + high) / 2
        light = (_luminance(colorsys.hls_to_rgb(hue, middle, saturation)) + 0.05) / (_luminance(PAPER) + 0.05)
        low, high = (low, middle) if light > wanted else (middle, high)
    return to_hex(colorsys.hls_to_rgb(hue, high, saturation))


def _luminance(colour: str | tuple[float, float, float]) -> float:
    """Of sRGB, as WCAG 2 defines it."""
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in to_rgb(colour)]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
