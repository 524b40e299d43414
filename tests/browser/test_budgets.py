"""How long a page may be, what a reader sees at once, and every screen: nothing is squeezed, cut or out of reach."""

import re

import pytest

from tests.browser.chromium import HTML, PAGES, open_page
from tests.browser.test_figures import LEAST

CHAPTERS = [page for page in PAGES if page.startswith("notebooks/")]
HIGHEST, AT_ONCE = 10_000, 1_200
A_CLAIM = 40
"""Pixels of the scoreboard for each claim, heads of parts included: two lines of 20."""
TOPS = """
const top = (e) => e && e.getBoundingClientRect().top + scrollY;
const seen = (e) => e.checkVisibility({opacityProperty: true, visibilityProperty: true});
const first = (query) => top([...document.querySelectorAll('article ' + query)].find(seen)) ?? null;
return {high: document.documentElement.scrollHeight, figure: first(':is(.cell_output img, figure, svg[role=img])'),
        chip: first('.findings li'), hero: !!document.querySelector('article .findings')};
"""
TABLES = """
const seen = (e) => e.checkVisibility({opacityProperty: true, visibilityProperty: true}), found = [];
const scrolls = (e) => ['auto', 'scroll'].includes(getComputedStyle(e).overflowX);
const column = document.querySelector('article').getBoundingClientRect();
for (const table of [...document.querySelectorAll('article table')].filter(seen)) {
  let box = table.parentElement, name = table.textContent.trim().replace(/\\s+/g, ' ').slice(0, 60);
  while (box && box.tagName !== 'ARTICLE' && !scrolls(box)) box = box.parentElement;
  const inside = box && box.tagName !== 'ARTICLE';
  const {left, right} = (inside ? box : table).getBoundingClientRect();
  if (right > column.right + 1 || left < column.left - 1) found.push('wider than its column: ' + name);
  if (inside && box.scrollWidth > box.clientWidth + 1 && box.tabIndex < 0) found.push('out of reach of keys: ' + name);
  const cells = [...table.querySelectorAll('th, td, :is(th, td) :not(.math, .math *)')].filter(seen);
  for (const cell of cells) {
    const style = getComputedStyle(cell), hides = (over) => ['hidden', 'clip'].includes(over);
    const cut = hides(style.overflowX) && cell.scrollWidth > cell.clientWidth + 1;
    const low = hides(style.overflowY) && cell.scrollHeight > cell.clientHeight + 1;
    if (cut || low) found.push('cut: ' + cell.textContent.trim().slice(0, 60));
  }
  if (arguments[0] && inside && box.scrollWidth > box.clientWidth + 1) found.push('scrolls: ' + name);
}
return found;
"""

SHOWN = """
const done = arguments[0], images = [...document.querySelectorAll('article img')];
images.forEach(i => { i.loading = 'eager'; });
const shown = images.filter(i => i.checkVisibility({opacityProperty: true, visibilityProperty: true}));
Promise.all(shown.map(i => i.decode().catch(() => 0))).then(() => done(shown.map(
  i => [i.src.slice(-20), i.clientWidth, i.clientHeight, i.naturalWidth, i.naturalHeight])));
"""
"""The images that are neither folded nor of the other scheme, with their sizes as shown and as drawn."""

LETTERS = """
document.querySelectorAll('article details').forEach(fold => { fold.open = true; });
return [...document.querySelectorAll('.book-slider')].map(
  f => [f.dataset.letters * f.querySelector('img').clientWidth, f.querySelector('figcaption').textContent]);
"""


FORMULAS = """
for (const fold of document.querySelectorAll('article details')) fold.open = true;
const {right} = document.querySelector('article').getBoundingClientRect();
return [...document.querySelectorAll('article mjx-container')].filter((e) => e.checkVisibility())
  .filter((e) => [...e.children].some((part) => part.getBoundingClientRect().right > right + 1))
  .map((e) => e.parentElement.textContent.trim().slice(0, 60));
"""


@pytest.mark.parametrize("page", CHAPTERS)
def test_a_chapter_is_no_longer_than_it_may_be_begins_with_its_finding_and_holds_its_formulas(browser, wide, page):
    wide(1440)
    open_page(browser, page)
    found = browser.execute_script(TOPS)
    assert found["high"] <= HIGHEST
    assert browser.execute_script(FORMULAS) == []
    if found["hero"]:
        assert found["figure"] is not None and found["figure"] <= AT_ONCE, found
        assert found["chip"] <= AT_ONCE, found


def test_chapters_with_a_finding_show_it():
    assert sum('class="findings"' in (HTML / f"{page}.html").read_text(encoding="utf-8") for page in CHAPTERS) >= 17


def squeezed(browser):
    """Images whose shape on the page is not the one they were drawn in."""
    for name, across, down, natural_across, natural_down in browser.execute_async_script(SHOWN):
        off = (across / down) / (natural_across / natural_down) - 1
        yield f"squeezed by {off:.1%}: {name}" if abs(off) >= 0.01 + 1 / down else None


@pytest.mark.parametrize("width", [1440, 820, 390])
def test_figures_keep_their_proportions_no_table_is_cut_and_a_page_fits_its_screen(browser, wide, width):
    """On a phone the letters of sliders can be read, too."""
    wide(width)
    images, tables, letters, wrong = 0, 0, [], {}
    for page in PAGES:
        open_page(browser, page)
        over = browser.execute_script("return document.documentElement.scrollWidth - window.innerWidth")
        shown = list(squeezed(browser))
        cut = browser.execute_script(TABLES, width == 390 or width == 1440 and page == "performance")
        wrong[page] = [f"{over} pixels wider than the screen"] * (over > 1) + [each for each in shown if each] + cut
        letters += browser.execute_script(LETTERS) if width == 390 else []  # it opens what is folded, so it comes last
        images += len(shown)
        tables += bool(re.search(r"<table\b", (HTML / f"{page}.html").read_text(encoding="utf-8")))
    assert images > len(PAGES) and tables > 10 and {page: found for page, found in wrong.items() if found} == {}
    assert [each for each in letters if each[0] < LEAST] == [] and len(letters) >= 20 * (width == 390)


def test_a_table_that_is_cut_is_seen(browser, wide):
    wide(820)
    open_page(browser, "glossary")
    clamp = "display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden"
    bad = "<table style='width: 2000px'><tr><td>a</td></tr></table>"
    bad += f"<table><tr><td><span style='{clamp}'>1<br>2<br>3</span></td></tr></table>"
    browser.execute_script("document.querySelector('article').insertAdjacentHTML('beforeend', arguments[0])", bad)
    seen = [found.split(":")[0] for found in browser.execute_script(TABLES, False)]
    assert seen == ["wider than its column", "cut"]


def test_the_scoreboard_is_not_much_higher_than_its_claims(browser, wide):
    """A screen is 30 to 40 lines high: one a claim, and no more than as much again where numbers need a second."""
    wide(1440)
    open_page(browser, "scoreboard")
    high = browser.execute_script("return document.querySelector('.scoreboard > table').clientHeight")
    claims = browser.execute_script("return document.querySelectorAll('.scoreboard tbody.claim').length")
    assert claims >= 42 and high <= A_CLAIM * claims
