"""What a Hugging Face decoder layer looks like, found by watching it; `view.py` is the file to read first."""

from sdnb.layers.decoder import decoder_layers
from sdnb.layers.matrices import WeightMatrix, layer_matrices, model_matrices, replaced_matrices
from sdnb.layers.reading import each_layer, layer_view
from sdnb.layers.view import FFNFormula, LayerView, Norm
from sdnb.layers.watching import BranchModules, LayerBranches, residual_branches

__all__ = [
    "BranchModules", "FFNFormula", "LayerBranches", "LayerView", "Norm", "WeightMatrix", "decoder_layers",
    "each_layer", "layer_matrices", "layer_view", "model_matrices", "replaced_matrices",
    "residual_branches",
]  # fmt: skip
