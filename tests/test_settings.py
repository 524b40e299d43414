"""Files are whole or not there, bad values are named, and seeds do not run into each other."""

import json
import os

import numpy as np
import pytest
import torch

from helpers import settings


def test_a_file_is_the_old_one_until_the_new_one_is_whole(tmp_path):
    path = tmp_path / "deep" / "a.json"
    settings.write_json(path, {"a": np.float32(1.5), "b": torch.arange(2), "c": path})
    assert json.loads(path.read_text()) == {"a": 1.5, "b": [0, 1], "c": str(path)}
    with pytest.raises(KeyboardInterrupt), settings.written(path) as aside:
        aside.write_text("half")
        raise KeyboardInterrupt
    with pytest.raises(ValueError, match="nan"):
        settings.write_json(path, {"a": float("nan")})
    assert json.loads(path.read_text())["a"] == 1.5
    assert os.listdir(path.parent) == ["a.json"]
    assert path.stat().st_mode & 0o777 == 0o644


def test_a_folder_appears_when_it_is_complete_and_replaces_the_old_one(tmp_path):
    target = tmp_path / "folder"
    for text in ("old", "new"):
        with settings.new_folder(target) as new:
            (new / text).write_text(text)
            assert not (target / text).exists()
    with pytest.raises(KeyboardInterrupt), settings.new_folder(target) as new:
        (new / "half").write_text("")
        raise KeyboardInterrupt
    assert os.listdir(target) == ["new"] and os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [OSError(28, "no room"), Exception("No space left on device (os error 28)")])
def test_a_full_disk_is_named_by_whichever_library_meets_it(tmp_path, error):
    target = tmp_path / "folder"
    named = pytest.raises(ValueError, match=rf"{target} cannot be written: .*; allowed: a folder with room")
    with named, settings.new_folder(target):
        raise error
    with pytest.raises(KeyError), settings.new_folder(target):
        raise KeyError("of the content")
    assert not os.listdir(tmp_path)


def test_bad_values_are_named_with_what_is_allowed():
    settings.allowed(True, "k=1", "1 to 4")
    settings.one_of("rule", "a", "ab")
    with pytest.raises(ValueError, match=r"^k=9; allowed: 1 to 4$"):
        settings.allowed(False, "k=9", "1 to 4")
    with pytest.raises(ValueError, match=r"^rule='c' is unknown; allowed: 'a', 'b'$"):
        settings.one_of("rule", "c", "ab")
    with pytest.raises(ValueError, match="device='abacus'"):
        settings.device("abacus")


def test_the_cache_folder_is_the_argument_then_the_environment(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK1_CACHE", str(tmp_path / "environment"))
    assert settings.cache_dir() == tmp_path / "environment"
    assert settings.cache_dir(tmp_path / "argument") == tmp_path / "argument"
    assert (tmp_path / "argument").is_dir()


def test_mixed_seeds_differ_in_the_bits_that_generators_read():
    seeds = {settings.mix(seed, counter) % 2**32 for seed in range(30) for counter in range(30)}
    assert len(seeds) == 900
    assert settings.mix(1, 2) == settings.mix(1, 2) != settings.mix(2, 1)
    assert torch.equal(torch.rand(3, generator=settings.generator(5)), torch.rand(3, generator=settings.generator(5)))
