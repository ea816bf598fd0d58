"""What the explorer knows of a model with a planted defect, and what its controls change."""

from types import SimpleNamespace

import pytest
import torch

import sdnb
from sdnb import explorer
from sdnb.errors import ModelError, ParameterError, TextError
from sdnb.explorer import Exploration, LiveExplorer
from tests.tiny import planted_model, tiny_model

TEXT = "One of these is longer than all others."
BEGIN = {"add_special_tokens": True}


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    return planted_model(tmp_path_factory.mktemp("org") / "planted", layers=6)


@pytest.fixture(scope="module")
def loaded(planted):
    return sdnb.load(str(planted.folder), device="cpu")


@pytest.fixture(scope="module")
def model(loaded):
    return Exploration(loaded)


def test_the_planted_layer_points_along_the_direction(model, planted, loaded):
    facts = model.layer(planted.explosion_layer)
    assert facts.angle_deg["F"] < 5 and facts.singular_values["F"][0] > 5 * facts.singular_values["F"][1]
    assert sdnb.angle_deg(facts.right_vector, planted.right_vector) < 5
    assert model.layer(1).angle_deg["F"] > 30 and model.explosion_layers == [planted.explosion_layer]
    known = model.angles()["F"]
    assert known[planted.explosion_layer - 1] == facts.angle_deg["F"] and len(known) == 6
    rows = loaded.model.get_output_embeddings().weight
    cosine = torch.nn.functional.cosine_similarity(rows, planted.direction[None])
    assert len(facts.items) == 5 and facts.items[0][1] == pytest.approx(cosine.max().item(), abs=0.05)


def test_a_zero_ffn_has_no_angle_and_nothing_to_project(tmp_path):
    """An arbitrary vector is no direction: its angle would be a random one."""
    folder = planted_model(tmp_path / "org" / "zero", layers=4, decay_layer=4, explosion_layer=2).folder
    loaded = sdnb.load(str(folder), device="cpu")
    with torch.no_grad():
        loaded.model.model.layers[2].mlp.down_proj.weight.zero_()
    facts = Exploration(loaded).layer(3)
    assert facts.angle_deg["F"] is None and facts.right_vector is None and facts.items == []
    assert facts.singular_values["F"][0] == 0 and facts.angle_deg["L"] is not None


def test_a_sentence_gives_tokens_norms_and_layers(model, planted):
    seen = model.sentence(TEXT, **BEGIN)
    assert seen.norms.shape == (7, len(seen.tokens)) and seen.tokens[0] == "<s>"
    assert seen.found.high_norm.nonzero().flatten().tolist() == [0]
    assert seen.found.explosion_layers == [planted.explosion_layer]
    assert len(model.sentence(TEXT, add_special_tokens=False).tokens) == len(seen.tokens) - 1


@pytest.mark.parametrize(("name", "most"), [("direction", 0.2), ("massive", 0.7)])
def test_an_intervention_takes_the_norm_away_and_comes_back(model, planted, name, most, monkeypatch):
    """The planted direction has no massive dimension, so the ten largest ones stand in."""
    layer = planted.explosion_layer
    state = model.defect.by_layer[layer]
    largest = {j: state[j].item() for j in state.abs().topk(10).indices.tolist()}
    monkeypatch.setattr(model, "_massive", {layer: largest})

    def norm(*on: str) -> float:
        return model.sentence(TEXT, **BEGIN, switched_on=on).norms[layer, 0].item()

    before = norm()
    assert norm(name) < most * before and norm() == before


def test_attention_off_makes_a_token_independent_of_those_before(model):
    texts = [f"{word} of the same tail." for word in ("One", "Two")]
    one, other = (model.sentence(text, switched_on=("attention",)) for text in texts)
    assert torch.equal(one.norms[:, -1], other.norms[:, -1])


def test_a_model_without_the_phenomenon_is_shown(tmp_path):
    plain = Exploration(sdnb.load(str(tiny_model(tmp_path / "org" / "plain")), device="cpu"))
    assert plain.possible == ["direction", "attention"] and plain.layer(1).angle_deg == {"L": None, "F": None}
    seen = plain.sentence(TEXT)
    assert not seen.found.high_norm.any() and "no direction" in explorer.layer_table(plain, seen, 1)
    with pytest.raises(ParameterError, match="cannot be switched on"):
        plain.sentence(TEXT, switched_on=("massive",))


