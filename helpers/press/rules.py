"""The register of claims, `book/claims.yml`: what is claimed, where, and the rule that judges each number."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from helpers.settings import ROOT, allowed, one_of

REGISTER = ROOT / "book" / "claims.yml"
BETWEEN = " · "
"""Stands between the register's metric and what a chapter adds to tell two records of one check apart."""

Outcome = Literal["holds", "straddles", "fails"]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Identity(Strict):
    """The value is a largest difference; it holds when that is at most `tolerance`."""

    name: Literal["identity"] = "identity"
    tolerance: float = Field(gt=0)
    needs_interval: ClassVar[bool] = False

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if abs(value) <= self.tolerance else "fails"

    def __str__(self) -> str:
        return f"≤ {self.tolerance:g}"


class Bound(Strict):
    """A bound that must hold on every sample. The value is a count of `violations`, or the worst `margin`
    (bound minus measurement: negative is a violation). One violation refutes; there is no "partly"."""

    name: Literal["bound_holds"] = "bound_holds"
    value: Literal["violations", "margin"] = "violations"
    needs_interval: ClassVar[bool] = False

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if (value == 0 if self.value == "violations" else value >= 0) else "fails"

    def __str__(self) -> str:
        return "no violation" if self.value == "violations" else "worst margin ≥ 0"


class IntervalAbove(Strict):
    """The whole interval lies above `value`; entirely at or below it fails; across it straddles."""

    name: Literal["interval_above"] = "interval_above"
    value: float
    needs_interval: ClassVar[bool] = True

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if low > self.value else "fails" if high <= self.value else "straddles"

    def __str__(self) -> str:
        return f"interval above {self.value:g}"


class IntervalBelow(Strict):
    """The whole interval lies below `value`; entirely at or above it fails; across it straddles."""

    name: Literal["interval_below"] = "interval_below"
    value: float
    needs_interval: ClassVar[bool] = True

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        return "holds" if high < self.value else "fails" if low >= self.value else "straddles"

    def __str__(self) -> str:
        return f"interval below {self.value:g}"


class IntervalWithin(Strict):
    """The whole interval lies between `low` and `high`; entirely outside it fails; across an end it straddles."""

    name: Literal["interval_within"] = "interval_within"
    value: tuple[float, float]
    needs_interval: ClassVar[bool] = True

    @model_validator(mode="after")
    def _ends_in_order(self) -> IntervalWithin:
        allowed(self.value[0] < self.value[1], f"value={list(self.value)}", "[low, high] with low < high")
        return self

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        least, most = self.value
        if least < low and high < most:
            return "holds"
        return "fails" if high <= least or low >= most else "straddles"

    def __str__(self) -> str:
        return f"interval within {self.value[0]:g} to {self.value[1]:g}"


class Trend(Strict):
    """The value is a slope; its interval must lie on the stated side of zero."""

    name: Literal["trend"] = "trend"
    sign: Literal["positive", "negative"]
    needs_interval: ClassVar[bool] = True

    def outcome(self, value: float, low: float, high: float) -> Outcome:
        side = IntervalAbove if self.sign == "positive" else IntervalBelow
        return side(value=0).outcome(value, low, high)

    def __str__(self) -> str:
        return f"slope {'>' if self.sign == 'positive' else '<'} 0"


Rule = Annotated[Identity | Bound | IntervalAbove | IntervalBelow | IntervalWithin | Trend, Field(discriminator="name")]


class Check(Strict):
    """One measured quantity and the rule that judges it; `why` says where the rule's threshold comes from.

    `control` says what is measured where the claim is false by construction, which the rule must reject; `no_control`
    why nothing is. `changed` says when the rule was another, and why it is not any more. `paper` holds the paper's own
    numbers for this quantity, where it prints some.
    """

    metric: str
    paper: list[float] = []
    rule: Rule
    why: str
    unit: str = ""
    control: str = ""
    no_control: str = ""
    changed: str = ""

    @model_validator(mode="after")
    def _can_be_seen_to_fail(self) -> Check:
        allowed(bool(self.control) != bool(self.no_control), "neither or both of control, no_control", "one of them")
        return self


class Paper(Strict):
    letter: str
    title: str
    cite: str
    where: str


class Source(Strict):
    """Where a claim stands; `ours` for a finding of this book about the paper's runs."""

    paper: str
    where: str
    ours: bool = False


