"""What the notebooks on paths, subspace, interventions and dynamics (06 to 11) record; one line a key."""

from sdnb.records.declared_defects import LAYERS, REFUSED, VIEW
from sdnb.records.schema import Field, Schema

# fmt: off
PLACE = (
    Field("explosion_layer", "layer after which the norms are taken, if it is an explosion layer",
          kind="integer", null=True),
    Field("explosion_layers", "all layers where the norm jumps on the text, the largest step first", ("*",),
          "integer"),
    Field("layer", "layer after which the norms are taken", kind="integer"),
    Field("threshold", "norm after that layer above which an item counts as exploded"),
    Field("high_norm", "median norm there of the text's high-norm tokens; null without any", null=True),
    Field("ordinary_norm", "median norm there of the text's other tokens"),
)
STATE = Field("state_threshold", "norm after any layer above which a state counts as high-norm")


def _zeroed(branch: str) -> tuple[Field, Field]:
    """Share and median of the items with one branch of one layer zeroed (06)."""
    where = f"with the {branch} branch of this layer zeroed; null after the explosion layer"
    return (
        Field(f"{branch}_zeroed_share", f"share of the drawn items that explode {where}", LAYERS, null=True),
        Field(f"{branch}_zeroed_norm", f"their median norm {where}", LAYERS, null=True),
    )


def _coefficients(kind: str, what: str) -> tuple[Field, ...]:
    """Mean and spread of a coefficient at both positions (08)."""
    return tuple(
        field
        for name, where in (("first", "at position 0"), ("second", "at position 1, after a random item"))
        for field in (
            Field(f"{kind}_{name}_mean", f"mean over the trained items of {what}, {where}"),
            Field(f"{kind}_{name}_std", "its standard deviation"),
        )
    )


