"""Observation 09 on a planted defect: each intervention removes it, and the model is untouched afterwards."""

import math

import pytest
import torch

from sdnb.activations import hidden_norms, perplexity
from sdnb.errors import ParameterError
from sdnb.loading import load
from sdnb.observations.interventions import interventions, massive_means
from tests.tiny import planted_model, tiny_model

TEXT = [f"line {word} reads a few more words" for word in ("one", "two", "three", "four", "five", "six")]
COMMON = {"text": TEXT, "max_lines": 6, "add_special_tokens": True, "new_tokens": 5, "window": 32}


@pytest.fixture(scope="module", params=["llama", "gpt_neox", "gpt2"])
def planted(request, tmp_path_factory):
    truth = planted_model(tmp_path_factory.mktemp(request.param) / "planted", request.param)
    return truth, load(str(truth.folder), device="cpu")


@pytest.fixture(scope="module")
def found(planted):
    return interventions(planted[1], **COMMON)


def test_projecting_the_direction_out_prevents_the_explosion(planted, found):
    truth, _ = planted
    groups = found.values["interventions"]
    assert found.values["explosion_layer"] == truth.explosion_layer
    intact = groups["none"]
    assert math.isclose(intact["peak_norm"], truth.peak_norm, rel_tol=0.05)
    assert math.isclose(intact["first_norm"], truth.peak_norm, rel_tol=0.1)
    projected = groups[f"direction out, layer {truth.explosion_layer}"]
    assert projected["peak_norm"] < 0.1 * intact["peak_norm"]
    assert projected["perplexity"] != intact["perplexity"]


def test_curves_are_the_models_own(planted, found):
    _, loaded = planted
    names = list(found.values["interventions"])
    assert found.arrays["first_norms"].shape == found.arrays["other_norms"].shape == (len(names), 7)
    begin = loaded.tokenizer.bos_token_id
    lines = [
        torch.tensor([begin, *loaded.tokenizer(line, add_special_tokens=False).input_ids]) for line in TEXT
    ]
    norms = [hidden_norms(loaded.model, line[None])[:, 0] for line in lines]
    expected = torch.stack([n[:, 0] for n in norms]).mean(0)
    torch.testing.assert_close(found.arrays["first_norms"][0], expected, rtol=1e-4, atol=0)
    expected = torch.cat([n[:, 1:] for n in norms], dim=1).median(dim=1).values
    torch.testing.assert_close(found.arrays["other_norms"][0], expected, rtol=1e-4, atol=0)
    ids = torch.tensor(loaded.tokenizer("\n\n".join(TEXT), add_special_tokens=False).input_ids)
    own = perplexity(loaded.model, ids, window=32, begin_token=begin).value
    assert math.isclose(found.values["interventions"]["none"]["perplexity"], own, rel_tol=1e-6)


def test_massive_dimensions_are_overwritten(planted):
    _, loaded = planted
    dimensions = list(range(64))
    groups = interventions(loaded, **COMMON, massive_dimensions=dimensions).values["interventions"]
    assert groups["massive dimensions to zero"]["first_norm"] < 0.7 * groups["none"]["first_norm"]
    mean = groups["massive dimensions to mean"]["first_norm"]
    assert math.isclose(mean, groups["none"]["first_norm"], rel_tol=0.02)


def test_massive_dimensions_hold_most_of_the_state(planted):
    truth, loaded = planted
    lines = [torch.tensor([0, 10 + i, 20 + i]) for i in range(5)]
    layer = truth.explosion_layer
    limits = torch.full((7,), truth.peak_norm / 2)
    dimensions, means = massive_means(loaded, lines, [layer], limits, None)
    assert len(dimensions) == 10, "a random direction is spread over all dimensions"
    assert torch.cosine_similarity(means[layer].float(), truth.direction, dim=0).abs() > 0.99
    largest = truth.direction.abs().argsort(descending=True)[:10]
    assert len(set(dimensions) & set(largest.tolist())) >= 8
    assert massive_means(loaded, lines, [layer], torch.full((7,), 1e9), None) is None


@torch.no_grad()
def test_massive_dimensions_are_overwritten_at_a_smaller_step_too(tmp_path):
    truth = planted_model(tmp_path / "planted", size=300.0, decay_layer=6)
    loaded = load(str(truth.folder), device="cpu")
    layer = loaded.model.model.layers[3]
    for matrix in (layer.mlp.gate_proj, layer.mlp.up_proj):
        matrix.weight[0] = truth.direction / layer.post_attention_layernorm.weight
    layer.mlp.down_proj.weight[:, 0] = 700 / 64 * truth.direction  # a unit that is given 8 answers 8 * 8
    found = interventions(loaded, **COMMON)
    assert found.values["explosion_layers"] == [4, 2]
    row = list(found.values["interventions"]).index("massive dimensions to zero")
    norms = found.arrays["first_norms"][:, 2]
    left = (1 - found.values["massive_share"]) ** 0.5
    assert left < 0.8 and norms[row] / norms[0] == pytest.approx(left, rel=0.05)


@pytest.mark.parametrize("dimensions", [[], [9999], [3, -1]])
def test_dimensions_that_do_not_exist_are_refused(planted, dimensions):
    with pytest.raises(ParameterError, match=r"massive_dimensions.*0 to 63, or null"):
        interventions(planted[1], **COMMON, massive_dimensions=dimensions)


def test_the_model_is_untouched(planted):
    _, loaded = planted
    before = {name: tensor.clone() for name, tensor in loaded.model.state_dict().items()}
    interventions(loaded, **COMMON)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in loaded.model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in loaded.model.state_dict().items())


def test_without_attention_and_without_the_phenomenon(found, tmp_path):
    groups = found.values["interventions"]
    assert next(iter(groups)) == "none" and list(groups)[-1] == "attention zeroed"
    assert all(0 <= group["sink_rate"] <= 1 for group in groups.values())
    assert all(isinstance(group["continuation"], str) for group in groups.values())
    plain = load(str(tiny_model(tmp_path / "plain")), device="cpu")
    values = interventions(plain, **COMMON).values
    assert values["explosion_layer"] is None and values["massive_dimensions"] == []
    assert len(values["interventions"]) == 3 and values["massive_share"] is None
