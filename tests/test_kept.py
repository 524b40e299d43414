"""What is kept: under which key, and what a kill, a second process, a damaged file or a full disk can do to it."""

import ast
import contextlib
import dataclasses
import functools
import os
import random
import select
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from helpers import kept, settings
from helpers.dictionary import topk_sae
from helpers.kept import Kept, closure, code_of, described, digest, keep, keep_folder, packed, tree_of, unpacked
from helpers.training import Recipe, Run, Shuffled, remedies

# -- keys: what was asked for ------------------------------------------------------------------------------------------


def key(value):
    return Kept("things", value).asked


@dataclasses.dataclass(frozen=True)
class Point:
    x: float
    note: str = dataclasses.field(default="", compare=False)


class Asked:
    def __init__(self, asked, more):
        self.asked_for, self.more = asked, more

    @property
    def asked(self):
        return self.asked_for


class Draws:
    def __init__(self, fingerprint):
        self.fingerprint = fingerprint

    def sample(self):
        return self.fingerprint


def scaled(by):
    return lambda x: by * x


def shifted(x, by=1):
    return x + by


DIFFERENT = [
    1, 1.0, True, "1", None, 0, 0.0, -0.0, False, float("nan"), float("inf"), "", "nan", [], {}, set(),
    [1], [1.0], [True], [[1]], {"a": 1}, {"a": 1.0}, {"a": True}, [["a", 1]], {"a": [1]}, {1}, {1.0: 1},
    {1: 1}, {"1": 1},
    {"a": 1, "b": 2}, {"a": 2, "b": 1}, {1, 2}, {1, "1"}, np.float32(1), np.int64(1), np.bool_(True),
    np.zeros(2), np.zeros(2, np.float32), np.zeros((2, 1)), np.zeros((1, 2)), -np.zeros(2),
    torch.zeros(2), torch.zeros(2, 1),
    torch.zeros(2, dtype=torch.bfloat16), torch.zeros(2, dtype=torch.float16), torch.float32, "torch.float32",
    Point(1), Point(1.0), Point(2), remedies.Balance(), remedies.Switch(0.1), remedies.Switch(0.1, temperature=2.0),
    remedies.Together(remedies.Switch(0.1)), remedies.Together(remedies.Switch(0.1), remedies.AuxK()),
    remedies.Together(remedies.AuxK(), remedies.Switch(0.1)), remedies.During(remedies.Switch(0.1)),
    remedies.During(remedies.Switch(0.1), 0.5), remedies.During(remedies.Together(remedies.Switch(0.1))),
    Draws("a"), Draws("b"), Draws("a").sample, Draws("b").sample, Asked(1, 1), Asked(2, 1),
    scaled(1), scaled(2), scaled(1.0), shifted, functools.partial(shifted, by=2), functools.partial(shifted, by=3),
    functools.partial(shifted, 2), torch.relu, torch.tanh, len, Point, Draws,
]  # fmt: skip


def test_what_may_give_other_results_has_another_key():
    keys = [key(value) for value in DIFFERENT]
    same = [(a, b) for i, a in enumerate(DIFFERENT) for j, b in enumerate(DIFFERENT[:i]) if keys[i] == keys[j]]
    assert not same


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ([1, 2], (1, 2)),
        ({"a": 1, "b": 2}, {"b": 2, "a": 1}),
        ({"b", "a", 1}, {1, "a", "b"}),
        (Point(1, "here"), Point(1, "there")),
        (Asked(1, 2), Asked(1, 3)),
        (np.zeros((2, 3)).T, np.zeros((3, 2))),
        (torch.arange(6).view(2, 3).T, torch.arange(6).view(2, 3).T.contiguous()),
        (scaled(1), scaled(1)),
        (Path("a/b"), Path("a") / "b"),
        (float("nan"), -float("nan")),
    ],
)
def test_what_gives_the_same_results_has_the_same_key(one, other):
    assert key(one) == key(other)


class Undecorated(remedies.Balance):
    """Inherits being a dataclass without being one: its fields would not count."""

    def __init__(self, seen):
        object.__setattr__(self, "seen", seen)


@pytest.mark.parametrize(
    "value",
    [object(), 1j, b"text", np.datetime64("2020-01-01"), iter([]), Undecorated(1), [{"a": object()}]],
    ids=lambda value: type(value).__name__,
)
def test_what_cannot_be_told_apart_is_refused(value):
    with pytest.raises(TypeError, match="cannot be part of a key"):
        described(value)


