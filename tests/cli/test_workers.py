"""Workers of a run: what they get, and how they end."""

import subprocess
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import active_children, get_context
from pathlib import Path

import pytest

from sdnb.cli import kernels, workers
from tests.cli.processes import is_alive, wait_until

SHOW_IGNORED = "print(next(line for line in open('/proc/self/status') if line.startswith('SigIgn')))"


@pytest.fixture
def pool():
    context = get_context("spawn")
    gpus = context.Queue()
    gpus.put(None)
    with ProcessPoolExecutor(1, context, workers.prepare, (1, gpus)) as pool:
        yield pool


def test_workers_share_the_gpus(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,GPU-5f")
    assert [workers.gpu(worker) for worker in range(3)] == ["2", "GPU-5f", "2"]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert workers.gpu(0) is None


def ignored_by_a_child() -> int:
    out = subprocess.run(
        [sys.executable, "-c", SHOW_IGNORED], capture_output=True, text=True, check=True
    ).stdout
    return int(out.split()[1], 16)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads /proc")
def test_what_a_worker_starts_hears_interrupts(pool):
    assert not pool.submit(workers.work, ignored_by_a_child).result() & 0b10  # SIGINT is 2


def slow_end(folder: Path) -> None:
    (folder / "begun").touch()
    try:
        time.sleep(600)
    finally:
        (folder / "stopped").touch()
        time.sleep(1)
        (folder / "ended").touch()


def test_a_stopped_worker_ends_in_its_own_way_and_takes_up_nothing_more(pool, tmp_path):
    others = active_children()
    calls = [pool.submit(workers.work, slow_end, tmp_path) for _ in range(3)]
    wait_until((tmp_path / "begun").exists)
    (worker,) = set(active_children()).difference(others)
    worker.terminate()
    wait_until((tmp_path / "stopped").exists)
    workers.stop(others)  # a second signal
    assert (tmp_path / "ended").exists() and not is_alive(worker.pid)  # the pool too takes note of its end
    assert all(isinstance(call.exception(), BrokenProcessPool) for call in calls)


def with_a_fork_server(folder: Path) -> None:
    kernels._prepare_server()
    slow_end(folder)


def test_a_stopped_worker_takes_its_fork_servers_folder_along(pool, tmp_path, temporary):
    others = active_children()
    pool.submit(workers.work, with_a_fork_server, tmp_path)
    wait_until((tmp_path / "begun").exists)
    [shelf] = temporary.iterdir()
    assert len(list(shelf.iterdir())) == 2
    workers.stop(others)
    assert [path.name for path in shelf.iterdir()] == [".lock"]


def test_so_does_one_that_is_idle(pool, temporary):
    others = active_children()
    pool.submit(workers.work, kernels._prepare_server).result()
    [shelf] = temporary.iterdir()
    assert len(list(shelf.iterdir())) == 2
    workers.stop(others)
    assert [path.name for path in shelf.iterdir()] == [".lock"]


def deaf(folder: Path) -> None:
    (folder / "begun").touch()
    while True:
        try:
            time.sleep(600)
        except KeyboardInterrupt:
            continue


def test_a_worker_that_does_not_end_is_killed(pool, tmp_path, monkeypatch):
    monkeypatch.setattr(workers, "PATIENCE_S", 0.5)
    others = active_children()
    call = pool.submit(workers.work, deaf, tmp_path)
    wait_until((tmp_path / "begun").exists)
    workers.stop(others)
    assert isinstance(call.exception(), BrokenProcessPool)
