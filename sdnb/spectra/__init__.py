"""Random-matrix theory of weight matrices: spectra, vectors, removal, and a solvable model (paper B)."""

from sdnb.spectra.marchenko_pastur import (
    NoBulk,
    SpectrumFit,
    fit_spectrum,
    mp_cdf,
    mp_density,
    mp_edges,
    mp_median,
    mp_quantiles,
    noise_distances,
    noise_spectrum,
    rounding_band,
    tracy_widom_cdf,
    tracy_widom_quantile,
)
from sdnb.spectra.random_matrix import Noise, Spike, predicted_spike, thresholds
from sdnb.spectra.singular import BlockRemover, decomposition, removed_share, singular_values
from sdnb.spectra.vectors import (
    chance_band,
    chance_survival,
    ks_distance,
    ks_p_value,
    largest_overlaps,
    porter_thomas_cdf,
    rank_correlation,
    spectrum_p_values,
)

__all__ = [
    "BlockRemover", "NoBulk", "Noise", "SpectrumFit", "Spike", "chance_band", "chance_survival",
    "decomposition", "fit_spectrum", "ks_distance", "ks_p_value", "largest_overlaps", "mp_cdf",
    "mp_density", "mp_edges", "mp_median", "mp_quantiles", "noise_distances", "noise_spectrum",
    "porter_thomas_cdf", "predicted_spike", "rank_correlation", "removed_share",
    "rounding_band", "singular_values", "spectrum_p_values", "thresholds", "tracy_widom_cdf",
    "tracy_widom_quantile",
]  # fmt: skip
