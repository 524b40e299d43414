"""The runner: what it refuses before any work, what it runs again, and what it says when a chapter fails."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import nbformat
import pytest
from rich.console import Console

from helpers import __main__ as command_line
from helpers import settings
from helpers.press import chapters, execution, pages

WRITES_RESULTS = """
import json, os, pathlib
folder = pathlib.Path(root) / "_build" / "results" / os.environ["RANK1_PROFILE"]
folder.mkdir(parents=True, exist_ok=True)
(folder / f"{slug}.json").write_text(json.dumps({"k": k, "pid": os.getpid()}))
"""


MODULES = {
    "parts": {"__init__": "", "masks": "from helpers.models import corpora, other\nx = 1\n", "gaps": "x = 1\n"},
    "models": {"__init__": "", "corpora": "from s import ROOT\nTEXT = ROOT / 'data'\n", "other": "x = 1\n"},
    "press": {"__init__": "", "figures": "x = 1\n", "build": "x = 1\n"},
}
"""A house of a few modules; what chapters of the tests import lies in the real one."""


def write_register(root, **statements):
    """A register of three claims; `statements` change what they say."""
    claims = [
        f"""- id: {name}.claim
  statement: {statements.get(name, "It is so.")}
  source: {{paper: p, where: Theorem 1}}
  paper_says: {{number: '1', setting: a setting}}
  part: I
  chapter: {chapter}
  teachers: any
  checks: {{only: {{metric: m, why: w, control: c, rule: {{name: identity, tolerance: 1}}}}}}"""
        for name, chapter in (("own", "01_first"), ("named", "09_else"), ("recorded", "09_else"), ("other", "09_else"))
    ]
    head = "papers: {p: {letter: A, title: t, cite: c, where: w}}\nparts: {I: First}\nclaims:\n"
    (root / "book" / "claims.yml").write_text("# the register\n" + head + "\n".join(claims) + "\n")


def write_chapter(root, slug, *cells, parameters="k = 4", tags=("parameters",)):
    first = nbformat.v4.new_code_cell(
        f"root = {str(root)!r}\nslug = {slug!r}\n{parameters}", metadata={"tags": list(tags)}
    )
    code = [nbformat.v4.new_code_cell(textwrap.dedent(c).strip()) for c in cells]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell(f"# Title of {slug}"), first, *code])
    nbformat.write(notebook, root / "notebooks" / f"{slug}.ipynb")


@pytest.fixture
def root(tmp_path):
    for folder in ("notebooks", "profiles", "data", "book", *(f"helpers/{room}" for room in MODULES)):
        (tmp_path / folder).mkdir(parents=True)
    for room, modules in MODULES.items():
        for name, text in modules.items():
            (tmp_path / "helpers" / room / f"{name}.py").write_text(text)
    (tmp_path / "data" / "text.txt").write_text("words")
    write_register(tmp_path)
    (tmp_path / "requirements.txt").write_text("torch\n")
    (tmp_path / "profiles" / "quick.yml").write_text("common: {}\n")
    write_chapter(tmp_path, "01_first", WRITES_RESULTS)
    return tmp_path


def run(root, *names, **kwargs):
    """Run and return (failures, what was printed)."""
    out = io.StringIO()
    force, at_once = kwargs.pop("force", False), kwargs.pop("at_once", 1)
    failures = execution.run(chapters.plan(names, root=root, **kwargs), Console(file=out, width=200), force, at_once)
    return failures, out.getvalue()


def results(root, slug="01_first", profile="quick"):
    return json.loads(((root / "_build" / "results" / profile) / f"{slug}.json").read_text())


def test_a_chapter_is_named_by_number_or_slug(root):
    write_chapter(root, "02_second", WRITES_RESULTS)
    every = chapters.find(root)
    assert [c.slug for c in chapters.choose([], every)] == ["01_first", "02_second"]
    for name in ("2", "02", "02_second"):
        assert [c.slug for c in chapters.choose([name], every)] == ["02_second"]
    assert every[1].title == "Title of 02_second"


def test_an_unknown_chapter_is_refused_with_the_list(root):
    with pytest.raises(ValueError, match=r"(?s)chapter='7'.*1  01_first"):
        chapters.plan(["7"], root=root)


def test_an_unknown_parameter_is_refused_with_the_allowed_ones(root):
    with pytest.raises(ValueError, match=r"(?s)parameter='kk'.*01_first: root, slug, k"):
        chapters.plan(["1"], overrides={"kk": 3}, root=root)


def test_with_no_chapter_named_a_parameter_goes_to_those_that_have_it(root):
    write_chapter(root, "02_second", WRITES_RESULTS, parameters="seeds = 3")
    first, second = chapters.plan(overrides={"seeds": 5}, root=root)
    assert (first.given, second.given) == ({}, {"seeds": 5})
    with pytest.raises(ValueError, match="parameter='nowhere'"):
        chapters.plan(overrides={"nowhere": 5}, root=root)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("01_first: {q: 1}", "parameter='q'"),
        ("01_first: {k: four}", "bad.yml, 01_first: k='four'; allowed: a whole number, such as 4"),
        ("common: {k: [4]}", "bad.yml, 01_first: k=\\[4\\]; allowed: a whole number"),
        ("common: [", "bad.yml is not YAML: "),
        ("- common", "bad.yml: the file is \\['common'\\]; allowed: names with their values"),
        ("01_first: 3", "bad.yml: 01_first is 3; allowed: names with their values"),
        ("09_none: {k: 1}", "chapter='09_none'"),
        ("common: {q: 1}", "parameter='q'"),
    ],
)
def test_a_profile_that_names_what_is_not_there_is_refused(root, text, message):
    (root / "profiles" / "bad.yml").write_text(text)
    with pytest.raises(ValueError, match=message):
        chapters.plan(profile="bad", root=root)


def test_an_unknown_profile_is_refused(root):
    with pytest.raises(ValueError, match="profile='huge' does not exist; allowed: quick"):
        chapters.plan(profile="huge", root=root)


def test_a_notebook_without_parameters_tag_is_refused(root):
    write_chapter(root, "02_second", tags=())
    with pytest.raises(ValueError, match="02_second.ipynb: 0 code cells are tagged"):
        chapters.find(root)


def test_derived_values_in_the_parameters_cell_are_refused(root):
    write_chapter(root, "02_second", parameters="k = 4\ntwice = 2 * k")
    with pytest.raises(ValueError, match="constants only, not 'twice = 2 \\* k'"):
        chapters.find(root)


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
    assert chapters.parse_value("k", text) == value


TYPES = [
    (30_000, 1e4, 10_000),
    (30_000, 20, 20),
    (1e-3, 1, 1.0),
    (True, False, False),
    ("cpu", "cuda", "cuda"),
    (None, [1, "a"], [1, "a"]),
    ([0, 1], [2.0], [2]),
    ([0.1, 1], [1, 0.5], [1, 0.5]),
    ([8, None], [None, 4], [None, 4]),
    ((1, 2), [3], (3,)),
    ([], ["a", 1], ["a", 1]),
    ([[16, 1000]], [[64, 1e3], [1, 2]], [[64, 1000], [1, 2]]),
    ([[0.2, "input"]], [[1, "residual"]], [[1.0, "residual"]]),
    ({"d": 192, "names": ["a"]}, {"d": 4.0, "more": ["b"]}, {"d": 4, "more": ["b"]}),
]
REFUSED = [
    (30_000, "4,000", "a whole number, such as 30000"),
    (30_000, 1.5, "a whole number"),
    (30_000, True, "a whole number"),
    (30_000, None, "a whole number"),
    (30_000, [1], "a whole number"),
    (1e-3, "1e", "a finite number"),
    (1e-3, float("nan"), "a finite number"),
    (True, 1, "true or false"),
    ("cpu", 3, "a text"),
    ([0, 1], 0, "a list, such as [0, 1]"),
    ([0, 1], "01", "a list"),
    ([0, 1], [0, "1"], "in it a whole number"),
    ([8, None], [0.5], "in it a whole number"),
    ([[16, 1000]], [16, 1000], "in it a list"),
    ({"d": 192}, [192], "a mapping"),
    ({"d": 192}, {"d": "wide"}, "in it a whole number"),
]


@pytest.mark.parametrize(("default", "value", "taken"), TYPES)
def test_a_value_is_taken_as_the_type_of_its_default(default, value, taken):
    found = chapters.fitted("-p", "n", value, default)
    assert (repr(found), type(found)) == (repr(taken), type(taken))


@pytest.mark.parametrize(("default", "value", "wanted"), REFUSED)
def test_a_value_of_another_type_is_refused_by_name(default, value, wanted):
    with pytest.raises(ValueError, match=re.escape(f"-p: n={value!r}; allowed: {wanted}")):
        chapters.fitted("-p", "n", value, default)


def test_a_wrong_type_is_refused_before_any_kernel(root, monkeypatch):
    monkeypatch.setattr(execution, "execute", lambda *_: pytest.fail("ran a chapter"))
    with pytest.raises(ValueError, match="-p: k='4,000'; allowed: a whole number, such as 4 "):
        chapters.plan(["1"], overrides={"k": chapters.parse_value("k", "4,000")}, root=root)
    with pytest.raises(ValueError, match=r"-p: k='\[1, 2' is not YAML"):
        chapters.parse_value("k", "[1, 2")
    (job,) = chapters.plan(["1"], overrides={"k": chapters.parse_value("k", "1e4")}, root=root)
    assert job.given == {"k": 10_000} and type(job.given["k"]) is int


def test_profile_values_reach_the_notebook_and_overrides_win(root):
    (root / "profiles" / "full.yml").write_text("common: {k: 8}\n01_first: {slug: 01_first}\n")
    assert chapters.plan(profile="full", root=root)[0].parameters["k"] == 8
    (job,) = chapters.plan(["1"], "full", {"k": 16}, root)
    assert (job.parameters["k"], job.profile) == (16, "full+custom")


def test_a_valid_chapter_is_kept_and_says_so(root):
    failures, said = run(root)
    assert not failures and "chapter 1: Title of 01_first" in said
    before = results(root)
    failures, said = run(root)
    assert not failures and "chapter 1: unchanged, kept from" in said
    assert results(root) == before


def test_new_words_do_not_run_a_chapter_again(root):
    (root / "profiles" / "quick.yml").write_text("common: {k: 9}\n")  # so that parameters are put in
    run(root)
    copy, before = root / "_build/executed/quick/01_first.ipynb", results(root)
    path = root / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[0].source = "# Another title"
    notebook.cells[1:1] = [nbformat.v4.new_markdown_cell("New here.")]
    notebook.cells[-1].metadata["mystnb"] = {"code_prompt_show": "A caption"}
    notebook.cells.append(nbformat.v4.new_markdown_cell("And the end."))
    outputs = [cell.get("outputs") for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code"]
    nbformat.write(notebook, path)
    failures, said = run(root)
    assert not failures and "new words around what was computed" in said and results(root) == before
    injected, copied = 0, []
    for cell in nbformat.read(copy, as_version=4).cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            injected += 1
        else:
            copied.append(cell)
    words = [(cell.cell_type, cell.source, cell.metadata.get("mystnb")) for cell in copied]
    assert words == [(cell.cell_type, cell.source, cell.metadata.get("mystnb")) for cell in notebook.cells]
    found = [cell.get("outputs") for cell in nbformat.read(copy, as_version=4).cells if cell.cell_type == "code"]
    assert injected == 1 and found == outputs
    assert "kept from" in run(root)[1]
    notebook.cells[-2].source += "\n1 + 1"
    nbformat.write(notebook, path)
    assert "new words" not in run(root)[1] and results(root) != before


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda r: (r / "requirements.txt").write_text("torch==3\n"), "requirements.txt changed"),
        (lambda r: (r / "profiles" / "quick.yml").write_text("common: {k: 9}\n"), "parameters changed"),
        (lambda r: write_chapter(r, "01_first", WRITES_RESULTS, "1 + 1"), "code changed"),
        (lambda r: (r / "_build/results/quick/01_first.json").unlink(), "results missing"),
        (lambda r: (r / "_build/results/quick/01_first.json").write_text("{}"), "results rewritten"),
        (lambda r: (r / "_build/executed/quick/01_first.ipynb").unlink(), "executed copy missing"),
        (lambda r: (r / "_build/executed/quick/01_first.run.json").write_text("{"), "not run yet"),
    ],
)
def test_a_change_makes_a_chapter_stale(root, change, reason):
    stamp_valid(root)
    (job,) = chapters.plan(root=root)
    assert chapters.stale(job) == []
    change(root)
    (job,) = chapters.plan(root=root)
    assert any(reason in why for why in chapters.stale(job)), chapters.stale(job)


def stamp_valid(root):
    """What a run leaves behind, without running anything."""
    (job,) = chapters.plan(root=root)
    for path in (job.executed, job.results):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}\n")
    stamp = {"made_from": chapters.fingerprint(job), "executed": "now"}
    stamp |= {"results": chapters.digest_files(job.results), "copy": chapters.digest_files(job.executed)}
    job.stamp.write_text(json.dumps(stamp))


def test_an_executed_copy_that_changed_is_made_again(root):
    stamp_valid(root)
    (job,) = chapters.plan(root=root)
    job.executed.write_text("[]\n")
    assert chapters.stale(job) == ["executed copy changed since"]


@pytest.mark.parametrize("how", ["", ":lines", ":body"])
def test_editing_the_readers_own_text_is_a_change(root, how):
    text = root / "my.txt"
    text.write_text("one")
    write_chapter(root, "01_first", WRITES_RESULTS, parameters=f"corpus = {str(text) + how!r}")
    stamp_valid(root)
    text.write_text("two!")
    assert chapters.stale(chapters.plan(root=root)[0]) == ["parameters changed"]


def test_outputs_and_byte_code_are_no_change(root):
    stamp_valid(root)
    path = root / "notebooks" / "01_first.ipynb"
    notebook = nbformat.read(path, as_version=4)
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="hello")]
    notebook.cells[1].execution_count = 7
    nbformat.write(notebook, path)
    (root / "data" / "__pycache__").mkdir()
    (root / "data" / "__pycache__" / "x.pyc").write_text("byte code")
    assert chapters.stale(chapters.plan(root=root)[0]) == []


def why(root, edit):
    """Reasons to run the one chapter again after an edit of the house."""
    (job,) = chapters.plan(root=root)
    edit(root)
    (job,) = chapters.plan(root=root)
    return chapters.stale(job)


def module(name, text):
    return lambda root: root.joinpath(*f"helpers.{name}".split(".")).with_suffix(".py").write_text(text)


@pytest.mark.parametrize(
    ("edit", "reasons"),
    [
        (module("parts.masks", MODULES["parts"]["masks"] + "y = 2\n"), ["helpers.parts.masks changed"]),
        (module("models.other", "x = 2\n"), ["helpers.models.other changed"]),
        (module("press.figures", "x = 2\n"), ["helpers.press.figures changed"]),
        (module("models.other", '"""A docstring."""\nx = 1  # a comment\n\n'), []),
        (module("parts.gaps", "x = 2\n"), []),
        (module("press.build", "x = 2\n"), []),
        (module("parts.new", "x = 2\n"), []),
        (lambda root: (root / "data" / "text.txt").write_text("other words"), ["data changed"]),
        (lambda root: (root / "results.md").write_text("no part of it"), []),
    ],
)
def test_a_chapter_depends_on_what_its_cells_import_directly_or_not(root, edit, reasons):
    draws = "%matplotlib inline\nfrom helpers.parts import masks\nfrom helpers.press import figures"
    write_chapter(root, "01_first", draws)
    stamp_valid(root)
    assert why(root, edit) == reasons


def test_a_chapter_that_reads_no_data_does_not_depend_on_it(root):
    write_chapter(root, "01_first", "from helpers.parts import gaps")
    stamp_valid(root)
    assert why(root, lambda root: (root / "data" / "text.txt").write_text("other words")) == []


@pytest.mark.parametrize("name", ["own", "named", "recorded", "other"])
def test_a_chapter_depends_on_the_claims_it_is_about_names_or_recorded(root, name):
    records = WRITES_RESULTS.replace('{"k": k', '{"claim": ".".join(["recorded", "claim"]), "k": k')
    write_chapter(root, "01_first", "note = 'named.claim'", records)
    assert run(root)[0] == []
    assert why(root, write_register) == []
    reasons = why(root, lambda root: write_register(root, **{name: "It is not so."}))
    assert reasons == ([] if name == "other" else [f"claim {name}.claim changed"])


def test_a_run_says_why_and_runs_only_what_depends_on_the_change(root):
    write_chapter(root, "01_first", "# helpers.parts.masks is no import", WRITES_RESULTS)
    write_chapter(root, "13_masks", "from helpers.parts import masks", WRITES_RESULTS)
    run(root)
    before = results(root, "13_masks")
    module("parts.masks", "x = 2\n")(root)
    _, said = run(root)
    assert "chapter 1: unchanged" in said
    assert "(helpers.parts.masks changed, helpers.models gone, helpers.models.corpora gone and 2 more)" in said
    assert results(root, "13_masks")["pid"] != before["pid"]
    module("parts.masks", "x = 3\n")(root)
    assert "[1/1] chapter 13: Title of 13_masks (helpers.parts.masks changed)" in run(root)[1]


def test_overrides_leave_the_profile_copy_alone(root):
    run(root)
    before = results(root)
    failures, _ = run(root, "1", overrides={"k": 16})
    assert not failures
    assert results(root) == before
    assert results(root, profile="quick+custom")["k"] == 16
    assert chapters.stale(chapters.plan(root=root)[0]) == []


def test_a_failing_chapter_is_named_with_cell_line_error_and_partial_copy(root):
    write_chapter(root, "01_first", "a = 1", "b = a / 0  # the culprit\nc = 2")
    write_chapter(root, "02_second", WRITES_RESULTS)
    failures, said = run(root)
    assert len(failures) == 1
    partial = (root / "_build" / "executed" / "quick") / "01_first.partial.ipynb"
    for part in ("01_first", "In [3]", "b = a / 0  # the culprit", "ZeroDivisionError: division by zero", str(partial)):
        assert part in said
    assert partial.is_file() and not ((root / "_build" / "executed" / "quick") / "01_first.ipynb").exists()
    assert results(root, "02_second")["k"] == 4, "the other chapters still run"
    assert chapters.stale(chapters.plan(["1"], root=root)[0]) == ["not run yet"]


def test_a_failure_does_not_leave_the_former_run_valid(root):
    run(root)
    write_chapter(root, "01_first", "raise RuntimeError('now broken')")
    failures, _ = run(root)
    assert len(failures) == 1
    write_chapter(root, "01_first", WRITES_RESULTS)
    assert chapters.stale(chapters.plan(root=root)[0]) == ["not run yet"]


def test_a_chapter_that_writes_no_records_fails(root):
    write_chapter(root, "01_first", "1 + 1")
    failures, said = run(root)
    assert len(failures) == 1 and "wrote no records" in said


def test_a_killed_kernel_is_reported(root):
    write_chapter(root, "01_first", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")
    failures, said = run(root)
    assert len(failures) == 1 and "the kernel stopped" in said


def test_what_a_kernel_says_beside_its_notebook_is_kept_for_the_message(root, tmp_path, capfd, monkeypatch):
    command = [sys.executable, "-c", "import sys; print('Traceback\\nno memory', file=sys.stderr); sys.exit(1)"]
    monkeypatch.setattr(execution, "make_ipkernel_cmd", lambda **_: command)
    write_chapter(root, "01_first", WRITES_RESULTS)
    failures, said = run(root)
    assert len(failures) == 1 and "it said: no memory" in said
    assert "Traceback" not in said + "".join(capfd.readouterr())


def test_no_progress_bar_is_left_on_a_page(root):
    """tqdm's bar for notebooks does not look at TQDM_DISABLE; ours does."""
    bar = "from helpers import settings\nfor _ in settings.progress(range(3), 'a long thing'):\n    pass"
    write_chapter(root, "01_first", bar, WRITES_RESULTS)
    assert run(root)[0] == []
    assert "a long thing:" not in ((root / "_build" / "executed" / "quick") / "01_first.ipynb").read_text()


