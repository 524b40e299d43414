"""Nobody is shut out: no violation that axe-core knows, on any page, light and dark, on a desk and on a phone."""

import pytest

from tests import npm
from tests.browser.chromium import HTML, PAGES, absent, open_page

EVERY = [*PAGES, "search", "genindex"]
RUN = """const done = arguments[0], said = (v) => v.nodes.map((n) => `${v.id}: ${n.html} ${n.failureSummary}`);
axe.run(document, {resultTypes: ["violations"]}).then(
  (found) => done(found.violations.flatMap(said)), (error) => done([String(error)]));"""


@pytest.fixture(scope="module")
def axe():
    folder, why = npm.package("axe-core@4.14.1")
    if folder is None:
        absent(why)
    return (folder / "axe.min.js").read_text(encoding="utf-8")


@pytest.fixture(scope="module", params=["light", "dark"])
def shown_in(request, browser):
    """A browser that has chosen a colour scheme, as a reader chooses it: before the page is opened."""
    open_page(browser, "index")
    browser.execute_script("for (const k of ['mode', 'theme']) localStorage.setItem(k, arguments[0])", request.param)
    yield browser
    browser.execute_script("localStorage.clear()")


@pytest.fixture(scope="module", params=[1440, 390])
def wide(request, shown_in):
    """As wide as a desk's screen or a phone's; a window itself is never narrower than 500 pixels."""
    screen = {"width": request.param, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    shown_in.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    yield shown_in
    shown_in.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


def violations(browser, axe):
    browser.execute_script(axe)
    return browser.execute_async_script(RUN)


@pytest.mark.parametrize("page", EVERY)
def test_axe_finds_nothing(wide, axe, page):
    open_page(wide, page)
    assert violations(wide, axe) == []


def test_axe_finds_what_is_there(browser, axe):
    open_page(browser, "index")
    browser.execute_script("document.querySelector('article').append(document.createElement('button'))")
    assert [found.split(":")[0] for found in violations(browser, axe)] == ["button-name"]


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
