"""Where things are kept, what they run on, and how randomness enters."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import torch
from platformdirs import user_cache_path
from tqdm.auto import tqdm

ROOT = Path(__file__).resolve().parent.parent
"""The repository. Notebooks resolve paths from here, because papermill and nbval start them in different folders."""


def cache_dir(folder: str | Path | None = None) -> Path:
    """Folder for converted models, harvested activations and trained dictionaries; created when missing.

    `folder` wins over the environment variable `RANK1_CACHE`, which wins over the user's cache folder.
    """
    chosen = folder or os.environ.get("RANK1_CACHE") or user_cache_path("rank1-book")
    path = Path(chosen).expanduser().resolve()
    path.mkdir(parents=True, exist_ok=True)
    return path


def progress(*args, **options) -> tqdm:
    """A progress bar, unless `TQDM_DISABLE` is set, as it is while chapters run; in a notebook tqdm forgets to look."""
    return tqdm(*args, **{"disable": bool(os.environ.get("TQDM_DISABLE")), "mininterval": 2} | options)


def mix(seed: int, counter: int) -> int:
    """A well-spread seed for each (seed, counter), so that neighbouring streams do not overlap.

    PyTorch's CPU generator reads only the low 32 bits of a seed; all of them depend on both numbers here.
    """
    return int(np.random.SeedSequence([seed, counter]).generate_state(1, np.uint64)[0] >> 1)


def profile() -> str:
    """Name of the profile a chapter runs under (`RANK1_PROFILE`, set by the runner; `quick` in a plain Jupyter)."""
    return os.environ.get("RANK1_PROFILE", "quick")


def results_dir(folder: str | Path | None = None) -> Path:
    """Folder where a chapter writes its records: `folder`, or `_build/results/<profile>` of the repository."""
    path = Path(folder).expanduser().resolve() if folder else ROOT / "_build" / "results" / profile()
    path.mkdir(parents=True, exist_ok=True)
    return path


def device(name: str = "auto") -> torch.device:
    """`auto` is a GPU when there is one, else the CPU. An accelerator that is not there raises `ValueError`."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(name)
    except RuntimeError as error:
        raise ValueError(f"device={name!r} is not a device; allowed: 'auto', 'cpu', 'cuda', 'cuda:N', 'mps'") from error
    there = {"cpu": True, "cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if not there.get(chosen.type, False):
        allowed = ["auto", *(kind for kind, ok in there.items() if ok)]
        raise ValueError(f"device={name!r} is not on this machine; allowed here: {', '.join(allowed)}")
    return chosen


def generator(seed: int, device: str | torch.device = "cpu") -> torch.Generator:
    """A fresh random stream: the same seed gives the same numbers on the same machine."""
    return torch.Generator(device=device).manual_seed(seed)
