"""The explorer's data as it is staged: whose file it is, the index, the plain text, and damaged files."""

import json
import re

import pytest

from helpers import settings
from helpers.press import browse

PAGE = {
    "about": {"name": "a", "title": "a model, layer 1", "unit": "latent", "n": 3}
    | {"corpus": "c", "note": "A licence.", "lens": ""},
    "window": [2, 1],
    "tokens": [" one", " two", "\n", " three"],
    "text": [0, 1, 2, 3, 0, 1],
    "starts": [0, 4],
    "counts": [2, 3, 0],
    "largest": [1.5, 2.0, 0.0],
    "contexts": [[[3, 0, 99]], [[4, 0, 99, 1, 5], [0, 0, 70]], []],
    "promoted": [[1, 0], [3, 2], [0, 0]],
}  # fmt: skip


def put(folder, name, page=PAGE, **about):
    folder.mkdir(parents=True, exist_ok=True)
    page = page | {"about": page["about"] | {"name": name} | about}
    (folder / f"{name}.js").write_text(f'window.explorer.data["{name}"] =\n{json.dumps(page)};\n', encoding="utf-8")


@pytest.fixture
def house(tmp_path):
    """A repository with two committed dictionaries, a reader's own two, and a staged page."""
    stage = tmp_path / "_build" / "stage"
    (stage / "theme").mkdir(parents=True)
    (stage / "explorer").mkdir()
    (stage / "explorer" / "README.md").write_text("# No page of the book\n", encoding="utf-8")
    (stage / "explorer.md").write_text(f"As text: {browse.PLACE}.", encoding="utf-8")
    for name in ("a", "b"):
        put(tmp_path / "book" / "explorer", name, title=f"{name} <of the book>")
    for name in ("b", "c"):
        put(tmp_path / "_build" / "explorer", name, title=f"my {name}")
    return tmp_path


def test_the_index_has_the_books_and_the_readers(house):
    browse.stage(house, house / "_build" / "stage")
    target = house / "_build" / "stage" / "theme" / "explorer"
    script = (target / "index.js").read_text(encoding="utf-8")
    index = json.loads(script.removeprefix("window.explorer = {data: {}, index: ").removesuffix("};\n"))
    assert [(each["title"], each["own"]) for each in index] == [
        ("a <of the book>", False),
        ("my b", True),
        ("my c", True),
    ]
    for each in index:
        assert (target / f"{each['name']}.js").stat().st_size == each["bytes"]
        assert browse.read(target / f"{each['name']}.js")["about"]["title"] == each["title"]
    text = (house / "_build" / "stage" / "explorer.md").read_text(encoding="utf-8")
    assert not (house / "_build" / "stage" / "explorer").exists()
    assert text.count("<a href=") == 3 and '"_static/explorer/a.txt">a &lt;of the book&gt;</a>' in text


def test_without_its_page_or_without_data_nothing_is_missing(house):
    (house / "_build" / "stage" / "explorer.md").unlink()
    browse.stage(house, house / "_build" / "stage")
    assert list((house / "_build" / "stage" / "theme").iterdir()) == []
    (house / "_build" / "stage" / "explorer.md").write_text(f"As text: {browse.PLACE}.", encoding="utf-8")
    browse.stage(house / "nowhere", house / "_build" / "stage")
    assert (house / "_build" / "stage" / "explorer.md").read_text(encoding="utf-8") == "As text: nothing yet."


def test_what_is_read_without_a_script():
    assert list(browse.plain(PAGE)) == [
        "a model, layer 1: 3 latents on 6 tokens of c",
        "A licence.",
        "\nlatent 0: fires on 33.33%, largest 1.5",
        "   two⏎>> three<<",
        "  raises the logit of: two | one",
        "\nlatent 1: fires on 50.00%, largest 2.0",
        "  >> one<< two",
        "  raises the logit of: three |⏎",
        "\nlatent 2: fires on 0.00%, largest 0.0",
        "  raises the logit of: one | one",
    ]


@pytest.mark.parametrize("content", ["", "no script", 'window.explorer.data["c"] =\n{"about": ', None])
def test_a_damaged_file_is_named(house, content):
    path = house / "_build" / "explorer" / "c.js"
    path.write_text(path.read_text("utf-8").replace('"c"', '"d"', 1) if content is None else content, encoding="utf-8")
    with pytest.raises(ValueError, match=r"c\.js is damaged: .*; delete it, or make it anew"):
        browse.stage(house, house / "_build" / "stage")


def test_the_examples_of_the_page_are_in_the_data():
    """What a latent is said to fire on is the word of its strongest contexts; a reader's link leads to something."""
    text = (settings.ROOT / "book" / "explorer.md").read_text(encoding="utf-8")
    examples = re.findall(r'<li><a href="#([\w-]+)/(\d+)">.*?(?:<em>(\w+)</em>.*)?</li>', text)
    assert len(examples) == text.count("<li>") == 4
    for name, number, word in examples:
        page = browse.read(settings.ROOT / "book" / "explorer" / f"{name}.js")
        peaks = [page["tokens"][page["text"][row]].strip() for row, *_ in page["contexts"][int(number)]]
        if word:
            assert word == max(peaks, key=peaks.count)
        else:
            assert {row for row, *_ in page["contexts"][int(number)]} <= set(page["starts"])


def test_the_committed_files_can_be_read_as_plain_text():
    files = sorted((settings.ROOT / "book" / "explorer").glob("*.js"))
    assert len(files) == 5
    for path in files:
        page = browse.read(path)
        lines = list(browse.plain(page))
        assert sum(">>" in line for line in lines) == sum(count > 0 for count in page["counts"])
        assert all(len(line) < 1000 for line in lines)
