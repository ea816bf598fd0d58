"""The nearest eigenpair: the full method against the paper's recipe, the fast one against the full one."""

import math

import pytest
import torch

from sdnb.decompose import angle_deg, nearest_eigenpair
from sdnb.errors import ParameterError

D = 200


def noise(d, size, generator):
    return size * torch.randn(d, d, generator=generator) / d**0.5


def tilted(x, degrees, generator):
    """A unit vector at a given angle to x, in a random plane."""
    x = x / x.norm()
    n = torch.randn(len(x), generator=generator)
    n -= (n @ x) * x
    return math.cos(math.radians(degrees)) * x + math.sin(math.radians(degrees)) * n / n.norm()


def uniform(low, high, generator):
    return low + (high - low) * torch.rand(1, generator=generator).item()


def planted_layer(generator, d=D):
    """R = F + A + F A with a defect u v^T in F, strength 0.05 to 20, either sign; a direction near u."""
    u = torch.randn(d, generator=generator)
    u /= u.norm()
    v = tilted(u, uniform(0, 80, generator), generator)
    strength = 10 ** uniform(-1.3, 1.3, generator) * (1 if uniform(0, 1, generator) < 0.5 else -1)
    F, A = noise(d, 0.4, generator) + strength * torch.outer(u, v), noise(d, 0.3, generator)
    return F + A + F @ A, tilted(u, uniform(0, 30, generator), generator)


def bulk(generator, real, d=D):
    """A random matrix and a direction within 44 degrees of one of its eigenvectors (a real one, or any)."""
    R = noise(d, 0.7, generator)
    values, X = torch.linalg.eig(R.double())
    allowed = (values.imag == 0).nonzero()[:, 0] if real else torch.arange(d)
    i = allowed[torch.randint(len(allowed), (1,), generator=generator)].item()
    return R, tilted(X[:, i].real.float(), uniform(0, 44, generator), generator)


def papers_recipe(R, direction):
    """All eigenvectors, angles of their real parts to the direction by the arc cosine, the smallest wins."""
    values, X = torch.linalg.eig(R)
    X = X.real.double()
    cosine = (direction.double() @ X).abs() / (X.norm(dim=0) * direction.double().norm())
    angles = torch.rad2deg(cosine.clamp(max=1).arccos())
    return values[angles.argmin()], angles.min().item()


@pytest.mark.parametrize("seed", range(4))
def test_the_dense_method_follows_the_paper(seed):
    generator = torch.Generator().manual_seed(seed)
    R, direction = planted_layer(generator, 120) if seed % 2 else bulk(generator, False, 120)
    value, angle = papers_recipe(R, direction)
    found = nearest_eigenpair(R, direction)
    assert found.method == "dense"
    assert found.angle_deg == pytest.approx(angle, abs=0.02)
    assert found.value == pytest.approx(complex(value.real, abs(value.imag)), abs=1e-4)
    x = found.vector
    assert (R.to(x.dtype) @ x - found.value * x).norm().item() == pytest.approx(found.residual, abs=1e-5)
    assert found.residual < 1e-4 * (1 + abs(found.value))
    top = x[x.abs().argmax()]
    assert abs(top.imag) < 1e-6 and x.norm().item() == pytest.approx(1, abs=1e-5)


