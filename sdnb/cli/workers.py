"""The processes that run cells side by side: their share of the machine, and how each of them ends.

A worker ends when its parent ends, however that was. An interrupt from the keyboard reaches all processes of
a terminal at once; here it is the parent's alone, which then stops the workers, each after it has put away
its kernel.
"""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Callable, Collection
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import active_children, parent_process
from multiprocessing.process import BaseProcess
from typing import Any

STOPPED = 130  # as a shell tells of what was interrupted


def prepare(jobs: int, gpus: Any) -> None:
    """Give this worker its share of the threads, a GPU of its own if there are any, and its parent's fate.

    Args:
        jobs: how many workers there are.
        gpus: a queue with the GPU of each, by number or name, or None.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, lambda number, frame: None)  # not SIG_IGN, which kernels would inherit
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))
    gpu = gpus.get()
    if gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu


def work(call: Callable[..., Any], *args: Any) -> Any:
    """Call a function in this worker; a stop meanwhile is a `KeyboardInterrupt` to it, and then the end.

    Args:
        call: the function.
        *args: its arguments.

    Returns:
        What it returns.
    """

    def stop(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what is put away is put away whole
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, stop)
    try:
        return call(*args)
    except KeyboardInterrupt:
        os._exit(STOPPED)  # the pool would hand out what else was planned
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def stop(pool: ProcessPoolExecutor, others: Collection[BaseProcess]) -> None:
    """Stop the workers in what they do, start nothing more, and wait for their end.

    Args:
        pool: the workers' pool, all of whose calls go through `work`.
        others: this process's children that are none of them.
    """
    for worker in set(active_children()).difference(others):
        worker.terminate()
    pool.shutdown(cancel_futures=True)


def end_with_parent() -> None:
    """End this process when the one ends that wanted it; it would wait for work for ever."""

    def watch() -> None:
        parent_process().join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def gpu(worker: int) -> str | None:
    """The GPU of a worker, going round.

    Args:
        worker: its number, from 0.

    Returns:
        The GPU's number or name, None without one.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None and shutil.which("nvidia-smi"):
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, check=False).stdout
        visible = ",".join(str(n) for n, line in enumerate(listed.splitlines()) if line.startswith("GPU"))
    names = [name.strip() for name in (visible or "").split(",") if name.strip()]
    return names[worker % len(names)] if names else None
