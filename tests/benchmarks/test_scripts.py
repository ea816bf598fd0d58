"""Every benchmark runs at a small shape and its answers agree; the book's page is what the records say."""

import json
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"
DIFFERENCES = {
    "linearize": {0: (1e-6,)},
    "decompose": {0: (1e-5, 0.01)},
    "eigenpair": {0: (1e-4, 1), 1: (1e-4, 1)},
    "vocabulary": {},
    "spectra": {0: (1e-8,), 1: (1e-5,)},
    "model --samples 12000": {1: (16,)},  # sampling noise, half of it with four times the inputs
}
"""Of a script's rows, the numbers that stand alone in what is said of the difference, and their limits."""


def checked(path: Path, said: str) -> dict:
    """A record, once what was printed agrees with it."""
    record = json.loads(path.read_text(encoding="utf8"))
    for row in record["rows"]:
        assert row["what"] in said and row["wall_s"] > 0 and row["operations"] > 0
        scaled = row.get("scaled", 1) != 1
        assert not scaled or "times" in row["note"] or "multiplied" in row["note"], "of a smaller run"
    assert record["facts"].get("within", True)
    return record


def numbers(text: str) -> list[float]:
    return [float(word.strip(",")) for word in text.split() if word[0].isdigit()]


@pytest.mark.parametrize("order", DIFFERENCES)
def test_answers_agree(order, tmp_path, monkeypatch, capsys):
    name, *options = order.split()
    monkeypatch.syspath_prepend(FOLDER)
    words = [f"{name}.py", "--shape", "small", "--results", str(tmp_path), *options]
    monkeypatch.setattr(sys, "argv", words)
    import_module(name).main()
    rows = checked(tmp_path / f"{name}-small-cpu.json", capsys.readouterr().out)["rows"]
    assert len(rows) > 1
    for place, limits in DIFFERENCES[order].items():
        found = numbers(rows[place]["difference"])
        assert all(value < limit for value, limit in zip(found, limits, strict=False)), rows[place]


@pytest.mark.slow
def test_offload(tmp_path):
    command = [sys.executable, FOLDER / "offload.py", "--shape", "small", "--results", tmp_path]
    done = subprocess.run(command, check=False, capture_output=True, text=True)  # its memory is its own
    assert done.returncode == 0, done.stderr
    rows = checked(tmp_path / "offload-small-cpu.json", done.stdout)["rows"]
    assert max(numbers(rows[0]["difference"])) < 1e-5


def test_the_page_is_what_the_records_say(monkeypatch):
    monkeypatch.syspath_prepend(FOLDER)
    import page

    assert page.PAGE.read_text(encoding="utf8") == page.page(page.RESULTS)
