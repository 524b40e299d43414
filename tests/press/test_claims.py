"""The register, the rules, what is recorded and how it is judged, and the pages made from it."""

import json
import os
import re
import signal
import subprocess
import sys
import textwrap
from dataclasses import dataclass
from typing import get_args

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given
from hypothesis import strategies as st
from pybtex.database import parse_file

from helpers import settings
from helpers.press import chapters, claims, rules, scoreboard, verdicts
from helpers.study import scores

SLUG = "01_topk_sae_is_rank1_moe"
finite = st.floats(-1e6, 1e6, allow_nan=False)

# Every id of the three papers' lists of claims, split where a row held several, and the book's own.
EXPECTED = """
duality.forward duality.tensor gaps.rank gaps.training gaps.objective dead.synthetic dead.pareto dead.mechanism dead.lm
implicit.ratio expander.storage expander.gather expander.identifiability expander.omp expander.frontier expander.ce
expander.support expander.amortisation secret.hypothesis secret.gaussian secret.linear secret.count secret.dimension
secret.routing secret.approximate secret.polynomial secret.distil secret.expressivity secret.shared secret.lowrank
secret.convergence secret.padding family.same family.inference family.production family.causal family.free
family.constraint reader.mixture audit.variance audit.loss audit.dead
"""

# One claim for each rule, so that the tests do not move with the book's thresholds.
BOOK = """
papers: {p: {letter: A, title: A title, cite: key, where: somewhere}}
parts: {I: First}
claims:
"""
RULES = {
    "identity": "{name: identity, tolerance: 1.0e-5}",
    "above": "{name: interval_above, value: 2}",
    "below": "{name: interval_below, value: 2}",
    "within": "{name: interval_within, value: [1, 2]}",
    "count": "{name: bound_holds, value: violations}",
    "margin": "{name: bound_holds, value: margin}",
    "rising": "{name: trend, sign: positive}",
    "falling": "{name: trend, sign: negative}",
}


def claim_text(name: str, checks: dict[str, str], teachers: str = "any") -> str:
    lines = [
        f"- id: {name}",
        f"  statement: The statement of {name}.",
        "  source: {paper: p, where: Theorem 1}",
        "  paper_says: {number: '1', setting: a setting}",
        "  part: I",
        f"  chapter: {SLUG}",
        f"  teachers: {teachers}",
        "  checks:",
        *(
            f"    {check}: {{metric: metric {check}, why: because, control: the reverse, rule: {rule}}}"
            for check, rule in checks.items()
        ),
    ]
    return "\n".join(lines) + "\n"


@pytest.fixture
def write(tmp_path, monkeypatch):
    """Puts a register in the place of the book's and returns it."""

    def write(text: str) -> rules.Register:
        path = tmp_path / "claims.yml"
        path.write_text(BOOK + text)
        monkeypatch.setattr(claims, "register", lambda: original(path))
        monkeypatch.setattr(scoreboard, "register", lambda: original(path))
        return original(path)

    original = claims.register
    return write


@pytest.fixture
def book(write):
    return write("".join(claim_text(f"rule.{name}", {"only": rule}) for name, rule in RULES.items()))


@pytest.fixture
def log(tmp_path):
    return claims.Chapter(SLUG, {"device": "cpu"}, teacher="gemma-3-270m", results_dir=tmp_path / "results")


# ------------------------------------------------------------------------------------------------------ the register
def test_the_register_holds_every_claim_once():
    assert sorted(claim.id for claim in claims.register().claims) == sorted(EXPECTED.split())


def test_the_register_cites_what_is_in_the_bibliography():
    keys = set(parse_file(str(settings.ROOT / "book" / "references.bib")).entries)
    assert {paper.cite for paper in claims.register().papers.values()} <= keys


def test_the_tolerances_of_the_duality_are_those_the_book_promises():
    for name in ("duality.forward", "duality.tensor"):
        checks = claims.register()[name].checks
        assert {variant: check.rule.tolerance for variant, check in checks.items()} == {
            "float64": 1e-12,
            "float32": 1e-5,
        }


def changed(edit):
    """The real register with `edit` applied to its first claim."""
    content = yaml.safe_load(rules.REGISTER.read_text(encoding="utf-8"))
    edit(content["claims"][0])
    return yaml.safe_dump(content, allow_unicode=True)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (lambda c: c.pop("statement"), "claim duality.forward.statement: Field required"),
        (lambda c: c.update(colour="red"), "claim duality.forward.colour: Extra inputs"),
        (lambda c: c.update(id="Duality"), "claim Duality.id: String should match pattern"),
        (lambda c: c.update(part="IX"), "part of duality.forward='IX' is unknown; allowed: 'I'"),
        (lambda c: c["source"].update(paper="nature"), "paper of duality.forward='nature' is unknown"),
        (lambda c: c.update(id="duality.tensor"), "claim ids given twice: duality.tensor"),
        (lambda c: c.update(checks={}), "claim duality.forward.checks: Dictionary should have at least 1 item"),
        (lambda c: c["checks"]["float64"].pop("why"), "claim duality.forward.checks.float64.why: Field required"),
        (lambda c: c["checks"]["float64"]["rule"].update(name="close"), "'identity', 'bound_holds', 'interval_above'"),
        (lambda c: c["checks"]["float64"]["rule"].update(tolerance=-1), "tolerance: Input should be greater than 0"),
        (lambda c: c["checks"]["float64"]["rule"].pop("tolerance"), "tolerance: Field required"),
        (lambda c: c["checks"]["float64"].update(metric="a · b"), "which is kept for records"),
        (lambda c: c["checks"]["float64"].update(control="", no_control=""), "allowed: one of them"),
        (lambda c: c["checks"]["float64"].update(control="a", no_control="b"), "allowed: one of them"),
        (
            lambda c: c["checks"]["float64"].update(rule={"name": "interval_within", "value": [2, 1]}),
            "allowed: [low, high] with low < high",
        ),
        (lambda c: c["checks"].update(again=c["checks"]["float64"]), "two checks have the same metric"),
    ],
)
def test_a_wrong_register_says_where_and_what(tmp_path, edit, told):
    path = tmp_path / "claims.yml"
    path.write_text(changed(edit), encoding="utf-8")
    with pytest.raises(ValueError, match=re.escape(told)):
        claims.register(path)


