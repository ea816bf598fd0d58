"""Pictures of signatures: what is drawn is what the record says."""

import matplotlib.pyplot as plt
import numpy as np
import pytest

from sdnb.figures import signature_map, signature_robustness
from sdnb.figures.uses import scheme_name

VALUES = {
    "names": ["a", "b", "c"],
    "groups": [1, 2, 1],
    "order": [0, 2, 1],
    "robustness": [
        {"change": "noise", "amount": "3 %", "angle_deg": 2.5},
        {"change": "noise", "amount": "90 %", "angle_deg": None},
        {"change": "fine-tuning", "amount": "10 steps", "angle_deg": 7.0},
    ],
}
ANGLES = np.array([[0.0, 80.0, 4.0], [80.0, 0.0, -1.0], [4.0, -1.0, 0.0]])


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def test_map_puts_related_models_side_by_side():
    ax = signature_map(VALUES, ANGLES)
    drawn = ax.images[0].get_array()
    assert drawn[0, 1] == 4.0 and drawn[0, 2] == 80.0 and np.ma.is_masked(drawn[1, 2])
    assert [label.get_text() for label in ax.get_xticklabels()] == ["a (1)", "c (1)", "b (2)"]
    texts = [text.get_text() for text in ax.texts]
    assert "4.0" in texts and "80" in texts and texts.count("–") == 2
    assert not signature_map(VALUES, ANGLES, annotate=False).texts


def test_robustness_leaves_out_what_has_no_angle():
    ax = signature_robustness(VALUES)
    assert [bar.get_width() for bar in ax.patches] == [2.5, 7.0]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["noise: 3 %", "fine-tuning: 10 steps"]


def test_schemes_have_names():
    row = {"method": "smoothquant", "number_format": "int8", "weights": "tensor", "inputs": "tensor"}
    assert scheme_name(row | {"static": True}) == "SmoothQuant, int8, per tensor, static"
    row |= {"method": "rtn", "weights": "channel", "inputs": "token", "static": False}
    assert scheme_name(row) == "RTN, int8, per channel and token"
