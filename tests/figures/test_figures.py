"""The figures of notebooks 01 to 05 show the record's numbers, and leave gaps where there are none."""

import errno
import os

import matplotlib
import numpy as np
import pytest

matplotlib.use("Agg")

from matplotlib import pyplot as plt

from sdnb import figures
from sdnb.errors import RecordError
from sdnb.figures.directions import numbers
from sdnb.figures.norms import token_kind

L = 6


@pytest.fixture(autouse=True)
def _style():
    figures.use_style()
    yield
    plt.close("all")


def curve(seed: int, low: float = 0.0, high: float = 1.0) -> list[float]:
    return np.random.default_rng(seed).uniform(low, high, L).tolist()


def lines_of(axes) -> dict[str, np.ndarray]:
    return {line.get_label(): line.get_ydata() for line in axes.get_lines()}


def singular_values() -> dict:
    keys = ("angle_deg", "ffn_angle_deg", "gain_angle_deg")
    values = {key: curve(n, 0, 90) for n, key in enumerate(keys)}
    for n, key in enumerate(
        ("singular_value", "second_singular_value", "ffn_singular_value", "ffn_second_singular_value")
    ):
        values[key] = curve(n + 9, 1, 2)
    return values | {"explosion_layers": [2], "decay_layers": [6], "random_angle_deg": 85.0}


def test_norms_by_token_and_layer():
    norms = np.arange(1, 1 + 7 * 4).reshape(7, 4).astype(float)
    axes = figures.norms_2d(norms, ["<s>", "a", "b", "."], [0, 3], threshold=9.0, explosion=[2], decay=[6])
    drawn = {tuple(line.get_ydata()) for line in axes.get_lines()}
    assert all(tuple(norms[:, t]) in drawn for t in range(4)) and axes.get_yscale() == "log"
    assert {"<s>", "."} <= {text.get_text() for text in axes.texts}
    space = figures.norms_3d(norms, ["<s>", "a", "b", "."], [0, 3], title="model")
    assert len(space.collections) == 4 and space.get_title() == "model"
    assert [token_kind(t, [0, 3]) for t in range(4)] == ["initial", "ordinary", "ordinary", "noninitial"]


def test_long_sentences_keep_their_last_token():
    names = [f"t{n}" for n in range(40)]
    axes = figures.norms_3d(np.ones((3, 40)), names, [], max_tokens=10)
    assert [label.get_text() for label in axes.get_xticklabels()] == [*names[:9], "t39"]


def test_singular_directions_show_angles_gaps_and_the_null_line():
    values = singular_values()
    values["gain_angle_deg"][0] = None
    figure = figures.singular_directions(values)
    above, below = figure.axes
    shown = lines_of(above)
    assert np.array_equal(shown["left singular vector of L (the paper's)"], values["angle_deg"])
    gain = shown["largest-gain output of the real FFN"]
    assert np.isnan(gain[0]) and np.array_equal(gain[1:], values["gain_angle_deg"][1:])
    assert any(np.allclose(y, 85.0) for y in shown.values())
    gap = numbers(values["ffn_singular_value"]) / numbers(values["ffn_second_singular_value"])
    assert any(
        len(line.get_ydata()) == L and np.allclose(line.get_ydata(), gap) for line in below.get_lines()
    )
    written = {text.get_text() for text in above.texts}
    assert f"{values['angle_deg'][1]:.1f}°" in written and f"{values['ffn_angle_deg'][5]:.1f}°" in written
    assert not figures.singular_directions(values, annotate=False).axes[0].texts


def test_eigenpairs_stand_on_two_axes():
    values = {
        "angle_deg": curve(1, 0, 90), "eigenvalue": curve(2, -3, 1), "norm_aware_eigenvalue": [None] * L,
        "explosion_layers": [2], "decay_layers": [6], "nearest_random_angle_deg": 75.0,
    }  # fmt: skip
    left, right = figures.eigenpairs(values).axes
    assert np.array_equal(lines_of(left)["angle (left axis)"], values["angle_deg"])
    assert np.array_equal(lines_of(right)["eigenvalue of L − I"], values["eigenvalue"])
    assert np.isnan(lines_of(right)["norm-aware eigenvalue"]).all()


