"""03 on models that are known: what attention adds apart from its matrix, and layers that do not exist."""

import pytest
import torch

from sdnb.anatomy import decoder_layers
from sdnb.errors import ParameterError
from sdnb.loading import load
from sdnb.observations import linearity
from tests.tiny import tiny_model

D = 32
COMMON = {
    "text": ["line one reads a few more words"], "max_lines": 1, "add_special_tokens": True,
    "sample_counts": [],
}  # fmt: skip


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Loaded tiny models by family."""
    made = {}

    def model(family):
        if family not in made:
            folder = tiny_model(tmp_path_factory.mktemp(family) / family, family)
            made[family] = load(str(folder), device="cpu")
        return made[family]

    return model


def test_nothing_is_apart_where_nothing_has_a_bias(models):
    assert linearity(models("llama"), **COMMON).values["attention_intercept"] == [0.0] * 3


@torch.no_grad()
def test_attentions_intercept_beside_what_it_adds(models):
    """From GPT-2's weights: W_O (W_V beta + b_V) + b_O, with beta the bias of the norm."""
    loaded = models("gpt2")
    found = linearity(loaded, **COMMON).values["attention_intercept"]
    ids = loaded.tokenizer(COMMON["text"][0], return_tensors="pt").input_ids
    states = loaded.model(ids, output_hidden_states=True).hidden_states
    for number, block in enumerate(decoder_layers(loaded.model)):
        value, out, norm = block.attn.c_attn, block.attn.c_proj, block.ln_1
        W, b = value.weight[:, 2 * D :], value.bias[2 * D :]
        intercept = (norm.bias @ W + b) @ out.weight + out.bias
        added = (norm(states[number][0]) @ W + b) @ out.weight + out.bias
        expected = intercept.norm() / added.square().sum(1).mean().sqrt()
        assert found[number] == pytest.approx(expected.item(), rel=1e-4) and found[number] > 0.1


@pytest.mark.parametrize("number", [0, 4, 99, -1])
def test_a_layer_to_sample_that_does_not_exist(models, number):
    with pytest.raises(ParameterError, match=rf"sample_layer {number} .* layers 1 to 3"):
        linearity(models("llama"), **COMMON, sample_layer=number)
