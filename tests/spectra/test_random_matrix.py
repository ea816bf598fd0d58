"""Theory of the solvable model against its known special case and against simulation."""

import math

import pytest

from sdnb.errors import ParameterError
from sdnb.spectra import Noise, mp_edges, predicted_spike, thresholds
from tests.cells import run_cells

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


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    """Notebook 18, which draws matrices and looks for the signal in them."""
    results = str(tmp_path_factory.mktemp("results"))
    return run_cells("18", results_dir=results, strengths=[0.2, 0.4, 1.0, 1.6, 2.0], draws=12)


def test_theory_is_what_simulation_gives(notebook):
    table = notebook["table"]
    outside = table[table.side != "none"]
    assert sorted(outside.signal[outside.noise == "correlated"]) == [0.2, 0.4, 1.6, 2.0]
    for key, theory in (
        ("position", "theory_position"),
        ("overlap", "theory"),
        ("right_overlap", "theory_right"),
    ):
        error = 5 * outside[f"{key}_error"] + 0.01  # and what is left of finite size
        assert ((outside[key] - outside[theory]).abs() < error).all(), outside[[key, theory]]


def test_no_signal_in_no_noise_is_the_limit_of_weak_ones():
    silent = Noise("silent", along_signal=0.0)
    weak, none = (predicted_spike(strength, silent, 0.25) for strength in (1e-6, 0.0))
    assert (none.position, none.side) == (0.0, "below") and weak.position == pytest.approx(0, abs=1e-6)
    assert (none.left, none.right) == (pytest.approx(weak.left), pytest.approx(weak.right))


def test_noise_has_the_covariance_that_it_states(notebook):
    matrix, u, _ = notebook["draw"]([0.0], QUIET)
    along = float((u[:, 0] @ matrix).square().sum())
    assert along == pytest.approx(0.1, rel=0.2)
    assert (float(matrix.square().sum()) - along) / 159 == pytest.approx(1, rel=0.02)


def test_impossible_models_are_refused():
    with pytest.raises(ParameterError):
        Noise("wrong", along_signal=-0.1)
    with pytest.raises(ParameterError, match="rows <= columns"):
        run_cells("18", rows=10, columns=5)
