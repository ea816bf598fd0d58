"""Records are written whole or not at all, come back as they were, and damage is found out."""

import json
import math
import os
import resource
import signal
from pathlib import Path
from types import SimpleNamespace

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

from sdnb import records
from sdnb.errors import RecordError
from sdnb.records import read_record, save_record
from tests.cli.processes import exit_code, in_a_child

TEMPLATE, SLUG = "04_sample", "org__name"
TEXT = SimpleNamespace(hash="a" * 64, tokens=7, begin_token=False, add_special_tokens=False, unusual="a note")


def loaded(name: str = "org/name", layers: int = 3, **more) -> SimpleNamespace:
    """What a record needs to know of a model."""
    config = SimpleNamespace(model_type="llama")
    config.get_text_config = lambda: config
    facts = {
        "name": name, "slug": SLUG, "revision": None, "fingerprint": "f" * 64, "file_hash": None,
        "format": "safetensors float32", "layer_count": layers, "hidden_size": 4, "dtype": "float32",
        "device": "cpu", "started": 0.0, "model": SimpleNamespace(config=config),
    }  # fmt: skip
    return SimpleNamespace(**facts | more)


def put(folder, number: float, model=None, size: int = 5, **more):
    """A record of which every part holds the number."""
    arrays = {"one": torch.full((4,), number), "many": torch.full((size,), number)}
    values = {"a": number, "b": [number, number]}
    return save_record(TEMPLATE, model or loaded(), values, arrays=arrays, results_dir=folder, **more)


def number_in(folder) -> float:
    """The number that a whole record holds in all its parts."""
    record = read_record(TEMPLATE, "org/name", folder)
    numbers = {record["a"], *record["b"]} | {float(x) for array in record.arrays.values() for x in array}
    assert len(numbers) == 1
    return numbers.pop()


def there(folder) -> list[str]:
    return sorted(path.name for path in (folder / SLUG).iterdir() if path.name != ".lock")


PAIR = [f"{TEMPLATE}.json", f"{TEMPLATE}.safetensors"]


def test_a_record_comes_back_as_it_was_written(tmp_path):
    written = put(tmp_path, 1.5, text=TEXT, seed=3)
    back = read_record(TEMPLATE, "org/name", tmp_path)
    assert back.values == written.values == {"a": 1.5, "b": [1.5, 1.5]}
    assert back.provenance == written.provenance and back.path == written.path
    assert torch.equal(back.arrays["one"], torch.full((4,), 1.5))
    assert there(tmp_path) == PAIR
    assert back.path.stat().st_mode & 0o444 == 0o444, "others may read it"
    assert read_record(TEMPLATE, loaded(), tmp_path).values == read_record(TEMPLATE, SLUG, tmp_path).values


def test_values_become_plain_json(tmp_path):
    values = {
        "nan": math.nan, "infinite": [1.0, math.inf], "numpy": np.arange(2), "scalar": torch.tensor(2.5),
        "text": "é", "none": None, "flag": np.bool_(True), "unsupported": {3: "why"},
        "rows": pd.DataFrame({"x": [1.0, math.nan], "name": ["p", "q"]}),
        "named": pd.DataFrame({"x": [1]}, index=pd.Index(["p"], name="model")),
    }  # fmt: skip
    record = save_record(TEMPLATE, loaded(), values, results_dir=tmp_path)
    assert record.values == {
        "nan": None, "infinite": [1.0, None], "numpy": [0, 1], "scalar": 2.5, "text": "é", "none": None,
        "flag": True, "unsupported": {"3": "why"},
        "rows": [{"x": 1.0, "name": "p"}, {"x": None, "name": "q"}], "named": [{"model": "p", "x": 1}],
    }  # fmt: skip
    text = (tmp_path / SLUG / f"{TEMPLATE}.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the JSON"))
    assert "é" in text


