"""Input statistics, simulated quantization and skip lists."""

from sdnb.quantize.integers import absmax_scale, quantize, quantized_product
from sdnb.quantize.linears import LinearModule, linear_modules, never_quantized, norm_feeding
from sdnb.quantize.round_to_nearest import QuantizedLinear, Scheme, kept_share, quantized
from sdnb.quantize.skip_list import MIN_TOKEN_RATIO, SkipList, down_projections, skip_list
from sdnb.quantize.smoothquant import smoothing_factors
from sdnb.quantize.statistics import InputStatistics, input_statistics, int8_errors

__all__ = [
    "MIN_TOKEN_RATIO",
    "InputStatistics",
    "LinearModule",
    "QuantizedLinear",
    "Scheme",
    "SkipList",
    "absmax_scale",
    "down_projections",
    "input_statistics",
    "int8_errors",
    "kept_share",
    "linear_modules",
    "never_quantized",
    "norm_feeding",
    "quantize",
    "quantized",
    "quantized_product",
    "skip_list",
    "smoothing_factors",
]
