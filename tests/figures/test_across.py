"""Small multiples draw what the record holds, and nothing where it holds nothing."""

import matplotlib.pyplot as plt
import pytest

from sdnb import figures
from sdnb.observations import across_models
from tests import shelf


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    return across_models(shelf.full_shelf(tmp_path_factory.mktemp("results")))


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


def line(ax, label: str) -> list[float]:
    [there] = [entry for entry in ax.lines if entry.get_label() == label]
    return list(there.get_ydata())


def test_norms_have_one_panel_a_model_on_one_axis(found):
    fig = figures.norms_across(found.values["curves"])
    panels = [ax for ax in fig.axes if ax.axison]
    assert [ax.get_title() for ax in panels] == ["org/one", "org/plain", "org/two"]
    assert line(panels[0], "largest token") == [1, 2, 80, 3]
    assert line(panels[0], "median token") == [1, 2, 2, 2]
    assert len({ax.get_ylim() for ax in panels}) == 1 and panels[0].get_yscale() == "log"
    assert len(panels[0].patches) == 2 and not panels[1].patches, "the layers where the norm rises and falls"


def test_angles_show_models_that_have_some(found):
    panels = [ax for ax in figures.angles_across(found.values["curves"]).axes if ax.axison]
    assert [ax.get_title() for ax in panels] == ["org/one", "org/two"]
    assert line(panels[0], "F") == [81, 10, 71]


def test_key_figures_leave_out_what_nobody_has(found):
    fig = figures.key_figures(found.values["rows"])
    panels = {ax.get_xlabel(): ax for ax in fig.axes if ax.axison}
    assert [name.split("\n")[0] for name in panels] == [
        "largest norm over", "angle at the largest", "singular values",
    ]  # fmt: skip
    ratio = panels["largest norm over\nits layer's median"]
    assert [entry.get_xdata()[0] for entry in ratio.lines] == [40, 1.5, 9.5]
    assert ratio.get_xlim()[0] <= 0 < 40 <= ratio.get_xlim()[1]


def test_nothing_to_draw_is_no_figure(found):
    empty = {key: dict.fromkeys(curve) for key, curve in found.values["curves"].items()}
    assert figures.norms_across(empty) is None and figures.angles_across(empty) is None
    row = dict.fromkeys(found.values["rows"][0]) | {"model": "org/one"}
    assert figures.key_figures([row]) is None
    alone = found.values | {"signature_names": ["org/one"]}
    assert figures.signature_matrix(alone, found.arrays["signature_angle_deg"].numpy()[:1, :1]) is None


def test_the_matrix_names_each_model_with_its_group(found):
    ax = figures.signature_matrix(found.values, found.arrays["signature_angle_deg"].numpy())
    assert [text.get_text() for text in ax.get_yticklabels()] == ["org/one (1)", "org/two (1)"]
    assert "2.0" in {text.get_text() for text in ax.texts}
