"""What a Hugging Face decoder looks like, found by watching it; the only place that knows."""

from sdnb.layers.attention import AttentionMatrix
from sdnb.layers.branches import residual_branches
from sdnb.layers.contributions import branch_contributions
from sdnb.layers.ffn import FFNFormula
from sdnb.layers.matrices import WeightMatrix, layer_matrices, model_matrices, replaced_matrices
from sdnb.layers.norms import Norm
from sdnb.layers.reading import each_layer, layer_view
from sdnb.layers.trace import decoder_layers
from sdnb.layers.view import LayerView

__all__ = [
    "AttentionMatrix",
    "FFNFormula",
    "LayerView",
    "Norm",
    "WeightMatrix",
    "branch_contributions",
    "decoder_layers",
    "each_layer",
    "layer_matrices",
    "layer_view",
    "model_matrices",
    "replaced_matrices",
    "residual_branches",
]
