"""Every page in a real browser, opened from the disk: it is complete, silent, and its sliders obey the keyboard."""

import os
import re
import subprocess
import sys
from collections import Counter
from urllib.parse import unquote

import numpy as np
import pytest
from bs4 import BeautifulSoup
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from helpers import settings
from helpers.press import figures, night
from tests.browser.chromium import HTML, PAGES, open_page, requested


@pytest.fixture(params=PAGES, scope="module")
def page(request, browser):
    open_page(browser, request.param)
    return request.param


def test_a_page_has_its_title_says_nothing_and_asks_the_network_for_nothing(browser, page):
    heading = browser.find_element(By.CSS_SELECTOR, "article h1").text.rstrip("#").strip()
    assert heading and heading in browser.title
    assert [e for e in browser.get_log("browser") if e["level"] in ("SEVERE", "WARNING")] == []
    asked = requested(browser)
    assert asked, "the log of requests is empty: the check would be blind"
    assert [url for url in asked if not url.startswith(("file:", "data:", "blob:"))] == []


def test_every_figure_can_be_heard_and_seen(browser, page):
    browser.execute_async_script(
        """const images = [...document.querySelectorAll("article img")], done = arguments[0];
        for (const image of images) image.loading = "eager";
        Promise.allSettled(images.map((image) => image.decode())).then(() => done(true));"""
    )
    images = browser.find_elements(By.CSS_SELECTOR, "article img, article svg[role=img]")
    for image in images:
        assert (image.get_attribute("alt") or image.get_attribute("aria-label") or "").strip()
        if image.tag_name == "img":
            assert browser.execute_script("return arguments[0].naturalWidth", image) > 0, "an image did not load"


ANYWHERE = re.compile(r"<[^<>]* at 0x[0-9a-f]+>|<function \S+|Traceback \(most recent call last\)")
ONE = r"(?:'[^']*'|-?[\d.]+(?:e-?\d+)?)"
PRINTED = re.compile(
    rf"(?<![\w.'’-])(?:nan|None|True|False)(?![\w'’-])|\b[A-Z]\w+\(\w+=|\({ONE}(?:, {ONE})+,?\)|\({ONE},\)"
)
"""Values, objects and tuples as Python spells them: no output that stands open has any."""


def test_no_page_prints_what_only_python_reads(browser, page):
    text = browser.execute_script('return document.querySelector("article").textContent')
    assert ANYWHERE.findall(text) == []
    shown = browser.execute_script(
        "return [...document.querySelectorAll('article .cell_output')].filter((e) => e.checkVisibility())"
        ".map((e) => e.innerText)"
    )
    assert [hit[0] for each in shown for hit in PRINTED.finditer(each)] == []


@pytest.mark.parametrize("bad", ["loss nan", "None", "held: True", "AuxK(k=3)", "(1, 2)", "('a', 0.5)", "(1,)"])
def test_what_only_python_reads_is_seen(bad):
    assert PRINTED.search(f"so {bad}\n") and not PRINTED.search("None-the-less, 1 [0, 2] (n = 3), Nonesuch (1) f(x)")


def test_mathematics_is_typeset(browser, page):
    raw = browser.execute_script(
        r"""const walk = document.createTreeWalker(document.querySelector("article"), NodeFilter.SHOW_TEXT);
        const found = [];
        while (walk.nextNode()) {
          const node = walk.currentNode;
          if (node.parentElement.closest("pre, code, script, mjx-container, style, .mathjax_ignore")) continue;
          if (/\$[^$]+\$|\\\(|\\\[|\\(frac|sum|mathbb|text)\b/.test(node.data)) found.push(node.data);
        }
        return found;"""
    )
    assert raw == []
    assert browser.find_elements(By.CSS_SELECTOR, "mjx-merror") == []
    sources = len(browser.find_elements(By.CSS_SELECTOR, "article .math"))
    assert len(browser.find_elements(By.CSS_SELECTOR, "article .math mjx-container")) >= sources


def test_sliders_obey_the_keyboard(browser, page):
    browser.execute_script("for (const fold of document.querySelectorAll('article details')) fold.open = true")
    for figure in browser.find_elements(By.CSS_SELECTOR, "figure.book-slider"):
        image = figure.find_element(By.TAG_NAME, "img")
        for knob in figure.find_elements(By.CSS_SELECTOR, ".book-slider-knob"):
            move(browser, figure, image, knob)
        for choice in figure.find_elements(By.CSS_SELECTOR, ".book-choice"):
            buttons = choice.find_elements(By.TAG_NAME, "input")
            buttons[0].send_keys(Keys.SPACE)
            before = image.get_attribute("alt")
            buttons[0].send_keys(Keys.ARROW_RIGHT)
            assert buttons[1].is_selected() and image.get_attribute("alt") != before


