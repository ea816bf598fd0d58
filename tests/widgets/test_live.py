"""The live explorer's wiring without a browser: what a control changes, and that nothing old stays shown."""

import threading

import pytest

import sdnb
from sdnb.errors import ModelError
from sdnb.widgets import LiveExplorer, Shelf, zoo_models
from sdnb.widgets.newest import Newest

TEXT = "One of these is longer than all others."


@pytest.fixture(scope="module")
def loaded(planted):
    return sdnb.load(str(planted.folder))


@pytest.fixture
def explorer(loaded):
    made = LiveExplorer(Shelf(loaded, sdnb.load), TEXT)
    settle(made)
    return made


def settle(explorer) -> tuple[bytes, bytes, str]:
    """What the left panel shows when all is done."""
    assert explorer.worker.wait(120)
    left = explorer.panels[0]
    return left.norms.value, left.spectrum.value, left.table.value


def test_it_starts_at_the_explosion_layer_with_everything_shown(explorer, planted):
    left, right = explorer.panels
    assert left.layer.value == planted.explosion_layer and left.layer.max == 6
    assert all(settle(explorer)) and "tokens" in left.status.value
    assert right.norms.value == b"" and right.status.value == ""


def test_each_control_changes_what_depends_on_it(explorer):
    norms, spectrum, _ = settle(explorer)
    explorer.panels[0].layer.value = 5
    moved = settle(explorer)
    assert moved[0] == norms and moved[1] != spectrum and "Layer 5" in moved[2]
    explorer.switches["direction"].value = True
    switched = settle(explorer)
    assert switched[0] != norms and switched[1] == moved[1] and switched[2] != moved[2]
    explorer.text.value = "Something else."
    assert settle(explorer)[0] != switched[0]
    assert explorer.panels[0].layer.value == 5


@pytest.mark.parametrize(
    ("control", "value", "said"),
    [
        ("text", "", "type a sentence"),
        ("text", "word " * 300, "shorten it"),
        ("model", "zoo/none", "There is no model zoo/none"),
        ("model", "no such model", "check the spelling"),
    ],
)
def test_errors_are_said_and_nothing_stays(explorer, control, value, said):
    left = explorer.panels[0]
    widget = {"text": explorer.text, "model": left.model}[control]
    before = widget.value
    widget.value = value
    assert settle(explorer) == (b"", b"", "")
    assert said in left.status.value and "Traceback" not in left.status.value
    assert left.norms.layout.display == "none"
    widget.value = before
    assert all(settle(explorer)) and left.norms.layout.display is None


def test_what_nobody_foresaw_is_said_too(loaded):
    def fails(*args, **options):
        raise ZeroDivisionError("by <nothing>")

    explorer = LiveExplorer(Shelf(loaded, fails), TEXT, compare="org/other")
    settle(explorer)
    assert "ZeroDivisionError: by &lt;nothing&gt;" in explorer.panels[1].status.value
    assert all(settle(explorer))


def test_an_old_answer_is_not_shown_after_a_newer_question(explorer):
    left, release = explorer.panels[0], threading.Event()
    explorer.worker.submit("hold", lambda current: release.wait(60))
    shown = []
    left.norms.observe(lambda change: shown.append(change["new"]), "value")
    for text in ("First of all.", "Second of all.", "Third of all."):
        explorer.text.value = text
    assert "sdnb-old" in left.norms._dom_classes and "computing" in left.status.value
    release.set()
    settle(explorer)
    assert len(shown) == 1 and "sdnb-old" not in left.norms._dom_classes


def test_two_models_beside_each_other(explorer, planted):
    right = explorer.panels[1]
    right.model.value = explorer.panels[0].model.value
    assert settle(explorer)[0] == right.norms.value
    right.layer.value = 6
    settle(explorer)
    assert "Layer 6" in right.table.value
    assert f"Layer {planted.explosion_layer}" in explorer.panels[0].table.value
    right.model.value = ""
    settle(explorer)
    assert right.norms.value == b"" and right.table.value == ""


def test_the_newest_job_of_a_name_wins_and_a_broken_one_stops_nobody(caplog):
    worker, release, ran = Newest(), threading.Event(), []
    worker.submit("first", lambda current: release.wait(60))
    worker.submit("a", lambda current: ran.append("a, old"))
    worker.submit("b", lambda current: 1 / 0)
    worker.submit("a", lambda current: ran.append("a, new"))
    worker.submit(
        "c", lambda current: (worker.submit("c", lambda now: ran.append(now())), ran.append(current()))
    )
    release.set()
    assert worker.wait(60)
    assert ran == ["a, new", False, True]
    assert "a job of b failed" in caplog.text


def test_the_shelf_keeps_a_few_models_and_reads_revisions(loaded):
    asked = []

    def load(name, revision=None):
        asked.append((name, revision))
        return loaded

    shelf = Shelf(loaded, load)
    assert shelf.take(shelf.first) is shelf.take(shelf.first) and asked == []
    for name in ("org/a@main", "org/b", "org/c", "org/a@main"):
        shelf.take(name)
    assert asked == [("org/a", "main"), ("org/b", None), ("org/c", None)]
    with pytest.raises(ModelError, match="choose one"):
        shelf.take("  ")


def test_the_zoo_is_offered():
    assert {"zoo/llama", "zoo/llama-code"} <= set(zoo_models())
    assert not [name for name in zoo_models() if "runs" in name]
