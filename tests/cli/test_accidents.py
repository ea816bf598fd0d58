"""What is left of a cell when its run is killed, or the disk is full, at a named place, and then resumed.

Kills in the middle of a record are in tests/records, in the middle of a notebook in test_run.py, many at
random moments in tests/torture.py.
"""

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from sdnb.cli import plan, runner
from sdnb.records import files
from tests.cli.processes import is_alive, wait_until
from tests.cli.test_run import make, slug
from tests.tiny import tiny_model

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="looks at processes in /proc")
ROOT = Path(__file__).resolve().parents[2]
PLACES = [f"{name} {step}" for name in ("01_works.ipynb", "01_works.json") for step in ("written", "renamed")]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("org") / "tiny", layers=1)


@pytest.fixture
def cell(model, tmp_path, monkeypatch):
    """A cell whose notebook is written without a kernel, done once, with a new parameter since then."""
    make(tmp_path / "01_works.ipynb", [])
    monkeypatch.setattr("sdnb.cli.execute.execute", execute)
    old, new = (
        plan.matrix(plan.models([str(model)]), plan.templates(tmp_path), {"value": n}, tmp_path, tmp_path)[0]
        for n in (1, 2)
    )
    assert runner.run_cell(old, runner.Options()).status == runner.DONE
    return new


def execute(cell, options) -> dict:
    files.atomic_write(cell.notebook, str(cell.parameters["value"]).encode())
    return {}


def at(place: str, monkeypatch, accident) -> None:
    """Let something happen before the temporary file of a name is on the disk, or before it is renamed."""
    name, step = place.split()
    fsync, replace = os.fsync, Path.replace

    def written(number):
        if f".{name}." in str(Path(f"/proc/self/fd/{number}").readlink()):
            accident()
        return fsync(number)

    def renamed(self, target):
        if Path(target).name == name:
            accident()
        return replace(self, target)

    if step == "written":
        monkeypatch.setattr(os, "fsync", written)
    else:
        monkeypatch.setattr(Path, "replace", renamed)


def temporary_files(cell) -> list[Path]:
    return list(cell.results.rglob("*.tmp"))


@pytest.mark.parametrize("place", PLACES)
def test_a_run_killed_at_a_named_place_is_resumed(cell, monkeypatch, place):
    with monkeypatch.context() as patch:
        at(place, patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        child = os.fork()
        if child == 0:
            runner.run_cell(cell, runner.Options())
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert cell.notebook.read_text() == ("1" if place.startswith("01_works.ipynb") else "2")
    assert not runner.is_done(cell) and len(temporary_files(cell)) == 1
    assert runner.run_cell(cell, runner.Options()).status == runner.DONE
    assert cell.notebook.read_text() == "2" and not temporary_files(cell)
    assert runner.run_cell(cell, runner.Options()).status == runner.KEPT


@pytest.mark.parametrize("place", PLACES)
def test_a_full_disk_is_told_and_leaves_nothing(cell, monkeypatch, place):
    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        at(place, patch, full)
        outcome = runner.run_cell(cell, runner.Options())
    assert outcome.status == runner.FAILED and "the disk is full" in outcome.reason
    assert cell.notebook.read_text() == ("1" if place.startswith("01_works.ipynb") else "2")
    assert not runner.is_done(cell) and not temporary_files(cell)
    assert runner.run_cell(cell, runner.Options()).status == runner.DONE


def test_a_full_temporary_folder_is_told(cell, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.undo()  # the real execute, which fails before it starts a kernel
    monkeypatch.setattr("tempfile.mkdtemp", full)
    outcome = runner.run_cell(cell, runner.Options())
    assert outcome.status == runner.FAILED and "No space left" in outcome.reason
    assert cell.notebook.read_text() == "1"


# As on a busy machine: what waits for the kernel sees it dead before all of it is put away. Workers run this
# file, too, but for its last lines.
SLOW = """
import asyncio, sys
from jupyter_client import AsyncKernelManager
from tests.cli.light import main

ready = AsyncKernelManager._async_cleanup_resources

async def later(self, *args, **kwargs):
    await asyncio.sleep(3)
    await ready(self, *args, **kwargs)

AsyncKernelManager.cleanup_resources = AsyncKernelManager._async_cleanup_resources = later
if __name__ == "__main__":
    sys.exit(main())
"""


# A fork server that takes long with its imports.
IMPORTING = """
import sys
from sdnb.cli import kernels
from tests.cli.light import main

kernels.PRELOADED.append("endless")
if __name__ == "__main__":
    sys.exit(main())
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
@pytest.mark.parametrize("jobs", [1, 2])
def test_a_run_ended_while_the_fork_server_imports_takes_it_along(model, tmp_path, temporary, jobs, number):
    (tmp_path / "program.py").write_text(IMPORTING)
    endless = f"import os, time; open({str(tmp_path)!r} + f'/{{os.getpid()}} ', 'w'); time.sleep(600)"
    (tmp_path / "endless.py").write_text(endless)
    for name in ("01_works", "02_works"):
        make(tmp_path / "templates" / f"{name}.ipynb", [])
    process = started(tmp_path / "program.py", model, jobs)
    marks = wait_for_marks(tmp_path, jobs, process)
    os.killpg(process.pid, number) if number == signal.SIGINT else process.send_signal(number)
    out, err = process.communicate(timeout=60)  # whoever holds its ends is gone
    assert process.returncode == (130 if number == signal.SIGINT else -number)
    assert out == ""
    assert err == INTERRUPTED if number == signal.SIGINT else "Traceback" not in err
    wait_until(lambda: not any(is_alive(int(mark.name)) for mark in marks))


INTERRUPTED = "sdnb: interrupted; what was finished is kept\n"


def started(program: Path, model: Path, jobs: int) -> subprocess.Popen:
    """A run on the templates beside a program, in a process group of its own."""
    folders = ("--templates", str(program.with_name("templates")), "--results-dir", str(program.parent))
    # a suite in a shell's background ignores SIGINT, and so would what it starts
    heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
    return subprocess.Popen(
        [sys.executable, str(program), "run", str(model), "--jobs", str(jobs), *folders],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=heard,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{program.parent}"},
    )


def wait_for_marks(folder: Path, count: int, process: subprocess.Popen) -> list[Path]:
    """Files that are named after the processes that made them."""
    wait_until(lambda: len(list(folder.glob("* "))) == count or process.poll() is not None)
    return list(folder.glob("* "))


@pytest.mark.parametrize("jobs", [1, 2])
def test_an_interrupted_run_says_so_and_stops_its_kernels(model, tmp_path, temporary, jobs):
    """With several jobs the interrupt comes to all processes, as from a keyboard."""
    (tmp_path / "slow.py").write_text(SLOW)
    source = "import os, time; open(f'{results_dir}/{os.getpid()} ', 'w'); time.sleep(600)"
    for number in range(1, jobs + 2):
        make(tmp_path / "templates" / f"{number:02d}_works.ipynb", [source])
    process = started(tmp_path / "slow.py", model, jobs)
    marks = wait_for_marks(tmp_path, jobs, process)
    time.sleep(0.2)
    if jobs == 1:
        process.send_signal(signal.SIGINT)
    else:
        os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130
    assert out.strip() == "" and err == INTERRUPTED
    assert len(marks) == jobs and not any(is_alive(int(mark.name)) for mark in marks)
    assert [path.name for path in (tmp_path / slug(model)).iterdir()] == [".runs"]
    [shelf] = temporary.iterdir()
    assert [path.name for path in shelf.iterdir()] == [".lock"]