def test_what_cannot_be_shown_is_said(model):
    for text, said in (("", "type a sentence"), (" \n", "type a sentence"), ("word " * 240, "shorten it")):
        with pytest.raises(TextError, match=said):
            model.sentence(text)
    for layer in (0, 7):
        with pytest.raises(ParameterError, match="1 to 6"):
            model.layer(layer)


def test_a_deep_model_has_frames_of_some_layers_those_of_the_explosion_among_them():
    chosen = explorer.chosen_layers(80, [2, 45])
    assert {1, 2, 45, 80} <= set(chosen) and len(chosen) <= 34 and chosen == sorted(chosen)
    assert explorer.chosen_layers(3, [2]) == [1, 2, 3] and explorer.chosen_layers(1, [1]) == [1]


def test_tokens_cannot_break_the_table(model):
    table = explorer.layer_table(model, model.sentence("a <b> & <script>x"), 1)
    assert "<script" not in table and "<b>x" not in table


# --- live


@pytest.fixture
def live(loaded):
    return LiveExplorer(loaded, TEXT, **BEGIN)


def shown(live, side: int = 0) -> tuple[bytes, bytes, str]:
    panel = live.panels[side]
    return panel.norms.value, panel.spectrum.value, panel.table.value


def test_each_control_changes_what_depends_on_it(live):
    norms, spectrum, _ = shown(live)
    live.panels[0].layer.value = 5
    moved = shown(live)
    assert moved[0] == norms and moved[1] != spectrum and "Layer 5" in moved[2]
    live.switches["direction"].value = True
    switched = shown(live)
    assert switched[0] != norms and switched[1] == moved[1] and switched[2] != moved[2]
    live.text.value = "Something else."
    assert shown(live)[0] != switched[0] and live.panels[0].layer.value == 5
    live.panels[0].every.click()
    assert shown(live)[1] != moved[1]  # the angles of all layers


@pytest.mark.parametrize(
    ("control", "value", "said"),
    [("text", "", "type a sentence"), ("model", "zoo/none", "no model zoo/none"),
     ("model", "no such model", "check the spelling"), ("model", "org/other", "ZeroDivisionError: by &lt;")],
)  # fmt: skip
def test_errors_are_said_and_nothing_stays(live, control, value, said, monkeypatch):
    def fails(*args, **options):
        raise ZeroDivisionError("by <nothing>")

    if value == "org/other":
        monkeypatch.setattr(live, "_load", fails)
    left = live.panels[0]
    widget = live.text if control == "text" else left.model
    before = widget.value
    widget.value = value
    assert shown(live) == (b"", b"", "") and said in left.status.value
    assert "Traceback" not in left.status.value and left.norms.layout.display == "none"
    widget.value = before
    assert all(shown(live)) and left.norms.layout.display is None


def test_two_models_beside_each_other(live, planted):
    left, right = live.panels
    assert left.layer.value == planted.explosion_layer and left.layer.max == 6 and live.begin.value
    assert all(shown(live)) and "tokens" in left.status.value
    assert not any(shown(live, 1)) and right.layer.layout.display == "none"
    right.model.value = left.model.value
    assert shown(live) == shown(live, 1)
    right.layer.value = 6
    assert "Layer 6" in right.table.value and f"Layer {planted.explosion_layer}" in left.table.value
    right.model.value = ""
    assert not any(shown(live, 1))


def test_a_few_models_are_kept_and_revisions_are_read(live, loaded, monkeypatch):
    asked = []

    def load(name, revision=None):
        asked.append((name, revision))
        return loaded

    monkeypatch.setattr(live, "_load", load)
    monkeypatch.setattr(explorer, "Exploration", lambda model, seed: SimpleNamespace(model=model))
    for name in ("org/a@main", "org/b", "org/c", "org/a@main"):
        live.take(name)
    assert asked == [("org/a", "main"), ("org/b", None), ("org/c", None)]
    with pytest.raises(ModelError, match="choose one"):
        live.take("  ")


def test_the_zoo_is_offered():
    assert {"zoo/llama", "zoo/smollm2", "zoo/llama-steps/step-001000"} <= {*explorer.zoo_models()}
    assert not [name for name in explorer.zoo_models() if "runs" in name]
