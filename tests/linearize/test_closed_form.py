"""The closed form against a fit by least squares over a quadrature of the inputs, and its edges."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from sdnb.errors import ParameterError
from sdnb.linearize import closed_form_fit


def brute_force(unit, d=2, nodes=120):
    """argmin E|y - B x|^2 on a tensor grid of Gauss-Hermite nodes in d = 2: no Stein's lemma, no panels."""
    x, weight = (torch.tensor(a) for a in np.polynomial.hermite_e.hermegauss(nodes))
    X = torch.cartesian_prod(*[x] * d)
    omega = torch.cartesian_prod(*[weight / weight.sum()] * d).prod(1)
    Y = unit(X)
    return torch.linalg.solve(X.T @ (omega[:, None] * X), X.T @ (omega[:, None] * Y)).T


def random_units(seed, f=9, d=2):
    generator = torch.Generator().manual_seed(seed)
    w, v = torch.randn(2, f, d, generator=generator, dtype=torch.float64)
    b, c = torch.randn(2, f, generator=generator, dtype=torch.float64)
    return w, b, v, c


@pytest.mark.parametrize("phi", [functional.silu, functional.gelu, torch.sigmoid])
def test_smooth_units_agree_with_brute_force(phi):
    w, b, v, c = random_units(0)
    plain = brute_force(lambda X: phi(X @ w.T + b))
    gated = brute_force(lambda X: phi(X @ w.T + b) * (X @ v.T + c))
    without = brute_force(lambda X: phi(X @ w.T) * (X @ v.T))
    assert torch.allclose(closed_form_fit(w, phi, b), plain, atol=1e-9)
    assert torch.allclose(closed_form_fit(w, phi, b, v, c), gated, atol=1e-9)
    assert torch.allclose(closed_form_fit(w, phi, None, v), without, atol=1e-9)


def test_linear_units_and_rectifiers_have_known_fits():
    w, b, v, _ = random_units(2, d=40)
    assert torch.allclose(closed_form_fit(w, lambda g: g, b), w, rtol=1e-12)
    assert torch.allclose(closed_form_fit(w, torch.relu), w / 2, rtol=1e-12)
    small = 1e-25 * w.float()  # whose squares are zero in float32
    assert torch.allclose(1e25 * closed_form_fit(small, torch.relu), w.float() / 2, rtol=1e-5)
    # gated, at b = c = 0: E[relu(g) u x] = |w| / sqrt(2 pi) (v + (w.v) w / |w|^2)
    s, overlap = w.norm(dim=1, keepdim=True), (w * v).sum(1, keepdim=True)
    expected = s / (2 * torch.pi) ** 0.5 * (v + overlap * w / s**2)
    assert torch.allclose(closed_form_fit(w, torch.relu, None, v), expected, rtol=1e-10)


def test_a_dead_unit_needs_no_division():
    w, b, v, c = random_units(3)
    w[4] = 0
    b[5], w[5] = 0, 0
    plain, gated = closed_form_fit(w, functional.silu, b), closed_form_fit(w, functional.silu, b, v, c)
    assert torch.equal(plain[4:6], torch.zeros(2, 2, dtype=torch.float64))
    assert torch.allclose(gated[4], functional.silu(b[4]) * v[4], rtol=1e-9)
    assert torch.equal(gated[5], torch.zeros(2, dtype=torch.float64))
    assert torch.allclose(closed_form_fit(w, functional.silu)[4:6], torch.zeros(2, 2, dtype=torch.float64))


def test_a_unit_far_thinner_than_its_bias_has_the_slope_there():
    b = torch.tensor([1.7, -0.4], dtype=torch.float64)
    w = torch.tensor([[1e-11, 0.0], [0.0, 1e-13]], dtype=torch.float64)
    slope = torch.func.vmap(torch.func.grad(functional.silu))(b)
    assert torch.allclose(closed_form_fit(w, functional.silu, b), slope[:, None] * w, rtol=1e-6)


def test_float32_weights_give_float32_rows_within_1e_6():
    w, b, v, c = random_units(4, f=700, d=64)
    exact = closed_form_fit(w, functional.gelu, b, v, c)
    w, b, v, c = (t.float() for t in (w, b, v, c))
    rounded = closed_form_fit(w, functional.gelu, b, v, c)
    assert rounded.dtype == torch.float32
    assert ((rounded - exact).norm(dim=1) / exact.norm(dim=1)).max() < 1e-6
    assert closed_form_fit(w.bfloat16(), functional.gelu).dtype == torch.float32


def test_shapes_that_do_not_belong_together_are_refused():
    w, b, v, c = random_units(6)
    for arguments in ((w, b, v[:-1]), (w[0],), (w, b, None, c), (w, b[:-1])):
        with pytest.raises(ParameterError):
            closed_form_fit(arguments[0], torch.relu, *arguments[1:])
