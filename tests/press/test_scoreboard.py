"""The scoreboard: where a number lies on its rule's line, what the table shows, and what a reader takes away."""

import csv
import io
import json
import re

import pytest
from bs4 import BeautifulSoup
from pydantic import TypeAdapter

from helpers.press import scoreboard
from helpers.press.rules import Check, Rule, register
from helpers.press.tables import number, table
from helpers.press.verdicts import Record


def check(**rule):
    rule = TypeAdapter(Rule).validate_python(rule)
    return Check(metric="m", rule=rule, why="because", control="the reverse")


@pytest.mark.parametrize(
    ("rule", "good", "bad"),
    [
        ({"name": "identity", "tolerance": 1e-5}, 1e-7, 1e-3),
        ({"name": "bound_holds", "value": "violations"}, 0, 1),
        ({"name": "bound_holds", "value": "margin"}, 2.0, -2.0),
        ({"name": "interval_above", "value": 1.2}, 1.3, 1.1),
        ({"name": "interval_above", "value": 0}, 0.1, -0.1),
        ({"name": "interval_below", "value": 0.8}, 0.7, 0.9),
        ({"name": "interval_within", "value": [0.9, 1.1]}, 1.0, 1.2),
        ({"name": "trend", "sign": "negative"}, -1.0, 1.0),
    ],
)
def test_right_of_the_bar_the_claim_holds(rule, good, bad):
    asked = check(**rule)
    assert -1 <= scoreboard.place(asked, bad) < 0 < scoreboard.place(asked, good) <= 1
    assert asked.rule.outcome(good, good, good) == "holds" and asked.rule.outcome(bad, bad, bad) == "fails"


def test_further_from_the_threshold_is_further_from_the_bar():
    above = check(name="interval_above", value=1)
    places = [scoreboard.place(above, value) for value in (0.5, 0.9, 1.0, 1.1, 2.0, 100.0, 1e6)]
    assert places == sorted(places) and places[2] == 0 and places[-1] == 1
    assert scoreboard.place(check(name="identity", tolerance=1e-5), 0.0) == 1


@pytest.mark.parametrize(
    ("value", "ci", "shown"),
    [
        (12.0, None, "12"),
        (1.468663, (1.4319, 1.5002), "1.47 [1.43, 1.50]"),
        (0.00087, (-0.0055, 0.0072), "0.00087 [−0.00550, 0.00720]"),
        (1.0067, (1.0018, 1.0117), "1.007 [1.002, 1.012]"),
        (0.99, (0.9899999, 0.9900001), "0.99000 [0.99000, 0.99000]"),
        (2.4e-15, None, "2.4×10⁻¹⁵"),
        (519936.0, None, "519,936"),
        (0.0, (0.0, 0.0), "0 [0, 0]"),
    ],
)
def test_a_number_and_its_interval_have_the_same_decimals(value, ci, shown):
    assert number(value, ci) == shown


def test_a_table_sets_numbers_to_the_right_and_names_every_column():
    soup = BeautifulSoup(table([{"who": "<b>a</b>", "n": 3}, {"who": "b", "n": None}]), "html.parser")
    assert [cell.text for cell in soup.select(".number")] == ["n", "3", ""]
    assert all(head.text for head in soup.select("th")) and soup.select_one("td b")


def record(teacher, **changes):
    fields = {"claim": "dead.lm", "metric": "m", "value": 0.0, "ci": None, "n": 1, "resampled": None, "unit": ""}
    fields |= {"scope": "analogue", "teacher": teacher, "expected": "", "verdict": "partly", "note": ""}
    return Record(**fields | changes)


@pytest.mark.parametrize(
    ("teacher", "mark", "column"),
    [
        ("gemma-3-270m", scoreboard.BUILD, "Gemma 3"),
        ("smollm2-135m", scoreboard.OTHER, "SmolLM2"),
        ("HuggingFaceTB/SmolLM2-135M", scoreboard.LONG, "SmolLM2"),
        ("someone/own-model", scoreboard.OTHER, "own-model"),
        ("google/gemma-3-1b-it", scoreboard.OTHER, "your run"),
        (None, scoreboard.OTHER, "your run"),
        ("book-moe", scoreboard.BUILD, ""),
        (None, scoreboard.LONG, ""),
    ],
)
def test_each_family_of_models_has_its_column(teacher, mark, column):
    assert scoreboard.Shown(record(teacher), None, mark).column == column


