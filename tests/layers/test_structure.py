"""Layers built alike are read where the first of them had its parts, watched anew where that fails."""

import gc
import weakref
from dataclasses import dataclass, fields, is_dataclass, replace

import pytest
import torch
from torch import nn

from sdnb.layers import decoder_layers, layer_view, reading
from sdnb.layers.decoder import IsolatedLayer, find_decoder
from sdnb.layers.reading import find_values, read_attention
from sdnb.layers.watching import watch_layer
from tests.families import build


def by_weights_and_by_probing(model, number=2):
    """Where the values are, and attention's matrix both ways."""
    view = watch_layer(IsolatedLayer(find_decoder(model), number))
    values = find_values(view)
    found = [replace(view, structure=replace(view.structure, values=way)) for way in (values, None)]
    return values, *(read_attention(view).attention for view in found)


@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox", "gpt2", "falcon_serial", "phi3", "bloom", "gemma2", "opt", "gptj", "mpt"]
)
def test_the_weights_give_the_matrix_of_the_real_module(name):
    values, fast, slow = by_weights_and_by_probing(build(name))
    assert values is not None
    assert (fast.matrix - slow.matrix).norm() < 1e-5 * slow.matrix.norm()
    assert torch.equal(fast.bias, slow.bias)


def test_values_that_are_copied_unequally_often():
    model = build("llama")
    attention = decoder_layers(model)[1].self_attn
    with torch.no_grad():  # two equal rows: all their copies match the first of them
        attention.v_proj.weight[1] = attention.v_proj.weight[0]
        attention.v_proj.bias[1] = attention.v_proj.bias[0]
    (_, entries), fast, slow = by_weights_and_by_probing(model)
    assert len(entries.unique(return_counts=True)[1].unique()) > 1
    assert (fast.matrix - slow.matrix).norm() < 1e-5 * slow.matrix.norm()


def test_values_that_are_changed_on_their_way_are_not_read_off_the_weights():
    model = build("llama")
    attention = decoder_layers(model)[1].self_attn
    attention.v_proj.register_forward_hook(lambda module, args, out: out.tanh())
    assert by_weights_and_by_probing(model)[0] is not None  # hooks of the user are not copied
    attention.o_proj = nn.Sequential(nn.Tanh(), attention.o_proj)
    assert by_weights_and_by_probing(model)[0] is None


class Changed(nn.Linear):
    """A linear map with something behind or beside it that no submodule shows."""

    def forward(self, x):
        return self.change(self, x, super().forward(x))


def with_changed_projections(*changes):
    """A model with `change(module, x, W x + b)` in place of W x + b in layer 1, then in layer 2."""
    model = build("llama")
    for layer, change in zip(decoder_layers(model), changes, strict=False):
        layer.self_attn.o_proj.__class__, layer.self_attn.o_proj.change = Changed, change
    return model


def unchanged(module, x, y):
    return y


@pytest.mark.parametrize(("change", "least", "most"), [
    (lambda module, x, y: 2 * y, 0.999, 1.001),
    (lambda module, x, y: y + 5e-5 * x.roll(1, -1) @ module.weight.T, 4e-5, 6e-5),
])  # fmt: skip
def test_what_stands_behind_or_beside_the_projection_is_in_the_matrix(change, least, most):
    plain = layer_view(build("llama"), 2).attention.matrix
    view = layer_view(with_changed_projections(unchanged, change), 2)
    assert view.status == "exact" and view.structure.values is None
    assert least < (view.attention.matrix - plain).norm() / plain.norm() < most


@pytest.mark.parametrize(
    "name", ["llama", "gpt_neox", "gpt2", "gemma2", "gptj", "falcon_serial", "granite", "bert", "doge"]
)
def test_the_second_layer_is_not_watched_and_its_view_is_the_same(name, monkeypatch):
    alone, model = layer_view(build(name), 2), build(name)
    layer_view(model, 1)
    monkeypatch.setattr(reading, "watch_layer", None)
    view = layer_view(model, 2)
    assert (view.number, view.status, view.parallel) == (2, "exact", alone.parallel)
    pairs = zip(numbers(view.attention, view.ffn), numbers(alone.attention, alone.ffn), strict=True)
    assert all(torch.equal(torch.as_tensor(one), torch.as_tensor(other)) for one, other in pairs)
    x = view.isolated.states()
    assert torch.equal(view.ffn_branch(x), alone.ffn_branch(x))
    assert torch.equal(view.attention_branch(x), alone.attention_branch(x))


def numbers(*values):
    """All numbers in dataclasses, depth first, but errors."""
    for value in values:
        if is_dataclass(value):
            names = [field.name for field in fields(value) if "error" not in field.name]
            yield from numbers(*(getattr(value, name) for name in names))
        elif torch.is_tensor(value) or isinstance(value, float):
            yield value


def test_a_layer_that_only_looks_alike_gets_its_own_activation():
    """Both layers hold a plain function, which no name and no shape tells apart."""
    model = build("llama")
    for layer, phi in zip(decoder_layers(model), (nn.functional.silu, nn.functional.relu), strict=False):
        del layer.mlp.act_fn
        layer.mlp.act_fn = phi
    z = torch.linspace(-2, 2, 9)
    assert torch.equal(layer_view(model, 1).ffn.formula.activation(z), nn.functional.silu(z))
    view = layer_view(model, 2)
    assert view.status == "exact" and view.ffn.error < 1e-5
    assert torch.equal(view.ffn.formula.activation(z), nn.functional.relu(z))


@pytest.mark.parametrize("bend", [0.3, 3e-5])
def test_a_layer_that_does_not_fit_up_to_rounding_is_watched(bend):
    changes = unchanged, lambda module, x, y: y + bend * y.abs()
    alone, model = layer_view(with_changed_projections(*changes), 2), with_changed_projections(*changes)
    assert layer_view(model, 1).status == "exact"
    view = layer_view(model, 2)
    assert view.status == alone.status == ("approximate" if bend > 1e-3 else "exact")
    assert torch.equal(view.attention.matrix, alone.attention.matrix)


@dataclass
class Scaled:
    """An activation that cannot be hashed, and reaches a module."""

    slope: float
    module: nn.Module

    def __call__(self, x):
        return self.slope * nn.functional.silu(x)


def test_what_is_known_of_a_model_keeps_nothing_of_it():
    model = build("llama")
    for layer in decoder_layers(model):
        del layer.mlp.act_fn
        layer.mlp.act_fn = Scaled(1.0, layer.mlp)
    view = layer_view(model, 1)
    assert view.status == layer_view(model, 2).status == "exact"
    copies = [weakref.ref(module) for module in view.isolated.layer.modules()]
    del view, layer
    gc.collect()
    assert not any(copy() for copy in copies)
    pruned = weakref.ref(decoder_layers(model)[-1])
    decoder_layers(model)[0].register_forward_hook(lambda *_, whole=model: whole.config and None)
    model.model.layers = model.model.layers[:1]
    kept = weakref.ref(model)
    gc.collect()
    assert pruned() is None
    del model
    gc.collect()
    assert kept() is None


def test_layers_that_were_exchanged_are_found_anew():
    model, other = build("llama"), build("llama", seed=1)
    matrix = layer_view(model, 1).attention.matrix
    model.model.layers[0] = other.model.layers[0]
    assert decoder_layers(model)[0] is other.model.layers[0]
    assert not torch.equal(layer_view(model, 1).attention.matrix, matrix)
