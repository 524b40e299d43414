"""What every notebook of the book keeps to, and what the README promises."""

import ast
import json
import os
import re
import statistics
import subprocess

import nbformat
import pytest
import yaml

from helpers.press import chapters
from helpers.press.build import toc_files
from helpers.settings import ROOT

NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
COMMON = {"teacher", "layer", "layers", "corpus", "n_tokens", "seeds", "device", "cache_dir", "results_dir"}
MOST_LINES = 25
CHECKED = "nbval-check-output"
MOST_OPEN = 15
MEDIAN_OPEN = 6


@pytest.fixture(params=NOTEBOOKS, ids=lambda p: p.stem)
def notebook(request):
    notebook = nbformat.read(request.param, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def ideas(notebook):
    return [cell for cell in code(notebook) if "idea" in cell.metadata.get("tags", [])]


def test_prose_points_at_a_figure_in_words_that_read_well_in_jupyter_too(notebook):
    """Figures have numbers on a page only; a link by name is one everywhere, and leads to one of this chapter."""
    names = {cell.metadata.get("mystnb", {}).get("figure", {}).get("name") for cell in code(notebook)}
    for cell in notebook.cells:
        if cell.cell_type == "markdown":
            assert "{numref}" not in cell.source
            assert set(re.findall(r"\]\(#(fig-[^)]*)\)", cell.source)) <= names


def test_there_are_notebooks_and_all_of_them_are_chapters():
    assert NOTEBOOKS
    assert [c.path for c in chapters.find()] == NOTEBOOKS, "a notebook is called NN_slug.ipynb"


def test_the_table_of_contents_holds_every_notebook_once():
    pages = list(toc_files(yaml.safe_load((ROOT / "_toc.yml").read_text(encoding="utf-8"))))
    assert sorted(p for p in pages if p.startswith("notebooks/")) == [f"notebooks/{p.stem}" for p in NOTEBOOKS]
    assert len(pages) == len(set(pages))


@pytest.mark.parametrize("profile", sorted(p.stem for p in (ROOT / "profiles").glob("*.yml")))
def test_every_profile_names_only_what_is_there(profile):
    assert len(chapters.plan(profile=profile)) == len(NOTEBOOKS)


@pytest.mark.parametrize("chapter", chapters.find(), ids=lambda c: c.slug)
def test_parameters_come_first_and_include_where_results_go(chapter):
    assert {"results_dir", "cache_dir", "device", "seeds"} <= set(chapter.defaults)
    cells = code(nbformat.read(chapter.path, as_version=4))
    hero = next((place for place, cell in enumerate(cells) if "hero" in cell.metadata.tags), -1)
    assert "parameters" in cells[hero + 1].metadata.tags, "the parameters cell is the first behind the hero's"
    # one spelling for one thing
    for name in set(chapter.defaults) - COMMON:
        close = {c for c in COMMON if name.replace("_", "").lower() in (c.replace("_", ""), c.replace("_", "") + "s")}
        assert not close, f"{name} is spelled {close} everywhere else"


def test_a_chapter_has_a_title_exercises_and_a_summary(notebook):
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert notebook.cells[0].source.startswith("# ")
    assert len(re.findall(r"^# ", re.sub(r"```.*?```", "", prose, flags=re.S), re.M)) == 1
    for heading in ("Limits(:|, and) what (this page|the paper) does not say", "Exercises", "Summary"):
        assert re.search(rf"^## .*({heading})", prose, re.M), f"no section {heading!r}"
    assert ":class: dropdown" in prose, "solutions are folded"
    assert "{bibliography}" not in prose, "cite with {cite:t}: there is one bibliography, on a page of its own"


def test_cells_are_short_and_plumbing_stays_in_helpers(notebook):
    for cell in code(notebook):
        lines = cell.source.splitlines()
        assert len(lines) <= MOST_LINES, f"{len(lines)} lines in the cell that begins {lines[0]!r}"
        assert "sys.path" not in cell.source
        ast.parse(cell.source)


def test_outputs_are_committed_only_where_they_are_checked(notebook):
    for cell in code(notebook):
        first, tags = cell.source.splitlines()[0], cell.metadata.get("tags", [])
        kept = "keep_output" in tags
        assert kept == (CHECKED in tags), f"{first!r}: the tags keep_output and {CHECKED} go together"
        assert "# NBVAL_" not in cell.source, f"{first!r}: a tag says that the output is checked"
        assert bool(cell.outputs) == kept, (
            f"{first!r}: outputs are {'missing' if kept else 'not stripped (make strip)'}"
        )
        assert all(output.output_type != "error" for output in cell.outputs)
        assert (cell.execution_count is not None) == kept, "nbval compares numbered cells only (make strip)"
    assert "widgets" not in notebook.metadata and "papermill" not in notebook.metadata


def test_only_the_ideas_are_open(notebook):
    """A cell is tagged `idea`, and short, or folded: on the page by `hide-input`, in JupyterLab by `source_hidden`."""
    for cell in code(notebook):
        first, tags = cell.source.splitlines()[0], cell.metadata.get("tags", [])
        folded = bool({"hide-input", "hide-cell"} & set(tags))
        assert folded != ("idea" in tags), f"{first!r}: tag it idea, or run `make strip`, which folds all others"
        assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == folded, f"{first!r}: run `make strip`"
        assert folded or len(cell.source.splitlines()) <= MOST_OPEN, f"{first!r} is too long to be open"
    assert any("assert " in cell.source for cell in ideas(notebook)), "an open cell asserts that the helper agrees"


def test_half_of_the_open_cells_are_short():
    """Lines of code, blank ones aside: an idea that needs more is split, and its check stands in a cell of its own."""
    cells = [cell for path in NOTEBOOKS for cell in ideas(nbformat.read(path, as_version=4))]
    lengths = [sum(bool(line.strip()) for line in cell.source.splitlines()) for cell in cells]
    assert statistics.median(lengths) <= MEDIAN_OPEN, sorted(lengths)


def test_a_chapter_hands_over_every_parameter(notebook, request):
    """By `Chapter.of(slug, globals())`, never by a mapping typed by hand, in which a parameter can be missing."""
    tree = ast.parse("\n".join(cell.source for cell in code(notebook)))
    calls = [node for node in ast.walk(tree) if isinstance(node, ast.Call)]
    made = [call for call in calls if ast.unparse(call.func) == "claims.Chapter.of"]
    assert len(made) == 1 and ast.unparse(made[0].args[1]) == "globals()"
    assert not any(ast.unparse(call.func) in ("claims.Chapter", "Chapter") for call in calls)
    slugs = {ast.unparse(node.value) for node in ast.walk(tree) if isinstance(node, ast.Assign)}
    slug = request.node.callspec.params["notebook"].stem
    first = ast.unparse(made[0].args[0])
    assert first == repr(slug) or (first == "slug" and repr(slug) in slugs)


@pytest.mark.parametrize("chapter", chapters.find(), ids=lambda c: c.slug)
def test_a_results_file_of_this_build_holds_every_parameter(chapter):
    (job,) = chapters.plan([chapter.slug])
    if not job.results.is_file():
        pytest.skip("the chapter has not been run")
    assert set(json.loads(job.results.read_text(encoding="utf-8"))["parameters"]) == set(chapter.defaults)


def test_labels_of_records_are_made_from_the_parameters(notebook):
    """A teacher's name is typed in the parameters cell, and nowhere in what a cell hands to `record`."""
    names = re.compile(r"gemma|pythia-\d+m\b(?!'s sizes)|llama|olmoe-", re.I)
    for cell in code(notebook):
        for call in ast.walk(ast.parse(cell.source)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).split(".")[-1] == "record":
                assert not names.search(ast.unparse(call)), ast.unparse(call)


def test_static_figures_say_what_they_show(notebook):
    """A cell that draws has its words in the metadata; a slider has them in its call."""
    for cell in code(notebook):
        if re.search(r"plt\.(subplots|figure)\(", cell.source) and "def draw" not in cell.source:
            assert cell.metadata.get("mystnb", {}).get("image", {}).get("alt"), cell.source.splitlines()[0]
        if "slider(" in cell.source:
            assert "alt=" in cell.source


def test_some_outputs_are_checked():
    """Stripped cells compare nothing under nbval: without a few checked ones it would be vacuous."""
    cells = [c for path in NOTEBOOKS for c in code(nbformat.read(path, as_version=4))]
    checked = [c for c in cells if CHECKED in c.metadata.get("tags", [])]
    assert checked and all(cell.outputs for cell in checked)


def test_the_readme_names_the_commands_that_are_there():
    readme, makefile = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "Makefile"))
    targets = set(re.findall(r"^([a-z]+):", makefile, re.M))
    named = set(re.findall(r"`?make ([a-z]+)`?", readme)) & (targets | {"book", "test"})
    assert {"book", "test", "lab", "bench"} <= named <= targets