VALUES_06 = (
    *PLACE,
    Field("exploding_share", "share of the trained vocabulary that explodes at position 0"),
    Field("random_share", "share of the random embeddings that explode there"),
    Field("norm_quantiles", "5, 50 and 95 % quantile of the trained items' norms", ("3",)),
    Field("random_quantiles", "the same of the random embeddings' norms", ("3",)),
    Field("mean_embedding_norm", "mean length of the embeddings, that of the random ones"),
    Field("untrained_count", "items whose embedding is shorter than a tenth of that", kind="integer"),
    Field("not_exploding_count", "trained items that do not explode", kind="integer"),
    Field("not_exploding_ids", "the first of them, the smallest norm first", ("m",), "integer"),
    Field("not_exploding_tokens", "the same as text", ("m",), "text"),
    Field("not_exploding_norms", "their norms", ("m",)),
    Field("ablation_items", "trained items that were run with one branch zeroed", kind="integer"),
    Field("intact_share", "share of them that explodes with nothing zeroed"),
    Field("intact_norm", "their median norm with nothing zeroed"),
    *_zeroed("attention"), *_zeroed("ffn"), REFUSED,
)
ARRAYS_06 = (
    Field("norms_tokens", "norm after the layer of every vocabulary item alone", ("V",)),
    Field("norms_random", "the same for random embeddings of the same mean norm", ("V",)),
    Field("trained", "whether the item's embedding was trained", ("V",)),
)
CONTEXT = (
    Field("in_context_peak", "largest norm after any layer of each of them behind a neutral prefix", ("k",)),
    Field("real", "whether that is a high-norm state", ("k",), "boolean"),
)
VALUES_07 = (
    *PLACE, STATE,
    Field("exploding_share", "share of the vocabulary that explodes with attention switched off"),
    Field("median_norm", "median norm over the vocabulary with attention switched off"),
    Field("top_token_ids", "items with the largest norms with attention switched off", ("k",), "integer"),
    Field("top_tokens", "the same as text", ("k",), "text"),
    Field("top_norms", "their norms", ("k",)),
    Field("top_trained", "whether their embeddings were trained", ("k",), "boolean"),
    Field("prefix_tokens", "the neutral prefix", ("p",), "text"),
    *CONTEXT,
)
ARRAYS_07 = (
    Field("norms", "norm of every vocabulary item with attention switched off", ("V",)),
    Field("in_context_norms", "norms of the top items behind the prefix, attention on", ("L+1", "k")),
    Field("trained", "whether the item's embedding was trained", ("V",)),
)
VALUES_08 = (
    *PLACE, *VIEW, STATE,
    Field("singular_value", "largest singular value of F"),
    Field("second_singular_value", "second singular value of F"),
    Field("leading_output", "output norm of the leading right singular vector through the real FFN"),
    Field("first_to_second", "that over the largest output norm of the others", null=True),
    Field("largest_index", "number of the vector with the largest output norm, 1 the leading one",
          kind="integer"),
    Field("participation", "effective number of vectors: (sum n^2)^2 / sum n^4 of the output norms n"),
    Field("output_angle_deg", "output of the leading vector to the empirical direction", unit="degrees",
          null=True),
    *_coefficients("coefficient", "the norm's input along the leading vector"),
    *_coefficients("normalised", "the same divided by the input's root mean square"),
    Field("top_token_ids", "trained items with the largest coefficients at position 1", ("k",), "integer"),
    Field("top_tokens", "the same as text", ("k",), "text"),
    Field("top_coefficients", "their coefficients", ("k",)),
    *CONTEXT,
)
ARRAYS_08 = (
    Field("output_norms", "larger output norm of +v and -v through the real FFN, by vector", ("d",)),
    Field("right_vector", "leading right singular vector of F, signed by the larger output", ("d",)),
    Field("coefficients_first", "coefficient of every item at position 0", ("V",)),
    Field("coefficients_second", "coefficient of every item at position 1", ("V",)),
    Field("normalised_first", "the same for the rms-normalised input, position 0", ("V",)),
    Field("normalised_second", "the same for the rms-normalised input, position 1", ("V",)),
)
VALUES_09 = (
    *PLACE[:2],
    Field("interventions", "by name of the intervention, \"none\" included", kind="groups", columns=(
        Field("peak_norm", "largest norm of any token after any layer"),
        Field("first_norm", "mean norm of the first token after the explosion layer"),
        Field("perplexity", "perplexity of the text; null above every number", null=True),
        Field("sink_rate", "share of heads whose mean attention to position 0 exceeds 0.3", null=True),
        Field("continuation", "a sampled continuation, the same random numbers each time", kind="text"),
    )),
    Field("massive_dimensions", "dimensions that were overwritten, 0 to d - 1", ("m",), "integer"),
    Field("massive_means", "their mean over high-norm tokens after the explosion layer", ("m",)),
    Field("massive_share", "share of the mean state's squared length that they hold", null=True),
    Field("prompt", "beginning of the sampled text", kind="text"),
)
ARRAYS_09 = (
    Field("first_norms", "mean norm of the first token, by intervention and layer", ("k", "L+1")),
    Field("other_norms", "median norm of the other tokens, by intervention and layer", ("k", "L+1")),
)
VALUES_10 = (
    Field("steps", "training steps of the checkpoints", ("n",), "integer"),
    Field("names", "the checkpoints", ("n",), "text"),
    Field("peak_ratio", "largest over median norm at each checkpoint", ("n",)),
    Field("explosion_layers", "layers where the norm jumps at each checkpoint, the largest step first",
          ("n", "*"), "integer"),
    Field("high_norm_count", "high-norm states on the text at each checkpoint", ("n",), "integer"),
    Field("angle_to_final_deg", "empirical direction there to the last one's; null where there is none",
          ("n",), unit="degrees", null=True),
    Field("first_state_angle_deg", "mean state of the first tokens after the last checkpoint's explosion "
          "layer to the same state of the last checkpoint", ("n",), unit="degrees"),
    Field("state_layer", "the layer after which that state is taken", kind="integer"),
    Field("sink_rate", "share of heads whose mean attention to position 0 exceeds 0.3", ("n",), null=True),
    Field("loss", "mean negative log-likelihood of a token of the text, in nats", ("n",)),
    Field("random_angle_deg", "expected acute angle between random directions", unit="degrees"),
)
ARRAYS_10 = (
    Field("first_norms", "mean norm of the first token, by checkpoint and layer", ("n", "*")),
    Field("other_norms", "median norm of the other tokens, by checkpoint and layer", ("n", "*")),
)
VALUES_11 = (
    Field("names", "the models, the base model first", ("n",), "text"),
    Field("angle_deg", "each direction to the base model's; null where there is none", ("n",),
          unit="degrees", null=True),
    Field("pair_angle_deg", "angle between the directions of each pair", ("n", "n"), unit="degrees",
          null=True),
    Field("explosion_layers", "layers where the norm jumps in each model, the largest step first", ("n", "*"),
          "integer"),
    Field("decay_layers", "layers where it collapses in each model, the largest step first", ("n", "*"),
          "integer"),
    Field("peak_ratio", "largest over median norm in each model", ("n",)),
    Field("high_norm_count", "high-norm states on the text in each model", ("n",), "integer"),
    Field("random_angle_deg", "expected acute angle between random directions", unit="degrees"),
)
ARRAYS_11 = (
    Field("directions", "each model's empirical direction; zeros where there is none", ("n", "*")),
    Field("first_norms", "mean norm of the first token, by model and layer", ("n", "*")),
    Field("other_norms", "median norm of the other tokens, by model and layer", ("n", "*")),
)

# fmt: on
SCHEMAS = (
    Schema("06_initial_tokens", "model", VALUES_06, ARRAYS_06),
    Schema("07_noninitial_tokens", "model", VALUES_07, ARRAYS_07),
    Schema("08_explosion_subspace", "model", VALUES_08, ARRAYS_08),
    Schema("09_interventions", "model", VALUES_09, ARRAYS_09),
    Schema("10_training_dynamics", "collection", VALUES_10, ARRAYS_10),
    Schema("11_fine_tuning", "collection", VALUES_11, ARRAYS_11),
)
