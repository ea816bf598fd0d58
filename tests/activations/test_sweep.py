"""Sweeps against plain full forward passes, one sequence at a time, on every family of the contract test."""

import dataclasses

import pytest
import torch
from torch import nn

import sdnb
from sdnb.activations import sweep
from sdnb.errors import ParameterError
from sdnb.layers import decoder_layers, layer_view, residual_branches
from tests.families import FAMILIES, LAYERS, STREAMED, build
from tests.tiny import build as plain

ITEMS = torch.arange(3, 15)
SOME = ("llama", "gpt_neox", "opt", "falcon", "gpt2", "gemma2")


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    """Ten sequences in a forward pass, so that there are several."""
    monkeypatch.setattr(sweep, "batch_size", lambda model, tokens=1: 10)


@pytest.fixture(params=SOME)
def model(request):
    return build(request.param)


@pytest.fixture(params=[*FAMILIES, *STREAMED])
def any_model(request):
    return build(request.param)


def full_pass(model, sequence):
    """Hidden states of a pass of the whole model, head included; the last one is behind the final norm."""
    return model(sequence[None], output_hidden_states=True, use_cache=False).hidden_states


def test_norms_equal_a_plain_full_forward_pass_with_and_without_attention(any_model):
    for layer in range(LAYERS):
        expected = torch.stack([full_pass(any_model, item[None])[layer][0, -1].norm() for item in ITEMS])
        with_attention = sdnb.item_norms(any_model, layer, ITEMS)
        torch.testing.assert_close(with_attention, expected, rtol=1e-5, atol=0)
    with sdnb.zero_attention(any_model):
        expected = torch.stack([full_pass(any_model, item[None])[1][0, -1].norm() for item in ITEMS])
        found = sdnb.item_norms(any_model, 1, ITEMS)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0)
    assert (with_attention / expected - 1).abs().max() > 0.01


@pytest.mark.parametrize("prefix", [torch.tensor([7, 9]), torch.arange(30, 42)[:, None]])
def test_a_prefix_stands_before_each_item(model, prefix):
    prefixes = prefix.expand(len(ITEMS), prefix.shape[-1])
    sequences = [torch.cat([before, item[None]]) for before, item in zip(prefixes, ITEMS, strict=True)]
    states = [full_pass(model, sequence) for sequence in sequences]
    paths = sdnb.item_trajectories(model, ITEMS, prefix)
    assert paths.shape == (LAYERS + 1, len(ITEMS))
    for layer in range(LAYERS):
        expected = torch.stack([s[layer][0, -1].norm() for s in states])
        torch.testing.assert_close(paths[layer], expected, rtol=1e-4, atol=0)
        found = sdnb.item_norms(model, layer, ITEMS, prefix=prefix)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=0)


