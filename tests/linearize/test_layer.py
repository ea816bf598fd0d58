"""A layer's matrices against plain formulas, on made-up layers and on real families."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch.nn import functional

from sdnb.errors import ParameterError
from sdnb.layers import FFNFormula, LayerView, Norm, decoder_layers, layer_view
from sdnb.layers.view import AttentionBranch, FFNBranch
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
each_residual = pytest.mark.parametrize("parallel", [False, True])
each_centring = pytest.mark.parametrize("centre", [False, True])
each_gating = pytest.mark.parametrize("gated", [False, True])


class View(LayerView):
    """A view whose modules are its own matrix and formula."""

    def attention_module(self, u):
        return u @ self.attention.matrix.T + self.attention.bias

    def ffn_module(self, u):
        return self.ffn.formula.inner(u) @ self.ffn.formula.down.T

    def layer(self, x):
        a = self.attention_branch(x)
        y = x if self.parallel else self.attention_residual(x) + a
        out = self.ffn_residual(y) + self.ffn_branch(y) + (a if self.parallel else 0)
        return out if self.output_norm is None else self.output_norm(out)


def made_up(gated=True, centred=False, parallel=False, plain=True, linear=False):
    """A layer of small random tensors; a linear one has no constant anywhere."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def norm(name):
        return Norm(1 + 0.5 * draw(D), draw(D) * (0.0 if linear else 0.3), centred, 1e-6, name)

    w, b, down = draw(WIDTH, D) / 2, draw(WIDTH), draw(D, WIDTH) / 4
    v, c = (draw(WIDTH, D), draw(WIDTH)) if gated else (None, None)
    phi = (lambda g: 2 * g) if linear else functional.silu
    formula = FFNFormula(w, None if linear else b, v, c, phi, down, None)
    matrix, bias = draw(D, D), draw(D) * (0.0 if linear else 0.3)
    norms = [norm(name) for name in ("first", "first post", "second", "second post", "end")]
    scales = (1.0 if parallel or plain else 0.9), (1.0 if plain else 1 + 0.3 * draw(D))
    attention = AttentionBranch(*norms[:2], 0.7, False, scales[0], matrix=matrix, bias=bias)
    ffn = FFNBranch(*norms[2:4], 1.3, not (parallel or plain), scales[1], formula=formula)
    isolated = SimpleNamespace(hidden_size=D, module={norm.name: norm for norm in norms}.get)
    return View(isolated, SimpleNamespace(parallel=parallel), attention, ffn, None if plain else norms[4])


def rows(count=5, seed=1):
    return 3 * torch.randn(count, D, generator=torch.Generator().manual_seed(seed)) + 1


@each_centring
@pytest.mark.parametrize("centred", [False, True])
def test_A_is_multiplier_gains_and_module(centred, centre):
    view = made_up(centred=centred)
    C, attention = CENTRING if centre and centred else torch.eye(D), view.attention
    expected = 0.7 * torch.diag(attention.post_norm.gain) @ C @ attention.matrix
    expected = expected @ torch.diag(attention.norm.gain) @ C
    assert torch.allclose(attention_matrix(view, centre), expected, atol=1e-6)


@pytest.mark.parametrize("post_norm", [False, True])
def test_A_predicts_the_real_branch_once_its_divisors_and_intercept_are_put_back(post_norm):
    view, x, rho = made_up(centred=not post_norm, parallel=True), rows(), 1.0
    if post_norm:
        rho = view.attention.post_norm.scale(view.attention_module(view.attention.norm(x)))
    else:
        view = replace(view, attention=replace(view.attention, post_norm=None))
    rho1, _ = branch_scales(view, x)
    predicted = x @ attention_matrix(view, centre=True).T / rho1[:, None] + attention_intercept(view, rho)
    assert torch.allclose(predicted, view.attention_branch(x), atol=1e-5)


@each_gating
@each_centring
def test_F_at_the_papers_input_scale(gated, centre, monkeypatch):
    view = made_up(gated, centred=True)
    formula, C = view.ffn.formula, CENTRING if centre else torch.eye(D)
    B = closed_form_fit(formula.w, formula.activation, formula.b, formula.v, formula.c)
    expected = 1.3 * torch.diag(view.ffn.post_norm.gain) @ C @ formula.down @ B
    expected = expected @ torch.diag(view.ffn.norm.gain) @ C
    assert torch.allclose(linear_layer(view, centre=centre).F, expected, atol=1e-5)
    monkeypatch.setattr("sdnb.linearize._UNITS", (7, 7))  # in pieces
    assert torch.allclose(linear_layer(view, centre=centre).F, expected, atol=1e-5)


@each_gating
@each_centring
def test_F_at_the_gains_input_scale_fits_normed_inputs(gated, centre):
    """The fit of FFN(g x + beta) over Gaussian x is what a large sample says it is."""
    view = made_up(gated, centred=True)
    sampled = linear_layer(view, method="sampled", input_scale="gain", centre=centre, samples=400_000)
    F = linear_layer(view, input_scale="gain", centre=centre).F
    assert (sampled.F - F).norm() / F.norm() < 3 * sampled.standard_error < 0.03
    assert (linear_layer(view, centre=centre).F - F).norm() / F.norm() > 0.1


@pytest.mark.parametrize("input_scale", ["paper", "gain"])
def test_an_unrecognised_ffn_is_sampled_as_a_whole(input_scale, monkeypatch):
    view = made_up()
    exact, module = linear_layer(view, input_scale=input_scale).F, view.ffn_module
    monkeypatch.setattr(View, "ffn_module", lambda self, u: module(u))
    view = replace(view, ffn=replace(view.ffn, formula=None))
    layer = linear_layer(view, input_scale=input_scale, samples=200_000, seed=1)
    assert layer.method == "sampled"
    assert (layer.F - exact).norm() / exact.norm() < 3 * layer.standard_error < 0.05