def test_a_table_by_layer_becomes_lists_of_all_layers(tmp_path):
    columns = {"angle_deg": [torch.tensor(2.0), math.nan], "count": [4, 5], "status": ["exact", "sampled"]}
    table = pd.DataFrame(columns, index=[3, 1])
    record = save_record(TEMPLATE, loaded(), [table, {"explosion_layers": [3]}], results_dir=tmp_path)
    assert record.values == {
        "angle_deg": [None, None, 2.0], "count": [5, None, 4], "status": ["sampled", None, "exact"],
        "explosion_layers": [3],
    }  # fmt: skip
    assert '"count": [\n  5,' in record.path.read_text(), "whole numbers stay whole"


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (pd.DataFrame({"x": [1.0]}, index=[4]), "1 to 3"),
        (pd.DataFrame({"x": [1.0, 2.0]}, index=[1, 1]), "each once"),
        ([{"x": 1}, {"x": 2}], "given twice"),
        ({"provenance": 1}, "own"),
        ({"x": object()}, "x holds a object"),
        ({"x": [{"y": {1, 2}}]}, "x.y holds a set"),
    ],
)
def test_what_cannot_stand_in_a_record_is_refused(tmp_path, values, said):
    with pytest.raises(RecordError, match=said):
        save_record(TEMPLATE, loaded(), values, results_dir=tmp_path)
    assert not (tmp_path / SLUG).exists()


def test_floats_are_stored_as_float32_and_a_view_alone(tmp_path):
    whole = torch.arange(8.0).reshape(4, 2).double()
    arrays = {
        "view": whole[:, 1],
        "numpy": np.eye(2),
        "ids": torch.arange(3),
        "gap": torch.tensor([math.nan]),
    }
    save_record(TEMPLATE, loaded(), {}, arrays=arrays, results_dir=tmp_path)
    back = read_record(TEMPLATE, "org/name", tmp_path).arrays
    assert back["view"].tolist() == [1.0, 3.0, 5.0, 7.0] and back["view"].dtype == torch.float32
    assert back["numpy"].dtype == torch.float32 and back["ids"].dtype == torch.int64 and back["gap"].isnan()


def test_provenance_says_what_was_read_and_what_it_cost(tmp_path):
    origin = put(tmp_path, 1.0, text=TEXT, seed=3).provenance
    wanted = {
        "model": "org/name", "fingerprint": "f" * 64, "format": "safetensors float32", "layers": 3, "seed": 3,
        "text_hash": "a" * 64, "tokens_read": 7, "begin_token_at_position_0": False,
        "add_special_tokens": False, "special_tokens_note": "a note",
    }  # fmt: skip
    assert origin.items() >= wanted.items()
    assert origin["wall_s"] > 0 and origin["peak_memory_mib"] > 10 and origin["versions"]["torch"]
    shown = records.provenance(put(tmp_path, 1.0))
    assert shown.loc["model"].item() == "org/name" and "f" * 64 in shown.to_html()


def test_several_models_and_none_at_all(tmp_path):
    several = save_record(TEMPLATE, "org/name", {"a": 1}, models={"org/a": "f1"}, results_dir=tmp_path)
    assert several.provenance["model"] == "org/name" and several.provenance["models"] == {"org/a": "f1"}
    assert several.path == tmp_path / SLUG / f"{TEMPLATE}.json"
    none = save_record(TEMPLATE, None, {"a": 1}, results_dir=tmp_path)
    assert none.path.parent.name == "random_matrix" and "model" not in none.provenance
    assert read_record(TEMPLATE, None, tmp_path)["a"] == 1


def test_figures_stand_beside_the_record_and_arrays_that_go_are_removed(tmp_path):
    put(tmp_path, 1.0)
    figures = {name: plt.figure(figsize=(1, 1)) for name in ("", "gap")}
    save_record(TEMPLATE, loaded(), {"a": 1}, figures=figures, results_dir=tmp_path)
    assert there(tmp_path) == ["04_gap.png", f"{TEMPLATE}.json", f"{TEMPLATE}.png"]
    assert (tmp_path / SLUG / "04_gap.png").read_bytes().startswith(b"\x89PNG")
    assert read_record(TEMPLATE, "org/name", tmp_path).arrays == {}