def test_another_model_and_a_readers_own_run_have_columns_and_decide_nothing(tmp_path):
    capped = register()["dead.lm"].checks["capped"].metric
    interval = {"metric": capped, "value": 0.5, "ci": (0.4, 0.6), "n": 5, "resampled": "seeds"}
    runs = {"quick": "gemma-3-270m", "smollm2": "smollm2-135m", "quick+custom": "gemma-3-270m", "long": "gemma-3-270m"}
    for profile, teacher in runs.items():
        content = {"chapter": "09_dead_features_in_a_language_model", "profile": profile, "parameters": {}}
        content |= {"environment": {}, "seconds": 1.0, "records": [record(teacher, **interval).model_dump()]}
        (tmp_path / profile).mkdir()
        (tmp_path / profile / "09.json").write_text(json.dumps(content))
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "09.json").write_text('{"records": "stale"}')
    others = [tmp_path / name for name in ("smollm2", "quick+custom", "long", "old")]
    alone, board = (
        scoreboard.Board.read(tmp_path / "quick", reference=tmp_path / "none", others=some) for some in ([], others)
    )
    assert board.columns == ["Gemma 3", "SmolLM2", "your run"] and board.verdicts == alone.verdicts
    claim = board.book["dead.lm"]
    assert [shown.run.profile for shown in board.deciding(claim)] == ["quick"]
    others = board.deciding(claim, [scoreboard.OTHER])
    assert [shown.run.profile for shown in others] == ["smollm2", "quick+custom"]
    made = scoreboard.pages(board)["scoreboard.md"]
    assert {"your run, profile quick", "another run of yours, profile smollm2"} <= set(
        re.findall(r"[^<>]*, profile \w+", made)
    )
    for folder in ("kept", "kept/smollm2"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "09.json").write_text((tmp_path / "smollm2" / "09.json").read_text())
    both = scoreboard.Board.read(tmp_path / "none", tmp_path / "kept")
    assert [shown.mark for shown in both.deciding(claim)] == [scoreboard.LONG] * 2, "each family's kept run decides"
    row = BeautifulSoup(made.split('id="claim-dead-lm"')[1].split("</tr>")[0], "html.parser")
    assert len(row.select(".ours")) == 3 and len(row.select(".dot")) == 2 and len(row.select("circle")) == 1


@pytest.mark.parametrize(
    ("note", "said"),
    [
        ("AuxK(coefficient=0.03, silent_for=4, k_aux=None): FVU 0.1", "AuxK, coefficient 0.03, silent for 4: FVU 0.1"),
        ("against AuxK (tuned)", "against AuxK (tuned)"),
        ("d = 7; m = 512", "d = 7; m = 512"),
    ],
)
def test_notes_are_read_without_pythons_spelling(note, said):
    assert scoreboard.tidy(note) == said


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The scoreboard of the kept long runs alone."""
    return scoreboard.pages(scoreboard.Board.read(tmp_path_factory.mktemp("none")))


@pytest.fixture(scope="module")
def soup(made):
    return BeautifulSoup(
        re.search(r"```\{raw\} html\n(<div class=\"scoreboard\".*?)\n```", made["scoreboard.md"], re.S)[1],
        "html.parser",
    )


def test_a_row_shows_claim_paper_numbers_verdict_and_chapter(soup):
    row = soup.select_one("#claim-dead-synthetic")
    assert row.select_one(".title").text and "18.6" in row.select_one(".paper").text
    assert len(row.select("circle")) == 14 and len(row.select("path.paper")) == 4, "a diamond for each paper's number"
    assert row["data-verdict"] in row.select_one(".verdict").text
    assert row.select_one(".ours span").text and re.match("(not |open: )?[<>≤]", row.select_one(".ours small").text)
    assert row.select_one(".chapters a")["href"] == "notebooks/07_a_benchmark_with_known_truth.html"
    outer = soup.select_one(".scoreboard > table")
    head = len(outer.select_one("thead").find_all("th"))
    for line in outer.select(":scope > tbody > tr"):
        assert sum(int(cell.get("colspan", 1)) for cell in line.find_all(["th", "td"], recursive=False)) == head


def test_without_script_every_row_has_its_records_and_control_folded_below(soup):
    for claim in soup.select("tbody.claim"):
        details = claim.select_one("tr.more details")
        assert details.summary.text and "Negative control" in details.text


def test_the_table_holds_nothing_that_only_python_reads(soup):
    assert not re.search(r"\bNone\b|\bNaN\b|\bnan\b|\w=\w|[A-Z]\w+\(\w+ ?=", soup.get_text())


def test_the_files_to_take_away_hold_every_record(made, soup):
    rows = list(csv.DictReader(io.StringIO(made["scoreboard.csv"])))
    content = json.loads(made["scoreboard.json"])
    assert len(rows) == len(content["records"]) == len(soup.select(".more tbody tr")) > 100
    assert {claim["id"] for claim in content["claims"]} == {
        c["id"][6:].replace("-", ".") for c in soup.select(".claim[id]")
    }
    assert all(float(row["low"]) <= float(row["high"]) for row in rows if row["low"])


def test_the_small_one_has_a_mark_for_each_claim_that_leads_to_its_row(made, soup):
    small = BeautifulSoup(made["status.md"], "html.parser")
    rows = {claim["id"] for claim in soup.select("tbody.claim")}
    links = [link["href"] for link in small.select("ul a")]
    assert {link.split("#")[1] for link in links} == rows and len(links) == len(rows)
    assert f"The {len(rows)} claims" in made["status.md"]
    assert all(link["aria-label"] for link in small.select("ul a"))
