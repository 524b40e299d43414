"""What the book's search reads: the prose of every section, as a script, so that it also works on pages from a disk."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any

from bs4 import BeautifulSoup

SYNONYMS = (
    ("latent", "feature"),
    ("expert", "atom"),
    ("sae", "autoencoder"),
    ("moe", "mixture"),
    ("omp", "pursuit"),
    ("ce", "cross-entropy"),
)
"""Words of the two fields for one thing, as the glossary has them: who looks for one finds the other."""

NO_PROSE = re.compile(
    r'<(script|style|svg|pre|button)\b.*?</\1>|<a class="headerlink".*?</a>|<p class="(?:collapsed|expanded) .*?</p>',
    re.S,
)

MATHS = re.compile(r"\\[a-zA-Z]+\*?|\\.|[{}]|(?<=\S)[_^]")
"""What of a formula is its marks."""


def sections(page: str, text: str) -> Iterator[dict[str, Any]]:
    """Every section of a page: where it is, its heading, and its words without code and without its own sections."""
    whole = re.search(r"<article.*?</article>", text, re.S)
    article = BeautifulSoup(NO_PROSE.sub(" ", whole[0]) if whole else "", "html.parser")
    title = ""
    for section in reversed(found := article.find_all("section")):
        heading = section.find(re.compile("^h[1-6]$"), recursive=False)
        name = " ".join(heading.extract().get_text().split()) if heading else ""
        words = " ".join(MATHS.sub(" ", section.extract().get_text(" ")).split())
        section.attrs["told"] = (name, words)
    for section in found:
        name, words = section.attrs["told"]
        title = title or name
        yield {"page": page, "title": title, "at": section.get("id", ""), "heading": name, "text": words}


def script(found: list[dict[str, Any]]) -> str:
    """All sections and the synonyms, as the script that `search.js` reads."""
    return f"window.bookTexts = {json.dumps({'synonyms': SYNONYMS, 'sections': found}, ensure_ascii=False)};\n"


SCRIPTS = re.compile(r'\s*<script src="[^"]*(?:searchtools|language_data|searchindex)\.js"></script>')
PAGE = re.compile(r'<div class="bd-search-container">.*?</script>', re.S)
"""What the theme's page of results is made of."""
PLACE = """<div class="bd-search-container">
<h1>Search</h1>
<noscript><p>The search needs JavaScript; the <a href="glossary.html">glossary</a> does not.</p></noscript>
<form role="search" id="search-form"><label for="search-words">Words</label>
<input type="search" id="search-words" name="q" autocomplete="off"></form>
<p id="search-status" role="status"></p>
<ol id="search-found"></ol>
</div>
<script src="_static/texts.js"></script>
<script src="_static/search.js"></script>
"""