@pytest.mark.parametrize("text", ["claims: [", "papers: {}\npapers: {}\n"])
def test_broken_yaml_and_repeated_keys_are_refused(tmp_path, text):
    path = tmp_path / "claims.yml"
    path.write_text(text)
    with pytest.raises(ValueError, match="claims.yml is not YAML"):
        claims.register(path)


# --------------------------------------------------------------------------------------------------------- the rules
def restated(name: str, value: float, low: float, high: float) -> str:
    """The rules of RULES said again: each asks one or two questions; all yes holds, all no fails."""
    inside = {
        "identity": [abs(value) <= 1e-5],
        "above": [low > 2, high > 2],
        "below": [low < 2, high < 2],
        "within": [low > 1 and high < 2, low < 2 and high > 1],
        "count": [value == 0],
        "margin": [value >= 0],
        "rising": [low > 0, high > 0],
        "falling": [low < 0, high < 0],
    }[name]
    return "holds" if all(inside) else "straddles" if any(inside) else "fails"


@given(
    name=st.sampled_from(sorted(RULES)),
    ends=st.lists(finite | st.sampled_from([0.0, 1.0, 2.0, 1e-5]), min_size=3, max_size=3),
)
def test_each_rule_says_what_its_restatement_says(name, ends):
    low, value, high = sorted(ends)
    rule = rules.Check.model_validate(
        {"metric": "m", "why": "w", "control": "c", "rule": yaml.safe_load(RULES[name])}
    ).rule
    assert rule.outcome(value, low, high) == restated(name, value, low, high)


@given(ends=st.lists(finite, min_size=3, max_size=3), sign=st.sampled_from(["positive", "negative"]))
def test_a_trend_turned_over_is_the_other_trend(ends, sign):
    low, value, high = sorted(ends)
    other = {"positive": "negative", "negative": "positive"}[sign]
    ours = rules.Trend(name="trend", sign=sign).outcome(value, low, high)
    assert ours == rules.Trend(name="trend", sign=other).outcome(-value, -high, -low)


@given(ends=st.lists(finite, min_size=3, max_size=3), line=finite)
def test_an_interval_is_never_wholly_above_and_wholly_below(ends, line):
    low, value, high = sorted(ends)
    above = rules.IntervalAbove(name="interval_above", value=line).outcome(value, low, high)
    below = rules.IntervalBelow(name="interval_below", value=line).outcome(value, low, high)
    assert {above, below} != {"holds"}
    if above == "holds":
        assert below == "fails"


@given(ends=st.lists(finite, min_size=3, max_size=3), line=finite, width=st.floats(0, 10))
def test_a_wider_interval_never_says_more(ends, line, width):
    low, value, high = sorted(ends)
    rule = rules.IntervalAbove(name="interval_above", value=line)
    assert rule.outcome(value, low - width, high + width) in {rule.outcome(value, low, high), "straddles"}


@pytest.mark.parametrize(
    ("claim", "value", "ci", "scope", "verdict"),
    [
        ("rule.identity", 1e-6, None, "paper setting", "reproduced"),
        ("rule.identity", 1e-6, None, "analogue", "holds here"),
        ("rule.identity", 1e-4, None, "paper setting", "not reproduced"),
        ("rule.above", 3, (2.5, 4), "analogue", "holds here"),
        ("rule.above", 3, (1.5, 4), "paper setting", "partly"),
        ("rule.above", 1, (0.5, 1.5), "analogue", "fails here"),
        ("rule.above", 1, (0.5, 1.5), "paper setting", "not reproduced"),
        ("rule.within", 1.5, (1.2, 1.8), "analogue", "holds here"),
        ("rule.within", 1.5, (0.5, 2.5), "analogue", "partly"),
        ("rule.count", 0, None, "paper setting", "reproduced"),
        ("rule.count", 1, None, "paper setting", "not reproduced"),
        ("rule.margin", -1e-9, None, "analogue", "fails here"),
        ("rule.falling", -1, (-2, -0.1), "analogue", "holds here"),
    ],
)
def test_verdicts_follow_from_rule_and_scope(book, log, claim, value, ci, scope, verdict):
    record = log.record(claim, value, ci=ci, n=100, scope=scope, resampled="seeds" if ci else None)
    assert record.verdict == verdict


