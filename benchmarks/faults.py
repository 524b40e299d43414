"""What kills, full disks, flipped bytes and eight processes at once do to what is kept.

Every attempt is a process forked from this one, which has imported all and computed nothing. `python -m
benchmarks.faults 2 harvest fit` does each twice, for these works alone.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks import common
from helpers import kept, settings
from helpers.dictionary import topk_sae
from helpers.models import activations, layerwise, sources, store, teachers
from helpers.parts import mixture
from helpers.press.claims import environment
from helpers.study.scores import by_group, evaluate
from helpers.study.study import Arm, Judged, run, study
from helpers.training import Run, Shuffled, fit, remedies
from tests import tiny

# -- the works: each is done in a cache folder and gives a digest of what came of it -----------------------------------


def convert(base: Path, cache: Path) -> str:
    return contents(sources.folder("book-moe@256", cache_dir=cache))


def convert_gemma(base: Path, cache: Path) -> str:
    return contents(sources.gemma(cache))


def harvest(base: Path, cache: Path) -> str:
    teacher = teachers.load(str(base / "neox"), device="cpu")
    return _harvested(teacher, base, cache, layer=[0, 2], sites=("mlp_in", "resid_post"))


def harvest_layerwise(base: Path, cache: Path) -> str:
    """The second harvest goes on from where the first one left the text."""
    teacher = layerwise.load(str(base / "llama"), device="cpu")
    return "".join(_harvested(teacher, base, cache, layer=layer) for layer in (1, 2))


def _harvested(teacher, base: Path, cache: Path, layer, **options) -> str:
    options |= {"n_tokens": 4_000, "max_length": 32, "batch_size": 4, "cache_dir": cache}
    found = activations.harvest(teacher, str(base / "text.jsonl"), layer=layer, **options)
    found = found if isinstance(found, dict) else {layer: found}
    return kept.digest(*(part for each in found.values() for part in (each.rows, *(each[s] for s in each.sites))))


@dataclass(frozen=True)
class Toy:
    """Rows that students give back, judged on ten groups of others."""

    steps: int = 40

    def rows(self, seed: int) -> torch.Tensor:
        return torch.randn(2_000, 16, generator=settings.generator(seed)) + 1

    def stream(self, seed: int, device: torch.device) -> Shuffled:
        return Shuffled(self.rows(0), batch_size=64, seed=seed, device=device, fingerprint="toy")

    def judge(self, student, seed: int) -> Judged:
        worked("judge")
        after, group = evaluate(student, self.rows(2)), torch.arange(2_000) // 200
        sums = {"errors": by_group(after.squared_error, group), "norms": by_group(after.squared_norm, group)}
        return Judged(sums, {"fvu": evaluate(student, self.rows(1)).fvu})


def sae(problem: Toy, seed: int, k: int = 4):
    return topk_sae(16, 128, k, generator=settings.generator(seed))


ARMS = [Arm("plain", sae), Arm("wider", partial(sae, k=8)), Arm("switch", sae, remedies.Switch(0.1), lr=1e-2)]


def training(base: Path, cache: Path) -> str:
    """Two students side by side, kept after every step or so."""
    students = {name: sae(Toy(), seed) for seed, name in enumerate(("plain", "switch"))}
    balance = {"plain": remedies.Balance(), "switch": remedies.Switch(0.1)}
    options = {"steps": 80, "balance": balance, "checkpoint_seconds": 0.02, "cache_dir": cache}
    found = fit(students, Toy().stream(0, torch.device("cpu")), **options).values()
    return kept.digest(*(t for each in found for t in each.student.state_dict().values()), str([f.loss for f in found]))


def trial(base: Path, cache: Path) -> str:
    return _outcomes([each for seed in range(2) for each in run(Toy(), ARMS, seed, cache_dir=cache, cells=cache / "c")])


def sweep(base: Path, cache: Path) -> str:
    found = study(Toy(), ARMS, range(2), workers=2, cache_dir=cache)
    return _outcomes([each for name in found for each in found[name]])


def _outcomes(found: list) -> str:
    return kept.digest(json.dumps([[each.validation, each.curve, each.sums["errors"].tolist()] for each in found]))


def pretraining(base: Path, cache: Path) -> str:
    corpus = str(base / "text.jsonl")
    size = mixture.Size(d_model=16, n_layers=2, n_heads=2, n_experts=4, top_k=2, d_ff=8, vocabulary=300)
    often = {"warmup": 2, "checkpoints": (0, 15), "log_every": 5, "validate_every": 20, "n_validation": 60}
    recipe = mixture.PretrainingRecipe(steps=30, batch_size=4, length=32, dropout=0.1, **often)
    mixture.CHECKPOINT_SECONDS = 0.05
    bpe = mixture.tokenizer(corpus, size.vocabulary, cache_dir=cache)
    found = mixture.pretrain(size.mixture(), bpe, corpus, recipe, device="cpu", cache_dir=cache)
    return contents(*found.checkpoints.values()) + kept.digest(str(found.curve))


def book(base: Path, cache: Path) -> str:
    """`python -m helpers book` in a small copy of this repository, in a process of its own."""
    code = [sys.executable, "-m", "helpers", "book"]
    where = {"cwd": cache, "env": os.environ | {"PYTHONPATH": str(cache)}}
    asked = subprocess.Popen(code, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **where)
    say(f"pid {asked.pid} ")
    told, _ = asked.communicate()
    settings.allowed(not asked.returncode, told[-2000:], "a book")
    return kept.digest(*pages_of(cache))


def pages_of(root: Path) -> list[str]:
    """The pages of a book, less times and seconds; the page on performance says how long this very book took."""
    places = sorted((root / "_build" / "html").rglob("*.html"))
    less = {path: r"[0-9.]" if path.name == "performance.html" else r"[0-9]+ s on|[0-9T:+-]{16,}" for path in places}
    return [f"{path.name} {re.sub(less[path], '', path.read_text())}" for path in places]


@dataclass(frozen=True)
class Work:
    """What is done in a cache folder. `from_` names a folder that the cache is a copy of at first; `flips` are files
    that are tried, a pattern; `together`: eight processes do it at once; `slow`: no part of a sample."""

    do: Callable[[Path, Path], str]
    from_: str = ""
    flips: str = "."
    together: bool = True
    slow: bool = False


WORKS = {
    "conversion (8 bits)": Work(convert),
    "conversion (Gemma)": Work(convert_gemma, slow=True),
    "harvest": Work(harvest),
    "harvest, layer by layer": Work(harvest_layerwise),
    "fit": Work(training),
    "trial": Work(trial),
    "mixture training": Work(pretraining),
    "sweep": Work(sweep, flips="^$", together=False, slow=True),
    "book": Work(book, "book", "^_build/(executed|results)/", together=False, slow=True),
}


def prepare(base: Path) -> None:
    """Two tiny teachers, a corpus, and a repository with one chapter."""
    tiny.save(base / "neox", "gpt-neox")
    tiny.save(base / "llama", "llama")
    rows = [{"article": i // 3, "text": each} for i, each in enumerate(tiny.text(900).split("\n\n"))]
    (base / "text.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    tiny.repository(base / "book")


# -- processes ---------------------------------------------------------------------------------------------------------

MARK = "RANK1_FAULTS"
_log: int | None = None
_says = 2


def worked(what: str) -> None:
    """Note that a piece of work was done, where the process counts them."""
    if _log is not None:
        os.write(_log, f"{what}\n".encode())


def say(what: str) -> None:
    """To the process that watches this one: `pid N`, which shall be killed in its place."""
    os.write(_says, what.encode())


class Attempt:
    """A process that does a work. It says when it begins, and what came of it in one line of JSON."""

    def __init__(self, do: Callable[[], str], *, log: Path | None = None, largest: int | None = None):
        self.said, says = os.pipe()
        self.answer, self.over, self.started = b"", False, 0.0
        self.child = os.fork()
        if not self.child:
            os.close(self.said)
            self._live(do, says, log, largest)
        os.close(says)
        self._read()
        self.started = time.monotonic()

    def _live(self, do: Callable[[], str], says: int, log: Path | None, largest: int | None) -> None:
        global _log, _says
        try:
            _says = says
            _log = log and os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.environ[MARK] = str(os.getppid())
            os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
            if largest is not None:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            say("begun ")
            try:
                told = {"digest": do()}
            except Exception as error:
                told = {"kind": type(error).__name__, "error": str(error)}
            say(json.dumps(told))
        finally:
            os._exit(0)

    def _read(self, seconds: float = 600.0) -> bool:
        """Whether it says something more, or comes to its end, within so many seconds."""
        if not select.select([self.said], [], [], seconds)[0]:
            return False
        more = os.read(self.said, 1 << 20)
        self.answer, self.over = self.answer + more, not more
        return True

    def killed(self, after: float) -> bool:
        """Kill it after so many seconds; whether it was still at work."""
        deadline = time.monotonic() + after
        while b"{" not in self.answer and not self.over and (left := deadline - time.monotonic()) > 0:
            self._read(left)
        at_work, other = b"{" not in self.answer and not self.over, re.search(rb"pid (\d+) ", self.answer)
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(other[1]) if other else self.child, signal.SIGKILL)
        self._end()
        return at_work

    def ended(self) -> dict[str, str]:
        """What it says at its end: a digest, or the kind of an error and its message."""
        while not self.over:
            self._read()
        self._end()
        _, found, told = self.answer.partition(b"{")
        return json.loads(found + told) if found else {"kind": "silence", "error": "the process said nothing"}

    def _end(self) -> None:
        os.waitpid(self.child, 0)
        os.close(self.said)


def survivors() -> list[int]:
    """Processes that a killed one had started and that did not end with it."""
    found, mark = [], f"{MARK}={os.getpid()}".encode()
    for place in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


# -- what lies in a cache ----------------------------------------------------------------------------------------------


def contents(*folders: Path) -> str:
    """Digest of the files of folders, less the seal, which holds times."""
    files = [path for folder in folders for path in sorted(folder.rglob("*")) if path.name != kept.SEAL]
    return kept.digest(*(part for path in files if path.is_file() for part in (path.name, path.read_bytes())))


STAGE = "/_build/stage/"


def files_of(cache: Path) -> list[Path]:
    """Files under their names; hidden ones are being written, or locks, and a stage is laid anew by every build."""
    every = sorted(path for path in cache.rglob("*") if path.is_file() and STAGE not in str(path))
    return [path for path in every if not any(part.startswith(".") for part in path.relative_to(cache).parts)]


def broken(cache: Path) -> list[str]:
    """What is half there, by the book's own checks: kept files, sealed folders, stores of activations, JSON."""
    found = []
    for path in files_of(cache):
        try:
            if path.suffix == ".kept":
                check, _, payload = path.read_bytes().removeprefix(kept.MAGIC).partition(b"\n")
                good = kept.digest(payload).encode() == check and settings.header(payload)["key"] == path.stem
                settings.allowed(good, path.name, "a whole file")
            elif path.name == kept.SEAL:
                kept.check_sealed(path.parent, path.parent.name)
            elif path.name == store.INDEX:
                files = store.Files(path.parent)
                for name in files.index["checks"]:
                    files.verify(name)
            elif path.suffix == ".json":
                json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, OSError) as error:
            found.append(f"{path}: {error}")
    models = {path.parent for path in files_of(cache) if path.suffix == ".safetensors"}
    return found + [f"{place} has no seal" for place in models if not (place / kept.SEAL).is_file()]