def test_readme_and_landing_page_say_the_time_that_was_recorded():
    """Within 30 % of the last record of `benchmarks book`; set-up and pages, 2 and 1 minutes, come on top of it."""
    record = json.loads((ROOT / "benchmarks" / "results" / "book.json").read_text(encoding="utf-8"))
    took = record["targets"][0]["measured"] / 60
    readme, landing = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "book/index.md"))
    chapters, said = re.search(r"all (\d+) chapters, quick profile \| (\d+) min", readme).groups()
    assert int(chapters) == len(record["rows"]) - 1
    assert abs(int(said) / took - 1) <= 0.3, f"README says {said} min, it took {took:.0f}"
    said = re.search(r"The first takes (\d+) minutes", landing)[1]
    assert abs(int(said) / (took + 3) - 1) <= 0.3, f"the landing page says {said} min, it took {took + 3:.0f}"


def test_ci_runs_what_the_readme_says():
    script = ROOT / ".ci" / "run"
    assert re.search(r"^\s*make test$", script.read_text(encoding="utf-8"), re.M)
    assert os.access(script, os.X_OK)


def test_make_test_runs_every_check():
    """`make -n` prints what would be run: lint, formatting, pytest, the book, kept runs, nbval, the browser."""
    said = subprocess.run(["make", "-n", "test"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    steps = [
        "ruff check",
        "ruff format --check",
        "--ignore=tests/browser",
        "helpers book",
        "helpers verify",
        "--nbval-lax",
        "pytest tests/browser",
    ]
    places = [said.find(step) for step in steps]
    assert -1 not in places and places == sorted(places)


def test_nothing_in_the_repository_names_a_place_on_the_authors_machine():
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    own = ("tests/press/test_notebooks.py",)
    place = re.compile(r"(?<![\w.])/(work|root|home/\w+)/\w|\.\./shared")
    for name in filter(None, tracked.split("\0")):
        path = ROOT / name
        binary = path.suffix in (".parquet", ".png", ".safetensors")
        if name in own or name.startswith("third_party/") or binary or not path.is_file():
            continue
        found = place.search(path.read_text(encoding="utf-8"))
        assert not found, f"{name}: {found[0]}"
