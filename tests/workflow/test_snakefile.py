"""The matrix on Snakemake, on small notebooks: what is run, in which order, and again after a failure."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("snakemake", reason="Snakemake is an extra of its own: `make cluster-test` runs these")

from sdnb.run import Model
from tests.cli.processes import make, wait_until

ROOT = Path(__file__).resolve().parents[2]
PARAMETERS = 'model: str = "x"\nresults_dir: str = "r"\nvalue: int = 1\nhurdle: str = ""'
LOG = "import os, time; note = lambda word: open(results_dir + '/log', 'a').write(word + ' ')"
CELLS = {
    "01_works": [LOG, "note(f'1:{value}'); time.sleep(0.5); note('1.')"],
    "02_fails": [
        LOG, "assert os.path.basename(model) != hurdle, 'too high'", "note('2'); time.sleep(0.5); note('2.')",
    ],
    "19_across_models": [LOG, "note('19')  # as sdnb.summary() does, it reads the records of the others"],
}  # fmt: skip
MODELS = """
models:
  - model: {folder}/one
    notebooks: [1, 2, 19]
    parameters: {{value: 7}}
  - model: {folder}/two
    notebooks: [1, 2]
    parameters: {{hurdle: two}}
"""


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    from tests.tiny import tiny_model  # not for a test that is skipped

    folder = tmp_path_factory.mktemp("org")
    for name in ("one", "two"):
        tiny_model(folder / name, layers=1)
    return folder


@pytest.fixture
def place(models, tmp_path):
    """A folder with templates and a models' file, in which Snakemake is started."""
    for name, sources in CELLS.items():
        make(tmp_path / "templates" / f"{name}.ipynb", sources, PARAMETERS)
    (tmp_path / "models.yaml").write_text(MODELS.format(folder=models))
    (tmp_path / "results").mkdir()
    return tmp_path


def start(place: Path, *more: str, config: tuple[str, ...] = ()) -> subprocess.Popen:
    program = [sys.executable, "-m", "snakemake", "--snakefile", str(ROOT / "workflow" / "Snakefile")]
    settings = ["--cores", "2", *more, "--config", "models=models.yaml", "templates=templates", *config]
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen([*program, *settings], cwd=place, start_new_session=True, **streams)


def snakemake(place: Path, *more: str, config: tuple[str, ...] = ()) -> tuple[int, int, str]:
    """Exit code, how many cells were planned, and everything said."""
    process = start(place, *more, config=config)
    said = process.communicate(timeout=600)[0]
    return process.returncode, sum(map(int, re.findall(r"^cell +(\d+)$", said, re.M)[:1])), said


def log(place: Path) -> list[str]:
    path = place / "results" / "log"
    return path.read_text().split() if path.is_file() else []


def folder(place: Path, models: Path, name: str) -> Path:
    return place / "results" / Model(str(models / name)).slug


def test_a_failing_cell_stops_only_what_waits_for_it_and_alone_is_run_again(place, models):
    code, jobs, said = snakemake(place)
    assert (code, jobs) == (1, 5)
    assert sorted(log(place)) == ["1.", "1.", "1:1", "1:7", "2", "2."], "19 waits for the one that failed"
    failed = folder(place, models, "two")
    assert (
        "AssertionError: too high" in said and "too high" in (failed / ".runs" / "02_fails.log").read_text()
    )
    assert (failed / "02_fails.failed.ipynb").is_file() and not (failed / "02_fails.ipynb").exists()

    make(place / "templates" / "02_fails.ipynb", [LOG, "note('2')"], PARAMETERS)  # both cells of it change
    assert snakemake(place)[:2] == (0, 3)
    assert log(place)[6:] == ["2", "2", "19"], "the reader of records comes last"
    assert not (failed / "02_fails.failed.ipynb").exists()

    assert snakemake(place)[:2] == (0, 0) and len(log(place)) == 9
    (failed / "01_works.ipynb").unlink()
    assert snakemake(place, "-n")[:2] == (0, 2) and len(log(place)) == 9
    assert snakemake(place, f"results/{failed.name}/.runs/01_works.done")[:2] == (0, 1)
    assert log(place)[9:] == ["1:1", "1."]


def test_cells_with_a_gpu_take_turns(place):
    limits = ("--set-resources", "cell:gpu=1", "--resources", "gpu=1")
    assert snakemake(place, *limits, config=("notebooks=1",))[0] == 0
    assert log(place) in (["1:1", "1.", "1:7", "1."], ["1:7", "1.", "1:1", "1."])


def test_what_was_done_before_a_kill_is_not_run_again(place, models):
    source = "note('2'); time.sleep((value - 1) * 100); note('2.')"  # long where the value is 7
    make(place / "templates" / "02_fails.ipynb", [LOG, source], PARAMETERS)
    process, done = start(place), folder(place, models, "two") / "02_fails.ipynb"
    wait_until(lambda: log(place).count("1.") == log(place).count("2") == 2 and done.is_file())
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert log(place).count("2") == 2 and log(place).count("19") == 0
    text = (place / "models.yaml").read_text()
    (place / "models.yaml").write_text(text.replace("value: 7", "value: 1"))
    code, jobs, _ = snakemake(place)
    assert code == 0 and log(place).count("19") == 1
    assert log(place).count("2") == 3, "only the one that was killed"
    assert jobs == 3, "with it the notebook whose parameter has changed, and the reader"
