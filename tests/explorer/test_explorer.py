"""What the explorer's cells find in a model with a planted defect, and what its controls change."""

from types import SimpleNamespace

import pytest
import torch

import sdnb
from tests.cells import run_cells
from tests.tiny import planted_model, tiny_model

TEXT = "One of these is longer than all others."


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("org") / "planted", layers=6)


@pytest.fixture(scope="module")
def names(planted):
    """The variables of the notebook, executed on the planted model."""
    given = {"sentence": TEXT, "add_special_tokens": True, "live": True}
    return run_cells("explorer", model=str(planted.folder), device="cpu", **given)


@pytest.fixture(scope="module")
def explorer(names):
    return SimpleNamespace(**names)


@pytest.fixture
def study(explorer):
    return explorer.first


def test_the_planted_layer_points_along_the_direction(explorer, study, planted):
    layer = planted.explosion_layer
    view = explorer.linear_view(study, layer)
    assert study.layers == [layer] and [*study.angles.index] == [1, 2, 3, 4, 5, 6]
    assert study.angles.F[layer] < 5 and view.singular_values["F"][0] > 5 * view.singular_values["F"][1]
    assert sdnb.angle_deg(view.right_vector, planted.right_vector) < 5
    explorer.linear_view(study, 1)
    assert study.angles.F[1] > 30 and explorer.linear_view(study, layer) is view
    rows = study.lm.model.get_output_embeddings().weight
    cosine = torch.nn.functional.cosine_similarity(rows, planted.direction[None])
    assert len(view.items) == 5 and view.items[0][1] == pytest.approx(cosine.max().item(), abs=0.05)


def test_a_zero_ffn_has_no_angle_and_nothing_to_project(explorer, tmp_path):
    """An arbitrary vector is no direction: its angle would be a random one."""
    folder = planted_model(tmp_path / "org" / "zero", layers=4, decay_layer=4, explosion_layer=2).folder
    lm = sdnb.load(str(folder), device="cpu")
    with torch.no_grad():
        lm.model.model.layers[2].mlp.down_proj.weight.zero_()
    study = explorer.examine(lm)
    view = explorer.linear_view(study, 3)
    assert study.angles.loc[3].isna().to_dict() == {"L": False, "F": True}
    assert view.singular_values["F"][0] == 0 and view.right_vector is None and view.items == []


def test_a_layer_without_a_linear_view_is_shown_with_the_reason(explorer, planted, monkeypatch):
    def refuse(view, seed):
        raise sdnb.LayerUnsupported(3, "mlp", "is not recognised")

    study = explorer.examine(sdnb.load(str(planted.folder), device="cpu"))
    monkeypatch.setattr(sdnb, "linear_layer", refuse)
    figure = explorer.layer_picture(study, 3)
    assert "layer 3, mlp: is not recognised" in [text.get_text() for text in figure.axes[0].texts]
    assert "no linear view" in explorer.layer_table(study, explorer.read_sentence(study, TEXT, True), 3)


def test_a_sentence_gives_tokens_norms_and_layers(explorer, study, planted):
    seen = explorer.read_sentence(study, TEXT, True)
    assert seen.norms.shape == (7, len(seen.tokens)) and seen.tokens[0] == "<s>"
    assert seen.found.high_norm.nonzero().flatten().tolist() == [0]
    assert seen.found.explosion_layers == [planted.explosion_layer]
    assert len(explorer.read_sentence(study, TEXT, False).tokens) == len(seen.tokens) - 1


@pytest.mark.parametrize(
    ("name", "most"), [("project the direction out", 0.2), ("massive dimensions to zero", 0.7)]
)
def test_an_intervention_takes_the_norm_away_and_comes_back(
    explorer, study, planted, name, most, monkeypatch
):
    """The planted direction has no massive dimension, so the ten largest ones stand in."""
    layer = planted.explosion_layer
    state = study.defect.by_layer[layer]
    largest = {j: state[j].item() for j in state.abs().topk(10).indices.tolist()}
    monkeypatch.setattr(study, "massive", {layer: largest})

    def norm(*on: str) -> float:
        return explorer.read_sentence(study, TEXT, True, on).norms[layer, 0].item()

    before = norm()
    assert name in explorer.possible(study) and norm(name) < most * before and norm() == before


def test_attention_off_makes_a_token_independent_of_those_before(explorer, study):
    texts = [f"{word} of the same tail." for word in ("One", "Two")]
    one, other = (explorer.read_sentence(study, text, True, ["attention to zero"]) for text in texts)
    assert torch.equal(one.norms[:, -1], other.norms[:, -1])


def test_a_model_without_the_phenomenon_is_shown(explorer, tmp_path):
    plain = explorer.examine(sdnb.load(str(tiny_model(tmp_path / "org" / "plain")), device="cpu"))
    assert explorer.possible(plain) == ["project the direction out", "attention to zero"]
    seen = explorer.read_sentence(plain, TEXT, None)
    assert not seen.found.high_norm.any() and "no direction" in explorer.layer_table(plain, seen, 1)
    assert plain.angles.isna().all(axis=None) and 1 in plain.views