def move(browser, figure, image, knob):
    """From one end of a slider to the other, key by key: the value shown, the words and the picture follow."""
    slider, output = knob.find_element(By.TAG_NAME, "input"), knob.find_element(By.TAG_NAME, "output")
    assert slider.get_attribute("aria-label").strip()
    assert knob.find_element(By.TAG_NAME, "label").get_attribute("for") == slider.get_attribute("id")
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'}); arguments[0].focus()", slider)
    assert browser.switch_to.active_element == slider
    slider.send_keys(Keys.HOME)
    states = [(output.text, image.get_attribute("alt"), image.get_attribute("src"))]
    for _ in range(int(slider.get_attribute("max"))):
        slider.send_keys(Keys.ARROW_RIGHT)
        states.append((output.text, image.get_attribute("alt"), image.get_attribute("src")))
        assert slider.get_attribute("aria-valuetext") == output.text
    texts, alts, sources = (len(set(column)) for column in zip(*states, strict=True))
    assert texts == len(states), "each step shows its own value"
    assert alts > 1 and sources > 1, "the figure and its words follow the slider"


def test_dark_mode_turns_the_page_and_its_figures(browser):
    open_page(browser, PAGES[0])
    for mode in ("light", "dark"):
        for _ in range(3):
            if browser.execute_script("return document.documentElement.dataset.theme") == mode:
                break
            browser.execute_script("document.querySelector('.theme-switch-button').click()")
        assert browser.execute_script("return document.documentElement.dataset.theme") == mode
        lightness = browser.execute_script(
            "return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)"
        )
        assert (max(lightness) < 64) == (mode == "dark")
    with_figure = next(p for p in PAGES if "book-slider" in (HTML / f"{p}.html").read_text(encoding="utf-8"))
    open_page(browser, with_figure)
    image = browser.find_element(By.CSS_SELECTOR, "figure.book-slider img")
    assert browser.execute_script("return document.documentElement.dataset.theme") == "dark", "the choice is kept"
    painted(browser, image, "png")
    assert night.PAPER in colours(browser, image, "src") and "#ffffff" not in colours(browser, image, "src")
    browser.execute_script("document.documentElement.dataset.theme = 'light'")
    painted(browser, image, "webp")
    assert "#ffffff" in colours(browser, image, "src")


def painted(browser, image, kind):
    """Until a slider shows its frame as the page's mode wants it."""
    WebDriverWait(browser, 60).until(lambda _: image.get_attribute("src").startswith(f"data:image/{kind}"))


def colours(browser, image, which):
    """Colours of at least twenty dots of a frame: of the one that is shown (`src`), or of its original (`day`)."""
    return set(
        browser.execute_async_script(
            """const [image, which, done] = arguments, drawn = new Image();
            drawn.src = image[which];
            drawn.decode().then(() => {
              const {width, height} = drawn;
              const canvas = Object.assign(document.createElement("canvas"), {width, height});
              const pen = canvas.getContext("2d"), times = new Map();
              pen.drawImage(drawn, 0, 0);
              const bytes = pen.getImageData(0, 0, width, height).data;
              for (let i = 0; i < bytes.length; i += 4) {
                const colour = (bytes[i] << 16) | (bytes[i + 1] << 8) | bytes[i + 2];
                times.set(colour, (times.get(colour) ?? 0) + 1);
              }
              const often = [...times.keys()].filter((colour) => times.get(colour) >= 20);
              done(often.map((colour) => "#" + colour.toString(16).padStart(6, "0")));
            });""",
            image,
            which,
        )
    )


def parts(colour):
    return np.array([int(colour[i : i + 2], 16) for i in (1, 3, 5)])


def test_by_night_a_method_has_the_colour_in_sliders_that_it_has_in_drawings(browser):
    """Frames are dots and are painted by the page, drawings have a file of their own; nothing is turned over."""
    open_page(browser, "index")
    browser.execute_script("for (const k of ['mode', 'theme']) localStorage.setItem(k, 'dark')")
    try:
        seen, methods = 0, {mark.colour.lower() for mark in figures.METHODS.values()}
        for page in PAGES:
            open_page(browser, page)
            browser.execute_script("document.documentElement.dataset.theme = 'dark'")
            filters = "return [...document.querySelectorAll('article img')].map((e) => getComputedStyle(e).filter)"
            assert set(browser.execute_script(filters)) <= {"none"}
            browser.execute_script("for (const fold of document.querySelectorAll('article details')) fold.open = true")
            for image in browser.find_elements(By.CSS_SELECTOR, ".book-slider img"):
                painted(browser, image, "png")
                shown = [parts(colour) for colour in colours(browser, image, "src")]
                for method in methods & colours(browser, image, "day"):
                    wanted = parts(night.night(method))
                    assert any(np.abs(wanted - each).max() <= 2 for each in shown), f"{page}: {method} by night"
                    seen += 1
        assert seen >= 10
    finally:
        browser.execute_script("localStorage.clear()")


