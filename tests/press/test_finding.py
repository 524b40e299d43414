"""The head and the foot of a chapter's page: verdicts, and the reader's run beside the book's."""

import html
import json
import re

import nbformat
import pytest

from helpers.press import claims, finding, night, rules, scoreboard, tables
from helpers.press.scoreboard import Board, anchor, rich
from helpers.press.tables import number
from helpers.settings import ROOT
from helpers.study.scores import Comparison

SLUG = "09_dead_features_in_a_language_model"
THERE = re.compile(
    r"; (weakest )?on SmolLM2 ([^,]*(?:\[[^]]*\][^,]*)?), ([a-z ]+)(?:: ([^<]*(?:<(?!/small)[^<]*)*))?(?=;|<)"
)
"""What a line has of a second family: whether it is its weakest, its number, its verdict, its metric and rule."""


def record(value, low, high):
    check = rules.register()["dead.lm"].checks["capped"]
    fields = {"claim": "dead.lm", "metric": check.metric, "unit": "", "expected": "", "verdict": "partly", "note": ""}
    about = {"scope": "analogue", "teacher": "gemma-3-270m", "n": 5, "resampled": "seeds"}
    return fields | about | {"value": value, "ci": (low, high)}


@pytest.fixture
def board(tmp_path):
    """The book's run holds; the reader's is given by its interval."""

    def board(low, high, profile="quick"):
        for name, ends in {"book": (0.1, 0.2), "own": (low, high)}.items():
            run = {"chapter": SLUG, "profile": profile if name == "own" else "long", "parameters": {"teacher": "mine"}}
            run |= {"environment": {}, "seconds": 7.0, "records": [record(sum(ends) / 2, *ends)]}
            (tmp_path / name).mkdir(exist_ok=True)
            (tmp_path / name / f"{SLUG}.json").write_text(json.dumps(run))
        return Board.read(tmp_path / "own", tmp_path / "book")

    return board


def chapter():
    code, text = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell
    shown = [nbformat.v4.new_output("display_data", {"text/plain": whose}) for whose in ("book", "own")]
    hero = code("hero()", metadata={"tags": ["hide-input", "hero"]}, outputs=shown[:1])
    own = code("hero(log)", metadata={"tags": ["hide-cell", "own"]}, outputs=shown[1:])
    return nbformat.v4.new_notebook(cells=[text("# A title\n\nOne sentence."), hero, text("More."), own])


@pytest.mark.parametrize(
    ("low", "high", "word"), [(0.1, 0.3, "agrees"), (1.3, 1.4, "differs"), (0.2, 1.9, "cannot tell")]
)
def test_two_runs_differ_only_where_one_holds_and_the_other_fails(board, low, high, word):
    (row,) = finding.compared(SLUG, board(low, high))
    assert row.word == word
    assert (word == "agrees") == ("differs" not in finding.summary([row]) and "cannot" not in finding.summary([row]))


def test_the_book_leads_a_quick_run_and_a_readers_own_leads_the_book(board):
    quick = finding.page(chapter(), SLUG, board(0.1, 0.3))
    assert [cell.cell_type for cell in quick.cells] == ["markdown", "code", "markdown", "markdown", "code", "markdown"]
    assert quick.cells[1].outputs[0].data["text/plain"] == "book" and "own-run" not in quick.cells[0].source
    assert "verdict-partly" in quick.cells[2].source and "0.150" in quick.cells[2].source
    assert "Your run (7 s)" in quick.cells[-1].source and "agrees" in quick.cells[-1].source
    own = finding.page(chapter(), SLUG, board(1.3, 1.4, "quick+custom"))
    assert own.cells[1].outputs[0].data["text/plain"] == "own" and own.cells[4].outputs[0].data["text/plain"] == "book"
    assert own.cells[0].source.startswith("# A title\n\n:::{admonition} Your own run")
    assert "differs on 1" in own.cells[0].source and "teacher mine" in own.cells[0].source
    chip = own.cells[2].source
    assert "1.35 [1.30, 1.40]" in chip and "; your run" in chip and "0.150" not in chip and "verdict-fails-here" in chip


