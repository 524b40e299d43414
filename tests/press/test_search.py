"""What the search reads of a page: words by section, without code, with formulas as their letters."""

import json

from helpers.press import search

PAGE = """<html><body><nav>elsewhere</nav><article><section id="top"><h1>Dead latents
<a class="headerlink" href="#">#</a></h1>
<p>They <em>never</em> fire at \\(k_{\\text{max}} = 4\\).</p><pre>code = 1</pre><script>"no"</script>
<section id="why"><h2>Why</h2><p>Because.</p></section></section></article></body></html>"""


def test_a_page_is_read_by_section():
    top, why = search.sections("notebooks/01_a", PAGE)
    assert top == {
        "page": "notebooks/01_a",
        "title": "Dead latents",
        "at": "top",
        "heading": "Dead latents",
        "text": "They never fire at k max = 4 .",
    }
    assert (why["title"], why["heading"], why["at"], why["text"]) == ("Dead latents", "Why", "why", "Because.")
    assert list(search.sections("search", "<html></html>")) == []


def test_the_script_holds_what_was_found_and_the_other_names():
    text = search.script(list(search.sections("a", PAGE)))
    given = json.loads(text.removeprefix("window.bookTexts = ").removesuffix(";\n"))
    assert ["latent", "feature"] in given["synonyms"] and ["expert", "atom"] in given["synonyms"]
    assert [section["at"] for section in given["sections"]] == ["top", "why"]
