"""`python -m helpers.press.numbers`: numbers in prose, written between invisible marks from the kept long runs.

`<!--n 07 dead.pareto/error · k = 4 | .2f-->1.06<!--/n-->` is that record's value with two decimals. `@low`, `@high` or
`@n` after a case is its interval's end or its count. A row of a run's points is `entries[site=mlp_in, k=32].fvu`, a
mean where several rows fit or a cell holds several numbers; `.ratio#0` is the first number of a cell, and
`entries.candidates[…]` are the rows, or the one, that such a row's cell holds. With braces it is arithmetic:
`1 - 1 / {…}`. A form that ends in ` %` is in percent. `<!--n 07/smollm2 …` is of the second model family's run.
Captions and the words that stand for a figure have such marks too, which `unmarked` takes out for a page.
"""

from __future__ import annotations

import ast
import operator
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import nbformat
import numpy as np

from helpers import settings
from helpers.press import claims
from helpers.press.rules import BETWEEN, register

MARK = re.compile(r"<!--n (\d\d(?:/\w+)?) (.+?) \| (.+?)-->(.*?)<!--/n-->", re.DOTALL)
ROW = re.compile(r"([\w ]+?)(?:\.(\w+))?\[(.*)\]\.(.+)")
SUMS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}


def written(text: str) -> str:
    """The text with every marked number as its record has it; raises `ValueError` for a mark that leads nowhere."""

    def anew(mark: re.Match[str]) -> str:
        chapter, address, form = mark[1], mark[2], mark[3]
        return f"<!--n {chapter} {address} | {form}-->{shown(value(chapter, address), form)}<!--/n-->"

    return MARK.sub(anew, text)


def unmarked(text: str) -> str:
    """The text with its numbers and without their marks."""
    return MARK.sub(r"\4", text)


def words(cell: Any) -> Iterator[tuple[Any, str]]:
    """Where a cell has prose, as a mapping and its key: its text, or the caption and the words of its figure."""
    if cell.cell_type == "markdown":
        yield cell, "source"
    about = cell.metadata.get("mystnb", {})
    for part, key in (("figure", "caption"), ("image", "alt")):
        if key in about.get(part, {}):
            yield about[part], key


def shown(number: float, form: str) -> str:
    """A number by a format such as `.2f`, or `.0f %` for a share in percent."""
    said = f"{100 * number:{form[:-2]}} %" if form.endswith(" %") else f"{number:{form}}"
    return said.replace("-", "−")


def value(chapter: str, address: str) -> float:
    """What an address says in the kept run of a chapter, given by its two digits and perhaps a family."""
    number, _, family = chapter.partition("/")
    folder = claims.REFERENCE / family
    found = next(iter(sorted(folder.glob(f"{number}_*.json"))), None)
    settings.allowed(found is not None, f"number of chapter {chapter}", "a chapter with a kept run in results/")
    run = claims.reference(found.stem, folder)
    if "{" not in address:
        return _at(run, address)
    return _sum(ast.parse(re.sub(r"\{(.*?)\}", lambda each: repr(_at(run, each[1])), address), mode="eval").body)


def _sum(node: ast.expr) -> float:
    match node:
        case ast.BinOp() if type(node.op) in SUMS:
            return SUMS[type(node.op)](_sum(node.left), _sum(node.right))
        case ast.UnaryOp(op=ast.USub()):
            return -_sum(node.operand)
        case ast.Constant(value=float() | int()):
            return node.value
    raise ValueError(f"number {ast.unparse(node)!r}: allowed: sums, differences, products and ratios")


def _at(run: claims.Results, address: str) -> float:
    if row := ROW.fullmatch(address):
        table, inner, wanted, column = row.groups()
        pairs = dict(pair.split("=", 1) for pair in re.split(r", (?=\w+=)(?![^(]*\))", wanted))
        rows = run.points.get(table, [])
        if inner:
            within = [(r, [r[inner]] if isinstance(r[inner], dict) else r[inner]) for r in rows if inner in r]
            rows = [r | each for r, some in within for each in some]
        rows = [r for r in rows if all(str(r.get(k)) == v for k, v in pairs.items())]
        settings.allowed(bool(rows), f"number {address!r}", f"a row of chapter {run.chapter}")
        column, _, place = column.partition("#")
        return float(np.mean([each[column][int(place)] if place else each[column] for each in rows]))
    where, _, field = address.partition("@")
    name, _, case = where.partition(BETWEEN)
    claim, _, check = name.partition("/")
    checks = register()[claim].checks
    settings.one_of(f"check of {claim}", check, checks)
    metric = checks[check].metric + (BETWEEN + case if case else "")
    found = [record for record in run.records if record.claim == claim and record.metric == metric]
    settings.allowed(len(found) == 1, f"number {address!r}", f"a record of chapter {run.chapter}")
    ends = dict(zip(("low", "high"), found[0].ci or (), strict=False))
    return float({"": found[0].value, "n": found[0].n, **ends}[field])


def prose(root: Path = settings.ROOT) -> Iterator[tuple[Path, Any, list[tuple[Any, str]]]]:
    """Every file of the book with prose, what it holds, and where in that prose stands, as mappings and their keys."""
    for path in sorted((root / "book").glob("*.md")):
        page = {"text": path.read_text(encoding="utf-8")}
        yield path, page, [(page, "text")]
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        notebook: Any = nbformat.read(path, as_version=4)
        yield path, notebook, [place for cell in notebook.cells for place in words(cell)]


def main() -> None:
    """Rewrites the files whose numbers differ from their records, and names them."""
    for path, content, places in prose():
        changed = [(holder, key) for holder, key in places if written(holder[key]) != holder[key]]
        for holder, key in changed:
            holder[key] = written(holder[key])
        if changed:
            text = content["text"] if path.suffix == ".md" else nbformat.writes(content) + "\n"
            settings.write(path, text.encode())
            print(f"{path.relative_to(settings.ROOT)}: numbers rewritten")


if __name__ == "__main__":
    main()
