"""Numbers and tables as a reader sees them: plain names, aligned decimals, an interval in one column."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from helpers.settings import allowed


def number(value: float, ci: tuple[float, float] | None = None) -> str:
    """A value with its interval, all with as many decimals as give the larger of value and half-width three digits; or
    up to two more, where a narrow interval would look like a point."""
    low, high = ci or (value, value)
    half = (high - low) / 2
    size = max(abs(value), half)
    if size and not 1e-4 <= size < 1e6:
        power = math.floor(math.log10(size))
        shown = [f"{each / 10**power:.2g}" for each in (value, low, high)]
        unit = "×10" + str(power).translate(str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹"))
    else:
        whole = all(each == int(each) for each in (value, low, high))
        decimals = 0 if whole else max(0, 2 - math.floor(math.log10(size)))
        if half and not whole:
            decimals = max(decimals, min(decimals + 2, -math.floor(math.log10(half))))
        shown, unit = [f"{each:,.{decimals}f}" for each in (value, low, high)], ""
    value_shown, low_shown, high_shown = (each.replace("-", "−") for each in shown)
    return f"{value_shown} [{low_shown}, {high_shown}]{unit}" if ci else value_shown + unit


def table(rows: Sequence[dict[str, Any]], numeric: dict[str, bool] | None = None) -> str:
    """Rows as an HTML table, numbers set to the right; strings are HTML. Scrolls by itself on a narrow screen.

    `numeric` says which columns hold numbers where their values are written already.
    """
    columns = numeric or {name: all(isinstance(row[name], int | float | None) for row in rows) for name in rows[0]}
    kinds = {name: ' class="number"' if numeric else "" for name, numeric in columns.items()}
    head = "".join(f'<th scope="col"{kinds[name]}>{html.escape(name)}</th>' for name in columns)
    body = ["<tr>" + "".join(f"<td{kinds[name]}>{_cell(row[name])}</td>" for name in columns) + "</tr>" for row in rows]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>\n" + "\n".join(body) + "\n</tbody></table>"
    return f'<div class="wide-table" tabindex="0" role="group" aria-label="table">{table}</div>'


def _cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "" if value is None else str(value)
    return f"{value:,}" if isinstance(value, int) else f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


NAMES = {
    "fvu": "FVU",
    "lr": "learning rate",
    "ce": "CE",
    "mcc": "MCC",
    "ci": "95 %",
    "largest_rate": "busiest latent",
    "dead": "dead features",
    "found": "truths found",
    "multiply_adds": "multiply-adds",
}
"""What a column is called on a page where its name in the code reads badly; every other name loses its underscores."""
MOST_COLUMNS = 7


class Table:
    """Rows to be shown as the last line of a cell.

    Args:
        rows: mappings with the same keys. A value is a number, a text, true or false, None (shown as a dash), or what
            has `value` and `ci`, shown with its interval.
        names: what columns are called, beside `NAMES`.
        percent: columns whose numbers are shares, shown in percent.

    Raises `ValueError` for no rows, more than seven columns, rows with different columns, and values that a reader
    could not read, such as a tuple.
    """

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        names: Mapping[str, str] | None = None,
        percent: Sequence[str] = (),
    ) -> None:
        rows, names = [dict(row) for row in rows], NAMES | dict(names or {})
        allowed(bool(rows), "rows=[]", "at least one row")
        columns = list(rows[0])
        allowed(len(columns) <= MOST_COLUMNS, f"rows have {len(columns)} columns", f"up to {MOST_COLUMNS}")
        allowed(all(list(row) == columns for row in rows), "rows with different columns", f"each of them {columns}")
        shown = {key: _column([row[key] for row in rows], key, key in percent) for key in columns}
        self.rows = [
            {names.get(key, key.replace("_", " ")): shown[key][place] for key in columns} for place in range(len(rows))
        ]

    def __repr__(self) -> str:
        return "\n".join(", ".join(f"{name} {value}" for name, value in row.items()) for row in self.rows)

    def _repr_html_(self) -> str:
        kinds = {name: all(_numeric(row[name]) for row in self.rows) for name in self.rows[0]}
        shown = table([{name: html.escape(value) for name, value in row.items()} for row in self.rows], kinds)
        return shown.replace('class="wide-table"', 'class="wide-table mathjax_ignore"', 1)  # a dollar is a dollar


def outcomes(predictions: Mapping[str, bool | None | str]) -> Table:
    """A row for each prediction with what became of it; None is an interval that holds the threshold, a text is shown
    as it is."""
    words = {True: "as predicted", False: "not as predicted", None: "undecided"}
    return Table([{"prediction": text, "outcome": words.get(o, o)} for text, o in predictions.items()])


def _numeric(shown: str) -> bool:
    return shown in ("–", "") or shown.lstrip("−<>≤≥ ")[:1].isdigit()


def _column(values: Sequence[Any], name: str, percent: bool) -> list[str]:
    """A column's values as text, its plain numbers with the same decimals."""
    plain = [each for each in values if isinstance(each, int | float) and not isinstance(each, bool)]
    decimals = _decimals([100 * each for each in plain] if percent else plain)
    if percent and max(map(abs, plain), default=0) >= 0.1:
        decimals = min(decimals, 1)
    return [_shown(each, name, percent, decimals) for each in values]


def _decimals(values: Sequence[float]) -> int:
    """As many as give the smallest value of ordinary size three digits, and none where all are whole."""
    finite = [abs(each) for each in values if math.isfinite(each) and each]
    if not finite or all(each == int(each) for each in finite):
        return 0
    return min(4, max(0, 2 - math.floor(math.log10(max(min(finite), max(finite) / 100)))))


def _shown(value: Any, name: str, percent: bool, decimals: int) -> str:
    if hasattr(value, "value") and hasattr(value, "ci"):
        return number(value.value, value.ci)
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        shown = f"{100 * value:.{decimals}f} %" if percent else f"{value:,.{decimals}f}"
        if percent and value > 0 and not float(shown[:-2]):  # not nothing
            shown = f"<{10.0**-decimals:g} %"
        small = value and not percent and abs(value) < 1e-3
        return number(value) if small else shown.replace("-", "−")
    allowed(
        isinstance(value, str), f"{name}={value!r}", "a number, a text, true or false, None, or a value with its ci"
    )
    return value
