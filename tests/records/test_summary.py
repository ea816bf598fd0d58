"""Key figures of all models, published values beside a record's, and the table of public keys."""

import csv
import io
import json
import re
from pathlib import Path

import pandas as pd
import pytest
import yaml

from sdnb import records
from sdnb.cli import main
from sdnb.errors import RecordError
from sdnb.records import Record
from tests.templates import SMALL

ROOT = Path(__file__).resolve().parents[2]
ROW = re.compile(r"^\| (\d\d) \| `([^`]+)` \| [^|]+ \| ([^|]*) \| ([^|]*) \|$", re.M)
KEYS = ROW.findall((ROOT / "book" / "records.md").read_text(encoding="utf-8"))
PUBLISHED = yaml.safe_load(records.PUBLISHED.read_text(encoding="utf-8"))


def put(folder: Path, template: str, values: dict, **origin) -> None:
    """A record as JSON, without arrays."""
    facts = {"model": folder.name.replace("__", "/"), "fingerprint": "f", "hidden_size": 8, "layers": 3}
    folder.mkdir(parents=True, exist_ok=True)
    content = {"template": template, **values, "arrays": None, "provenance": facts | origin}
    (folder / f"{template}.json").write_text(json.dumps(content))


@pytest.fixture
def results(tmp_path):
    """Two models with a few records each, and a collection that has no row of its own."""
    one, two = tmp_path / "org__one", tmp_path / "org__two"
    layers = {"explosion_layers": [2, 1], "decay_layers": [3]}
    put(one, "01_high_norm_tokens", {"peak_ratio": 40.0} | layers)
    put(one, "03_linear_layers", {"layer_error": [0.1, None, 0.3]})
    put(one, "05_negative_eigenvalues", {"angle_deg": [60, 9, 4], "eigenvalue": [0, 0.6, -7.5]} | layers)
    cells = (("nvfp4", "none", 1.0), ("int8 tensor", "none", 20.0), ("int8 tensor", "detected", 12.0))
    rows = [dict(zip(("scheme", "skip", "perplexity"), cell, strict=True)) for cell in cells]
    put(one, "12_quantization", {"rows": [{"method": "none", "perplexity": 10.0}, *rows]})
    matrix = {"outliers_above": 2, "outliers_below": 1, "count": 10}
    square = {"outliers_above": 3, "outliers_below": None, "count": 10}
    put(one, "14_weight_spectra", {"matrices": {"01.u": matrix, "01.q": square}})
    put(two, "01_high_norm_tokens", {"peak_ratio": 1.5, "explosion_layers": [], "decay_layers": []})
    put(two, "04_singular_directions", {"angle_deg": [80.0, 30, 70], "explosion_layers": []})
    put(tmp_path / "org__many", "13_signatures", {"names": []}, fingerprint=None)
    return tmp_path


def test_figures_are_picked_at_the_layers_of_the_largest_step(results):
    table = records.summary(results).set_index("model")
    assert list(table.index) == ["org/one", "org/two"]
    one, two = table.loc["org/one"], table.loc["org/two"]
    assert (one.eigen_angle_deg, one.eigenvalue, one.decay_eigenvalue) == (9, 0.6, -7.5)
    assert one.layer_error == pytest.approx(0.2)
    assert (one.intact_perplexity, one.int8_perplexity, one.listed_perplexity) == (10, 20, 12)
    assert (one.outliers_above, one.outliers_below, one.singular_values) == (5, 1, 20)
    assert two.peak_ratio == 1.5 and two.explosion_layers == [] and pd.isna(two.angle_deg)
    assert pd.isna(two.exploding_share) and two.records == ["01_high_norm_tokens", "04_singular_directions"]


def test_the_command_writes_csv(results, tmp_path, capsys):
    target = tmp_path / "new" / "summary.csv"
    assert main(["summary", "--results-dir", str(results)]) == 0
    printed = capsys.readouterr().out
    assert main(["summary", "--results-dir", str(results), "--out", str(target)]) == 0
    assert target.read_text(encoding="utf-8") == printed and capsys.readouterr().out == ""
    rows = {row["model"]: row for row in csv.DictReader(io.StringIO(printed))}
    assert rows["org/one"]["explosion_layers"] == "2 1" and rows["org/two"]["explosion_layers"] == "none"
    assert rows["org/two"]["angle_deg"] == "" and float(rows["org/one"]["decay_eigenvalue"]) == -7.5


