"""What the notebooks on weight spectra (14 to 18) and the comparison of models (19) record."""

from sdnb.records.schema import Field, Schema

# fmt: off
VALUES_14 = (
    Field("matrices", "by matrix name", kind="groups", columns=(
        Field("sigma", "standard deviation of the noise, by median matching"),
        Field("edges", "lower and upper edge of the Marchenko-Pastur bulk", ("2",)),
        Field("outliers_below", "singular values below the bulk", kind="integer"),
        Field("outliers_above", "singular values above the bulk", kind="integer"),
    )),
)
ARRAYS_14 = (
    Field("singular_values/<matrix>", "singular values in descending order", ("*",)),
)
VALUES_15 = (
    Field("matrices", "by matrix name", kind="groups", columns=(
        Field("ks_p_value", "Kolmogorov-Smirnov p-value of each singular vector's entries", ("*",)),
        Field("overlap_band", "three-sigma band of the largest overlap by chance", ("2",)),
    )),
)
ARRAYS_15 = (
    Field("overlap/<matrix>", "largest overlap of each right singular vector with the covariance's ones",
          ("*",)),
)
VALUES_16 = (
    Field("types", "by matrix type", kind="groups", columns=(
        Field("perplexity", "perplexity without each decile, the smallest values first", ("10",)),
    )),
    Field("perplexity_intact", "perplexity of the whole model"),
)
VALUES_17 = (
    Field("rows", "one row a run", kind="rows", columns=(
        Field("order", "\"before\" or \"after\" fine-tuning", kind="text"),
        Field("type", "matrix type", kind="text"),
        Field("decile", "which tenth was removed, 1 the smallest values", kind="integer"),
        Field("seed", "seed of the run", kind="integer"),
        Field("score", "score of the task"),
    )),
    Field("band", "three-sigma band of the unpruned runs", ("2",)),
)
VALUES_18 = (
    Field("rows", "one row a noise and signal strength", kind="rows", columns=(
        Field("noise", "name of the noise covariance", kind="text"),
        Field("signal", "strength of the rank-one signal"),
        Field("outlier", "position of the outlier, null inside the bulk", null=True),
        Field("overlap", "overlap of its vector with the signal", null=True),
        Field("theory", "overlap that theory predicts", null=True),
    )),
)
VALUES_19 = (
    Field("rows", "one row a model; null where the observation was not run", kind="rows", columns=(
        Field("model", "the model's name", kind="text"),
        Field("peak_ratio", "largest over median norm (01)", null=True),
        Field("explosion_layers", "layers where the norm jumps (01)", ("*",), "integer", null=True),
        Field("decay_layers", "layers where it collapses (01)", ("*",), "integer", null=True),
        Field("angle_deg", "smallest angle of a layer's singular direction (04)", unit="degrees", null=True),
        Field("eigenvalue", "most negative eigenvalue along the direction (05)", null=True),
        Field("exploding_share", "share of the vocabulary that explodes at position 0 (06)", null=True),
    )),
)

# fmt: on
SCHEMAS = (
    Schema("14_weight_spectra", "model", VALUES_14, ARRAYS_14),
    Schema("15_singular_vectors", "model", VALUES_15, ARRAYS_15),
    Schema("16_removing_singular_values", "model", VALUES_16),
    Schema("17_fine_tuned_spectra", "collection", VALUES_17),
    Schema("18_random_matrix_model", "none", VALUES_18),
    Schema("19_across_models", "collection", VALUES_19),
)
