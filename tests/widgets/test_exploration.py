"""What the explorer computes, without widgets: facts of layers, sentences, interventions, refusals."""

from types import SimpleNamespace

import pytest
import torch

import sdnb
from sdnb.errors import ParameterError, TextError
from sdnb.widgets import INTERVENTIONS, Exploration
from sdnb.widgets.frames import chosen_layers
from sdnb.widgets.pages import layer_table
from tests.tiny import tiny_model

TEXT = "One of these is longer than all others."


@pytest.fixture(scope="module")
def exploration(planted):
    return Exploration(sdnb.load(str(planted.folder)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return Exploration(sdnb.load(str(tiny_model(tmp_path_factory.mktemp("plain") / "tiny", layers=2))))


def test_a_sentence_has_the_norms_of_the_model(exploration, planted):
    ids = exploration.loaded.tokenizer(TEXT, add_special_tokens=True, return_tensors="pt").input_ids
    states = exploration.loaded.model(ids, output_hidden_states=True).hidden_states
    found = exploration.sentence(TEXT)
    assert torch.allclose(found.norms[:-1], torch.stack(states[:-1])[:, 0].norm(dim=-1), rtol=1e-5)
    assert found.high_norm == [0] and found.explosion_layers == [planted.explosion_layer]
    [(position, token, norm, ratio)] = found.largest(planted.explosion_layer, count=1)
    here = found.norms[planted.explosion_layer]
    assert (position, token, norm) == (0, "<s>", here.max().item())
    assert ratio == pytest.approx(norm / here.median().item())


def test_without_the_begin_token_nothing_explodes(exploration):
    found = exploration.sentence(TEXT, begin=False)
    assert found.high_norm == [] and "<s>" not in found.tokens


def test_facts_of_a_layer_are_those_of_its_linear_view(exploration, planted):
    number = planted.explosion_layer
    facts = exploration.layer(number)
    linear = sdnb.linear_layer(sdnb.layer_view(exploration.loaded.model, number))
    for name, matrix in (("L", linear.L), ("F", linear.F)):
        full = torch.linalg.svdvals(matrix.double())
        assert facts.singular_values[name] == pytest.approx(full[:16].tolist(), rel=1e-4, abs=1e-6)
    assert facts.angle_deg["F"] < 12
    assert float(sdnb.angle_deg(facts.right_vector, planted.right_vector)) < 12
    assert exploration.layer(number) is facts
    assert exploration.angles()["F"][number - 1] == facts.angle_deg["F"]


def test_a_wide_layer_is_decomposed_by_its_products_alone(tmp_path):
    wide = Exploration(sdnb.load(str(tiny_model(tmp_path / "wide", d=288, layers=1))))
    linear = sdnb.linear_layer(sdnb.layer_view(wide.loaded.model, 1))
    for name, matrix in (("L", linear.L), ("F", linear.F)):
        expected = torch.linalg.svdvals(matrix.double())[:4]
        assert wide.layer(1).singular_values[name] == pytest.approx(expected.tolist(), rel=1e-4)


def test_vocabulary_items_are_the_nearest_rows_of_the_output_embedding(exploration, planted):
    facts = exploration.layer(planted.explosion_layer)
    linear = sdnb.linear_layer(sdnb.layer_view(exploration.loaded.model, planted.explosion_layer))
    vector = torch.linalg.svd(linear.F)[0][:, 0]
    vector = vector * (vector @ exploration.direction).sign()
    rows = exploration.loaded.model.get_output_embeddings().weight
    cosine = torch.nn.functional.cosine_similarity(rows, vector[None])
    assert [value for _, value in facts.items] == pytest.approx(cosine.topk(5).values.tolist(), abs=1e-3)


@pytest.mark.parametrize(("name", "most"), [("direction", 0.1), ("massive", 0.8)])
def test_an_intervention_takes_the_high_norm_away(exploration, planted, name, most):
    before = exploration.sentence(TEXT).norms[planted.explosion_layer, 0]
    after = exploration.sentence(TEXT, switched_on=(name,)).norms[planted.explosion_layer, 0]
    assert after < most * before
    assert exploration.sentence(TEXT).norms[planted.explosion_layer, 0] == before  # and comes back


def test_attention_off_makes_a_token_independent_of_those_before(exploration):
    one, other = (
        exploration.sentence(start + " of the same tail.", begin=False, switched_on=("attention",))
        for start in ("One", "Two")
    )
    assert torch.equal(one.norms[:, -1], other.norms[:, -1])


def test_a_model_without_the_phenomenon_is_shown_and_has_no_massive_dimensions(plain):
    assert plain.direction is None and plain.possible == ["direction", "attention"]
    found, facts = plain.sentence(TEXT), plain.layer(1)
    assert found.high_norm == [] and facts.angle_deg == {"L": None, "F": None}
    assert "no direction" in layer_table(plain, found, 1)
    with pytest.raises(ParameterError, match="switch this off"):
        plain.sentence(TEXT, switched_on=("massive",))


def test_what_cannot_be_shown_is_said(exploration):
    for text, said in (("", "type a sentence"), (" \n", "type a sentence"), ("word " * 300, "shorten it")):
        with pytest.raises(TextError, match=said):
            exploration.sentence(text)
    for layer in (0, 7):
        with pytest.raises(ParameterError, match="1 to 6"):
            exploration.layer(layer)
    with pytest.raises(ParameterError, match=", ".join(INTERVENTIONS)):
        exploration.sentence(TEXT, switched_on=("magic",))


def test_a_deep_model_has_frames_of_some_layers_those_of_the_explosion_among_them():
    chosen = chosen_layers(SimpleNamespace(layer_count=80, explosion_layers=[2, 45]))
    assert {1, 2, 45, 80} <= set(chosen) and len(chosen) <= 34 and chosen == sorted(chosen)
    assert chosen_layers(SimpleNamespace(layer_count=3, explosion_layers=[2])) == [1, 2, 3]


def test_tokens_cannot_break_the_table(exploration):
    table = layer_table(exploration, exploration.sentence("a <b> & <script>x"), 1)
    assert "<script" not in table and "<b>x" not in table
