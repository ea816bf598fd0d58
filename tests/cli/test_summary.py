"""`sdnb summary`: the comparison as CSV, whole or not at all."""

import csv
import io

import pytest

from sdnb.cli.main import main
from tests import shelf


@pytest.fixture
def results(tmp_path):
    return shelf.full_shelf(tmp_path / "results")


def lines(text: str) -> dict[str, dict]:
    return {row["model"]: row for row in csv.DictReader(io.StringIO(text))}


def test_prints_one_line_a_model_with_empty_cells_where_nothing_was_run(results, capsys):
    assert main(["summary", "--results-dir", str(results)]) == 0
    said = capsys.readouterr()
    rows = lines(said.out)
    assert list(rows) == ["org/one", "org/plain", "org/two"]
    assert float(rows["org/two"]["peak_ratio"]) == 9.5 and rows["org/two"]["explosion_layers"] == "2"
    assert float(rows["org/one"]["decay_eigenvalue"]) == -7.5
    assert rows["org/two"]["decay_eigenvalue"] == rows["org/two"]["exploding_share"] == ""
    assert rows["org/plain"]["explosion_layers"] == "none" and rows["org/plain"]["angle_deg"] == ""
    assert rows["org/plain"]["records"] == "01_high_norm_tokens 02_empirical_direction"
    assert rows["org/plain"]["note"] == "01, 02: another text"
    assert "org/plain does not compare in 01, 02: another text" in said.err


def test_writes_the_same_to_a_file(results, tmp_path, capsys):
    assert main(["summary", "--results-dir", str(results)]) == 0
    printed = capsys.readouterr().out
    target = tmp_path / "new" / "summary.csv"
    assert main(["summary", "--results-dir", str(results), "--out", str(target)]) == 0
    assert target.read_text(encoding="utf8") == printed and capsys.readouterr().out == ""


def test_a_damaged_record_leaves_the_old_file_as_it_was(results, tmp_path, capsys):
    target = tmp_path / "summary.csv"
    target.write_text("old")
    (results / "org__two" / "01_high_norm_tokens.json").write_text('{"template": ')
    assert main(["summary", "--results-dir", str(results), "--out", str(target)]) == 1
    said = capsys.readouterr()
    assert "org__two/01_high_norm_tokens.json is damaged" in said.err and said.out == ""
    assert target.read_text() == "old" and sorted(p.name for p in tmp_path.iterdir()) == [
        "results",
        "summary.csv",
    ]


def test_without_records_it_says_what_to_do(tmp_path, capsys):
    assert main(["summary", "--results-dir", str(tmp_path / "none")]) == 1
    assert "first `sdnb run MODEL --results-dir" in capsys.readouterr().err