@pytest.mark.parametrize("last", ["pass", "raise RuntimeError('no')"])
def test_no_kernel_outlives_its_chapter(root, last):
    """A kernel holds a model's gigabytes; the next chapter needs them."""
    note = root / "pid"
    write_chapter(
        root, "01_first", f"import os, pathlib\npathlib.Path({str(note)!r}).write_text(str(os.getpid()))\n{last}"
    )
    run(root)
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


def test_the_kernel_is_the_running_python_whatever_is_registered(root, tmp_path, monkeypatch):
    spec = tmp_path / "jupyter" / "kernels" / "python3" / "kernel.json"
    spec.parent.mkdir(parents=True)
    spec.write_text(json.dumps({"argv": ["/no/such/python"], "display_name": "other", "language": "python"}))
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path / "jupyter"))
    assert run(root)[0] == []


def test_a_log_shows_progress_inside_a_long_cell(root, monkeypatch):
    monkeypatch.setattr(execution, "LOG_EVERY", 0.3)
    write_chapter(root, "01_first", "import time\ntime.sleep(1.5)", WRITES_RESULTS)
    failures, said = run(root)
    assert not failures and "s, in code cell 2 of 3: import time" in said


MEETS = """import os, pathlib, time
folder = pathlib.Path({folder!r})
(folder / str(os.getpid())).touch()
until = time.monotonic() + 120
while len(list(folder.iterdir())) < {awaited} and time.monotonic() < until:
    time.sleep(0.05)
print("share", os.environ.get("RANK1_CORES"), os.environ.get("OMP_NUM_THREADS"))"""


