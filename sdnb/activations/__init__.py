"""What a forward pass leaves in the residual stream: hidden states, norms, the empirical direction, the ledger."""

from sdnb.activations.capture import hidden_norms, hidden_states, token_batches, visit_states
from sdnb.activations.detection import Detection, detect, layer_steps
from sdnb.activations.direction import HighNormStates, collect_high_norm_states, mean_pairwise_angle
from sdnb.activations.ledger import Ledger, ledger

__all__ = [
    "Detection",
    "HighNormStates",
    "Ledger",
    "collect_high_norm_states",
    "detect",
    "hidden_norms",
    "hidden_states",
    "layer_steps",
    "ledger",
    "mean_pairwise_angle",
    "token_batches",
    "visit_states",
]
