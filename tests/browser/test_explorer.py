"""The explorer, opened from the disk: picking, links to a latent, the keyboard, a narrow screen, and without script."""

import json
import shutil

import pytest
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import Select, WebDriverWait

from helpers.press import browse
from tests.browser.chromium import HTML, open_page, requested
from tests.browser.test_access import axe, violations  # noqa: F401
from tests.test_security import HOSTILE


@pytest.fixture
def page(browser):
    open_page(browser, "explorer")
    yield browser
    assert [each for each in browser.get_log("browser") if each["level"] in ("SEVERE", "WARNING")] == []
    assert [url for url in requested(browser) if not url.startswith(("file:", "data:", "blob:", "about:"))] == []


def go(page, address):
    page.execute_script("location.hash = arguments[0]", address)
    page.execute_async_script("setTimeout(arguments[0], 50)")


def heading(page, wanted):
    """Wait until the detail shows this latent."""
    title = "const h = document.querySelector('.explorer .detail h2'); return h ? h.firstChild.data.trim() : ''"
    WebDriverWait(page, 20).until(lambda b: b.execute_script(title) == wanted)


def listed(page):
    return [int(row.get_attribute("href").rpartition("/")[2]) for row in page.find_elements(By.CSS_SELECTOR, ".rows a")]


def loaded(page):
    return page.execute_script("return Object.keys(window.explorer.data)")


def said(page):
    return page.find_element(By.CSS_SELECTOR, ".explorer .detail").text


def test_a_dictionary_is_loaded_when_it_is_picked(page):
    picks = page.find_elements(By.CSS_SELECTOR, ".picks a")
    assert len(picks) >= 5 and loaded(page) == [] and said(page) == "Pick a dictionary."
    for name, unit, n in (("smollm2", "latent", 1152), ("book-moe-3", "expert", 32)):
        page.find_element(By.CSS_SELECTOR, f".picks a[href='#{name}']").click()
        WebDriverWait(page, 20).until(
            lambda b, n=n, unit=unit: f"of {n:,} {unit}s" in b.find_element(By.TAG_NAME, "output").text
        )
        heading(page, f"{unit} {listed(page)[0]}")
    assert loaded(page) == ["smollm2", "book-moe-3"]


def test_a_link_leads_to_a_latent_and_back(page):
    go(page, "book-moe-1/7")
    heading(page, "expert 7")
    go(page, "book-moe-2/30")
    heading(page, "expert 30")
    page.back()
    heading(page, "expert 7")
    assert page.find_element(By.CSS_SELECTOR, ".picks [aria-current]").get_attribute("href").endswith("#book-moe-1")
    page.forward()
    heading(page, "expert 30")
    page.refresh()
    heading(page, "expert 30")
    page.execute_script("document.querySelector('.pair ul a').click()")
    neighbour = page.execute_script("return location.hash").rpartition("/")[2]
    heading(page, f"expert {neighbour}")
    go(page, "book-moe-2/99")
    WebDriverWait(page, 5).until(lambda b: said(b) == "There is no expert 99; there are 0 to 31.")
    go(page, "nowhere/1")
    WebDriverWait(page, 5).until(lambda b: said(b) == "There is no dictionary nowhere here.")


def test_what_is_shown_is_what_the_data_says(page):
    go(page, "smollm2/40")
    heading(page, "latent 40")
    data = "const d = window.explorer.data['smollm2']; "
    contexts = page.find_elements(By.CSS_SELECTOR, ".contexts li")
    rows = page.execute_script(
        data + "return d.contexts[40].map(([row]) => d.tokens[d.text[row]].replace(/\\n/g, '⏎'))"
    )
    marked = [each.find_element(By.TAG_NAME, "mark").get_attribute("textContent") for each in contexts]
    assert marked == rows and len(rows) == 8
    style = [each.get_attribute("style") for each in page.find_elements(By.CSS_SELECTOR, "mark")]
    deepest = [float(each.removeprefix("--a:").strip(" ;")) for each in style]
    assert deepest == sorted(deepest, reverse=True) and deepest[0] == 1
    count = page.execute_script(data + "return d.counts[40]")
    assert f"of 16,000 tokens ({count:,})" in said(page)
    promoted = page.execute_script(data + "return d.promoted[40].map((i) => d.tokens[i].trim())")
    chips = page.find_elements(By.CSS_SELECTOR, ".chips")[0].find_elements(By.TAG_NAME, "span")
    assert [chip.text for chip, word in zip(chips, promoted, strict=True) if word] == [
        word for word in promoted if word
    ]
    assert len(page.find_elements(By.CSS_SELECTOR, ".detail svg[role=img][aria-label]")) == 2


def test_the_list_is_filtered_and_sorted(page):
    go(page, "smollm2")
    WebDriverWait(page, 20).until(listed)
    assert len(listed(page)) == 300
    page.find_element(By.CSS_SELECTOR, ".rows button").send_keys(Keys.ENTER)
    assert sorted(listed(page)) == list(range(1152))
    for way, column in (("largest activation", "largest"), ("most frequent", "counts")):
        Select(page.find_element(By.ID, "explorer-sort")).select_by_visible_text(way)
        values = page.execute_script(f"return window.explorer.data['smollm2'].{column}")
        shown = [values[j] for j in listed(page)]
        assert shown == sorted(values, reverse=True)[: len(shown)]
    Select(page.find_element(By.ID, "explorer-sort")).select_by_visible_text("number")
    go(page, "smollm2/798")
    heading(page, "latent 798")
    row = page.find_element(By.CSS_SELECTOR, ".rows [aria-current]")
    box = "const {top, bottom} = arguments[0].getBoundingClientRect(); return [top, bottom]"
    (top, bottom), (high, low) = (
        page.execute_script(box, each) for each in (row, page.find_element(By.CLASS_NAME, "rows"))
    )
    assert high <= top < bottom <= low, "what is picked is in sight"
    box = page.find_element(By.ID, "explorer-filter")
    box.send_keys("17")
    assert 17 in listed(page)
    box.clear()
    box.send_keys("no such word as this")
    assert listed(page) == []