def test_chapters_side_by_side_are_at_work_together_on_their_share_of_the_cores(root, tmp_path, monkeypatch):
    """Each waits for the other to be there; one after another they would wait for ever."""
    (tmp_path / "met").mkdir()
    for slug in ("01_first", "02_second", "03_third"):
        write_chapter(root, slug, MEETS.format(folder=str(tmp_path / "met"), awaited=2), WRITES_RESULTS)
    write_chapter(root, "04_fails", "raise RuntimeError('no')")
    monkeypatch.setenv("RANK1_CORES", "6")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    failures, said = run(root, at_once=2)
    assert [str(failure).partition(":")[0] for failure in failures] == ["04_fails"]
    for number, slug in enumerate(("01_first", "02_second", "03_third"), 1):
        assert f"chapter {number}: done in" in said and "share 3 3" in executed(root, slug)
    assert "[4/4] chapter 4" in said
    (tmp_path / "met" / "third").touch()
    assert len(run(root, force=True)[0]) == 1 and "share 6 None" in executed(root, "01_first")


def test_chapters_of_one_teacher_do_not_wait_for_each_other_where_another_can_run(root):
    for number, parameters in enumerate(("teacher = 'a'", "teacher = 'a'", "teacher = 'b'", "k = 1", "k = 2"), 2):
        write_chapter(root, f"0{number}_more", parameters=parameters)
    waiting = [(job, ["not run yet"]) for job in chapters.plan(["2", "3", "4", "5", "6"], root=root)]
    desk = execution.Desk(Console(file=io.StringIO()))
    queue = execution.Queue(waiting, desk)
    assert [queue.take()[0] for _ in waiting] == [1, 3, 4, 5, 2] and queue.take() is None
    one_by_one = execution.Queue(waiting, desk)
    for place in range(1, 6):
        assert one_by_one.take()[0] == place
        one_by_one.taken.clear()
    desk.halted.set()
    assert execution.Queue(waiting, desk).take() is None


