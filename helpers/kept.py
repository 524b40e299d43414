"""What is computed once: under a key of what was asked for, of the code that makes it and of the libraries' versions.

`keep` is the way to do it, `keep_folder` the same for files, and `Kept` for what takes long and goes on after a kill.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import inspect
import json
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from safetensors.torch import load, save

from helpers import settings
from helpers.settings import ROOT, CacheDir

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy")
"""Packages whose version is part of every key: another one may give other numbers."""


# -- keys: what was asked for, and the code that answers ---------------------------------------------------------------


def digest(*parts: Any) -> str:
    """Hash of bytes, tensors, arrays and texts, in their order."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        found.update(
            part.encode() if isinstance(part, str) else np.ascontiguousarray(part) if _is_array(part) else part
        )
    return found.hexdigest()


def _is_array(value: Any) -> bool:
    return isinstance(value, np.ndarray)


def described(value: Any, makers: set[Any] | None = None) -> Any:
    """A value as plain JSON, for a key. Classes and functions that occur in it are added to `makers`.

    Of an object with a property `asked` that counts, of another dataclass every field but those with `compare=False`,
    of tensors and arrays their content. Raises `TypeError` for what cannot be told apart by its content.
    """
    makers = set() if makers is None else makers
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value)
    if isinstance(value, torch.Tensor) or _is_array(value):
        return [str(value.dtype), list(value.shape), digest(value)]
    if hasattr(type(value), "asked"):
        makers.add(type(value))
        return [type(value).__qualname__, described(value.asked, makers)]
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        makers.add(type(value))
        fields = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.compare}
        return [type(value).__qualname__, described(fields, makers)]
    if isinstance(value, Mapping):
        return sorted([described(k, makers), described(v, makers)] for k, v in value.items())
    if isinstance(value, list | tuple | range):
        return [described(each, makers) for each in value]
    if isinstance(value, set | frozenset):
        return sorted(described(each, makers) for each in value)
    if isinstance(value, functools.partial):
        return [described(each, makers) for each in (value.func, value.args, value.keywords)]
    if callable(value) and hasattr(value, "__qualname__"):
        makers.add(value)
        bound = getattr(value, "__self__", None)
        return [value.__qualname__, None if isinstance(bound, ModuleType) else described(bound, makers)]
    if isinstance(getattr(value, "fingerprint", None), str):
        makers.add(type(value))
        return [type(value).__qualname__, value.fingerprint]
    raise TypeError(f"{type(value).__name__} cannot be part of a key: {value!r}")


def code_of(*makers: Any) -> str:
    """Hash of the import closures of modules, classes and functions, as syntax trees: see `closure`.

    What is defined elsewhere than in `helpers` (a notebook, a test) counts by its own source.
    """
    modules, own = set(), []
    for maker in makers:
        maker = maker.func if isinstance(maker, functools.partial) else maker
        name = maker.__name__ if isinstance(maker, ModuleType) else getattr(maker, "__module__", None) or ""
        if name.split(".")[0] == "helpers":
            modules.add(name)
        elif name.split(".")[0] not in sys.stdlib_module_names | set(LIBRARIES) - {"__main__"} or name == "__main__":
            own.append(f"{name}.{getattr(maker, '__qualname__', '')}: {_own_source(maker)}")
    return digest(*(f"{name} {tree_of(name)}" for name in closure(*modules)), *sorted(own))


def _own_source(maker: Any) -> str:
    try:
        return inspect.getsource(maker)
    except (OSError, TypeError):
        return ""


def closure(*modules: str, root: Path | None = None) -> list[str]:
    """These modules of `helpers` and all that they import, directly or not, wherever in the file the import stands."""
    found, waiting = set(), set(modules)
    while waiting:
        module = waiting.pop()
        found.add(module)
        waiting |= imports_of(module, root) - found
    return sorted(found)


def module_file(module: str, root: Path | None = None) -> Path | None:
    """The file of a module of `helpers`; None where there is none."""
    base = (root or ROOT).joinpath(*module.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def imports_of(module: str, root: Path | None = None) -> set[str]:
    """Modules of `helpers` that a module imports itself."""
    tree = _parsed(module_file(module, root))
    if not hasattr(tree, "imports"):  # a study asks for hundreds of keys
        tree.imports = imports_in(tree, root)
    return tree.imports


def imports_in(tree: ast.AST, root: Path | None = None) -> set[str]:
    """Modules of `helpers` that a piece of code imports, packages on the way included."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names |= {node.module, *(f"{node.module}.{each.name}" for each in node.names)}
    inside = {name for name in names if name.split(".")[0] == "helpers"}
    parents = {".".join(name.split(".")[:i]) for name in inside for i in range(2, name.count(".") + 1)}
    return {name for name in inside | parents if name != "helpers" and module_file(name, root)}


def tree_of(module: str, root: Path | None = None) -> str:
    """A module's syntax tree as text: comments, docstrings and layout do not count."""
    return _stripped(_parsed(module_file(module, root)))


def _parsed(path: Path) -> ast.Module:
    return _parse(path, path.stat().st_mtime_ns, path.stat().st_size)


@cache
def _parse(path: Path, changed: int, size: int) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _stripped(tree: ast.AST) -> str:
    if not hasattr(tree, "stripped"):
        for node in ast.walk(tree):
            body = getattr(node, "body", None)
            if isinstance(body, list):
                node.body = [each for each in body if not _is_text(each)] or [ast.Pass()]
        tree.stripped = ast.dump(tree)
    return tree.stripped


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# -- what is computed once ---------------------------------------------------------------------------------------------

MAGIC = b"rank1 kept 1\n"


class Kept:
    """One thing in the cache: where it lies, read and written whole, its lock, and what was asked for.

    Args:
        kind: folder of the cache.
        what: all that was asked for; see `described`.
        makers: modules, classes or functions that make it, beside those that occur in `what`.
    """

    def __init__(self, kind: str, what: Any, *makers: Any, cache_dir: CacheDir = None):
        found = set(makers)
        self.what = json.dumps(described(what, found), sort_keys=True)
        self.asked = digest(kind, self.what)
        self.key = digest(self.asked, code_of(*found), json.dumps(versions()))
        self.folder = _place(kind, cache_dir)
        self.path = self.folder / f"{self.key}.kept"

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time; what a killed one left behind is cleared away."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{self.key}.lock")
            lock.acquire()
        except OSError as error:
            raise ValueError(
                f"{self.folder} cannot be written: {error.strerror or error}; allowed: a cache folder of yours"
            ) from error
        try:
            for left in self.folder.glob(f".{self.key}.*.part"):
                left.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

    def read(self) -> Any:
        """What was written, or None where nothing was. Raises `ValueError` naming a file that is damaged."""
        try:
            content = self.path.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        check, _, payload = content.removeprefix(MAGIC).partition(b"\n")
        if not content.startswith(MAGIC) or digest(payload).encode() != check:
            raise self._damaged("its checksum is wrong" if content.startswith(MAGIC) else "it is no file of this book")
        return unpacked(payload)

    def write(self, tree: Any) -> None:
        """Keep a tree of mappings, sequences, numbers, texts, arrays and tensors."""
        payload = packed(tree, {"what": self.what})
        settings.write(self.path, MAGIC + digest(payload).encode() + b"\n" + payload)

    def _damaged(self, why: str) -> ValueError:
        return ValueError(f"the kept file {self.path} is damaged: {why}; delete it to make it anew")