@each_residual
@pytest.mark.parametrize("plain", [False, True])
def test_L_R_and_the_norm_aware_view(parallel, plain):
    view, eye = made_up(parallel=parallel, plain=plain), torch.eye(D)
    layer = linear_layer(view)
    S1, S2, T = eye, eye, eye
    if not plain:
        S1, T = view.attention.residual_scale * eye, torch.diag(view.output_norm.gain)
        S2 = torch.diag(view.ffn.residual_scale * (1.0 if parallel else view.ffn.norm.gain))

    def composed(A, F, S1=S1, S2=S2, T=T):
        return T @ (S2 + A + F) if parallel else T @ (S2 + F) @ (S1 + A)

    for _ in range(2):  # formed anew, not accumulated in place
        assert torch.allclose(layer.L, composed(layer.A, layer.F), atol=1e-4)
        assert torch.allclose(layer.R, composed(layer.A, layer.F) - eye, atol=1e-4)
    aware = layer.norm_aware(3.0, torch.tensor(11.0), (1.0, 1.0, 1.0) if plain else (2.0, 5.0, 7.0))
    streams = (S1, S2, T) if plain else (S1 / 2, S2 / 5, T / 7)
    assert torch.allclose(aware, composed(layer.A / 3, layer.F / 11, *streams), atol=1e-5)
    assert (layer.method, layer.standard_error, layer.parallel) == ("closed_form", None, parallel)


@each_residual
@pytest.mark.parametrize("plain", [False, True])
def test_the_norm_aware_view_of_a_linear_layer_is_the_layer(parallel, plain):
    view, x = made_up(gated=False, parallel=parallel, plain=plain, linear=True), rows()
    layer, out = linear_layer(view), view.layer(x)
    rho1, rho2 = branch_scales(view, x)
    stream = stream_scales(view, x)
    assert torch.allclose(apply_linear(layer, view, x), out, atol=1e-4)
    for i, row in enumerate(x):
        L = layer.norm_aware(rho1[i], rho2[i], tuple(scale[i] for scale in stream))
        assert torch.allclose(L @ row, out[i], atol=1e-4)


@each_residual
def test_branch_scales_are_what_the_real_norms_divide_by(parallel):
    view, x = made_up(centred=True, parallel=parallel), rows()

    def divisor(x):
        return (x - x.mean(1, keepdim=True)).square().mean(1).sqrt()

    y = x if parallel else x + view.attention_branch(x)
    expected1 = divisor(x) * divisor(view.attention_module(view.attention.norm(x)))
    expected2 = divisor(y) * divisor(view.ffn_module(view.ffn.norm(y)))
    for found, expected in zip(branch_scales(view, x), (expected1, expected2), strict=True):
        assert torch.allclose(found, expected, rtol=1e-4)


def test_branches_without_norms_have_scale_one_and_no_gain():
    view, bare = made_up(parallel=True), {"norm": None, "post_norm": None}
    view = replace(view, attention=replace(view.attention, **bare), ffn=replace(view.ffn, **bare))
    assert all(torch.equal(rho, torch.ones(5)) for rho in branch_scales(view, rows()))
    assert torch.allclose(attention_matrix(view), 0.7 * view.attention.matrix)
    assert torch.allclose(attention_intercept(view), 0.7 * view.attention.bias)
    assert torch.allclose(linear_layer(view).F, linear_layer(view, input_scale="gain").F)


@pytest.mark.parametrize("arguments", [{"method": "guess"}, {"input_scale": "real"}])
def test_unknown_methods_are_refused(arguments):
    with pytest.raises(ParameterError):
        linear_layer(made_up(), **arguments)


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_inputs_on_the_cpu_for_a_layer_on_a_gpu(name):
    model = build(name)
    x = torch.randn(4, model.config.hidden_size, generator=torch.Generator().manual_seed(7))

    def found():
        view = layer_view(model, 2)
        return *branch_scales(view, x), *stream_scales(view, x), apply_linear(linear_layer(view), view, x)

    expected = found()
    for tensor in (*model.parameters(), *model.buffers()):
        put(tensor)
    with PretendedGPU():
        there = found()
        assert {scale.device for scale in there} == {GPU}
    assert all(map(torch.equal, there, expected))


@pytest.mark.parametrize("name", ["bert", "openai-gpt", "doge"])
def test_L_of_real_families_from_their_weights(name):
    """diag(g2) (I + F') diag(g1) (I + A) where the sum is normed, (diag(r2) + F)(diag(r1) + A) in Doge."""
    model = build(name)
    view, block = layer_view(model, 2), decoder_layers(model)[1]
    ffn, A, eye = view.ffn.formula, attention_matrix(view), torch.eye(view.hidden_size)
    F = ffn.down @ closed_form_fit(ffn.w, ffn.activation, ffn.b, ffn.v, ffn.c)
    if name == "doge":
        F = F @ torch.diag(block.post_attention_layernorm.weight)
        expected = torch.diag(block.post_attention_residual) + F
        expected = expected @ (torch.diag(block.input_residual) + A)
    else:
        bert = name == "bert"
        norms = (block.attention.output, block.output) if bert else (block.ln_1, block.ln_2)
        g1, g2 = (torch.diag((norm.LayerNorm if bert else norm).weight) for norm in norms)
        expected = g2 @ (eye + F) @ g1 @ (eye + A)
        assert torch.allclose(A, view.attention.matrix)
    L = linear_layer(view).L
    assert (L - expected).norm() / expected.norm() < 1e-5
    assert (L - (eye + F) @ (eye + A)).norm() / expected.norm() > 0.1
