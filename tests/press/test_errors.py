"""Wrong questions and broken places: the answer is ours, comes early, names what is wrong and what is allowed.

Each case of the table is a command as a reader types it, in a copy of the project. Time is measured as the seconds that
the command and its kernel computed, which a busy machine does not lengthen. By the wall clock an answer may take six
times as long, so that one that waits is found.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import pytest

from helpers import dictionary, settings
from tests import tiny
from tests.press.house import House, why_not_nobody

EARLY, WITH_MODEL = 3.0, 40.0
"""Seconds of computing that an answer may take, without and with a kernel that reads a model."""
BUSY = 6
"""So many times as long an answer may take by the wall clock."""
if os.name != "posix":
    pytest.skip("users, signals and rights are asked as POSIX has them", allow_module_level=True)


def nothing(house: House) -> None:
    """Most questions are wrong in any house."""


@dataclass(frozen=True)
class Case:
    """A command (`{own}` and the like are folders of the house), and what it must say and return."""

    command: str
    says: tuple[str, ...]
    code: int = 2
    prepare: Callable[[House], None] = nothing
    environment: Mapping[str, str | None] = field(default_factory=dict)
    nobody: bool = False
    seconds: float = EARLY
    soak: bool = False
    name: str = ""

    @property
    def id(self) -> str:
        return self.name or re.sub(r"[^\w.,+-]+", " ", self.command).strip().replace(" ", "_")


def asked(command: str, *says: str, **options) -> Case:
    return Case(command, says, **options)


# -- what is asked -----------------------------------------------------------------------------------------------------

WORDS = [
    asked("run 99", "chapter='99'", "0  00_how_to_read"),
    asked("run 1 nowhere", "chapter='nowhere'", "allowed (number or slug)"),
    asked("verify 99", "chapter='99'", "allowed (number or slug)", soak=True),
    asked("run --profile huge", "profile='huge' does not exist; allowed: ", "quick"),
    asked("book --profile huge", "profile='huge' does not exist; allowed: ", "quick"),
    asked("run --profile ../quick", "profile='../quick'", "allowed: "),
    asked("", "usage: ", "command"),
    asked("bake", "invalid choice: 'bake'", "'run'"),
    asked("run --fast", "unrecognized arguments: --fast", soak=True),
    asked("run 1 -p", "-p/--parameter: expected 2 arguments"),
    asked("run 1 -p steps", "-p/--parameter: expected 2 arguments", soak=True),
    asked("run 1 -p stepz 3", "-p: parameter='stepz'", "allowed:\n  01_topk_sae_is_rank1_moe: teacher, layer"),
    asked("run -p nowhere 3", "-p: parameter='nowhere'", "allowed:\n  00_how_to_read: "),
]
TYPES = [
    asked("run 1 -p n_tokens 4,000", "-p: n_tokens='4,000'; allowed: a whole number, such as 15000"),
    asked("run 1 -p n_tokens 1.5", "-p: n_tokens=1.5; allowed: a whole number"),
    asked("run 1 -p n_tokens ''", "-p: n_tokens=None; allowed: a whole number", soak=True),
    asked("run 1 -p n_tokens .inf", "-p: n_tokens=inf; allowed: a whole number", soak=True),
    asked("run 1 -p n_tokens true", "-p: n_tokens=True; allowed: a whole number", soak=True),
    asked("run 1 -p seeds 0", "-p: seeds=0; allowed: a list, such as [0, 1, 2]"),
    asked("run 1 -p seeds '[0, a]'", "-p: seeds=[0, 'a']; allowed: in it a whole number", soak=True),
    asked("run 1 -p seeds []", "-p: seeds=[]; allowed: at least one, such as [0, 1, 2]"),
    asked("run 9 -p sites []", "-p: sites=[]; allowed: at least one"),
    asked("run 1 -p seeds '[0'", "-p: seeds='[0' is not YAML", "allowed: such as"),
    asked("run 1 -p corpus 2024-13-45", "-p: corpus='2024-13-45' is not YAML", "allowed: such as"),
    asked("run 1 -p corpus 2024-11-25", "-p: corpus=", "allowed: a text", soak=True),
    asked("run 1 -p seeds {deep}", "-p: seeds=", "is not YAML", "allowed: such as", name="nested_5000_deep"),
    asked("run 9 -p strengths '{auxk: 1}'", "-p: strengths={'auxk': 1}; allowed: in it a list"),
    asked("run 1 -p device 3", "-p: device=3; allowed: a text"),
    asked("run 1 -p device abacus", "device='abacus'", "allowed: 'auto', 'cpu'"),
    asked("run 1 -p device CPU", "device='CPU'", "allowed: 'auto', 'cpu'", soak=True),
    asked("run 1 -p results_dir 3", "-p: results_dir=3; allowed: a text"),
    asked("run 1 -p cache_dir '[a]'", "-p: cache_dir=['a']; allowed: a text"),
    asked(
        "run 1 -p teacher /no/such/model",
        "teacher='/no/such/model': No such file",
        "allowed: a file or folder",
    ),
    asked("run 18 -p sae /no/such/sae", "sae='/no/such/sae': No such file", "allowed: a file or folder"),
    asked("run 18 -p sae my_sae", "sae='my_sae': No such file", "allowed: a file or folder"),
    asked("run 1 -p corpus ~nobody54321/text.txt", "corpus='~nobody54321/text.txt'", "allowed: "),
    asked("run 1 -p corpus {own}/text.txt", "text.txt': No such file or directory; allowed: a file or folder"),
    asked("run 1 -p corpus {long}", "corpus='", "allowed: ", name="name_of_9000_letters"),
]


# -- places ------------------------------------------------------------------------------------------------------------


def file_in_place(house: House) -> None:
    (house.own / "file").write_text("")


def empty_folder(house: House) -> None:
    """A folder without text: only another kind of file, and a hidden one."""
    (house.own / "empty").mkdir()
    for name in ("my.pdf", ".my.txt"):
        (house.own / "empty" / name).write_text("")


def locked(house: House) -> None:
    """A folder of somebody else, or where that cannot be, of one's own without the right to write."""
    place = house.own / "locked"
    place.mkdir()
    place.chmod(0o555)


