"""`sdnb run` as a user starts it, with kernels: what is told, what is left behind, and how it ends."""

import contextlib
import fcntl
import json
import os
import pty
import signal
import struct
import subprocess
import sys
import termios
import time
from pathlib import Path

import nbformat
import pytest

from sdnb.run import Model
from tests.cli.processes import is_alive, make, wait_until
from tests.tiny import tiny_model

INTERRUPTED = "sdnb: interrupted; what was finished is kept"
WAITS = ["import os, time", "open(f'{results_dir}/{os.getpid()} {os.getppid()}', 'w'); time.sleep(value)"]


class Place:
    """Templates, results and temporary files of one test, and a small model."""

    def __init__(self, root: Path, model: Path):
        self.root, self.model = root, model
        self.templates, self.results, self.temporary = root / "templates", root / "results", root / "t"
        self.results.mkdir()
        self.temporary.mkdir()

    @property
    def folder(self) -> Path:
        return self.results / Model(str(self.model)).slug

    def words(self, *more) -> list[str]:
        folders = ["--templates", self.templates, "--results-dir", self.results]
        return [sys.executable, "-m", "sdnb.cli", "run", *map(str, [self.model, *folders, *more])]

    def start(self, *more, **options) -> subprocess.Popen:
        """A run that leads a process group, and hears of interrupts also under a shell that does not."""
        heard = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # noqa: E731
        own = {"env": os.environ | {"TMPDIR": str(self.temporary)}, "start_new_session": True}
        return subprocess.Popen(self.words(*more), preexec_fn=heard, text=True, **own | options)

    def run(self, *more) -> tuple[int, str, str]:
        """Exit code, and what was said on both streams."""
        process = self.start(*more, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=300)
        return process.returncode, out, err

    def processes(self, count: int, process: subprocess.Popen) -> set[int]:
        """Kernels and workers, when so many notebooks wait."""
        wait_until(lambda: len(list(self.results.glob("* *"))) == count or process.poll() is not None)
        found = [path.name.split() for path in self.results.glob("* *")]
        assert len(found) == count
        return {int(pid) for pids in found for pid in pids}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("org") / "tiny", layers=1)


@pytest.fixture
def place(tmp_path, model):
    return Place(tmp_path, model)


def test_what_is_told_and_kept_of_good_and_bad_notebooks(place):
    notebooks = {
        "01_works": ["import sys; print(sys.executable, value)", 'print("a line", file=sys.stderr)'],
        "02_fails": ["if fail_on in model: raise ValueError('broken, for ' + model)"],
        "03_dies": ["import os; os.write(2, b'last words\\n'); os._exit(3)"],
        "04_hangs": ["import time; time.sleep(600)"],
    }
    for name, sources in notebooks.items():
        make(place.templates / f"{name}.ipynb", sources)
    code, out, err = place.run("--jobs", "2", "--timeout", "2", "-p", "value", "7")
    assert (code, err) == (1, "")
    assert [line.partition("]")[0] for line in out.splitlines()[:4]] == [f"[{n}/4" for n in range(1, 5)]
    for said in (
        f"{place.model}  02_fails: ValueError: broken, for {place.model} (see ", "did not start or died",
        "last words", "more than 2 s (--timeout)", "1 done, 3 failed",
    ):  # fmt: skip
        assert out.count(said) == 1, said
    assert sorted(path.name for path in place.folder.glob("*.ipynb")) == [
        "01_works.ipynb", "02_fails.failed.ipynb", "03_dies.failed.ipynb", "04_hangs.failed.ipynb",
    ]  # fmt: skip
    assert "broken" in (place.folder / "02_fails.failed.ipynb").read_text()
    check_clean(nbformat.read(place.folder / "01_works.ipynb", 4))
    content = json.loads((place.folder / "01_works.ipynb").read_text())
    content["metadata"]["sdnb"]["seconds"] = 77.0
    (place.folder / "01_works.ipynb").write_text(json.dumps(content))
    again = ("--notebooks", "1,2", "-p", "value", "7", "-p", "fail_on", "nothing")
    said = place.run(*again)[1]
    assert "2 done" in said, "a parameter has changed for both"
    assert f"{place.model}  01_works  started, 77 s last time" in said, "what the note tells the next run"
    assert "2 unchanged" in place.run(*again)[1]
    assert not (place.folder / "02_fails.failed.ipynb").exists() and not list(place.temporary.iterdir())


