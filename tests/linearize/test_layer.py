"""A layer's matrices against plain formulas, on stand-ins with gains, biases, post-norms and multipliers."""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sdnb.decompose import leading_triplets
from sdnb.errors import ParameterError
from sdnb.linearize import (
    attention_intercept,
    attention_matrix,
    branch_scales,
    closed_form_fit,
    ffn_matrix,
    linear_layer,
)

D, WIDTH = 12, 30


@dataclass(frozen=True)
class Norm:
    gain: Tensor
    bias: Tensor
    centred: bool

    def scale(self, x):
        x = x - x.mean(1, keepdim=True) if self.centred else x
        return (x.square().mean(1, keepdim=True) + 1e-6).sqrt()

    def module(self, x):
        return self.gain * (x - x.mean(1, keepdim=True) if self.centred else x) / self.scale(x) + self.bias


@dataclass(frozen=True)
class View:
    """A stand-in for a LayerView: the same attributes, made of small random tensors."""

    parallel: bool
    attention_matrix: Tensor
    attention_bias: Tensor
    attention_norm: Norm | None
    attention_post_norm: Norm | None
    attention_multiplier: float
    ffn: SimpleNamespace | None
    ffn_module: object
    ffn_norm: Norm | None
    ffn_post_norm: Norm | None
    ffn_multiplier: float
    hidden_size: int = D
    plain_stream: bool = True

    def beside_attention(self, x):
        return x

    def attention_module(self, u):
        return u @ self.attention_matrix.T + self.attention_bias

    def attention_inner_scale(self, u):
        return torch.ones(len(u), 1)

    def attention_branch(self, x):
        y = self.attention_module(self.attention_norm.module(x))
        y = y if self.attention_post_norm is None else self.attention_post_norm.module(y)
        return self.attention_multiplier * y


def make_view(gated, centred, parallel=False, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator)

    def norm(centred=centred):
        return Norm(1 + 0.5 * draw(D), 0.3 * draw(D), centred)

    w, b, down = draw(WIDTH, D) / 2, draw(WIDTH), draw(D, WIDTH) / 4
    v, c = (draw(WIDTH, D), draw(WIDTH)) if gated else (None, None)

    def inner(x):
        return functional.silu(x @ w.T + b) * (x @ v.T + c if gated else 1)

    formula = SimpleNamespace(
        w=w, b=b, v=v, c=c, activation=functional.silu, down=down, down_bias=None, inner=inner
    )
    attention = (draw(D, D), draw(D), norm(), norm(), 0.7)
    return View(parallel, *attention, formula, lambda x: inner(x) @ down.T, norm(), norm(), 1.3)


CENTRING = torch.eye(D) - 1 / D


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_A_is_multiplier_gains_and_module(centred, centre):
    view = make_view(True, centred)
    C = CENTRING if centre and centred else torch.eye(D)
    before, after = view.attention_norm, view.attention_post_norm
    expected = 0.7 * torch.diag(after.gain) @ C @ view.attention_matrix @ torch.diag(before.gain) @ C
    assert torch.allclose(attention_matrix(view, centre), expected, atol=1e-6)


def test_A_predicts_the_real_branch_once_its_divisors_and_intercept_are_put_back():
    view = replace(make_view(True, True), attention_post_norm=None)
    x = 3 * torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    y = view.attention_norm.module(x) @ view.attention_matrix.T + view.attention_bias
    rho1, _ = branch_scales(replace(view, parallel=True), x)
    predicted = x @ attention_matrix(view, centre=True).T / rho1[:, None] + attention_intercept(view)
    assert torch.allclose(predicted, view.attention_multiplier * y, atol=1e-5)