def test_only_the_quick_book_runs_side_by_side_unasked(monkeypatch):
    """A long profile's kernel may need twelve gigabytes, and two models of a reader's may not fit one GPU."""
    monkeypatch.setenv("RANK1_CORES", "16")
    assert chapters.side_by_side(None, book=True) == 2 and chapters.side_by_side(None, book=False) == 1
    assert chapters.side_by_side(5, book=False) == 5
    monkeypatch.setenv("RANK1_CORES", "1")
    assert chapters.side_by_side(None, book=True) == 1
    with pytest.raises(ValueError, match="jobs=0; allowed: a whole number, at least 1"):
        chapters.side_by_side(0, book=True)
    asked = []
    monkeypatch.setattr(chapters, "side_by_side", lambda jobs, book: asked.append(book) or 1)
    monkeypatch.setattr(execution, "run", lambda *_: [])
    for more in ([], ["--profile", "long"], ["-p", "k", "8"]):
        assert command_line.main(["run", "1", *more]) == 0
    assert asked == [True, False, False]


def test_the_seconds_of_what_a_chapter_computes_for_good_are_noted(root):
    notes = "made fits 1.5\nmade fits 2\nmade moments 3\nasked fits aa\nasked fits aa\n"
    makes = f"import os\nopen(os.environ['RANK1_NOTES'], 'a').write({notes!r})"
    write_chapter(root, "01_first", makes, WRITES_RESULTS)
    assert run(root)[0] == []
    (job,) = jobs = chapters.plan(root=root)
    assert json.loads(job.stamp.read_text())["made"] == {"fits": 3.5, "moments": 3.0}
    assert json.loads(job.stamp.read_text())["asked"] == ["fits/aa"]
    first, every = pages.spent(jobs)
    assert first["computed"] == every["computed"] == 6.5 and first["of these"] == "fits 4, moments 3"
    assert "fits 4, moments 3" in pages.performance_markdown(jobs=jobs)
    whole = job.executed.parent / execution.WHOLE
    assert json.loads(whole.read_text())["at_once"] == 1
    whole.unlink()
    run(root)
    assert not whole.exists(), "where a chapter is kept from before, no time is the whole book's"


