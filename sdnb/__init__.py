"""What linear algebra sees inside a transformer language model: singular defects and small singular values.

Every public name of the numerics is importable from here; a name is loaded when it is first used, so that
`import sdnb` costs nothing and needs neither matplotlib nor Jupyter.
"""

from importlib import import_module

_WHERE = {
    "sdnb.errors": (
        "LayerUnsupported", "MemoryShortage", "ModelError", "ParameterError", "RecordError", "SdnbError",
        "TextError",
    ),
    "sdnb.loading": ("Loaded", "load"),
    "sdnb.text": ("Text", "encode", "token_labels"),
    "sdnb.bar": ("progress",),
    "sdnb.layers": (
        "FFNFormula", "LayerView", "Norm", "WeightMatrix", "decoder_layers",
        "each_layer", "layer_matrices", "layer_view", "model_matrices", "replaced_matrices",
        "residual_branches",
    ),
    "sdnb.linearize": (
        "LinearLayer", "SampledFit", "apply_linear", "attention_intercept", "attention_matrix",
        "branch_scales", "closed_form_fit", "gaussian_moments", "linear_layer", "sampled_fit",
        "stream_scales",
    ),
    "sdnb.decompose": (
        "Eigenpair", "Gain", "Triplets", "angle_deg", "expected_nearest_angle", "largest_gain",
        "leading_triplets", "log10_chance", "nearest_eigenpair", "random_angle", "random_angle_quantile",
    ),
    "sdnb.activations": (
        "Coefficients", "Defect", "Detection", "Exploded", "HighNormStates", "Ledger", "Perplexity",
        "Sinks", "StateReader", "VocabularySample", "continuation",
        "detect", "embedding_norms", "ffn_input_coefficients", "find_defect", "hidden_norms",
        "hidden_states", "item_norms", "item_trajectories", "ledger", "mean_pairwise_angle", "perplexity",
        "project_out", "quantized_cache", "random_norms", "set_dimensions", "sink_rate", "sink_sequences",
        "sinks", "text_windows", "token_batches", "visit_states", "vocabulary_sample",
        "window_length", "zero_attention", "zero_branch",
    ),
    "sdnb.quantize": (
        "InputStatistics", "LinearModule", "QuantizedLinear", "SCHEMES", "Scheme", "SkipList",
        "down_projections", "input_statistics", "kept_share", "linear_modules",
        "never_quantized", "norm_feeding", "perplexity_ratio", "quantized", "sensitivity", "single_weights",
        "skip_list", "smoothing_factors", "super_experts", "zeroed_entries",
    ),
    "sdnb.spectra": (
        "BlockRemover", "Noise", "SpectrumFit", "Spike", "chance_band", "chance_survival",
        "fit_spectrum", "ks_distance", "ks_p_value", "largest_overlaps", "mp_cdf", "mp_density", "mp_edges",
        "mp_median", "noise_spectrum", "porter_thomas_cdf", "predicted_spike",
        "singular_values", "spectrum_p_values", "tracy_widom_cdf", "tracy_widom_quantile",
    ),
    "sdnb.signatures": (
        "Signature", "alignment", "compare_signatures", "related_groups", "signature",
    ),
    "sdnb.records": (
        "Record", "beside_published", "provenance", "read_record", "save_record", "summary",
    ),
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _WHERE.items() for name in names}

__all__ = sorted(_MODULE_OF)


def __getattr__(name: str) -> object:
    if name in ("plots", "quantize", "spectra"):
        return import_module(f"sdnb.{name}")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'sdnb' has no attribute {name!r}")
    return getattr(import_module(_MODULE_OF[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
