"""Norms are measured, not read: gain, bias, centring and epsilon of modules written here."""

import pytest
import torch
from torch import nn

from sdnb.layers.watching import measure_norm

D = 24


class PlusOne(nn.RMSNorm):
    """An RMS norm with gain 1 + w, as in Gemma."""

    def forward(self, x):
        return (1 + self.weight) * x / (x.square().mean(-1, keepdim=True) + self.eps).sqrt()


def drawn(module):
    generator = torch.Generator().manual_seed(0)
    for parameter in module.parameters():
        nn.init.normal_(parameter, generator=generator)
    return module.requires_grad_(False)


@pytest.mark.parametrize("epsilon", [1e-5, 1e-6, 1e-12])
@pytest.mark.parametrize("d", [24, 25])
@pytest.mark.parametrize("kind", [nn.LayerNorm, PlusOne])
def test_gain_bias_centring_and_epsilon(kind, epsilon, d):
    module, centred = drawn(kind(d, eps=epsilon)), kind is nn.LayerNorm
    norm = measure_norm("norm", module, torch.zeros(2, d))
    assert norm.centred == centred
    assert torch.allclose(norm.gain, module.weight + (not centred), atol=1e-5)
    assert torch.allclose(norm.bias, module.bias if centred else torch.zeros(d), atol=1e-5)
    assert norm.epsilon == pytest.approx(epsilon, rel=1e-3, abs=1e-11)
    x = torch.randn(5, d, generator=torch.Generator().manual_seed(1)) + 2
    rows = x - x.mean(-1, keepdim=True) if centred else x
    assert torch.allclose(norm.scale(x), (rows.square().mean(-1, keepdim=True) + epsilon).sqrt())
    assert torch.allclose(norm(1e-3 * x), module(1e-3 * x), rtol=1e-4, atol=1e-5)


def test_norm_without_parameters():
    norm = measure_norm("norm", nn.LayerNorm(D, elementwise_affine=False), torch.zeros(2, D))
    assert norm.centred and torch.allclose(norm.gain, torch.ones(D), atol=1e-5)


@pytest.mark.parametrize("module", [nn.Tanh(), drawn(nn.Linear(D, D)), nn.GroupNorm(4, D), nn.Identity()])
def test_what_is_no_norm_is_not_taken_for_one(module):
    assert measure_norm("norm", module, torch.zeros(2, D)) is None
