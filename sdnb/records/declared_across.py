"""What the comparison of models (19) records: the key figures of every observation, one row a model."""

from sdnb.records.schema import Field, Schema

# fmt: off
KEY_FIGURES = {
    "01_high_norm_tokens": (
        Field("peak_ratio", "largest norm over the median norm of its layer", null=True),
        Field("explosion_layers", "layers where the norm jumps, the largest step first", ("*",), "integer",
              null=True),
        Field("decay_layers", "layers where it collapses, the largest step first", ("*",), "integer",
              null=True),
    ),
    "02_empirical_direction": (
        Field("pairwise_angle_deg", "mean acute angle between two high-norm states", unit="degrees",
              null=True),
    ),
    "03_linear_layers": (
        Field("layer_error", "relative error of the linear layer on real states, mean over layers",
              null=True),
    ),
    "04_singular_directions": (
        Field("angle_deg", "leading left singular vector of L to the empirical direction, at the largest "
              "explosion layer", unit="degrees", null=True),
        Field("ffn_angle_deg", "that of F, at the same layer", unit="degrees", null=True),
        Field("gain_angle_deg", "largest-gain output of the FFN, at the same layer", unit="degrees",
              null=True),
    ),
    "05_negative_eigenvalues": (
        Field("eigen_angle_deg", "nearest eigenvector of L - I to the direction, at the largest explosion "
              "layer", unit="degrees", null=True),
        Field("eigenvalue", "real part of its eigenvalue", null=True),
        Field("decay_angle_deg", "nearest eigenvector of L - I to the direction, at the largest decay layer",
              unit="degrees", null=True),
        Field("decay_eigenvalue", "real part of its eigenvalue", null=True),
        Field("norm_aware_eigenvalue", "eigenvalue of L_rho - I along the direction, at the same layer",
              null=True),
    ),
    "06_initial_tokens": (
        Field("exploding_share", "share of the trained vocabulary that explodes at position 0", null=True),
    ),
    "07_noninitial_tokens": (
        Field("noninitial_share", "share of the vocabulary that explodes with attention switched off",
              null=True),
    ),
    "08_explosion_subspace": (
        Field("first_to_second", "output norm of F's leading right singular vector through the real FFN over "
              "the largest of the others", null=True),
    ),
    "09_interventions": (
        Field("sink_rate", "share of heads whose mean attention to position 0 exceeds 0.3, untouched model",
              null=True),
        Field("perplexity", "perplexity of the untouched model, a token of its own tokenizer", null=True),
    ),
    "12_quantization": (
        Field("intact_perplexity", "perplexity of the untouched model in this notebook's windows", null=True),
        Field("quantization_loss", "relative rise of the perplexity, every linear module rounded to int8 "
              "with one scale a tensor", null=True),
        Field("regained_share", "share of that rise that the detected skip list gives back; null where the "
              "rise is below 0.2 %", null=True),
    ),
    "14_weight_spectra": (
        Field("outliers_above", "singular values above the bulk, all matrices", kind="integer", null=True),
        Field("outliers_below", "singular values below the bulk, matrices without a hard edge",
              kind="integer", null=True),
        Field("outlier_share", "share of all singular values outside the bulk", null=True),
    ),
    "15_singular_vectors": (
        Field("overlap_above", "share of overlaps with the inputs above chance's band, mean over matrices",
              null=True),
    ),
    "16_removing_singular_values": (
        Field("unpruned_perplexity", "perplexity of the untouched model in this notebook's windows",
              null=True),
        Field("smallest_block_loss", "loss a token that removing the smallest singular values adds, in nats, "
              "the largest over matrix types", null=True),
    ),
}
"""Columns of the comparison by the template whose record they come from."""

LAYERS = ("*",)
ANGLES = {"unit": "degrees", "null": True}
VALUES_19 = (
    Field("rows", "one row a model; null where an observation was not run or found nothing", kind="rows",
          columns=(
        Field("model", "the model's name", kind="text"),
        Field("folder", "the model's folder of records", kind="text"),
        Field("fingerprint", "first digits of the weights' fingerprint", kind="text", null=True),
        Field("hidden_size", "d", kind="integer", null=True),
        Field("layers", "L", kind="integer", null=True),
        *(field for fields in KEY_FIGURES.values() for field in fields),
        Field("records", "templates whose records the row comes from", ("*",), "text"),
        Field("note", "what makes numbers of this row hard to compare with the others", kind="text"),
    )),
    Field("curves", "by folder, over layers; null where 01 or 04 was not run", kind="groups", columns=(
        Field("model", "the model's name", kind="text"),
        Field("token", "the token with the largest norm (01)", kind="text", null=True),
        Field("largest_norm", "its norm, from the embedding to the last layer", LAYERS, null=True),
        Field("median_norm", "median norm over the tokens, likewise", LAYERS, null=True),
        Field("explosion_layers", "as in record 01, or 04 without it", LAYERS, "integer", null=True),
        Field("decay_layers", "likewise", LAYERS, "integer", null=True),
        Field("angle_deg", "leading left singular vector of L to the direction (04)", LAYERS, **ANGLES),
        Field("ffn_angle_deg", "that of F", LAYERS, **ANGLES),
        Field("gain_angle_deg", "largest-gain output of the FFN", LAYERS, **ANGLES),
        Field("random_angle_deg", "expected angle between random directions", **ANGLES),
    )),
    Field("signature_names", "models with an empirical direction (02), in the order of the matrix", ("n",),
          "text"),
    Field("signature_groups", "number of the group of related models each belongs to, from 1", ("n",),
          "integer"),
    Field("signature_order", "models in the order of the clustered picture, from 0", ("n",), "integer"),
    Field("chance_threshold", "chance of an angle between strangers below which two models are related"),
    Field("source_versions", "number of versions of the package that wrote the records", kind="integer"),
)
ARRAYS_19 = (
    Field("signature_angle_deg", "acute angle between two models' empirical directions; -1 where the widths "
          "differ", ("n", "n"), unit="degrees"),
)

# fmt: on
SCHEMAS = (Schema("19_across_models", "collection", VALUES_19, ARRAYS_19, reads_records=True),)
