"""Building the pages: what is staged, what counts as a fault, and that a failing chapter means no build."""

import io
import os
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import pytest
from rich.console import Console

from helpers import settings
from helpers.press import build, chapters, execution
from tests import tiny
from tests.press.house import House

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
    assert build.make(jobs, "quick", Console(file=out), 1, tmp_path) == 1
    assert "1 of 1 chapters failed" in out.getvalue()


def test_pages_are_made_again_only_where_something_changed(tmp_path, monkeypatch):
    """The sources, the executed copies and records, the profile, where it is published, and the pages themselves."""
    (tmp_path / "book").mkdir()
    html, made = tmp_path / "_build" / "html", []

    def pages_made(root):
        made.append(html)
        html.mkdir(parents=True, exist_ok=True)
        settings.write(html / "index.html", b"a page")
        return []

    monkeypatch.setattr(execution, "run", lambda *_, **__: [])
    monkeypatch.setattr(build, "stage", lambda *_: None)
    monkeypatch.setattr(build, "build", pages_made)
    monkeypatch.setattr(build.claims, "passing_controls", lambda _: [])

    def again(profile="quick"):
        before = len(made)
        assert build.make([], profile, Console(file=io.StringIO()), 1, tmp_path) == 0
        return len(made) > before

    assert again() and not again()
    for name in ("book/a.md", "_build/executed/quick/01_a.ipynb", "_build/results/quick/01_a.json", "results/a.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        settings.write(tmp_path / name, b"new")
        assert again(), name
        assert not again()
    assert again("smollm2") and not again("smollm2")
    settings.write(html / "index.html", b"half a pa")
    assert again() and not again()
    monkeypatch.setenv("BOOK_REPOSITORY", "https://github.com/owner/name")
    assert again() and not again()


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
    monkeypatch.setattr(execution, "run", lambda *_, **__: [])
    out = io.StringIO()
    assert build.make(jobs, "quick", Console(file=out, width=300), 1, tmp_path) == 1
    assert f"fault {job.executed} is damaged; delete it" in out.getvalue()


FULL = OSError(28, "No space left on device")


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device", "/a/b"), shutil.Error([("/x", "/a/b", str(FULL))])]
)
def test_a_disk_that_is_full_while_pages_are_laid_out_is_named(tmp_path, monkeypatch, error):
    def stage(*_):
        raise error

    monkeypatch.setattr(build, "stage", stage)
    monkeypatch.setattr(execution, "run", lambda *_, **__: [])
    out = io.StringIO()
    assert build.make([], "quick", Console(file=out, width=300), 1, tmp_path) == 1
    assert "fault /a/b: " in out.getvalue() and "No space left on device; allowed: " in out.getvalue()


def test_a_disk_that_is_full_while_pages_are_made_is_named(tmp_path, monkeypatch):
    (tmp_path / "_build" / "stage").mkdir(parents=True)
    failed = subprocess.CompletedProcess((), returncode=1)
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: failed)
    monkeypatch.setattr(build.shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    (said,) = build.build(tmp_path)
    assert "No space left on device; allowed: a disk with room" in said


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


SLOW_SPHINX = """import pathlib, sys, time


def main():
    html = pathlib.Path(sys.argv[sys.argv.index("--path-output") + 1], "_build", "html")
    html.mkdir(parents=True)
    (html / "index.html").write_text("half a pa")
    print("begun", flush=True)
    time.sleep(600)
"""
"""Stands for what makes pages, and never comes to its end."""


@pytest.fixture
def shelf():
    """A house with a book of one chapter."""
    house = House()
    shutil.rmtree(house.root)
    tiny.repository(house.root)
    yield house
    house.remove()


def slow_sphinx(root):
    (root / "jupyter_book" / "cli").mkdir(parents=True)
    for package in ("jupyter_book", "jupyter_book/cli"):  # without it the installed one wins
        (root / package / "__init__.py").touch()
    (root / "jupyter_book" / "cli" / "main.py").write_text(SLOW_SPHINX)


def stopped(house, number, begun) -> bool:
    """Start a build, stop it by a signal when `begun()`; it says so, and no process and no other page is left. Whether
    it was still at work then."""
    html, started = house.root / "_build" / "html", time.perf_counter()
    before = {path: path.read_bytes() for path in html.rglob("*") if path.is_file()}
    process = house.start(["book"])
    while not begun() and process.poll() is None:
        assert time.perf_counter() < started + 120
        time.sleep(0.05)
    process.send_signal(number)
    done = house.ended(process, started)
    if not done.code:
        return False
    assert done.code == 128 + number and f"stopped by {signal.Signals(number).name}" in done.said, done.said
    assert "Traceback" not in done.said and not house.left()
    assert {path: path.read_bytes() for path in html.rglob("*") if path.is_file()} == before
    assert not [path.name for path in html.parent.glob(".html.*")]
    return True


def test_a_stop_while_pages_are_made_leaves_the_former_ones_and_no_process(shelf):
    html, log = shelf.root / "_build" / "html", shelf.root / "_build" / "book.log"
    html.mkdir(parents=True)
    (html / "index.html").write_text("former")
    slow_sphinx(shelf.root)
    for number in (signal.SIGINT, signal.SIGTERM):
        assert stopped(shelf, number, lambda: log.is_file() and "begun" in log.read_text())
        log.unlink()


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_build_can_be_stopped_at_any_moment(shelf, number):
    begun, stops = time.perf_counter(), 0
    assert not shelf.run("book").code
    whole = time.perf_counter() - begun
    for part in range(1, 10):
        (shelf.root / "book" / "glossary.md").write_text(f"# Glossary {part}\n")
        for stamp in (shelf.root / "_build").rglob("00_how_to_read.run.json"):
            stamp.unlink()
        at = time.perf_counter() + part / 10 * whole
        stops += stopped(shelf, number, lambda at=at: time.perf_counter() > at)
    assert stops > 5
    done = shelf.run("book")
    assert not done.code and "the book is at" in done.said, done.said
