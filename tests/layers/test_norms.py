"""Norms are measured, not read: gain, bias, centring and epsilon of modules written here."""

import pytest
import torch
from torch import nn

from sdnb.layers.norms import measure_norm

D = 24


class PlusOne(nn.Module):
    """An RMS norm with gain 1 + w, as in Gemma."""

    def __init__(self, w, epsilon):
        super().__init__()
        self.w, self.epsilon = nn.Parameter(w), epsilon

    def forward(self, x):
        return (1 + self.w) * x / (x.square().mean(-1, keepdim=True) + self.epsilon).sqrt()


def measured(module, d=D):
    return measure_norm("norm", module, torch.zeros(2, d))


def drawn(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module.requires_grad_(False)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("d", [24, 25])
def test_layer_norm(epsilon, d):
    module = drawn(nn.LayerNorm(d, eps=epsilon))
    norm = measured(module, d)
    assert norm.centred
    assert torch.allclose(norm.gain, module.weight, atol=1e-5)
    assert torch.allclose(norm.bias, module.bias, atol=1e-5)
    assert norm.epsilon == pytest.approx(epsilon, rel=1e-3, abs=1e-11)
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(1))
    expected = ((x - x.mean(-1, keepdim=True)).square().mean(-1, keepdim=True) + epsilon).sqrt()
    assert torch.allclose(norm.scale(x), expected)
    assert torch.allclose(norm(1e-3 * x), module(1e-3 * x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6])
def test_rms_norm_with_one_added_to_the_weight(epsilon):
    module = drawn(PlusOne(torch.empty(D), epsilon))
    norm = measured(module)
    assert not norm.centred
    assert torch.allclose(norm.gain, 1 + module.w, atol=1e-5)
    assert norm.bias.abs().max() < 1e-6
    x = torch.randn(5, D, generator=torch.Generator().manual_seed(1)) + 2
    assert torch.allclose(norm.scale(x), (x.square().mean(-1, keepdim=True) + epsilon).sqrt())


def test_norm_without_parameters():
    norm = measured(nn.LayerNorm(D, elementwise_affine=False))
    assert norm.centred and torch.allclose(norm.gain, torch.ones(D), atol=1e-5)


@pytest.mark.parametrize("module", [nn.Tanh(), drawn(nn.Linear(D, D)), nn.GroupNorm(4, D), nn.Identity()])
def test_what_is_no_norm_is_not_taken_for_one(module):
    assert measured(module) is None