def test_a_chapter_without_a_kept_run_shows_its_own_numbers(board, tmp_path):
    read = board(0.1, 0.3)
    alone = Board.read(tmp_path / "own", tmp_path / "none")
    page = finding.page(chapter(), SLUG, alone)
    assert len(read.runs) == 2 and len(page.cells) == 5 and "; your run" in page.cells[2].source


def test_folded_cells_that_show_nothing_are_one_with_the_next():
    code, text, shown = nbformat.v4.new_code_cell, nbformat.v4.new_markdown_cell, nbformat.v4.new_output("stream")

    def cell(source, *tags, outputs=()):
        return code(source, metadata={"tags": list(tags)}, outputs=list(outputs))

    cells = [cell("a", "hide-input"), cell("b", "hide-input"), cell("c", "hide-input", outputs=[shown])]
    cells += [
        cell("d", "hide-input"),
        text("words"),
        cell("e", "hide-input"),
        cell("f", "idea"),
        cell("g", "hide-input"),
    ]
    joined = list(finding._joined(cells))
    assert [each.source for each in joined] == ["a\n\n\nb\n\n\nc", "d", "words", "e", "f", "g"]
    assert joined[0].outputs == [shown]


def test_every_chapter_with_a_hero_draws_it_from_both_runs():
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        cells = nbformat.read(path, as_version=4).cells
        heroes, owns = ([i for i, c in enumerate(cells) if t in c.metadata.get("tags", [])] for t in ("hero", "own"))
        if heroes or owns:
            assert heroes in ([1], [2]) and owns == [len(cells) - 1], path.name
            hero, before = cells[heroes[0]], cells[1 : heroes[0]]
            assert all(cell.cell_type == "code" and "hide-input" in cell.metadata.tags for cell in before), path.name
            assert f'claims.reference("{path.stem}")' in hero.source and "hero(log)" in cells[-1].source
            title = cells[0].source.splitlines()[0].removeprefix("# ")
            assert len(title.split()) <= 9, f"{path.name}: {title}"


# -- tables and figures ------------------------------------------------------------------------------------------------


def test_a_table_names_its_columns_and_aligns_its_decimals():
    rows = [{"lr": 0.01, "fvu": 0.5, "dead": 0.25, "gain": Comparison(1.5, (1.25, 1.75), [1.5], 5, "seeds")}]
    rows += [{"lr": 0.003, "fvu": 0.123456, "dead": None, "gain": None}]
    shown = tables.Table(rows, percent=["dead"])
    assert list(shown.rows[0]) == ["learning rate", "FVU", "dead features", "gain"]
    assert [row["FVU"] for row in shown.rows] == ["0.500", "0.123"]
    assert [row["dead features"] for row in shown.rows] == ["25 %", "–"]
    assert shown.rows[0]["gain"] == "1.50 [1.25, 1.75]"
    assert "<td" in shown._repr_html_() and "nan" not in shown._repr_html_().lower()


def test_predictions_stand_beside_what_became_of_them():
    rows = tables.outcomes({"a": True, "b": False, "c": None}).rows
    assert [row["outcome"] for row in rows] == ["as predicted", "not as predicted", "undecided"]


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], "rows"),
        ([{str(i): i for i in range(8)}], "8 columns"),
        ([{"a": 1}, {"b": 1}], "different columns"),
        ([{"a": (1, 2)}], "a="),
    ],
)
def test_a_table_that_nobody_could_read_is_refused(rows, said):
    with pytest.raises(ValueError, match=said):
        tables.Table(rows)


def contrast(one, other):
    first, second = sorted(night._luminance(colour) + 0.05 for colour in (one, other))
    return second / first


def test_a_figure_loses_decimals_that_nobody_sees_and_keeps_its_scales(tmp_path):
    svg = '<svg width="9.5pt"><path\n   d="M 1.23456 -7.8919 L 12345 0.5" transform="scale(0.015625)"/></svg>'
    (tmp_path / "a.svg").write_text(svg)
    night.page('<article><div class="cell_output"><img src="a.svg"></div></article>', tmp_path)
    kept = '<svg width="9.5pt"><path\nd="M 1.23 -7.89 L 12345 0.5" transform="scale(0.015625)"/></svg>'
    assert (tmp_path / "a.svg").read_text() == (tmp_path / "a.dark.svg").read_text() == kept