def executed(root, slug):
    return (root / "_build" / "executed" / "quick" / f"{slug}.ipynb").read_text()


def test_a_stop_ends_all_chapters_that_are_at_work(root, tmp_path, monkeypatch):
    """No kernel stays, and none begins."""
    (tmp_path / "met").mkdir()
    for slug in ("01_first", "02_second", "03_third"):
        waits = MEETS.format(folder=str(tmp_path / "met"), awaited=9)
        write_chapter(root, slug, waits, WRITES_RESULTS)

    def stop():
        while len(list((tmp_path / "met").iterdir())) < 2:
            time.sleep(0.05)
        os.kill(os.getpid(), signal.SIGINT)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what runs in the background ignores it
    try:
        threading.Thread(target=stop, daemon=True).start()
        with pytest.raises(KeyboardInterrupt):
            run(root, at_once=2)
    finally:
        signal.signal(signal.SIGINT, before)
    pids = [int(note.name) for note in (tmp_path / "met").iterdir()]
    assert len(pids) == 2
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


@pytest.mark.parametrize("value", ["0", "-1", "two"])
def test_cores_that_are_none_are_refused(value, monkeypatch):
    monkeypatch.setenv("RANK1_CORES", value)
    with pytest.raises(ValueError, match=f"RANK1_CORES='{value}'; allowed: a whole number, at least 1"):
        settings.cores()