AS_ROOT = os.geteuid() == 0
"""Rights hold nobody back who is root: what is not the user's is tried as somebody else."""


def unreadable(house: House) -> None:
    file_in_place(house)
    (house.own / "file").chmod(0o000)
    build_for_all(house)


def build_is_a_file(house: House) -> None:
    (house.root / "_build").write_text("")


def build_for_all(house: House) -> None:
    (house.root / "_build").mkdir()
    (house.root / "_build").chmod(0o777)


def locked_and_build_for_all(house: House) -> None:
    locked(house)
    build_for_all(house)


NO_HOME = {"HOME": None, "XDG_CACHE_HOME": None, "RANK1_CACHE": None}
PLACES = [
    asked("run 3 -p results_dir {own}/file", "results_dir='", "/file'", "allowed: a folder", prepare=file_in_place),
    asked("run 3 -p results_dir {own}/file/in", "results_dir='", "allowed: a folder", prepare=file_in_place, soak=True),
    asked("run 3 -p results_dir ~nobody54321/in", "results_dir='~nobody54321/in'", "allowed: a full path"),
    asked("run 3 -p cache_dir {own}/file", "cache_dir='", "allowed: a folder", prepare=file_in_place, soak=True),
    asked("run 3 -p cache_dir {own}/file/in", "cache_dir='", "allowed: a folder", prepare=file_in_place),
    asked(
        "run 3", "RANK1_CACHE='", "allowed: a folder", prepare=file_in_place, name="cache_is_a_file",
        environment={"RANK1_CACHE": "{own}/file"},
    ),
    asked("run 3", "RANK1_CACHE='", "/proc/cache", "allowed: a folder", name="cache_below_proc",
          environment={"RANK1_CACHE": "/proc/cache"}),
    asked("run 3", "RANK1_CACHE='~nobody54321/in'", "allowed: a full path", name="cache_of_no_user",
          environment={"RANK1_CACHE": "~nobody54321/in"}),
    asked("run 3", "RANK1_CACHE='", "allowed: a folder", name="cache_in_a_folder_not_the_users", nobody=AS_ROOT,
          prepare=locked_and_build_for_all, environment={"RANK1_CACHE": "{own}/locked/cache"}),
    asked("run 3", "no home folder", "RANK1_CACHE", "allowed: ", name="no_home_no_account", environment=NO_HOME,
          nobody=True, prepare=build_for_all),
    asked("run 3", "_build", "allowed: a folder", name="build_not_the_users", nobody=True,
          environment={"RANK1_CACHE": "{own}"}),
    asked("run 3 -p results_dir {own}/locked", "results_dir='", "allowed: a folder", prepare=locked_and_build_for_all,
          nobody=AS_ROOT, name="results_dir_not_the_users", environment={"RANK1_CACHE": "{own}"}),
    asked("run 1 -p corpus {own}/file", "corpus='", "you may not read it", prepare=unreadable, nobody=AS_ROOT,
          name="corpus_not_the_users"),
    asked("run 1 -p corpus {own}/empty", "corpus='", "/empty': no .txt, .jsonl", "allowed: ", prepare=empty_folder),
    asked("run 3", "_build", "allowed: a folder", name="build_is_a_file", prepare=build_is_a_file),
    asked("book", "_build", "allowed: a folder", name="book_where_build_is_a_file", prepare=build_is_a_file),
]  # fmt: skip


