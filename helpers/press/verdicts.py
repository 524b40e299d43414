"""What is recorded, and the verdicts: of one number, and of a claim from all its records."""

from __future__ import annotations

import html
from collections import defaultdict
from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import Any, Literal, NamedTuple

from pydantic import Field
from scipy.stats import binom

from helpers.press.rules import Check, Claim, Register, Rule, Strict

Verdict = Literal["reproduced", "holds here", "partly", "fails here", "not reproduced", "too few", "not tested"]
Scope = Literal["paper setting", "analogue"]
Resampled = Literal[
    "seeds", "articles", "seed × article", "random draws", "layers", "layer × article", "samples", "sizes"
]
LONGEST_NOTE = 300
"""Characters of a record's note: it is a line on the page of claims."""
COLOURS: dict[Verdict, str] = {
    "reproduced": "#009E73",
    "holds here": "#56B4E9",
    "partly": "#E69F00",
    "fails here": "#CC79A7",
    "not reproduced": "#D55E00",
    "too few": "#999999",
    "not tested": "#999999",
}
FEWEST: dict[Resampled | None, tuple[int, ...]] = {
    **{"seeds": (3,), "random draws": (3,), "layers": (3,), "sizes": (3,), "articles": (5,), "samples": (5,)},
    **{"seed × article": (3, 5), "layer × article": (3, 5)},
}
"""The fewest units whose interval is judged, of each kind where two vary; of a slope, the fewest sizes it lies over."""
VERDICTS: dict[Scope, dict[str, Verdict]] = {
    "paper setting": {"holds": "reproduced", "fails": "not reproduced"},
    "analogue": {"holds": "holds here", "fails": "fails here"},
}
"""The verdict of one number where its interval does not straddle what the rule asks."""
Counted = int | tuple[int, int]
"""How many units: one number, or one of each kind where two vary."""


def judge(
    rule: Rule, value: float, ci: tuple[float, float] | None, scope: Scope, n: Counted, resampled: Resampled | None
) -> Verdict:
    """The verdict of one number: what the rule says, under the scope it was measured in."""
    units, fewest = n if isinstance(n, tuple) else (n,), FEWEST.get(resampled, ())
    if rule.needs_interval and any(own < least for own, least in zip_longest(units, fewest, fillvalue=0)):
        return "too few"
    return VERDICTS[scope].get(rule.outcome(value, *(ci or (value, value))), "partly")


class Record(Strict):
    """One measured number and its verdict: the rows of a results file, field by field."""

    claim: str
    metric: str
    value: float
    ci: tuple[float, float] | None
    n: Counted
    resampled: Resampled | None
    unit: str
    scope: Scope
    teacher: str | None
    expected: str
    verdict: Verdict
    note: str = Field(max_length=LONGEST_NOTE)
    jackknife: dict[str, Any] | None = Field(default=None, repr=False)
    """`scores.interval(value, *without, **options)` is `ci`, where `without` holds the number without each unit."""

    def __str__(self) -> str:
        return f"{self.claim} | {self.metric}: {self.measured()} | expected {self.expected} | {self.verdict}"

    def measured(self) -> str:
        """`0.0176 [0.0170, 0.0181] FVU, n = 3 (seeds)`"""
        interval = f" [{_number(self.ci[0])}, {_number(self.ci[1])}]" if self.ci else ""
        unit = f" {self.unit}" if self.unit else ""
        over = f" ({self.resampled})" if self.resampled else ""
        return f"{_number(self.value)}{interval}{unit}, n = {counted(self.n)}{over}"

    def judged(self, rule: Rule) -> Record:
        """The same record with the verdict of the rule as it stands, under the scope that it was measured in."""
        verdict = judge(rule, self.value, self.ci, self.scope, self.n, self.resampled)
        return self.model_copy(update={"expected": str(rule), "verdict": verdict})

    def _repr_html_(self) -> str:
        note = f"<br><small>{html.escape(self.note)}</small>" if self.note else ""
        return (
            f'<div style="border-left:.25em solid {COLOURS[self.verdict]};padding:.2em .8em;margin:.4em 0">'
            f"<strong>{html.escape(self.verdict)}</strong> · <code>{html.escape(self.claim)}</code><br>"
            f"{html.escape(self.metric)}: <strong>{html.escape(self.measured())}</strong>; "
            f"expected {html.escape(self.expected)}; {html.escape(self.scope)}{note}</div>"
        )


