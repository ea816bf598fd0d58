"""What the notebooks on singular defects (01 to 05) record; one line a key."""

from sdnb.records.schema import Field, Schema

LAYERS = ("L",)
STEPS = (
    Field("explosion_layers", "layers where the norm jumps, the largest step first", ("*",), "integer"),
    Field("decay_layers", "layers where it collapses, the largest step first", ("*",), "integer"),
)
VIEW = (
    Field("method", '"closed_form" or "sampled" linear view of the FFN', kind="text"),
    Field("input_scale", '"paper" or "gain": variance of the Gaussian inputs of the FFN\'s fit', kind="text"),
)
REFUSED = Field("refused", "layers without a linear view, by number, with the reason", kind="notes")


def _pairwise(name: str, which: str) -> tuple[Field, Field]:
    """Mean acute angle over pairs of states and its standard error (02)."""
    return (
        Field(
            f"{name}_pairwise_angle_deg",
            f"mean acute angle over pairs of distinct states, {which}",
            unit="degrees",
            null=True,
        ),
        Field(
            f"{name}_pairwise_angle_error_deg",
            "its standard error, 0 when all pairs were taken",
            unit="degrees",
            null=True,
        ),
    )


def _agreement(branch: str, scale: str, inputs: str) -> tuple[Field, Field]:
    """Cosine and relative error of one branch's linear view (03)."""
    key = branch + ("_gain" if scale == "gain" else "") + ("_gaussian" if inputs == "Gaussian inputs" else "")
    what = f"linear view of {branch}, {scale}'s input scale, against the real module on {inputs}"
    return (
        Field(f"{key}_cosine", f"mean cosine: {what}", LAYERS, null=True),
        Field(f"{key}_error", f"relative error: {what}", LAYERS, null=True),
    )


