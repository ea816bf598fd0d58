"""One function per notebook template: it computes the template's record from a loaded model."""

from sdnb.observations.common import Observation, save
from sdnb.observations.empirical_direction import direction_over_text
from sdnb.observations.high_norm_tokens import high_norm_tokens
from sdnb.observations.inspection import detect_defects
from sdnb.observations.linear_layers import linearity
from sdnb.observations.negative_eigenvalues import negative_eigenvalues
from sdnb.observations.quantization import quantization
from sdnb.observations.random_matrix_model import random_matrix_model
from sdnb.observations.removing_singular_values import removing_singular_values
from sdnb.observations.singular_directions import singular_directions
from sdnb.observations.singular_vectors import singular_vectors
from sdnb.observations.weight_spectra import weight_spectra

__all__ = [
    "Observation",
    "detect_defects",
    "direction_over_text",
    "high_norm_tokens",
    "linearity",
    "negative_eigenvalues",
    "quantization",
    "random_matrix_model",
    "removing_singular_values",
    "save",
    "singular_directions",
    "singular_vectors",
    "weight_spectra",
]
