"""Run one stated cheap cell of each long run in `results/` again, and compare with what was kept.

Kept runs are not void because code moved: `results/verify.yml` states cells of code for them, each with the kept value
that it must give again. A run on another family of models has its chapter's cells, unless its own are stated.
"""

from __future__ import annotations

import ast
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field, RootModel
from rich.console import Console

from helpers.press import chapters, claims
from helpers.press.claims import Results
from helpers.press.rules import Strict, read_yaml, validated

CHEAP = 20.0
"""Seconds that a cell may take to be run without being asked for."""


class Cell(Strict):
    """One cheap cell of a kept run.

    `cell` is code that ends with an expression, `kept` an expression for what the file holds of it. Both see the
    parameters of the kept run by name, and its `points` and `records`. `seconds` were measured on two CPU cores.
    """

    what: str
    cell: str
    kept: str
    tolerance: float = Field(gt=0)
    seconds: float = Field(gt=0)

    def run(self, results: Results) -> str:
        """Where the cell and the kept run disagree; empty where they agree."""
        about = {"points": results.points, "records": [record.model_dump() for record in results.records]}
        again = value_of(self.cell, results.parameters | about)
        return difference(again, value_of(self.kept, results.parameters | about), self.tolerance)


def value_of(code: str, names: Mapping[str, Any]) -> Any:
    """What the last line of a piece of code gives."""
    *body, last = ast.parse(code).body
    names = {"__name__": "verify", **names}
    exec(compile(ast.Module(body, []), "verify.yml", "exec"), names)
    return eval(compile(ast.Expression(last.value), "verify.yml", "eval"), names)


def difference(again: Any, kept: Any, tolerance: float, where: str = "") -> str:
    """The first place where two values differ by more than `tolerance` (relative above 1, else absolute); or empty."""
    again, kept = (value.tolist() if hasattr(value, "tolist") else value for value in (again, kept))
    if isinstance(kept, Mapping) and isinstance(again, Mapping):
        again, kept = dict(sorted(again.items())), dict(sorted(kept.items()))
        if list(again) != list(kept):
            return f"{where}: names {list(again)}, kept {list(kept)}"
        pairs = [(f"{where}.{name}", again[name], kept[name]) for name in kept]
    elif isinstance(kept, list | tuple) and isinstance(again, list | tuple):
        if len(again) != len(kept):
            return f"{where}: {len(again)} values, kept {len(kept)}"
        pairs = [(f"{where}[{i}]", *each) for i, each in enumerate(zip(again, kept, strict=True))]
    elif isinstance(kept, float | int) and isinstance(again, float | int):
        off = abs(again - kept)
        return "" if off <= tolerance * max(1.0, abs(kept)) else f"{where}: {again:.10g}, kept {kept:.10g}".strip(": ")
    else:
        return "" if again == kept else f"{where}: {again!r}, kept {kept!r}".strip(": ")
    return next((said for place, *each in pairs if (said := difference(*each, tolerance, place))), "")


def read(folder: Path = claims.REFERENCE) -> dict[str, list[Cell]]:
    """The stated cells by chapter; raises `ValueError` for a file of another form."""
    content = read_yaml(folder / "verify.yml", "verify.yml", "restore it from the repository")
    return validated(RootModel[dict[str, list[Cell]]], content or {}, "verify.yml").root


def run_again(
    names: Sequence[str], console: Console, everything: bool = False, folder: Path = claims.REFERENCE
) -> list[str]:
    """Run the stated cells of the kept runs called `names` (none means all); the chapters where one disagrees.

    Cells that take longer than `CHEAP` seconds are run with `everything` only.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    wanted, stated, failed = {c.slug for c in chapters.choose(names, chapters.find())}, read(folder), []
    kept = sorted([*folder.glob("*.json"), *folder.glob("*/*.json")])  # a folder for each further family of models
    runs = {str(path.relative_to(folder).with_suffix("")): path for path in kept if path.stem in wanted or not names}
    for name, path in runs.items():
        for cell in stated.get(name, stated.get(path.stem, [])):
            if cell.seconds > CHEAP and not everything:
                console.print(f"{name}: left out, {cell.seconds:.0f} s (--all): {cell.what}", markup=False)
                continue
            started = time.perf_counter()
            try:
                said = cell.run(claims.reference(path.stem, path.parent))
            except Exception as error:  # whatever a cell raises is a disagreement
                said = f"{type(error).__name__}: {error}"
            verdict = f"DISAGREES ({said})" if said else f"agrees to {cell.tolerance:g}"
            console.print(f"{name}: {verdict}, {time.perf_counter() - started:.1f} s: {cell.what}", markup=False)
            failed += [name] if said else []
    if bare := [name for name, path in runs.items() if path.stem not in stated]:
        console.print(f"no cell is stated yet for: {', '.join(bare)}", markup=False)
    return failed