OFTEN = 0.05
"""A control of several draws is rejected unless more of them pass than this share explains, by a binomial test at the
same level: of 40 draws at most four may pass, of eight two, of five one. At 95 % a fortieth passes by chance."""


class Control(Strict):
    """What a check's quantity is where its claim is false by construction, and whether the rule rejects that.

    `draws`: value, low and high of each of several, such as relabelled data; the middle one is the control's own
    number, and `passed` the share that passes the rule.
    """

    claim: str
    check: str
    value: float
    ci: tuple[float, float] | None
    n: Counted
    resampled: Resampled | None
    draws: list[tuple[float, float, float]] = []
    passed: float = 0.0
    rejected: bool

    def measured(self) -> str:
        """`0.43 [0.42, 0.44], n = 252, 1 of 40 draws passes`"""
        interval = f" [{_number(self.ci[0])}, {_number(self.ci[1])}]" if self.ci else ""
        count = round(self.passed * len(self.draws))
        passing = f", {count} of {len(self.draws)} draws pass" if self.draws else ""
        return f"{_number(self.value)}{interval}, n = {counted(self.n)}{passing}"

    def judged(self, check: Check) -> Control:
        """The same control by the rule as it stands."""
        draws = self.draws or [(self.value, *(self.ci or (self.value, self.value)))]
        passed = sum(check.rule.outcome(*each) == "holds" for each in draws)
        explained = not passed or len(draws) > 1 and bool(binom.sf(passed - 1, len(draws), OFTEN) > OFTEN)
        return self.model_copy(update={"passed": passed / len(draws), "rejected": explained})


def counted(n: Counted) -> str:
    """`4,096`, or `3 × 11` where two kinds of units vary."""
    return " × ".join(f"{each:,}" for each in (n if isinstance(n, tuple) else (n,)))


def _number(value: float) -> str:
    """Three significant digits, without an exponent where a plain number is short."""
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:.3g}"


# -- the verdict of a claim --------------------------------------------------------------------------------------------


class Row(NamedTuple):
    """A row of the truth table: it fits where no record has a verdict outside `among`, and each check of the claim
    has a record with one of `each` (where that is not empty)."""

    words: str
    among: frozenset[Verdict]
    each: frozenset[Verdict]
    verdict: Verdict


HOLDS: frozenset[Verdict] = frozenset({"reproduced", "holds here"})
OPEN: frozenset[Verdict] = frozenset({"partly", "too few"})
FAILS: frozenset[Verdict] = OPEN | {"fails here"}
NONE: frozenset[Verdict] = frozenset()
TABLE = (
    Row("no record", NONE, NONE, "not tested"),
    Row("every record rests on too few", frozenset({"too few"}), NONE, "too few"),
    Row("none holds or fails: intervals lie across their thresholds", OPEN, NONE, "partly"),
    Row("none holds and some fail, on analogues only", FAILS, NONE, "fails here"),
    Row("none holds and some fail, in the paper's setting too", FAILS | {"not reproduced"}, NONE, "not reproduced"),
    Row("all hold, each check in the paper's setting", HOLDS, frozenset({"reproduced"}), "reproduced"),
    Row("all hold, each check was run", HOLDS, HOLDS, "holds here"),
    Row("anything else: records disagree, or something is open", frozenset(COLOURS), NONE, "partly"),
)
"""How a claim's records combine: the first row that fits. A record on too few units never completes a claim, and
no open one saves a claim whose other records fail."""


def combined(claim: Claim, records: Sequence[Record]) -> Verdict:
    """One verdict for a claim, from all records of it, by `TABLE`."""
    of: dict[str, set[Verdict]] = {check: set() for check in claim.checks}
    for record in records:
        of[claim.check_of(record.metric)].add(record.verdict)
    found = set().union(*of.values())
    return next(
        row.verdict
        for row in TABLE
        if found <= row.among and all(not row.each or verdicts & row.each for verdicts in of.values())
    )


def by_chance(records: Iterable[Record], controls: Iterable[Control], book: Register) -> tuple[float, int]:
    """How many of the records whose check has a recorded control would hold by chance alone, and how many those are:
    of each the share of its check's controls that pass is added up."""
    passing = defaultdict(list)
    for control in controls:
        passing[control.claim, control.check].append(control.passed)
    of = [passing.get((record.claim, book[record.claim].check_of(record.metric))) for record in records]
    shares = [sum(each) / len(each) for each in of if each]
    return sum(shares), len(shares)