# --------------------------------------------------------------------------------------------------------- recording
@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"claim": "rule.nothing"}, "claim='rule.nothing' is unknown; allowed: 'rule.identity'"),
        ({"scope": "paper"}, "scope='paper' is unknown; allowed: 'paper setting', 'analogue'"),
        ({"value": float("nan")}, "value=nan; allowed: a finite number"),
        ({"ci": (0.0, float("inf"))}, "ci high=inf; allowed: a finite number"),
        ({"ci": (2.2, 2.9)}, "ci=(2.2, 2.9) does not hold value=3.0"),
        ({"ci": (4, 2)}, "does not hold value"),
        ({"ci": (1, 2, 3)}, "is not a pair"),
        ({"ci": None, "resampled": None}, "rule.above/only: the rule interval_above needs ci"),
        ({"ci": None}, "resampled='seeds' without an interval"),
        ({"resampled": "tokens"}, "resampled='tokens' is unknown; allowed: 'seeds', 'articles', 'seed × article'"),
        ({"resampled": None}, "resampled=None is unknown"),
        ({"n": 0}, "n=0; allowed: a positive whole number"),
        ({"n": (3, 0)}, "n=(3, 0); allowed: a positive whole number, or one of each kind"),
        ({"n": (3, 5)}, "n=(3, 5) of resampled='seeds'; allowed: one number"),
        ({"resampled": "seed × article"}, "n=3 of resampled='seed × article'; allowed: a pair"),
        ({"note": "Outcome(" * 40}, "has 320 characters; allowed: up to 300"),
        ({"variant": "float16"}, "rule.above: variant='float16' is unknown; allowed: 'only'"),
        ({"claim": "rule.count", "value": 0.5, "ci": None, "resampled": None}, "is not a count of violations"),
        ({"claim": "rule.count", "value": 9, "ci": None, "resampled": None}, "among n=3 samples"),
        ({"claim": "rule.identity", "value": -1, "ci": None, "resampled": None}, "give its absolute value"),
    ],
)
def test_a_record_that_cannot_be_judged_is_refused(book, log, arguments, told):
    good = {"claim": "rule.above", "value": 3.0, "ci": (2.5, 4.0), "resampled": "seeds", "n": 3, "scope": "analogue"}
    log.record(**good)
    with pytest.raises(ValueError, match=re.escape(told)):
        log.record(**(good | arguments))
    assert len(log.records) == 1


def test_only_the_papers_own_teacher_makes_a_paper_setting(write, log):
    write(claim_text("a.b", {"only": RULES["identity"]}, teachers="[lab/model]"))
    with pytest.raises(ValueError, match="teacher='gemma-3-270m'; allowed: lab/model"):
        log.record("a.b", 0, n=1, scope="paper setting")
    assert log.record("a.b", 0, n=1, scope="paper setting", teacher="lab/model").verdict == "reproduced"
    write(claim_text("a.b", {"only": RULES["identity"]}, teachers="[]"))
    with pytest.raises(ValueError, match="the setting is not public"):
        log.record("a.b", 0, n=1, scope="paper setting")


def test_a_record_on_random_inputs_names_no_teacher(book, log):
    assert log.record("rule.identity", 0, n=1, scope="analogue").teacher == "gemma-3-270m"
    assert log.record("rule.identity", 0, n=1, scope="analogue", teacher=None).teacher is None


def test_a_claim_with_several_checks_wants_to_know_which(write, log):
    write(claim_text("a.b", {"one": RULES["identity"], "two": RULES["count"]}))
    with pytest.raises(ValueError, match="a.b: variant=None is unknown; allowed: 'one', 'two'"):
        log.record("a.b", 0, n=1, scope="analogue")


@given(value=finite, width=st.floats(0, 1e3))
def test_an_interval_of_equal_percentiles_is_accepted(value, width):
    assert claims._measured(value, (value - width, value + width), 3, "seeds")
    around = value * (1 + 1e-13)
    assert claims._measured(value, (around, around), 3, "seeds")


def test_numbers_of_numpy_and_torch_are_taken(book, log):
    log.record("rule.above", np.float32(3), ci=np.array([2.5, 4]), resampled="seeds", n=np.int64(3), scope="analogue")
    log.record("rule.identity", torch.tensor(1e-7), n=3, scope="analogue")
    log.parameters["seeds"] = np.arange(3)
    written = json.loads(log.save().path.read_text())
    assert written["parameters"]["seeds"] == [0, 1, 2]


@dataclass
class Compared:
    value: float = 3.0
    ci: tuple[float, float] | None = (2.5, 4.0)
    n: int = 7
    resampled: str = "articles"


