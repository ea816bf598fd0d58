"""Theory of the solvable model against its known special case and against simulation."""

import math

import pytest
import torch

from sdnb.errors import ParameterError
from sdnb.spectra import Noise, draw_matrix, mp_edges, observed_spike, predicted_spike, thresholds

WHITE, QUIET = Noise("white"), Noise("correlated", along_signal=0.1)


@pytest.mark.parametrize("q", [0.1, 0.25, 1.0])
@pytest.mark.parametrize("strength", [1.1, 1.5, 3.0])
def test_white_noise_is_the_published_formula(q, strength):
    # Benaych-Georges and Nadakuditi 2012, section 3.1
    spike = predicted_spike(strength, WHITE, q)
    t2 = strength**2
    assert spike.position == pytest.approx(math.sqrt((1 + t2) * (q + t2) / t2))
    assert spike.left**2 == pytest.approx(1 - q * (1 + t2) / (t2 * (t2 + q)))
    assert spike.right**2 == pytest.approx(1 - (q + t2) / (t2 * (t2 + 1)))
    assert spike.side == "above"


def test_white_noise_has_no_outlier_below_its_threshold_and_none_below_the_bulk():
    assert thresholds(WHITE, 0.25) == (None, pytest.approx(0.25**0.25))
    assert predicted_spike(0.25**0.25 - 1e-3, WHITE, 0.25).position is None
    assert predicted_spike(0.25**0.25 + 1e-3, WHITE, 0.25).position == pytest.approx(1.5, abs=1e-3)


def test_quiet_noise_lets_a_weak_signal_stand_below_the_bulk():
    below, above = thresholds(QUIET, 0.25)
    edges = mp_edges(0.25)
    assert predicted_spike(below - 1e-3, QUIET, 0.25).side == "below"
    assert predicted_spike(below - 1e-3, QUIET, 0.25).position == pytest.approx(edges[0], abs=1e-3)
    assert predicted_spike((below + above) / 2, QUIET, 0.25).side == "none"
    assert predicted_spike(above + 1e-3, QUIET, 0.25).position == pytest.approx(edges[1], abs=1e-3)


@pytest.mark.parametrize(("noise", "strength"), [(WHITE, 1.2), (WHITE, 2.0), (QUIET, 0.2), (QUIET, 0.4),
                                                 (QUIET, 1.6)])  # fmt: skip
def test_theory_is_what_simulation_gives(noise, strength):
    n, m, draws = 160, 640, 12
    generator = torch.Generator().manual_seed(0)
    theory = predicted_spike(strength, noise, n / m)
    assert theory.position is not None
    found = []
    for _ in range(draws):
        matrix, u, v = draw_matrix(n, m, [strength], noise, generator=generator)
        spike = observed_spike(matrix, u[:, 0], v[:, 0])
        found.append([spike.position, spike.left, spike.right])
    series = torch.tensor(found)
    error = 5 * series.std(0) / math.sqrt(draws) + 0.01  # and what is left of finite size
    difference = (series.mean(0) - torch.tensor([theory.position, theory.left, theory.right])).abs()
    assert (difference < error).all(), (series.mean(0), theory)


def test_no_signal_in_no_noise_is_the_limit_of_weak_ones():
    silent = Noise("silent", along_signal=0.0)
    weak, none = (predicted_spike(strength, silent, 0.25) for strength in (1e-6, 0.0))
    assert (none.position, none.side) == (0.0, "below") and weak.position == pytest.approx(0, abs=1e-6)
    assert (none.left, none.right) == (pytest.approx(weak.left), pytest.approx(weak.right))


def test_noise_has_the_covariance_that_it_states():
    generator = torch.Generator().manual_seed(1)
    matrix, u, _ = draw_matrix(50, 20_000, [0.0], QUIET, generator=generator)
    variances = torch.linalg.eigvalsh(matrix @ matrix.T)
    assert float((u[:, 0] @ matrix).square().sum()) == pytest.approx(0.1, rel=0.1)
    assert variances[0] < 0.12 and ((variances[1:] > 0.85) & (variances[1:] < 1.15)).all()


def test_impossible_models_are_refused():
    with pytest.raises(ParameterError):
        Noise("wrong", along_signal=-0.1)
    with pytest.raises(ParameterError):
        draw_matrix(10, 5, [1.0], WHITE, generator=torch.Generator())
