"""Figures as a reader sees them: letters that can be read and do not collide."""

import pytest

from tests.browser.chromium import HTML

FIGURES = sorted(path for path in (HTML / "_images").glob("*.svg") if not path.name.endswith(".dark.svg"))
PHONE, LEAST = 350, 8.9
"""Pixels of a figure on a narrow screen, and of the smallest letters there (9, and rounding)."""
BOXES = """
const svg = document.documentElement, whole = svg.getBoundingClientRect(), found = [];
for (const group of svg.querySelectorAll('g[id^="text_"]')) {
  const words = [...group.childNodes].filter(n => n.nodeType === Node.COMMENT_NODE).map(n => n.data.trim()).join(' ');
  const scale = /scale\\(([\\d.]+)/.exec(group.querySelector('[transform]')?.getAttribute('transform') ?? '');
  const box = group.getBoundingClientRect();
  if (!words || box.width === 0) continue;
  found.push({words, size: scale ? 100 * scale[1] : null,
              box: [box.left - whole.left, box.top - whole.top, box.right - whole.left, box.bottom - whole.top]});
}
return {found, wide: whole.width, high: whole.height};
"""


def faults(drawn):
    """What is wrong with the text of a figure: collisions, what leaves the frame, letters too small for a phone."""
    texts, wide, high = drawn["found"], drawn["wide"], drawn["high"]
    shown = PHONE if wide <= 640 else max(PHONE, 0.75 * wide)
    for place, text in enumerate(texts):
        left, top, right, bottom = text["box"]
        if left < -1 or top < -1 or right > wide + 1 or bottom > high + 1:
            yield f"{text['words']!r} leaves the frame"
        if text["size"] and text["size"] * 4 / 3 * shown / wide < LEAST:
            yield f"{text['words']!r} has {text['size']:.1f} points in a figure {wide:.0f} pixels wide"
        for other in texts[:place]:
            across = min(right, other["box"][2]) - max(left, other["box"][0])
            down = min(bottom, other["box"][3]) - max(top, other["box"][1])
            if across > 2 and down > 2:
                yield f"{text['words']!r} lies on {other['words']!r}"


@pytest.mark.parametrize("figure", FIGURES, ids=lambda path: path.stem[:8])
def test_letters_of_a_figure_can_be_read(browser, figure):
    browser.get(figure.as_uri())
    drawn = browser.execute_script(BOXES)
    wrong = list(faults(drawn))
    assert wrong == [], f"on {[p.stem for p in HTML.rglob('*.html') if figure.name in p.read_text(encoding='utf-8')]}"


def test_a_collision_a_cut_and_small_letters_are_seen():
    words = {"words": "a", "size": 12.0, "box": [10, 10, 50, 20]}
    plain = {"found": [words], "wide": 600, "high": 200}
    assert list(faults(plain)) == []
    for other in (
        words | {"box": [40, 12, 90, 24]},
        words | {"box": [580, 80, 640, 90]},
        words | {"size": 8.0, "box": [80, 80, 90, 90]},
    ):
        assert len(list(faults(plain | {"found": [words, other]}))) == 1