def test_a_comparison_is_recorded_whole_and_what_is_given_beside_it_wins(book, log):
    whole = log.record("rule.above", Compared(), scope="analogue")
    assert (whole.value, whole.ci, whole.n, whole.resampled) == (3.0, (2.5, 4.0), 7, "articles")
    other = log.record("rule.above", Compared(), scope="analogue", n=2, ci=(1, 5), resampled="seeds")
    assert (other.value, other.ci, other.n, other.resampled) == (3.0, (1.0, 5.0), 2, "seeds")
    bare = log.record("rule.identity", Compared(0.0, None), scope="analogue")
    assert (bare.ci, bare.n, bare.resampled) == (None, 7, None)
    with pytest.raises(ValueError, match="needs ci"):
        log.record("rule.above", Compared(ci=None), scope="analogue")
    with pytest.raises(ValueError, match="n=None; allowed: a positive whole number"):
        log.record("rule.identity", 0.0, scope="analogue")


def test_only_a_long_run_keeps_its_finished_cells_with_the_book(log, monkeypatch):
    assert log.cells is None
    monkeypatch.setenv("RANK1_PROFILE", "long+custom")
    assert log.cells is None
    monkeypatch.setenv("RANK1_PROFILE", "long")
    assert log.cells == settings.ROOT / "results" / "cells" / SLUG
    monkeypatch.setenv("RANK1_PROFILE", "long-smollm2")
    assert log.cells == settings.ROOT / "results" / "cells" / f"{SLUG}-smollm2"


def test_a_cell_run_twice_records_once_and_other_numbers_are_kept(book, log):
    for value in (1e-7, 1e-7, 1e-8):
        log.record("rule.identity", value, n=3, scope="analogue")
    assert [record.value for record in log.records] == [1e-7, 1e-8]


def test_the_results_file_has_the_published_form(book, log):
    log.record("rule.above", 3, ci=(2.5, 4), resampled="seeds", n=3, scope="analogue", metric="k = 8", note="a note")
    written = json.loads(log.save().path.read_text(encoding="utf-8"))
    assert list(written) == ["chapter", "profile", "parameters", "environment", "seconds", "records"]
    assert written["chapter"] == SLUG and written["profile"] == settings.profile()
    assert set(written["environment"]) == {"python", "torch", "transformers", "device", "threads", "commit", "date"}
    assert written["seconds"] >= 0
    assert written["records"] == [
        {
            "claim": "rule.above",
            "metric": "metric only · k = 8",
            "value": 3.0,
            "ci": [2.5, 4.0],
            "n": 3,
            "resampled": "seeds",
            "unit": "",
            "scope": "analogue",
            "teacher": "gemma-3-270m",
            "expected": "interval above 2",
            "verdict": "holds here",
            "note": "a note",
        }
    ]


def test_points_that_nothing_could_read_again_are_named_and_not_written(log):
    log.points["curves"] = {"mixture": [1.0]}
    with pytest.raises(ValueError, match=r"points.curves: Input should be a valid list"):
        log.save()
    assert not log.path.exists()


def test_a_chapter_without_records_is_saved_too(log):
    assert json.loads(log.save().path.read_text())["records"] == []
    assert "tests no claim" in log._repr_html_()


def test_a_slug_that_is_not_a_file_stem_is_refused(tmp_path):
    with pytest.raises(ValueError, match="slug='Chapter 1'"):
        claims.Chapter("Chapter 1", {}, results_dir=tmp_path)


def test_a_record_shows_its_verdict_and_escapes_its_note(book, log):
    record = log.record("rule.identity", 0, n=4096, scope="analogue", note="<script>")
    assert "holds here" in record._repr_html_() and "<script>" not in record._repr_html_()
    assert str(record) == "rule.identity | metric only: 0, n = 4,096 | expected ≤ 1e-05 | holds here"


def test_the_environment_knows_the_commit_and_does_without_one(tmp_path, monkeypatch):
    def git(*arguments):
        subprocess.run(
            ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b", *arguments], check=True
        )

    monkeypatch.setattr(settings, "ROOT", tmp_path)
    assert claims.environment("cpu")["commit"] is None
    git("init", "-q")
    assert claims.environment("cpu")["commit"] is None
    git("commit", "-q", "--allow-empty", "-m", "first")
    assert re.fullmatch(r"[0-9a-f]{12}", claims.environment("cpu")["commit"])
    (tmp_path / "results" / "cells").mkdir(parents=True)
    (tmp_path / "results" / "cells" / "one.json").write_text("")
    assert not claims.environment("cpu")["commit"].endswith("-dirty"), "a run writes it"
    (tmp_path / "new.py").write_text("")
    assert claims.environment("cpu")["commit"].endswith("-dirty")
    (tmp_path / "inside").mkdir()
    monkeypatch.setattr(settings, "ROOT", tmp_path / "inside")
    assert claims.environment("cpu")["commit"] is None  # another project's commit is not ours


def test_a_killed_writer_leaves_the_old_file_whole(tmp_path):
    target = tmp_path / "results.json"
    settings.write_json(target, {"old": True})
    script = textwrap.dedent("""
        import os, signal, sys
        from pathlib import Path
        from helpers import settings
        os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)
        settings.write_json(Path(sys.argv[1]), {"new": "x" * 10**6})
    """)
    done = subprocess.run([sys.executable, "-c", script, str(target)], cwd=settings.ROOT, check=False)
    assert done.returncode == -signal.SIGKILL
    assert json.loads(target.read_text()) == {"old": True}
    assert claims.load_results(tmp_path) == []  # what the killed process left is not taken for a results file


