"""Gaussian moments against quadrature in 30 digits, for every activation of transformers."""

import itertools
from functools import cache

import mpmath as mp
import numpy as np
import pytest
import torch
from torch.nn import functional
from transformers.activations import ACT2FN

from sdnb.errors import ParameterError
from sdnb.gaussian import gaussian_moments
from sdnb.linearize import closed_form_fit

mp.mp.dps = 30
ACTIVATIONS = sorted(ACT2FN)


def tanh_gelu(x):
    return x / 2 * (1 + mp.tanh(mp.sqrt(2 / mp.pi) * (x + mp.mpf("0.044715") * x**3)))


def fast_gelu(x):
    return x / 2 * (1 + mp.tanh(x * mp.mpf("0.7978845608") * (1 + mp.mpf("0.044715") * x * x)))


def gelu(x):
    return x * mp.erfc(-x / mp.sqrt(2)) / 2


def softplus(x):
    return mp.log1p(mp.exp(x)) if x < 60 else x


def xielu(module):
    """xIELU with this module's own parameters."""
    alpha_p = softplus(mp.mpf(module.alpha_p.item()))
    beta, eps = mp.mpf(module.beta.item()), mp.mpf(module.eps.item())
    alpha_n = beta + softplus(mp.mpf(module.alpha_n.item()))

    def phi(x):
        return alpha_p * x * x + beta * x if x > 0 else (mp.expm1(min(x, eps)) - x) * alpha_n + beta * x

    return phi


def exact(name, module):
    """The activation's formula in extended precision, written from its definition."""
    formulas = {
        "gelu": gelu, "gelu_python": gelu, "gelu_fast": fast_gelu,
        "gelu_10": lambda x: min(gelu(x), mp.mpf(10)),
        "hardswish": lambda x: x * min(max(x + 3, mp.mpf(0)), mp.mpf(6)) / 6,
        "laplace": lambda x: mp.erfc((mp.mpf(0.707107) - x) / (mp.mpf(0.282095) * mp.sqrt(2))) / 2,
        "leaky_relu": lambda x: x if x > 0 else x / 100, "prelu": lambda x: x if x > 0 else x / 4,
        "linear": lambda x: x, "relu": lambda x: max(x, mp.mpf(0)), "relu2": lambda x: max(x, mp.mpf(0)) ** 2,
        "relu6": lambda x: min(max(x, mp.mpf(0)), mp.mpf(6)), "mish": lambda x: x * mp.tanh(softplus(x)),
        "quick_gelu": lambda x: x / (1 + mp.exp(mp.mpf("-1.702") * x)),
        "sigmoid": lambda x: 1 / (1 + mp.exp(-x)),
        "silu": lambda x: x / (1 + mp.exp(-x)), "swish": lambda x: x / (1 + mp.exp(-x)), "tanh": mp.tanh,
        "sqrtsoftplus": lambda x: mp.sqrt(softplus(x)),
    }  # fmt: skip
    if name == "xielu":
        return xielu(module)
    return formulas.get(name, tanh_gelu)


def reference(phi, s, b):
    """m0, m1, m2 by composite Gauss-Legendre in 30 digits, panels of 1/2 in z and graded at the kinks."""
    arguments, *weights = quadrature(s, b)
    values = [phi(x) for x in arguments]
    return [mp.fdot(values, weight) for weight in weights]


@cache
def quadrature(s, b):
    """Where an activation is evaluated, s z + b, and the weights of its values in m0, m1 and m2."""
    s, b = mp.mpf(s), mp.mpf(b)
    edges = {mp.mpf(k) / 2 for k in range(-18, 19)}
    for kink in (-3, 0, 3, 6, 10):
        at = (kink - b) / s
        edges |= {at + sign * mp.mpf(2) ** k / s / 8 for k in range(13) for sign in (-1, 1)} | {at}
        edges |= {at + sign * j * 3 / abs(at) for j in range(1, 16) for sign in (-1, 1) if abs(at) > 6}
    edges = sorted(e for e in edges if abs(e) < 38) if s else [mp.mpf(-9), mp.mpf(0), mp.mpf(9)]
    rows = []
    for low, high in itertools.pairwise(edges):
        for x, weight in RULE:
            z = low + (high - low) * x
            density = weight * (high - low) * mp.npdf(z)
            rows.append((s * z + b, density, density * z, density * (z * z - 1)))
    return tuple(zip(*rows, strict=True))


def legendre(n):
    """Gauss-Legendre nodes and weights on [0, 1] in 30 digits, polished from numpy's by Newton's method."""
    rule = []
    for start in np.polynomial.legendre.leggauss(n)[0]:
        x = mp.findroot(lambda t: mp.legendre(n, t), mp.mpf(start))
        slope = n * (mp.legendre(n - 1, x) - x * mp.legendre(n, x)) / (1 - x * x)
        rule.append(((x + 1) / 2, 1 / ((1 - x * x) * slope**2)))
    return rule


RULE = legendre(8)


def module_of(name):
    return ACT2FN[name].double()  # PReLU and xIELU have parameters