REFERENCES = ("for", "headers", "aria-labelledby", "aria-describedby", "aria-controls", "aria-owns")


def listed(names):
    return names.split() if isinstance(names, str) else names


def test_no_name_stands_twice_on_a_page_and_each_that_is_asked_for_is_there():
    """In the files, before any script: a reader without one has the same."""
    asked_for = 0
    for page in PAGES:
        soup = BeautifulSoup((HTML / f"{page}.html").read_text(encoding="utf-8"), "html.parser")
        names = Counter(element["id"] for element in soup.find_all(id=True))
        assert [name for name, times in names.items() if times > 1] == [], page
        links = [link["href"][1:] for link in soup.select('a[href^="#"]')]
        links = [link for link in links if link and "/" not in link]  # the explorer's are its script's
        labels = [name for key in REFERENCES for e in soup.find_all(attrs={key: True}) for name in listed(e[key])]
        assert [name for name in links + labels if unquote(name) not in names] == [], page
        asked_for += len(links) + len(labels)
    assert asked_for > len(PAGES)


def shown(browser, selector="tbody.claim"):
    """Ids of the scoreboard's rows that can be seen, in their order on the page."""
    rows = browser.find_elements(By.CSS_SELECTOR, f".scoreboard {selector}")
    return [row.get_attribute("id") for row in rows if row.is_displayed()]


def test_the_scoreboard_filters_sorts_and_opens_by_keyboard(browser):
    open_page(browser, "scoreboard")
    claims = shown(browser)
    assert len(claims) >= 32 and shown(browser, "tr.more") == []
    title = browser.find_element(By.CSS_SELECTOR, ".scoreboard button.open")
    browser.execute_script("arguments[0].focus()", title)
    title.send_keys(Keys.ENTER)
    assert title.get_attribute("aria-expanded") == "true"
    assert shown(browser, "tr.more") == [title.get_attribute("aria-controls")]
    title.send_keys(Keys.SPACE)
    assert shown(browser, "tr.more") == []
    box = browser.find_element(By.ID, "filter-verdict")
    box.send_keys("partly")
    partly = browser.find_elements(By.CSS_SELECTOR, "tbody.claim[data-verdict='partly']")
    assert set(shown(browser)) == {row.get_attribute("id") for row in partly} and 0 < len(partly) < len(claims)
    assert browser.find_element(By.CSS_SELECTOR, ".filters output").text == f"{len(partly)} of {len(claims)} claims"
    box.send_keys(Keys.HOME)
    by_place = browser.find_element(By.CSS_SELECTOR, "thead .strip button")
    by_place.send_keys(Keys.ENTER)
    places = [float(browser.find_element(By.ID, row).get_attribute("data-at")) for row in shown(browser)]
    assert places == sorted(places) and len(places) == len(claims)
    assert by_place.find_element(By.XPATH, "..").get_attribute("aria-sort") == "ascending"
    browser.find_element(By.CSS_SELECTOR, "thead .chapters button").send_keys(Keys.ENTER)
    assert shown(browser) == claims


def test_a_link_to_a_claim_opens_its_row(browser):
    open_page(browser, "scoreboard")
    browser.execute_script("location.hash = 'claim-dead-lm'")
    WebDriverWait(browser, 5).until(lambda b: shown(b, "tr.more") == ["claim-dead-lm-more"])


@pytest.mark.parametrize("required", [True, False])
def test_without_a_browser_the_check_fails_where_it_is_required_and_is_skipped_elsewhere(required):
    command = [sys.executable, "-m", "pytest", "-rs", "-p", "no:cacheprovider", __file__, "-k", "dark_mode"]
    bare = {"PATH": "", "HOME": os.environ.get("HOME", ""), "RANK1_REQUIRE_BROWSER": str(int(required))}
    run = subprocess.run(command, env=bare, cwd=settings.ROOT, capture_output=True, text=True, check=False)
    assert "the pages were NOT checked in a browser: no Chromium" in run.stdout
    assert run.returncode == int(required)