def test_a_failed_write_leaves_nothing_behind(tmp_path, monkeypatch):
    for content in ({"x": float("nan")}, {"x": object()}):
        with pytest.raises((ValueError, TypeError)):
            settings.write_json(tmp_path / "results.json", content)
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError("no space left")))
    with pytest.raises(ValueError, match=r"results.json cannot be written: no space left"):
        settings.write_json(tmp_path / "results.json", {})
    assert list(tmp_path.iterdir()) == []


# -------------------------------------------------------------------------------------------------- overall verdicts
GOOD, HERE, HALF, MISS, BAD, FEW = "reproduced", "holds here", "partly", "fails here", "not reproduced", "too few"


@pytest.mark.parametrize(
    ("one", "two", "fits"),
    [
        ([], [], 0),
        ([FEW], [], 1),
        ([FEW], [FEW], 1),
        ([MISS], [MISS], 3),
        ([MISS], [], 3),  # what fails is not saved by what was not run
        ([MISS, FEW], [FEW], 3),  # nor by what cannot be judged
        ([BAD], [BAD], 4),
        ([BAD], [], 4),
        ([BAD], [MISS], 4),
        ([BAD, FEW], [MISS], 4),
        ([GOOD], [GOOD], 5),
        ([GOOD, HERE], [GOOD], 5),  # an analogue beside the paper's setting takes nothing away
        ([GOOD], [HERE], 6),
        ([HERE], [HERE], 6),
        ([GOOD], [], 7),  # a check that was not run
        ([HERE], [FEW], 7),
        ([GOOD, FEW], [GOOD], 7),
        ([GOOD], [BAD], 7),
        ([HERE], [MISS], 7),
        ([HERE, MISS], [HERE], 7),
        ([GOOD, BAD], [GOOD], 7),
        ([HALF], [GOOD], 7),
        ([HALF], [], 2),
        ([HALF], [FEW], 2),
        ([BAD], [HALF], 4),
        ([MISS], [HALF], 3),  # nor by what is open
    ],
)
def test_a_claim_is_judged_by_one_row_of_the_truth_table(write, one, two, fits):
    book = write(
        claim_text("a.b", {"one": RULES["identity"], "two": RULES["identity"]})
        + claim_text("c.d", {"x": RULES["count"]})
    )
    records = [
        verdicts.Record(**row("a.b", metric=f"metric {check}", verdict=verdict))
        for check, found in (("one", one), ("two", two))
        for verdict in found
    ]
    expected = verdicts.TABLE[fits].verdict
    assert verdicts.combined(book["a.b"], records) == expected
    assert verdicts.combined(book["c.d"], []) == "not tested"


def test_the_table_has_a_row_for_every_verdict_and_ends_with_one_that_always_fits():
    assert {row.verdict for row in verdicts.TABLE} == set(get_args(verdicts.Verdict))
    assert verdicts.TABLE[-1].among == set(get_args(verdicts.Verdict)) and not verdicts.TABLE[-1].each


@pytest.mark.parametrize(
    ("n", "resampled", "few"),
    [
        (2, "seeds", True),
        (3, "seeds", False),
        (2, "random draws", True),
        (4, "articles", True),
        (5, "articles", False),  # an interval over articles is about this one student, and says so
        (4, "samples", True),
        (20, "seed × article", True),  # one number does not say how many there are of each
        ((2, 10), "seed × article", True),
        ((3, 5), "seed × article", False),
        ((3, 4), "layer × article", True),
        (2, "sizes", True),  # a slope over two sizes is no slope
        (1, None, False),
    ],
)
def test_an_interval_on_too_few_units_is_not_judged(n, resampled, few):
    rule = rules.IntervalAbove(value=2)
    record = verdicts.Record(**row("a.b", value=3, ci=(2.5, 4), scope="analogue", n=n, resampled=resampled))
    assert record.judged(rule).verdict == ("too few" if few else "holds here")
    none = record.model_copy(update={"value": 0, "ci": None})
    assert none.judged(rules.Bound()).verdict == "holds here"


def test_seeds_are_counted_when_a_chapter_records_and_when_it_is_read(book, log):
    record = log.record("rule.above", 3, ci=(2.5, 4), n=(2, 10), resampled="seed × article", scope="analogue")
    assert record.verdict == "too few" and record.measured() == "3 [2.5, 4], n = 2 × 10 (seed × article)"
    content = json.loads(log.save().path.read_text())
    assert content["records"][0]["n"] == [2, 10]
    ((_, (again,)),) = claims.load_results(log.path.parent, book)
    assert again == record


# ---------------------------------------------------------------------------------------------------------- controls
def test_a_control_is_judged_by_the_rule_and_kept_once(book, log):
    for _ in range(2):
        log.control("rule.above", None, 1.5, ci=(0.5, 2.5), n=3, resampled="seeds")
    passing = log.control("rule.identity", "only", 1e-7, n=3)
    written = json.loads(log.save().path.read_text())["controls"]
    expected = {"claim": "rule.above", "check": "only", "value": 1.5, "ci": [0.5, 2.5], "n": 3, "resampled": "seeds"}
    assert written[0] == expected | {"draws": [], "passed": 0.0, "rejected": True} and len(written) == 2
    assert not passing.rejected
    assert list(claims.passing_controls(log.path.parent, book)) == [
        f"{SLUG}: the control of rule.identity/only passes with 1e-07, n = 3"
    ]