DAMAGE = {
    "cut arrays": (PAIR[1], lambda data: data[:-1]),
    "a bit of the arrays": (PAIR[1], lambda data: data[:-1] + bytes([data[-1] ^ 1])),
    "half of the text": (PAIR[0], lambda data: data[: len(data) // 2]),
    "a list": (PAIR[0], lambda data: b"[]"),
    "no provenance": (PAIR[0], lambda data: data.replace(b'"provenance"', b'"prov"')),
    "another template's": (PAIR[0], lambda data: data.replace(TEMPLATE.encode(), b"05_other", 1)),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_out(tmp_path, damage):
    with pytest.raises(RecordError, match=f"run the notebook {TEMPLATE}"):
        read_record(TEMPLATE, "org/name", tmp_path)
    put(tmp_path, 1.0)
    name, change = DAMAGE[damage]
    path = tmp_path / SLUG / name
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(RecordError, match="run the notebook again"):
        read_record(TEMPLATE, "org/name", tmp_path)


@pytest.mark.parametrize("place", ["write", "fsync", "1", "2", "3"])
def test_a_process_killed_at_a_named_place_loses_nothing(tmp_path, monkeypatch, place):
    """While it writes, before its data is on the disk, or before one of its renames: arrays, JSON, arrays."""
    put(tmp_path, 1.0)
    replace, renames = Path.replace, []

    def die():
        os.kill(os.getpid(), signal.SIGKILL)

    def fsync(number):
        if place == "write":
            os.ftruncate(number, 10)
        die()

    def replaces(self, target):
        renames.append(target)
        if len(renames) == int(place):
            die()
        return replace(self, target)

    if place.isdigit():
        monkeypatch.setattr(Path, "replace", replaces)
    else:
        monkeypatch.setattr(os, "fsync", fsync)
    assert exit_code(in_a_child(lambda: put(tmp_path, 2.0))) == -signal.SIGKILL
    monkeypatch.undo()
    assert number_in(tmp_path) == (2.0 if place == "3" else 1.0)
    put(tmp_path, 3.0)
    assert number_in(tmp_path) == 3.0 and there(tmp_path) == PAIR


@pytest.mark.parametrize("where", ["arrays", "json"])
def test_a_full_disk_leaves_the_old_record(tmp_path, monkeypatch, where):
    put(tmp_path, 1.0)
    old = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8192, old[0][1]))
    note = {"text": SimpleNamespace(**vars(TEXT) | {"unusual": "x" * 9000})} if where == "json" else {}
    try:
        with pytest.raises(RecordError, match="disk is full"):
            put(tmp_path, 2.0, size=5000 if where == "arrays" else 5, **note)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, old[0])
        signal.signal(signal.SIGXFSZ, old[1])
    assert number_in(tmp_path) == 1.0 and not list(tmp_path.rglob("*.tmp"))
    put(tmp_path, 3.0)
    assert number_in(tmp_path) == 3.0 and there(tmp_path) == PAIR


def test_a_folder_that_cannot_be_written_is_told(tmp_path):
    (tmp_path / SLUG).write_text("a file where the folder should be")
    with pytest.raises(RecordError, match="another results_dir"):
        put(tmp_path, 1.0)


def test_two_writers_and_a_reader_at_once(tmp_path):
    put(tmp_path, 0.0)

    def write_often(number: float) -> None:
        for _ in range(25):
            put(tmp_path, number)
        (tmp_path / f"finished {number}").touch()

    children = [in_a_child(lambda number=number: write_often(number)) for number in (1.0, 2.0)]
    seen, running = set(), set(children)
    while running:
        seen.add(number_in(tmp_path))
        running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
    assert len(list(tmp_path.glob("finished *"))) == 2
    assert number_in(tmp_path) in (1.0, 2.0) and seen <= {0.0, 1.0, 2.0}


def test_a_pointer_finds_numbers_by_key_index_and_layer():
    values = {"ratio": 2.5, "angle_deg": [80.0, 8.0, 70.0], "layers": [2, 3], "none": []}
    values["m"] = {"01.q": {"n": 7}}
    values["rows"] = [{"model": "a"}, {"model": "zoo/b.1", "n": 2, "by name, layer 5": {"loss": 0.5}}]
    values["rows"].append({"model": "c, d", "n": 3})
    assert records.entry(values, "rows[model=c, d,n=3].n") == 3
    assert records.entry(values, "ratio") == 2.5
    assert records.entry(values, "angle_deg[-1]") == 70.0
    assert records.entry(values, "angle_deg@layers") == 8.0
    assert records.entry(values, "m[01.q].n") == 7
    for row in ("rows[1]", "rows[model=zoo/b.1]", "rows[model=zoo/b.1,n=2]"):
        assert records.entry(values, f"{row}.by name, layer 5.loss") == 0.5
    for key in ("missing", "rows[model=c]", "angle_deg@none", "angle_deg@missing"):
        with pytest.raises(KeyError):
            records.entry(values, key)
