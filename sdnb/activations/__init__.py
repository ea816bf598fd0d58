"""What a forward pass leaves in the residual stream, the defect in it, interventions, perplexity, sinks."""

from sdnb.activations.defect import (
    Defect,
    Exploded,
    HighNormStates,
    StateReader,
    find_defect,
    mean_pairwise_angle,
)
from sdnb.activations.detection import Detection, detect
from sdnb.activations.interventions import project_out, set_dimensions, zero_attention, zero_branch
from sdnb.activations.perplexity import Perplexity, continuation, perplexity, text_windows, window_length
from sdnb.activations.sinks import Sinks, quantized_cache, sink_rate, sink_sequences, sinks
from sdnb.activations.states import (
    Ledger,
    hidden_norms,
    hidden_states,
    input_device,
    ledger,
    matrix_inputs,
    token_batches,
    visit_states,
)
from sdnb.activations.sweep import (
    Coefficients,
    VocabularySample,
    embedding_norms,
    ffn_input_coefficients,
    item_norms,
    item_trajectories,
    random_norms,
    vocabulary_sample,
)

__all__ = [
    "Coefficients", "Defect", "Detection", "Exploded", "HighNormStates", "Ledger", "Perplexity", "Sinks",
    "StateReader", "VocabularySample", "continuation", "detect", "embedding_norms",
    "ffn_input_coefficients", "find_defect", "hidden_norms", "hidden_states", "input_device", "item_norms",
    "item_trajectories", "ledger", "matrix_inputs", "mean_pairwise_angle", "perplexity", "project_out",
    "quantized_cache", "random_norms", "set_dimensions", "sink_rate", "sink_sequences", "sinks",
    "text_windows", "token_batches", "visit_states", "vocabulary_sample", "window_length", "zero_attention",
    "zero_branch",
]  # fmt: skip
