"""Numbers as a reader sees them, and the words around them."""

import pytest

from sdnb.report import findings, numbers_table, provenance_table
from sdnb.report.tables import number


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, "none"), ([], "none"), ([3, 1], "3, 1"), (0.123456, "0.123"), (12345.6, "12,346"), (7, "7"),
     (1e-7, "1e-07"), ("closed_form", "closed_form"), (True, "True"), (-15.6, "-15.6")],
)  # fmt: skip
def test_number(value, text):
    assert number(value) == text


def test_the_published_column_appears_only_where_there_is_one():
    assert numbers_table([("a", 1.0, "")], "m").text.splitlines()[0] == "|  | `m` |"
    table = numbers_table([("a", 1.0, ""), ("b", "2°", "3° (paper)")], "m")
    assert table.text.splitlines()[0] == "|  | `m` | published |"
    assert table.text.splitlines()[3] == "| b | 2° | 3° (paper) |"
    assert table._repr_markdown_() == table.text


def test_provenance_lists_every_entry():
    text = provenance_table({"model": "zoo/llama", "revision": None, "versions": {"torch": "2.13"}}).text
    assert (
        "| model | zoo/llama |" in text
        and "| versions | torch 2.13 |" in text
        and "| revision | none |" in text
    )


SINGULAR = {
    "angle_deg": [80.0, 30.0, 70.0], "ffn_angle_deg": [80.0, 10.0, 60.0],
    "gain_angle_deg": [None, 12.0, 50.0],
    "singular_value": [2.0, 3.0, 2.0], "second_singular_value": [1.0, 1.5, 2.0],
    "ffn_singular_value": [2.0, 4.0, 2.0], "ffn_second_singular_value": [1.0, 1.0, 2.0],
    "explosion_layers": [2], "decay_layers": [],
}  # fmt: skip


def test_singular_directions_in_words():
    text = findings("04_singular_directions", SINGULAR, "m").text
    assert "At layer 2, the largest explosion" in text and "30° for L, 10° for F and 12°" in text
    assert "| L, elsewhere | 70° to 80° |" in text
    assert "gap of F (first over second singular value), at explosion layers | layer 2: 4 |" in text


def test_attentions_intercept_in_words():
    keys = ("attention_cosine", "ffn_cosine", "ffn_gain_cosine", "layer_cosine", "layer_error")
    values = {key: [0.5, 0.25] for key in keys} | {"sampled_error": []}
    for entries, span in (([0.25, None, 0.5], "0.25 to 0.5"), ([0.0, 0.0], "0 to 0")):
        text = findings("03_linear_layers", values | {"attention_intercept": entries}, "m").text
        assert f"| attention's intercept over all it adds, smallest to largest over layers | {span} |" in text


def test_a_missing_phenomenon_in_words():
    nothing = {key: [None] * 3 if "angle" in key else entry for key, entry in SINGULAR.items()}
    text = findings("04_singular_directions", nothing | {"explosion_layers": []}, "m").text
    assert "no explosion layer" in text
    empty = {
        "explosion_layers": [], "decay_layers": [], "ledger_attention": None, "ledger_ffn": None,
        "angle_deg": [None], "eigenvalue": [None], "norm_aware_eigenvalue": [None],
        "nearest_random_angle_deg": 75.0,
    }  # fmt: skip
    assert (
        "No layer of this model takes the high norm away"
        in findings("05_negative_eigenvalues", empty, "m").text
    )


def test_the_ledger_in_words():
    values = {
        "explosion_layers": [1], "decay_layers": [2], "ledger_attention": [1.0, 0.0],
        "ledger_ffn": [100.0, -90.0],
        "ledger_start": 2.0, "ledger_end": 13.0, "angle_deg": [5.0, 4.0], "eigenvalue": [0.5, -7.0],
        "norm_aware_eigenvalue": [0.1, -0.9], "nearest_random_angle_deg": 75.0,
    }  # fmt: skip
    text = findings("05_negative_eigenvalues", values, "m").text
    assert "layer 1 writes most along the direction (101) and layer 2 least (-90)" in text
    assert "starts at 2 and leaves at 13" in text and "layer 2: -0.9" in text
