"""Layers of one build are read where the first of them had its parts, and watched anew where that fails."""

import gc
import weakref
from contextlib import suppress
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from sdnb.errors import LayerUnsupported
from sdnb.layers import decoder_layers, layer_view, reading
from sdnb.layers.attention import read_attention
from sdnb.layers.probe import LayerProbe
from sdnb.layers.trace import find_decoder
from sdnb.layers.value_path import find_value_path
from sdnb.layers.wiring import find_wiring
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


def holding(model):
    """A hook that reaches the model."""
    return lambda *_: model.config and None


def test_what_is_known_of_a_model_keeps_nothing_of_it():
    model = build("llama")
    copies = [weakref.ref(module) for module in layer_view(model, 1).probe.layer.modules()]
    gc.collect()
    assert not any(copy() for copy in copies)
    pruned = weakref.ref(decoder_layers(model)[-1])
    decoder_layers(model)[0].register_forward_hook(holding(model))
    model.model.layers = model.model.layers[:1]
    kept = weakref.ref(model)
    gc.collect()
    assert pruned() is None
    del model
    gc.collect()
    assert kept() is None


def silu_beside(module):
    """An activation that reaches a module."""
    return lambda x: nn.functional.silu(x) if module else x


def test_an_activation_that_may_hold_weights_makes_no_form():
    model = build("llama")
    for layer in decoder_layers(model):
        del layer.mlp.act_fn
        layer.mlp.act_fn = silu_beside(layer.mlp)
    assert layer_view(model, 1).status == "exact"
    assert not reading._forms[model]


@dataclass
class Scaled:
    """An activation that cannot be hashed."""

    slope: float

    def __call__(self, x):
        return self.slope * nn.functional.silu(x)


def test_an_activation_need_not_be_hashable():
    model = build("llama")
    del decoder_layers(model)[0].mlp.act_fn
    decoder_layers(model)[0].mlp.act_fn = Scaled(1.0)
    assert layer_view(model, 1).status == "exact"


class Bent(nn.Linear):
    """A linear map with a bend that neither its class nor its shapes show."""

    bend = 0.0

    def forward(self, x):
        y = super().forward(x)
        return y + self.bend * y.abs()


@pytest.mark.parametrize("bend", [0.3, 3e-5])
def test_a_layer_that_does_not_fit_the_form_up_to_rounding_is_watched(bend):
    def bent():
        model = build("llama")
        for layer, size in zip(decoder_layers(model), (0.0, bend), strict=False):
            layer.self_attn.o_proj.__class__ = Bent
            layer.self_attn.o_proj.bend = size
        return model

    alone, model = layer_view(bent(), 2), bent()
    assert layer_view(model, 1).status == "exact"
    view = layer_view(model, 2)
    assert view.status == alone.status == ("approximate" if bend > 1e-3 else "exact")
    assert torch.equal(view.attention_matrix, alone.attention_matrix)


class Sided(nn.Linear):
    """A linear map with a small one beside it."""

    def forward(self, x):
        return super().forward(x) + 5e-5 * x.roll(1, -1) @ self.weight.T


def test_a_small_map_beside_the_projection_is_in_the_matrix():
    model = build("llama")
    plain = layer_view(model, 2).attention_matrix
    decoder_layers(model)[1].self_attn.o_proj.__class__ = Sided
    moved = (layer_view(model, 2).attention_matrix - plain).norm() / plain.norm()
    assert 4e-5 < moved < 6e-5


def test_values_that_are_copied_unequally_often():
    model = build("llama")
    attention = decoder_layers(model)[1].self_attn
    with torch.no_grad():  # two equal rows: all their copies match the first of them
        attention.v_proj.weight[1] = attention.v_proj.weight[0]
        attention.v_proj.bias[1] = attention.v_proj.bias[0]
    probe, wiring, path = watched(model, 2)
    counts = path.entries.unique(return_counts=True)[1]
    assert len(counts.unique()) > 1
    fast, slow = (read_attention(probe, wiring.attention, path=way).matrix for way in (path, None))
    assert (fast - slow).norm() < 1e-5 * slow.norm()


def test_another_default_dtype_leaves_no_trace():
    torch.set_default_dtype(torch.float64)
    try:
        with suppress(LayerUnsupported):
            layer_view(build("mistral"), 1)
    finally:
        torch.set_default_dtype(torch.float32)
    assert layer_view(build("mistral"), 2).status == "exact"


class InPlace(LlamaDecoderLayer):
    """A layer that writes into its input before it reads it."""

    def forward(self, hidden_states, **kwargs):
        return super().forward(hidden_states.mul_(1.5), **kwargs)


def test_a_layer_that_writes_into_its_input_spoils_nothing():
    before = layer_view(build("llama"), 1).probe.states()
    model = build("llama")
    decoder_layers(model)[0].__class__ = InPlace
    with suppress(LayerUnsupported):
        layer_view(model, 1)
    assert torch.equal(layer_view(build("llama"), 1).probe.states(), before)


class Wrapper(nn.Module):
    """Passes everything on."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, *args, **kwargs):
        return self.inner(*args, **kwargs)


def test_layers_that_moved_are_found_anew():
    model = build("llama")
    layers = decoder_layers(model)
    model.model = Wrapper(model.model)
    assert decoder_layers(model) == layers


def test_layers_that_were_exchanged_are_found_anew():
    model, other = build("llama"), build("llama", seed=1)
    first = layer_view(model, 1).attention_matrix
    model.model.layers[0] = other.model.layers[0]
    assert decoder_layers(model)[0] is other.model.layers[0]
    assert not torch.equal(layer_view(model, 1).attention_matrix, first)
