"""`sdnb run` on small notebooks made here: what is run, kept, told and left behind."""

import json
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import nbformat
import pytest
import torch
from safetensors.torch import load_file

from sdnb import load
from sdnb.cli import plan, runner
from sdnb.cli.main import main
from sdnb.errors import ModelError
from tests.cli.processes import is_alive, wait_until
from tests.tiny import tiny_model

PARAMETERS = 'model: str = "x"\nresults_dir: str = "r"\nvalue: int = 1\nfail_on: str = ""'
CELLS = {
    # `log` counts runs: it is not part of what the runner looks at
    "01_works": [
        'open(results_dir + "/log", "a").write("1")',
        "import sys; print(sys.executable, value)",
        'print("a line for stderr", file=sys.stderr)',
    ],
    "02_fails": [
        'open(results_dir + "/log", "a").write("2")',
        "if fail_on in model: raise ValueError('broken, for ' + model)",
    ],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("org") / "tiny", layers=1)


@pytest.fixture
def templates(tmp_path):
    folder = tmp_path / "templates"
    for name, sources in CELLS.items():
        make(folder / f"{name}.ipynb", sources)
    return folder


def make(path: Path, sources: list[str]) -> None:
    path.parent.mkdir(exist_ok=True)
    cells = [nbformat.v4.new_code_cell(PARAMETERS, metadata={"tags": ["parameters"]})]
    kernel = {"kernelspec": {"name": "no-such-kernel", "display_name": "stale", "language": "python"}}
    cells += [nbformat.v4.new_code_cell(source) for source in sources]
    nbformat.write(nbformat.v4.new_notebook(cells=cells, metadata=kernel), path)


LIGHT = [sys.executable, str(Path(__file__).with_name("light.py"))]


def words(templates, *more) -> list[str]:
    """The command line behind `sdnb`; the folder of results is made."""
    results = templates.parent / "results"
    results.mkdir(exist_ok=True)
    return ["run", "--templates", str(templates), "--results-dir", str(results), *map(str, more)]


def run(templates, *more) -> int:
    return main(words(templates, *more))


def run_apart(templates, *more) -> subprocess.CompletedProcess:
    """As `run`, but the workers too start light kernels."""
    return subprocess.run([*LIGHT, *words(templates, *more)], capture_output=True, text=True, check=False)


def log(templates) -> str:
    """Which templates were run so far."""
    path = templates.parent / "results" / "log"
    return path.read_text() if path.is_file() else ""


def slug(model) -> str:
    return f"{model.parent.name}__tiny".lower()


def lines(capfd) -> list[str]:
    out, err = capfd.readouterr()
    assert err == ""
    return out.splitlines()


def test_a_failing_cell_does_not_stop_the_others(templates, model, capfd):
    assert run(templates, model, model.parent / "none", "-p", "fail_on", "org") == 1
    out = lines(capfd)
    assert [line.partition("]")[0] + "]" for line in out[:4]] == ["[1/4]", "[2/4]", "[3/4]", "[4/4]"]
    text = "\n".join(out)
    assert f"{model}  01_works  done" in text
    assert f"[2/4] {model}  02_fails  failed" in out  # the reason stands once, below the table
    assert text.count(f"ValueError: broken, for {model} (see ") == 1
    assert text.count("no folder") == 2  # the model that is not there, for each notebook
    assert "1 done, 3 failed" in text
    folder = templates.parent / "results" / slug(model)
    assert (folder / "01_works.ipynb").is_file()
    failed = nbformat.read(folder / "02_fails.failed.ipynb", 4)
    assert "broken" in json.dumps(failed)
    assert not (folder / "02_fails.ipynb").exists()
    assert log(templates) == "12"


def test_the_executed_notebook_is_clean_and_of_this_interpreter(templates, model):
    assert run(templates, model, "--notebooks", "01", "-p", "value", "7") == 0
    notebook = nbformat.read(templates.parent / "results" / slug(model) / "01_works.ipynb", 4)
    assert "papermill" not in notebook.metadata
    assert not any("papermill" in cell.metadata for cell in notebook.cells)
    injected = next(cell for cell in notebook.cells if "injected-parameters" in cell.metadata.get("tags", []))
    assert "value = 7" in injected.source
    outputs = [out for cell in notebook.cells for out in cell.get("outputs", [])]
    printed = {out["name"]: out["text"] for out in outputs if out["output_type"] == "stream"}
    assert printed == {"stdout": f"{sys.executable} 7\n", "stderr": "a line for stderr\n"}
    note = json.loads((templates.parent / "results" / slug(model) / ".runs" / "01_works.json").read_text())
    assert note["duration"] > 0