def test_parts_of_a_digest_do_not_run_into_each_other():
    assert digest("ab", "c") != digest("a", "bc") != digest("abc")
    assert digest("a") == digest(b"a")


def notebook(text):
    """What a cell defines, as a notebook holds it: in `__main__`, with no file to read its source from."""
    space = {"__name__": "__main__"}
    exec(text, space)
    return space


def cell(text):
    return Kept("things", notebook(text)["f"]).key


def test_a_function_of_a_notebook_counts_by_its_code_and_by_all_that_it_reads():
    base = """
        ALPHA = 1
        def help(x): return x + 1
        class Model:
            size = 3
            def grow(self): return self.size
        def f(x, by=2):
            return [ALPHA * help(y) for y in range(by)], Model()
    """
    base = textwrap.dedent(base)
    changed = {
        "ALPHA = 1": "ALPHA = 2",
        "x + 1": "x + 2",
        "size = 3": "size = 4",
        "return self.size": "return -self.size",
        "by=2": "by=3",
        "ALPHA * help": "ALPHA + help",
    }
    assert len({cell(base), *(cell(base.replace(*edit)) for edit in changed.items())}) == 1 + len(changed)
    assert cell(base) == cell(base.replace("def f(x, by=2):", "def f(x,\n    by=2):\n    '''Text.'''\n    # why"))
    lambdas = notebook("a, b = (lambda x: x), (lambda x: -x)")
    assert key(lambdas["a"]) == key(lambdas["b"]) and code_of(lambdas["a"]) != code_of(lambdas["b"])


def test_what_a_notebook_makes_depends_on_its_own_helper_functions(tmp_path):
    base = "def trial(): return {}\nmake = lambda: [trial() for _ in range(1)]"
    found = [keep("cells", "same", notebook(base.format(value))["make"], cache_dir=tmp_path) for value in (1, 2, 1)]
    assert found == [[1], [2], [1]]


# -- keys: the code that answers ---------------------------------------------------------------------------------------

TREE = {
    "__init__.py": '"""All."""',
    "low.py": "def add(a, b):\n    return a + b\n",
    "room/__init__.py": "from helpers.room.inner import inner",
    "room/inner.py": "from ..low import add\n\n\ndef inner(x):\n    return add(x, 1)\n",
    "room/lazy.py": "def late():\n    import helpers.late\n    return helpers.late.x\n",
    "late.py": "x = 1\n",
    "named.py": "x = 1\n",
    "top.py": 'import importlib\nfrom helpers.room import lazy\n\n\ndef go():\n    """Go."""\n'
    '    return lazy.late() + importlib.import_module("helpers.named").x\n',
    "outside.py": "from helpers import top\n\nx = top.go()\n",
}


@pytest.fixture
def tree(tmp_path):
    for name, text in TREE.items():
        path = tmp_path / "helpers" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def code(root, *modules):
    return digest(*(f"{name} {tree_of(name, root)}" for name in closure(*modules, root=root)))


INSIDE = sorted(set(TREE) - {"outside.py"})


@pytest.mark.parametrize("name", INSIDE)
def test_a_changed_statement_inside_the_closure_changes_the_key(tree, name):
    before, path = code(tree, "helpers.top"), tree / "helpers" / name
    path.write_text(path.read_text() + "\nmore = 1\n")
    assert code(tree, "helpers.top") != before


def test_a_changed_statement_outside_the_closure_does_not(tree):
    before = code(tree, "helpers.top")
    (tree / "helpers" / "outside.py").write_text("from helpers import top\n\nx = 2\n")
    assert code(tree, "helpers.top") == before
    assert code(tree, "helpers.outside") != before


@pytest.mark.parametrize("name", INSIDE)
def test_comments_docstrings_and_layout_do_not_count(tree, name):
    before, path = code(tree, "helpers.top"), tree / "helpers" / name
    text = (
        path.read_text().replace("return ", "return  ").replace("    ", "        ").replace('"""Go."""', '"""Come."""')
    )
    path.write_text(f'"""Another text."""\n# and a comment\n\n\n{text.removeprefix(TREE["__init__.py"])}\n')
    assert code(tree, "helpers.top") == before


def test_the_closure_is_what_python_imports():
    script = "import sys, helpers.training.loop; print(*sorted(m for m in sys.modules if m.split('.')[0] == 'helpers'))"
    shown = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert set(shown.stdout.split()) <= set(closure("helpers.training.loop"))
    assert "helpers.press.figures" not in closure("helpers.training.loop")


