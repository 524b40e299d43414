"""Numbers in prose are what the kept runs say, and those that no mark holds are named one by one."""

import re

import pytest

from helpers import settings
from helpers.press import claims, numbers

# Decimal numbers that stand in prose without a mark, each with what surrounds it, and why it may: no result of ours
# that a record holds is among them.
PAPER, MEANS = "the paper's own number", "a threshold or a size that the text defines"
TYPED = {
    "07_a_benchmark_with_known_truth.ipynb": {
        "The paper says 6.2–18.6 times fewer": PAPER,
        "with the range 6.2 to 18.6 shaded": PAPER,
        "of more than 1.4 times the least error": MEANS,
    },
    "10_the_sae_inside.ipynb": {
        "report that it explains 20.2 to 23.5 times as much": PAPER,
        "In the paper's models a factor of 20 is 5.9 to 7.8 % of the variance": "20 k/d for the paper's k and d",
        "a factor of 20 is 7.8 %": "20 · 8/2048",
        "is worth a factor of 2.5 to 4.": "a prediction, made before the run",
        "was 3.39 [3.11, 3.72], against": "a former model's, of the commit named there; no record is kept",
        "by amounts that differ by less than 0.1)": MEANS,
        "near zero (within 0.02, as a mean": MEANS,
        "at the output (more than 0.02)": MEANS,
    },
    "12_three_gaps.ipynb": {"a factor of 1.5 apart": MEANS},
    "glossary.md": {"has a cosine above 0.9 with it": MEANS},
    "index.md": {"the paper has 1.5 to 1.7 with as many experts, and 1.96 and 0.99 with 128": PAPER},
}
NO_PROSE = re.compile(r"```.*?```|\$\$.*?\$\$|\$[^$]*\$|`[^`]*`|\]\([^)]*\)|<style.*?</style>|<svg.*?</svg>", re.DOTALL)
NAMED = re.compile(
    r"(?:Python|Theorem|Lemma|Corollary|Remark|Section|Hypothesis|Definition|Figure|Table) [A-Z]?\.?\d+(?:\.\d+)*"
)
DECIMAL = re.compile(r"(?<![\w.])(?<![A-Za-z]-)\d*\.\d+(?![\w.]*\d)")
FILES = {path.name: [holder[key] for holder, key in places] for path, _, places in numbers.prose()}


def unmarked(text):
    for away in (numbers.MARK, NO_PROSE, NAMED):
        text = away.sub(" ", text)
    return [text[max(0, hit.start() - 30) : hit.end() + 10] for hit in DECIMAL.finditer(text)]


@pytest.mark.parametrize("name", FILES)
def test_every_marked_number_is_what_its_record_says(name):
    for text in FILES[name]:
        assert numbers.written(text) == text, "run `make numbers`"
        assert text.count("<!--n ") == text.count("<!--/n-->") == len(numbers.MARK.findall(text)), "a mark is broken"


@pytest.mark.parametrize("name", FILES)
def test_no_new_number_is_typed(name):
    texts = list(FILES[name])
    for typed in TYPED.get(name, {}):
        assert sum(text.count(typed) for text in texts) == 1, f"{typed!r} is gone, or stands there twice"
        texts = [text.replace(typed, "") for text in texts]
    assert [hit for text in texts for hit in unmarked(text)] == []


@pytest.mark.parametrize("name", FILES)
def test_no_mark_stands_in_a_row_of_a_table(name):
    """Its bar would end the cell, and the page would show the mark."""
    lines = [line for text in FILES[name] for line in text.splitlines()]
    assert not [line for line in lines if line.lstrip().startswith("|") and "<!--n" in line]


def test_titles_carry_words_and_not_numbers():
    for name, texts in FILES.items():
        for heading in re.findall(r"^#+ .*", re.sub(r"```.*?```", "", "\n\n".join(texts), flags=re.DOTALL), re.M):
            assert not DECIMAL.search(NAMED.sub("", heading)) and "<!--n" not in heading, f"{name}: {heading}"


