"""The explorer's pictures: what they mark, and that they are small."""

import io

import numpy as np
from PIL import Image

from sdnb.figures.explorer import layer_summary, norm_map, png


def norms(layers: int, tokens: int) -> np.ndarray:
    drawn = np.random.default_rng(0).uniform(1, 3, (layers + 1, tokens)).astype(np.float32)
    drawn[2:, 0] = 500
    return drawn


def test_the_map_names_tokens_and_marks_layers():
    ax = norm_map(norms(6, 4), ["<s>", "a" * 40, "$b$", "c"], explosion=[2], decay=[5]).axes[0]
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names == ["<s>", "a" * 11 + "…", "$b$", "c"]
    bold = [label.get_text() for label in ax.get_yticklabels() if label.get_fontweight() == "bold"]
    assert bold == ["2", "5"]


def test_many_tokens_are_numbered_and_marked_layers_keep_their_numbers():
    ax = norm_map(norms(80, 200), ["x"] * 200, explosion=[3]).axes[0]
    names = [label.get_text() for label in ax.get_xticklabels()]
    assert names[:2] == ["0", "5"] and len(names) <= 48
    assert "3" in [label.get_text() for label in ax.get_yticklabels()]


def test_a_norm_of_zero_and_a_flat_map_are_drawn():
    assert png(norm_map(np.zeros((3, 2), np.float32), ["a", "b"]))
    assert png(norm_map(np.ones((3, 2), np.float32), ["a", "b"]))


def test_the_summary_shows_unknown_angles_as_gaps_and_the_note():
    angles = {"L": [80.0, None, 20.0], "F": [None, None, None]}
    figure = layer_summary(2, {}, angles, random_angle=86.0, note="layer 2 was refused")
    spectrum, curve = figure.axes
    assert "layer 2 was refused" in [text.get_text() for text in spectrum.texts]
    drawn = curve.lines[0].get_ydata()
    assert np.isnan(drawn[1]) and drawn[2] == 20


def test_pictures_are_small_and_repeat():
    pictures = [png(norm_map(norms(32, 40), [f"token{i}" for i in range(40)])) for _ in range(2)]
    assert len(pictures[0]) < 30_000
    assert pictures[0] == pictures[1]
    assert Image.open(io.BytesIO(pictures[0])).mode == "P"
