"""A grid of runs on Dask: processes on this machine by default, a cluster by its address."""

from __future__ import annotations

import asyncio
import atexit
import os
import tempfile
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import CancelledError, ThreadPoolExecutor
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from helpers import settings

if TYPE_CHECKING:  # it takes a second
    from distributed import Client

T = TypeVar("T")

ADDRESS = "RANK1_SCHEDULER"
"""Environment variable with a Dask scheduler's address, such as tcp://host:8786; every sweep then goes there."""
ANSWER = 3.0
"""Seconds within which a scheduler must answer."""


def sweep(
    task: Callable[..., T],
    cells: Sequence[Mapping[str, Any]],
    *,
    label: str = "sweep",
    workers: int | None = None,
    address: str | None = None,
) -> list[T]:
    """`[task(**cell) for cell in cells]`, in that order, each cell on one thread of one worker.

    Runs of small models do not fill several cores, so cells side by side finish sooner than threads within one. Cells
    that store what they have done (`fit` does) are not repeated by a sweep that is started again. `ValueError` for
    workers below 0, and where no scheduler answers within seconds; `RuntimeError` names the cell that failed, from its
    error, and those that have not begun are given up; or says that the scheduler went away.

    Args:
        task: a function of an importable module; its arguments and result travel between processes.
        workers: processes on this machine; one a core if None, 1 runs the cells here, one after another, and 0 runs
            them here with all threads, as suits tasks that hold a large model.
        address: of a Dask scheduler, whose workers must have this repository installed and see the same cache folder;
            `RANK1_SCHEDULER` if None. It wins over `workers`.
    """
    good = workers is None or isinstance(workers, int) and workers >= 0
    settings.allowed(good, f"workers={workers!r}", "a whole number, at least 0, or None for one a core")
    address = address or os.environ.get(ADDRESS) or None
    processes = min(workers or settings.cores(), max(1, len(cells)))
    if workers == 0 or address is None and processes == 1:
        threads = torch.get_num_threads() if workers == 0 else 1
        return [_alone(task, cell, threads) for cell in settings.progress(cells, label, delay=2)]
    return _on_dask(task, cells, label, _client(address, 0 if address else processes))


def _on_dask(task: Callable[..., T], cells: Sequence[Mapping[str, Any]], label: str, client: Client) -> list[T]:
    from distributed import as_completed
    from distributed.scheduler import KilledWorker

    if not client.scheduler_info(n_workers=1)["workers"]:
        warnings.warn(
            f"the scheduler at {client.scheduler.address} has no workers yet; cells wait for one", stacklevel=3
        )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # cells that carry arrays are large; that is meant
        futures = {client.submit(_alone, task, dict(cell), pure=False): cell for cell in cells}
    ended, again = 0, "its process was killed each time; was memory enough?"
    try:
        for done in settings.progress(as_completed(futures), label, total=len(futures), delay=2):
            if isinstance(error := done.exception(), KilledWorker):
                error = RuntimeError(_failed(task, futures[done], again))
            if error is not None:
                raise error
            ended += done.status == "finished"
        return [future.result() for future in futures]
    except CancelledError:
        _client.cache_clear()
        gone = f"{ADDRESS}={client.scheduler.address!r}: the scheduler went away when {ended} of {len(futures)} cells"
        raise RuntimeError(f"{gone} had ended; start it again: what a cell stored is not repeated") from None
    finally:
        client.cancel(list(futures))


@cache
def _client(address: str | None, workers: int) -> Client:
    """A connection that lasts as long as this process: starting workers takes seconds, most of it `import torch`."""
    import dask
    from distributed import Client, LocalCluster

    if address is not None:
        with ThreadPoolExecutor(1) as aside:  # a notebook has a loop of its own
            kind = aside.submit(asyncio.run, _kind(address)).result()
        what = "the address of one, such as tcp://host:8786"
        settings.allowed(kind == "Scheduler", f"{ADDRESS}={address!r}: no scheduler answers ({kind})", what)
        return Client(address)
    scratch = tempfile.TemporaryDirectory(prefix="rank1-sweep-")
    # Dask's limit on freed memory has every tensor's pages mapped anew: a training step then takes 1.8 times as long
    environment = dask.config.get("distributed.nanny.pre-spawn-environ")
    environment = {name: value for name, value in environment.items() if name != "MALLOC_TRIM_THRESHOLD_"}
    options = {
        "temporary_directory": scratch.name,
        "distributed.nanny.pre-spawn-environ": environment,
        "distributed.scheduler.allowed-failures": 1,
        "distributed.scheduler.worker-saturation": 1.0,  # where a worker is killed, only the cell it ran is to blame
    }
    with dask.config.set(options):
        cluster = LocalCluster(
            n_workers=workers, threads_per_worker=1, memory_limit=0, dashboard_address=None, silence_logs=50
        )
    atexit.register(scratch.cleanup)
    atexit.register(cluster.close)
    return Client(cluster)


async def _kind(address: str) -> str:
    """What answers at an address, or why nothing does; a client of Dask waits for ever where a listener is silent."""
    from distributed import Security
    from distributed.core import rpc

    async def ask() -> str:
        async with rpc(address, connection_args=Security().get_connection_args("client")) as there:
            return (await there.identity())["type"]

    try:
        return await asyncio.wait_for(ask(), ANSWER)
    except Exception as error:  # whatever a foreign server's bytes do to the protocol
        return f"{type(error).__name__} {error}".strip()


def _failed(task: Callable[..., T], cell: Mapping[str, Any], why: Any) -> str:
    told = ", ".join(f"{name}={value!r}" for name, value in cell.items())
    return f"{task.__name__}({told[:500]}) failed: {why}"


def _alone(task: Callable[..., T], cell: Mapping[str, Any], threads: int = 1) -> T:
    """One thread whatever runs beside it, so that a cell's numbers do not depend on the number of workers."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return task(**cell)
    except Exception as error:
        raise RuntimeError(_failed(task, cell, error)) from error
    finally:
        torch.set_num_threads(before)
