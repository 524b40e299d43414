"""The whole book as one PDF, printed by Chromium: a title, contents with pages, every chapter with its proofs open."""

from __future__ import annotations

import base64
import html
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from helpers import settings
from helpers.press import build, publish

NOT_PRINTED = re.compile(
    r'<script\b.*?</script>|<details class="[^"]*\babove-input">.*?</details>|<a class="headerlink".*?</a>', re.S
)
"""Scripts, and code that is folded on the page."""
WIDE, HIGH, MARGIN = 8.27, 11.69, 0.5
"""A4, in inches."""
PAGE = re.compile(rb"\n(\d+) 0 obj\n<</Type /Page\n")
"""A page of a PDF as Chromium writes it."""
MOST_PAGES = 200
AT_FOOT = '<div style="width: 100%; text-align: center; font-size: 8px"><span class="pageNumber"></span></div>'
FIT = """const all = [...document.querySelectorAll(".print table, .print mjx-container[display], .print figure")];
const room = (e) => e.parentElement.closest("section, div, dd").clientWidth;
const wide = all.map((e) => [e, room(e) / e.scrollWidth]).filter(([, by]) => by < 0.995);
wide.forEach(([e, by]) => { e.style.zoom = Math.max(0.4, by); });
return Promise.all([...document.images].map((image) => {
  image.loading = "eager";
  return image.decode().catch(() => 0);
})).then(() => document.documentElement.scrollHeight);"""
"""What is wider than the page is made smaller; all is measured before anything changes, or it takes minutes."""
FILL = """for (const link of document.querySelectorAll(".contents a")) {
  link.lastChild.textContent = arguments[0][link.hash.slice(1)] || "";
}"""


def chapter(page: str, text: str, known: dict[str, str]) -> str:
    """A page's article, to stand beside the others: its names are its own, and its links lead to where things stand."""
    found = re.search(r"<article[^>]*>(.*?)</article>", text, re.S)
    inside = re.sub(r"<details\b", "<details open", NOT_PRINTED.sub("", found[1] if found else ""))
    inside = re.sub(r'\b(id|for|aria-labelledby)="', rf'\1="{known[page]}-', inside)
    inside = re.sub(r'src="(?!data:)([^"]+)"', lambda at: f'src="../html/{_from(page, at[1])}"', inside)
    inside = re.sub(r'href="(?!\w+:)([^"]*)"', lambda at: f'href="{_link(page, at[1], known)}"', inside)
    return f'<div class="chapter bd-article" id="{known[page]}">{inside}</div>'


def _from(page: str, link: str) -> str:
    """A link of a page as one from the book's top."""
    top = Path(page).parent.as_posix()
    return link.removeprefix("../") if link.startswith("../") or top == "." else f"{top}/{link}"


def _link(page: str, link: str, known: dict[str, str]) -> str:
    target, _, at = link.partition("#")
    to = known.get(_from(page, target).removesuffix(".html") if target else page)
    return "#" + (f"{to}-{at}" if to and at else to or known[page])


def document(folder: Path, toc: dict[str, Any]) -> str:
    """The book as one page of HTML, with room for page numbers in its contents."""
    names = list(build.toc_files(toc))
    known = {name: f"p{number}" for number, name in enumerate(names)}
    texts = {name: (folder / f"{name}.html").read_text(encoding="utf-8") for name in names}
    head = re.search(r"<head>(.*?)</head>", texts[names[0]], re.S)[1]
    head = re.sub(r'((?:href|src)=")(?=_static)', r"\1../html/", re.sub(r"<link rel=\"(?!stylesheet)[^>]*>", "", head))
    kept = [
        *re.findall(r"<link[^>]*stylesheet[^>]*>", head),
        *re.findall(r"<script[^>]*>window.MathJax.*?</script>", head),
    ]
    kept += [
        '<script defer src="../html/_static/mathjax/tex-chtml.js"></script>',
        '<link rel="stylesheet" href="../html/_static/print.css">',
    ]
    cover = (
        f'<img src="../html/_static/logo.svg" alt=""><h1>{publish.NAME}</h1><p>{html.escape(publish.DESCRIPTION)}</p>'
    )
    lines = ["<h1>Contents</h1><ol>"]
    for part in toc["parts"]:
        lines.append(f"<li>{html.escape(part['caption'])}<ol>")
        for name in (file["file"] for file in part["chapters"]):
            title = html.escape(html.unescape(re.search(r"<title>(.*?) — ", texts[name])[1]))
            lines.append(f'<li><a href="#{known[name]}"><span>{title}</span><span class="page"></span></a></li>')
        lines.append("</ol></li>")
    chapters = "\n".join(chapter(name, texts[name], known) for name in names)
    top = '<!DOCTYPE html><html lang="en" data-theme="light" data-mode="light"><head><meta charset="utf-8">'
    body = f'<div class="cover">{cover}</div><div class="contents">{"".join(lines)}</ol></div>{chapters}'
    return (
        f'{top}<title>{publish.NAME}</title>{"".join(kept)}</head><body><main class="print">{body}</main></body></html>'
    )