def test_a_planted_rotation_has_a_plane_that_holds_the_direction():
    """In a plane that R turns the plane holds the direction, and the real part need not."""
    d = 60
    random = torch.randn(d, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(random).Q
    block = torch.diag(torch.linspace(-0.1, 0.1, d, dtype=torch.float64))
    block[:2, :2] = torch.tensor([[2.0, -3.0], [3.0, 2.0]])
    R = basis @ block @ basis.T
    direction = 0.6 * basis[:, 0] + 0.8 * basis[:, 1]
    found = nearest_eigenpair(R, direction)
    assert found.value == pytest.approx(2 + 3j)
    assert found.plane_angle_deg < 1e-6
    assert found.angle_deg == pytest.approx(papers_recipe(R, direction)[1], abs=1e-6)
    assert found.angle_deg > 0.1
    outside = nearest_eigenpair(R, math.cos(0.5) * direction + math.sin(0.5) * basis[:, 2])
    assert outside.plane_angle_deg <= outside.angle_deg


@pytest.mark.parametrize("method", ["dense", "shifted"])
@pytest.mark.parametrize("strength", [-15.6, -1.1, 3.0])
def test_a_planted_defect_is_found_with_its_sign(strength, method):
    generator = torch.Generator().manual_seed(1)
    u = torch.randn(D, generator=generator)
    u /= u.norm()
    R = noise(D, 0.2, generator) + strength * torch.outer(u, u)
    found = nearest_eigenpair(R, u, method=method)
    assert found.method == method
    assert found.value.real == pytest.approx(strength, abs=0.2)
    assert found.value.imag == 0
    assert found.angle_deg == found.plane_angle_deg
    assert found.angle_deg < 15


def compare(make, count):
    """Counts of fast against full: within 45 degrees, missed, different, beyond but answered."""
    generator = torch.Generator().manual_seed(1)
    within = missed = different = beyond = 0
    for _ in range(count):
        R, direction = make(generator)
        full = nearest_eigenpair(R, direction, method="dense")
        fast = nearest_eigenpair(R, direction, method="shifted")
        if full.angle_deg > 45:
            beyond += fast is not None
            continue
        within += 1
        missed += fast is None
        if fast:
            same = abs(fast.value - full.value) < 1e-3 * (1 + abs(full.value))
            different += not (same and abs(fast.angle_deg - full.angle_deg) < 0.1)
    return within, missed, different, beyond


def test_the_fast_method_misses_no_planted_defect():
    within, missed, different, beyond = compare(planted_layer, 40)
    assert within > 15
    assert (missed, different, beyond) == (0, 0, 0)


def test_the_fast_method_says_none_where_nothing_is_near():
    generator = torch.Generator().manual_seed(2)
    for _ in range(10):
        R, direction = planted_layer(generator)
        direction = torch.randn(D, generator=generator)
        assert nearest_eigenpair(R, direction, method="dense").angle_deg > 45
        assert nearest_eigenpair(R, direction, method="shifted") is None


@pytest.mark.parametrize(
    ("d", "count", "real", "tolerated"),
    [(200, 40, True, 1), (200, 40, False, 2), pytest.param(400, 12, False, 2, marks=pytest.mark.slow)],
)
def test_the_rate_of_misses_inside_the_bulk(d, count, real, tolerated):
    within, missed, different, beyond = compare(lambda generator: bulk(generator, real, d), count)
    assert within == count
    assert missed + different <= tolerated
    assert beyond == 0


def test_exhausted_spaces():
    """The direction is an eigenvector, or R is zero or a multiple of the identity: nothing to iterate on."""
    direction = torch.randn(D, generator=torch.Generator().manual_seed(0))
    square = direction.square().sum().item()
    cases = ((torch.zeros(D, D), 0), (3 * torch.eye(D), 3), (-torch.outer(direction, direction), -square))
    for R, value in cases:
        found = nearest_eigenpair(R, direction, method="shifted")
        assert found.angle_deg < 1e-2
        assert found.value.real == pytest.approx(value, rel=1e-4)


def test_above_1024_the_fast_method_is_used():
    generator = torch.Generator().manual_seed(3)
    u = torch.nn.functional.normalize(torch.randn(1100, generator=generator), dim=0)
    R = noise(1100, 0.3, generator) - 2 * torch.outer(u, u)
    found = nearest_eigenpair(R, u)
    assert (found.method, round(found.value.real)) == ("shifted", -2)
    assert nearest_eigenpair(R, torch.randn(1100, generator=generator)) is None


@pytest.mark.parametrize("d", [1, 2, 3])
def test_tiny_matrices(d):
    R = torch.randn(d, d, generator=torch.Generator().manual_seed(d), dtype=torch.float64)
    direction = torch.ones(d)
    found = nearest_eigenpair(R, direction, method="shifted")
    assert found.method == "dense"
    assert found.angle_deg == pytest.approx(papers_recipe(R, direction)[1], abs=1e-6)
    assert angle_deg(found.vector.real, direction).item() == found.angle_deg


def test_bad_input_is_refused():
    R, direction = torch.eye(4), torch.ones(4)
    broken = R.clone()
    broken[0, 0] = torch.nan
    cases = ((R[:3], direction), (R, direction[:3]), (broken, direction), (R, 0 * direction))
    for arguments in cases:
        with pytest.raises(ParameterError):
            nearest_eigenpair(*arguments)
    with pytest.raises(ParameterError):
        nearest_eigenpair(R, direction, method="guess")
