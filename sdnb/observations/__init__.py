"""One function per notebook template: it computes the template's record from a loaded model."""

from sdnb.observations.across_models import across_models
from sdnb.observations.checkpoints import save_collection
from sdnb.observations.common import Observation, save
from sdnb.observations.empirical_direction import direction_over_text
from sdnb.observations.explosion_subspace import explosion_subspace
from sdnb.observations.fine_tuned_spectra import fine_tuned_spectra
from sdnb.observations.fine_tuning import fine_tuning
from sdnb.observations.high_norm_tokens import high_norm_tokens
from sdnb.observations.initial_tokens import initial_tokens
from sdnb.observations.inspection import detect_defects
from sdnb.observations.interventions import interventions
from sdnb.observations.kinship import lineage, signatures, stored_signature
from sdnb.observations.linear_layers import linearity
from sdnb.observations.negative_eigenvalues import negative_eigenvalues
from sdnb.observations.noninitial_tokens import noninitial_tokens
from sdnb.observations.quantization import quantization
from sdnb.observations.random_matrix_model import random_matrix_model
from sdnb.observations.removing_singular_values import removing_singular_values
from sdnb.observations.signatures import signature
from sdnb.observations.singular_directions import singular_directions
from sdnb.observations.singular_vectors import singular_vectors
from sdnb.observations.training_dynamics import training_dynamics
from sdnb.observations.weight_spectra import weight_spectra

__all__ = [
    "Observation",
    "across_models",
    "detect_defects",
    "direction_over_text",
    "explosion_subspace",
    "fine_tuned_spectra",
    "fine_tuning",
    "high_norm_tokens",
    "initial_tokens",
    "interventions",
    "lineage",
    "linearity",
    "negative_eigenvalues",
    "noninitial_tokens",
    "quantization",
    "random_matrix_model",
    "removing_singular_values",
    "save",
    "save_collection",
    "signature",
    "signatures",
    "singular_directions",
    "singular_vectors",
    "stored_signature",
    "training_dynamics",
    "weight_spectra",
]