@pytest.mark.parametrize(("passing", "rejected"), [(0, True), (1, True), (3, True), (4, False)])
def test_a_control_of_several_draws_is_rejected_where_few_of_them_pass(book, log, passing, rejected):
    values = [3.0] * passing + [1.0] * (19 - passing)
    control = log.control("rule.above", None, [Compared(value, (value - 0.5, value + 0.5)) for value in values])
    assert (control.value, control.ci, control.n) == (1.0, (0.5, 1.5), 7)
    assert (control.passed, control.rejected) == (passing / 19, rejected)
    assert control.measured() == f"1 [0.5, 1.5], n = 7, {passing} of 19 draws pass"
    log.save()
    ((run, _),) = claims.load_results(log.path.parent, book)
    assert run.controls == [control]


def test_what_would_hold_by_chance_is_added_up_over_records_from_their_controls(book, log):
    draws = [Compared(value, (value - 0.5, value + 0.5)) for value in (3.0, 1.0, 1.0, 1.0)]
    for metric in ("k = 1", "k = 2", "k = 3"):
        log.record("rule.above", 3, ci=(2.5, 4), resampled="seeds", n=3, scope="analogue", metric=metric)
    log.record("rule.identity", 0.0, n=3, scope="analogue")
    log.record("rule.count", 0, n=3, scope="analogue")
    log.control("rule.above", None, draws)
    log.control("rule.above", None, 1.0, ci=(0.5, 1.5), n=3, resampled="seeds")
    log.control("rule.identity", None, 1.0, n=3)
    found = verdicts.by_chance(log.records, log.controls, book)
    assert found == (pytest.approx(3 * (0.25 + 0) / 2), 4)
    assert verdicts.by_chance(log.records, [], book) == (0, 0)


def test_a_record_of_a_metric_that_the_register_lost_is_stale(write, tmp_path):
    save(tmp_path / "here", SLUG, row("a.b"), row("a.b", metric="metric of old · k = 1"))
    with pytest.raises(ValueError, match="metric 'metric of old · k = 1' is not one of a.b"):
        claims.load_results(tmp_path / "here", write(claim_text("a.b", {"only": RULES["identity"]})))


def test_every_check_has_a_control_or_says_why_there_can_be_none():
    for claim in claims.register().claims:
        for name, check in claim.checks.items():
            assert "not run" not in check.no_control, f"{claim.id}/{name}"


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({"variant": "float16"}, "rule.above: variant='float16' is unknown"),
        ({"ci": None, "resampled": None}, "needs ci"),
        ({"value": float("nan")}, "value=nan"),
        ({"n": 0}, "n=0"),
    ],
)
def test_a_control_that_cannot_be_judged_is_refused(book, log, arguments, told):
    good = {"claim": "rule.above", "variant": "only", "value": 1.0, "ci": (0.5, 1.5), "n": 3, "resampled": "seeds"}
    with pytest.raises(ValueError, match=re.escape(told)):
        log.control(**(good | arguments))
    assert log.controls == []


def test_a_control_is_recorded_only_where_the_register_says_what_it_is(write, log):
    write(claim_text("a.b", {"only": RULES["identity"]}).replace("control: the", "no_control: the"))
    with pytest.raises(ValueError, match="a.b/only has no `control`"):
        log.control("a.b", None, 1.0, n=1)


def test_kept_controls_are_judged_again_and_stale_ones_are_named(book, log):
    log.control("rule.identity", None, 1.0, n=3)
    content = json.loads(log.save().path.read_text())
    content["controls"][0]["rejected"] = False
    log.path.write_text(json.dumps(content))
    ((run, _),) = claims.load_results(log.path.parent, book)
    assert run.controls[0].rejected
    content["controls"][0]["check"] = "gone"
    log.path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=f"{SLUG}.json is stale: control of rule.identity/gone"):
        claims.load_results(log.path.parent, book)


def test_every_control_of_the_book_is_recorded_in_a_chapter():
    """`control` in the register and `log.control` in a notebook go together."""
    stated = {(c.id, name) for c in claims.register().claims for name, check in c.checks.items() if check.control}
    written = set()
    for path in (settings.ROOT / "notebooks").glob("*.ipynb"):
        code = "\n".join("".join(cell["source"]) for cell in json.loads(path.read_text())["cells"])
        called = set(re.findall(r"(?:log\.control|controls_of)\(\s*\"([\w.]+)\",\s*(\"?\w+\"?)", code))
        for claim, variant in called:
            every = {pair for pair in stated if pair[0] == claim}
            written |= {(claim, variant.strip('"'))} if '"' in variant else every
    assert written == stated


@pytest.mark.parametrize("folder", [settings.ROOT / "_build" / "results" / "quick", claims.REFERENCE], ids=str)
def test_no_control_passes_the_rule_that_should_reject_it(folder):
    assert list(claims.passing_controls(folder)) == []


