"""A scheduler and three workers by address, as on a cluster: processes of their own, one shared cache, things that go
wrong. The recipes of the page "On a cluster" start the same two commands."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from helpers.dictionary import topk_sae
from helpers.settings import generator
from helpers.study import sweep as module
from helpers.study.sweep import sweep
from helpers.training import Shuffled, fit

pytestmark = pytest.mark.timeout(300)


def trained(seed: int, cache: str, seconds: float = 0.0):
    """The end of a small training that is kept in the shared cache, and which process it ran in."""
    time.sleep(seconds)
    stream = Shuffled(torch.randn(64, 6, generator=generator(seed)), batch_size=16, fingerprint=f"cluster {seed}")
    result = fit(topk_sae(6, 12, 2, generator=generator(seed)), stream, steps=20, cache_dir=cache)
    return result.loss, float(result.student.decoder.weight.detach().double().sum())


def greedy(n: int):
    """Cell 1 needs more memory than its worker has."""
    return len(bytearray(700 * 2**20)) if n == 1 else n


def children(pid: int) -> list[int]:
    return [int(each) for each in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


class Cluster:
    """`dask scheduler` and three `dask worker`, each with a scratch folder of its own."""

    def __init__(self, folder: Path, memory: str = "0"):
        self.folder, self.memory, self.started, self.port = folder, memory, [], 0
        self.scheduler, self.workers = self.schedule(), self.staff()

    def start(self, kind: str, *options) -> subprocess.Popen:
        command = [sys.executable, "-m", "dask", kind, *map(str, options)]
        environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
        log = (self.folder / f"{kind} {len(self.started)}.log").open("w")
        self.started.append(subprocess.Popen(command, stdout=log, stderr=log, env=environment, start_new_session=True))
        return self.started[-1]

    def schedule(self) -> subprocess.Popen:
        known = self.folder / "scheduler.json"
        known.unlink(missing_ok=True)
        process = self.start("scheduler", "--port", self.port, "--no-dashboard", "--scheduler-file", known)
        while not known.exists() or not known.read_text().strip().endswith("}"):
            assert process.poll() is None, "the scheduler did not start"
            time.sleep(0.1)
        self.address = known.read_text().split('"address": "')[1].split('"')[0]
        self.port = int(self.address.rsplit(":", 1)[1])
        return process

    def staff(self) -> list[subprocess.Popen]:
        options = ["--no-dashboard", "--nthreads", "1", "--memory-limit", self.memory, "--local-directory"]
        return [self.start("worker", self.address, *options, self.folder / f"scratch {i}") for i in range(3)]

    def kill_a_worker(self, chance: random.Random) -> None:
        nannies = [each.pid for each in self.workers if each.poll() is None]
        inside = [child for nanny in nannies for child in children(nanny)]
        running = [pid for pid in inside if b"spawn_main" in Path(f"/proc/{pid}/cmdline").read_bytes()]
        if running:
            os.kill(chance.choice(running), signal.SIGKILL)

    def close(self) -> None:
        for process in reversed(self.started):
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


@pytest.fixture
def cluster(tmp_path, monkeypatch):
    """Starts one with `memory` a worker; what a sweep keeps open is closed with it."""
    monkeypatch.delenv(module.ADDRESS, raising=False)
    made = []

    def start(memory: str = "0") -> Cluster:
        made.append(Cluster(tmp_path, memory))
        return made[-1]

    yield start
    if module._client.cache_info().currsize:
        with contextlib.suppress(TimeoutError):
            module._client(made[0].address, 0).close(2)
    module._client.cache_clear()
    for each in made:
        each.close()


def cells(folder: Path, n: int = 8, seconds: float = 1.0) -> list[dict]:
    return [{"seed": seed, "cache": str(folder), "seconds": seconds} for seed in range(n)]


def meanwhile(does) -> threading.Thread:
    thread = threading.Thread(target=does, daemon=True)
    thread.start()
    return thread


def test_a_sweep_whose_workers_are_killed_ends_with_the_numbers_of_one_alone(cluster, tmp_path):
    there, chance = cluster(), random.Random(0)

    def kills():
        for _ in range(4):
            time.sleep(1.2)
            there.kill_a_worker(chance)

    killing = meanwhile(kills)
    found = sweep(trained, cells(tmp_path / "shared"), address=there.address)
    killing.join()
    assert found == sweep(trained, cells(tmp_path / "alone", seconds=0), workers=1)


@pytest.mark.soak
def test_a_network_that_stalls_for_half_a_minute_costs_its_time_only(cluster, tmp_path):
    there = cluster()

    def stall():
        time.sleep(1)
        there.scheduler.send_signal(signal.SIGSTOP)
        time.sleep(30)
        there.scheduler.send_signal(signal.SIGCONT)

    meanwhile(stall)
    found = sweep(trained, cells(tmp_path / "shared", seconds=0.5), address=there.address)
    assert found == sweep(trained, cells(tmp_path / "alone", seconds=0), workers=1)


def test_a_worker_out_of_memory_is_told_with_its_cell(cluster):
    there = cluster(memory="600MB")
    with pytest.raises(RuntimeError, match=r"^greedy\(n=1\) failed: its process was killed.*was memory enough\?$"):
        sweep(greedy, [{"n": n} for n in range(4)], address=there.address)


def test_a_scheduler_that_goes_away_is_named_and_what_was_done_is_kept(cluster, tmp_path):
    there = cluster()

    def restart():
        time.sleep(3)
        os.killpg(there.scheduler.pid, signal.SIGKILL)
        there.scheduler.wait()
        there.schedule()

    restarting = meanwhile(restart)
    started = time.perf_counter()
    with pytest.raises(RuntimeError, match=f"{module.ADDRESS}={there.address!r}.*of 8 cells had ended; start it again"):
        sweep(trained, cells(tmp_path / "shared", seconds=2), address=there.address)
    assert time.perf_counter() - started < 60
    restarting.join()
    for worker in there.workers:  # they end with their scheduler, unless one finds the next one at the same address
        with contextlib.suppress(ProcessLookupError):
            os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()

    def staff_when_told():
        while not any("has no workers yet" in str(each.message) for each in told):
            time.sleep(0.1)
        there.staff()

    with pytest.warns(UserWarning, match="has no workers yet") as told:
        meanwhile(staff_when_told)
        again = sweep(trained, cells(tmp_path / "shared", seconds=0), address=there.address)
    assert again == sweep(trained, cells(tmp_path / "alone", seconds=0), workers=1)
