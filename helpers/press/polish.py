"""What Sphinx and its theme leave on pages that a reader could do without, or cannot do without, mended in the HTML."""

from __future__ import annotations

import html
import itertools
import re
import shutil
from collections.abc import Callable
from pathlib import Path

from bs4 import BeautifulSoup

from helpers import settings
from helpers.press import night, publish, search

FONT_AHEAD = re.compile(r'<link rel="preload" as="font"[^>]*>\s*')
VIEWPORT = re.compile(r'\s*<meta name="viewport"[^>]*>')
ICON_SCRIPT = re.compile(r'\s*<script src="[^"]*/fontawesome/[^"]*"></script>')
ICON = re.compile(r'<(i|span) class="([^"]*\bfa-(?!solid\b|lg\b)([\w-]+)[^"]*)"([^>]*)></\1>')
TITLE = re.compile(r"<title>(.*?)</title>", re.S)
PRINTED = re.compile(r'<div id="jb-print-docs-body".*?(?=<div id="searchbox">)', re.S)
LEAD = re.compile(r"<article.*?</h1>.*?<p>(.*?)</p>", re.S)
MATHS = re.compile(r"\\\((.*?)\\\)", re.S)
SLIDER = re.compile(r'<figure class="book-slider"(?:(?!</figure>).)*?<figcaption>', re.S)
SCRIPTS = re.compile(r'<script[^>]* src="([^"]*)_static/')
TABLE = re.compile(r"<table\b(?:(?!<table\b).)*?</table>", re.S)
LEFT = ("*.map", "*/fontawesome/*/js", "*/fontawesome/*/webfonts/*.ttf", "*/fa-brands-*", "*/fa-regular-*", "locales")
"""Files of the theme under `_static` that no page asks for."""

TOGETHER = (
    (r"(?<=\d) (?=%)", "\xa0"),
    (r"(?<=\d)( \[−?[\d.,]+), (?=−?[\d.,]+\])", "\\1,\xa0"),
)
"""What stands on one line: a number and its percent sign, the two ends of an interval behind its value."""

ACCESS = (
    # every proof, and what is inside it, in exercises and solutions, has the same name, which nothing asks for
    (r' id="(?:proof|(?:proof|exercise|solution)-content)"', ""),
    # a head of a column that says nothing is a cell
    (r"<th\b[^>]*>(?:\s|&nbsp;|\xa0|<p>\s*</p>)*</th>", "<td></td>"),
    # a button is called what it shows
    (r'(<button class="btn search-button-field[^>]*?) title="Search" aria-label="Search"', r"\1"),
    (r'<summary aria-label="[^"]*"', "<summary"),
    # what scrolls can be reached by keys
    (r'<div class="pst-scrollable-table-container"', r'\g<0> tabindex="0" role="group" aria-label="table"'),
    # roles that ARIA has given up, or that the entries do not fit
    (r' role="doc-biblioentry"', ""),
    (r'<div role="list" class="citation-list"', '<div class="citation-list"'),
    # every part of a page lies in a region with a name
    (r'<div class="bd-sidebar-primary', r'<div role="region" aria-label="Book" class="bd-sidebar-primary'),
)
"""What stands against readers who listen to a page, or use its keys: what to find, and what to put there."""


def site(folder: Path, root: Path = settings.ROOT) -> None:
    """Mend all pages of a rendered book, write what its search reads, and take away what no page needs."""
    where, icons = publish.address(root), _icons(folder / "_static")
    for name in ("prf-prf.html", "searchindex.js", "_static/searchtools.js", "_static/language_data.js"):
        (folder / name).unlink(missing_ok=True)
    texts = []
    for path in sorted(folder.rglob("*.html")):
        page = path.relative_to(folder).with_suffix("").as_posix()
        if page.startswith("_static/"):
            path.unlink()
            continue
        text = mended(path.read_text(encoding="utf-8"), page, icons, where)
        path.write_text(night.page(text, path.parent), encoding="utf-8")
        texts += search.sections(page, text)
    (folder / "_static" / "texts.js").write_text(search.script(texts), encoding="utf-8")
    for path in [path for pattern in LEFT for path in (folder / "_static").rglob(pattern)]:
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in (folder / "_sources" / "notebooks").glob("*.ipynb"):
        path.write_text(publish.notebook(root / "notebooks" / path.name, where), encoding="utf-8")


