"""The browser that the pages are opened in, from the disk, without a network."""

import json
import os
import shutil
import tempfile
from contextlib import contextmanager

import pytest
import yaml
from selenium.webdriver import Chrome
from selenium.webdriver.chrome.options import Options
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.support.ui import WebDriverWait

from helpers import settings
from helpers.press.build import toc_files

HTML = settings.ROOT / "_build" / "html"
PAGES = list(toc_files(yaml.safe_load((settings.ROOT / "_toc.yml").read_text(encoding="utf-8"))))
REQUIRED = os.environ.get("CI") == "true" or os.environ.get("RANK1_REQUIRE_BROWSER") == "1"
QUIET = [
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--disable-dev-shm-usage",
    "--window-size=1300,1000",
]


def absent(what):
    """Skip for a reader, fail where the check must run."""
    (pytest.fail if REQUIRED else pytest.skip)(f"the pages were NOT checked in a browser: {what}")


@contextmanager
def started():
    """Chromium, silent, with its logs; skips or fails where there is none, or no book."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        absent("no Chromium with chromedriver; on Debian: apt install chromium chromium-driver")
    if not (HTML / "index.html").is_file():
        absent("there is no book yet; run make book")
    options = Options()
    options.binary_location = chromium
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    with tempfile.TemporaryDirectory() as profile:
        for argument in [*QUIET, f"--user-data-dir={profile}"]:
            options.add_argument(argument)
        chrome = Chrome(options=options, service=Service(driver))
        yield chrome
        chrome.quit()


def open_page(browser, page):
    """Open from the disk; wait until MathJax and everything else has come to rest."""
    browser.get("about:blank")  # at its start a browser opens a page of its own, which is not our matter
    for kind in ("browser", "performance"):
        browser.get_log(kind)
    browser.get((HTML / f"{page}.html").as_uri())
    WebDriverWait(browser, 60).until(lambda b: b.execute_script("return document.readyState") == "complete")
    typeset = "const d = arguments[0]; window.MathJax?.startup ? MathJax.startup.promise.then(() => d(true)) : d(true)"
    browser.execute_async_script(typeset)


def requested(browser):
    """Addresses that the page asked for, whether or not it got them."""
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return [m["params"]["request"]["url"] for m in messages if m["method"] == "Network.requestWillBeSent"]
