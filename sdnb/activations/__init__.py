"""What a forward pass leaves in the residual stream: hidden states, norms, the empirical direction, the ledger."""

from sdnb.activations.capture import hidden_norms, hidden_states, token_batches, visit_states
from sdnb.activations.detection import Detection, detect, layer_steps
from sdnb.activations.direction import HighNormStates, collect_high_norm_states, mean_pairwise_angle
from sdnb.activations.ledger import Ledger, ledger
from sdnb.activations.perplexity import Perplexity, perplexity, window_length

__all__ = [
    "Detection",
    "HighNormStates",
    "Ledger",
    "Perplexity",
    "collect_high_norm_states",
    "detect",
    "hidden_norms",
    "hidden_states",
    "layer_steps",
    "ledger",
    "mean_pairwise_angle",
    "perplexity",
    "token_batches",
    "visit_states",
    "window_length",
]