def test_random_embeddings_equal_a_plain_forward_pass(model, monkeypatch):
    count, length, generator = 1030, 3.5, torch.Generator().manual_seed(4)  # more than one draw
    found = sdnb.random_norms(model, 1, count, length, seed=4)
    monkeypatch.setattr(sweep, "batch_size", lambda model, tokens=1: 515)
    again = sdnb.random_norms(model, 1, count, length, seed=4)
    torch.testing.assert_close(found, again, rtol=1e-4, atol=0)  # the draw does not depend on the batch
    assert not torch.allclose(found, sdnb.random_norms(model, 1, count, length, seed=5))
    rows = torch.randn(1024, model.get_input_embeddings().weight.shape[1], generator=generator)
    rows = length * nn.functional.normalize(rows[:9], dim=1)
    states = model(inputs_embeds=rows[:, None], output_hidden_states=True, use_cache=False).hidden_states
    torch.testing.assert_close(found[:9], states[1][:, 0].norm(dim=1), rtol=1e-4, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_coefficients_equal_what_the_norm_is_given(family):
    model = build(family)
    layer, direction = 2, torch.randn(32, generator=torch.Generator().manual_seed(0))
    view = layer_view(model, layer)
    norm = view.ffn.norm
    for prefix in (None, torch.tensor([7])):
        found = sdnb.ffn_input_coefficients(model, layer, 5 * direction, ITEMS, prefix=prefix)
        for i, item in enumerate(ITEMS[:2].tolist()):
            # Another way to the FFN's input: what the layer gives without its FFN, or its own input.
            with sdnb.zero_branch(model, "ffn", [layer]):
                states = sdnb.hidden_states(model, torch.tensor([[item] if prefix is None else [7, item]]))
            x = states[layer - view.parallel, 0, -1]
            assert torch.isclose(found.raw[i], x @ direction / direction.norm(), rtol=1e-3, atol=1e-4)
            normed = x / x.square().mean().sqrt()
            if norm is not None:
                normed = (norm(x[None])[0] - norm.bias) / norm.gain
            expected = normed @ direction / direction.norm()
            assert torch.isclose(found.normalised[i], expected, rtol=1e-3, atol=1e-4)


def test_embedding_norms():
    model = build("llama")
    torch.testing.assert_close(
        sdnb.embedding_norms(model, ITEMS), model.model.embed_tokens.weight[ITEMS].norm(dim=1)
    )
    scaled = build("gemma3_text")
    expected = scaled.model.embed_tokens.weight[ITEMS].norm(dim=1) * 32**0.5
    torch.testing.assert_close(sdnb.embedding_norms(scaled, ITEMS), expected, rtol=1e-3, atol=0)


@pytest.mark.parametrize("branch", ["attention", "ffn"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gemma2", "bert"])
def test_a_sweep_goes_through_interventions(family, branch):
    model = build(family)
    with sdnb.zero_branch(model, branch, [2]):
        expected = torch.stack(
            [sdnb.hidden_states(model, item[None, None])[2, 0, -1].norm() for item in ITEMS]
        )
        torch.testing.assert_close(sdnb.item_norms(model, 2, ITEMS), expected, rtol=1e-5, atol=0)
    assert not torch.allclose(sdnb.item_norms(model, 2, ITEMS), expected, rtol=1e-3)


@pytest.mark.parametrize("family", [*SOME, "olmo2", "granite", "bert", "doge"])
def test_the_value_path_of_many_items_equals_plain_forward_passes(family, monkeypatch):
    model = build(family)
    branch = residual_branches(model, [LAYERS])[0].ffn
    for reader in (branch.norm or branch.inputs[0], None):
        expected = torch.cat([*sweep._rows(model, LAYERS, ITEMS[:, None], reader)])
        rows = sweep._by_value_path(model, LAYERS, ITEMS[:, None], reader)
        assert ((rows - expected).norm(dim=1) / expected.norm(dim=1)).max() < 1e-5
    monkeypatch.setattr(sweep, "MANY", len(ITEMS))
    taken, real = [], sweep._step
    monkeypatch.setattr(sweep, "_step", lambda *given: taken.append(given) or real(*given))
    torch.testing.assert_close(sdnb.item_norms(model, LAYERS, ITEMS), expected.norm(dim=1), rtol=1e-5, atol=0)
    assert taken


def test_what_the_value_path_does_not_fit_goes_the_plain_way(monkeypatch):
    model = build("llama")
    with sdnb.set_dimensions(model, {1: {3: 9.0}}):  # a hook that the views would not see
        assert sweep._by_value_path(model, 2, ITEMS[:, None], None) is None
    assert sweep._by_value_path(build("llama", dtype=torch.bfloat16), 2, ITEMS[:, None], None) is None
    view = sweep.layer_view(model, 2)
    for other in (dataclasses.replace(view, status="approximate"), view):  # inexact, or another layer's
        monkeypatch.setattr(sweep, "layer_view", lambda *_, other=other: other)
        assert sweep._by_value_path(model, 1, ITEMS[:, None], None) is None


def test_no_layer_after_the_one_that_is_read_is_run(monkeypatch):
    model = plain("llama", layers=5)
    calls = []
    decoder_layers(model)  # the pass that finds them
    for number, layer in enumerate(decoder_layers(model), start=1):
        layer.register_forward_hook(lambda m, a, r, number=number: calls.append(number))
    model.lm_head.register_forward_hook(lambda m, a, r: calls.append("head"))
    sdnb.item_norms(model, 3, ITEMS)
    sdnb.random_norms(model, 3, 20, 1.0)
    sdnb.ffn_input_coefficients(model, 2, torch.ones(32), ITEMS)
    assert set(calls) == {1, 2, 3}


def test_a_sample_of_the_vocabulary_and_its_standard_error():
    model = plain("llama", layers=1, vocabulary=5000)
    sample = sdnb.vocabulary_sample(model)
    assert len(sample.items) == 4096 and sample.size == 5000 and sample.items.unique().equal(sample.items)
    assert torch.equal(sample.items, sdnb.vocabulary_sample(model).items)
    assert not torch.equal(sample.items, sdnb.vocabulary_sample(model, seed=1).items)
    whole = sdnb.vocabulary_sample(model, items=10**9)
    property_ = torch.rand(5000, generator=torch.Generator().manual_seed(0)) < 0.3
    truth, error = whole.share(property_[whole.items])
    assert error == 0
    samples = [sdnb.vocabulary_sample(model, 400, seed) for seed in range(300)]
    shares, errors = zip(*(part.share(property_[part.items]) for part in samples), strict=True)
    away = torch.tensor(shares) - truth
    assert away.square().mean().sqrt() == pytest.approx(sum(errors) / 300, rel=0.1)
    with pytest.raises(ParameterError, match="items"):
        sdnb.vocabulary_sample(model, 0)
    with pytest.raises(ParameterError, match="0 to 1"):
        sdnb.item_norms(model, 2, ITEMS)
