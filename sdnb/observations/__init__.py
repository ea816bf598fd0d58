"""One function per notebook template: it computes the template's record from a loaded model."""

from sdnb.observations.common import Observation, save
from sdnb.observations.empirical_direction import direction_over_text
from sdnb.observations.high_norm_tokens import high_norm_tokens
from sdnb.observations.linear_layers import linearity
from sdnb.observations.negative_eigenvalues import negative_eigenvalues
from sdnb.observations.singular_directions import singular_directions

__all__ = [
    "Observation",
    "direction_over_text",
    "high_norm_tokens",
    "linearity",
    "negative_eigenvalues",
    "save",
    "singular_directions",
]
