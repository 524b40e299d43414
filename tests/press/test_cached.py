"""The cache: what is needed stays, what no chapter asked for goes, and what somebody works on is left alone."""

import io
import json

import pytest
from filelock import FileLock
from rich.console import Console

from helpers import settings
from helpers.kept import keep, keep_folder
from helpers.press import cached


def many():
    return [1.0] * 1000


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """Two things kept, one of them a folder, in a cache; and a book whose only chapter asked for neither."""
    monkeypatch.setenv("RANK1_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("RANK1_NOTES", str(tmp_path / "notes"))
    keep("fits", 1, many)
    keep_folder("teachers", 1, lambda folder: (folder / "weights").write_bytes(b"0" * 50_000))
    return tmp_path


def note(root, *asked):
    stamp = root / "_build" / "executed" / "quick" / "01_a.run.json"
    stamp.parent.mkdir(parents=True, exist_ok=True)
    stamp.write_text(json.dumps({"asked": asked}))


def shown(root, **options):
    out = io.StringIO()
    cached.show(Console(file=out, width=300), root=root, **options)
    return out.getvalue()


def entries(root):
    return [path for path in (root / "cache").glob("*/*") if path.name[0] != "."]


def left(root):
    return sorted(path.parent.name for path in entries(root))


def asked(root):
    lines = [line.split() for line in (root / "notes").read_text().splitlines()]
    return sorted({f"{kind}/{key}" for what, kind, key in lines if what == "asked"})


def test_what_a_chapter_asked_for_stays(cache):
    note(cache, *asked(cache))
    assert "of which no chapter's last run asked for 0.00 GB" in shown(cache, free=True)
    assert left(cache) == ["fits", "teachers"]
    before = next((cache / "cache" / "fits").glob("*.kept")).stat().st_mtime_ns
    keep("fits", 1, many)
    assert next((cache / "cache" / "fits").glob("*.kept")).stat().st_mtime_ns == before


def test_what_none_asked_for_is_shown_and_goes_only_when_told(cache):
    note(cache, *(each for each in asked(cache) if each.startswith("fits")))
    said = shown(cache)
    assert "teachers         1 kept, 0.00 GB; spare     1" in said and "fits             1 kept" in said
    assert left(cache) == ["fits", "teachers"]
    assert "freed" in shown(cache, free=True)
    assert left(cache) == ["fits"]


def test_what_is_being_made_stays(cache):
    note(cache)
    (folder,) = (path for path in entries(cache) if path.is_dir())
    with FileLock(folder.parent / f".{folder.name}.lock"):
        assert "1 are in use and stay" in shown(cache, free=True)
    assert left(cache) == ["teachers"]
    assert settings.cache_dir() == cache / "cache"