def hostile(folder):
    """The page with one dictionary, whose tokens, titles, note and corpus are HTML that would run."""
    shutil.copy(HTML / "explorer.html", folder)
    (folder / "_static").mkdir()
    for path in (HTML / "_static").iterdir():
        if path.name != "explorer":
            (shutil.copytree if path.is_dir() else shutil.copy2)(path, folder / "_static" / path.name)
    data = browse.read(HTML / "_static" / "explorer" / "book-moe-0.js")
    bad = " ".join(HOSTILE)
    data["tokens"] = [HOSTILE[i % len(HOSTILE)] for i in range(len(data["tokens"]))]
    data["documents"] = [[bad, bad] for _ in data["documents"]]
    data["about"] |= {"note": f"note {bad}", "title": f"title {bad}", "corpus": f"corpus {bad}", "teacher": bad}
    place = folder / "_static" / "explorer"
    place.mkdir()
    index = json.dumps([data["about"] | {"own": True, "bytes": 1}])
    (place / "index.js").write_text(f"window.explorer = {{data: {{}}, index: {index}}};")
    (place / "book-moe-0.js").write_text(f'window.explorer.data["book-moe-0"] =\n{json.dumps(data)};\n')
    return (folder / "explorer.html").as_uri()


def test_html_is_shown_as_text(browser, tmp_path):
    watch = "window.hurts = []; window.hurt = () => window.hurts.push(1); window.alert = window.hurt"
    script = browser.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": watch})
    try:
        browser.get(hostile(tmp_path))
        go(browser, "book-moe-0/3")
        heading(browser, "expert 3")
        shown = "return document.querySelector('.explorer').textContent"
        text = browser.execute_script(shown)
        for each in HOSTILE:
            assert each in text
        assert text.count(" ".join(HOSTILE)) > 2  # title of the dictionary, and of texts; note and corpus it leaves out
        tags = "return document.querySelectorAll('.explorer :is(script, img, style, b[onclick], svg[onload])').length"
        assert browser.execute_script(tags) == 0
        browser.execute_async_script("setTimeout(arguments[0], 300)")
        assert browser.execute_script("return window.hurts") == []
    finally:
        browser.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", script)


def test_it_obeys_the_keyboard(page):
    go(page, "book-moe-0/3")
    heading(page, "expert 3")
    first = page.find_element(By.CSS_SELECTOR, ".rows a")
    page.execute_script("arguments[0].focus()", first)
    first.send_keys(Keys.ARROW_DOWN)
    second = page.switch_to.active_element
    assert second.get_attribute("href").endswith(f"/{listed(page)[1]}")
    second.send_keys(Keys.ENTER)
    heading(page, f"expert {listed(page)[1]}")
    page.switch_to.active_element.send_keys(Keys.ARROW_RIGHT)
    heading(page, f"expert {listed(page)[2]}")
    page.switch_to.active_element.send_keys(Keys.ARROW_LEFT)
    heading(page, f"expert {listed(page)[1]}")
    box = page.find_element(By.ID, "explorer-filter")
    box.send_keys(Keys.ARROW_RIGHT)
    heading(page, f"expert {listed(page)[1]}")


@pytest.mark.parametrize("width", [390, 820])
def test_it_fits_a_narrow_screen(page, width):
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    page.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    try:
        go(page, "smollm2/40")
        heading(page, "latent 40")
        assert page.execute_script("return document.documentElement.scrollWidth") <= width
        top = "return document.querySelector('.detail').getBoundingClientRect().top"
        WebDriverWait(page, 10).until(lambda b: 0 <= b.execute_script(top) < 400)
    finally:
        page.execute_cdp_cmd("Emulation.clearDeviceMetricsOverride", {})


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nobody_is_shut_out_of_a_latent(browser, axe, scheme):  # noqa: F811
    open_page(browser, "explorer")
    for each in ("mode", "theme"):
        browser.execute_script(f"document.documentElement.dataset.{each} = arguments[0]", scheme)
    for name in ("smollm2/40", "book-moe-0/3"):
        go(browser, name)
        heading(browser, name.replace("smollm2/", "latent ").replace("book-moe-0/", "expert "))
        assert violations(browser, axe) == []


def test_without_a_script_it_is_plain_text(browser):
    browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        browser.get((HTML / "explorer.html").as_uri())
        assert "The same can be read as plain text" in browser.find_element(By.CLASS_NAME, "explorer").text
        links = browser.find_elements(By.CSS_SELECTOR, "p.about a[href$='.txt']")
        assert len(links) >= 5
        names = [link.get_attribute("href").rpartition("_static/")[2] for link in links]
    finally:
        browser.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
    assert all((HTML / "_static" / name).read_text(encoding="utf-8").count("fires on") >= 32 for name in names)
