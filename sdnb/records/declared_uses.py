"""What the notebooks on the uses of singular defects (12 and 13) record; one line a key."""

from sdnb.records.declared_defects import LAYERS, STEPS
from sdnb.records.schema import Field, Schema

# fmt: off
VALUES_12 = (
    Field("rows", "one row a method and list of skipped modules", kind="rows", columns=(
        Field("method", "\"none\", \"rtn\" (round to nearest) or \"smoothquant\"", kind="text"),
        Field("number_format", "\"int8\" or \"float8_e4m3\"", kind="text", null=True),
        Field("weights", "scales of weights per \"tensor\" or output \"channel\"", kind="text", null=True),
        Field("inputs", "scales of inputs per \"tensor\" or \"token\"", kind="text", null=True),
        Field("static", "whether input scales come from the calibration text", kind="boolean", null=True),
        Field("skip", "\"none\", \"paper\" (down-projections of explosion and decay layers), \"detected\"",
              kind="text"),
        Field("skipped", "names of the modules left alone", ("*",), "text"),
        Field("kept_share", "share of the linear modules' weights that keeps its precision"),
        Field("perplexity", "perplexity of the text; null where it is not finite", null=True),
    )),
    Field("layer_error", "relative error of the layer's output, int8 with one scale a tensor", LAYERS),
    Field("layer_error_skipped", "the same with the detected modules left alone", LAYERS),
    Field("predicted_tokens", "tokens whose prediction the perplexity averages", kind="integer"),
    Field("window", "tokens in a window", kind="integer"),
    Field("calibration_windows", "windows of the calibration text", kind="integer"),
    Field("calibration_overlaps", "whether these are among the predicted ones", kind="boolean"),
    Field("alpha", "SmoothQuant's migration strength"),
    Field("head_share", "share of all parameters in the output embedding, never quantized"),
    Field("token_count", "tokens of the calibration text", kind="integer"),
    Field("layer_count", "number of decoder layers", kind="integer"),
    Field("peak_ratio", "largest norm over its layer's median"),
    Field("threshold", "norm above which a state is high-norm; null if there is none", null=True),
    *STEPS,
    Field("high_norm_tokens", "distinct high-norm tokens", kind="rows", columns=(
        Field("token", "the token as text", kind="text"),
        Field("token_id", "the token as id", kind="integer"),
        Field("position", "\"first\" or \"later\" in its line", kind="text"),
        Field("peak_norm", "its largest norm"),
        Field("count", "how often it is high-norm", kind="integer"),
    )),
    Field("massive_dimensions", "dimensions where the mean high-norm state is 5 times its rms", kind="rows",
          columns=(
        Field("dimension", "index in the residual stream, from 0", kind="integer"),
        Field("value", "the mean state there"),
        Field("share", "of its squared norm"),
    )),
    Field("linear_inputs", "inputs of every linear module", kind="rows", columns=(
        Field("module", "full name", kind="text"),
        Field("layer", "decoder layer, or null", kind="integer", null=True),
        Field("largest_input", "largest absolute input"),
        Field("median_input", "median absolute input"),
        Field("ratio", "their ratio; null if the median is zero", null=True),
        Field("median_token_largest", "median over tokens of the token's largest absolute input"),
        Field("token_ratio", "largest input over that; null if that is zero", null=True),
        Field("int8_error", "mean relative error of a token's output, W and x in int8 with one scale each",
              null=True),
    )),
    Field("skip_threshold", "token_ratio from which on a module is skipped"),
    Field("spiking_modules", "modules that reach it, the largest first", ("*",), "text"),
    Field("never_quantized", "modules that quantizers skip by themselves", ("*",), "text"),
    Field("skip_list", "both", ("*",), "text"),
)
VALUES_13 = (
    Field("names", "the models with a signature, in the order of the matrix", ("n",), "text"),
    Field("kinds", "\"all\" high-norm states, or \"initial\" ones where they differ", ("n",), "text"),
    Field("radius_deg", "95 % of bootstrap replicates lie within this angle", ("n",), unit="degrees"),
    Field("state_counts", "high-norm states behind each signature", ("n",), "integer"),
    Field("hidden_sizes", "width of each model", ("n",), "integer"),
    Field("groups", "number of the group of related models each belongs to, from 1", ("n",), "integer"),
    Field("order", "models in the order of the clustered picture, from 0", ("n",), "integer"),
    Field("left_out", "models without a signature, with the reason", kind="notes"),
    Field("chance_threshold", "chance below which two models are called related"),
    Field("pairs", "one row a pair of models", kind="rows", columns=(
        Field("first", "name", kind="text"),
        Field("second", "name", kind="text"),
        Field("angle_deg", "acute angle; null if it has no meaning", unit="degrees", null=True),
        Field("uncertainty_deg", "sum of both radii", unit="degrees", null=True),
        Field("chance_log10", "log10 of the chance of such an angle between strangers", null=True),
        Field("verdict", "what the threshold makes of it, in words", kind="text"),
        Field("note", "what else differs", kind="text"),
    )),
    Field("base", "the model whose robustness was tested, or null", kind="text", null=True),
    Field("robustness", "how far its signature moves", kind="rows", columns=(
        Field("change", "\"noise\", \"quantization\" or \"fine-tuning\"", kind="text"),
        Field("amount", "how much of it, in words", kind="text"),
        Field("angle_deg", "to the unchanged signature, or null", unit="degrees", null=True),
        Field("chance_log10", "of such an angle between unrelated directions", null=True),
    )),
)
ARRAYS_13 = (
    Field("angle_deg", "acute angle between two models' signatures; -1 where it has no meaning", ("n", "n"),
          unit="degrees"),
)

# fmt: on
SCHEMAS = (
    Schema("12_quantization", "model", VALUES_12),
    Schema("13_signatures", "collection", VALUES_13, ARRAYS_13),
)