def test_what_is_done_and_unchanged_is_not_run_again(templates, model, capfd):
    only = ("--notebooks", "01")
    assert run(templates, model, *only) == 0
    assert run(templates, model, *only) == 0
    assert log(templates) == "1"
    assert "1 unchanged" in "\n".join(lines(capfd))
    assert run(templates, model, *only, "--force") == 0
    assert log(templates) == "11"


@pytest.fixture
def counted(monkeypatch):
    """Replaces papermill by a count, for tests of what is run again."""
    runs = []

    def execute(cell, options):
        runs.append(cell.template)
        cell.notebook.parent.mkdir(parents=True, exist_ok=True)
        cell.notebook.write_text(f"run {len(runs)}")
        cell.record.with_name("01_figure.png").write_text(f"drawn {len(runs)}")
        return {}

    monkeypatch.setattr("sdnb.cli.execute.execute", execute)
    return runs


def change_template(templates, model):
    make(templates / "01_works.ipynb", ["print(2)"])


def change_weights(templates, model):
    path = model / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def change_notebook(templates, model):
    (templates.parent / "results" / slug(model) / "01_works.ipynb").write_text("edited")


def remove_notebook(templates, model):
    (templates.parent / "results" / slug(model) / "01_works.ipynb").unlink()


def remove_figure(templates, model):
    (templates.parent / "results" / slug(model) / "01_figure.png").unlink()


def damage_note(templates, model):
    (templates.parent / "results" / slug(model) / ".runs" / "01_works.json").write_text("{")


CHANGES = (change_template, change_weights, change_notebook, remove_notebook, remove_figure, damage_note)


@pytest.mark.parametrize("change", CHANGES)
def test_what_changed_is_run_again(templates, tmp_path, counted, change):
    model = tiny_model(tmp_path / "org" / "tiny", layers=1)
    only = (model, "--notebooks", "01")
    results = templates.parent / "results"
    (cell,) = plan.matrix(plan.models([str(model)]), plan.templates(templates), {}, results, results, ["01"])
    assert not runner.is_done(cell)
    assert run(templates, *only) == run(templates, *only) == 0
    assert len(counted) == 1 and runner.is_done(cell)
    change(templates, model)
    assert not runner.is_done(cell)
    assert run(templates, *only) == run(templates, *only) == 0
    assert len(counted) == 2


def test_other_parameters_package_and_text_are_run_again(templates, model, counted, monkeypatch, tmp_path):
    only = (model, "--notebooks", "01")
    run(templates, *only)
    run(templates, *only, "-p", "value", "2")
    assert len(counted) == 2
    text = tmp_path / "text.txt"
    for content in ("one", "one", "two"):
        text.write_text(content)
        run(templates, *only, "-p", "fail_on", text)
    assert len(counted) == 4
    from sdnb.records import sources

    monkeypatch.setattr(sources, "package_fingerprint", lambda *parts: "changed")
    run(templates, *only, "-p", "fail_on", text)
    assert len(counted) == 5


def test_an_old_good_notebook_survives_a_failing_run(templates, model):
    assert run(templates, model, "--notebooks", "02", "-p", "fail_on", "nothing") == 0
    good = templates.parent / "results" / slug(model) / "02_fails.ipynb"
    before = good.read_bytes()
    assert run(templates, model, "--notebooks", "02") == 1  # "" is in every name
    assert good.read_bytes() == before
    assert good.with_name("02_fails.failed.ipynb").is_file()
    assert run(templates, model, "--notebooks", "02", "-p", "fail_on", "nothing") == 0
    assert not good.with_name("02_fails.failed.ipynb").exists()


def test_nothing_starts_with_an_unknown_parameter(templates, model, counted, capfd):
    assert run(templates, model, "-p", "valeu", "2") == 1
    out, err = capfd.readouterr()
    assert err.startswith("sdnb: No notebook has a parameter 'valeu'") and "did you mean value?" in err
    assert out == "" and counted == []


def test_a_refused_model_starts_no_kernel(templates, tmp_path, counted, capfd):
    model = tiny_model(tmp_path / "org" / "tiny", layers=1)
    (model / "config.json").write_text("{}")
    capfd.readouterr()
    assert run(templates, model) == 1
    assert counted == []
    assert "\n".join(lines(capfd)).count("no config.json") >= 2


