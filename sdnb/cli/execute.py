"""One template through papermill: a kernel of this interpreter, private sockets, an atomic file."""

import json
import logging
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from sdnb.cli import kernels
from sdnb.cli.plan import Cell
from sdnb.cli.runner import Options
from sdnb.cli.workshop import workshop
from sdnb.errors import SdnbError
from sdnb.records.files import atomic_write

START_TIMEOUT_S = 180
_QUIET = {"TQDM_DISABLE": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TOKENIZERS_PARALLELISM": "false"}


_LOG = "kernel.log"
# The kernel's own stderr would stand between the lines of progress; its end is told when the kernel dies.
_KERNEL = (
    "import os, runpy, sys; "
    "os.dup2(os.open(sys.argv.pop(1), os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2); "
    "runpy.run_module('ipykernel_launcher', run_name='__main__')"
)


class CellFailed(SdnbError):
    """A template stopped with an error; the message is that error's."""


def execute(cell: Cell, options: Options) -> dict:
    """Run a template and put the executed notebook in place, without papermill's own notes in it.

    A notebook that failed is left beside it as `<template>.failed.ipynb`, with its traceback; an older good
    one stays as it was.

    Args:
        cell: what to run.
        options: its time limit.

    Returns:
        Papermill's notes: start, end, duration.

    Raises:
        CellFailed: the template raised, or its kernel died or hung.
    """
    failed = cell.notebook.with_name(f"{cell.template}.failed.ipynb")
    with _kernel_folder() as folder:
        running = folder / f"{cell.template}.ipynb"
        problem = _attempt(cell, running, folder, options.timeout_s)
        content = json.loads(running.read_text(encoding="utf-8")) if running.is_file() else None
        timing = _without_notes(content) if content else {}
        if content:
            target = failed if problem else cell.notebook
            atomic_write(target, (json.dumps(content, indent=1, ensure_ascii=False) + "\n").encode())
    if problem:
        raise CellFailed(f"{problem} (see {failed})" if content else problem)
    failed.unlink(missing_ok=True)
    return timing


def _attempt(cell: Cell, running: Path, folder: Path, timeout_s: int | None) -> str | None:
    """Run once, and once more if the kernel did not start or died; returns what went wrong, or None."""
    import papermill
    from jupyter_core.utils import ensure_event_loop
    from nbclient.exceptions import CellTimeoutError, DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    logging.getLogger("papermill").setLevel(logging.CRITICAL)  # what it logs is raised too, and told below
    problem = None
    for _ in range(2):
        try:
            papermill.execute_notebook(
                str(cell.source),
                str(running),
                parameters=cell.parameters,
                kernel_name="python3",
                language="python",
                progress_bar=False,
                start_timeout=START_TIMEOUT_S,
                execution_timeout=timeout_s,
                config=_transport(folder),
            )
            return None
        except PapermillExecutionError as error:
            return f"{error.ename}: {error.evalue}"
        except CellTimeoutError:
            return f"a cell ran for more than {timeout_s} s (--timeout)"
        except KeyboardInterrupt:
            # what still waits for the kernel, now gone, would complain when it is collected
            ensure_event_loop().set_exception_handler(lambda loop, context: None)
            raise
        except (DeadKernelError, RuntimeError, TimeoutError) as error:
            first = str(error).splitlines()[0] if str(error) else repr(error)
            problem = (
                f"the kernel did not start or died, twice ({first}) {_last_words(folder / _LOG)}".rstrip()
            )
    return problem


def _last_words(log: Path) -> str:
    """The last line that the kernel wrote to stderr."""
    lines = log.read_text(encoding="utf-8", errors="replace").split("\n") if log.is_file() else []
    return next((line.strip() for line in reversed(lines) if line.strip()), "")


@contextmanager
def _kernel_folder() -> Iterator[Path]:
    """A temporary folder with a kernel of this interpreter, for sockets and the running notebook."""
    with workshop() as folder:
        kernel = folder / "kernels" / "python3"
        kernel.mkdir(parents=True)
        command = [sys.executable, "-c", _KERNEL, str(folder / _LOG), "-f", "{connection_file}"]
        spec = {"argv": command, "display_name": "Python 3", "language": "python"}
        if kernels.forks():
            spec["metadata"] = {"kernel_provisioner": {"provisioner_name": kernels.NAME}}
        (kernel / "kernel.json").write_text(json.dumps(spec))
        settings = _QUIET | {
            # before every other place, so that a kernel of the same name installed elsewhere is not taken
            "JUPYTER_PATH": os.pathsep.join(filter(None, [str(folder), os.environ.get("JUPYTER_PATH")])),
            "JUPYTER_RUNTIME_DIR": str(folder / "runtime"),
            "IPYTHONDIR": str(folder / "ipython"),  # a user's own start-up files would change the pages
            "TMPDIR": str(folder),  # what a killed kernel leaves is swept with the rest
        }
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield folder
        finally:
            os.environ.update({name: value for name, value in before.items() if value is not None})
            for name in [name for name, value in before.items() if value is None]:
                del os.environ[name]


def _transport(folder: Path):
    """Sockets in the file system: no race for ports, nothing that another user could reach."""
    from traitlets.config import Config

    own = {"connection_file": str(folder / "connection.json")}
    if os.name != "nt":
        own |= {"transport": "ipc", "ip": str(folder / "k")}
    return Config({"KernelManager": own, "AsyncKernelManager": own})


def _without_notes(content: dict) -> dict:
    """Take papermill's notes out of a notebook, since they differ from run to run; return the notebook's."""
    for cell in content["cells"]:
        cell["metadata"].pop("papermill", None)
        cell["metadata"].pop("execution", None)
    notes = content["metadata"].pop("papermill", {})
    return {key: notes.get(key) for key in ("start_time", "end_time", "duration")}
