"""The law against its constants and its integral; outliers of noise at the stated rate; planted spikes."""

import math

import pytest
import torch

from sdnb.errors import ParameterError
from sdnb.spectra import (
    fit_spectrum,
    mp_cdf,
    mp_density,
    mp_edges,
    mp_median,
    mp_quantiles,
    noise_distances,
    noise_spectrum,
    rounding_band,
    singular_values,
    tracy_widom_cdf,
    tracy_widom_quantile,
)
from sdnb.spectra.marchenko_pastur import median_sigma
from sdnb.spectra.random_matrix import Noise, predicted_spike


@pytest.mark.parametrize(("q", "edges", "median"), [
    (1.0, (0, 2), 0.65278), (0.25, (0.5, 1.5), 0.91600), (4096 / 14336, (0.4655, 1.5345), 0.90389),
])  # fmt: skip
def test_edges_and_medians_have_the_digits_of_the_paper(q, edges, median):
    assert tuple(round(edge, 4) for edge in mp_edges(q)) == edges
    assert round(mp_median(q), 5) == median


@pytest.mark.parametrize("q", [1.0, 0.97, 0.5, 0.25, 0.01])
def test_closed_form_is_the_integral_of_the_density(q):
    low, high = mp_edges(q)
    angle = torch.linspace(0, math.pi, 20001, dtype=torch.float64)  # steps that are short near the edges
    nu = (low + high) / 2 - (high - low) / 2 * torch.cos(angle)
    mass = torch.cumulative_trapezoid(mp_density(nu, q), nu)
    torch.testing.assert_close(mass, mp_cdf(nu[1:], q), rtol=0, atol=2e-6)
    ends = torch.tensor([low, high], dtype=torch.float64)
    assert mp_cdf(ends, q).tolist() == pytest.approx([0, 1], abs=1e-9)
    probabilities = torch.tensor([0.01, 0.3, 0.5, 0.9, 0.999]).double()
    torch.testing.assert_close(mp_cdf(mp_quantiles(probabilities, q), q), probabilities, rtol=0, atol=1e-12)


def test_tracy_widom_has_its_published_quantiles():
    published = {0.01: -3.90, 0.05: -3.18, 0.5: -1.27, 0.9: 0.45, 0.95: 0.98, 0.99: 2.02}
    for probability, quantile in published.items():  # Johnstone 2001, table 1
        assert tracy_widom_quantile(probability) == pytest.approx(quantile, abs=0.006)
        assert tracy_widom_cdf(tracy_widom_quantile(probability)) == pytest.approx(probability, abs=1e-8)


def test_noise_drawn_as_a_bidiagonal_matrix_is_noise():
    generator = torch.Generator().manual_seed(0)
    shape = (40, 24)
    drawn = torch.stack([noise_spectrum(shape, generator=generator) for _ in range(400)])
    full = torch.linalg.svdvals(torch.randn(400, *shape, generator=generator, dtype=torch.float64)).flip(1)
    error = (drawn.std(0) ** 2 + full.std(0) ** 2).sqrt() / 20
    assert ((drawn.mean(0) - full.mean(0)).abs() < 5 * error).all()
    torch.testing.assert_close(drawn.std(0), full.std(0), rtol=0.25, atol=0)


@pytest.mark.parametrize("shape", [(64, 64), (128, 128), (96, 384), (300, 100), (90, 100)])
def test_noise_shows_outliers_at_the_stated_rate(shape):
    generator, draws, rate = torch.Generator().manual_seed(1), 400, 0.05
    spectra = (noise_spectrum(shape, generator=generator) for _ in range(draws))
    fits = [fit_spectrum(values, shape, false_positive_rate=rate) for values in spectra]
    slack = 4 * math.sqrt(rate * (1 - rate) / draws)
    assert sum(fit.outliers_above > 0 for fit in fits) / draws == pytest.approx(rate, abs=slack)
    if min(shape) / max(shape) > 0.9:
        assert all(fit.outliers_below is None and fit.hard_edge for fit in fits)
    else:
        assert sum(fit.outliers_below > 0 for fit in fits) / draws == pytest.approx(rate, abs=slack)