def test_the_intercept_behind_a_post_norm_with_its_divisor_put_back():
    view = make_view(True, False)
    x = 3 * torch.randn(5, D, generator=torch.Generator().manual_seed(1))
    rho = view.attention_post_norm.scale(view.attention_module(view.attention_norm.module(x)))
    rho1, _ = branch_scales(replace(view, parallel=True), x)
    predicted = x @ attention_matrix(view).T / rho1[:, None] + attention_intercept(view, rho)
    assert torch.allclose(predicted, view.attention_branch(x), atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_F_at_the_papers_input_scale(gated, centre):
    view = make_view(gated, centred=True)
    formula = view.ffn
    B = closed_form_fit(formula.w, formula.activation, formula.b, formula.v, formula.c)
    C = CENTRING if centre else torch.eye(D)
    expected = (
        1.3 * torch.diag(view.ffn_post_norm.gain) @ C @ formula.down @ B @ torch.diag(view.ffn_norm.gain) @ C
    )
    assert torch.allclose(ffn_matrix(view, centre=centre), expected, atol=1e-5)


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("centre", [False, True])
def test_F_at_the_gains_input_scale_fits_normed_inputs(gated, centre):
    """The fit of FFN(g x + beta) over Gaussian x is what a large sample says it is."""
    view = make_view(gated, centred=True)
    layer = linear_layer(view, method="sampled", input_scale="gain", centre=centre, samples=400_000)
    F = ffn_matrix(view, input_scale="gain", centre=centre)
    assert (layer.F - F).norm() / F.norm() < 3 * layer.standard_error < 0.03
    assert (ffn_matrix(view, centre=centre) - F).norm() / F.norm() > 0.1


@pytest.mark.parametrize("input_scale", ["paper", "gain"])
def test_an_unrecognised_ffn_is_sampled_as_a_whole(input_scale):
    view = make_view(True, centred=False)
    exact = ffn_matrix(view, input_scale=input_scale)
    layer = linear_layer(replace(view, ffn=None), input_scale=input_scale, samples=200_000, seed=1)
    assert (layer.method, layer.input_scale) == ("sampled", input_scale)
    assert (layer.F - exact).norm() / exact.norm() < 3 * layer.standard_error < 0.05


@pytest.mark.parametrize("parallel", [False, True])
def test_L_R_and_the_norm_aware_view(parallel):
    layer = linear_layer(make_view(True, False, parallel))
    eye, A, F = torch.eye(D), layer.A, layer.F
    compose = (lambda A, F: eye + A + F) if parallel else (lambda A, F: (eye + F) @ (eye + A))
    assert torch.allclose(layer.L, compose(A, F), atol=1e-4)
    assert torch.allclose(layer.R, layer.L - eye, atol=1e-4)
    assert torch.allclose(layer.norm_aware(3.0, torch.tensor(11.0)), compose(A / 3, F / 11), atol=1e-5)
    assert (layer.method, layer.standard_error, layer.parallel) == ("closed_form", None, parallel)
    assert torch.allclose(layer.L, layer.L)  # formed anew, not accumulated in place


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("gated", [False, True])
def test_operators_do_what_the_matrices_do(parallel, gated):
    view = make_view(gated, True, parallel)
    formed, lazy = (linear_layer(view, centre=True, form=form) for form in (True, False))
    X = torch.randn(D, 3, generator=torch.Generator().manual_seed(2))
    for operator, matrix in ((lazy.F, formed.F), (lazy.operator, formed.L), (formed.operator, formed.L)):
        assert torch.allclose(operator @ X, matrix @ X, atol=1e-4)
        assert torch.allclose(operator.T @ X, matrix.T @ X, atol=1e-4)
        assert torch.allclose(operator.dense(), matrix, atol=1e-4)
        assert torch.allclose(operator.T.dense(), matrix.T, atol=1e-4)
        assert (operator.shape, operator.dtype, operator.device) == (
            matrix.shape,
            matrix.dtype,
            matrix.device,
        )
    assert torch.allclose(lazy.L, formed.L, atol=1e-4)
    assert torch.allclose(leading_triplets(lazy.operator, 2).S, leading_triplets(formed.L, 2).S, rtol=1e-4)


@pytest.mark.parametrize("parallel", [False, True])
def test_branch_scales_are_what_the_real_norms_divide_by(parallel):
    view = make_view(True, True, parallel)
    x = 4 * torch.randn(6, D, generator=torch.Generator().manual_seed(3)) + 2
    rho1, rho2 = branch_scales(view, x)

    def divisor(x):
        return (x - x.mean(1, keepdim=True)).square().mean(1).sqrt()

    attended = view.attention_norm.module(x) @ view.attention_matrix.T + view.attention_bias
    expected1 = divisor(x) * divisor(attended)
    y = x if parallel else x + view.attention_branch(x)
    expected2 = divisor(y) * divisor(view.ffn_module(view.ffn_norm.module(y)))
    assert torch.allclose(rho1, expected1, rtol=1e-4)
    assert torch.allclose(rho2, expected2, rtol=1e-4)


def test_branches_without_norms_have_scale_one_and_no_gain():
    view = replace(make_view(True, False, True), attention_norm=None, attention_post_norm=None, ffn_norm=None,
                   ffn_post_norm=None)  # fmt: skip
    rho1, rho2 = branch_scales(view, torch.randn(4, D))
    assert torch.equal(rho1, torch.ones(4))
    assert torch.equal(rho2, torch.ones(4))
    assert torch.allclose(attention_matrix(view), 0.7 * view.attention_matrix)
    assert torch.allclose(attention_intercept(view), 0.7 * view.attention_bias)
    assert torch.allclose(ffn_matrix(view), ffn_matrix(view, input_scale="gain"))


def test_unknown_methods_are_refused():
    view = make_view(True, False)
    for arguments in ({"method": "guess"}, {"input_scale": "real"}):
        with pytest.raises(ParameterError):
            ffn_matrix(view, **arguments)
