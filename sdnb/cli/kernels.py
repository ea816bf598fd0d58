"""Kernels that start at once: forks of a process that has imported what all templates import.

A kernel of its own spends seconds of processor time on imports before the first cell, more than most cells
take. Here the first kernel of each worker pays for all: `multiprocessing`'s fork server imports torch,
transformers and IPython, touches none of them, and each kernel is forked from it. Where there is a GPU or no
Linux, kernels are ordinary processes: a fork must not inherit a GPU, nor macOS' libraries.
"""

import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import ExitStack
from functools import cache
from multiprocessing import util
from pathlib import Path
from types import ModuleType
from typing import Any

from jupyter_client.provisioning import LocalProvisioner

from sdnb.cli.workers import end_with_parent
from sdnb.cli.workshop import workshop

NAME = "sdnb-fork"  # as in pyproject.toml, where Jupyter finds it
# Not matplotlib nor ipykernel's application: what they read from the environment is each kernel's own.
PRELOADED = [
    "sdnb.cli.fork_server",  # first: how the server ends, also while it imports the others
    "ipykernel.ipkernel",
    "pandas",
    "scipy.stats",
    "transformers.modeling_utils",
    "sdnb.observations",
]


def forks() -> bool:
    """Whether kernels are forked on this machine: on Linux, without a GPU.

    Returns:
        True if they are.
    """
    gpu = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/kfd").exists()
    return sys.platform == "linux" and not gpu


class ForkedKernel(LocalProvisioner):
    """Starts a kernel as a fork; in all else it is Jupyter's own way with local kernels."""

    async def launch_kernel(self, cmd: list[str], **kwargs: Any) -> dict[str, Any]:
        """Start the kernel, in a process group of its own as Jupyter's are.

        Args:
            cmd: interpreter, `-c`, program and its arguments; program and arguments are what is run.
            **kwargs: `env` and `cwd` of the kernel count.

        Returns:
            How to connect to it.
        """
        self.process = Fork(cmd[2:], kwargs["env"], kwargs.get("cwd"))
        self.pid = self.pgid = self.process.pid
        self.cwd = kwargs.get("cwd") or Path.cwd()
        return self.connection_info


class Fork:
    """A forked program with the interface of `subprocess.Popen` that Jupyter uses.

    Args:
        program: source code and its arguments.
        env: its environment.
        cwd: its working directory; this one when None.
    """

    stdin = stdout = stderr = None

    def __init__(self, program: list[str], env: dict[str, str], cwd: str | None) -> None:
        _prepare_server()
        context = multiprocessing.get_context("forkserver")
        self._process = context.Process(target=_run, args=(program, env, str(cwd or Path.cwd())), daemon=True)
        # the fork would run the program that it is started from, if that has no guard around its last lines
        main, sys.modules["__main__"] = sys.modules["__main__"], ModuleType("__main__")
        try:
            self._process.start()
        finally:
            sys.modules["__main__"] = main
        self.pid = self._process.pid

    def poll(self) -> int | None:
        """The exit code, negative after a signal, or None while it runs."""
        return self._process.exitcode

    def wait(self) -> int | None:
        """Wait for the end; the exit code."""
        self._process.join()
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it has ended."""
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self) -> None:
        """Ask it to end."""
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        """End it."""
        self.send_signal(signal.SIGKILL)


@cache
def _prepare_server() -> None:
    """Say what the fork server imports, and give its socket a place that a kill does not leave behind."""
    multiprocessing.get_context("forkserver").set_forkserver_preload(PRELOADED)
    stack, before = ExitStack(), tempfile.tempdir
    tempfile.tempdir = str(stack.enter_context(workshop()))
    util.get_temp_dir()  # multiprocessing's own, made once
    tempfile.tempdir = before
    util.Finalize(None, stack.close, exitpriority=-200)  # after its own, which is made first


def _run(program: list[str], env: dict[str, str], cwd: str) -> None:
    """Run a program in this fork as if it had been started on its own."""
    os.setsid()
    if signal.getsignal(signal.SIGINT) == signal.SIG_DFL:  # see sdnb.cli.fork_server
        signal.signal(signal.SIGINT, signal.default_int_handler)
    end_with_parent()
    os.environ.clear()
    os.environ.update(env)
    os.environ["JPY_PARENT_PID"] = str(os.getppid())  # the fork server, which lives as long as its forks
    time.tzset()
    tempfile.tempdir = None  # to be read from TMPDIR again
    os.chdir(cwd)
    source, *arguments = program
    sys.argv = ["-c", *arguments]
    exec(compile(source, "<kernel>", "exec"), {"__name__": "__main__"})
