"""The runner: what it refuses before any work, what it runs again, and what it says when a chapter fails."""

import io
import json
import os
import textwrap

import nbformat
import pytest
from rich.console import Console

from helpers import __main__ as command_line
from helpers.press import chapters
from helpers.press.chapters import Layout

WRITES_RESULTS = """
import json, os, pathlib
folder = pathlib.Path(root) / "_build" / "results" / os.environ["RANK1_PROFILE"]
folder.mkdir(parents=True, exist_ok=True)
(folder / f"{slug}.json").write_text(json.dumps({"k": k, "pid": os.getpid()}))
"""


def write_chapter(root, slug, *cells, parameters="k = 4", tags=("parameters",)):
    first = nbformat.v4.new_code_cell(
        f"root = {str(root)!r}\nslug = {slug!r}\n{parameters}", metadata={"tags": list(tags)}
    )
    code = [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# Title of {slug}"), first, *code])
    nbformat.write(notebook, root / "notebooks" / f"{slug}.ipynb")


@pytest.fixture
def layout(tmp_path):
    for folder in ("notebooks", "profiles", "helpers", "data", "book"):
        (tmp_path / folder).mkdir()
    (tmp_path / "helpers" / "machinery.py").write_text("x = 1\n")
    (tmp_path / "book" / "claims.yml").write_text("claims: {}\n")
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "profiles" / "quick.yml").write_text("common: {}\n")
    write_chapter(tmp_path, "01_first", WRITES_RESULTS)
    return Layout(tmp_path)


def run(layout, *names, **kwargs):
    """Run and return (failures, what was printed)."""
    out = io.StringIO()
    force = kwargs.pop("force", False)
    failures = chapters.run(chapters.plan(names, layout=layout, **kwargs), Console(file=out, width=200), force)
    return failures, out.getvalue()


def results(layout, slug="01_first", profile="quick"):
    return json.loads((layout.results(profile) / f"{slug}.json").read_text())


def test_a_chapter_is_named_by_number_or_slug(layout):
    write_chapter(layout.root, "02_second", WRITES_RESULTS)
    every = chapters.find(layout)
    assert [c.slug for c in chapters.choose([], every)] == ["01_first", "02_second"]
    for name in ("2", "02", "02_second"):
        assert [c.slug for c in chapters.choose([name], every)] == ["02_second"]
    assert every[1].title == "Title of 02_second"


def test_an_unknown_chapter_is_refused_with_the_list(layout):
    with pytest.raises(ValueError, match=r"(?s)chapter='7'.*1  01_first"):
        chapters.plan(["7"], layout=layout)


def test_an_unknown_parameter_is_refused_with_the_allowed_ones(layout):
    with pytest.raises(ValueError, match=r"(?s)parameter='kk'.*01_first: root, slug, k"):
        chapters.plan(["1"], overrides={"kk": 3}, layout=layout)


def test_with_no_chapter_named_a_parameter_goes_to_those_that_have_it(layout):
    write_chapter(layout.root, "02_second", WRITES_RESULTS, parameters="seeds = 3")
    first, second = chapters.plan(overrides={"seeds": 5}, layout=layout)
    assert (first.given, second.given) == ({}, {"seeds": 5})
    with pytest.raises(ValueError, match="parameter='nowhere'"):
        chapters.plan(overrides={"nowhere": 5}, layout=layout)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("01_first: {q: 1}", "parameter='q'"),
        ("09_none: {k: 1}", "chapter='09_none'"),
        ("common: {q: 1}", "parameter='q'"),
    ],
)
def test_a_profile_that_names_what_is_not_there_is_refused(layout, text, message):
    (layout.root / "profiles" / "bad.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        chapters.plan(profile="bad", layout=layout)


def test_an_unknown_profile_is_refused(layout):
    with pytest.raises(ValueError, match="profile='huge' does not exist; allowed: quick"):
        chapters.plan(profile="huge", layout=layout)


def test_a_notebook_without_parameters_tag_is_refused(layout):
    write_chapter(layout.root, "02_second", tags=())
    with pytest.raises(ValueError, match="02_second.ipynb: 0 code cells are tagged"):
        chapters.find(layout)


def test_derived_values_in_the_parameters_cell_are_refused(layout):
    write_chapter(layout.root, "02_second", parameters="k = 4\ntwice = 2 * k")
    with pytest.raises(ValueError, match="constants only, not 'twice = 2 \\* k'"):
        chapters.find(layout)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3", 3),
        ("1e-3", 1e-3),
        ("[0, 1]", [0, 1]),
        ("None", None),
        ("null", None),
        ("my.txt", "my.txt"),
        ("true", True),
    ],
)
def test_values_on_the_command_line_are_yaml(text, value):
    assert chapters.parse_value(text) == value