def keep(kind: str, what: Any, make: Callable[[], Any], *makers: Any, cache_dir: CacheDir = None) -> Any:
    """What `make()` returns, computed once for all processes: a tree as `Kept.write` takes it.

    It is made anew when `what`, a library's version, or a statement in the import closure of `make`, of `makers` or of
    any class or function in `what` has changed. With `cache_dir=False` nothing is kept.
    """
    if cache_dir is False:
        return make()
    kept = Kept(kind, what, make, *makers, cache_dir=cache_dir)
    if (found := kept.read()) is None:
        with kept.lock():
            if (found := kept.read()) is None:
                kept.write(make())
                found = kept.read()
    return found


def keep_folder(
    kind: str, what: Any, fill: Callable[[Path], None], *makers: Any, cache_dir: str | Path | None = None
) -> Path:
    """A folder that `fill(folder)` filled, made once as `keep` does it; files are checked each time it is asked for.

    A file whose size and time of change are those that were noted is taken to be whole, any other is read.
    """
    kept = Kept(kind, what, fill, *makers, cache_dir=cache_dir)
    folder = kept.folder / kept.key
    if not folder.is_dir():
        with kept.lock():
            if not folder.is_dir():
                for left in kept.folder.glob(f".{kept.key}.*"):
                    if left.is_dir():  # of a killed process: the lock is ours
                        shutil.rmtree(left, ignore_errors=True)
                with settings.new_folder(folder) as new:
                    fill(new)
                    seal(new)
    check_sealed(folder)
    return folder


SEAL = "kept.json"


def seal(folder: Path) -> None:
    """Note size, time and checksum of each file of a folder in it."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    noted = {}
    for path in files:
        about = path.stat()
        noted[path.relative_to(folder).as_posix()] = [about.st_size, about.st_mtime_ns, file_digest(path)]
    settings.write_json(folder / SEAL, noted)


def check_sealed(folder: Path) -> None:
    """`ValueError` naming the first file of a sealed folder that is missing or not what it was."""
    cure = f"delete the folder {folder} to make it anew"
    try:
        noted = json.loads((folder / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"the kept folder {folder} is damaged: {SEAL}: {error}; {cure}") from error
    for name, (size, changed, check) in noted.items():
        path = folder / name
        about = path.stat() if path.is_file() else None
        same = about is not None and (about.st_size, about.st_mtime_ns) == (size, changed)
        if not same and (about is None or about.st_size != size or file_digest(path) != check):
            raise ValueError(f"the kept file {path} is damaged or missing; {cure}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def versions() -> dict[str, str | None]:
    """Versions of Python and of `LIBRARIES`; None for one that is not installed."""
    found: dict[str, str | None] = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    for name in LIBRARIES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def packed(tree: Any, about: Mapping[str, str]) -> bytes:
    """A tree as the bytes of a safetensors file: its numbers and texts are JSON in the header. See `unpacked`."""
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            value = value.item()
        if isinstance(value, torch.Tensor) or _is_array(value):
            kind, name = ("numpy" if _is_array(value) else "torch"), str(len(tensors))
            held = torch.from_numpy(np.ascontiguousarray(value).reshape(value.shape)) if kind == "numpy" else value
            tensors[name] = held.detach().cpu().contiguous().clone()
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


def unpacked(payload: bytes) -> Any:
    """The tree of `packed`."""
    tensors = load(payload)
    length = int.from_bytes(payload[:8], "little")
    tree = json.loads(json.loads(payload[8 : 8 + length])["__metadata__"]["tree"])

    def restored(value: Any) -> Any:
        if isinstance(value, list):
            return [restored(each) for each in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind == "items":
            return {_hashable(restored(key)): restored(each) for key, each in content}
        if kind == "tuple":
            return tuple(restored(each) for each in content)
        return tensors[content].numpy() if kind == "numpy" else tensors[content]

    return restored(tree)


def _hashable(key: Any) -> Any:
    return tuple(key) if isinstance(key, list) else key


def _place(kind: str, folder: CacheDir) -> Path:
    return settings.cache_dir(folder or None) / kind