# -- files of the book -------------------------------------------------------------------------------------------------


def profile(content: str | bytes) -> Callable[[House], None]:
    def write(house: House) -> None:
        (house.root / "profiles" / "mine.yml").write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def notebook(content: str | bytes) -> Callable[[House], None]:
    def write(house: House) -> None:
        path = house.root / "notebooks" / "03_gaussian_has_nothing_sparse.ipynb"
        path.write_bytes(content if isinstance(content, bytes) else content.encode())

    return write


def parameters(source: str) -> Callable[[House], None]:
    cell = {"cell_type": "code", "metadata": {"tags": ["parameters"]}, "source": source}
    return notebook(json.dumps({"cells": [cell]}))


def register(house: House) -> None:
    (house.root / "book" / "claims.yml").write_text("claims: [")


def register_gone(house: House) -> None:
    (house.root / "book" / "claims.yml").unlink()


def mine(content: str | bytes, name: str, *says: str, soak: bool = True) -> Case:
    options = {"prepare": profile(content), "name": f"profile_{name}", "soak": soak}
    return asked("run 3 --profile mine", "mine.yml", *says, **options)


def third(content: str | bytes, name: str, *says: str) -> Case:
    prepare = parameters(content[1:]) if content[:1] == "=" else notebook(content)
    return asked("run 3", "03_gaussian_has_nothing_sparse.ipynb", *says, prepare=prepare, name=f"notebook_{name}")


FILES = [
    mine("common: [", "not_yaml", "is not YAML", soak=False),
    mine(b"common: {device: \xff}", "not_text", "is not YAML"),
    mine("[" * 5000, "nested_5000_deep", "is not YAML"),
    mine("- 1", "list", "allowed: names with their values"),
    mine("common: {device: cpu, device: cuda}", "key_twice", "twice"),
    mine("99_x: {steps: 1}", "no_chapter", "99_x", "allowed: "),
    mine("common: {stepz: 1}", "no_parameter", "stepz", "allowed:"),
    mine("3: {stepz: 1}", "number", "3", "allowed: "),
    mine("03_gaussian_has_nothing_sparse: {steps: many}", "type", "steps='many'; allowed: a whole number", soak=False),
    third("{", "not_json", "allowed: "),
    third(b"\xff", "not_text", "allowed: "),
    third("[1]", "list", "allowed: "),
    third('{"worksheets": []}', "format_3", "allowed: "),
    third('{"cells": [{}]}', "bare_cell", "allowed: "),
    third("=steps = 200\ndims = [", "parameters_syntax", "line 2", "allowed: "),
    third("=steps = 2 * 100", "parameters_derived", "constants only, not 'steps = 2 * 100'"),
    asked("run 3", "claims.yml", "is not YAML", name="register_not_yaml", prepare=register),
    asked("run 3", "claims.yml", "restore", name="register_gone", prepare=register_gone),
]

REFUSED = [*WORDS, *TYPES, *PLACES, *FILES]


@pytest.fixture
def house():
    made = House()
    yield made
    made.remove()


def filled(text: str, house: House) -> str:
    for name, value in {"own": house.own, "root": house.root, "deep": "[" * 5000, "long": "a" * 9000}.items():
        text = text.replace("{" + name + "}", str(value))
    return text


def marked(cases: list[Case]) -> list:
    return [pytest.param(case, id=case.id, marks=[pytest.mark.soak] if case.soak else []) for case in cases]