def mended(text: str, page: str, icons: Callable[[str], str], where: publish.Address | None) -> str:
    """The HTML of one page: its head is complete and says nothing twice, icons are drawn in it, and what stood against
    some readers is gone."""
    text = ICON_SCRIPT.sub("", FONT_AHEAD.sub("", text))
    text = ICON.sub(lambda found: icons(found[3]).format(found[2], found[4]), text)
    title = html.unescape(TITLE.search(text)[1]).split(" — ")[0]
    shown = publish.NAME if title == publish.NAME else f"{title} — {publish.NAME}"
    text = TITLE.sub(lambda _: f"<title>{html.escape(shown, quote=False)}</title>", text, count=1)
    text = PRINTED.sub("", text)
    if page == "search":
        text = search.PAGE.sub(lambda _: search.PLACE, search.SCRIPTS.sub("", text))
    for pattern, better in (*ACCESS, *TOGETHER):
        text = re.sub(pattern, better, text)
    text = TABLE.sub(lambda found: carded(found[0]), text)
    text = numbered(text)
    lines = '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    lines += publish.head(page, title, about(text), where)
    text = VIEWPORT.sub("", text).replace("<title>", lines + "<title>", 1)
    end = '<div class="header-article-items__end">'
    return text.replace(end, end + publish.buttons(page, title, where), 1)


def numbered(text: str) -> str:
    """The page with its sliders' captions numbered as those of figures are, and with what paints them on dark pages."""
    if 'class="book-slider"' not in text:
        return text
    numbers = itertools.count(1)
    text = SLIDER.sub(lambda found: f'{found[0]}<span class="caption-number">Slider {next(numbers)} </span>', text)
    up = SCRIPTS.search(text)[1]
    return text.replace("</head>", f'<script defer src="{up}_static/night.js"></script>\n</head>', 1)


PHONE = 44
"""Letters beside each other on a narrow screen, in a table's size."""


def carded(table: str) -> str:
    """A table whose cells say the name of their column, of class `cards` where its columns need more room than a narrow
    screen has: there the style sheet lays each row out as a card."""
    soup = BeautifulSoup(table, "html.parser")
    names = [cell.get_text(" ", strip=True) for cell in soup.select("thead > tr:last-of-type > *")]
    rows = [row.find_all(["th", "td"], recursive=False) for row in soup.select("tbody > tr")]
    if not names or not rows or any(len(row) != len(names) for row in rows) or soup.select("[colspan], [rowspan]"):
        return table
    words = [
        [len(word) for cell in column for word in cell.get_text(" ").split()] for column in zip(*rows, strict=True)
    ]
    heads = [[len(word) for word in name.split()] for name in names]
    if sum(max([0, *head, *cells]) + 3 for head, cells in zip(heads, words, strict=True)) <= PHONE:
        return table
    soup.table["class"] = [*soup.table.get("class", []), "cards"]
    for row in rows:
        for cell, name in zip(row, names, strict=True):
            cell["data-name"] = name
    return str(soup)


def about(text: str) -> str:
    """A page's first sentences, as many as a search engine shows; the book's own where it begins with none."""
    lead = LEAD.search(text)
    words = html.unescape(re.sub(r"<[^>]+>", "", MATHS.sub(r"\1", lead[1]))) if lead else ""
    words = " ".join(words.replace("\\", "").split()) or publish.DESCRIPTION
    return words if len(words) <= 200 else words[:199].rsplit(" ", 1)[0] + " …"


def _icons(static: Path) -> Callable[[str], str]:
    """Font Awesome's drawings by name, as SVG with a place for classes and one for attributes: its script, of 1.5 MB,
    draws them late, and a browser that forbids fonts to pages from a disk shows none without it."""
    scripts = "".join(path.read_text(encoding="utf-8") for path in static.rglob("fontawesome/*/js/all.min.js"))
    # regular icons come before solid ones of the same name
    drawn = {m[1]: m for m in re.finditer(r'[{,]"?([\w-]+)"?:\[(\d+),(\d+),\[[^]]*\],"\w+","([^"]*)"\]', scripts)}

    def icon(name: str) -> str:
        _, wide, high, path = drawn[name].groups()
        box = f'<svg class="svg-inline--fa {{}}" viewBox="0 0 {wide} {high}" aria-hidden="true"{{}}>'
        return f'{box}<path fill="currentColor" d="{path}"/></svg>'

    return icon
