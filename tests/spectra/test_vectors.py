"""Chance for entries and overlaps: constants, simulation, uniform p-values; and structure that is found."""

import math

import pytest
import torch

from sdnb.errors import ParameterError
from sdnb.spectra import (
    chance_band,
    chance_survival,
    decomposition,
    ks_distance,
    ks_p_value,
    largest_overlaps,
    porter_thomas_cdf,
    rank_correlation,
    spectrum_p_values,
)
from sdnb.spectra.vectors import null_distances

# paper B's band: coordinates taken as independent normals, good for large N
PUBLISHED = {768: (0.0949, 0.1198, 0.1725), 1024: (0.0852, 0.1062, 0.1512), 2048: (0.0651, 0.0792, 0.1099),
             4096: (0.0493, 0.0588, 0.0798)}  # fmt: skip


@pytest.mark.parametrize("n", PUBLISHED)
def test_the_band_has_the_published_values_to_two_percent(n):
    assert chance_band(n) == pytest.approx(PUBLISHED[n], rel=0.02)


@pytest.mark.parametrize("n", [8, 64, 300])
def test_the_exact_law_is_the_simulated_one(n):
    draws = 60_000
    z = torch.randn(draws, n, generator=torch.Generator().manual_seed(n))
    largest = (z.abs().amax(1) / z.norm(dim=1)).double()
    for share in (0.01, 0.5, 0.99, 0.999):
        t = float(largest.quantile(1 - share))
        slack = 5 * math.sqrt(share * (1 - share) / draws)
        assert chance_survival(t, n) == pytest.approx(share, abs=slack)
    assert chance_survival(1 / math.sqrt(n), n) == 1 and chance_survival(1.0, n) == 0


def test_far_in_the_tail_the_law_is_the_union_of_its_coordinates():
    n, t = 64, 0.8  # two coordinates cannot both exceed 0.8, so that the union is exact
    one = 2 * (1 - float(porter_thomas_cdf(torch.tensor([t]), n)))
    assert chance_survival(t, n) == pytest.approx(n * one, rel=1e-6)


def test_porter_thomas_is_the_law_of_a_coordinate():
    n = 16
    z = torch.randn(40_000, n, generator=torch.Generator().manual_seed(0))
    entries = (z / z.norm(dim=1, keepdim=True))[:, 0].double()
    for t in (-0.4, -0.1, 0.0, 0.2, 0.5):
        assert float(porter_thomas_cdf(torch.tensor([t]), n)) == pytest.approx(
            float((entries <= t).double().mean()), abs=0.012
        )


@pytest.mark.parametrize(("shape", "width"), [((96, 96), 1), ((64, 200), 4), ((300, 60), 6), ((64, 64), 64)])
def test_p_values_of_noise_are_uniform(shape, width):
    generator = torch.Generator().manual_seed(5)
    found = []
    while sum(len(values) for values in found) < 120:
        left, _, right = decomposition(torch.randn(shape, generator=generator))
        found += [spectrum_p_values(side, width, draws=1000)[2] for side in (left, right)]
    values = torch.cat(found).sort().values
    steps = torch.arange(1, len(values) + 1) / len(values)
    assert (values - steps).abs().max() < 1.9 / math.sqrt(len(values))


def test_unit_length_makes_the_distance_shorter_than_the_textbook_law():
    from scipy.stats import kstwobign

    null = null_distances(1000, 1, 1500)
    assert float(null.median()) < 0.97 * kstwobign.ppf(0.5)
    assert null_distances(64, 1, 1500).median() == pytest.approx(float(null.median()), rel=0.05)
    assert null_distances(64, 8, 1500).median() == pytest.approx(float(null.median()), rel=0.05)


def test_a_sparse_vector_is_not_random():
    vector = torch.zeros(256, 1)
    vector[:16] = 0.25
    assert ks_p_value(ks_distance(vector), 256) == 1 / 4001


def test_pools_cover_the_spectrum_once():
    vectors = decomposition(torch.randn(103, 103, generator=torch.Generator().manual_seed(6)))[2]
    blocks, distances, p_values = spectrum_p_values(vectors, 8, draws=50)
    assert [b.start for b in blocks[1:]] == [b.stop for b in blocks[:-1]]
    assert (blocks[0].start, blocks[-1].stop) == (0, 103)
    assert all(8 <= b.stop - b.start <= 9 for b in blocks) and len(blocks) == len(distances) == len(p_values)
    with pytest.raises(ParameterError, match="pool width"):
        spectrum_p_values(vectors, 0)


def test_overlaps_see_a_shared_direction_whatever_its_sign():
    generator = torch.Generator().manual_seed(7)
    basis = torch.linalg.qr(torch.randn(64, 64, generator=generator, dtype=torch.float64))[0]
    vectors = torch.linalg.qr(torch.randn(64, 5, generator=generator, dtype=torch.float64))[0]
    vectors[:, 2] = -basis[:, 40]
    overlaps = largest_overlaps(vectors, basis)
    slow = [max(abs(float(v @ f)) for f in basis.T) for v in vectors.T]
    assert overlaps.tolist() == pytest.approx(slow)
    assert float(overlaps[2]) == pytest.approx(1)


def test_a_rank_correlation_against_its_shifts():
    a = torch.arange(50.0)
    assert rank_correlation(a, a**3) == pytest.approx((1, 1 / 50))
    assert rank_correlation(a, -a) == pytest.approx((-1, 1))
