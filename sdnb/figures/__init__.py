"""Every picture of the book: from a record's values or arrays to a figure or its axes."""

from sdnb.figures.directions import eigenpairs, ledger_bars, singular_directions, state_angles
from sdnb.figures.linearity import linearity, sampling_error
from sdnb.figures.norms import norms_2d, norms_3d
from sdnb.figures.style import save, use_style

__all__ = [
    "eigenpairs",
    "ledger_bars",
    "linearity",
    "norms_2d",
    "norms_3d",
    "sampling_error",
    "save",
    "singular_directions",
    "state_angles",
    "use_style",
]
