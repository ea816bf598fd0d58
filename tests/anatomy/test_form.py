"""Layers of one build are read where the first of them had its parts, and watched anew where that fails."""

import gc
import weakref

import pytest
import torch
from torch import nn

from sdnb.anatomy import decoder_layers, layer_view, reading
from sdnb.anatomy.attention import read_attention
from sdnb.anatomy.probe import LayerProbe
from sdnb.anatomy.trace import find_decoder
from sdnb.anatomy.value_path import find_value_path
from sdnb.anatomy.wiring import find_wiring
from tests.families import build

PATHS = ("llama", "gpt_neox", "gpt2", "falcon_serial", "phi3", "bloom", "gemma2", "opt", "gptj", "mpt")


def watched(model, number):
    probe = LayerProbe(find_decoder(model), number)
    wiring = find_wiring(probe)
    return probe, wiring, find_value_path(probe, wiring)


@pytest.mark.parametrize("name", PATHS)
def test_the_way_of_the_values_gives_the_matrix_of_the_real_module(name):
    probe, wiring, path = watched(build(name), 2)
    assert path is not None
    fast = read_attention(probe, wiring.attention, path=path)
    slow = read_attention(probe, wiring.attention)
    assert (fast.matrix - slow.matrix).norm() < 1e-5 * slow.matrix.norm()
    assert torch.equal(fast.bias, slow.bias)


def test_values_that_are_changed_on_their_way_have_no_path():
    model = build("llama")
    attention = decoder_layers(model)[1].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, out: out.tanh())
    assert watched(model, 2)[2] is not None  # hooks of the user are not copied
    attention.o_proj = nn.Sequential(nn.Tanh(), attention.o_proj)
    assert watched(model, 2)[2] is None


class Doubled(nn.Linear):
    """A linear map with something behind it that no submodule shows."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_projection_with_something_behind_it_is_read_off_the_module():
    model = build("llama")
    attention = decoder_layers(model)[1].self_attn
    plain = layer_view(model, 2)
    attention.o_proj.__class__ = Doubled
    assert watched(model, 2)[2] is None
    view = layer_view(model, 2)
    assert view.status == "exact"
    assert torch.allclose(view.attention_matrix, 2 * plain.attention_matrix, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gpt2", "gemma2", "gptj", "falcon_serial"])
def test_the_second_layer_is_not_watched_and_its_view_is_the_same(name, monkeypatch):
    alone = layer_view(build(name), 2)
    model = build(name)
    layer_view(model, 1)
    monkeypatch.setattr(reading, "find_wiring", None)
    view = layer_view(model, 2)
    assert view.number == 2 and view.status == alone.status == "exact"
    assert view.parallel == alone.parallel
    pairs = [(view.attention_matrix, alone.attention_matrix), (view.attention_bias, alone.attention_bias)]
    pairs += [(getattr(view.ffn, key), getattr(alone.ffn, key)) for key in ("w", "b", "v", "c", "down")]
    for norm in ("attention_norm", "attention_post_norm", "ffn_norm", "ffn_post_norm"):
        ours, theirs = getattr(view, norm), getattr(alone, norm)
        assert (ours is None) == (theirs is None)
        pairs += [] if ours is None else [(ours.gain, theirs.gain), (ours.bias, theirs.bias)]
    assert all((a is None and b is None) or torch.equal(a, b) for a, b in pairs)
    x = view.probe.states()
    assert torch.equal(view.ffn_branch(x), alone.ffn_branch(x))
    assert torch.equal(view.attention_branch(x), alone.attention_branch(x))


def test_a_layer_that_only_looks_alike_is_watched():
    """Both layers hold a plain function, which no name and no shape tells apart."""
    model = build("llama")
    for layer, phi in zip(decoder_layers(model), (nn.functional.silu, nn.functional.relu), strict=False):
        del layer.mlp.act_fn
        layer.mlp.act_fn = phi
    z = torch.linspace(-2, 2, 9)
    assert torch.equal(layer_view(model, 1).ffn.activation(z), nn.functional.silu(z))
    view = layer_view(model, 2)
    assert view.status == "exact" and view.ffn_error < 1e-5
    assert torch.equal(view.ffn.activation(z), nn.functional.relu(z))


def test_what_is_known_of_a_model_holds_no_weights():
    model = build("llama")
    layer = weakref.ref(layer_view(model, 1).probe.layer)
    gc.collect()
    assert layer() is None
    kept = weakref.ref(model)
    del model
    gc.collect()
    assert kept() is None


def test_layers_that_were_exchanged_are_found_anew():
    model, other = build("llama"), build("llama", seed=1)
    first = layer_view(model, 1).attention_matrix
    model.model.layers[0] = other.model.layers[0]
    assert decoder_layers(model)[0] is other.model.layers[0]
    assert not torch.equal(layer_view(model, 1).attention_matrix, first)