# fmt: off
VALUES_01 = (
    Field("peak_ratio", "largest norm of any token after any layer over the median norm there"),
    Field("threshold", "norm above which a token counts as high-norm; null if there is none", null=True),
    *STEPS,
    Field("tokens", "the tokens as text", ("T",), "text"),
    Field("token_ids", "the tokens as ids", ("T",), "integer"),
    Field("high_norm_positions", "positions of the high-norm tokens, 0 the first", ("*",), "integer"),
    Field("peak_norm", "largest norm of any token after any layer"),
    Field("median_norm", "median norm over the tokens after each layer", LAYERS),
)
ARRAYS_01 = (
    Field("norms", "norm of every token's hidden state, from the embedding to the last layer", ("L+1", "T")),
)
VALUES_02 = (
    Field("high_norm_count", "number of high-norm hidden states", kind="integer"),
    Field("threshold", "norm above which a hidden state counts; null if there is none", null=True),
    Field("mean_low_norm", "mean norm of the other hidden states", null=True),
    Field("peak_ratio", "largest norm over the median norm of its layer"),
    *STEPS,
    Field("layer_count", "number of decoder layers", kind="integer"),
    Field("line_count", "number of lines of text", kind="integer"),
    Field("initial_count", "high-norm states at position 0", kind="integer"),
    Field("noninitial_count", "high-norm states at later positions", kind="integer"),
    Field("noninitial_tokens", "most frequent tokens among the latter", ("*",), "text"),
    *_pairwise("mean", "all high-norm states"),
    *_pairwise("initial", "those at position 0"),
    *_pairwise("noninitial", "those at later positions"),
    Field("initial_to_noninitial_angle_deg", "acute angle between the means of both kinds", unit="degrees",
          null=True),
)
ARRAYS_02 = (
    Field("direction", "mean of all high-norm states; zeros if there is none", ("d",)),
    Field("state_angle_deg", "acute angle of each high-norm state to that mean", ("s",), unit="degrees"),
    Field("state_layer", "layer after which each state stands, 0 the embedding", ("s",)),
    Field("state_position", "its position in the line", ("s",)),
    Field("state_line", "its line, 0 the first", ("s",)),
)
VALUES_03 = (
    *(field for branch in ("attention", "ffn", "layer") for scale in ("paper", "gain")
      for inputs in ("real states", "Gaussian inputs") for field in _agreement(branch, scale, inputs)),
    Field("attention_intercept", "what biases of attention and its norms add, no part of A x: its length "
          "over that of all that attention adds, on real states", LAYERS, null=True),
    Field("sample_layer", "layer whose FFN was also fitted by sampling", kind="integer"),
    Field("sample_counts", "numbers of random inputs of the sampled fits", ("k",), "integer"),
    Field("sampled_error", "relative error of the sampled B against the closed form, by count", ("k",)),
    Field("sampled_standard_error", "the sampled fit's own estimate of it", ("k",), required=False),
    REFUSED,
)
VALUES_04 = (
    Field("angle_deg", "leading left singular vector of L to the empirical direction", LAYERS,
          unit="degrees", null=True),
    Field("singular_value", "largest singular value of L", LAYERS, null=True),
    Field("second_singular_value", "second singular value of L; the gap is what the angle rests on", LAYERS,
          null=True),
    Field("ffn_angle_deg", "leading left singular vector of F to it", LAYERS, unit="degrees", null=True),
    Field("gain_angle_deg", "largest-gain output of the real FFN to the direction", LAYERS, unit="degrees",
          null=True),
    Field("gain", "norm of that output; null where the FFN adds nothing", LAYERS, null=True),
    Field("ffn_singular_value", "largest singular value of F", LAYERS, null=True),
    Field("ffn_second_singular_value", "second singular value of F", LAYERS, null=True),
    Field("status", "\"exact\", \"approximate\" or \"sampled\" linear view", LAYERS, "text", null=True),
    Field("random_angle_deg", "expected acute angle between random directions", unit="degrees"),
    *STEPS, *VIEW, REFUSED,
)
ARRAYS_04 = (
    Field("directions", "leading left singular vectors of L", ("L", "d")),
    Field("ffn_directions", "leading left singular vectors of F", ("L", "d")),
    Field("gain_inputs", "unit inputs of largest gain", ("L", "d")),
    Field("gain_outputs", "what the real FFN adds at sqrt(d) times them, of length `gain`", ("L", "d")),
)
VALUES_05 = (
    Field("angle_deg", "real part of the nearest eigenvector of L - I to the direction", LAYERS,
          unit="degrees", null=True),
    Field("plane_angle_deg", "the same with the invariant plane of a complex pair", LAYERS, unit="degrees",
          null=True),
    Field("eigenvalue", "real part of its eigenvalue", LAYERS, null=True),
    Field("eigenvalue_imag", "imaginary part of its eigenvalue", LAYERS, null=True),
    Field("norm_aware_eigenvalue", "eigenvalue of L_rho - I along the direction", LAYERS, null=True),
    Field("ledger_attention", "what attention adds along the direction, high-norm tokens", LAYERS, null=True),
    Field("ledger_ffn", "what the FFN adds along the direction, high-norm tokens", LAYERS, null=True),
    Field("ledger_ordinary_attention", "what attention adds there, other tokens", LAYERS, null=True),
    Field("ledger_ordinary_ffn", "what the FFN adds there, other tokens", LAYERS, null=True),
    Field("ledger_stream", "what the stream's own norms change there, if it passes any, high-norm tokens",
          LAYERS, null=True, required=False),
    Field("ledger_start", "coordinate of the high-norm tokens' embeddings along the direction", null=True),
    Field("ledger_end", "their coordinate after the last layer", null=True),
    Field("norm_aware_angle_deg", "angle of the eigenvector of L_rho - I", LAYERS, unit="degrees", null=True),
    Field("attention_scale", "divisor of attention's norm, median high-norm token", LAYERS, null=True),
    Field("ffn_scale", "divisor of the FFN's norm, median high-norm token", LAYERS, null=True),
    Field("nearest_random_angle_deg", "expected angle of the nearest of d random directions", unit="degrees"),
    *STEPS, *VIEW, REFUSED,
)
# fmt: on
SCHEMAS = (
    Schema("01_high_norm_tokens", "model", VALUES_01, ARRAYS_01),
    Schema("02_empirical_direction", "model", VALUES_02, ARRAYS_02),
    Schema("03_linear_layers", "model", VALUES_03),
    Schema("04_singular_directions", "model", VALUES_04, ARRAYS_04),
    Schema("05_negative_eigenvalues", "model", VALUES_05),
)
