"""Angles, and their laws between random directions, against draws, extended precision, published numbers."""

import math

import mpmath
import pytest
import torch

from sdnb.decompose import (
    angle_deg,
    expected_nearest_angle,
    log10_chance,
    random_angle,
    random_angle_quantile,
)
from sdnb.errors import ParameterError


def random_angles(d, shape, seed=0):
    """Acute angles of random directions to the first axis, by the arc cosine."""
    x = torch.randn(*shape, d, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return torch.rad2deg((x[..., 0].abs() / x.norm(dim=-1)).clamp(max=1).arccos())


def test_the_angle_is_acute_and_does_not_see_length_or_sign():
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-2.0, -2.0])
    assert angle_deg(7 * a, -b).item() == pytest.approx(angle_deg(a, b).item()) == pytest.approx(45)
    assert angle_deg(a, a).item() == 0
    assert angle_deg(a, torch.tensor([0.0, 3.0])).item() == pytest.approx(90, abs=1e-12)
    for angle in (1e-3, 1e-7, 1e-11):  # tiny ones keep their digits
        b = torch.tensor([math.cos(angle), math.sin(angle)]).double()
        assert angle_deg(a.double(), -b).item() == pytest.approx(math.degrees(angle), rel=1e-4)


def test_angles_broadcast_and_a_zero_vector_has_none():
    a = torch.randn(5, 1, 8, generator=torch.Generator().manual_seed(0))
    b = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))
    angles = angle_deg(a, b)
    assert angles.shape == (5, 3)
    cosine = (a.double() * b).sum(-1).abs() / (a.double().norm(dim=-1) * b.double().norm(dim=-1))
    assert torch.allclose(angles, torch.rad2deg(cosine.arccos()), atol=1e-8)
    assert angle_deg(torch.zeros(8), b).isnan().all()


def test_the_known_dimensions():
    assert random_angle(1) == 0
    assert random_angle(2) == pytest.approx(45)
    assert random_angle(3) == pytest.approx(math.degrees(1))
    assert random_angle(2048) == pytest.approx(88.99, abs=0.005)
    assert random_angle(4096) == pytest.approx(89.29, abs=0.005)
    assert random_angle_quantile(2048, 0.01) == pytest.approx(86.74, abs=0.005)
    assert random_angle_quantile(4096, 0.01) == pytest.approx(87.69, abs=0.005)
    assert expected_nearest_angle(2, 9) == pytest.approx(9)  # of n lines in the plane: 90 / (n + 1)


@pytest.mark.parametrize("d", [2, 3, 7, 100])
def test_expectation_and_quantiles_against_simulation(d):
    angles = random_angles(d, (60_000,))
    assert angles.mean().item() == pytest.approx(random_angle(d), abs=0.2)
    for q in (0.01, 0.3, 0.5, 0.9):
        assert (angles < random_angle_quantile(d, q)).double().mean().item() == pytest.approx(q, abs=0.006)
    assert random_angle_quantile(d, 0) == 0
    assert random_angle_quantile(d, 1) == pytest.approx(90)


@pytest.mark.parametrize(("d", "n"), [(3, 5), (20, 20), (100, 300)])
def test_the_nearest_of_many_against_simulation(d, n):
    nearest = random_angles(d, (400, n)).min(dim=1).values
    error = nearest.std().item() / math.sqrt(400)
    assert nearest.mean().item() == pytest.approx(expected_nearest_angle(d, n), abs=4 * error)


@pytest.mark.parametrize("call", [
    lambda: random_angle(0), lambda: expected_nearest_angle(5, 0), lambda: random_angle_quantile(5, 1.1),
    lambda: log10_chance(-1.0, 8), lambda: log10_chance(91.0, 8), lambda: log10_chance(10.0, 1),
])  # fmt: skip
def test_nonsense_is_refused(call):
    with pytest.raises(ParameterError):
        call()


@pytest.mark.parametrize("d", [2, 128, 4096])
@pytest.mark.parametrize("angle", [0.01, 1.0, 8.0, 30.0, 70.0, 89.9])
def test_the_chance_equals_extended_precision_however_small(angle, d):
    with mpmath.workdps(60):
        x = mpmath.sin(mpmath.radians(angle)) ** 2
        exact = mpmath.betainc((d - 1) / mpmath.mpf(2), 0.5, 0, x, regularized=True)
        assert log10_chance(angle, d) == pytest.approx(float(mpmath.log10(exact)), rel=1e-9)


def test_the_ends_of_the_chance():
    assert log10_chance(90.0, 128) == 0.0
    assert log10_chance(0.0, 128) == -math.inf
    assert 10 ** log10_chance(random_angle_quantile(256, 0.01), 256) == pytest.approx(0.01, rel=1e-6)