@pytest.mark.parametrize("colour", ["#1f2328", "#0072b2", "#4b4bc3", "#a87400", "#e5e8eb", "#ffffff"])
def test_by_night_a_colour_stands_out_as_it_does_by_day(colour):
    by_night = night.night(f'<path style="fill: {colour}"/>').split()[2][:7]
    assert contrast(by_night, night.PAPER) == pytest.approx(contrast(colour, "#ffffff"), rel=0.03)


def test_the_lead_is_the_books_run_unless_the_reader_chose_another(monkeypatch, tmp_path):
    log = claims.Chapter("07_a_benchmark_with_known_truth", {}, results_dir=tmp_path)
    monkeypatch.setenv("RANK1_PROFILE", "quick")
    assert log.leading.whose == scoreboard.WHOSE[scoreboard.LONG]
    monkeypatch.setenv("RANK1_PROFILE", "quick+custom")
    assert log.leading is log and log.whose == scoreboard.WHOSE[scoreboard.BUILD] == "your run"


def test_a_second_family_is_named_beside_the_first(tmp_path):
    """The number at the right is of the model that the figure is about; what holds on the other one is told: of the
    same measurement, or else with its own name and rule, so that number, rule and verdict fit each other."""
    board = Board.read(tmp_path)
    said = finding._verdicts("05_distilling_an_mlp", board, [])
    assert said.count("on SmolLM2 ") == 2
    run = claims.reference("05_distilling_an_mlp")
    ours = {f"{record.value:.3f}" for record in run.records if record.claim == "secret.hypothesis"}
    assert any(f'<span class="measured">{value} [' in said for value in ours)
    assert "SmolLM2" not in finding._verdicts("07_a_benchmark_with_known_truth", board, [])
    looked_at = []
    for slug in {run.chapter for _, run, _ in board.runs}:
        for line in finding._lines(slug, board):
            claim = next(each for each in board.book.claims if f"#{anchor(each.id)}" in line)
            metric, asked = re.search(r"<small>(?:weakest of \d+: )?(.*?); asked (.*?); the book's run", line).groups()
            for weakest, value, verdict, own in THERE.findall(line):
                metric, asked = own.split("; asked ") if weakest else (metric, asked)
                looked_at.append((value, verdict))
                records = [each for shown in board.of(claim) if (each := shown.record).verdict == verdict]
                records = [each for each in records if "smollm2" in (each.teacher or "").lower()]
                (record,) = [
                    each for each in records if (rich(each.metric), number(each.value, each.ci)) == (metric, value)
                ]
                rule = claim.checks[claim.check_of(record.metric)].rule
                outcome = rule.outcome(record.value, *(record.ci or (record.value, record.value)))
                assert html.escape(str(rule)) == asked
                assert verdict == "too few" or finding.SIDES.get(verdict, "straddles") == outcome, line
    assert len(looked_at) >= 13 and len({verdict for _, verdict in looked_at}) >= 3


def test_parameters_stand_beside_those_of_the_books_run():
    source = "k = 16  # codes a token\nlrs = [\n    1e-3,\n]\nseeds = (0, 1)\nteacher = 'a'"
    shown = finding._beside(source, {"k": 64, "lrs": [0.001, 0.01], "seeds": [0, 1], "teacher": "a", "gone": 1})
    assert shown.split("\n")[0] == "k = 16  # codes a token (the book's run: 64)"
    assert "]  # (the book's run: [0.001, 0.01])" in shown and shown.endswith("seeds = (0, 1)\nteacher = 'a'")


def test_partly_says_how_many_numbers_hold(board):
    whole = Board.of_build("quick")
    for slug in {run.chapter for _, run, _ in whole.runs}:
        for line in finding._lines(slug, whole):
            assert ("numbers hold" in line) == ("verdict-partly" in line)
    (line,) = finding._lines(SLUG, board(0.1, 0.2))
    assert "numbers hold" in line and "checks not run" in line
