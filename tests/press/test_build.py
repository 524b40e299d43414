"""Building the pages: what is staged, what counts as a fault, and that a failing chapter means no build."""

import io
import os
import subprocess
import sys

import nbformat
import pytest
from rich.console import Console

from helpers import settings
from helpers.press import build, chapters, execution

PAGE = "<html><head>{head}</head><body><article>{body}</article></body></html>"


@pytest.fixture
def site(tmp_path):
    """A rendered book of one page, and its table of contents."""
    (tmp_path / "html").mkdir()
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")

    def write(head="", body='<img src="a.png" alt="a curve">', css=""):
        (tmp_path / "html" / "index.html").write_text(PAGE.format(head=head, body=body))
        (tmp_path / "html" / "a.css").write_text(css)
        return list(build.faults(tmp_path / "html", tmp_path / "_toc.yml"))

    return write


def test_a_complete_page_has_no_faults(site):
    links = '<a href="https://arxiv.org/abs/2406.04093">a link is followed, not loaded</a>'
    head = '<link rel="canonical" href="https://example.org"><link rel="stylesheet" href="a.css">'
    assert site(head, links, "body { background: url(a.png) }") == []


@pytest.mark.parametrize(
    ("parts", "fault"),
    [
        ({"head": '<script src="https://cdn.example/x.js"></script>'}, "loads https://cdn.example/x.js"),
        ({"head": '<link rel="stylesheet" href="//fonts.example/f.css">'}, "loads //fonts.example/f.css"),
        (
            {"head": '<link rel="preload" as="font" href="https://f.example/f.woff2">'},
            "loads https://f.example/f.woff2",
        ),
        ({"head": "<style>@import 'https://f.example/f.css';</style>"}, "loads https://f.example/f.css"),
        ({"css": "@font-face { src: url('https://f.example/f.woff') }"}, "a.css: loads https://f.example/f.woff"),
        ({"body": '<img src="http://example.org/a.png" alt="a">'}, "loads http://example.org/a.png"),
        ({"body": '<iframe src="https://example.org"></iframe>'}, "loads https://example.org"),
        ({"body": '<img src="a.png">'}, "no alt text"),
        ({"body": '<img src="a.png" alt="">'}, "no alt text"),
    ],
)
def test_what_a_reader_without_network_or_sight_would_miss_is_a_fault(site, parts, fault):
    assert any(fault in said for said in site(**parts))


def test_a_missing_page_is_a_fault(tmp_path):
    (tmp_path / "html").mkdir()
    (tmp_path / "_toc.yml").write_text(
        "format: jb-book\nroot: index\nparts:\n- chapters:\n  - file: notebooks/01_a\n    sections:\n    - file: deep\n"
    )
    said = list(build.faults(tmp_path / "html", tmp_path / "_toc.yml"))
    assert said == ["page missing: index.html", "page missing: notebooks/01_a.html", "page missing: deep.html"]


def test_a_page_needs_no_widget_runtime():
    output = nbformat.v4.new_output("display_data", data={build.WIDGET: {"model_id": "x"}, "text/html": "<b>kept</b>"})
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("slider", outputs=[output])])
    notebook.metadata["widgets"] = {"state": {}}
    bare = build._as_page(notebook)
    assert bare.cells[0].outputs[0].data == {"text/html": "<b>kept</b>"} and "widgets" not in bare.metadata


def test_a_page_names_its_parameters_and_shows_no_comment_for_a_tool():
    chosen = nbformat.v4.new_code_cell("teacher = 'a'  # embedded\nks = [\n    1,\n]  # fmt: skip")
    chosen.metadata["tags"] = ["hide-input", "parameters"]
    given = nbformat.v4.new_code_cell("ks = [2]  # noqa: E741", metadata={"tags": ["injected-parameters"]})
    first, second = build._as_page(nbformat.v4.new_notebook(cells=[chosen, given])).cells
    assert first.metadata["mystnb"]["code_prompt_show"].startswith("Parameters (2): teacher, ks")
    assert first.source == "teacher = 'a'  # embedded\nks = [\n    1,\n]"
    assert second.source == "ks = [2]" and "hide-input" in second.metadata.tags


