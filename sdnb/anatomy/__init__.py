"""What a Hugging Face decoder looks like, found by watching it; the only place that knows."""

from sdnb.anatomy.attention import AttentionMatrix
from sdnb.anatomy.contributions import branch_contributions
from sdnb.anatomy.ffn import FFNFormula
from sdnb.anatomy.matrices import WeightMatrix, layer_matrices, model_matrices, replaced_matrices
from sdnb.anatomy.norms import Norm
from sdnb.anatomy.reading import layer_view
from sdnb.anatomy.trace import decoder_layers
from sdnb.anatomy.view import LayerView

__all__ = [
    "AttentionMatrix",
    "FFNFormula",
    "LayerView",
    "Norm",
    "WeightMatrix",
    "branch_contributions",
    "decoder_layers",
    "layer_matrices",
    "layer_view",
    "model_matrices",
    "replaced_matrices",
]
