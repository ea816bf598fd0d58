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
import time
from collections.abc import Callable, Collection
from multiprocessing import active_children, parent_process, util
from multiprocessing.process import BaseProcess
from typing import Any

PATIENCE_S = 30  # for a kernel to be put away; longer than Jupyter waits before it kills one


def prepare(jobs: int, gpus: Any) -> None:
    """Give this worker its share of the threads, a GPU of its own if there are any, and its parent's fate.

    Args:
        jobs: how many workers there are.
        gpus: a queue with the GPU of each, by number or name, or None.
    """
    end_with_parent()
    signal.signal(signal.SIGINT, lambda number, frame: None)  # not SIG_IGN, which kernels would inherit
    signal.signal(signal.SIGTERM, lambda number, frame: _end())
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

    def interrupt(number, frame):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # once: what is put away is put away whole
        raise KeyboardInterrupt

    idle = signal.signal(signal.SIGTERM, interrupt)
    try:
        return call(*args)
    except KeyboardInterrupt:
        _end()
    finally:
        signal.signal(signal.SIGTERM, idle)


def _end() -> None:
    """End this worker now: an exception would go to the pool, which would hand out what else was planned."""
    util._exit_function()  # as at any end of a process: the fork server's folder goes
    os._exit(1)


def stop(others: Collection[BaseProcess]) -> None:
    """Stop workers in what they do, and wait for their end; it comes at once with a second interrupt.

    Args:
        others: children of this process that are none; what was started since they were counted is.
    """
    workers = set(active_children()).difference(others)
    for worker in workers:
        worker.terminate()
    try:
        end = time.monotonic() + PATIENCE_S
        for worker in workers:
            worker.join(max(0.0, end - time.monotonic()))
    finally:
        for worker in workers:
            worker.kill()


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
