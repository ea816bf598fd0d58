"""Every benchmark runs at a small shape and its answers agree; the book's page is what the records say."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Runs a script at the small shape in this process; returns its record."""
    monkeypatch.syspath_prepend(FOLDER)

    def script(name: str, *options: str) -> dict:
        words = [f"{name}.py", "--shape", "small", "--results", str(tmp_path), *options]
        monkeypatch.setattr(sys, "argv", words)
        import_module(name).main()
        return checked(tmp_path / f"{name}-small-cpu.json", capsys.readouterr().out)

    return script


def checked(path: Path, said: str) -> dict:
    """A record, once what was printed agrees with it."""
    record = json.loads(path.read_text(encoding="utf8"))
    for row in record["rows"]:
        assert row["what"] in said
        assert row["wall_s"] > 0
        assert row["operations"] > 0
    return record


def numbers(text: str) -> list[float]:
    """The numbers that stand alone in a sentence."""
    return [float(word.strip(",")) for word in text.split() if word[0].isdigit()]


def test_linearize(run):
    ours, *sampled = run("linearize")["rows"]
    assert numbers(ours["difference"])[0] < 1e-6
    assert len(sampled) == 2
    # times of a smaller run are multiplied, and the table says so
    assert all(row["scaled"] > 1 and f"times {row['scaled']:.1f}" in row["note"] for row in sampled)


def test_decompose(run):
    value, angle = numbers(run("decompose")["rows"][0]["difference"])
    assert value < 1e-5
    assert angle < 0.01


def test_eigenpair(run):
    for row in run("eigenpair")["rows"][:2]:
        value, angle = numbers(row["difference"])
        assert value < 1e-4
        assert angle < 1


def test_vocabulary(run):
    record = run("vocabulary")
    assert record["facts"]["within"]
    assert [row["what"].partition(",")[0] for row in record["rows"]] == [f"layer {n} of 3" for n in (1, 2, 3)]


def test_spectra(run):
    ours, *dense = run("spectra")["rows"]
    assert numbers(ours["difference"])[0] < 1e-8
    assert all(numbers(row["difference"])[0] < 1e-5 for row in dense)


def test_model(run):
    ours, papers = run("model", "--samples", "12000")["rows"]
    assert ours["scaled"] == papers["scaled"] == 3
    assert numbers(papers["difference"])[0] < 16  # sampling noise, half of it with four times the inputs


@pytest.mark.slow
def test_offload(tmp_path):
    command = [sys.executable, FOLDER / "offload.py", "--shape", "small", "--results", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # its memory is its own
    assert done.returncode == 0, done.stderr
    record = checked(tmp_path / "offload-small-cpu.json", done.stdout)
    assert record["facts"]["within"]
    assert max(numbers(record["rows"][0]["difference"])) < 1e-5


def test_the_page_is_what_the_records_say(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import page

    assert page.PAGE.read_text(encoding="utf8") == page.page(page.RESULTS)