def check_answer(done, case: Case) -> None:
    told = f"\n--- rc {done.code}, {done.cpu:.1f} s of {done.wall:.1f} s:\n{done.said[-3000:]}"
    assert done.code == case.code, told
    assert "Traceback" not in done.said and 'File "' not in done.said and "Exception ignored" not in done.said, told
    for part in case.says:
        assert part in done.said, f"{part!r} is not in{told}"
    assert done.cpu <= case.seconds and done.wall <= BUSY * case.seconds, told


@pytest.mark.parametrize("case", marked(REFUSED))
def test_a_wrong_question_is_refused_early_by_name_and_nothing_changes(house, case):
    answer(house, case)


# -- chapters that fail, are stopped, or run where little works --------------------------------------------------------


def cells(*sources: str, also: Callable[[House], None] = nothing) -> Callable[[House], None]:
    def prepare(house: House) -> None:
        house.chapter(*sources)
        also(house)

    return prepare


def good(command: str = "run 1", *says: str, **options) -> Case:
    """A command that must go well."""
    return Case(command, says or ("done in",), 0, seconds=WITH_MODEL, **{"prepare": cells()} | options)


def bad(name: str, *says: str, command: str = "run 1", code: int = 1, **options) -> Case:
    return Case(command, says, code, seconds=WITH_MODEL, name=name, **options)


REFUSES = "if k > 3:\n    raise ValueError(f'k={k}; allowed: 1 to 3')"
MAGICS = "%matplotlib inline\nx = !echo 1\n?print\nimport asyncio\nawait asyncio.sleep(0)"
KILLED = "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)"


def own_for_all(house: House) -> None:
    build_for_all(house)
    house.own.chmod(0o777)


def damaged_stamp(house: House) -> None:
    folder = house.root / "_build" / "executed" / "quick"
    folder.mkdir(parents=True)
    (folder / "01_first.run.json").write_text("[]")


def without_bs4(house: House) -> None:
    (house.root / "bs4.py").write_text("raise ModuleNotFoundError('No module named bs4', name='bs4')")


RUNS = [
    bad("cell_syntax", "01_first: cell 3 of the notebook, line 2", "dims = [", prepare=cells("x = 1\ndims = [")),
    bad("cell_error", "In [2] (cell 3", "ZeroDivisionError", "partial notebook: ", prepare=cells("1 / 0"), soak=True),
    bad("default_refused", "k=4; allowed: 1 to 3", "partial notebook: ", prepare=cells(REFUSES), soak=True),
    bad("parameter_refused", "k=9; allowed: 1 to 3", command="run 1 -p k 9", code=2, prepare=cells(REFUSES)),
    bad("kernel_killed", "the kernel stopped", "was memory enough?", "partial notebook: ", prepare=cells(KILLED)),
    bad("no_jupyter_book", "the package 'bs4' is missing", command="book", prepare=cells(also=without_bs4)),
    good(name="magics", prepare=cells(MAGICS), soak=True),
    good(name="no_home_no_account_but_a_cache", prepare=cells(also=own_for_all), nobody=True,
         environment={**NO_HOME, "RANK1_CACHE": "{own}/cache"}),
    good(name="home_not_the_users", prepare=cells(also=own_for_all), nobody=True, soak=True,
         environment={"HOME": "/", "RANK1_CACHE": "{own}/cache", "JUPYTER_RUNTIME_DIR": "/proc/runtime"}),
    good(name="output_as_ascii", environment={"PYTHONIOENCODING": "ascii"}, soak=True),
    good(name="output_as_cp1252", environment={"PYTHONIOENCODING": "cp1252"}, soak=True),
    good(name="stamp_damaged", prepare=cells(also=damaged_stamp), soak=True),
    good(name="cache_with_spaces", environment={"RANK1_CACHE": "{own}/caché mit Raum 缓存"}, soak=True),
]  # fmt: skip


@pytest.mark.parametrize("case", marked(RUNS))
def test_a_run_ends_with_its_own_words_and_leaves_nothing_but_its_build(house, case):
    answer(house, case, "_build", "own")


def answer(house: House, case: Case, *without: str) -> None:
    """Ask, check what is said, and that only folders called `without` have changed."""
    if case.nobody and (why := why_not_nobody()):
        pytest.skip(why)
    case.prepare(house)
    before = house.state(*without)
    environment = {name: value and filled(value, house) for name, value in case.environment.items()}
    done = house.run(*shlex.split(filled(case.command, house)), environment=environment, nobody=case.nobody)
    check_answer(done, case)
    assert house.state(*without) == before
    assert not house.left()