def test_pickled_weights_are_allowed_by_an_option(templates, tmp_path, counted, capfd, monkeypatch):
    monkeypatch.setenv("SDNB_ALLOW_PICKLE", "0")  # to be as it was after the test
    folder = tiny_model(tmp_path / "org" / "tiny", layers=1)
    state = load_file(folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    capfd.readouterr()
    only = (folder, "--notebooks", "01")
    assert run(templates, *only) == 1
    assert "--allow-pickle on the command line, allow_pickle=True in Python" in "\n".join(lines(capfd))
    assert run(templates, *only, "--allow-pickle") == 0 and counted == ["01_works"]
    assert torch.equal(load(str(folder), device="cpu").model.state_dict()["lm_head.weight"],
                       state["lm_head.weight"])  # fmt: skip


@pytest.mark.parametrize("command", ["detect", "spectra", "signature"])
def test_commands_take_what_messages_name(command, tmp_path, monkeypatch):
    asked = []

    def load(name, **options):
        asked.append(options)
        raise ModelError("that is all")

    monkeypatch.setattr("sdnb.loading.load", load)
    monkeypatch.setattr("sdnb.observations.kinship.load", load)
    folder = tiny_model(tmp_path / "tiny", layers=1)
    assert main([command, str(folder), "--allow-pickle", "--trust-remote-code"]) == 1
    assert asked[0]["allow_pickle"] and asked[0]["trust_remote_code"]


def test_whatever_a_cell_raises_the_others_and_the_table_come(templates, model, counted, capfd, monkeypatch):
    whole = runner.cell_key

    def key(cell):
        if cell.template == "01_works":
            raise RuntimeError("of no kind that anyone thought of")
        return whole(cell)

    monkeypatch.setattr(runner, "cell_key", key)
    assert run(templates, model) == 1
    text = "\n".join(lines(capfd))
    assert "RuntimeError: of no kind" in text and "1 done, 1 failed" in text


def test_a_name_that_is_no_model_leaves_no_folder(templates, counted, capfd):
    assert run(templates, "a" * 400, "~nosuch/model") == 1
    assert "4 failed" in "\n".join(lines(capfd))
    assert list((templates.parent / "results").iterdir()) == counted == []


def test_a_kernel_that_dies_is_told(templates, model, capfd):
    make(templates / "01_works.ipynb", ["import os, sys; os.write(2, b'last words'); os._exit(3)"])
    assert run(templates, model, "--notebooks", "01") == 1
    text = "\n".join(lines(capfd))
    assert "kernel did not start or died" in text and "last words" in text


def test_a_cell_that_hangs_is_given_up(templates, model, capfd):
    make(templates / "01_works.ipynb", ["import time; time.sleep(600)"])
    assert run(templates, model, "--notebooks", "01", "--timeout", "1") == 1
    assert "more than 1 s" in "\n".join(lines(capfd))


def test_cells_run_side_by_side(templates, model):
    done = run_apart(templates, model, "--jobs", "2", "-p", "fail_on", "nothing")
    assert (done.returncode, done.stderr) == (0, "")
    assert sorted(log(templates)) == ["1", "2"]
    assert "2 done" in done.stdout


@pytest.mark.parametrize("forks", [True, False])
def test_a_worker_that_is_killed_is_told_and_the_run_is_resumed(templates, model, forks, monkeypatch):
    if not forks:
        monkeypatch.setenv("PLAIN_KERNELS", "1")
    # a forked kernel's parent is the fork server
    parent = "import multiprocessing, os, signal; parent = multiprocessing.parent_process()"
    fatal = "os.kill(parent.pid if parent else os.getppid(), signal.SIGKILL) if value == 1 else None"
    make(templates / "01_works.ipynb", [parent, fatal])
    make(templates / "02_fails.ipynb", ["import time; time.sleep(0 if value == 2 else 600)"])
    done = run_apart(templates, model, "--jobs", "2")
    assert (done.returncode, done.stderr) == (1, "")
    assert done.stdout.count("a worker process was killed") >= 2 and "2 failed" in done.stdout
    assert run_apart(templates, model, "-p", "value", "2").returncode == 0


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ([], 2),
        (["run"], 2),
        (["run", "--notebooks", "01", "zoo/llama"], 2),
        (["none"], 2),
        (["--help"], 0),
        (["run", "--help"], 0),
        (["run", "x", "--jobs", "0"], 1),
        (["run", "x", "--timeout", "0"], 1),
    ],
)
def test_exit_codes(words, code, capfd):
    assert main(words) == code
    err = capfd.readouterr().err
    assert (err == "") == (code == 0) and "Traceback" not in err


