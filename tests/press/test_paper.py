"""The book on paper: one document whose links stay in it, proofs open, folded code left out, pages counted."""

import contextlib
import re
import shutil

import pytest
import yaml

from helpers.press import paper
from helpers.settings import ROOT

HEAD = """<html><head><title>{title} — Rank-One Experts</title><link rel="stylesheet" href="_static/book.css" />
<link rel="icon" href="_static/logo.svg"/><script>window.MathJax = {{}}</script></head><body>"""
FIRST = """<article class="bd-article"><h1 id="top">One<a class="headerlink" href="#top">#</a></h1>
<p><a href="notebooks/01_b.html#why">there</a> <a href="https://example.org">out</a>
<a href="_downloads/a.csv">csv</a></p>
<img src="_images/a.png" alt="a"><img src="data:image/png;base64,x" alt="b"></article>"""
SECOND = """<article class="bd-article"><h1>Two</h1><section id="why"><a href="#why">here</a>
<a href="../index.html">first</a><img src="../_images/b.png" alt="c">
<details class="sd-sphinx-override sd-dropdown"><summary>Proof</summary>Because.</details>
<details class="admonition hide above-input"><summary>Code</summary><pre>folded = 1</pre></details>
<pre>shown = 1</pre><script>gone()</script></section></article>"""
TOC = {"root": "index", "parts": [{"caption": "I", "chapters": [{"file": "notebooks/01_b"}]}]}


@pytest.fixture
def book(tmp_path):
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "index.html").write_text(HEAD.format(title="One") + FIRST)
    (tmp_path / "notebooks" / "01_b.html").write_text(HEAD.format(title="Two &amp; more") + SECOND)
    return tmp_path


def test_links_and_pictures_lead_where_they_lie(book):
    text = paper.document(book, TOC)
    names = re.findall(r'\bid="([^"]+)"', text)
    assert names == ["p0", "p0-top", "p1", "p1-why"]
    links = re.findall(r'<a[^>]* href="([^"]+)"', text)
    assert links == ["#p1", "#p1-why", "https://example.org", "#p0", "#p1-why", "#p0"]
    assert {link[1:] for link in links if link[0] == "#"} <= set(names)
    pictures = re.findall(r'<img[^>]* src="([^"]+)"', text)
    assert pictures[1:] == ["../html/_images/a.png", "data:image/png;base64,x", "../html/_images/b.png"]
    assert '<link rel="stylesheet" href="../html/_static/book.css" />' in text and "icon" not in text


def test_proofs_are_open_and_folded_code_is_left_out(book):
    text = paper.document(book, TOC)
    assert re.search(r"<details open[^>]*><summary>Proof", text)
    assert "shown = 1" in text and "folded = 1" not in text and "gone()" not in text
    assert "<span>Two &amp; more</span>" in text


def test_pages_are_counted_as_chromium_writes_them():
    written = b"%PDF\n2 0 obj\n<</Type /Page\n/A 1>>\nendobj\n7 0 obj\n<</Type /Page\n>>\nendobj\n"
    written += b"9 0 obj\n<</p0 [2 0 R /XYZ 0 1 0]\n/p1 [7 0 R /XYZ 0 1 0]\n/p1-why [7 0 R /XYZ 0 1 0]>>\nendobj"
    assert paper.numbers(written) == {"p0": 1, "p1": 2}
    assert paper.numbers(b"%PDF of another kind") == {}


def test_a_book_that_is_not_built_is_named(tmp_path):
    with pytest.raises(ValueError, match="run `make book` first"):
        paper.make(tmp_path)


@pytest.mark.parametrize("pages", [0, 200, 201])
def test_a_book_with_too_many_pages_is_no_success(book, tmp_path, monkeypatch, pages):
    shutil.copytree(book, tmp_path / "_build" / "html")
    (tmp_path / "_toc.yml").write_text(yaml.safe_dump(TOC))
    pdf = b"%PDF" + b"".join(b"\n%d 0 obj\n<</Type /Page\n>>\nendobj" % (i + 1) for i in range(pages))
    monkeypatch.setattr(paper, "_chromium", contextlib.nullcontext)
    monkeypatch.setattr(paper, "printed", lambda *_: pdf)
    if pages == 200:
        assert paper.make(tmp_path).read_bytes() == pdf
    else:
        with pytest.raises(ValueError, match=f"has {pages} pages; allowed: 1 to 200"):
            paper.make(tmp_path)


def test_every_page_of_the_book_is_in_the_contents():
    toc = yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))
    assert all("sections" not in chapter for part in toc["parts"] for chapter in part["chapters"])