def test_a_deep_model_has_frames_of_some_layers_those_of_the_explosion_among_them(explorer):
    chosen = explorer.framed_layers(80, [2, 45])
    assert {1, 2, 45, 80} <= set(chosen) and len(chosen) <= 34 and chosen == sorted(chosen)
    assert explorer.framed_layers(3, [2]) == [1, 2, 3] and explorer.framed_layers(1, [1]) == [1]


def test_tokens_cannot_break_the_table(explorer, study):
    table = explorer.layer_table(study, explorer.read_sentence(study, "a <b> & <script>x", True), 1)
    assert "<script" not in table and "<b>x" not in table


# --- live


@pytest.fixture
def live(explorer):
    return explorer.live_explorer()


def shown(live, side: int = 0) -> tuple[bytes, bytes, str]:
    column = live.columns[side]
    return column.norms.value, column.spectrum.value, column.table.value


def test_it_is_live_where_somebody_can_answer(names, explorer, monkeypatch):
    assert not explorer.someone_present()
    for present in (True, False):
        parent = {"content": {"allow_stdin": present}}
        shell = SimpleNamespace(kernel=SimpleNamespace(get_parent=lambda parent=parent: parent))
        monkeypatch.setitem(names, "get_ipython", lambda shell=shell: shell)
        assert explorer.someone_present() == present


def test_each_control_changes_what_depends_on_it(live):
    norms, spectrum, _ = shown(live)
    live.columns[0].layer.value = 5
    moved = shown(live)
    assert moved[0] == norms and moved[1] != spectrum and "Layer 5" in moved[2]
    live.switches["project the direction out"].value = True
    switched = shown(live)
    assert switched[0] != norms and switched[1] == moved[1] and switched[2] != moved[2]
    live.text.value = "Something else."
    assert shown(live)[0] != switched[0] and live.columns[0].layer.value == 5


def test_the_button_gives_the_angles_of_all_layers(live, study):
    study.views.clear()
    study.angles[:] = float("nan")
    live.columns[0].layer.value = 5
    before = shown(live)[1]
    assert [*study.views] == [5] and study.angles.F.count() == 1
    live.columns[0].every.click()
    assert shown(live)[1] != before and study.angles.F.count() == 6


@pytest.mark.parametrize(
    ("control", "value", "said"),
    [("text", "", "type a sentence"), ("text", " ", "type a sentence"), ("text", "word " * 240, "shorten it"),
     ("model", "zoo/none", "no model zoo/none"), ("model", "no such model", "could not be fetched"),
     ("model", "org/other", "ZeroDivisionError: by &lt;")],
)  # fmt: skip
def test_errors_are_said_and_nothing_stays(live, control, value, said, monkeypatch):
    def fails(*args, **options):
        raise ZeroDivisionError("by <nothing>")

    if value == "org/other":
        monkeypatch.setattr(sdnb, "load", fails)
    left = live.columns[0]
    widget = live.text if control == "text" else left.model
    before = widget.value
    widget.value = value
    assert shown(live) == (b"", b"", "") and said in left.status.value
    assert "Traceback" not in left.status.value and left.norms.layout.display == "none"
    widget.value = before
    assert all(shown(live)) and left.norms.layout.display is None


def test_two_models_beside_each_other(live, planted):
    left, right = live.columns
    assert left.layer.value == planted.explosion_layer and left.layer.max == 6 and live.begin.value
    assert all(shown(live)) and "tokens" in left.status.value
    assert not any(shown(live, 1)) and right.layer.layout.display == "none"
    right.model.value = left.model.value
    assert shown(live) == shown(live, 1)
    right.layer.value = 6
    assert "Layer 6" in right.table.value and f"Layer {planted.explosion_layer}" in left.table.value
    right.model.value = ""
    assert not any(shown(live, 1))


def test_a_few_models_are_kept_and_revisions_are_read(names, explorer, monkeypatch):
    asked = []
    monkeypatch.setattr(sdnb, "load", lambda name, revision, **options: asked.append((name, revision)))
    monkeypatch.setitem(names, "examine", lambda lm: lm)
    for name in ("org/a@main", "org/b", "org/b", "org/c", "org/a@main"):
        explorer.read_model(name)
    assert asked == [("org/a", "main"), ("org/b", None), ("org/c", None), ("org/a", "main")]
    explorer.read_model.cache_clear()


def test_the_zoo_is_offered(explorer):
    offered = explorer.zoo_models()
    assert {"zoo/llama", "zoo/smollm2", "zoo/llama-steps/step-001000"} <= {*offered}
    assert not [name for name in offered if "runs" in name]
