"""Lines of `helpers` broken on purpose, one at a time, in a copy: does a test notice?

`python -m benchmarks.mutations 20 3` breaks 20 lines that seed 3 picks. First come the tests of the module itself, then
those that name it, then all unit tests. A line that nothing notices is written down as such.
"""

from __future__ import annotations

import ast
import itertools
import os
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from benchmarks import common
from helpers import settings
from helpers.settings import allowed

ROOMS = ("dictionary", "training", "models", "study", "parts")
"""Where numbers are made; words and pictures are looked at."""
SWAPS = {
    ast.Add: "-", ast.Sub: "+", ast.Mult: "/", ast.Div: "*", ast.MatMult: "*",
    ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==",
    ast.In: "not in", ast.NotIn: "in", ast.Is: "is not", ast.IsNot: "is", ast.And: "or", ast.Or: "and",
}  # fmt: skip
SPOKEN = ("allowed", "progress", "ValueError", "TypeError", "warn", "print")
"""Calls whose arguments are for a reader's eyes; the condition that comes first in `allowed` is not."""
SIZES = re.compile(r"(?i).*(rows|block|chunk|batch_size|delay|workers|together|log_every).*")
"""Names of numbers that decide about time and memory, not about results."""


@dataclass(frozen=True)
class Mutant:
    """`text` in the place of what stands from `start` to `end` in a file."""

    path: str
    line: int
    start: int
    end: int
    text: str

    def of(self, source: str) -> str:
        return source[: self.start] + self.text + source[self.end :]


def mutants(source: str, path: str) -> Iterator[Mutant]:
    """Every operator, number and truth value that can be another one, outside of what is only said."""
    lines = source.splitlines(keepends=True)
    starts = [0, *itertools.accumulate(map(len, lines))]

    def offset(line: int, column: int) -> int:  # columns count bytes
        return starts[line - 1] + len(lines[line - 1].encode()[:column].decode())

    def span(node: ast.AST) -> tuple[int, int]:
        return offset(node.lineno, node.col_offset), offset(node.end_lineno, node.end_col_offset)

    def swapped(left: ast.AST, right: ast.AST, operator: ast.AST) -> Iterator[Mutant]:
        start, end = span(left)[1], span(right)[0]
        found = re.search(r"[^\s()\\]+(?: not| in)?(?=[\s()\\]*$)", source[start:end])
        if found and "#" not in source[start:end] and type(operator) in SWAPS:
            yield Mutant(path, left.end_lineno, start + found.start(), start + found.end(), SWAPS[type(operator)])

    waiting: list[ast.AST] = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        waiting += _parts(node)
        if isinstance(node, ast.BinOp) and not any(map(_is_text, (node.left, node.right))):
            yield from swapped(node.left, node.right, node.op)
        elif isinstance(node, ast.Compare):
            for left, right, operator in zip([node.left, *node.comparators], node.comparators, node.ops, strict=False):
                yield from swapped(left, right, operator)
        elif isinstance(node, ast.BoolOp):
            yield from swapped(*node.values[:2], node.op)
        elif isinstance(node, ast.Constant) and isinstance(value := node.value, bool | int | float):
            other = (
                not value if isinstance(value, bool) else 2 * value if isinstance(value, float) and value else value + 1
            )
            yield Mutant(path, node.lineno, *span(node), repr(other))


def _parts(node: ast.AST) -> list[ast.AST]:
    """What is inside, without messages, annotations and sizes."""
    if isinstance(node, ast.JoinedStr | ast.Raise) or isinstance(node, ast.keyword) and SIZES.fullmatch(node.arg or ""):
        return []
    if isinstance(node, ast.Call) and getattr(node.func, "attr", getattr(node.func, "id", "")) in SPOKEN:
        return node.args[:1]
    if isinstance(node, ast.Assign | ast.AnnAssign):
        names = [getattr(each, "id", "") for each in getattr(node, "targets", None) or [node.target]]
        return [] if any(map(SIZES.fullmatch, names)) or node.value is None else [node.value]
    if isinstance(node, ast.FunctionDef):
        names = [*node.args.posonlyargs, *node.args.args][::-1], node.args.kwonlyargs
        values = node.args.defaults[::-1], node.args.kw_defaults
        given = [pair for own in zip(names, values, strict=True) for pair in zip(*own, strict=False)]
        return [*node.body, *(value for name, value in given if value and not SIZES.fullmatch(name.arg))]
    return list(ast.iter_child_nodes(node))


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or isinstance(getattr(node, "value", None), str)