def padding(log, shares, spread):
    for name, share in zip(("input", "output", "gaussian"), shares, strict=True):
        ci = (share - 0.02, share + 0.02)
        log.record(
            "secret.padding", share, ci=ci, resampled="articles", n=11, scope="analogue", variant=f"share_{name}"
        )
    ci = (spread - 0.02, spread + 0.02)
    log.record("secret.padding", spread, ci=ci, resampled="articles", n=11, scope="analogue", variant="consistency")
    return verdicts.combined(claims.register()["secret.padding"], log.records)


@pytest.mark.parametrize(
    ("shares", "spread", "expected"),
    [
        ((0.30, 0.30, 0.31), 0.01, "holds here"),
        ((0.295, 0.233, 0.365), 0.13, "partly"),  # all above zero, and no single share fits
        ((0.0, 0.0, 0.0), 0.01, "partly"),
        ((-0.1, -0.1, 0.05), 0.15, "fails here"),  # the last share straddles the line, and saves nothing
        ((-0.1, -0.1, -0.1), 0.10, "fails here"),
    ],
)
def test_the_padding_claim_needs_three_shares_and_one_that_fits_all(log, shares, spread, expected):
    assert padding(log, shares, spread) == expected


# ----------------------------------------------------------------------------------------------- reading and the page
def save(folder, chapter, *records, profile="quick"):
    folder.mkdir(parents=True, exist_ok=True)
    content = {"chapter": chapter, "profile": profile, "parameters": {}, "environment": {}, "seconds": 1.0}
    (folder / f"{chapter}.json").write_text(json.dumps(content | {"records": list(records)}))


def row(claim="rule.identity", **changes):
    fields = {"claim": claim, "metric": "metric only", "value": 0.0, "ci": None, "n": 3, "resampled": None, "unit": ""}
    return fields | {"scope": "analogue", "teacher": None, "expected": "x", "verdict": "partly", "note": ""} | changes


@pytest.fixture
def render(tmp_path):
    for slug in (SLUG, "00_how_to_read"):
        (tmp_path / "notebooks").mkdir(exist_ok=True)
        (tmp_path / "notebooks" / f"{slug}.ipynb").write_text("{}")

    def render():
        here, long = tmp_path / "here", tmp_path / "long"
        made = scoreboard.pages(scoreboard.Board.read(here, long), notebooks=tmp_path / "notebooks")
        return made["scoreboard.md"]

    return render


def card(page, claim):
    """The rows of the page about one claim."""
    return page.split(f'id="{scoreboard.anchor(claim)}"')[1].split("</tbody>\n<tbody")[0]


def test_the_page_shows_every_claim_of_the_book_exactly_once(render):
    page = render()
    for claim in claims.register().claims:
        assert page.count(f'id="{scoreboard.anchor(claim.id)}"') == 1
        assert claim.title, f"{claim.id} has no title"
        for check in claim.checks.values():
            assert scoreboard.rich(check.metric) in card(page, claim.id)
        assert "verdict-not-tested" in card(page, claim.id)
    assert "0 of 42 claims of three papers and this book are tested here" in page


def test_the_long_runs_that_are_kept_can_be_read_and_stand_in_the_register():
    found = claims.load_results(claims.REFERENCE)
    assert {results.chapter for results, _ in found} == {path.stem for path in claims.REFERENCE.glob("*.json")}


def made_again(record) -> tuple[float, float]:
    """A record's interval, from what the number is without each unit."""
    options = dict(record.jackknife)
    return scores.interval(record.value, *map(np.array, options.pop("without")), **options)


def test_the_interval_of_a_record_can_be_made_again_from_its_file(book, log):
    rows = np.random.default_rng(0).uniform(2, 4, (3, 8))
    table = scores.Sums({"a": {seed: {"errors": each, "norms": np.ones(8)} for seed, each in enumerate(rows)}})
    log.record("rule.above", table.fvu("a"), scope="analogue")
    log.record("rule.below", scores.over_seeds(rows.mean(1)), scope="analogue")
    log.record("rule.within", 1.5, ci=(1.4, 1.6), n=5, resampled="articles", scope="analogue")
    log.save()
    ((_, (both, seeds, neither)),) = claims.load_results(log.path.parent)
    assert [len(each) for each in both.jackknife["without"]] == [8, 3]
    assert [len(each) for each in seeds.jackknife["without"]] == [3]
    assert made_again(both) == pytest.approx(both.ci) and made_again(seeds) == pytest.approx(seeds.ci)
    assert neither.jackknife is None and "jackknife" not in json.loads(log.path.read_text())["records"][2]


def test_the_intervals_of_kept_runs_are_those_of_what_they_keep():
    kept = [record for _, records in claims.load_results(claims.REFERENCE) for record in records if record.jackknife]
    assert all(made_again(record) == pytest.approx(record.ci, rel=1e-9) for record in kept)


