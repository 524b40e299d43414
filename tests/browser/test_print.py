"""The PDF: Chromium numbers its pages, nothing is wider than the paper, and the whole book has 200 pages at most."""

import re

from helpers.press import paper
from tests.browser.chromium import HTML, open_page

TOC = {"root": "glossary", "parts": [{"caption": "Back matter", "chapters": [{"file": "bibliography"}]}]}
WIDER = """const paper = document.documentElement.clientWidth;
return [...document.querySelectorAll(".print *")].filter((e) => e.getBoundingClientRect().right > paper + 2)
  .map((e) => e.outerHTML.slice(0, 120));"""


def test_two_pages_are_printed_with_their_numbers(browser, tmp_path):
    (tmp_path / "html").symlink_to(HTML)
    (tmp_path / "print").mkdir()
    whole = tmp_path / "print" / "book.html"
    whole.write_text(paper.document(HTML, TOC), encoding="utf-8")
    pdf = paper.printed(browser, whole)
    try:
        assert pdf.startswith(b"%PDF") and set(paper.numbers(pdf)) == {"p1"}
        shown = browser.execute_script("return document.querySelector('.contents .page').textContent")
        assert int(shown) == paper.numbers(pdf)["p1"] > 3
        assert browser.execute_script(WIDER) == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})
        browser.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


ALONE = """const seen = (query) => [...document.querySelectorAll(query)].map((e) => e.checkVisibility());
const paper = document.documentElement.clientWidth;
const beside = ".bd-sidebar, .bd-header-article, .above-input:not([open])";
return [seen("h1"), seen(beside), seen(".sd-dropdown > :last-child"),
  [...document.querySelectorAll("article :not(mjx-container, mjx-container *)")]
    .filter((e) => e.checkVisibility() && e.getBoundingClientRect().right > paper + 2).map((e) => e.outerHTML)];"""


def test_a_page_printed_by_itself_has_its_title_no_sidebars_and_proofs_open(browser, wide):
    wide(700)
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    try:
        open_page(browser, "notebooks/04_sparse_inputs_sparse_experts")
        titles, beside, folded, wider = browser.execute_script(ALONE)
        assert titles and all(titles) and beside and not any(beside) and len(folded) > 3 and all(folded) and wider == []
    finally:
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": ""})


def test_the_whole_book_has_at_most_200_pages():
    pdf = paper.make().read_bytes()
    assert len(re.findall(rb"\n<</Type /Page\n", pdf)) <= 200
    assert len(paper.numbers(pdf)) > 20