def check_clean(notebook) -> None:
    """An executed notebook holds its outputs, the injected parameters, and no trace of papermill."""
    assert notebook.metadata.keys() >= {"sdnb"} and "papermill" not in notebook.metadata
    assert not any({"papermill", "execution"} & cell.metadata.keys() for cell in notebook.cells)
    [injected] = [cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", [])]
    assert "value = 7" in injected.source
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    assert {out["name"]: out["text"] for out in outputs} == {
        "stdout": f"{sys.executable} 7\n", "stderr": "a line\n",
    }  # fmt: skip


def test_an_interrupted_run_says_so_in_one_line(place):
    """From a keyboard it reaches all processes of the terminal; there, running cells have a line each."""
    for number in range(1, 4):
        make(place.templates / f"0{number}_waits.ipynb", WAITS)
    master, terminal = pty.openpty()
    fcntl.ioctl(terminal, termios.TIOCSWINSZ, struct.pack("HHHH", 40, 160, 0, 0))
    streams = {"stdin": terminal, "stdout": terminal, "stderr": terminal}
    process = place.start("--jobs", "2", "-p", "value", "600", **streams)
    os.close(terminal)
    running = place.processes(2, process)
    time.sleep(1.5)  # until a cell's line was drawn
    os.killpg(process.pid, signal.SIGINT)
    parts = []
    with contextlib.suppress(OSError):  # at the end of a terminal
        while part := os.read(master, 65536):
            parts.append(part)
    shown = b"".join(parts).decode(errors="replace")
    assert process.wait(60) == 130
    assert shown.count(INTERRUPTED) == 1 and "Traceback" not in shown
    assert f"{place.model}  01_waits: cell 4 of 4" in shown
    wait_until(lambda: not any(map(is_alive, running)))
    assert [path.name for path in place.folder.iterdir()] == [".runs"] and not list(place.temporary.iterdir())


def test_a_run_that_is_killed_takes_its_kernels_along_and_is_resumed(place):
    for name in ("01_waits", "02_waits"):
        make(place.templates / f"{name}.ipynb", ["import tempfile; tempfile.mkstemp()", *WAITS])
    process = place.start("--jobs", "2", "-p", "value", "600", stdout=subprocess.DEVNULL)
    running = place.processes(2, process)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    wait_until(lambda: not any(map(is_alive, running)))
    assert not list(place.folder.glob("*.ipynb"))
    assert place.run("--jobs", "2", "-p", "value", "0")[0] == 0
    assert len(list(place.folder.glob("*.ipynb"))) == 2 and not list(place.temporary.iterdir())


def test_a_worker_that_is_killed_is_told_and_who_reads_records_comes_last(place):
    log = 'open(results_dir + "/log", "a").write("{} ")'
    make(
        place.templates / "01_across.ipynb",
        [log.format(1), "# sdnb.summary(results_dir), in a pool of its own"],
    )
    kills = ["import os", "os.kill(os.getppid(), 9) if value == 1 else None", log.format(2)]
    make(place.templates / "02_kills.ipynb", kills)
    make(place.templates / "03_waits.ipynb", ["import time; time.sleep(600 * value)", log.format(3)])
    code, out, err = place.run("--jobs", "2", "-p", "value", "1")
    assert (code, err) == (1, "") and out.count("its process was killed") == 2
    assert "1 done, 2 failed" in out
    assert place.run("-p", "value", "0")[0] == 0
    assert (place.results / "log").read_text() in ("1 2 3 1 ", "1 3 2 1 ")