@pytest.mark.parametrize("number", ["1.38", ".83", "-0.5", "0.5 %"])
def test_a_typed_result_is_seen_and_other_digits_are_not(number):
    assert len(unmarked(f"It has {number} times the error.")) == 1
    assert unmarked("Theorem 3.6 and `0.5`, $k = 0.5$, Qwen2.5-3B, [a](b/1.2), 1,000 experts, version 3.") == []
    assert unmarked("On Llama-3.2-1B.") == []
    assert unmarked(f"It has <!--n 07 x | .2f-->{number}<!--/n--> times the error.") == []


def test_a_number_is_named_by_record_end_row_or_arithmetic():
    error = numbers.value("07", "dead.pareto/error · k = 4")
    assert (
        numbers.value("07", "dead.pareto/error · k = 4@low")
        < error
        < numbers.value("07", "dead.pareto/error · k = 4@high")
    )
    assert numbers.value("07", "1 - 1 / {dead.pareto/error · k = 4}") == pytest.approx(1 - 1 / error)
    row = "entries[site=mlp_in, centred=False, method=switch]"
    assert 0 < numbers.value("09", f"{row}.largest_rate") < 1
    entries = claims.reference("09_dead_features_in_a_language_model").points["entries"]
    wanted = {"site": "mlp_in", "centred": False, "method": "switch"}
    tried = next(each for each in entries if wanted.items() <= each.items())["candidates"]
    about = f"balance={tried[0]['balance']}, lr={tried[0]['lr']}"  # a comma inside parentheses parts nothing
    address = f"entries.candidates[site=mlp_in, centred=False, method=switch, {about}].fvu"
    assert numbers.value("09", address) == tried[0]["fvu"]


@pytest.mark.parametrize(
    ("number", "form", "said"), [(0.0533, ".0f %", "5 %"), (-1.234, ".2f", "−1.23"), (14.0, ".0f", "14")]
)
def test_a_form_is_a_format_or_a_percentage(number, form, said):
    assert numbers.shown(number, form) == said


@pytest.mark.parametrize(
    ("chapter", "address", "told"),
    [
        ("99", "a.b/c", "number of chapter 99"),
        ("07", "dead.pareto/error · k = 5", "a record of chapter 07_a_benchmark"),
        ("07", "dead.pareto/gone · k = 4", "check of dead.pareto='gone'"),
        ("07", "no.claim/error", "no.claim"),
        ("09", "entries[site=nowhere].fvu", "a row of chapter 09_dead"),
        ("07", "{dead.pareto/error · k = 4} ** 2", "sums, differences"),
    ],
)
def test_a_mark_that_leads_nowhere_is_named(chapter, address, told):
    with pytest.raises(ValueError, match=re.escape(told)):
        numbers.value(chapter, address)


def test_a_number_may_be_of_the_second_model_family():
    address = "secret.distil/activations · 8+8 of 1000, rank 64"
    text = f"<!--n 05/smollm2 {address}@low | .3f-->0<!--/n-->"
    assert numbers.written(text) == text.replace(">0<", f">{numbers.value('05/smollm2', address + '@low'):.3f}<")
    with pytest.raises(ValueError, match="chapter 05/llama"):
        numbers.written(text.replace("smollm2", "llama"))


def test_numbers_are_written_into_pages_and_notebooks(tmp_path, monkeypatch):
    import nbformat

    text = "It is <!--n 07 dead.pareto/error · k = 4 | .2f-->wrong<!--/n-->."
    for folder in ("book", "notebooks"):
        (tmp_path / folder).mkdir()
    (tmp_path / "book" / "a.md").write_text(text)
    figure = {"mystnb": {"figure": {"caption": text}, "image": {"alt": text}}}
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("# " + text, metadata=figure)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_a.ipynb")
    monkeypatch.setattr(settings, "ROOT", tmp_path)
    monkeypatch.setattr(numbers, "prose", lambda given=numbers.prose: given(tmp_path))
    numbers.main()
    assert "1.06" in (tmp_path / "book" / "a.md").read_text()
    markdown, code = nbformat.read(tmp_path / "notebooks" / "01_a.ipynb", as_version=4).cells
    assert "1.06" in markdown.source and "wrong" in code.source
    about = code.metadata["mystnb"]
    assert numbers.unmarked(about["figure"]["caption"]) == numbers.unmarked(about["image"]["alt"]) == "It is 1.06."