def test_ledger_bars_are_the_entries():
    keys = ("ledger_attention", "ledger_ffn", "ledger_ordinary_attention", "ledger_ordinary_ffn")
    values = {key: curve(n, -2, 2) for n, key in enumerate(keys)}
    axes = figures.ledger_bars(values | {"explosion_layers": [2], "decay_layers": []})
    heights = [[bar.get_height() for bar in bars] for bars in axes.containers]
    assert heights == [values["ledger_attention"], values["ledger_ffn"]]


def test_linearity_has_a_line_a_branch_scale_and_input():
    values = {
        f"{branch}{scale}{kind}_{what}": curve(n)
        for n, (branch, scale, kind, what) in enumerate(
            (b, s, k, w)
            for b in ("attention", "ffn", "layer")
            for s in ("", "_gain")
            for k in ("", "_gaussian")
            for w in ("cosine", "error")
        )
    }
    figure = figures.linearity(values)
    assert [len(axes.get_lines()) for axes in figure.axes] == [2, 4, 4, 2, 4, 4]
    assert np.array_equal(
        lines_of(figure.axes[1])["Gaussian inputs, gain's scale"], values["ffn_gain_gaussian_cosine"]
    )


def test_sampling_error_has_its_own_slope():
    values = {
        "sample_counts": [100, 400, 1600], "sampled_error": [0.4, 0.2, 0.1],
        "sampled_standard_error": [0.4] * 3,
    }  # fmt: skip
    shown = lines_of(figures.sampling_error(values))
    np.testing.assert_allclose(shown[r"$1/\sqrt{n}$"], [0.4, 0.2, 0.1])


def test_state_angles_keep_the_kinds_apart():
    angles, positions = np.array([1.0, 2.0, 3.0]), np.array([0, 5, 0])
    figure = figures.state_angles(angles, np.array([3, 3, 4]), positions, np.array([0, 0, 1]), L)
    offsets = [points.get_offsets() for points in figure.axes[2].collections]
    assert [len(o) for o in offsets] == [2, 1] and offsets[1].tolist() == [[5.0, 2.0]]
    figures.state_angles(*[np.zeros(0)] * 4, L)  # nothing found is a figure too


def test_saving_is_reproducible_and_optional(tmp_path):
    for folder in ("a", "b"):
        axes = figures.ledger_bars(
            {key: curve(1) for key in ("ledger_attention", "ledger_ffn")}
            | {f"ledger_ordinary_{k}": curve(2) for k in ("attention", "ffn")}
            | {"explosion_layers": [], "decay_layers": []}
        )
        for form in ("png", "svg", "pdf", None):
            figures.save(axes.figure, tmp_path, folder, "figure", form)
    assert sorted(p.name for p in (tmp_path / "a").iterdir()) == [
        ".lock", "figure.pdf", "figure.png", "figure.svg",
    ]  # fmt: skip
    for form in ("png", "svg", "pdf"):
        assert (tmp_path / "a" / f"figure.{form}").read_bytes() == (
            tmp_path / "b" / f"figure.{form}"
        ).read_bytes()


def test_a_full_disk_leaves_the_old_figure(tmp_path, monkeypatch):
    path = tmp_path / "a" / "figure.png"
    path.parent.mkdir()
    path.write_bytes(b"old")

    def full(number):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(RecordError, match="disk is full"):
        figures.save(plt.figure(), tmp_path, "a", "figure")
    assert path.read_bytes() == b"old"
    assert sorted(p.name for p in path.parent.iterdir()) == [".lock", "figure.png"]
