"""What a change concerns, and the map of the house: it names every module once."""

import re

from helpers import kept
from helpers.press import chapters
from helpers.settings import ROOT

MODULES = sorted(
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (ROOT / "helpers").rglob("*.py")
    if path.name not in ("__init__.py", "__main__.py")
)


def test_records_do_not_depend_on_pages_or_on_the_runner():
    """A chapter imports claims: what that imports runs all chapters again."""
    assert set(kept.closure("helpers.press.claims")) == {
        "helpers",
        "helpers.press",
        "helpers.press.claims",
        "helpers.press.rules",
        "helpers.press.verdicts",
        "helpers.settings",
    }


def test_the_map_of_the_house_names_every_module_once():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text.split("## The house")[1].split("`helpers/__main__.py`")[0]
    rows = [line.split("|") for line in table.splitlines() if line.startswith("| `")]
    named = []
    for _, room, _, modules, _ in rows:
        folder = "helpers." if room.strip(" `/") == "helpers" else f"helpers.{room.strip(' `/')}."
        named += [folder + name for name in re.findall(r"`(\w+)`", modules)]
    assert sorted(named) == MODULES


def test_what_a_change_concerns_follows_the_imports():
    """The masks concern three chapters, pictures all of them, the runner and the pages none."""
    of = {job.chapter.number: chapters.fingerprint(job) for job in chapters.plan()}
    assert [number for number, parts in of.items() if "helpers.parts.masks" in parts] == [13, 14, 15]
    assert all({"helpers.press.figures", "helpers.press.claims"} <= set(parts) for parts in of.values())
    for name in ("pages", "build", "chapters", "execution", "verify"):
        assert not any(f"helpers.press.{name}" in parts for parts in of.values())
    assert "data" in of[16], "models.corpora reads data/"