def fit_key():
    stream = Shuffled(torch.arange(24.0).view(8, 3), batch_size=4)
    student = topk_sae(3, 6, 2, generator=settings.generator(0))
    return Run({"": student}, stream, {"": Recipe(3)}).kept("", None).key


@pytest.fixture
def edited(monkeypatch, tmp_path):
    """Change a module's tree in memory: `edited("helpers.settings")`."""

    def edit(module, text="more = 1"):
        original, changed = kept._parsed, tmp_path / f"{len(text)}.py"
        changed.write_text(f"{kept.module_file(module).read_text()}\n{text}\n")
        tree = kept._parse(changed, 0, 0, module)[1]
        monkeypatch.setattr(
            kept, "_parsed", lambda name, root=None: (original(name)[0], tree) if name == module else original(name)
        )

    return edit


@pytest.mark.parametrize("module", closure("helpers.training.loop"))
def test_a_changed_statement_in_any_module_behind_a_fit_changes_its_key(module, edited, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK1_CACHE", str(tmp_path))
    before = fit_key()
    edited(module, "# nothing")
    assert fit_key() == before
    edited(module)
    assert fit_key() != before


def test_a_change_in_figures_changes_no_fit(edited, tmp_path, monkeypatch):
    monkeypatch.setenv("RANK1_CACHE", str(tmp_path))
    before = fit_key()
    edited("helpers.press.figures")
    assert fit_key() == before


def test_code_that_was_edited_while_it_ran_is_nobody_elses(monkeypatch):
    """The old code still runs then: what it computes must not be found under the new code's key."""
    before = code_of(remedies.Switch)
    monkeypatch.setattr(kept, "STARTED", 0)
    assert code_of(remedies.Switch) != before


def test_versions_of_libraries_are_part_of_the_key(monkeypatch):
    before = Kept("things", 1).key
    monkeypatch.setattr(kept, "versions", lambda: {"torch": "0.1"})
    assert Kept("things", 1).key != before


# -- what comes back ---------------------------------------------------------------------------------------------------

KEPT = {
    "numbers": [1, 1.5, -0.0, float("inf"), True, None, "text\n“é”"],
    3: (1, (2.0, "x"), []),
    ("a", 1): {"": {}},
    "array": np.arange(6, dtype=np.float32).reshape(2, 3).T,
    "one": np.array(2.5),
    "none": np.zeros((0, 3), np.int64),
    "tensor": torch.arange(4, dtype=torch.bfloat16).view(2, 2).T,
    "lies": {"torch": 1, "tuple": [1], "items": []},
}


def same(one, other):
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[name], other[name]) for name in one)
    if isinstance(one, list | tuple):
        return type(one) is type(other) and len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, np.ndarray | torch.Tensor):
        return (
            type(one) is type(other)
            and one.dtype == other.dtype
            and one.shape == other.shape
            and bool((one == other).all())
        )
    return type(one) is type(other) and repr(one) == repr(other)


def test_what_was_kept_comes_back_as_it_was(tmp_path):
    calls = []

    def make():
        calls.append(1)
        return KEPT

    assert same(keep("things", 1, make, cache_dir=tmp_path), KEPT)
    assert same(keep("things", 1, make, cache_dir=tmp_path), KEPT)
    assert len(calls) == 1
    assert keep("things", 1, make, cache_dir=False) is KEPT
    assert not list(tmp_path.rglob("*.part"))


def test_what_is_made_notes_its_seconds_once(tmp_path, monkeypatch):
    """What it makes on the way counts with it, what is found does not count, and lines of several makers add up."""
    note = tmp_path / "made"
    monkeypatch.setenv(settings.NOTES, str(note))

    def inner():
        return keep("inner", 1, lambda: time.sleep(0.05) or [2], cache_dir=tmp_path)

    for _ in range(2):
        keep("outer", 1, lambda: time.sleep(0.05) or inner(), cache_dir=tmp_path)
        inner()
    keep("other", 1, lambda: [1], cache_dir=tmp_path)
    lines = [line.split() for line in note.read_text().splitlines()]
    made = [(kind, float(seconds)) for what, kind, seconds in lines if what == "made"]
    assert [kind for kind, _ in made] == ["outer", "other"] and 0.1 <= made[0][1] < 5
    assert {kind for what, kind, _ in lines if what == "asked"} == {"outer", "inner", "other"}
    with pytest.raises(RuntimeError):
        keep("failed", 1, lambda: exec("raise RuntimeError"), cache_dir=tmp_path)
    assert note.read_text().count("made failed") == 1, "a failure took its time too"
    assert keep("failed", 2, lambda: [3], cache_dir=tmp_path) == [3]
    assert note.read_text().count("made failed") == 2, "and what comes after it is not taken to lie within it"


