"""What the notebooks on weight spectra (14 to 18) record; one line a key."""

from sdnb.records.schema import Field, Schema

# fmt: off
REFUSED = Field("refused", "layers whose matrices could not be told apart, and why", kind="notes")
MATRIX = (
    Field("layer", "layer, 1 to L", kind="integer"),
    Field("kind", "type: q, k, v, o, gate, up, down", kind="text"),
    Field("shape", "rows and columns", ("2",), "integer"),
)
VALUES_14 = (
    Field("matrices", "by matrix name", kind="groups", columns=(
        *MATRIX,
        Field("sigma", "standard deviation of the noise, by median matching"),
        Field("edges", "lower and upper edge of the Marchenko-Pastur bulk", ("2",)),
        Field("outlier_edges", "what a singular value must pass to count as an outlier", ("2",)),
        Field("edge_scale", "Tracy-Widom scale of the upper edge"),
        Field("outliers_below", "singular values below the bulk, null at a hard edge",
              kind="integer", null=True),
        Field("outliers_above", "singular values above the bulk", kind="integer"),
        Field("hard_edge", "whether min/max > 0.9, so that nothing is counted below", kind="boolean"),
        Field("distance", "Kolmogorov distance of the spectrum from Marchenko-Pastur"),
        Field("noise_distance", "distance that 95 % of noise matrices of this shape stay below"),
        Field("stable_rank", "squared Frobenius norm over squared largest singular value"),
    )),
    Field("false_positive_rate", "probability of any outlier on one side of a matrix of noise"),
    Field("layer_count", "number of layers", kind="integer"),
    REFUSED,
    Field("left_out", "weights that no matrix reads, such as experts in one block, and matrices whose median "
          "singular value is zero", kind="notes"),
)
ARRAYS_14 = (
    Field("singular_values/<matrix>", "singular values in descending order", ("*",)),
)
VALUES_15 = (
    Field("matrices", "by matrix name", kind="groups", columns=(
        *MATRIX,
        Field("ks_p_value", "Kolmogorov-Smirnov p-value of each pool of right singular vectors",
              ("*",)),
        Field("ks_p_value_left", "the same for the left singular vectors", ("*",)),
        Field("pool_edges", "first index of each pool, and the number of singular values", ("*",), "integer"),
        Field("overlap_band", "three-sigma band of the largest overlap by chance", ("2",)),
        Field("overlap_median", "median of the largest overlap by chance"),
        Field("overlap_above", "share of overlaps above the band", null=True),
        Field("overlap_above_ordinary", "the same with the covariance of ordinary tokens only", null=True),
        Field("rank_correlation", "of the spectrum's deviation and the overlap", null=True),
        Field("rank_correlation_p_value", "share of circular shifts that give as much", null=True),
        Field("rank_correlation_ordinary", "the same with the covariance of ordinary tokens only", null=True),
        Field("sigma", "standard deviation of the noise"),
        Field("edges", "edges of the Marchenko-Pastur bulk", ("2",)),
        Field("top_share", "share of the input's variance along its first eigenvector"),
        Field("top_share_ordinary", "the same, of ordinary tokens only"),
    )),
    Field("pool", "singular vectors in a pool", kind="integer"),
    Field("tokens", "tokens behind a covariance", kind="integer"),
    Field("high_norm_tokens", "of them high-norm", kind="integer"),
    Field("smallest_p_value", "the smallest p-value that the simulation can give"),
    REFUSED,
    Field("left_out", "matrices whose median singular value is zero, and why", kind="notes"),
)
ARRAYS_15 = (
    Field("overlap/<matrix>", "largest overlap of each right singular vector, smallest singular value first",
          ("*",)),
    Field("overlap_ordinary/<matrix>", "the same with the covariance of ordinary tokens only", ("*",)),
    Field("singular_values/<matrix>", "singular values in ascending order", ("*",)),
    Field("deviation/<matrix>", "distance of each singular value from its Marchenko-Pastur quantile", ("*",)),
)
VALUES_16 = (
    Field("types", "by matrix type", kind="groups", columns=(
        Field("perplexity", "perplexity without each block, the smallest values first", ("*",)),
        Field("perplexity_error", "its standard error over windows", ("*",)),
        Field("loss_added", "mean loss per token that the removal adds, in nats", ("*",)),
        Field("loss_added_error", "its standard error over the same windows", ("*",)),
        Field("removed_share", "share of the squared Frobenius norm in the block", ("*",)),
    )),
    Field("perplexity_intact", "perplexity of the whole model"),
    Field("perplexity_intact_error", "its standard error over windows"),
    Field("window", "tokens in a window", kind="integer"),
    Field("window_count", "number of windows", kind="integer"),
    Field("parts", "number of blocks, 10 for deciles", kind="integer"),
    REFUSED,
)
VALUES_17 = (
    Field("rows", "one row a run", kind="rows", columns=(
        Field("order", "\"before\" or \"after\" fine-tuning, or \"none\" for an unpruned run", kind="text"),
        Field("type", "matrix type, \"none\" for an unpruned run", kind="text"),
        Field("decile", "which tenth was removed, 1 the smallest values, 0 for none", kind="integer"),
        Field("seed", "seed of the run", kind="integer"),
        Field("score", "loss on held-out text of the new kind, in nats a token"),
    )),
    Field("band", "three-sigma band of the unpruned runs", ("2",)),
    Field("score_untuned", "the same loss before fine-tuning"),
    Field("steps", "optimizer steps of a run", kind="integer"),
    Field("learning_rate", "of the optimizer"),
    Field("tokens_a_step", "tokens in a batch", kind="integer"),
    Field("tuning_text", "text that the model is tuned on", kind="text"),
)
VALUES_18 = (
    Field("rows", "one row a noise and signal strength", kind="rows", columns=(
        Field("noise", "name of the noise covariance", kind="text"),
        Field("signal", "strength of the rank-one signal"),
        Field("outlier", "mean position of the outlier, null inside the bulk", null=True),
        Field("position", "mean singular value whose vector leans most on the signal"),
        Field("position_error", "its standard error over draws"),
        Field("theory_position", "position that theory predicts, null inside the bulk", null=True),
        Field("side", "\"above\", \"below\", or \"none\" inside the bulk", kind="text"),
        Field("overlap", "mean overlap of the left vector with the signal's"),
        Field("overlap_error", "its standard error over draws"),
        Field("right_overlap", "mean overlap of the right vector with the signal's"),
        Field("right_overlap_error", "its standard error over draws"),
        Field("theory", "left overlap that theory predicts for large matrices"),
        Field("theory_right", "right overlap that theory predicts"),
    )),
    Field("shape", "rows and columns of the matrices", ("2",), "integer"),
    Field("edges", "edges of the bulk", ("2",)),
    Field("quiet", "variance of the correlated noise along the signal"),
    Field("draws", "matrices per noise and strength", kind="integer"),
    Field("thresholds", "by noise name", kind="groups", columns=(
        Field("below", "strength up to which an outlier stands below the bulk, null if never", null=True),
        Field("above", "strength from which an outlier stands above the bulk"),
    )),
    Field("example", "signals of the example's matrix", kind="rows", columns=(
        Field("noise", "name of the noise covariance", kind="text"),
        Field("signal", "strength"),
        Field("position", "predicted singular value, null inside the bulk", null=True),
    )),
)
ARRAYS_18 = (
    Field("spectrum/<noise>", "singular values of one matrix with several signals, descending", ("*",)),
)

# fmt: on
SCHEMAS = (
    Schema("14_weight_spectra", "model", VALUES_14, ARRAYS_14),
    Schema("15_singular_vectors", "model", VALUES_15, ARRAYS_15),
    Schema("16_removing_singular_values", "model", VALUES_16),
    Schema("17_fine_tuned_spectra", "collection", VALUES_17),
    Schema("18_random_matrix_model", "none", VALUES_18, ARRAYS_18),
)
