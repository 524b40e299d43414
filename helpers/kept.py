"""What is computed once: under a key of what was asked for, of the code that makes it and of the libraries' versions.

`keep` is the way to do it, `keep_folder` the same for files, and `Kept` for what takes long and goes on after a kill.
"""

from __future__ import annotations

import ast
import dataclasses
import dis
import functools
import hashlib
import inspect
import json
import os
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from enum import Enum
from functools import cache
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from filelock import FileLock

from helpers import settings
from helpers.settings import ROOT, CacheDir, header, packed, unpacked

LIBRARIES = ("torch", "transformers", "tokenizers", "datasets", "numpy", "scipy")
"""Packages whose version is part of every key: another one may give other numbers."""


# -- keys: what was asked for ------------------------------------------------------------------------------------------


def digest(*parts: Any) -> str:
    """Hash of bytes, tensors, arrays and texts, in their order; where one ends and the next begins counts too."""
    found = hashlib.blake2b(digest_size=16)
    for part in parts:
        if isinstance(part, torch.Tensor):
            part = part.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
        elif isinstance(part, np.ndarray):
            part = np.ascontiguousarray(part).reshape(-1).view(np.uint8)
        content = part.encode() if isinstance(part, str) else part
        found.update(f"{len(content)} ".encode())
        found.update(content)
    return found.hexdigest()


def described(value: Any, makers: list[Any] | None = None) -> Any:
    """A value as plain JSON, for a key. Classes and functions that occur in it are added to `makers`.

    Of an object with a property `asked` that counts, of another dataclass every field but those with `compare=False`,
    of tensors and arrays their content, of functions also what they close over. Lists and tuples are alike; whole
    numbers, fractions and truth values are not. Raises `TypeError` for what cannot be told apart by its content.
    """
    makers = [] if makers is None else makers
    if value is None or isinstance(value, bool | int | float | str) and not isinstance(value, Enum):
        return value
    if isinstance(value, np.generic):
        return {"scalar": [str(value.dtype), described(value.item(), makers)]}
    if isinstance(value, Path | torch.dtype | torch.device):
        return {"text": str(value)}
    if isinstance(value, torch.Tensor | np.ndarray):
        return {"array": [str(value.dtype), list(value.shape), digest(value)]}
    if isinstance(value, Mapping):
        return {"mapping": _sorted([described(k, makers), described(v, makers)] for k, v in value.items())}
    if isinstance(value, list | tuple | range):
        return [described(each, makers) for each in value]
    if isinstance(value, set | frozenset):
        return {"set": _sorted(described(each, makers) for each in value)}
    if isinstance(value, functools.partial):
        return {"partial": [described(each, makers) for each in (value.func, value.args, value.keywords)]}
    if isinstance(value, MethodType):
        return {"method": [described(value.__func__, makers), described(value.__self__, makers)]}
    if callable(value) and hasattr(value, "__qualname__"):
        makers.append(value)
        return {"code": [_name(value), *_bound(value, makers)]}
    makers.append(type(value))
    return {"object": [_name(type(value)), described(_identity(value), makers)]}


def _sorted(values: Iterable[Any]) -> list[Any]:
    return sorted(values, key=lambda each: json.dumps(each, sort_keys=True))


def _name(code: Any) -> str:
    return f"{code.__module__}.{code.__qualname__}"


def _identity(value: Any) -> Any:
    """What tells an object from others of its class."""
    kind = type(value)
    if hasattr(kind, "asked"):
        return value.asked
    if isinstance(value, Enum):
        return value.name
    if dataclasses.is_dataclass(value):
        fields = dataclasses.fields(value)
        more = set(getattr(value, "__dict__", ())) - {field.name for field in fields}
        if all(hasattr(kind, name) for name in more):  # a cached property, for one
            return {field.name: getattr(value, field.name) for field in fields if field.compare}
    elif isinstance(getattr(value, "fingerprint", None), str):
        return value.fingerprint
    raise TypeError(f"{kind.__name__} cannot be part of a key: {value!r}")


def _bound(function: Any, makers: list[Any]) -> list[Any]:
    """What a function depends on beside its code: default values, what it closes over, globals of a notebook."""
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return []
    found = inspect.getclosurevars(function).nonlocals | (_globals_of(function) if _is_own(function) else {})
    found = {name: each for name, each in found.items() if each is not function and not isinstance(each, ModuleType)}
    return [described([found, function.__defaults__, function.__kwdefaults__], makers)]


# -- keys: the code that answers ---------------------------------------------------------------------------------------

STARTED = time.time_ns()


