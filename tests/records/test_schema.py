"""Declared keys hold values to their shape, kind and finiteness."""

import numpy as np
import pytest
import torch

from sdnb.records import SCHEMAS, Field, Schema, schema_markdown
from sdnb.records.schema import Mismatch, check_arrays, check_values

SCHEMA = Schema(
    "99_test",
    "model",
    (
        Field("ratio", "a number"),
        Field("angle_deg", "per layer", ("L",), unit="degrees", null=True),
        Field("ids", "whole numbers", ("T",), "integer"),
        Field("names", "texts", ("T",), "text"),
        Field("on", "a switch", kind="boolean", required=False),
        Field("grid", "two axes", ("L", "T"), required=False),
        Field("rows", "objects", kind="rows", columns=(Field("score", "a number"),), required=False),
        Field("by_name", "objects", kind="groups", columns=(Field("edges", "two", ("2",)),), required=False),
        Field("notes", "texts by name", kind="notes", required=False),
    ),
    (Field("norms", "all", ("L+1", "T")), Field("values/<matrix>", "any", ("*",), required=False)),
)
GOOD = {"ratio": 1.5, "angle_deg": [1.0, None, 3], "ids": [4, 5], "names": ["a", "b"]}


def check(change=None, drop=(), sizes=None):
    values = {key: value for key, value in (GOOD | (change or {})).items() if key not in drop}
    return check_values(SCHEMA, values, {"L": 3} if sizes is None else sizes)


def test_good_values_pass_as_plain_json():
    more = {
        "ratio": torch.tensor(1.5),
        "angle_deg": [np.float64(1.0), None, torch.tensor(3.0)],
        "ids": torch.tensor([4, 5]),
        "on": True,
        "grid": np.zeros((3, 2)),
        "rows": [{"score": 1}],
        "by_name": {"q": {"edges": (0.5, 1.5)}},
        "notes": {"3": "why"},
    }
    result = check(more)
    assert result == GOOD | {
        "on": True, "grid": [[0.0, 0.0]] * 3, "rows": [{"score": 1}], "by_name": {"q": {"edges": [0.5, 1.5]}},
        "notes": {"3": "why"},
    }  # fmt: skip
    assert all(type(entry) in (float, int, type(None)) for entry in result["angle_deg"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"angle_deg": [1.0, 2.0]}, "2 entries along L, expected 3"),
        ({"names": ["a"]}, "1 entries along T, expected 2"),
        ({"ratio": float("nan")}, "finite"),
        ({"angle_deg": [1.0, float("inf"), 2.0]}, "finite"),
        ({"ratio": None}, "null"),
        ({"ratio": "1.5"}, "no number"),
        ({"ratio": True}, "no number"),
        ({"ids": [4.0, 5.0]}, "no integer"),
        ({"names": [1, 2]}, "no text"),
        ({"angle_deg": 1.0}, "list over L"),
        ({"grid": [[0.0], [0.0], [0.0]]}, "1 entries along T"),
        ({"misspelt": 1}, "misspelt is not declared"),
        ({"rows": [{}]}, "score is missing"),
        ({"rows": {"score": 1}}, "list of objects"),
        ({"by_name": {"q": {"edges": [1.0]}}}, "1 entries along 2"),
        ({"notes": ["why"]}, "by name"),
    ],
)
def test_values_that_do_not_fit_are_refused(change, words):
    with pytest.raises(Mismatch, match=words):
        check(change)


def test_a_missing_key_is_refused():
    with pytest.raises(Mismatch, match="ratio is missing"):
        check(drop=["ratio"])


def test_lengths_bind_their_symbols_once():
    sizes = {}
    check(sizes=sizes)
    assert sizes == {"L": 3, "T": 2}
    check_arrays(SCHEMA, {"norms": (4, 2), "values/w.q": (7,)}, sizes)


@pytest.mark.parametrize(
    ("shapes", "words"),
    [
        ({"norms": (3, 2)}, "3 entries along L\\+1, expected 4"),
        ({"norms": (4, 3)}, "3 entries along T"),
        ({"norms": (4,)}, "shape"),
        ({}, "norms are missing"),
        ({"norms": (4, 2), "other": (1,)}, "other is not declared"),
        ({"norms": (4, 2), "values": (1,)}, "values is not declared"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(shapes, words):
    with pytest.raises(Mismatch, match=words):
        check_arrays(SCHEMA, shapes, {"L": 3, "T": 2})


@pytest.mark.parametrize(
    ("key", "unit"), [("angle", "degrees"), ("angle_deg", ""), ("wall_s", "degrees"), ("x", "feet")]
)
def test_a_unit_shows_in_the_name(key, unit):
    with pytest.raises(ValueError, match=key):
        Field(key, "a meaning", unit=unit)


def test_every_template_of_the_design_has_a_schema():
    assert [name[:2] for name in SCHEMAS] == [f"{number:02}" for number in range(1, 20)]


def test_the_books_page_names_every_key():
    page = schema_markdown()
    for schema in SCHEMAS.values():
        section = page.partition(f"## {schema.template}\n")[2].partition("\n## ")[0]
        for field in schema.values + schema.arrays:
            assert f"| `{field.key}` | {field.meaning}" in section
    assert all(line.count(" | ") == 3 for line in page.splitlines() if line.startswith("| "))
