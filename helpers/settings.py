"""Where things lie, what they run on, how randomness enters, and how files are written: whole or not at all."""

from __future__ import annotations

import ast
import json
import os
import re
import tempfile
import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from platformdirs import user_cache_path
from tqdm.auto import tqdm

if TYPE_CHECKING:  # it takes a second, which the command line does without
    import torch

ROOT = Path(__file__).resolve().parent.parent
"""The repository. Notebooks resolve paths from here, because papermill and nbval start them in different folders."""

CacheDir = str | Path | None | Literal[False]
"""Where results are kept: None is the user's cache folder, False is nowhere."""

CORES = "RANK1_CORES"
"""Environment variable with the cores that a process takes as its own, fewer than the machine has."""


def cores() -> int:
    """Cores for this process: all that it may use, or `RANK1_CORES`, which chapters side by side share out."""
    # macOS has no affinity
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    asked = os.environ.get(CORES) or str(usable)
    allowed(asked.isdigit() and int(asked) > 0, f"{CORES}={asked!r}", "a whole number, at least 1")
    return int(asked)


NOTES = "RANK1_NOTES"
"""Environment variable with a file to which processes add lines: `asked kind key`, and `made kind seconds`."""


def note(line: str) -> None:
    """Add a line for whoever runs this process and wants to know; without `RANK1_NOTES` nobody does."""
    if place := os.environ.get(NOTES):
        with open(place, "a", encoding="utf-8") as file:  # short lines are added whole, whoever else adds some
            file.write(f"{line}\n")


# -- folders, bars, names ----------------------------------------------------------------------------------------------


def cache_dir(folder: str | Path | None = None) -> Path:
    """Folder for converted models, harvested activations and trained dictionaries; created when missing.

    `folder` wins over the environment variable `RANK1_CACHE`, which wins over the user's cache folder. Raises
    `ValueError` naming a place where no folder can be.
    """
    named, chosen = ("cache_dir", folder) if folder else ("RANK1_CACHE", os.environ.get("RANK1_CACHE"))
    try:
        chosen = chosen or user_cache_path("rank1-book")
    except RuntimeError as error:
        raise ValueError("RANK1_CACHE is not set, and there is no home folder; allowed: a full path") from error
    return made(named, place(named, chosen))


def place(parameter: str, value: str | Path) -> Path:
    """The full path that a parameter names; `ValueError` where the user that `~` stands for has no home folder."""
    try:
        return Path(value).expanduser().resolve()
    except (RuntimeError, OSError) as error:
        why = "there is no home folder" if isinstance(error, RuntimeError) else error.strerror
        raise ValueError(f"{parameter}={str(value)!r}: {why}; allowed: a full path") from error


def made(parameter: str, folder: Path, to_write: bool = False) -> Path:
    """`folder`, made where it is missing; `ValueError` where none can be, or `to_write` and nothing can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if to_write:
            with tempfile.TemporaryFile(dir=folder) as file:
                file.write(b"1")
    except OSError as error:
        what = "a folder of yours with room, or where one can be made"
        raise ValueError(f"{parameter}={str(folder)!r}: {error.strerror}; allowed: {what}") from error
    return folder


def progress(*args, **options) -> tqdm:
    """A progress bar, unless `TQDM_DISABLE` is set, as it is while chapters run; in a notebook tqdm forgets to look."""
    return tqdm(*args, **{"disable": bool(os.environ.get("TQDM_DISABLE")), "mininterval": 2} | options)


_PARSING = threading.Lock()


def parsed(source: str) -> ast.Module:
    """The syntax tree, one at a time: Python 3.11 counts the depth of trees that two threads build as if they were one,
    and stops (`SystemError`, CPython issue 106905)."""
    with _PARSING:
        return ast.parse(source)


def profile() -> str:
    """Name of the profile a chapter runs under (`RANK1_PROFILE`, set by the runner; `quick` in a plain Jupyter)."""
    return os.environ.get("RANK1_PROFILE", "quick")


def results_dir(folder: str | Path | None = None) -> Path:
    """Folder where a chapter writes its records: `folder`, or `_build/results/<profile>` of the repository."""
    path = place("results_dir", folder) if folder else ROOT / "_build" / "results" / profile()
    return made("results_dir", path, to_write=True)


def allowed(good: bool, given: str, what: str) -> None:
    """`ValueError` unless `good`: `given` names the parameter and its value, `what` says what is allowed."""
    if not good:
        raise ValueError(f"{given}; allowed: {what}")


def one_of(name: str, value: Any, options: Iterable) -> None:
    """`ValueError` unless `value` is among `options`."""
    options = list(options)
    allowed(value in options, f"{name}={value!r} is unknown", ", ".join(map(repr, options)))


# -- devices and randomness --------------------------------------------------------------------------------------------


def check_device(name: str) -> None:
    """`ValueError` unless it is the name of a device, here or elsewhere."""
    good = re.fullmatch(r"auto|cpu|mps|cuda(:\d\d?)?", name) is not None
    allowed(good, f"device={name!r} is not a device", "'auto', 'cpu', 'cuda', 'cuda:N', 'mps'")


def device(name: str = "auto") -> torch.device:
    """`auto` is a GPU when there is one, else the CPU. An accelerator that is not there raises `ValueError`."""
    import torch

    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chosen = torch.device(name)
    cuda = torch.cuda.device_count() > (chosen.index or 0)
    there = {"cpu": True, "cuda": cuda, "mps": torch.backends.mps.is_available()}
    if not there.get(chosen.type, False):
        here = ["auto", *(kind for kind, ok in there.items() if ok)]
        raise ValueError(f"device={name!r} is not on this machine; allowed here: {', '.join(here)}")
    return chosen


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh random stream: the same seed gives the same numbers on the same machine."""
    import torch

    return torch.Generator(device=device).manual_seed(seed)