def code_of(*makers: Any) -> str:
    """Hash of the import closures of modules, classes and functions, as syntax trees: see `closure`.

    What is defined elsewhere than in `helpers` (a notebook, a test) counts by its own code and that which it names.
    """
    modules, own, waiting = set(), {}, list(makers)
    while waiting:
        maker = waiting.pop()
        if isinstance(maker, functools.partial | MethodType):
            waiting.append(maker.func if isinstance(maker, functools.partial) else maker.__func__)
        elif _room(maker) == "helpers":
            modules.add(maker.__name__ if isinstance(maker, ModuleType) else maker.__module__)
        elif _is_own(maker):
            maker = inspect.unwrap(maker) if hasattr(maker, "__qualname__") else type(maker)
            if maker not in own:
                own[maker], named = _own_code(maker)
                waiting += named
    trees = [f"{name} {tree_of(name)}" for name in closure(*modules)]
    return digest(*trees, *sorted(own.values()))


def _room(code: Any) -> str:
    name = code.__name__ if isinstance(code, ModuleType) else getattr(code, "__module__", None)
    return str(name or "builtins").partition(".")[0]


def _is_own(code: Any) -> bool:
    """Whether it is code of neither `helpers` nor a package, but of a notebook, a script or a test."""
    room = _room(code)
    if isinstance(code, ModuleType) or room == "helpers":
        return False
    file = getattr(sys.modules.get(room), "__file__", None) or ""
    return room == "__main__" or not (room in sys.stdlib_module_names or "site-packages" in file)


def _own_code(code: Any) -> tuple[str, list[Any]]:
    """Byte code of a function or of a class's functions, and the classes, functions and modules that it names."""
    inside = vars(code) if inspect.isclass(code) else {"": code}
    lines, named = [_name(code)], list(getattr(code, "__mro__", ())[1:])
    for name, each in sorted(inside.items()):
        if isinstance(each, bool | int | float | str) and not name.startswith("__"):
            lines.append(f"{name} {each!r}")
        for part in ("fget", "func", "__func__"):  # of properties, cached ones, class methods
            each = getattr(each, part, each)
        function = inspect.unwrap(each)
        if inspect.isfunction(function):
            lines.append(f"{name} {_byte_code(function.__code__, function.__doc__)}")
            reached = {**_globals_of(function), **inspect.getclosurevars(function).nonlocals}
            named += [each for each in reached.values() if isinstance(each, ModuleType) or callable(each)]
    return "\n".join(lines), named


def _byte_code(code: CodeType, docstring: str | None = None) -> str:
    constants = [None if docstring is not None and each == docstring else each for each in code.co_consts]
    texts = [_byte_code(each) if isinstance(each, CodeType) else _plain(each) for each in constants]
    return f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {texts}"


def _plain(constant: Any) -> str:
    return repr(sorted(constant, key=repr) if isinstance(constant, frozenset) else constant)


def _globals_of(function: FunctionType) -> dict[str, Any]:
    """Global variables that a function reads, those of lambdas and comprehensions in it included."""
    codes, names = [function.__code__], set()
    for code in codes:
        codes += [each for each in code.co_consts if isinstance(each, CodeType)]
        names |= {each.argval for each in dis.get_instructions(code) if each.opname == "LOAD_GLOBAL"}
    return {name: function.__globals__[name] for name in names & function.__globals__.keys()}


def closure(*modules: str, root: Path | None = None) -> list[str]:
    """These modules of `helpers` and all that they import, directly or not, wherever in the file the import stands."""
    found: set[str] = set()
    waiting = _with_packages(modules, root)
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
    """Modules of `helpers` that a module imports itself, packages on the way included."""
    return _with_packages(_parsed(module, root)[0], root)