def test_a_model_behind_the_notebooks_is_told_to_come_first(capfd):
    main(["run", "--notebooks", "01", "zoo/llama"])
    assert "put MODEL first" in capfd.readouterr().err


def test_a_reader_that_goes_away_is_no_failure():
    source = (
        "import sys, types; from sdnb.cli import main; "
        "part = types.SimpleNamespace(add_arguments=id, main=lambda args: print('line') or 0); "
        "main.import_module = lambda name: part; sys.exit(main.main(['spectra']))"
    )
    reader, writer = os.pipe()
    os.close(reader)
    program = [sys.executable, "-c", source]
    done = subprocess.run(program, stdout=writer, stderr=subprocess.PIPE, check=False)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_help_says_what_it_is_for(capfd):
    main(["--help"])
    assert "transformer language model" in " ".join(capfd.readouterr().out.split())


@pytest.mark.skipif(not Path("/proc/self/stat").is_file(), reason="looks at processes in /proc")
@pytest.mark.parametrize(("jobs", "forks"), [(1, True), (2, True), (1, False), (2, False)])
def test_a_run_killed_in_a_notebook_leaves_no_process_and_is_resumed(
    templates, model, temporary, jobs, forks, monkeypatch
):
    if not forks:
        monkeypatch.setenv("PLAIN_KERNELS", "1")
    sources = [
        "import os, tempfile, time; tempfile.mkstemp()",
        "open(f'{results_dir}/{os.getpid()} {os.getppid()}', 'w'); time.sleep(value)",
    ]
    for name in CELLS:
        make(templates / f"{name}.ipynb", sources)
    results = templates.parent / "results"
    program = [*LIGHT, *words(templates, model, "--jobs", jobs, "-p", "value", "600")]
    process = subprocess.Popen(program, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: len(list(results.glob("* *"))) == jobs or process.poll() is not None)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    kernels_and_workers = {int(pid) for path in results.glob("* *") for pid in path.name.split()}
    wait_until(lambda: not any(is_alive(pid) for pid in kernels_and_workers - {process.pid}))
    assert not list((results / slug(model)).glob("*.ipynb"))
    assert len(list(temporary.glob("*/*/kernel.log"))) == jobs
    assert subprocess.run([*program[:-1], "0"], check=False).returncode == 0
    assert sorted(path.stem for path in (results / slug(model)).glob("*.ipynb")) == list(CELLS)
    [shelf] = temporary.iterdir()
    assert [path.name for path in shelf.iterdir()] == [".lock"]


def test_a_script_needs_no_guard(templates, model):
    """Neither the fork server nor a kernel runs it again."""
    script, command = templates.parent / "script.py", words(templates, model)
    script.write_text(f"from tests.cli.light import main\nprint(__name__)\nmain({command!r})\n")
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}
    program = [sys.executable, str(script)]
    done = subprocess.run(program, capture_output=True, text=True, check=False, timeout=100, env=environment)
    assert done.stdout.count("main__") == 1 and log(templates) == "12", done.stderr


def test_of_two_runs_in_one_folder_one_works_and_the_other_finds_it_done(templates, model, counted):
    """The second run starts while the first one works."""
    from sdnb.cli import execute

    slow, outcomes = execute.execute, []

    def while_working(cell, timeout_s):
        second.start()
        second.join(0.3)
        assert outcomes == []  # it waits
        return slow(cell, timeout_s)

    chosen = plan.models([str(model)])
    (cell,) = plan.matrix(chosen, plan.templates(templates), {}, templates, templates, ["01"])
    second = threading.Thread(target=lambda: outcomes.append(runner.run_cell(cell, runner.Options())))
    execute.execute = while_working
    try:
        assert runner.run_cell(cell, runner.Options()).status == runner.DONE
    finally:
        execute.execute = slow
    second.join()
    assert [outcome.status for outcome in outcomes] == [runner.KEPT]
    assert counted == ["01_works"]


def test_the_key_does_not_depend_on_order(model, tmp_path):
    from sdnb.cli.plan import Cell

    make(tmp_path / "01_works.ipynb", [])
    source = tmp_path / "01_works.ipynb"
    keys = {
        runner.cell_key(Cell(str(model), source, p, tmp_path, tmp_path))
        for p in ({"a": 1, "b": 2}, {"b": 2, "a": 1})
    }
    assert len(keys) == 1