class PaperSays(Strict):
    number: str
    setting: str


class Claim(Strict):
    """A claim. `teachers` are the hub ids of the paper's own setting, or `any` where no teacher is involved
    (a theorem, synthetic data); an empty list says that the paper's setting is not public."""

    id: str = Field(pattern=r"^[a-z0-9]+(\.[a-z0-9]+)+$")
    title: str = Field("", max_length=60)
    statement: str
    source: Source
    paper_says: PaperSays
    part: str
    chapter: str
    teachers: list[str] | Literal["any"]
    checks: dict[str, Check] = Field(min_length=1)

    @model_validator(mode="after")
    def _metrics_differ(self) -> Claim:
        metrics = [check.metric for check in self.checks.values()]
        if len(set(metrics)) < len(metrics):
            raise ValueError(f"claim {self.id}: two checks have the same metric")
        if bad := [metric for metric in metrics if BETWEEN in metric]:
            raise ValueError(f"claim {self.id}: metric {bad[0]!r} holds {BETWEEN!r}, which is kept for records")
        return self

    def check_of(self, metric: str) -> str | None:
        """Name of the check a recorded metric belongs to."""
        own = metric.split(BETWEEN)[0]
        return next((name for name, check in self.checks.items() if check.metric == own), None)


class Register(Strict):
    papers: dict[str, Paper]
    parts: dict[str, str]
    claims: list[Claim]

    @model_validator(mode="after")
    def _names_resolve(self) -> Register:
        twice = [name for name, count in Counter(claim.id for claim in self.claims).items() if count > 1]
        allowed(not twice, f"claim ids given twice: {', '.join(twice)}", "each once")
        for claim in self.claims:
            one_of(f"paper of {claim.id}", claim.source.paper, self.papers)
            one_of(f"part of {claim.id}", claim.part, self.parts)
        return self

    def __getitem__(self, claim_id: str) -> Claim:
        by_id = {claim.id: claim for claim in self.claims}
        one_of("claim", claim_id, by_id)
        return by_id[claim_id]


class _Yaml(yaml.SafeLoader):
    """YAML in which `1e-3` is a number, and a key may be given once: YAML 1.1 keeps the last of two without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
        if any(key in keys[:i] for i, key in enumerate(keys)):
            raise yaml.constructor.ConstructorError(None, None, "a key is given twice", node.start_mark)
        return super().construct_mapping(node, deep=deep)


_Yaml.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+"), list("-+.0123456789")
)


def read_yaml(source: Path | str, name: str, cure: str) -> Any:
    """The content of a file or text called `name`; `ValueError` where it is not there or no YAML, with what to do."""
    try:
        return yaml.load(source if isinstance(source, str) else source.read_bytes(), Loader=_Yaml)
    except OSError as error:
        raise ValueError(f"{name} cannot be read: {error.strerror}; {cure}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not YAML: {error}; {cure}") from error


def register(path: Path = REGISTER) -> Register:
    """Reads and checks the register; raises `ValueError` that says which claim and field is wrong."""
    return _read_register(Path(path), Path(path).stat().st_mtime_ns if Path(path).is_file() else 0)


@cache
def _read_register(path: Path, changed: int) -> Register:
    return validated(Register, read_yaml(path, path.name, "restore it from the repository"), path.name)


def validated(model: type[BaseModel], content: Any, name: str) -> Any:
    """`content` of the file `name` as a `model`; raises `ValueError` that says where it does not fit."""
    try:
        return model.model_validate(content)
    except ValidationError as error:
        lines = [f"{_place(content, each['loc'])}: {each['msg']}" for each in error.errors()]
        raise ValueError(f"{name} does not fit the schema:\n  " + "\n  ".join(lines)) from error


def _place(content: Any, steps: Sequence[int | str]) -> str:
    """`claims[3]` is hard to find in a long file: name the claim instead."""
    if len(steps) > 1 and steps[0] == "claims" and isinstance(steps[1], int):
        claim = content["claims"][steps[1]]
        name = claim.get("id", f"number {steps[1] + 1}") if isinstance(claim, dict) else f"number {steps[1] + 1}"
        return ".".join(["claim " + name, *map(str, steps[2:])])
    return ".".join(map(str, steps)) or "the file"