def test_the_page_shows_controls_beside_records_and_counts_those_that_pass(book, log, tmp_path, render):
    log.path = tmp_path / "here" / f"{SLUG}.json"
    log.control("rule.identity", None, 1.0, n=3)
    log.control("rule.count", None, 0, n=3)
    log.path.parent.mkdir()
    log.save()
    page = render()
    assert "the reverse: <b>1, n = 3</b>, rejected" in card(page, "rule.identity")
    assert "the reverse: <b>0, n = 3</b>, <b>PASSES</b>" in card(page, "rule.count")
    assert "the reverse: not in this build" in card(page, "rule.above")
    assert "2 controls were recorded; 1 of them passed" in page
    assert "By chance alone" not in page, "no record has a control yet"
    log.record("rule.identity", 1e-7, n=3, scope="analogue")
    log.record("rule.count", 0, n=3, scope="analogue")
    log.save()
    assert "By chance alone 1 of the 2 numbers so controlled would hold." in render()


def test_stored_verdicts_are_judged_again(book, tmp_path, render):
    save(tmp_path / "here", SLUG, row())
    ((_, (record,)),) = claims.load_results(tmp_path / "here", book)
    assert (record.verdict, record.expected) == ("holds here", "≤ 1e-05")


@pytest.mark.parametrize(
    ("stale", "told"),
    [
        (row("rule.gone"), "claim='rule.gone' is unknown"),
        (row(metric="another metric"), "metric 'another metric' is not one of rule.identity"),
        (row("rule.above"), "needs ci"),
    ],
)
def test_stale_records_stop_the_page_and_name_the_file(book, tmp_path, render, stale, told):
    save(tmp_path / "here", SLUG, stale)
    with pytest.raises(ValueError, match=f"{SLUG}.json is stale.*{re.escape(told)}"):
        render()


@pytest.mark.parametrize("content", ['{"chapter": "01', '{"records": [{}]}', '{"records": 3}'])
def test_a_damaged_results_file_is_named(book, tmp_path, render, content):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / f"{SLUG}.json").write_text(content)
    with pytest.raises(ValueError, match=f"{SLUG}.json"):
        render()


def test_results_of_a_chapter_the_book_no_longer_has_stop_the_page(book, tmp_path, render):
    save(tmp_path / "here", "09_gone", row())
    with pytest.raises(ValueError, match="'09_gone', which the book does not have"):
        render()


def test_files_without_records_are_not_results(book, tmp_path, render):
    (tmp_path / "long").mkdir()
    (tmp_path / "long" / "curves.json").write_text('{"points": [1, 2]}')
    assert "No chapter has run" in render()


def test_reference_runs_carry_the_verdict_and_are_labelled_apart(book, tmp_path, render):
    far = {"ci": [1.0, 1.5], "resampled": "seeds", "value": 1.2}
    near = {"ci": [2.5, 3.5], "resampled": "seeds", "value": 3.0, "scope": "paper setting"}
    save(tmp_path / "here", SLUG, row("rule.above", **far))
    save(tmp_path / "long", SLUG, row("rule.above", **near), profile="full")
    text = card(render(), "rule.above")
    assert text.startswith(' data-verdict="reproduced"')
    long, here = re.findall(r"<tr><td>–.*</tr>", text)
    assert "3.00 [2.50, 3.50]" in long and "the book's run" in long and "reproduced" in long
    assert "1.20 [1.00, 1.50]" in here and "your run" in here and "fails here" in here
    assert text.count("<circle") == 1, "the line shows what the verdict rests on"
    assert f'<a href="notebooks/{SLUG}.html">' in text


def test_the_page_neither_links_to_missing_chapters_nor_lets_a_note_act(book, tmp_path, render):
    save(tmp_path / "here", SLUG, row(note="a *note* with {role}`x` and <b>"))
    text = card(render(), "rule.identity")
    assert "a *note* with {role}`x` and &lt;b&gt;" in text, "it stands in HTML, where Markdown does nothing"
    (tmp_path / "here" / f"{SLUG}.json").unlink()
    (tmp_path / "notebooks" / f"{SLUG}.ipynb").unlink()
    assert f"notebooks/{SLUG}" not in render()


def test_points_of_a_longer_run_are_read_back(tmp_path):
    log = claims.Chapter("05_some_chapter", {"device": "cpu"}, results_dir=tmp_path)
    log.points["grid"] = [{"active": 16, "fvu": [0.5, 0.4], "rank": None}]
    log.save()
    found = claims.reference("05_some_chapter", tmp_path)
    assert found.points["grid"] == log.points["grid"] and found.profile == "quick"
    assert claims.reference("06_other", tmp_path) is None
    (tmp_path / "06_other.json").write_text("{")
    with pytest.raises(ValueError, match="06_other.json is damaged"):
        claims.reference("06_other", tmp_path)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"k": 0}, "k=0; allowed: 1 to n_features=2048"),
        ({"k": 9, "n_features": 8, "ks": [4]}, "k=9; allowed: 1 to n_features=8"),
        ({"ks": [4, 2049]}, "k=2049; allowed: 1 to n_features=2048"),
        ({"n_features": 0}, "n_features=0; allowed: at least 1"),
        ({"steps": 0}, "steps=0; allowed: at least 1"),
    ],
)
def test_sizes_that_no_training_can_have_are_refused_before_a_chapter_works(change, told):
    (chapter,) = (each for each in chapters.find() if each.slug == "14_matching_pursuit")
    claims.Chapter.of(chapter.slug, chapter.defaults)
    with pytest.raises(ValueError, match=told):
        claims.Chapter.of(chapter.slug, chapter.defaults | change)