def test_a_tensor_that_is_kept_shares_no_memory():
    tensor = torch.zeros(3, requires_grad=True)
    found = unpacked(packed([tensor], {}))[0]
    with torch.no_grad():
        tensor += 1
    assert found.tolist() == [0, 0, 0] and not found.requires_grad


@pytest.mark.parametrize("value", [{1}, object(), b"x", 1j, [lambda: 1]], ids=lambda value: type(value).__name__)
def test_what_cannot_be_kept_is_refused(tmp_path, value):
    with pytest.raises(TypeError, match="cannot be kept"):
        keep("things", 1, lambda: value, cache_dir=tmp_path)
    assert not list(tmp_path.rglob("*.kept")) and not list(tmp_path.rglob("*.part"))


# -- kills, and two at once --------------------------------------------------------------------------------------------

WRITER = """
    import sys, time
    import numpy as np
    from helpers.kept import keep
    def make():
        with open(sys.argv[2], "a") as log:
            log.write("made\\n")
        time.sleep(float(sys.argv[3]))
        return {"a": np.arange(200_000, dtype=np.float64), "b": "end"}
    print("ready", flush=True)
    for number in range(int(sys.argv[4])):
        found = keep("things", number, make, cache_dir=sys.argv[1])
        assert found["a"][-1] == 199_999 and found["b"] == "end"
    print("done", flush=True)
"""


def start(tmp_path, script=WRITER, cache="cache", seconds=0.0, times=1):
    """A process that keeps things in `cache`, once it has said that it is ready."""
    code = [sys.executable, "-c", textwrap.dedent(script), tmp_path / cache, tmp_path / "log", str(seconds), str(times)]
    process = subprocess.Popen(code, stdout=subprocess.PIPE, text=True, cwd=settings.ROOT)
    assert process.stdout.readline() == "ready\n"
    return process


def fork(action):
    """Do it in a forked process, which is much cheaper to start than a new one; returns its number."""
    child = os.fork()
    if not child:
        try:
            action()
        finally:
            os._exit(0)
    return child


def kill(child, after):
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("busy", ["writing", "making"])
def test_killed_at_twenty_random_moments_nothing_is_half_or_old(tmp_path, busy):
    draw, value = random.Random(0), np.arange(300_000)
    begun, begins = os.pipe()  # a byte for each thing that is begun: kills fall into work, however busy the machine

    def make():
        os.write(begins, b".")
        if busy == "making":
            time.sleep(0.05)
        return [value, "end"]

    def work():
        for number in range(10**6):
            keep("things", number, make, cache_dir=tmp_path)

    started = time.monotonic()
    keep("things", 0, make, cache_dir=tmp_path)
    pace = time.monotonic() - started  # of this machine as busy as it is
    os.read(begun, 1)
    os.set_blocking(begun, False)
    for turn in range(20):
        child = fork(work)
        for _ in range(1 + turn % 2):  # every other one has ended a piece of work before it is killed in the next
            select.select([begun], [], [], 60)
            os.read(begun, 1)
        kill(child, draw.uniform(0.0, 2 * pace))
        with contextlib.suppress(BlockingIOError):  # what else it began
            os.read(begun, 10**6)
        for number in range(10**6):
            if (found := Kept("things", number, make, cache_dir=tmp_path).read()) is None:
                break  # this one was cut off: nothing there, or all of it
            assert found[1] == "end" and np.array_equal(found[0], value)
    assert keep("things", number, make, cache_dir=tmp_path)[1] == "end"
    assert number > 10  # they did come forward
    os.close(begun)
    os.close(begins)
    folder = tmp_path / "things"
    assert not list(folder.glob(f".{Kept('things', number, make, cache_dir=tmp_path).key}*.part"))


