"""Kept long runs: a stated cell of each is run again and compared, and what disagrees is named."""

import ast
import io
import json

import pytest
import yaml
from rich.console import Console

from helpers import __main__ as command_line
from helpers import kept, settings
from helpers.press import claims, verify

SLUG, OTHER = "13_how_few_numbers", "14_matching_pursuit"
CELL = {
    "what": "squares",
    "cell": "def square(x):\n    return x * x\n[square(x) for x in xs]",
    "kept": "points['squares'][0]['y']",
    "tolerance": 1e-6,
    "seconds": 1,
}


@pytest.fixture
def folder(tmp_path):
    """Two kept runs; a cell is stated for the first."""
    for slug in (SLUG, OTHER):
        content = {"chapter": slug, "profile": "long", "parameters": {"xs": [1, 2, 3]}, "environment": {}}
        content |= {"seconds": 1.0, "records": [], "points": {"squares": [{"y": [1, 4, 9.000001]}]}}
        (tmp_path / f"{slug}.json").write_text(json.dumps(content))
    return tmp_path


def run(folder, *names, everything=False, **changes):
    (folder / "verify.yml").write_text(yaml.safe_dump({SLUG: [CELL | changes]}))
    out = io.StringIO()
    failed = verify.run_again(names, Console(file=out, width=300), everything, folder)
    return failed, out.getvalue()


def test_a_cell_that_gives_the_kept_value_agrees_and_runs_without_one_are_named(folder):
    failed, said = run(folder)
    assert failed == [] and f"{SLUG}: agrees to 1e-06" in said and "squares" in said
    assert f"no cell is stated yet for: {OTHER}" in said
    failed, said = run(folder, "13")
    assert failed == [] and OTHER not in said


def test_a_run_on_another_family_has_its_chapters_cells(folder):
    (folder / "other").mkdir()
    content = json.loads((folder / f"{SLUG}.json").read_text())
    content["points"]["squares"][0]["y"][1] = 5
    (folder / "other" / f"{SLUG}.json").write_text(json.dumps(content))
    failed, said = run(folder)
    assert failed == [f"other/{SLUG}"] and f"other/{SLUG}: DISAGREES ([1]: 4, kept 5)" in said


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"cell": "[1, 4, 10]"}, "DISAGREES ([2]: 10, kept 9.000001)"),
        ({"tolerance": 1e-9}, "DISAGREES ([2]: 9, kept 9.000001)"),
        ({"cell": "[1, 4]"}, "DISAGREES (: 2 values, kept 3)"),
        ({"cell": "1 / 0"}, "DISAGREES (ZeroDivisionError: division by zero)"),
        ({"cell": "nowhere.at_all(xs)"}, "DISAGREES (NameError: "),
        ({"kept": "points['circles'][0]"}, "DISAGREES (KeyError: "),
        ({"cell": "'a'"}, "DISAGREES ('a', kept [1, 4, 9.000001])"),
    ],
)
def test_a_cell_that_gives_something_else_or_fails_is_named(folder, changes, told):
    failed, said = run(folder, **changes)
    assert failed == [SLUG] and told in said


def test_values_are_compared_by_name_and_place():
    assert verify.difference({"a": 1.0, "b": [1, None]}, {"b": [1, None], "a": 1}, 1e-6) == ""
    assert verify.difference({"a": 1.0}, {"b": 1.0}, 1e-6) == ": names ['a'], kept ['b']"
    assert verify.difference({"a": [0, 2]}, {"a": [0, 3]}, 1e-6) == ".a[1]: 2, kept 3"
    assert verify.difference(float("nan"), 1.0, 1e-6) == "nan, kept 1"
    assert verify.difference(1000.0001, 1000.0, 1e-6) == ""


def test_what_takes_long_is_run_only_when_asked_for(folder):
    failed, said = run(folder, seconds=21, cell="[0]")
    assert failed == [] and "left out, 21 s (--all)" in said
    assert run(folder, seconds=21, cell="[0]", everything=True)[0] == [SLUG]


def test_a_file_of_another_form_is_refused(folder):
    with pytest.raises(ValueError, match="verify.yml does not fit the schema"):
        run(folder, seconds=-1)
    (folder / "verify.yml").write_text("13: [")
    with pytest.raises(ValueError, match="verify.yml is not YAML"):
        verify.read(folder)


def test_the_command_line_says_with_its_status_whether_all_agree(monkeypatch, capsys):
    monkeypatch.setattr(verify, "run_again", lambda names, console, everything: ["x"] if everything else [])
    assert (command_line.main(["verify"]), command_line.main(["verify", "--all"])) == (0, 1)
    monkeypatch.undo()
    assert command_line.main(["verify", "99"]) == 2 and "chapter='99'" in capsys.readouterr().err


@pytest.mark.parametrize("slug", sorted(verify.read()))
def test_every_stated_cell_is_code_about_a_kept_run_and_imports_what_is_there(slug):
    results = claims.reference(slug)
    for cell in verify.read()[slug]:
        tree = ast.parse(cell.cell)
        assert isinstance(tree.body[-1], ast.Expr)
        names = {
            f"{node.module}.{each.name}"
            for node in ast.walk(tree)
            if isinstance(node, ast.ImportFrom)
            for each in node.names
        }
        modules = {name for name in names if name.startswith("helpers.")}
        found = kept.closure(*kept.imports_in(tree))
        assert all(name in found or name.rpartition(".")[0] in found for name in modules), modules - found
        about = {"points": results.points, "records": [record.model_dump() for record in results.records]}
        assert verify.value_of(cell.kept, results.parameters | about) is not None
    assert settings.ROOT.joinpath("results", f"{slug}.json").is_file()
