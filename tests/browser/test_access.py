"""Nobody is shut out: no violation that axe-core knows, on any page, light and dark, on a desk and on a phone."""

import pytest

from tests import npm
from tests.browser.chromium import HTML, PAGES, absent, open_page

EVERY = [*PAGES, "search", "genindex"]
RUN = """const [how, done] = arguments, said = (v) => v.nodes.map((n) => `${v.id}: ${n.html} ${n.failureSummary}`);
axe.run(document, {resultTypes: ["violations"], ...how}).then(
  (found) => done(found.violations.flatMap(said)), (error) => done([String(error)]));"""


@pytest.fixture(scope="module")
def axe():
    folder, why = npm.package("axe-core@4.14.1")
    if folder is None:
        absent(why)
    return (folder / "axe.min.js").read_text(encoding="utf-8")


NIGHT = """const still = document.createElement("style"), root = document.documentElement;
still.textContent = "* { transition: none !important; }";
document.head.append(still);
root.dataset.theme = root.dataset.mode = "dark";
return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number);"""


def violations(browser, axe, **how):
    browser.execute_script(axe)
    return browser.execute_async_script(RUN, how)


def by_night(browser, axe):
    """What cannot be read in the dark scheme; nothing but colours depends on the scheme."""
    assert max(browser.execute_script(NIGHT)) < 64
    return violations(browser, axe, runOnly=["color-contrast"])


@pytest.mark.parametrize("width", [1440, 390])
@pytest.mark.parametrize("page", EVERY)
def test_axe_finds_nothing_by_day_or_night(browser, wide, axe, page, width):
    wide(width)
    open_page(browser, page)
    assert violations(browser, axe) + by_night(browser, axe) == []


def test_axe_finds_what_is_there(browser, axe):
    open_page(browser, "index")
    bad = "<button></button><p style='color: #333'>words that go dark</p>"
    browser.execute_script("document.querySelector('article').insertAdjacentHTML('beforeend', arguments[0])", bad)
    assert [found.split(":")[0] for found in violations(browser, axe)] == ["button-name"]
    assert [found.split(":")[0] for found in by_night(browser, axe)] == ["color-contrast"]


def test_pages_are_light_and_begin_to_show_within_a_second(browser):
    """From the disk: the best of three openings, since a machine has other things to do."""
    size = {page: (HTML / f"{page}.html").stat().st_size for page in PAGES}
    assert max(size.values()) <= 1.2e6, max(size, key=size.get)
    assert sum(path.stat().st_size for path in HTML.rglob("*") if path.is_file()) <= 35e6
    for page in (max(size, key=size.get), "index", "scoreboard"):
        painted = []
        for _ in range(3):
            open_page(browser, page)
            entries = browser.execute_script("return performance.getEntriesByName('first-contentful-paint')")
            painted.append(entries[0]["startTime"])
        assert min(painted) < 1000, f"{page} showed nothing for {min(painted):.0f} ms"