# random scales from 1e-3 to 1e3 and biases from -5 to 5, the extremes, and a bias of zero
PAIRS = [(1e-3, 5.0), (1e3, -5.0), (0.7, 0.0)] + [
    (10.0**log_s, b) for log_s, b in np.random.default_rng(4).uniform((-3, -5), (3, 5), (5, 2))
]


@cache
def reference_moments(phi):
    """One row of exact moments for each of PAIRS."""
    return torch.tensor([[float(m) for m in reference(phi, s, b)] for s, b in PAIRS], dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_rows_of_B_are_within_1e_6_of_their_norm(name):
    generator = torch.Generator().manual_seed(len(name))
    n, d = len(PAIRS), 6
    w = functional.normalize(torch.randn(n, d, generator=generator, dtype=torch.float64))
    v, c = torch.randn(n, d, generator=generator).double(), torch.randn(n, generator=generator).double()
    s, b = torch.tensor(PAIRS, dtype=torch.float64).T
    m0, m1, m2 = reference_moments(exact(name, ACT2FN[name])).T[..., None]
    with torch.no_grad():
        plain = closed_form_fit(s[:, None] * w, module_of(name), b)
        gated = closed_form_fit(s[:, None] * w, module_of(name), b, v, c)
    # an activation in float64 is itself known no better than to the last digit of its terms, which are of the
    # order of g
    floor = 1e-15 * (1 + b.abs())
    exact_plain = m1 * w
    exact_gated = ((w * v).sum(1, keepdim=True) * m2 + c[:, None] * m1) * w + m0 * v
    assert ((plain - exact_plain).norm(dim=1) <= 1e-6 * exact_plain.norm(dim=1) + floor).all()
    assert ((gated - exact_gated).norm(dim=1) <= 1e-6 * exact_gated.norm(dim=1) + 5 * floor).all()


def test_a_rectifier_cut_off_far_in_a_tail_keeps_its_relative_accuracy():
    ratio = torch.tensor([3.0, 4.2, 5.9, 6.1, 9.7, 10.3, 15.0, 22.0, 30.0, 36.0], dtype=torch.float64)
    s = torch.full_like(ratio, 0.013)
    computed = torch.stack(gaussian_moments(torch.relu, s, -ratio * s), dim=1)
    for moments, a in zip(computed, ratio, strict=True):
        a = mp.mpf(a.item())
        tail = mp.erfc(a / mp.sqrt(2)) / 2
        exact_moments = [s[0].item() * m for m in (mp.npdf(a) - a * tail, tail, mp.npdf(a))]
        for got, want in zip(moments.tolist(), exact_moments, strict=True):
            assert abs(got - want) <= 1e-6 * want


@pytest.mark.parametrize(
    ("phi", "s", "b"), [(functional.relu6, 0.1, [9.0, 400.0]), (functional.silu, 0.0, [0.0, 1.0, -2.5])]
)
def test_a_saturated_unit_and_one_of_no_width_are_constants(phi, s, b):
    b = torch.tensor(b, dtype=torch.float64)
    m0, m1, m2 = gaussian_moments(phi, torch.full_like(b, s), b)
    assert torch.allclose(m0, phi(b), rtol=1e-12, atol=0)
    assert max(m1.abs().max(), m2.abs().max()) < 1e-13


def test_units_do_not_depend_on_the_chunk_they_are_in():
    order = torch.randperm(600, generator=torch.Generator().manual_seed(0))
    s = torch.logspace(-3, 3, 600, dtype=torch.float64)[order]
    b = torch.linspace(-5, 5, 600, dtype=torch.float64)
    together = torch.stack(gaussian_moments(functional.gelu, s, b))
    for i in (0, 77, 599):
        alone = torch.stack(gaussian_moments(functional.gelu, s[i : i + 1], b[i : i + 1]))
        assert torch.allclose(together[:, i : i + 1], alone, rtol=1e-7, atol=1e-14)


def test_a_kink_at_an_odd_place_costs_time_but_little_accuracy():
    s, b = torch.tensor([0.3, 1.0, 4.0]).double(), torch.tensor([1.0, -0.4, 2.0]).double()
    shifted = torch.stack(gaussian_moments(lambda g: torch.relu(g - 0.7321), s, b))
    exact = torch.stack(gaussian_moments(torch.relu, s, b - 0.7321))
    assert ((shifted - exact).abs() <= 1e-5 * exact.abs()).all()


def test_an_activation_that_rounds_to_float32_ends():
    s, b = torch.logspace(-2, 1, 40, dtype=torch.float64), torch.linspace(-2, 2, 40, dtype=torch.float64)
    for phi in (functional.silu, torch.nn.PReLU()):
        with torch.no_grad():
            rounded = torch.stack(gaussian_moments(lambda g, phi=phi: phi(g.float()).to(g.dtype), s, b))
            exact = torch.stack(gaussian_moments(phi.double() if phi != functional.silu else phi, s, b))
        assert ((rounded - exact).abs().amax(0) <= 2e-6 * exact.abs().amax(0)).all()


@pytest.mark.parametrize(("s", "b"), [(-1.0, 0.0), (float("nan"), 0.0), (1.0, float("inf"))])
def test_unsound_scales_are_refused(s, b):
    with pytest.raises(ParameterError):
        gaussian_moments(torch.relu, torch.tensor([s]), torch.tensor([b]))
