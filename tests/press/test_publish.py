"""The book's address: where it comes from, what is shown when it is known, and that nothing is when it is not."""

import re
import subprocess
import sys
import zipfile

import nbformat
import pytest

from helpers.press import polish, publish
from helpers.press.publish import Address
from helpers.settings import ROOT

SOMEWHERE = Address("ada", "book", "main")
PAGE = """<html><head><meta name="viewport" content="a" /><meta name="viewport" content="b" />
<title>A claim &#8212; Rank-One Experts</title>
<link rel="preload" as="font" type="font/woff2" crossorigin href="f.woff2" />
<link rel="preload" as="script" href="a.js" />
  <script src="../_static/vendor/fontawesome/6.5.2/js/all.min.js?digest=1"></script></head>
<body><div class="bd-sidebar-primary bd-sidebar"></div><div class="header-article-items__end">
<i class="fas fa-bars fa-lg" data-mode="x"></i></div>
<div id="jb-print-docs-body"><h1>A claim</h1></div><div id="searchbox"></div>
<article><h1>A claim</h1><p>Its <em>answer</em> at \\(k = 4\\) &amp; so on.</p><p>More.</p>
<table><thead><tr><th></th><th class="blank">&nbsp;</th><th>k</th></tr></thead></table></article></body></html>"""


def page(where, name="notebooks/01_topk_sae_is_rank1_moe"):
    return polish.mended(PAGE, name, lambda icon: f'<svg class="{{}}" id="{icon}"{{}}></svg>', where)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("https://github.com/ada/book", SOMEWHERE),
        ("https://github.com/ada/book.git#next", Address("ada", "book", "next")),
        ("http://name:token@github.com/ada/book/", SOMEWHERE),
        ("git@github.com:ada/book.git", None),
        ("https://git.example.org/ada/book", None),
        ("https://github.com.example.org/ada/book", None),
        ("https://github.com/ada/book/tree/main", None),
        ("https://github.com/ada/book#a b", None),
        ("/srv/book.git#main", None),
        ("#main", None),
        ("", None),
    ],
)
def test_an_address_is_one_of_a_public_host_or_unknown(text, found):
    assert publish.read(text) == found