def test_profile_values_reach_the_notebook_and_overrides_win(layout):
    (layout.root / "profiles" / "full.yml").write_text("common: {k: 8}\n01_first: {slug: 01_first}\n")
    assert chapters.plan(profile="full", layout=layout)[0].parameters["k"] == 8
    (job,) = chapters.plan(["1"], "full", {"k": 16}, layout)
    assert (job.parameters["k"], job.profile) == (16, "full+custom")


def test_a_valid_chapter_is_kept_and_says_so(layout):
    failures, said = run(layout)
    assert not failures and "chapter 1: Title of 01_first" in said
    before = results(layout)
    failures, said = run(layout)
    assert not failures and "chapter 1: unchanged, kept from" in said
    assert results(layout) == before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: (r / "helpers" / "machinery.py").write_text("x = 2\n"), "helpers"),
        (lambda r: (r / "helpers" / "new.py").write_text(""), "helpers"),
        (lambda r: (r / "book" / "claims.yml").write_text("claims: {a: 1}\n"), "claims.yml"),
        (lambda r: (r / "profiles" / "quick.yml").write_text("common: {k: 9}\n"), "parameters"),
        (lambda r: write_chapter(r, "01_first", WRITES_RESULTS, "1 + 1"), "notebook"),
        (lambda r: (r / "_build/results/quick/01_first.json").unlink(), "results missing"),
        (lambda r: (r / "_build/results/quick/01_first.json").write_text("{}"), "results rewritten"),
        (lambda r: (r / "_build/executed/quick/01_first.ipynb").unlink(), "executed copy missing"),
        (lambda r: (r / "_build/executed/quick/01_first.run.json").write_text("{"), "not run yet"),
    ],
)
def test_a_change_makes_a_chapter_stale(layout, change, reason):
    stamp_valid(layout)
    (job,) = chapters.plan(layout=layout)
    assert chapters.stale(job) == []
    change(layout.root)
    (job,) = chapters.plan(layout=layout)
    assert any(reason in why for why in chapters.stale(job)), chapters.stale(job)


def stamp_valid(layout):
    """What a run leaves behind, without running anything."""
    (job,) = chapters.plan(layout=layout)
    for path in (job.executed, job.results):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    stamp = {"made_from": chapters.fingerprint(job), "results": chapters._digest_files(job.results), "executed": "now"}
    job.stamp.write_text(json.dumps(stamp))


def test_editing_the_readers_own_text_is_a_change(layout):
    text = layout.root / "my.txt"
    text.write_text("one")
    write_chapter(layout.root, "01_first", WRITES_RESULTS, parameters=f"corpus = {str(text)!r}")
    stamp_valid(layout)
    text.write_text("two!")
    assert chapters.stale(chapters.plan(layout=layout)[0]) == ["parameters"]


def test_outputs_and_byte_code_are_no_change(layout):
    stamp_valid(layout)
    path = layout.root / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.cells[1].execution_count = 7
    nbformat.write(notebook, path)
    (layout.root / "helpers" / "__pycache__").mkdir()
    (layout.root / "helpers" / "__pycache__" / "x.pyc").write_text("byte code")
    assert chapters.stale(chapters.plan(layout=layout)[0]) == []


def test_a_change_in_helpers_runs_the_chapter_again(layout):
    run(layout)
    before = results(layout)
    (layout.root / "helpers" / "machinery.py").write_text("x = 2\n")
    _, said = run(layout)
    assert "(helpers; " in said
    assert results(layout)["pid"] != before["pid"]


