"""Looking at processes, and small notebooks to run; imports nothing that takes a process long."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import nbformat

PARAMETERS = 'model: str = "x"\nresults_dir: str = "r"\nvalue: float = 1\nfail_on: str = ""'
"""Of the notebooks that the tests make."""


def make(path: Path, sources: list[str], parameters: str = PARAMETERS) -> Path:
    """Write a template with these code cells, set to a kernel that does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    cells = [nbformat.v4.new_code_cell(parameters, metadata={"tags": ["parameters"]})]
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    kernel = {"kernelspec": {"name": "no-such-kernel", "display_name": "stale", "language": "python"}}
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)
    return path


def in_a_child(work: Callable[[], object]) -> int:
    """Start a fork that does the work and ends; its process id."""
    child = os.fork()
    if child == 0:
        try:
            work()
        finally:
            os._exit(0)
    return child


def exit_code(child: int) -> int:
    """Wait for a fork to end; minus the signal that ended it, if one did."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def is_alive(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_until(condition) -> None:
    """Wait, for up to two minutes, until a condition holds; it must hold then."""
    deadline = time.monotonic() + 120
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert condition()