def chosen(count: int, seed: int, root: Path = settings.ROOT) -> list[Mutant]:
    """As many lines, each as likely as another, and one way to break each."""
    lines: dict[tuple[str, int], list[Mutant]] = {}
    for room in ROOMS:
        for path in sorted((root / "helpers" / room).glob("*.py")):
            for mutant in mutants(path.read_text(encoding="utf-8"), path.relative_to(root).as_posix()):
                lines.setdefault((mutant.path, mutant.line), []).append(mutant)
    allowed(1 <= count <= len(lines), f"count={count}", f"1 to {len(lines)} lines")
    draw = random.Random(seed)
    return [draw.choice(lines[place]) for place in draw.sample(sorted(lines), count)]


def tests_of(mutant: Mutant, root: Path) -> list[list[str]]:
    """Tests to run, one group after another, until one fails."""
    room, module = Path(mutant.path).parts[1], Path(mutant.path).stem
    files = [path for path in sorted((root / "tests").rglob("test_*.py")) if "browser" not in path.parts]
    own = [path for path in files if path.parent.name == room and path.stem == f"test_{module}"]
    named = [
        path for path in files if path not in own and re.search(rf"\b{module}\b", path.read_text(encoding="utf-8"))
    ]
    return [[str(path) for path in group] for group in (own, named, [root / "tests"]) if group]


def noticed(mutant: Mutant, root: Path) -> tuple[str, float]:
    """The first test that fails in `root`, a copy of the project, and seconds; an empty name where all pass."""
    path, started = root / mutant.path, time.perf_counter()
    whole = path.read_text(encoding="utf-8")
    path.write_text(mutant.of(whole), encoding="utf-8")
    try:
        for group in tests_of(mutant, root):
            command = [sys.executable, "-m", "pytest", "-x", "-n", "2", "--ignore=tests/browser", *group]
            how = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(root)}
            done = subprocess.run(command, cwd=root, env=how, capture_output=True, text=True, check=False)
            if done.returncode:
                names = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M) or re.findall(
                    r"^_+ (.+?) _+$", done.stdout, re.M
                )
                return (names or [done.stdout[-200:]])[0], time.perf_counter() - started
    finally:
        path.write_text(whole, encoding="utf-8")
    return "", time.perf_counter() - started


def main(count: str = "20", seed: str = "0") -> int:
    picked, rows = chosen(int(count), int(seed)), []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder) / "copy"
        tracked = subprocess.run(["git", "ls-files"], cwd=settings.ROOT, capture_output=True, text=True, check=True)
        for name in tracked.stdout.splitlines():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(settings.ROOT / name, root / name)
        for mutant in settings.progress(picked, "broken lines"):
            source = (root / mutant.path).read_text(encoding="utf-8")
            was, now = (text.splitlines()[mutant.line - 1].strip() for text in (source, mutant.of(source)))
            test, seconds = noticed(mutant, root)
            print(
                f"{mutant.path}:{mutant.line}: {was}  ->  {now}: {test or 'NOTHING NOTICED'} ({seconds:.0f} s)",
                flush=True,
            )
            rows.append(
                {"where": f"{mutant.path}:{mutant.line}", "was": was, "became": now, "noticed by": test, "s": seconds}
            )
    seen = sum(bool(row["noticed by"]) for row in rows)
    common.write(
        "mutations",
        title="Lines broken on purpose",
        question=f"Of {count} lines of helpers/, picked by seed {seed} and broken one by one, how many do tests see?",
        rows=rows,
        targets=[common.at_least(f"lines that a test notices, of {count}", seen, int(count))],
        note=f"Rooms {', '.join(ROOMS)}; an operator, a number or a truth value became another, outside of messages "
        "and of what decides about time and memory alone. The tests of the module come first, then those that name it, "
        "then all unit tests; what notebooks check themselves is not asked.",
        device="cpu",
    )
    return int(seen < int(count))


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