def test_a_killed_folder_is_made_anew_and_leaves_nothing(tmp_path):
    def fill(folder):
        (folder / "a").write_text("a" * 1000)
        time.sleep(0.03)
        (folder / "b").write_text("b")

    def work():
        keep_folder("folders", 1, fill, cache_dir=tmp_path)

    for after in (0.0, 0.01, 0.02, 0.03, 0.04):
        kill(fork(work), after)
    folder = keep_folder("folders", 1, fill, cache_dir=tmp_path)
    assert {path.name for path in folder.iterdir()} == {"a", "b", "kept.json"}
    assert [path.name for path in folder.parent.iterdir() if path.is_dir()] == [folder.name]


def test_two_processes_make_it_once(tmp_path):
    both = [start(tmp_path, seconds=0.5, times=2) for _ in range(2)]
    assert [process.wait(60) for process in both] == [0, 0]
    assert (tmp_path / "log").read_text().count("made") == 2


# -- damaged, truncated, empty and foreign files ---------------------------------------------------------------------


def one(tmp_path, what=1):
    return keep("things", what, lambda: [what, np.arange(100)], cache_dir=tmp_path)


def stored(tmp_path):
    """Something that is kept, and its file."""
    return (place := Kept("things", 1, digest, cache_dir=tmp_path)), place.path


def flipped(content, at):
    return content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :]


@pytest.mark.parametrize("at", [0, 5, 20, 60, 150, -5])
def test_any_damaged_byte_is_named(tmp_path, at):
    place, path = stored(tmp_path)
    place.write([1, np.arange(100)])
    content = path.read_bytes()
    path.write_bytes(flipped(content, at % len(content)))
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .*; delete it"):
        place.read()


@pytest.mark.parametrize("left", [0, 1, 13, 40, 100, -1])
def test_a_truncated_or_empty_file_is_named(tmp_path, left):
    place, path = stored(tmp_path)
    place.write([1, np.arange(100)])
    path.write_bytes(path.read_bytes()[:left])
    with pytest.raises(ValueError, match=f"{path.name} is damaged: .*; delete it"):
        place.read()


def test_a_foreign_file_is_named(tmp_path):
    place, path = stored(tmp_path)
    place.write(1)
    path.write_bytes(b"PK\x03\x04 another program's")
    with pytest.raises(ValueError, match=f"{path.name} is damaged: it is no file of this book"):
        place.read()
    other = Kept("things", 2, digest, cache_dir=tmp_path)
    other.write(2)
    shutil.copy(other.path, path)
    with pytest.raises(ValueError, match=f"{path.name} is damaged: it holds what was kept under another name"):
        place.read()
    path.unlink()
    path.mkdir()
    with pytest.raises(ValueError, match=f"{path.name} is damaged: Is a directory"):
        place.read()


def folder_of(tmp_path, what=1):
    def fill(folder):
        (folder / "deep").mkdir()
        (folder / "deep" / "a").write_text(f"{what}" * 9)

    return keep_folder("folders", what, fill, cache_dir=tmp_path)


@pytest.mark.parametrize("damage", ["changed", "truncated", "missing", "no seal", "foreign seal", "another's"])
def test_a_damaged_file_of_a_folder_is_named(tmp_path, damage):
    folder = folder_of(tmp_path)
    assert folder_of(tmp_path) == folder
    file, seal = folder / "deep" / "a", folder / kept.SEAL
    os.utime(file)  # touched, but whole
    assert folder_of(tmp_path) == folder
    if damage == "changed":
        file.write_text("2" * 9)
    if damage == "truncated":
        file.write_text("1" * 8)
    if damage == "missing":
        file.unlink()
    if damage == "no seal":
        seal.unlink()
    if damage == "foreign seal":
        seal.write_text("[1]")
    if damage == "another's":
        other = folder_of(tmp_path, 2)
        shutil.rmtree(folder)
        shutil.copytree(other, folder)
    with pytest.raises(ValueError, match=f"{folder.name}.*(damaged|under another name).*delete the folder"):
        folder_of(tmp_path)


# -- folders that cannot be written, full disks ----------------------------------------------------------------------


@pytest.fixture
def mounted(tmp_path):
    """`mounted("size=1m")` is a small file system of its own; skips where none can be mounted."""
    place = tmp_path / "mounted"
    place.mkdir()

    def mount(options):
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")
        return place

    yield mount
    subprocess.run(["umount", place], capture_output=True)


