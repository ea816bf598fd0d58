"""The one style, and what several figures share: layer axes, labels that keep apart, scales by rule."""

from itertools import combinations, pairwise
from types import SimpleNamespace

import matplotlib as mpl
import matplotlib.pyplot as plt
import numpy as np
import pytest
from matplotlib.text import Text

from sdnb import plots

mpl.use("agg")


@pytest.fixture(autouse=True)
def style():
    plots.use_style()
    yield
    plt.close("all")
    mpl.rcdefaults()


@pytest.mark.parametrize("width", [2.0, 8.0])
@pytest.mark.parametrize(("layers", "first"), [(1, 1), (6, 1), (12, 0), (30, 1), (32, 0), (126, 1)])
def test_layer_numbers_are_whole_and_do_not_run_together(layers, first, width):
    fig, ax = plt.subplots(figsize=(width, 2))
    ax.plot(range(first, layers + 1), np.zeros(layers + 1 - first))
    plots.layer_axis(ax, layers, first=first)
    fig.draw_without_rendering()
    labels = [label for label in ax.get_xticklabels() if label.get_text()]
    numbers = [int(label.get_text()) for label in labels]
    assert numbers[0] == first and numbers[-1] <= layers and len(numbers) == len({*numbers})
    boxes = [label.get_window_extent() for label in labels]
    assert all(a.x1 < b.x0 for a, b in pairwise(boxes))


def test_bands_stand_at_the_layers_and_are_named_once():
    ax = plt.subplots()[1]
    plots.mark_layers(ax, SimpleNamespace(explosion_layers=[12, 3], decay_layers=[29]))
    assert sorted(patch.get_x() + 0.5 for patch in ax.patches) == [3, 12, 29]
    assert ax.get_legend_handles_labels()[1] == ["explosion layer", "decay layer"]
    other = plt.subplots()[1]
    plots.mark_layers(other, {"explosion_layers": [1], "decay_layers": None}, label=False)
    assert len(other.patches) == 1 and other.get_legend_handles_labels()[1] == []


def test_labels_overwrite_neither_each_other_nor_the_frame():
    fig, ax = plt.subplots()
    x = np.arange(1, 31)
    for shift in (0, 0.5, 1.0):  # as the angles of L, F and the largest gain
        y = 88 - 80 * np.exp(-((x - 12) ** 2)) + shift
        ax.plot(x, y)
    ax.set_ylim(-2, 92)
    plots.layer_axis(ax, 30)
    for line in list(ax.lines):
        plots.annotate(ax, *line.get_data(), "{:.1f}°", at=[12, 29, 30])
    fig.draw_without_rendering()
    boxes = [Text.get_window_extent(text) for text in ax.texts]
    assert len(boxes) == 9
    assert not [pair for pair in combinations(boxes, 2) if pair[0].overlaps(pair[1])]
    frame = ax.get_window_extent()
    assert all(frame.x0 <= box.x0 and box.x1 <= frame.x1 and box.y1 <= frame.y1 for box in boxes)


def test_gaps_are_not_labelled_and_texts_are_taken_letter_by_letter():
    ax = plt.subplots()[1]
    plots.annotate(ax, [1, 2, 3], [1.0, float("nan"), None], ["$a$ $", "b", "c"])
    assert [text.get_text() for text in ax.texts] == [r"\$a\$ \$"]


@pytest.mark.parametrize(
    ("values", "scale"),
    [
        ([1.0, 2, 3, -4], "linear"),
        ([1.0, 2, 3, 22_000], "log"),
        ([1.0, 2, -3, 22_000, None], "symlog"),
        ([1.0, 0, 3, 22_000, float("nan")], "symlog"),
        ([0, 0, 0, 5.0], "linear"),
        ([], "linear"),
    ],
)
def test_one_bar_hides_no_others(values, scale):
    ax = plt.subplots()[1]
    ax.bar(range(len(values)), [value or 0 for value in values])
    plots.signed_log(ax, values)
    assert ax.get_yscale() == scale
    ticks = ax.get_yticks()
    assert scale != "symlog" or len(ticks) <= 25


def test_first_tokens_and_others_have_a_panel_each():
    fig = plots.two_panels(np.ones((2, 7)), np.ones((2, 7)) * 2, ["none", "zero"], None)
    assert [len(ax.lines) for ax in fig.axes] == [2, 2]
    assert fig.axes[0].lines[0].get_color() == "black"


def test_cells_without_a_value_stay_empty():
    ax = plt.subplots()[1]
    plots.angle_map(ax, [[0, 3.25, -1], [3.25, 0, None], [-1, None, 0]], ["a", "b", "c"])
    assert [text.get_text() for text in ax.texts] == ["0", "3.25", "3.25", "0", "0"]
    assert ax.images[0].get_clim() == (0, 90)
    wide = plt.subplots()[1]
    plots.heat_map(wide, np.full((2, 40), np.nan), ["p", "q"], range(1, 41))
    assert len(wide.get_xticks()) <= 16 and not wide.texts