def until(house: House, file: str, seconds: float = 120) -> None:
    """Wait until a chapter has written a file in `own`."""
    end = time.monotonic() + seconds
    while not (house.own / file).is_file():
        assert time.monotonic() < end, f"no {file} after {seconds} s"
        time.sleep(0.05)


def waits(house: House) -> str:
    """A cell that writes `begun`, and waits as long as there is a file `wait`."""
    (house.own / "wait").write_text("")
    return (
        f"import pathlib, time\nown = pathlib.Path({str(house.own)!r})\n(own / 'begun').write_text('')\n"
        "while (own / 'wait').exists():\n    time.sleep(0.1)"
    )


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.soak)])
def test_a_stopped_run_names_its_partial_notebook_leaves_no_process_and_goes_on(house, number):
    house.chapter(waits(house))
    started = time.perf_counter()
    process = house.start(["run", "1"])
    until(house, "begun")
    if number == signal.SIGTERM:  # two at once, while one is busy
        case = asked("run 1", "another run is busy in ", "wait for it to end", seconds=WITH_MODEL)
        check_answer(house.run("run", "1"), case)
    process.send_signal(number)
    partial = house.root / "_build" / "executed" / "quick" / "01_first.partial.ipynb"
    case = bad("stopped", f"partial notebook: {partial}", f"stopped by {number.name}", code=128 + number)
    check_answer(house.ended(process, started), case)
    assert partial.is_file() and not house.left()
    (house.own / "wait").unlink()
    check_answer(house.run("run", "1"), good())


@pytest.mark.soak
@pytest.mark.parametrize("delay", [0.4, 1, 2, 4, 6, 8, 12])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_can_be_stopped_at_any_moment(house, number, delay):
    house.chapter(waits(house))
    started = time.perf_counter()
    process = house.start(["run", "1"])
    time.sleep(delay)
    process.send_signal(number)
    check_answer(house.ended(process, started), bad("stopped", f"stopped by {number.name}", code=128 + number))
    assert not house.left()


SWEEPS = """from helpers.study.sweep import sweep
from tests.press.slow import slow
print(sweep(slow, [{"own": own, "n": n} for n in range(4)], workers=2))"""


@pytest.mark.soak
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_no_worker_of_a_sweep_outlives_a_stopped_run(house, number):
    house.chapter(f"own = {str(house.own)!r}", SWEEPS)
    (house.own / "wait").write_text("")
    (house.root / "tests" / "press").mkdir(parents=True)
    (house.root / "tests" / "press" / "slow.py").write_text(SLOW)
    started = time.perf_counter()
    process = house.start(["run", "1"])
    until(house, "begun-1")
    process.send_signal(number)
    done = house.ended(process, started)
    assert done.code == (-number if number == signal.SIGKILL else 128 + number) and "Traceback" not in done.said
    assert not house.left(20)
    (house.own / "wait").unlink()
    check_answer(house.run("run", "1"), good())


SLOW = """import pathlib, time


def slow(own, n):
    own = pathlib.Path(own)
    (own / f"begun-{n}").write_text("")
    while (own / "wait").exists():
        time.sleep(0.1)
    return n
"""