def test_a_read_only_folder_is_named_and_still_read(mounted):
    place = mounted("size=4m")
    one(place)
    subprocess.run(["mount", "-o", "remount,ro", place], check=True)
    assert one(place)[0] == 1
    with pytest.raises(ValueError, match=r"things cannot be written: .*[Rr]ead-only"):
        one(place, 2)


def test_a_file_in_the_folders_place_is_named(tmp_path):
    (tmp_path / "things").write_text("")
    with pytest.raises(ValueError, match="things cannot be written"):
        keep("things", 1, lambda: 1, cache_dir=tmp_path)
    with pytest.raises(ValueError, match="cache_dir='.*things"):
        keep("things", 1, lambda: 1, cache_dir=tmp_path / "things")


def test_a_full_disk_is_named_and_leaves_nothing(mounted):
    check_full(mounted("size=1m"))


FULL = """
    import resource, signal, sys
    from pathlib import Path
    from tests.test_kept import check_full
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, 2**20))
    check_full(Path(sys.argv[1]))
"""


def test_where_no_file_may_grow_any_more_it_is_the_same(tmp_path):
    pytest.importorskip("resource", reason="no limits of resources here")
    (tmp_path / "cache").mkdir()
    subprocess.run([sys.executable, "-c", textwrap.dedent(FULL), tmp_path / "cache"], check=True, cwd=settings.ROOT)


def check_full(place):
    """On a disk with room for a megabyte: what fits is kept; what does not is named, and nothing of it stays."""

    def big():
        return np.zeros(2**18)

    def fill(folder):
        (folder / "a").write_bytes(bytes(2**21))

    assert keep("things", "small", lambda: 7, cache_dir=place) == 7
    for _ in range(2):
        with pytest.raises(ValueError, match=r"\.kept cannot be written: .*(No space|too large).*; allowed"):
            keep("things", "big", big, cache_dir=place)
        with pytest.raises(ValueError, match=r"folders.* cannot be written: .*(No space|too large).*; allowed"):
            keep_folder("folders", "big", fill, cache_dir=place)
    assert len(list(place.rglob("*.kept"))) == 1
    assert not list(place.rglob("*.part"))
    assert not [path for path in (place / "folders").iterdir() if path.is_dir()]
    assert keep("things", "small", lambda: 7, cache_dir=place) == 7


# -- nothing is unpickled ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", sorted((settings.ROOT / "helpers").rglob("*.py")), ids=lambda path: path.stem)
def test_nothing_is_unpickled(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            assert not {each.name for each in node.names} & {"pickle", "joblib", "dill", "cloudpickle", "shelve"}
        if isinstance(node, ast.ImportFrom):
            assert node.module not in {"pickle", "joblib", "dill", "cloudpickle", "shelve"}
        if isinstance(node, ast.Call):
            called, given = ast.unparse(node.func), {each.arg: ast.unparse(each.value) for each in node.keywords}
            if called == "torch.load":
                assert given.get("weights_only") == "True", f"line {node.lineno}"
            if called in ("np.load", "numpy.load"):
                assert given.get("allow_pickle", "False") == "False", f"line {node.lineno}"
            assert called not in ("pd.read_pickle", "pandas.read_pickle"), f"line {node.lineno}"


def test_what_was_asked_for_is_the_same_where_the_code_moves(tmp_path, monkeypatch):
    """Committed cells of long runs are found again when a class or function has moved to another module."""
    from helpers.training.remedies import Switch

    before = Kept("cells", Switch(0.1), cache_dir=tmp_path)
    monkeypatch.setattr(Switch, "__module__", "helpers.training.loop")
    after = Kept("cells", Switch(0.1), cache_dir=tmp_path)
    assert after.asked == before.asked and after.key != before.key
    assert Kept("cells", Switch(0.2), cache_dir=tmp_path).asked != before.asked


def test_what_was_asked_of_a_store_is_the_same_where_the_code_that_harvests_changes(tmp_path, monkeypatch):
    """Cells over a harvest are found again after its code has changed, and what lies in the cache is not."""

    def both(rows=30_000, layer=9):
        store = Kept("activations", {"layer": layer}, cache_dir=tmp_path)
        return Kept("runs", {"folder": f"{store.key}@{rows}"}, cache_dir=tmp_path)

    before = both()
    monkeypatch.setattr("helpers.kept.code_of", lambda *_: "other code")
    after = both()
    assert after.asked == before.asked and after.key != before.key
    assert len({before.asked, both(rows=20_000).asked, both(layer=3).asked}) == 3