def size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def left_over(cache: Path) -> list[str]:
    """What is neither kept nor a lock."""
    hidden = (path for path in cache.rglob(".*") if STAGE not in str(path))
    return [str(path) for path in hidden if path.is_dir() or path.suffix == ".part"]


# -- the faults --------------------------------------------------------------------------------------------------------

NOT_KEPT = re.compile(r"cannot be written|are free|No space left on device; allowed")
SENTENCES = re.compile(r"damaged|not what it was")


class Trials:
    """Faults tried on one work. `row` counts them, and what must not happen; `bad` says what did."""

    def __init__(self, work: Work, base: Path, scratch: Path, draw: random.Random):
        self.work, self.base, self.scratch, self.draw, self.bad = work, base, scratch, draw, []
        self.whole = self.fresh("whole")
        attempt = self.start(self.whole, log=scratch / "alone")
        told = attempt.ended()
        settings.allowed("digest" in told, f"{scratch.name}: {told}", "a work that comes to its end")
        self.digest = told["digest"]
        self.seconds = time.monotonic() - attempt.started
        self.before = size(base / work.from_) if work.from_ else 0
        self.bytes = size(self.whole) - self.before
        self.row: dict[str, Any] = {"seconds": self.seconds}

    def fresh(self, name: str) -> Path:
        place = self.scratch / name
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir(parents=True)
        self.fill(place)
        return place

    def fill(self, place: Path) -> None:
        """What is there at first."""
        if self.work.from_:
            shutil.copytree(self.base / self.work.from_, place, dirs_exist_ok=True)

    def start(self, cache: Path, **options) -> Attempt:
        return Attempt(lambda: self.work.do(self.base, cache), **options)

    def note(self, column: str, bad: Iterable[str] = ()) -> None:
        bad = list(bad)
        self.row[column] = self.row.get(column, 0) + len(bad)
        self.bad += [f"{column}: {each}" for each in bad]

    def look(self, cache: Path) -> None:
        self.note("half files", broken(cache))
        if (cache / "_build" / "html").exists() and kept.digest(*pages_of(cache)) != self.digest:
            self.note("half files", ["pages"])

    def end(self, cache: Path, told: Mapping[str, str] | None = None) -> None:
        """Let it go to its end: to the bit what it is uninterrupted, with nothing beside it."""
        told = told or self.start(cache).ended()
        self.row["ends compared"] = self.row.get("ends compared", 0) + 1
        self.note("ends that differ", [] if told.get("digest") == self.digest else [str(told)])
        self.look(cache)
        self.note("left over", left_over(cache))

    def kills(self, times: int) -> None:
        """Killed and started again at once, until it comes to its end; then from nothing again."""
        cache, self.row["kills"] = self.fresh("killed"), 0
        for _ in range(5 * times):
            if self.row["kills"] == times:
                break
            attempt = self.start(cache)
            if attempt.killed(self.draw.uniform(0, self.seconds)):
                self.row["kills"] += 1
                self.look(cache)
            else:
                self.end(cache)
                cache = self.fresh("killed")
                if self.work.from_:  # a book that replaces a former one
                    shutil.copytree(self.whole / "_build" / "html", cache / "_build" / "html")
        self.end(cache)
        deadline = time.monotonic() + 30
        while (left := survivors()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.note("processes left", map(str, left))

    def full_disks(self, times: int) -> None:
        """A disk that is full after so many bytes, and has room again afterwards."""
        for _ in range(times):
            self.row["full disks"] = self.row.get("full disks", 0) + 1
            room = 2 * self.before + self.draw.randrange(1, self.bytes)
            with disk(self.fresh("disk"), room) as (cache, options, grow):
                self.fill(cache)
                told = self.start(cache, **options).ended()
                ours = told.get("kind") in OURS and "Traceback" not in told["error"]
                named = "digest" in told or ours and NOT_KEPT.search(told["error"])
                self.note("without our sentence", [] if named else [str(told)])
                self.look(cache)
                self.note("left over", left_over(cache))
                grow()
                self.end(cache)

    def flips(self, times: int) -> None:
        """One bit of a file of each kind, the other files of the cache there or (where all were made) not."""
        whole = {str(path.relative_to(self.whole)): path for path in files_of(self.whole) if path.stat().st_size}
        kinds = {
            re.sub(r"[0-9a-f]{12,}|\d+", "*", name): path
            for name, path in whole.items()
            if re.search(self.work.flips, name)
        }
        for place in kinds.values():
            for alone in ((False,) if self.work.from_ else (False, True)) * times:
                cache = self.fresh("flipped") / "cache"
                shutil.copytree(self.whole, cache)
                path = cache / place.relative_to(self.whole)
                for each in cache.glob("*/*") if alone else ():
                    if each not in (path, *path.parents):
                        shutil.rmtree(each) if each.is_dir() else each.unlink()
                content = bytearray(path.read_bytes())
                content[self.draw.randrange(len(content))] ^= 1
                path.write_bytes(content)
                told = self.start(cache).ended()
                self.row["flipped bytes"] = self.row.get("flipped bytes", 0) + 1
                named = told.get("kind") in OURS and SENTENCES.search(told["error"])
                fine = named or told.get("digest") == self.digest
                self.note("not noticed", [] if fine else [f"{place.relative_to(self.whole)}: {told}"])
                self.row["named"] = self.row.get("named", 0) + bool(named)

    def together(self, processes: int = 8) -> None:
        """All at once, from nothing: how much work is done, of what one alone does."""
        cache, log = self.fresh("together"), self.scratch / "log"
        log.unlink(missing_ok=True)
        attempts = [self.start(cache, log=log) for _ in range(processes)]
        for told in [attempt.ended() for attempt in attempts]:  # looked at when none is writing any more
            self.end(cache, told)
        done, alone = (len(path.read_text().split()) for path in (log, self.scratch / "alone"))
        self.row["work of 8 at once / alone"] = done / alone


OURS = "ValueError", "RuntimeError"


@contextmanager
def disk(place: Path, room: int | str) -> Iterator[tuple[Path, dict, Callable[[], None]]]:
    """A folder with so much room, what its processes need for that, and how it gets more. A file system in memory where
    one can be mounted; else no file may grow beyond `room`."""
    mount = ["mount", "-t", "tmpfs", "-o", f"size={room}", "tmpfs", place]
    if MOUNTS:
        subprocess.run(mount, check=True)
        try:
            yield place, {}, lambda: subprocess.run(["mount", "-o", "remount,size=4g", place], check=True)
        finally:
            subprocess.run(["umount", "-l", place], check=True)
    else:
        yield place, {"largest": room}, lambda: None


def can_mount() -> bool:
    with tempfile.TemporaryDirectory() as place:
        done = subprocess.run(["mount", "-t", "tmpfs", "tmpfs", place], capture_output=True, check=False)
        return not done.returncode and not subprocess.run(["umount", place], check=False).returncode


MOUNTS = False


def counted(owner: Any, name: str) -> None:
    """Have a function say that it was called."""
    function = getattr(owner, name)

    def counting(*args, **options):
        worked(name)
        return function(*args, **options)

    setattr(owner, name, counting)


COLUMNS = (
    "seconds", "kills", "half files", "left over", "processes left", "full disks", "without our sentence",
    "flipped bytes", "named", "not noticed", "ends compared", "ends that differ", "work of 8 at once / alone",
)  # fmt: skip
NEVER = {
    "half files": ("half files after a kill or on a full disk", ("kills", "full disks")),
    "left over": ("unfinished files left behind", ("kills", "full disks")),
    "processes left": ("processes that outlived the one that was killed", ("kills",)),
    "without our sentence": ("full disks without a sentence that names the file", ("full disks",)),
    "not noticed": ("flipped bytes that changed a result without a word", ("flipped bytes",)),
    "ends that differ": ("ends that are not to the bit what an uninterrupted work gives", ("ends compared",)),
}
"""What must not happen, and the columns that count how often it could have."""


def measure(names: Iterable[str], times: int) -> Iterator[tuple[dict[str, Any], list[str]]]:
    """A row for each work, and what went wrong."""
    global MOUNTS
    MOUNTS = can_mount()
    torch.set_num_threads(1)
    for owner, name in (
        (store.Files, "append"), (Run, "train_step"), (mixture.Pretraining, "update"), (settings, "new_folder")
    ):  # fmt: skip
        counted(owner, name)
    with tempfile.TemporaryDirectory(prefix="rank1-faults-") as place, disk(Path(place), "8g") as (scratch, *_):
        base, draw = scratch / "base", random.Random(0)
        Attempt(lambda: prepare(base) or "").ended()
        for name in names:
            work = WORKS[name]
            trials = Trials(work, base, scratch / name.replace(" ", "-"), draw)
            trials.kills(times)
            trials.full_disks(times)
            trials.flips(1)
            if work.together:
                trials.together()
            yield {"work": name} | {column: trials.row.get(column) for column in COLUMNS}, trials.bad
            shutil.rmtree(trials.scratch, ignore_errors=True)


def write(rows: list[dict[str, Any]]) -> None:
    """The record, in the order of `WORKS`; rows of works that were not done again stay."""
    path = common.RESULTS / "faults.json"
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    found = {row["work"]: row for row in (*before, *rows)}
    rows = [found[name] for name in WORKS if name in found]
    total = {column: sum(row[column] or 0 for row in rows) for column in COLUMNS}
    twice = max(row[COLUMNS[-1]] or 0 for row in rows if row["work"] != "trial")
    common.write(
        "faults",
        title="Reliability",
        question="What do a kill, a full disk, a flipped byte and eight processes at once do to what is kept?",
        rows=rows,
        targets=[
            common.at_most(f"{what}, of {' and '.join(f'{total[each]} {each}' for each in of)}", total[column], 0)
            for column, (what, of) in NEVER.items()
        ]
        + [common.at_most("work of 8 processes that ask for the same, of one's, trials apart", twice, 1)],
        note="Tiny random teachers, except for the conversions. Kills (SIGKILL) come at random moments of the time "
        "that a work takes alone; it is started again at once, until it ends. Full disks are file systems in memory "
        "with a random part of the room that is needed; they then grow. Flipped bytes: a bit of a file of each kind, "
        "with and without the others; what is not named was not needed, or its chapter ran again. A file whose size "
        "and time are as noted is taken to be whole: a byte that rots on the disk itself is found by `verify` alone. "
        "Of a trial each of eight processes judges for itself what was trained once. Each line was made at its own "
        "commit.",
        device="cpu",
    )


def main() -> None:
    """All works, or `SIZE WORK …`."""
    times, names = int((sys.argv[1:] or ["20"])[0]), sys.argv[2:] or list(WORKS)
    commit = environment("cpu")["commit"]
    for row, bad in measure(names, times):
        print(row, *bad[:20], sep="\n   ", flush=True)
        write([row | {"commit": commit}])


if __name__ == "__main__":
    from benchmarks import faults

    faults.main()
