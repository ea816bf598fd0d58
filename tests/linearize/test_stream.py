"""Layers whose residual stream passes norms or has coefficients, against plain formulas."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from sdnb.anatomy import decoder_layers, layer_view
from sdnb.linearize import attention_matrix, branch_scales, closed_form_fit, linear_layer, stream_scales
from tests.families import build
from tests.pretended import GPU, PretendedGPU, put

D, WIDTH = 12, 30


@dataclass(frozen=True)
class Norm:
    gain: Tensor
    bias: Tensor
    centred: bool = False

    def scale(self, x):
        return (x.square().mean(1, keepdim=True) + 1e-6).sqrt()

    def module(self, x):
        return self.gain * x / self.scale(x) + self.bias


@dataclass(frozen=True)
class View:
    """A stand-in for a LayerView, with a linear FFN and without biases."""

    parallel: bool
    attention_matrix: Tensor
    attention_norm: Norm
    ffn: SimpleNamespace
    ffn_norm: Norm
    closing_norm: Norm
    norms_on_stream: tuple[bool, bool]
    skips: tuple[float | Tensor, float | Tensor]
    attention_multiplier: float = 0.7
    ffn_multiplier: float = 1.0
    attention_post_norm: None = None
    ffn_post_norm: None = None
    plain_stream: bool = False

    @property
    def attention_bias(self):
        return torch.zeros(D)

    def attention_inner_scale(self, u):
        return torch.ones(len(u), 1)

    def attention_branch(self, x):
        return 0.7 * self.attention_norm.module(x) @ self.attention_matrix.T

    def ffn_branch(self, y):
        return 2 * self.ffn_norm.module(y) @ self.ffn.w.T @ self.ffn.down.T

    def beside_attention(self, x):
        return self.skips[0] * x

    def beside_ffn(self, y):
        return self.skips[1] * (self.ffn_norm.module(y) if self.norms_on_stream[1] else y)


def streamed(parallel=False):
    """A layer as in BERT, with coefficients too, whose norm-aware view is the layer: its FFN is linear."""
    generator = torch.Generator().manual_seed(5)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def norm():
        return Norm(1 + 0.5 * draw(D), torch.zeros(D))

    w, down = draw(WIDTH, D) / 2, draw(D, WIDTH) / 4
    formula = SimpleNamespace(
        w=w, b=None, v=None, c=None, activation=lambda z: 2 * z, down=down, down_bias=None, inner=None
    )
    skips = (1.0, 0.8) if parallel else (0.9, 1 + 0.3 * draw(D))
    on_stream = (False, not parallel)
    return View(parallel, draw(D, D), norm(), formula, norm(), norm(), on_stream, skips)


@pytest.mark.parametrize("parallel", [False, True])
def test_L_where_the_stream_passes_norms_and_has_coefficients(parallel):
    view = streamed(parallel)
    layer, eye = linear_layer(view), torch.eye(D)
    S1 = torch.diag(torch.as_tensor(view.skips[0]).expand(D))
    S2 = torch.diag(torch.as_tensor(view.skips[1]) * (torch.ones(D) if parallel else view.ffn_norm.gain))
    T = torch.diag(view.closing_norm.gain)
    F = view.ffn.down @ (2 * view.ffn.w) @ torch.diag(view.ffn_norm.gain)
    A = 0.7 * view.attention_matrix @ torch.diag(view.attention_norm.gain)
    expected = T @ (S2 + A + F) if parallel else T @ (S2 + F) @ (S1 + A)
    assert torch.allclose(layer.L, expected, atol=1e-4)
    assert torch.allclose(layer.R, expected - eye, atol=1e-4)
    X = torch.randn(D, 3, generator=torch.Generator().manual_seed(6))
    assert torch.allclose(layer.operator.T @ X, expected.T @ X, atol=1e-3)


@pytest.mark.parametrize("parallel", [False, True])
def test_the_norm_aware_view_of_a_linear_layer_is_the_layer(parallel):
    view = streamed(parallel)
    x = 3 * torch.randn(4, D, generator=torch.Generator().manual_seed(7))
    a = view.attention_branch(x)
    y = x if parallel else view.beside_attention(x) + a
    out = view.closing_norm.module(view.beside_ffn(y) + view.ffn_branch(y) + (a if parallel else 0))
    rho1, rho2 = branch_scales(view, x)
    stream, layer = stream_scales(view, x), linear_layer(view)
    for i, row in enumerate(x):
        L = layer.norm_aware(rho1[i], rho2[i], tuple(scale[i] for scale in stream))
        assert torch.allclose(L @ row, out[i], atol=1e-4)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_divisors_of_rows_on_the_cpu_for_a_layer_on_a_gpu(name):
    model = build(name)
    rows = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(7))
    here = layer_view(model, 2)
    expected = (*branch_scales(here, rows), *stream_scales(here, rows))
    for tensor in (*model.parameters(), *model.buffers()):
        put(tensor)
    with PretendedGPU():
        there = layer_view(model, 2)
        found = (*branch_scales(there, rows), *stream_scales(there, rows))
        assert {scale.device for scale in found} == {GPU}
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["bert", "openai-gpt", "doge"])
def test_L_of_real_families_from_their_weights(name):
    """diag(g2) (I + F') diag(g1) (I + A) where the sum is normed, (diag(r2) + F)(diag(r1) + A) in Doge."""
    model = build(name)
    view, block = layer_view(model, 2), decoder_layers(model)[1]
    ffn, A, eye = view.ffn, attention_matrix(view), torch.eye(view.hidden_size)
    F = ffn.down @ closed_form_fit(ffn.w, ffn.activation, ffn.b, ffn.v, ffn.c)
    if name == "doge":
        F = F @ torch.diag(block.post_attention_layernorm.weight)
        sums = torch.diag(block.post_attention_residual) + F, torch.diag(block.input_residual) + A
        expected = sums[0] @ sums[1]
    else:
        norms = (
            (block.attention.output.LayerNorm, block.output.LayerNorm)
            if name == "bert"
            else (block.ln_1, block.ln_2)
        )
        g1, g2 = (torch.diag(norm.weight) for norm in norms)
        expected = g2 @ (eye + F) @ g1 @ (eye + A)
        assert torch.allclose(A, view.attention_matrix)
    L = linear_layer(view).L
    assert (L - expected).norm() / expected.norm() < 1e-5
    assert (L - (eye + F) @ (eye + A)).norm() / expected.norm() > 0.1
