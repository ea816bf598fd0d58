"""One cell of the matrix, papermill replaced: what is run again, and what a kill or a full disk leaves."""

import errno
import os
import signal
import threading
from itertools import pairwise
from pathlib import Path

import pytest

from sdnb import run
from sdnb.files import atomic_write
from tests.cli.processes import exit_code, in_a_child, make


def folder(path: Path, content: str) -> Path:
    """What the key takes for a model: a folder with a configuration and weights."""
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text('{"model_type": "llama"}')
    (path / "model.safetensors").write_text(content)
    return path


class Bench:
    """A template on a model, and papermill's stand-in, which counts."""

    def __init__(self, root: Path):
        self.root, self.runs, self.problem = root, [], ""
        self.source = make(root / "notebooks" / "01_works.ipynb", ["1"])
        self.model = folder(root / "org" / "base", "one")

    def cell(self, **given) -> run.Cell:
        models = [run.Model(str(self.model))]
        [cell] = run.matrix(models, [self.source], given, self.root / "results")
        return cell

    def work(self, force: bool = False, **given) -> run.Outcome:
        return run._work(self.cell(**given), force, None)

    def execute(self, cell, timeout_s):
        self.runs.append(cell.source.stem)
        if not self.problem:
            atomic_write(cell.notebook.with_name("01_figure.png"), f"drawn {len(self.runs)}".encode())
        return {"cells": [], "metadata": {}, "count": len(self.runs)}, self.problem

    @property
    def notebook(self) -> Path:
        return self.cell().notebook


@pytest.fixture
def bench(tmp_path, monkeypatch):
    made = Bench(tmp_path)
    monkeypatch.setattr(run, "_execute", made.execute)
    return made


def test_what_is_done_and_unchanged_is_not_run_again(bench):
    assert not bench.cell().unchanged()
    assert [bench.work().status for _ in range(2)] == [run.DONE, run.UNCHANGED]
    assert bench.work(force=True).status == run.DONE and len(bench.runs) == 2
    note = bench.cell().note()
    assert note.keys() == {"key", "files", "seconds", "finished", "machine"}
    assert [*note["files"]] == ["01_figure.png"]


CHANGES = {
    "template": lambda b: make(b.source, ["2"]),
    "weights": lambda b: folder(b.model, "two"),
    "steps beside the model": lambda b: folder(b.model.with_name("base-steps") / "step1", "x"),
    "notebook gone": lambda b: b.notebook.unlink(),
    "notebook damaged": lambda b: b.notebook.write_text("{"),
    "figure gone": lambda b: b.notebook.with_name("01_figure.png").unlink(),
    "figure edited": lambda b: b.notebook.with_name("01_figure.png").write_text("edited"),
    "record beside it": lambda b: b.notebook.with_name("01_works.json").write_text("{}"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_run_again(bench, change):
    bench.work()
    CHANGES[change](bench)
    assert not bench.cell().unchanged()
    assert [bench.work().status for _ in range(2)] == [run.DONE, run.UNCHANGED]


def test_parameters_texts_models_and_the_package_count(bench, monkeypatch):
    """A parameter may name a file or a folder; a sentence need be no path."""
    text, member = bench.root / "text.txt", folder(bench.root / "org" / "tuned", "x")
    seen = []

    def key(**given) -> str:
        seen.append(run.cell_key(bench.cell(**given)))
        return seen[-1]

    key()
    key(value=2.0)
    for content in ("one", "one", "two"):
        text.write_text(content)
        key(fail_on=str(text))
    key(fail_on=str(member))
    folder(member, "y")
    key(fail_on=str(member))
    key(fail_on="many words " * 500)
    key(fail_on="~so/it begins")
    monkeypatch.setattr("sdnb.records.package_fingerprint", lambda: "changed")
    key(fail_on="~so/it begins")
    assert [a == b for a, b in pairwise(seen)] == [False, False, True, *[False] * 6]


def test_who_reads_records_is_run_again_when_one_changes_but_not_for_its_own(bench):
    other = bench.root / "results" / "some__model"
    other.mkdir(parents=True)
    plain = run.cell_key(bench.cell())
    make(bench.source, ["table = sdnb.summary(results_dir)"])
    assert bench.cell().reads_records
    seen = [run.cell_key(bench.cell())]
    for number, name in enumerate(("01_works", "02_other", "02_other")):
        (other / f"{name}.json").write_text(str(number))
        seen.append(run.cell_key(bench.cell()))
    assert [a == b for a, b in pairwise(seen)] == [True, False, False] and plain not in seen


def test_an_old_good_notebook_survives_a_failing_run(bench):
    bench.work()
    before, bench.problem = bench.notebook.read_bytes(), "ValueError: broken"
    failed = bench.notebook.with_name("01_works.failed.ipynb")
    outcome = bench.work(value=2.0)
    assert outcome.status == run.FAILED and outcome.reason == f"ValueError: broken (see {failed})"
    assert bench.notebook.read_bytes() == before and failed.is_file()
    bench.problem = ""
    assert bench.work(value=2.0).status == run.DONE and not failed.exists()


def test_a_name_that_is_no_model_leaves_no_folder(bench):
    for name in ("a" * 400, "~nosuch/model", str(bench.root / "none")):
        cell = run.matrix([run.Model(name)], [bench.source], {}, bench.root / "results")[0]
        assert run._work(cell, False, None).status == run.FAILED
    assert bench.runs == [] and not (bench.root / "results").exists()


def test_of_two_runs_in_one_folder_one_works_and_the_other_finds_it_done(bench, monkeypatch):
    outcomes, execute = [], bench.execute

    def slow(*given):
        second.start()
        second.join(0.3)
        assert outcomes == []  # it waits
        return execute(*given)

    second = threading.Thread(target=lambda: outcomes.append(bench.work()))
    monkeypatch.setattr(run, "_execute", slow)
    assert bench.work().status == run.DONE
    second.join()
    assert [outcome.status for outcome in outcomes] == [run.UNCHANGED] and len(bench.runs) == 1


def accident(monkeypatch, happens) -> None:
    """Let something happen before the notebook's temporary file is renamed."""
    replace = Path.replace

    def renamed(self, target):
        if Path(target).name == "01_works.ipynb":
            happens()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", renamed)


def temporary(bench) -> list[Path]:
    return list((bench.root / "results").rglob("*.tmp"))


def test_a_run_killed_at_a_named_place_is_resumed(bench, monkeypatch):
    bench.work()
    with monkeypatch.context() as patch:
        accident(patch, lambda: os.kill(os.getpid(), signal.SIGKILL))
        assert exit_code(in_a_child(lambda: bench.work(value=2.0))) == -signal.SIGKILL
    assert not bench.cell(value=2.0).unchanged() and len(temporary(bench)) == 1
    assert [bench.work(value=2.0).status for _ in range(2)] == [run.DONE, run.UNCHANGED]
    assert not temporary(bench)


def test_a_full_disk_is_told_and_leaves_nothing(bench, monkeypatch):
    bench.work()
    before = bench.notebook.read_bytes()

    def full():
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        accident(patch, full)
        outcome = bench.work(value=2.0)
    assert outcome.status == run.FAILED and "the disk is full" in outcome.reason
    assert bench.notebook.read_bytes() == before and not temporary(bench)
    assert bench.work(value=2.0).status == run.DONE
