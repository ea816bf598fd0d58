"""Input statistics, simulated quantization, skip lists and their forms, experts, the single weight."""

from sdnb.quantize.experts import ExpertStatistics, super_experts, watched_experts
from sdnb.quantize.formats import FORMATS, absmax_scale, levels_left, rounded
from sdnb.quantize.modules import InputStatistics, LinearModule, linear_modules, never_quantized, norm_feeding
from sdnb.quantize.schemes import (
    SCHEMES,
    PairedRatio,
    QuantizedLinear,
    Scheme,
    kept_share,
    perplexity_ratio,
    quantized,
    smoothing_factors,
)
from sdnb.quantize.single_weights import (
    SingleWeight,
    down_projections,
    similar_entries,
    single_weights,
    zeroed_entries,
)
from sdnb.quantize.skip_lists import (
    MIN_TOKEN_RATIO,
    Form,
    Sensitivity,
    SkipList,
    forms,
    fused_with,
    sensitivity,
    skip_list,
)
from sdnb.quantize.statistics import input_statistics

__all__ = [
    "FORMATS", "MIN_TOKEN_RATIO", "SCHEMES", "ExpertStatistics", "Form", "InputStatistics",
    "LinearModule", "PairedRatio", "QuantizedLinear", "Scheme", "Sensitivity", "SingleWeight", "SkipList",
    "absmax_scale", "down_projections", "forms", "fused_with", "input_statistics",
    "kept_share", "levels_left", "linear_modules", "never_quantized", "norm_feeding", "perplexity_ratio",
    "quantized", "rounded", "sensitivity", "similar_entries", "single_weights", "skip_list",
    "smoothing_factors", "super_experts", "watched_experts", "zeroed_entries",
]  # fmt: skip