def test_overrides_leave_the_profile_copy_alone(layout):
    run(layout)
    before = results(layout)
    failures, _ = run(layout, "1", overrides={"k": 16})
    assert not failures
    assert results(layout) == before
    assert results(layout, profile="quick+custom")["k"] == 16
    assert chapters.stale(chapters.plan(layout=layout)[0]) == []


def test_a_failing_chapter_is_named_with_cell_line_error_and_partial_copy(layout):
    write_chapter(layout.root, "01_first", "a = 1", "b = a / 0  # the culprit\nc = 2")
    write_chapter(layout.root, "02_second", WRITES_RESULTS)
    failures, said = run(layout)
    assert len(failures) == 1
    partial = layout.executed("quick") / "01_first.partial.ipynb"
    for part in ("01_first", "In [3]", "b = a / 0  # the culprit", "ZeroDivisionError: division by zero", str(partial)):
        assert part in said
    assert partial.is_file() and not (layout.executed("quick") / "01_first.ipynb").exists()
    assert results(layout, "02_second")["k"] == 4, "the other chapters still run"
    assert chapters.stale(chapters.plan(["1"], layout=layout)[0]) == ["not run yet"]


def test_a_failure_does_not_leave_the_former_run_valid(layout):
    run(layout)
    write_chapter(layout.root, "01_first", "raise RuntimeError('now broken')")
    failures, _ = run(layout)
    assert len(failures) == 1
    write_chapter(layout.root, "01_first", WRITES_RESULTS)
    assert chapters.stale(chapters.plan(layout=layout)[0]) == ["not run yet"]


def test_a_chapter_that_writes_no_records_fails(layout):
    write_chapter(layout.root, "01_first", "1 + 1")
    failures, said = run(layout)
    assert len(failures) == 1 and "wrote no records" in said


def test_a_killed_kernel_is_reported(layout):
    write_chapter(layout.root, "01_first", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    failures, said = run(layout)
    assert len(failures) == 1 and "the kernel stopped" in said


def test_no_progress_bar_is_left_on_a_page(layout):
    """tqdm's bar for notebooks does not look at TQDM_DISABLE; ours does."""
    bar = "from helpers import settings\nfor _ in settings.progress(range(3), 'a long thing'):\n    pass"
    write_chapter(layout.root, "01_first", bar, WRITES_RESULTS)
    assert run(layout)[0] == []
    assert "a long thing:" not in (layout.executed("quick") / "01_first.ipynb").read_text()


@pytest.mark.parametrize("last", ["pass", "raise RuntimeError('no')"])
def test_no_kernel_outlives_its_chapter(layout, last):
    """A kernel holds a model's gigabytes; the next chapter needs them."""
    note = layout.root / "pid"
    write_chapter(
        layout.root, "01_first", f"import os, pathlib\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n{last}"
    )
    run(layout)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_the_kernel_is_the_running_python_whatever_is_registered(layout, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/no/such/python"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert run(layout)[0] == []


def test_a_log_shows_progress_inside_a_long_cell(layout, monkeypatch):
    monkeypatch.setattr(chapters, "LOG_EVERY", 0.3)
    write_chapter(layout.root, "01_first", "import time\ntime.sleep(1.5)", WRITES_RESULTS)
    failures, said = run(layout)
    assert not failures and "s, in code cell 2 of 3: import time" in said


def test_two_runs_at_once_are_refused(layout):
    jobs = chapters.plan(layout=layout)
    with chapters._alone(jobs), pytest.raises(ValueError, match="another run is busy"):
        chapters.run(jobs, Console(file=io.StringIO()))


def test_the_command_line_refuses_with_status_2(capsys):
    assert command_line.main(["run", "no-such-chapter"]) == 2
    assert "chapter='no-such-chapter'" in capsys.readouterr().err
    assert command_line.main(["run", "--profile", "no-such-profile"]) == 2
    assert "profile='no-such-profile'" in capsys.readouterr().err
