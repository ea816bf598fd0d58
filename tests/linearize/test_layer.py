"""A layer's matrices against plain formulas, on made-up layers and on real families."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdnb.errors import ParameterError
from sdnb.layers import decoder_layers, layer_view
from sdnb.linearize import (
    apply_linear,
    attention_intercept,
    attention_matrix,
    branch_scales,
    closed_form_fit,
    linear_layer,
    stream_scales,
)
from tests.families import build
from tests.pretended import GPU, PretendedGPU, put

D, WIDTH = 12, 30
CENTRING = torch.eye(D) - 1 / D


@dataclass(frozen=True)
class Norm:
    gain: Tensor
    bias: Tensor
    centred: bool

    def scale(self, x):
        x = x - x.mean(1, keepdim=True) if self.centred else x
        return (x.square().mean(1, keepdim=True) + 1e-6).sqrt()

    def __call__(self, x):
        return self.gain * (x - x.mean(1, keepdim=True) if self.centred else x) / self.scale(x) + self.bias


class View:
    """A layer with the attributes of a LayerView, made of small random tensors."""

    def __init__(self, gated=True, centred=False, parallel=False, plain=True, linear=False):
        generator = torch.Generator().manual_seed(0)

        def draw(*shape):
            return torch.randn(*shape, generator=generator)

        def norm(bias=0.3):
            return Norm(1 + 0.5 * draw(D), bias * draw(D), centred)

        self.hidden_size, self.parallel, self.plain_residual = D, parallel, plain
        w, b, down = draw(WIDTH, D) / 2, draw(WIDTH), draw(D, WIDTH) / 4
        v, c = (draw(WIDTH, D), draw(WIDTH)) if gated else (None, None)
        phi, bias = functional.silu, 0.3
        if linear:  # no constant anywhere, so that the norm-aware view is the layer
            phi, b, c, bias = (lambda g: 2 * g), None, None, 0.0

        def inner(x):
            return phi(functional.linear(x, w, b)) * (functional.linear(x, v, c) if gated else 1)

        formula = SimpleNamespace(w=w, b=b, v=v, c=c, activation=phi, down=down, inner=inner)
        self.attention = SimpleNamespace(
            matrix=draw(D, D), bias=draw(D) * bias, norm=norm(bias), post_norm=norm(bias), multiplier=0.7,
            norm_on_residual=False, residual_scale=1.0 if parallel or plain else 0.9,
        )  # fmt: skip
        self.ffn = SimpleNamespace(
            formula=formula, norm=norm(bias), post_norm=norm(bias), multiplier=1.3,
            norm_on_residual=not (parallel or plain), residual_scale=1.0 if plain else 1 + 0.3 * draw(D),
        )  # fmt: skip
        self.output_norm = None if plain else norm(bias)

    def attention_module(self, u):
        return u @ self.attention.matrix.T + self.attention.bias

    def ffn_module(self, u):
        return self.inner(u) @ self.formula.down.T

    @property
    def formula(self):
        return self.ffn.formula

    def inner(self, u):
        return self.formula.inner(u)

    def attention_inner_scale(self, u):
        return torch.ones(len(u), 1)

    def attention_branch(self, x):
        return added(self.attention, self.attention_module, x)

    def ffn_branch(self, x):
        return added(self.ffn, self.ffn_module, x)

    def attention_residual(self, x):
        return residual(self.attention, x)

    def ffn_residual(self, x):
        return residual(self.ffn, x)

    def layer(self, x):
        a = self.attention_branch(x)
        y = x if self.parallel else self.attention_residual(x) + a
        out = self.ffn_residual(y) + self.ffn_branch(y) + (a if self.parallel else 0)
        return out if self.output_norm is None else self.output_norm(out)


def added(branch, module, x):
    y = module(x if branch.norm is None else branch.norm(x))
    return branch.multiplier * (y if branch.post_norm is None else branch.post_norm(y))


def residual(branch, x):
    return branch.residual_scale * (branch.norm(x) if branch.norm_on_residual else x)


def rows(count=5, seed=1):
    return 3 * torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) + 1


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_A_is_multiplier_gains_and_module(centred, centre):
    view = View(centred=centred)
    C, attention = CENTRING if centre and centred else torch.eye(D), view.attention
    expected = 0.7 * torch.diag(attention.post_norm.gain) @ C @ attention.matrix
    expected = expected @ torch.diag(attention.norm.gain) @ C
    assert torch.allclose(attention_matrix(view, centre), expected, atol=1e-6)


@pytest.mark.parametrize("post_norm", [False, True])
def test_A_predicts_the_real_branch_once_its_divisors_and_intercept_are_put_back(post_norm):
    view, x = View(centred=not post_norm, parallel=True), rows()
    if not post_norm:
        view.attention.post_norm = None
    rho = view.attention.post_norm.scale(view.attention_module(view.attention.norm(x))) if post_norm else 1.0
    rho1, _ = branch_scales(view, x)
    predicted = x @ attention_matrix(view, centre=True).T / rho1[:, None] + attention_intercept(view, rho)
    assert torch.allclose(predicted, view.attention_branch(x), atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_F_at_the_papers_input_scale(gated, centre):
    view = View(gated, centred=True)
    formula, C = view.formula, CENTRING if centre else torch.eye(D)
    B = closed_form_fit(formula.w, formula.activation, formula.b, formula.v, formula.c)
    expected = 1.3 * torch.diag(view.ffn.post_norm.gain) @ C @ formula.down @ B
    expected = expected @ torch.diag(view.ffn.norm.gain) @ C
    assert torch.allclose(linear_layer(view, centre=centre).F, expected, atol=1e-5)


def test_F_in_pieces_is_F(monkeypatch):
    whole = linear_layer(View()).F
    monkeypatch.setattr("sdnb.linearize._UNITS", (7, 7))
    assert torch.allclose(linear_layer(View()).F, whole, atol=1e-6)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_F_at_the_gains_input_scale_fits_normed_inputs(gated, centre):
    """The fit of FFN(g x + beta) over Gaussian x is what a large sample says it is."""
    view = View(gated, centred=True)
    sampled = linear_layer(view, method="sampled", input_scale="gain", centre=centre, samples=400_000)
    F = linear_layer(view, input_scale="gain", centre=centre).F
    assert (sampled.F - F).norm() / F.norm() < 3 * sampled.standard_error < 0.03
    assert (linear_layer(view, centre=centre).F - F).norm() / F.norm() > 0.1


@pytest.mark.parametrize("input_scale", ["paper", "gain"])
def test_an_unrecognised_ffn_is_sampled_as_a_whole(input_scale):
    view = View()
    exact, module = linear_layer(view, input_scale=input_scale).F, view.ffn_module
    view.ffn_module = lambda u, formula=view.formula: formula.inner(u) @ formula.down.T
    assert torch.equal(view.ffn_module(rows()), module(rows()))
    view.ffn.formula = None
    layer = linear_layer(view, input_scale=input_scale, samples=200_000, seed=1)
    assert (layer.method, layer.input_scale) == ("sampled", input_scale)
    assert (layer.F - exact).norm() / exact.norm() < 3 * layer.standard_error < 0.05


@pytest.mark.parametrize("parallel", [False, True])
def test_L_R_and_the_norm_aware_view(parallel):
    layer = linear_layer(View(parallel=parallel))
    eye, A, F = torch.eye(D), layer.A, layer.F
    compose = (lambda A, F: eye + A + F) if parallel else (lambda A, F: (eye + F) @ (eye + A))
    assert torch.allclose(layer.L, compose(A, F), atol=1e-4)
    assert torch.allclose(layer.R, layer.L - eye, atol=1e-4)
    assert torch.allclose(layer.norm_aware(3.0, torch.tensor(11.0)), compose(A / 3, F / 11), atol=1e-5)
    assert (layer.method, layer.standard_error, layer.parallel) == ("closed_form", None, parallel)
    assert torch.equal(layer.L, layer.L)  # formed anew, not accumulated in place


@pytest.mark.parametrize("parallel", [False, True])
def test_L_where_the_stream_passes_norms_and_has_coefficients(parallel):
    view = View(parallel=parallel, plain=False)
    layer = linear_layer(view)
    S1 = view.attention.residual_scale * torch.eye(D)
    S2 = torch.diag(view.ffn.residual_scale * (1.0 if parallel else view.ffn.norm.gain))
    T = torch.diag(view.output_norm.gain)
    expected = T @ (S2 + layer.A + layer.F) if parallel else T @ (S2 + layer.F) @ (S1 + layer.A)
    assert torch.allclose(layer.L, expected, atol=1e-4)
    assert torch.allclose(layer.R, expected - torch.eye(D), atol=1e-4)


@pytest.mark.parametrize("plain", [False, True])
@pytest.mark.parametrize("parallel", [False, True])
def test_the_norm_aware_view_of_a_linear_layer_is_the_layer(parallel, plain):
    view, x = View(gated=False, parallel=parallel, plain=plain, linear=True), rows()
    layer, out = linear_layer(view), view.layer(x)
    rho1, rho2 = branch_scales(view, x)
    stream = stream_scales(view, x)
    assert torch.allclose(apply_linear(layer, view, x), out, atol=1e-4)
    for i, row in enumerate(x):
        L = layer.norm_aware(rho1[i], rho2[i], tuple(scale[i] for scale in stream))
        assert torch.allclose(L @ row, out[i], atol=1e-4)


@pytest.mark.parametrize("parallel", [False, True])
def test_branch_scales_are_what_the_real_norms_divide_by(parallel):
    view, x = View(centred=True, parallel=parallel), rows()
    rho1, rho2 = branch_scales(view, x)

    def divisor(x):
        return (x - x.mean(1, keepdim=True)).square().mean(1).sqrt()

    y = x if parallel else x + view.attention_branch(x)
    expected1 = divisor(x) * divisor(view.attention_module(view.attention.norm(x)))
    expected2 = divisor(y) * divisor(view.ffn_module(view.ffn.norm(y)))
    assert torch.allclose(rho1, expected1, rtol=1e-4)
    assert torch.allclose(rho2, expected2, rtol=1e-4)


def test_branches_without_norms_have_scale_one_and_no_gain():
    view = View(parallel=True)
    for branch in (view.attention, view.ffn):
        branch.norm = branch.post_norm = None
    assert all(torch.equal(rho, torch.ones(5)) for rho in branch_scales(view, rows()))
    assert torch.allclose(attention_matrix(view), 0.7 * view.attention.matrix)
    assert torch.allclose(attention_intercept(view), 0.7 * view.attention.bias)
    assert torch.allclose(linear_layer(view).F, linear_layer(view, input_scale="gain").F)


def test_unknown_methods_are_refused():
    for arguments in ({"method": "guess"}, {"input_scale": "real"}):
        with pytest.raises(ParameterError):
            linear_layer(View(), **arguments)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inputs_on_the_cpu_for_a_layer_on_a_gpu(name):
    model = build(name)
    x = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(7))
    here = layer_view(model, 2)
    expected = (*branch_scales(here, x), *stream_scales(here, x), apply_linear(linear_layer(here), here, x))
    for tensor in (*model.parameters(), *model.buffers()):
        put(tensor)
    with PretendedGPU():
        there = layer_view(model, 2)
        found = (*branch_scales(there, x), *stream_scales(there, x))
        found = (*found, apply_linear(linear_layer(there), there, x))
        assert {scale.device for scale in found} == {GPU}
    assert all(map(torch.equal, found, expected))


@pytest.mark.parametrize("name", ["bert", "openai-gpt", "doge"])
def test_L_of_real_families_from_their_weights(name):
    """diag(g2) (I + F') diag(g1) (I + A) where the sum is normed, (diag(r2) + F)(diag(r1) + A) in Doge."""
    model = build(name)
    view, block = layer_view(model, 2), decoder_layers(model)[1]
    ffn, A, eye = view.ffn.formula, attention_matrix(view), torch.eye(view.hidden_size)
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
        assert torch.allclose(A, view.attention.matrix)
    L = linear_layer(view).L
    assert (L - expected).norm() / expected.norm() < 1e-5
    assert (L - (eye + F) @ (eye + A)).norm() / expected.norm() > 0.1