def numbers(pdf: bytes) -> dict[str, int]:
    """On which page each named place lies, as Chromium writes it; empty where it writes it in another way."""
    page = {name: number for number, name in enumerate(PAGE.findall(pdf), 1)}
    places = re.findall(rb"/(p\d+) \[(\d+) 0 R /XYZ", pdf)
    return {name.decode(): page[at] for name, at in places if at in page}


@contextmanager
def _chromium() -> Iterator[Any]:
    """A browser as wide as the text on paper, patient enough for a whole book."""
    from selenium.webdriver import Chrome, ChromeOptions, ChromeService

    programs = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    program, driver = next(filter(None, programs), None), shutil.which("chromedriver")
    settings.allowed(bool(program and driver), "no Chromium with chromedriver", "apt install chromium chromium-driver")
    options = ChromeOptions()
    options.binary_location = program
    with tempfile.TemporaryDirectory() as profile:
        quiet = "--headless=new --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-background-networking"
        for argument in (*quiet.split(), f"--user-data-dir={profile}"):
            options.add_argument(argument)
        browser = Chrome(options=options, service=ChromeService(driver))
        try:
            browser.command_executor.client_config.timeout = 1800
            browser.set_script_timeout(1800)
            yield browser
        finally:
            browser.quit()


def printed(browser: Any, path: Path) -> bytes:
    """A document of the disk as PDF: typeset, fitted to the paper, and printed again with the numbers of its pages."""
    screen = {"width": int((WIDE - 2 * MARGIN) * 96), "height": 1000, "deviceScaleFactor": 1, "mobile": False}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
    browser.get(path.as_uri())
    browser.execute_async_script("window.MathJax.startup.promise.then(arguments[0])")
    browser.execute_script(FIT)
    sides = {f"margin{side}": MARGIN for side in ("Top", "Bottom", "Left", "Right")}
    asked = sides | {"paperWidth": WIDE, "paperHeight": HIGH, "printBackground": True, "displayHeaderFooter": True}
    asked |= {"headerTemplate": "<span></span>", "footerTemplate": AT_FOOT, "generateDocumentOutline": True}
    pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", asked)["data"])
    if pages := numbers(pdf):
        browser.execute_script(FILL, pages)
        pdf = base64.b64decode(browser.execute_cdp_cmd("Page.printToPDF", asked)["data"])
    return pdf


def make(root: Path = settings.ROOT) -> Path:
    """`_build/dist/rank-one-experts.pdf`, from the rendered book; `ValueError` where it is too long, or unreadable."""
    html_folder, target = root / "_build" / "html", root / "_build" / "dist" / "rank-one-experts.pdf"
    settings.allowed(html_folder.is_dir(), f"{html_folder} is not there", "run `make book` first")
    whole = root / "_build" / "print" / "book.html"
    toc = yaml.safe_load((root / "_toc.yml").read_text(encoding="utf-8"))
    settings.write(whole, document(html_folder, toc).encode())
    with _chromium() as browser:
        settings.write(target, printed(browser, whole))
    pages = len(PAGE.findall(target.read_bytes()))
    settings.allowed(1 <= pages <= MOST_PAGES, f"{target} has {pages} pages", f"1 to {MOST_PAGES}")
    return target


if __name__ == "__main__":
    try:
        print(make())
    except ValueError as error:
        sys.exit(f"error: {error}")
