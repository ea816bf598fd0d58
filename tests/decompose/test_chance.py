"""The closed form of a small angle's chance against draws and against extended precision."""

import math

import mpmath
import pytest
import torch

from sdnb.decompose import angle_deg, random_angle_quantile
from sdnb.decompose.chance import log10_chance
from sdnb.errors import ParameterError


@pytest.mark.parametrize("d", [2, 3, 8, 40])
def test_equals_the_share_of_random_pairs(d):
    generator = torch.Generator().manual_seed(d)
    angles = angle_deg(torch.randn(200_000, d, generator=generator), torch.randn(d, generator=generator))
    for angle in (40.0, 60.0, 80.0, 89.0):
        share = (angles <= angle).double().mean().item()
        if share > 1e-3:
            assert 10 ** log10_chance(angle, d) == pytest.approx(share, rel=0.1)


@pytest.mark.parametrize("d", [2, 128, 4096])
@pytest.mark.parametrize("angle", [0.01, 1.0, 8.0, 30.0, 70.0, 89.9])
def test_equals_extended_precision_however_small(angle, d):
    with mpmath.workdps(60):
        x = mpmath.sin(mpmath.radians(angle)) ** 2
        exact = mpmath.betainc((d - 1) / mpmath.mpf(2), 0.5, 0, x, regularized=True)
        assert log10_chance(angle, d) == pytest.approx(float(mpmath.log10(exact)), rel=1e-9)


def test_ends():
    assert log10_chance(90.0, 128) == 0.0
    assert log10_chance(0.0, 128) == -math.inf
    assert 10 ** log10_chance(random_angle_quantile(256, 0.01), 256) == pytest.approx(0.01, rel=1e-6)
    for angle, d in ((-1.0, 8), (91.0, 8), (10.0, 1)):
        with pytest.raises(ParameterError):
            log10_chance(angle, d)