def test_the_variable_wins_over_the_remote_and_must_name_something(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(["git", *arguments], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.delenv("BOOK_REPOSITORY", raising=False)
    git("init", "--initial-branch", "main")
    assert publish.address(tmp_path) is None
    git("remote", "add", "origin", "/srv/private/book.git")
    assert publish.address(tmp_path) is None
    git("remote", "set-url", "origin", "https://github.com/ada/book.git")
    assert publish.address(tmp_path) == SOMEWHERE
    monkeypatch.setenv("BOOK_REPOSITORY", "https://github.com/eve/other#dev")
    assert publish.address(tmp_path) == Address("eve", "other", "dev")
    monkeypatch.setenv("BOOK_REPOSITORY", "/srv/private/book.git")
    with pytest.raises(ValueError, match="BOOK_REPOSITORY .*allowed: https://github.com/owner/name#branch"):
        publish.address(tmp_path)


def test_an_unknown_address_leaves_no_trace():
    text = page(None)
    assert '<meta name="description" content="Its answer at k = 4 &amp; so on.">' in text
    for word in ("canonical", "og:", "twitter", "github", "Colab", "Binder", "elsewhere", "https://"):
        assert word not in text


def test_a_known_address_is_in_the_head_and_in_the_links():
    text = page(SOMEWHERE)
    at = "notebooks/01_topk_sae_is_rank1_moe"
    for line in (
        f'<link rel="canonical" href="https://ada.github.io/book/{at}.html">',
        '<meta property="og:title" content="A claim">',
        '<meta property="og:image" content="https://ada.github.io/book/_static/preview.png">',
        f'href="https://colab.research.google.com/github/ada/book/blob/gh-pages/_sources/{at}.ipynb"',
        f'href="https://mybinder.org/v2/gh/ada/book/main?urlpath=lab/tree/{at}.ipynb"',
        f'href="https://github.com/ada/book/edit/main/{at}.ipynb"',
        'href="https://github.com/ada/book/issues/new?title=A%20claim%3A%20"',
    ):
        assert text.count(line) == 1
    assert (ROOT / "book" / "theme" / publish.PREVIEW.split("/")[1]).is_file()
    assert list(SOMEWHERE.links("glossary", "Glossary")) == ["Edit", "Report"]
    assert "edit/main/book/glossary.md" in SOMEWHERE.links("glossary", "Glossary")["Edit"]
    assert list(SOMEWHERE.links("genindex", "Index")) == ["Report"]
    assert Address("Ada", "ada.github.io").site == "https://ada.github.io/"
    assert '"https://ada.github.io/book/"' in page(SOMEWHERE, "index")


def test_a_page_says_nothing_twice_and_shuts_nobody_out():
    text = page(None)
    assert text.count('name="viewport"') == 1 and text.count("<h1>") == 1
    assert "<title>A claim — Rank-One Experts</title>" in text
    index = PAGE.replace("A claim &#8212;", "Rank-One Experts &#8212;")
    assert "<title>Rank-One Experts</title>" in polish.mended(index, "index", lambda icon: "", None)
    assert "all.min.js" not in text and "f.woff2" not in text and 'as="script" href="a.js"' in text
    assert '<svg class="fas fa-bars fa-lg" id="bars" data-mode="x"></svg>' in text
    assert "<thead><tr><td></td><td></td><th>k</th></tr></thead>" in text
    assert 'role="region" aria-label="Book" class="bd-sidebar-primary bd-sidebar"' in text


def test_a_first_cell_sets_colab_up_only_where_the_address_is_known():
    path = ROOT / "notebooks" / "00_how_to_read.ipynb"
    plain = nbformat.reads(publish.notebook(path, None), as_version=4)
    assert plain == nbformat.read(path, as_version=4)
    taken = nbformat.reads(publish.notebook(path, SOMEWHERE), as_version=4)
    nbformat.validate(taken)
    first = next(cell for cell in taken.cells if cell.cell_type == "code")
    assert "git clone --quiet --depth 1 --branch main https://github.com/ada/book.git" in first.source
    assert "minutes" in first.source and len(taken.cells) == len(plain.cells) + 1


def test_the_first_cell_does_nothing_elsewhere(tmp_path):
    source = publish.SET_UP.format(owner="ada", name="book", branch="main")
    asked = "import os, sys; from IPython.core.interactiveshell import InteractiveShell as S; "
    asked += "r = S.instance().run_cell(sys.argv[1]); assert r.success; print(os.getcwd())"
    done = subprocess.run([sys.executable, "-c", asked, source], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.split() == [str(tmp_path)], done.stderr


def test_what_is_handed_on_is_one_archive(tmp_path):
    with pytest.raises(ValueError, match="run `make book` first"):
        publish.dist(tmp_path)
    for name in ("html/index.html", "html/_static/a.css", "executed/quick/01_a.ipynb", "executed/quick/01_a.run.json"):
        (tmp_path / "_build" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "_build" / name).write_text("x")
    with zipfile.ZipFile(publish.dist(tmp_path)) as packed:
        names = [name.removeprefix("rank-one-experts/") for name in packed.namelist()]
    assert names == ["book/_static/a.css", "book/index.html", "notebooks/01_a.ipynb"]


def test_a_table_too_wide_for_a_phone_says_in_each_cell_of_which_column_it_is():
    def table(*heads):
        row = "".join(f"<td>{'letters' if i else '<b>name</b>'} {i}</td>" for i in range(len(heads)))
        head = "".join(f"<th>{name}</th>" for name in heads)
        return f"<table><thead><tr>{head}</tr></thead><tbody><tr>{row}</tr></tbody></table>"

    narrow, wide = table("a", "b"), table("first", "second", "third", "fourth", "fifth")
    text = PAGE.replace("</body>", f"{narrow}<table><tr><td>{wide}</td></tr></table></body>")
    mended = polish.mended(text, "index", lambda icon: "", None)
    assert narrow in mended and mended.count('class="cards"') == 1
    assert re.findall(r'data-name="(\w+)"', mended) == ["first", "second", "third", "fourth", "fifth"]
