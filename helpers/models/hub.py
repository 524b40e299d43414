"""The Hugging Face hub, with or without a network."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError


class Unreachable(ConnectionError):
    """No answer from the hub within seconds."""


def commit(kind: str, name: str, revision: str | None = None, *, timeout: float = 5.0) -> str:
    """The commit that `revision` (default: the main branch) of a `"model"` or `"dataset"` stands for.

    Asked for before anything is downloaded, because the hub's clients retry for 20 s and more when there is no network.
    Raises `ValueError` where the hub knows no such name or revision, `Unreachable` where it gives no answer or
    `HF_HUB_OFFLINE` is set.
    """
    info = {"model": HfApi().model_info, "dataset": HfApi().dataset_info}[kind]
    try:
        return info(name, revision=revision, timeout=timeout).sha
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise ValueError(f"the hub has no public {kind} {name!r} at revision {revision or 'main'!r}") from error
    except Exception as error:  # connection, timeout, offline mode, server error: each client has its own kinds
        raise Unreachable((str(error).strip() or type(error).__name__).splitlines()[0]) from error


@contextmanager
def cached_only() -> Iterator[None]:
    """Within this block hub clients use what was downloaded before and try no connection."""
    import datasets

    with (
        mock.patch.object(constants, "HF_HUB_OFFLINE", True),
        mock.patch.object(datasets.config, "HF_HUB_OFFLINE", True),
    ):
        yield