def test_what_is_missing_or_damaged_is_told_and_nothing_is_written(results, tmp_path, capsys):
    assert list(records.summary(results, ["org/two", "org__one"]).model) == ["org/two", "org/one"]
    with pytest.raises(RecordError, match=r"org__none.* there are: org__many, org__one, org__two"):
        records.summary(results, ["org/none"])
    target = tmp_path / "summary.csv"
    target.write_text("old")
    (results / "org__two" / "01_high_norm_tokens.json").write_text('{"template": ')
    assert main(["summary", "--results-dir", str(results), "--out", str(target)]) == 1
    assert "org__two/01_high_norm_tokens.json is damaged" in capsys.readouterr().err
    assert target.read_text() == "old"
    assert main(["summary", "--results-dir", str(tmp_path / "none")]) == 1
    assert "first `sdnb run MODEL --results-dir" in capsys.readouterr().err


def test_published_values_stand_beside_the_records(results):
    values = {"angle_deg": [80.0, 6.13, 70.0], "explosion_layers": [2], "decay_layers": []}
    table = records.beside_published(Record("04_singular_directions", values, {}, {"model": "org/one"}))
    first = table.iloc[0]
    assert first["org/one"] == "6.13°" and "LLaMA2-7B 6.05° (" in first["published"]
    assert table.iloc[1]["org/one"] == "none"
    assert list(records.beside_published(Record("99_new", {})).columns) == ["this notebook", "published"]


def test_published_values_name_a_source_a_unit_and_a_key():
    for template in PUBLISHED.keys() - {"sources"}:
        assert template in SMALL
        for item in PUBLISHED[template]:
            assert item.keys() <= {"quantity", "key", "unit", "published"} and item["quantity"]
            assert item.get("unit") == ("degrees" if "_deg" in item["key"] else None), item
            for one in item.get("published", []):
                assert one.keys() == {"model", "value", "source"} and one["source"] in PUBLISHED["sources"]


@pytest.mark.slow
def test_executed_notebooks_keep_to_the_table_of_keys(executed):
    """Every key is there, shapes fit, and every pointer of a published value leads to a value."""
    numbered = [name for name in SMALL if name[0].isdigit()]
    assert len(KEYS) > 100 and {number for number, *_ in KEYS} == {name[:2] for name in numbered}
    for template in numbered:
        record = executed.record(template)
        sizes = {"L": record.provenance.get("layers"), "d": record.provenance.get("hidden_size")}
        for number, key, shape, where in KEYS:
            if number == template[:2] and "<" not in key:
                holder = record.arrays if where.strip() else record.values
                assert key in holder, f"{template} {key}"
                value = holder[key].tolist() if where.strip() else holder[key]
                letters = [part for part in shape.strip("() ").split(", ") if part]
                check(value, letters, sizes, f"{template} {key}")
        for item in PUBLISHED.get(template, []):
            try:
                records.entry(record.values, item["key"])
            except KeyError as problem:  # the planted direction has no massive dimension
                excused = "is empty" in str(problem) or "massive" in item["key"]
                assert excused, f"{template} {item['key']}"


@pytest.mark.slow
def test_every_key_figure_is_found_on_the_planted_model(executed):
    [row] = records.summary(executed.results, [executed.model.name]).to_dict("records")
    figures = yaml.safe_load(records.KEY_FIGURES.read_text(encoding="utf-8"))
    assert figures.keys() <= {*SMALL}
    named = {column for columns in figures.values() for column in columns}
    assert [name for name in named if not isinstance(row[name], list) and pd.isna(row[name])] == []


def check(value: object, shape: list[str], sizes: dict, where: str) -> None:
    """Hold a value against its shape: letters have one value throughout a record, * has any."""
    if not shape or shape[0] in ("list of objects", "objects by name", "texts by name"):
        kind = {"list of objects": list, "objects by name": dict, "texts by name": dict}.get(*shape or [""])
        assert kind is None or isinstance(value, kind), where
        return
    assert isinstance(value, list), where
    letter, _, more = shape[0].partition("+")
    if letter != "*":
        length = len(value) - int(more or 0)
        assert length == (int(letter) if letter.isdigit() else sizes.get(letter) or length), where
        sizes[letter] = length
    for part in value:
        check(part, shape[1:], sizes, where)