# -- chapters of the book that are asked wrongly -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def own(tmp_path_factory):
    """A folder with a tiny model and a text for it."""
    folder = tmp_path_factory.mktemp("own")
    tiny.save(folder / "teacher", "gpt-neox")
    paragraphs = enumerate(tiny.text(200).split("\n\n"))
    lines = [json.dumps({"article": i // 3, "text": each}) for i, each in paragraphs]
    (folder / "text.jsonl").write_text("\n".join(lines), "utf-8")
    return folder


def model(name: str, command: str, *says: str, soak: bool = True, **options) -> Case:
    """A question about a tiny model, which chapter and model must refuse."""
    number, _, rest = command.partition(" ")
    given = "-p teacher {own}/teacher -p layer 1 -p corpus {own}/text.jsonl "
    return Case(f"run {number} {given}{rest}", says, seconds=WITH_MODEL, name=name, soak=soak, **options)


def no_config(house: House) -> None:
    (house.own / "teacher" / "config.json").unlink()


def cut_weights(house: House) -> None:
    path = house.own / "teacher" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def empty_corpus(house: House) -> None:
    (house.own / "text.jsonl").write_text("")


def no_corpus(house: House) -> None:
    (house.own / "text.jsonl").write_bytes(b"PK\x03\x04\0\0")


def own_sae(d: int, **config: object) -> Callable[[House], None]:
    """A dictionary that reads d numbers in `own/sae`, with its configuration changed."""

    def write(house: House) -> None:
        made = dictionary.topk_sae(d, 8, 2, generator=settings.generator(0))
        path = dictionary.save_saelens(made, house.own / "sae") / "cfg.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | config))

    return write


def cut_sae(house: House) -> None:
    own_sae(16)(house)
    path = house.own / "sae" / "sae_weights.safetensors"
    path.write_bytes(path.read_bytes()[:-9])


MODELS = [
    model("sae_width", "18 -p sae {own}/sae", "sae='", "maps 12 numbers to 12", "16 to 16, the width of teacher='",
          prepare=own_sae(12), soak=False),
    model("sae_unknown", "18 -p sae {own}/sae", "sae='", "architecture='temporal'", "allowed: 'standard', 'topk'",
          prepare=own_sae(16, architecture="temporal"), soak=False),
    model("sae_damaged", "18 -p sae {own}/sae", "sae='", "damaged", "allowed: a folder", prepare=cut_sae),
    model("sae_transcoder", "18 -p sae {own}/sae -p site resid_post", "site='resid_post'", "allowed: 'mlp_in'",
          prepare=own_sae(16, architecture="transcoder")),
    model("layer", "0 -p layer 99", "layer=99", "allowed: ", soak=False),
    model("layer_below", "0 -p layer -1", "layer=-1", "allowed: "),
    model("no_config", "0", "teacher='", "config.json", "allowed: ", prepare=no_config),
    model("cut_weights", "0", "teacher='", prepare=cut_weights),
    model("no_hub", "0 -p teacher no-such/model", "teacher='no-such/model'", environment={"HF_HUB_OFFLINE": "1"}),
    model("unknown_teacher", "0 -p teacher nowhere", "teacher='nowhere'", "allowed: "),
    model("unknown_corpus", "0 -p corpus nowhere", "corpus='nowhere'", "allowed: "),
    model("empty_corpus", "0", "corpus='", prepare=empty_corpus),
    model("corpus_no_text", "0", "corpus='", prepare=no_corpus),
    model("tokens_0", "1 -p n_tokens 0", "n_tokens=0", "allowed: "),
    model("tokens_below", "1 -p n_tokens -5", "n_tokens=-5", "allowed: "),
    model("k_beyond", "1 -p n_tokens 500 -p n_features 8 -p k 9", "k=9", "allowed: "),
    model("k_0", "1 -p n_tokens 500 -p k 0", "k=0", "allowed: "),
    model("features_0", "1 -p n_tokens 500 -p n_features 0", "n_features=0", "allowed: "),
    model("steps_0", "1 -p n_tokens 2000 -p n_features 32 -p k 2 -p steps 0", "steps=0", "allowed: "),
    asked("run 7 -p workers two", "workers='two'", "allowed: ", seconds=WITH_MODEL, soak=True),
    asked("run 3 -p device mps", "device='mps'", "allowed here: ", seconds=WITH_MODEL, soak=True),
    asked("run 7", "RANK1_SCHEDULER='tcp://127.0.0.1:9'", "no scheduler answers", "allowed: ", code=1, soak=True,
          seconds=WITH_MODEL, environment={"RANK1_SCHEDULER": "tcp://127.0.0.1:9"}, name="dead_scheduler"),
]  # fmt: skip


@pytest.mark.parametrize("case", marked(MODELS))
def test_a_chapter_refuses_by_the_parameter(house, case, own):
    shutil.copytree(own, house.own, dirs_exist_ok=True)
    answer(house, case, "_build", "cache")
    assert not [*house.cache.rglob("*.bin"), *house.cache.rglob("activations/*")], "said before any harvest"
    assert not [path for path in (house.root / "_build").glob("results/**/*") if path.is_file()]


# -- an output that cannot take what is said ---------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["--help"], ["run", "99"], ["verify", "99"]])
def test_an_answer_into_a_broken_pipe_is_no_traceback(house, arguments):
    for broken in ("stdout", "stderr"):
        read, write = os.pipe()
        os.close(read)
        other = {"stdout": "stderr", "stderr": "stdout"}[broken]
        process = house.start(arguments, **{broken: write, other: subprocess.PIPE})
        os.close(write)
        said = "".join(each or "" for each in process.communicate(timeout=60))
        assert "Traceback" not in said and "Exception ignored" not in said, said
        assert process.returncode in ((0, 1) if arguments == ["--help"] else (1, 2)), (broken, process.returncode)


@pytest.mark.parametrize("output", ["broken pipe", pytest.param("full", marks=pytest.mark.soak)])
def test_a_run_goes_on_when_its_output_takes_no_more(house, output):
    house.chapter()
    if output == "full":
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    process = house.start(["run", "1"], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    _, said = process.communicate(timeout=300)
    assert process.returncode == 0 and "Traceback" not in said and "Exception" not in said, said
    assert (house.root / "_build" / "results" / "quick" / "01_first.json").is_file()


# -- disks that are full or read-only ----------------------------------------------------------------------------------


@pytest.fixture
def disk(house):
    """`disk("size=1m")` is a small file system at `own/disk`; skips where none can be mounted."""
    place = house.own / "disk"
    place.mkdir()

    def mount(options: str) -> None:
        done = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", place], capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"no tmpfs can be mounted: {done.stderr.strip()}")

    yield mount
    subprocess.run(["umount", "-l", place], capture_output=True)


def fill(house: House) -> None:
    with pytest.raises(OSError), (house.own / "disk" / "filler").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(2**16))


WHERE = {
    "results_dir": ("run 1 -p results_dir {own}/disk", {}),
    "cache_dir": ("run 1 -p cache_dir {own}/disk/cache", {}),
    "RANK1_CACHE": ("run 1", {"RANK1_CACHE": "{own}/disk/cache"}),
}


@pytest.mark.parametrize("named", WHERE)
@pytest.mark.parametrize("how", ["full", "read-only"])
def test_a_disk_that_takes_nothing_is_refused_early_by_the_parameter(house, disk, named, how):
    house.chapter()
    (house.root / "_build").mkdir()
    disk("size=64k,nr_inodes=9" if how == "full" else "ro,size=64k")
    if how == "full":
        fill(house)
        for i in range(9):
            with suppress(OSError):
                (house.own / "disk" / str(i)).touch()
    command, environment = WHERE[named]
    says = "No space left on device" if how == "full" else "Read-only file system"
    before = house.state("own")
    environment = {name: filled(value, house) for name, value in environment.items()}
    done = house.run(*shlex.split(filled(command, house)), environment=environment)
    check_answer(done, asked(command, f"{named}='", says, "allowed: a folder of yours with room"))
    assert house.state("own") == before


KEEPS = "from helpers import kept\nx = kept.keep('things', k, lambda: 'x' * 10**6, cache_dir=cache_dir)"
FILLS = (
    "import pathlib\ntry:\n    pathlib.Path('{own}/disk/filler').write_bytes(bytes(2**24))\nexcept OSError:\n    pass"
)


@pytest.mark.soak
@pytest.mark.parametrize("where", ["build", "cache"])
def test_a_disk_that_fills_while_a_chapter_runs_is_named_and_leaves_nothing_half(house, disk, where):
    house.chapter(FILLS.replace("{own}", str(house.own)), KEEPS)
    disk("size=4m")
    if where == "build":
        (house.root / "_build").symlink_to(house.own / "disk")
    cache = house.cache if where == "build" else house.own / "disk" / "cache"
    done = house.run("run", "1", environment={"RANK1_CACHE": str(cache)})
    check_answer(done, bad("full", "01_first: ", "No space left on device", "allowed: "))
    assert not [path for folder in (house.cache, house.own) for path in folder.rglob("*.part")] and not house.left()
    (house.own / "disk" / "filler").unlink()
    house.chapter(KEEPS)
    check_answer(house.run("run", "1", environment={"RANK1_CACHE": str(cache)}), good())


@pytest.mark.soak
def test_a_cache_that_is_read_only_is_read_and_named_where_it_should_be_written(house, disk):
    house.chapter(KEEPS)
    disk("size=4m")
    cache = {"RANK1_CACHE": str(house.own / "disk")}
    check_answer(house.run("run", "1", environment=cache), good())
    subprocess.run(["mount", "-o", "remount,ro", house.own / "disk"], check=True)
    check_answer(house.run("run", "1", "--force", environment=cache), good())
    done = house.run("run", "1", "-p", "k", "5", environment=cache)
    check_answer(done, bad("read-only", "cannot be written: ", "Read-only", "allowed: a cache folder of yours"))
