"""Random-matrix theory of weight matrices: spectra, vectors, removal, and a solvable model (paper B)."""

from sdnb.spectra.marchenko_pastur import (
    NoBulk,
    SpectrumFit,
    fit_spectrum,
    median_sigma,
    mp_cdf,
    mp_density,
    mp_distance,
    mp_edges,
    mp_median,
    mp_quantiles,
    noise_distances,
    noise_spectrum,
    rounding_band,
    sigma_error,
)  # fmt: skip
from sdnb.spectra.overlap import (
    chance_band,
    chance_quantile,
    chance_survival,
    largest_overlaps,
    rank_correlation,
    rank_correlation_p_value,
)  # fmt: skip
from sdnb.spectra.porter_thomas import ks_distance, ks_p_value, porter_thomas_cdf, spectrum_p_values
from sdnb.spectra.random_matrix import Noise, Spike, draw_matrix, observed_spike, predicted_spike, thresholds
from sdnb.spectra.singular import BlockRemover, decomposition, index_blocks, removed_share, singular_values
from sdnb.spectra.tracy_widom import tracy_widom_cdf, tracy_widom_quantile

__all__ = [
    "BlockRemover", "NoBulk", "Noise", "SpectrumFit", "Spike", "chance_band", "chance_quantile",
    "chance_survival", "decomposition", "draw_matrix", "fit_spectrum", "index_blocks", "ks_distance",
    "ks_p_value", "largest_overlaps", "median_sigma", "mp_cdf", "mp_density", "mp_distance", "mp_edges",
    "mp_median", "mp_quantiles", "noise_distances", "noise_spectrum", "observed_spike", "porter_thomas_cdf",
    "predicted_spike", "rank_correlation", "rank_correlation_p_value", "removed_share", "rounding_band",
    "sigma_error", "singular_values", "spectrum_p_values", "thresholds", "tracy_widom_cdf",
    "tracy_widom_quantile",
]  # fmt: skip