@pytest.mark.parametrize("shape", [(128, 128), (96, 352), (256, 64)])
def test_real_gaussian_matrices_follow_the_law(shape):
    generator = torch.Generator().manual_seed(2)
    values = singular_values(0.02 * torch.randn(shape, generator=generator))
    fit = fit_spectrum(values, shape, false_positive_rate=1e-4)
    assert fit.outliers_above == 0 and not fit.outliers_below
    assert fit.sigma == pytest.approx(0.02, rel=0.05)
    assert fit.distance < 1.5 * noise_distances(shape, 40)[-1]


def test_the_median_does_not_mind_outliers():
    generator = torch.Generator().manual_seed(3)
    shape = (100, 400)
    values = noise_spectrum(shape, generator=generator)
    clean = median_sigma(values, shape)
    values[-5:] *= 10
    assert median_sigma(values, shape) == pytest.approx(clean, rel=1e-9)
    frobenius = math.sqrt(float((values**2).sum()) / (100 * 400))
    assert frobenius > 1.5 * clean, "the planted outliers must move what is not robust"


@pytest.mark.parametrize(("strengths", "quiet", "below", "above"), [
    ([2.0, 1.5, 1.2], 1.0, 0, 3),  # white noise: all above
    ([0.1, 0.3], 0.05, 2, 0),  # quiet along the signals: both below
    ([0.2, 0.8, 2.0], 0.05, 1, 1),  # one below, one lost, one above
])  # fmt: skip
def test_planted_spikes_are_found_on_their_side_and_at_their_place(strengths, quiet, below, above):
    shape, generator, noise = (200, 800), torch.Generator().manual_seed(4), Noise("test", along_signal=quiet)
    matrix = torch.randn(shape, generator=generator) / 800**0.5
    for place, strength in enumerate(strengths):  # row by row is as good as any directions
        matrix[place] *= quiet**0.5
        matrix[place, place] += strength
    values = singular_values(matrix)
    fit = fit_spectrum(values, shape)
    assert (fit.outliers_below, fit.outliers_above) == (below, above)
    places = sorted(p for s in strengths if (p := predicted_spike(s, noise, 0.25).position) is not None)
    found = torch.cat([values[:below], values[len(values) - above :]]).tolist()
    assert found == pytest.approx(places, rel=0.06)


@pytest.mark.parametrize("values", [torch.ones(5), torch.zeros(4)])
def test_what_cannot_be_fitted_is_refused(values):
    with pytest.raises(ParameterError):
        fit_spectrum(values, (4, 8))


@pytest.mark.parametrize("shape", [(120, 120), (64, 200)])
def test_the_rounding_band_ends_where_the_spectrum_of_the_true_errors_ends(shape):
    generator = torch.Generator().manual_seed(5)
    W = torch.randn(shape, generator=generator)
    step = W.unflatten(1, (-1, 40)).abs().amax(-1, keepdim=True) / 7  # one for every 40
    stored = ((W.unflatten(1, (-1, 40)) / step).round() * step).flatten(1)
    sigma = (step.square().mean() / 12).sqrt().item()  # what the format's steps alone tell
    assert sigma == pytest.approx((stored - W).square().mean().sqrt().item(), rel=0.03)
    band = rounding_band(sigma, shape)
    assert torch.linalg.svdvals(stored - W)[0].item() == pytest.approx(band, rel=0.06)
    flat = torch.linalg.svdvals(torch.ones(shape) @ torch.eye(shape[1]) * 3 + stored - W)
    assert (flat[1:] < 1.06 * band).all() and flat[0] > 5 * band, "all but the planted value is rounding"