def test_two_runs_at_once_are_refused(root):
    jobs = chapters.plan(root=root)
    with (
        execution._alone(settings.made("_build", jobs[0].executed.parent)),
        pytest.raises(ValueError, match="another run is busy"),
    ):
        execution.run(jobs, Console(file=io.StringIO()))


def test_the_command_line_refuses_with_status_2(capsys):
    assert command_line.main(["run", "no-such-chapter"]) == 2
    assert "chapter='no-such-chapter'" in capsys.readouterr().err
    assert command_line.main(["run", "--profile", "no-such-profile"]) == 2
    assert "profile='no-such-profile'" in capsys.readouterr().err


def test_the_command_line_answers_before_anything_heavy_is_imported():
    """`--help` and a wrong parameter: neither PyTorch nor papermill is read for them."""
    script = (
        "import sys; from helpers import __main__ as m\n"
        "try: code = m.main(sys.argv[1:])\n"
        "except SystemExit as stop: code = stop.code\n"
        "print(code, sorted({'torch', 'papermill', 'matplotlib', 'nbformat', 'transformers'} & set(sys.modules)))"
    )
    for code, *arguments in (
        (0, "--help"),
        (2, "run", "1", "-p", "n_tokens", "4,000"),
        (2, "run", "1", "-p", "seeds", "0"),
    ):
        done = subprocess.run(
            [sys.executable, "-c", script, *arguments], cwd=settings.ROOT, capture_output=True, text=True, check=True
        )
        assert done.stdout.splitlines()[-1] == f"{code} []"
        assert code == 0 or f"-p: {arguments[3]}=" in done.stderr


def test_threads_may_read_chapters_at_once():
    """Python 3.11 stops with a `SystemError` where two threads build syntax trees at a time."""
    sources = ["".join(f"def f{i}(a, b):\n    return [a + {i}, (b, [{i}])]\n" for i in range(400))] * 16
    with ThreadPoolExecutor(8) as pool:
        assert all(len(tree.body) == 400 for tree in pool.map(settings.parsed, sources))
