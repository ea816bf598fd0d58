"""Every picture of the book: from a record's values or arrays to a figure or its axes."""

from sdnb.figures.across import angles_across, key_figures, norms_across, signature_matrix
from sdnb.figures.directions import eigenpairs, ledger_bars, singular_directions, state_angles
from sdnb.figures.dynamics import (
    explosion_map,
    intervention_norms,
    norm_curves,
    pair_angles,
    training,
)
from sdnb.figures.linearity import linearity, sampling_error
from sdnb.figures.norms import norms_2d, norms_3d
from sdnb.figures.paths import (
    ablations,
    coefficients,
    in_context,
    initial_norms,
    noninitial_norms,
    subspace_outputs,
)
from sdnb.figures.random_matrix import example_spectra, outlier_positions
from sdnb.figures.removal import removed_deciles, tuning_order
from sdnb.figures.spectra import outlier_counts, spectra_grid
from sdnb.figures.style import save, use_style
from sdnb.figures.uses import (
    input_spikes,
    layer_errors,
    quantized_perplexity,
    signature_map,
    signature_robustness,
)
from sdnb.figures.vectors import along_spectrum, overlap_summary

__all__ = [
    "ablations",
    "along_spectrum",
    "angles_across",
    "coefficients",
    "eigenpairs",
    "example_spectra",
    "explosion_map",
    "in_context",
    "initial_norms",
    "input_spikes",
    "intervention_norms",
    "key_figures",
    "layer_errors",
    "ledger_bars",
    "linearity",
    "noninitial_norms",
    "norm_curves",
    "norms_2d",
    "norms_3d",
    "norms_across",
    "outlier_counts",
    "outlier_positions",
    "overlap_summary",
    "pair_angles",
    "quantized_perplexity",
    "removed_deciles",
    "sampling_error",
    "save",
    "signature_map",
    "signature_matrix",
    "signature_robustness",
    "singular_directions",
    "spectra_grid",
    "state_angles",
    "subspace_outputs",
    "training",
    "tuning_order",
    "use_style",
]