def test_a_failing_chapter_means_no_book(tmp_path, monkeypatch):
    for folder in ("notebooks", "profiles"):
        (tmp_path / folder).mkdir()
    (tmp_path / "profiles" / "quick.yml").write_text("common: {}")
    cells = [nbformat.v4.new_code_cell("k = 1", metadata={"tags": ["parameters"]})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_a.ipynb")
    monkeypatch.setattr(execution, "execute", lambda *_: (_ for _ in ()).throw(execution.ChapterFailed("broken")))
    monkeypatch.setattr(build, "stage", lambda *_: pytest.fail("staged a book with a failed chapter"))
    jobs, out = chapters.plan(root=tmp_path), io.StringIO()
    assert build.make(jobs, "quick", Console(file=out), tmp_path) == 1
    assert "1 of 1 chapters failed" in out.getvalue()


def test_a_damaged_copy_of_a_chapter_is_named(tmp_path, monkeypatch):
    for folder in ("notebooks", "profiles", "book", "third_party"):
        (tmp_path / folder).mkdir()
    for name in ("profiles/quick.yml", "_config.yml", "_toc.yml"):
        (tmp_path / name).write_text("")
    cells = [nbformat.v4.new_code_cell("k = 1", metadata={"tags": ["parameters"]})]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "notebooks" / "01_a.ipynb")
    (job,) = jobs = chapters.plan(root=tmp_path)
    job.executed.parent.mkdir(parents=True)
    job.executed.write_text("{")
    monkeypatch.setattr(execution, "run", lambda *_: [])
    out = io.StringIO()
    assert build.make(jobs, "quick", Console(file=out, width=300), tmp_path) == 1
    assert f"fault {job.executed} is damaged; delete it" in out.getvalue()


def test_a_strict_build_names_the_warning_and_keeps_the_former_pages(tmp_path):
    stage, html = tmp_path / "_build" / "stage", tmp_path / "_build" / "html"
    stage.mkdir(parents=True)
    html.mkdir()
    (html / "index.html").write_text("former")
    (tmp_path / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (stage / "_toc.yml").write_text("format: jb-book\nroot: index\n")
    (stage / "_config.yml").write_text("title: t\nexecute: {execute_notebooks: 'off'}\n")
    (stage / "index.md").write_text("# Title\n\nSee {doc}`nowhere`.\n")
    said = build.build(tmp_path)
    assert any("nowhere" in line for line in said) and "status" in said[-1]
    assert (html / "index.html").read_text() == "former"


def test_what_builds_the_pages_ends_with_who_asked_for_them(tmp_path):
    (tmp_path / "jupyter_book" / "cli").mkdir(parents=True)
    for package in ("jupyter_book", "jupyter_book/cli"):  # without it the installed one wins
        (tmp_path / package / "__init__.py").touch()
    (tmp_path / "jupyter_book" / "cli" / "main.py").write_text(
        "import time\ndef main():\n    print('begun', flush=True)\n    time.sleep(600)\n"
    )
    starts = (
        "import subprocess, sys, time; from helpers.press.build import JUPYTER_BOOK;"
        "subprocess.Popen([sys.executable, '-c', JUPYTER_BOOK]); time.sleep(600)"
    )
    path = f"{tmp_path}{os.pathsep}{settings.ROOT}"
    asked = subprocess.Popen(
        [sys.executable, "-c", starts], stdout=subprocess.PIPE, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert asked.stdout.readline() == "begun\n"
    asked.kill()
    assert asked.stdout.read() == "", "the pipe closes when the last process that holds it has ended"
    asked.wait()
