"""The map: its arrows are the chapters' own links, and every way through the book is whole."""

import dataclasses
import json
import re

import pytest
import yaml

from helpers.press import chapters, reading
from helpers.press.chapters import Chapter
from helpers.settings import ROOT

CHAPTERS = {chapter.number: chapter for chapter in chapters.find()}
NEEDS = {number: reading.needs(chapter) for number, chapter in CHAPTERS.items()}
PARTS = reading.parts_of(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8")))


def chapter(*cells):
    return Chapter(
        ROOT / "notebooks" / "05_x.ipynb", "A $k$", {}, [{"cell_type": "markdown", "source": c} for c in cells]
    )


def test_a_chapter_needs_what_it_links_to_where_it_says_so():
    said = (
        "Before [2](02_b.ipynb).\n\n*You need* [1](01_a.ipynb), and\n[chapter 3](03_c.ipynb).\n\nSee [4](04_d.ipynb)."
    )
    assert reading.needs(chapter("# Title", said)) == [1, 3]
    assert reading.needs(chapter("# Title", "See [4](04_d.ipynb).")) == []


def test_every_chapter_but_the_first_says_what_it_needs_and_needs_what_comes_before():
    assert not NEEDS[0] and all(NEEDS[number] for number in NEEDS if number)
    assert all(needed < number and needed in NEEDS for number in NEEDS for needed in NEEDS[number])


def test_every_link_of_a_notebook_is_an_arrow_and_every_arrow_a_link():
    text = reading.drawing(CHAPTERS, PARTS)
    assert text.count('class="arrow"') == sum(map(len, NEEDS.values())) > 17
    places = reading.places(NEEDS, PARTS)
    assert len(set(places.values())) == len(CHAPTERS), "no two boxes lie on each other"
    assert all(places[needed][0] < places[number][0] for number in NEEDS for needed in NEEDS[number])
    links = re.findall(r'<a class="[^"]*" href="notebooks/(\w+)\.html">', text)
    assert sorted(links) == [CHAPTERS[number].slug for number in CHAPTERS]


@pytest.mark.parametrize("who", reading.PATHS)
def test_a_way_has_all_that_its_chapters_need_and_is_the_landing_page_s(who):
    name, numbers = reading.PATHS[who]
    assert {needed for number in numbers for needed in NEEDS[number]} <= set(numbers)
    (row,) = re.findall(rf"^\| {name} \|.*$", (ROOT / "book" / "index.md").read_text(encoding="utf-8"), re.M)
    assert {0, *map(int, re.findall(r"<notebooks/(\d\d)_", row))} == set(numbers)


def test_minutes_come_from_the_words_and_from_the_recorded_run(tmp_path):
    folded = ":::{solution} a\n:class: dropdown\n" + "word " * 5000 + "\n:::\n\n```python\n" + "word " * 5000 + "\n```"
    (job,) = chapters.plan(["0"])
    job = dataclasses.replace(job, chapter=chapter("word " * 400, folded), root=tmp_path)
    assert reading.minutes(job) == (2, None)
    job.stamp.parent.mkdir(parents=True)
    job.stamp.write_text(json.dumps({"seconds": 90}))
    assert reading.minutes(job) == (2, 1.5)


NO_WORDS = re.compile(
    r"^(:{3,}|`{3,}) *\{(?:prf:proof|exercise)\b.*?^\1 *$|\$[^$]*\$|\]\([^)]*\)|\{[\w:]+\}(?=`)"
    r"|^:\w+:[^\n]*$|^ *(?::{3,}|\|)[^\n]*$",
    re.M | re.S,
)
"""Proofs, exercises, mathematics, addresses of links, rows of tables, and the lines that directives are made of."""
MOST_WORDS = dict.fromkeys((3, 4, 10, 12, 13), 2800)


def words(said):
    return sum(bool(re.search(r"\w", word)) for word in NO_WORDS.sub(" ", said).split())


@pytest.mark.parametrize("number", CHAPTERS)
def test_a_chapter_says_no_more_than_a_reader_takes(number):
    assert words(reading.prose(CHAPTERS[number])) <= MOST_WORDS.get(number, 2000)


def test_words_are_counted_without_mathematics_and_what_is_folded():
    fold = "::::{dropdown} a b\nhidden words\n:::{prf:proof}\nmore\n:::\n::::\n"
    proof = ":::{prf:proof}\nit is so\n:::\n"
    said = f"# Two words\n\nOne $x + y$ [link](to/some/where.md), {{term}}`atom`.\n\n{fold}{proof}| a | b |\n\nlast"
    assert words(reading.prose(chapter(said))) == 6


def test_the_page_shows_all_of_it():
    text = reading.page(chapters.plan())
    assert "<!--" not in text and text.count("<table") == 2 and text.count("<svg") == 1
    assert "$" not in text and all(f">{number} · " in text for number in CHAPTERS)