def mix(seed: int, counter: int) -> int:
    """A well-spread seed for each (seed, counter), so that neighbouring streams do not overlap.

    PyTorch's CPU generator reads only the low 32 bits of a seed; all of them depend on both numbers here.
    """
    return int(np.random.SeedSequence([seed, counter]).generate_state(1, np.uint64)[0] >> 1)


# -- files that are whole or not there ---------------------------------------------------------------------------------


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A place beside `path` to write to, which takes its name when the block ends well.

    A reader, or a kill, sees the old file or the new one. Raises `ValueError` naming a file that cannot be written.
    """
    aside = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
        os.close(handle)
        aside = Path(name)
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        aside.chmod(0o644)  # mkstemp makes files only their owner can read
        os.replace(aside, path)
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror or error}; allowed: a folder with room") from error
    finally:
        if aside is not None:
            aside.unlink(missing_ok=True)


def write(path: Path, content: bytes) -> None:
    """`content` in the file `path`, whole or not at all."""
    with written(path) as aside:
        aside.write_bytes(content)


def write_json(path: Path, content: Any) -> None:
    """`content` as JSON in the file `path`, whole or not at all; arrays and tensors become lists."""
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False, default=as_json)
    write(path, (text + "\n").encode())


def as_json(value: Any) -> Any:
    """A path, or a scalar, an array or a tensor, as JSON has it: for `json.dumps(default=…)`."""
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # NumPy and torch scalars and arrays
        return value.tolist()
    raise TypeError(f"{type(value).__name__} cannot be written as JSON: {value!r}")


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """A folder that appears under its name when it is complete. One that is there already is replaced."""
    aside = {"dir": target.parent, "prefix": f".{target.name}.", "ignore_cleanup_errors": True}
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(**aside) as name:
            old, new = Path(name, "old"), Path(name, "new")
            new.mkdir()
            yield new
            for path in (new, *new.rglob("*")):  # safetensors makes files that only their owner can read
                path.chmod(0o755 if path.is_dir() else 0o644)
            if target.is_dir():
                os.replace(target, old)
            os.replace(new, target)
    except Exception as error:
        if not isinstance(error, OSError) and "os error" not in str(error):
            raise  # the words are those of libraries in Rust (safetensors, tokenizers) for what is an OSError
        why = getattr(error, "strerror", None) or error
        raise ValueError(f"{target} cannot be written: {why}; allowed: a folder with room") from error


# -- trees of numbers, texts, arrays and tensors, as bytes without pickle ---------------------------------------------


def packed(tree: Any, about: Mapping[str, str]) -> bytes:
    """A tree as the bytes of a safetensors file: its numbers and texts are JSON in the header. See `unpacked`."""
    import torch
    from safetensors.torch import save

    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, torch.Tensor | np.ndarray):
            kind, name = ("numpy" if isinstance(value, np.ndarray) else "torch"), str(len(tensors))
            held = torch.from_numpy(np.array(value, order="C")) if kind == "numpy" else value.detach().clone()
            tensors[name] = held.cpu().contiguous()
            return {kind: name}
        if isinstance(value, Mapping):
            return {"items": [[plain(key), plain(each)] for key, each in value.items()]}
        if isinstance(value, tuple):
            return {"tuple": [plain(each) for each in value]}
        if isinstance(value, list):
            return [plain(each) for each in value]
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise TypeError(f"{type(value).__name__} cannot be kept: {value!r}")

    text = json.dumps(plain(tree))
    return save(tensors or {"": torch.zeros(0)}, {**about, "tree": text})


def header(payload: bytes) -> dict[str, str]:
    """What a safetensors file says about itself."""
    length = int.from_bytes(payload[:8], "little")
    return json.loads(payload[8 : 8 + length])["__metadata__"]


def unpacked(payload: bytes) -> Any:
    """The tree of `packed`."""
    from safetensors.torch import load

    tensors = load(payload)
    tree = json.loads(header(payload)["tree"])

    def restored(value: Any) -> Any:
        if isinstance(value, list):
            return [restored(each) for each in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "items":
            return {restored(key): restored(each) for key, each in content}
        if kind == "tuple":
            return tuple(restored(each) for each in content)
        return tensors[content].numpy() if kind == "numpy" else tensors[content]

    return restored(tree)