def imports_in(tree: ast.AST, package: str = "") -> set[str]:
    """What code imports of `helpers`, modules or names in them, and texts in it that may name modules."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {each.name for each in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - node.level] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            names |= {base, *(f"{base}.{each.name}" for each in node.names)}
        elif isinstance(node, ast.Constant) and re.fullmatch(r"helpers(\.\w+)+", str(node.value)):  # by its name
            names.add(str(node.value))
    return {name for name in names if name.split(".")[0] == "helpers"}


def _with_packages(modules: Iterable[str], root: Path | None) -> set[str]:
    above = {".".join(name.split(".")[:i]) for name in modules for i in range(1, name.count(".") + 2)}
    return {name for name in above if module_file(name, root)}


def tree_of(module: str, root: Path | None = None) -> str:
    """A module's syntax tree as text: comments, docstrings and layout do not count.

    A file that was edited after this process had started is not what runs here. Its text is then this process's own, so
    that what the old code computes is never found under the new code's key.
    """
    edited = root is None and module in sys.modules and module_file(module).stat().st_mtime_ns > STARTED
    return _parsed(module, root)[1] + (f" edited while {os.getpid()} of {STARTED} ran" if edited else "")


def _parsed(module: str, root: Path | None = None) -> tuple[set[str], str]:
    """What a module imports, and its tree."""
    path = module_file(module, root)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    return _parse(path, path.stat().st_mtime_ns, path.stat().st_size, package)


@cache
def _parse(path: Path, changed: int, size: int, package: str) -> tuple[set[str], str]:
    tree = settings.parsed(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(body := getattr(node, "body", None), list):
            node.body = [each for each in body if not _is_text(each)] or [ast.Pass()]
    return imports_in(tree, package), ast.dump(tree)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


# -- what is computed once ---------------------------------------------------------------------------------------------

MAGIC = b"rank1 kept 1\n"
_within = ContextVar("_within", default=False)


@contextmanager
def _noted(kind: str) -> Iterator[None]:
    """What is made inside counts with it; waiting at a lock does not."""
    started, within = time.perf_counter(), _within.get()
    _within.set(True)
    try:
        yield
    finally:
        _within.set(within)
        if not within:
            settings.note(f"made {kind} {time.perf_counter() - started:.2f}")


class Kept:
    """One thing in the cache: where it lies, read and written whole, its lock, and what was asked for.

    Args:
        kind: folder of the cache.
        what: all that was asked for; see `described`.
        makers: modules, classes or functions that make it, beside those that occur in `what`.
    """

    def __init__(self, kind: str, what: Any, *makers: Any, cache_dir: CacheDir = None):
        found = list(makers)
        self.what = json.dumps(described(what, found), sort_keys=True)
        # Where the code that answers changes or moves, what was asked is the same: of a store, KEY@N, half the key.
        plain = re.sub(r'"helpers\.([a-z_0-9]+\.)+', '"', re.sub(r"\b([0-9a-f]{16})[0-9a-f]{16}@", r"\1@", self.what))
        self.asked = digest(kind, plain)[:16]
        self.key = self.asked + digest(kind, self.what, code_of(*found), json.dumps(versions()))[:16]
        self.folder = settings.cache_dir(cache_dir or None) / kind
        self.path = self.folder / f"{self.key}.kept"
        settings.note(f"asked {kind} {self.key}")

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Held by one process at a time; what a killed one left behind is cleared away."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.folder / f".{self.key}.lock")
            lock.acquire()
        except OSError as error:
            why = f"{self.folder} cannot be written: {error.strerror or error}"
            raise ValueError(f"{why}; allowed: a cache folder of yours") from error
        try:
            for left in self.folder.glob(f".{self.key}.*.part"):
                left.unlink(missing_ok=True)
            with _noted(self.folder.name):
                yield
        finally:
            lock.release()

    def read(self) -> Any:
        """What was written, or None where nothing was. Raises `ValueError` naming a file that is damaged."""
        try:
            content = self.path.read_bytes()
        except (FileNotFoundError, NotADirectoryError):  # of the second one `lock` tells
            return None
        except OSError as error:
            raise self._damaged(error.strerror or str(error)) from error
        check, _, payload = content.removeprefix(MAGIC).partition(b"\n")
        if not content.startswith(MAGIC):
            raise self._damaged("it is no file of this book")
        if digest(payload).encode() != check:
            raise self._damaged("its checksum is wrong")
        if header(payload)["key"] != self.key:
            raise self._damaged("it holds what was kept under another name")
        return unpacked(payload)

    def write(self, tree: Any) -> None:
        """Keep a tree of mappings, sequences, numbers, texts, arrays and tensors."""
        payload = packed(tree, {"what": self.what, "key": self.key})
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
                    seal(new, kept.key)
    check_sealed(folder, kept.key)
    return folder


SEAL = "kept.json"


def seal(folder: Path, key: str = "") -> None:
    """Note a key, and size, time and checksum of each file of a folder, in it."""
    files = [(path, path.stat()) for path in sorted(folder.rglob("*")) if path.is_file()]
    noted = {
        path.relative_to(folder).as_posix(): [about.st_size, about.st_mtime_ns, file_digest(path)]
        for path, about in files
    }
    settings.write_json(folder / SEAL, {"key": key, "files": noted})


def check_sealed(folder: Path, key: str = "") -> None:
    """`ValueError` naming the first file of a sealed folder that is missing or not what it was, or another key's."""
    cure = f"delete the folder {folder} to make it anew"
    try:
        noted = json.loads((folder / SEAL).read_text(encoding="utf-8"))
        files = [(folder / name, *about) for name, about in noted["files"].items()]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"the kept folder {folder} is damaged: {SEAL}: {error}; {cure}") from error
    if noted["key"] != key:
        raise ValueError(f"the kept folder {folder} holds what was kept under another name; {cure}")
    for path, size, changed, check in files:
        about = path.stat() if path.is_file() else None
        same = about is not None and (about.st_size, about.st_mtime_ns) == (size, changed)
        if not same and (about is None or about.st_size != size or file_digest(path) != check):
            raise ValueError(f"the kept file {path} is damaged or missing; {cure}")


def file_digest(path: Path) -> str:
    """SHA-256 of a file's content."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@cache
def versions() -> dict[str, str]:
    """Versions of Python and of `LIBRARIES`."""
    python = {"python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    return python | {name: version(name) for name in LIBRARIES}
