"""The fingerprint of the weights."""

import pytest
import torch

from sdnb import load
from sdnb.loading import weights_fingerprint
from tests.tiny import tiny_model


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("org") / "model", layers=2)


def test_the_fingerprint_sees_every_bit_and_every_place(good):
    model = load(str(good), device="cpu").model
    first = weights_fingerprint(model)
    assert first == weights_fingerprint(load(str(good), device="cpu").model)
    weight = model.model.layers[1].mlp.down_proj.weight
    seen = {first}
    for change in (
        lambda: weight.view(torch.int32).__setitem__((3, 17), weight.view(torch.int32)[3, 17] ^ 1),
        lambda: weight.copy_(weight.flip(0)),  # the same numbers in other places
        lambda: weight.copy_(weight.roll(2, 1)),
    ):
        change()
        seen.add(weights_fingerprint(model))
    assert len(seen) == 4


def test_the_fingerprint_sees_names_dtypes_and_shapes(good):
    model = load(str(good), device="cpu").model
    seen = {weights_fingerprint(model)}
    first, second = model.model.layers
    model.model.layers[0], model.model.layers[1] = second, first
    seen.add(weights_fingerprint(model))
    attention = model.model.layers[0].self_attn
    attention.q_proj.weight = torch.nn.Parameter(attention.q_proj.weight.reshape(16, -1), requires_grad=False)
    seen.add(weights_fingerprint(model))
    seen.add(weights_fingerprint(model.bfloat16()))
    assert len(seen) == 4


def test_tied_weights_count_once(tmp_path):
    tied = load(str(tiny_model(tmp_path / "tied", tie_word_embeddings=True)), device="cpu").model
    first = weights_fingerprint(tied)
    tied.lm_head.weight = torch.nn.Parameter(tied.lm_head.weight.clone(), requires_grad=False)
    assert weights_fingerprint(tied) != first
