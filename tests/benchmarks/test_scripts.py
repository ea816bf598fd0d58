"""Every benchmark runs at a small shape and its answers agree; the book's page is what the records say."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def run(name: str, results: Path, *options: str) -> dict:
    """The record that a script writes at the small shape."""
    command = [sys.executable, FOLDER / f"{name}.py", "--shape", "small", "--results", results, *options]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    record = json.loads((results / f"{name}-small-cpu.json").read_text(encoding="utf8"))
    for row in record["rows"]:
        assert row["what"] in done.stdout
        assert row["wall_s"] > 0
        assert row["operations"] > 0
    return record


def numbers(text: str) -> list[float]:
    """The numbers that stand alone in a sentence."""
    return [float(word.strip(",")) for word in text.split() if word[0].isdigit()]


def test_linearize(tmp_path):
    ours, *sampled = run("linearize", tmp_path)["rows"]
    assert numbers(ours["difference"])[0] < 1e-6
    assert len(sampled) == 2
    # times of a smaller run are multiplied, and the table says so
    assert all(row["scaled"] > 1 and f"times {row['scaled']:.1f}" in row["note"] for row in sampled)


def test_decompose(tmp_path):
    value, angle = numbers(run("decompose", tmp_path)["rows"][0]["difference"])
    assert value < 1e-5
    assert angle < 0.01


def test_eigenpair(tmp_path):
    for row in run("eigenpair", tmp_path)["rows"][:2]:
        value, angle = numbers(row["difference"])
        assert value < 1e-4
        assert angle < 1


def test_vocabulary(tmp_path):
    record = run("vocabulary", tmp_path)
    assert record["facts"]["within"]
    assert [row["what"].partition(",")[0] for row in record["rows"]] == [f"layer {n} of 3" for n in (1, 2, 3)]


def test_spectra(tmp_path):
    ours, *dense = run("spectra", tmp_path)["rows"]
    assert numbers(ours["difference"])[0] < 1e-8
    assert all(numbers(row["difference"])[0] < 1e-5 for row in dense)


def test_model(tmp_path):
    ours, papers = run("model", tmp_path, "--samples", "12000")["rows"]
    assert ours["scaled"] == papers["scaled"] == 3
    assert numbers(papers["difference"])[0] < 16  # sampling noise, half of it with four times the inputs


@pytest.mark.slow
def test_offload(tmp_path):
    record = run("offload", tmp_path)
    assert record["facts"]["within"]
    assert max(numbers(record["rows"][0]["difference"])) < 1e-5


def test_the_page_is_what_the_records_say(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import page

    assert page.PAGE.read_text(encoding="utf8") == page.page(page.RESULTS)
