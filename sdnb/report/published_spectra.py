"""Published numbers of paper B (Staats, Thamm and Rosenow, arXiv 2410.17770), each with its source."""

OUTLIERS = "most in query, few or none in attention output; Llama-3.1-8B more than BERT (paper B)"
LOWER_OUTLIERS = "below the bulk in rectangular matrices, none possible in square ones (paper B)"
INITIAL = "exact agreement at initialisation (paper B)"
OVERLAP = (
    "noise level inside the bulk, clear excess at both ends of up, down and gate (Pythia, Llama); none in "
    "attention "
    "output; Llama's down shows none (paper B)"
)
SMALLEST_DECILE = (
    "Llama-3-8B, GSM8K 43.2 % intact: 2.0 % without down's smallest decile, 34.1 % gate's, 40.0 % attention "
    "output's, "
    "40.3 % query's (paper B)"
)
LARGEST_DECILE = "Llama-3-8B, GSM8K: 0.0 % for each of these four (paper B)"
U_SHAPE = (
    "Pythia-410M: Q, K, V fall from large to small, attention output nearly flat, up and down U-shaped "
    "(paper B)"
)
TUNING = (
    "BERT on BoolQ, RTE, SST2: remove then tune recovers, fully on BoolQ and nearly on the others; tune then "
    "remove "
    "drops clearly (paper B)"
)
WHITE = "white noise: outliers above the bulk only (paper B, version 3)"
CORRELATED = "correlated noise: outliers below the bulk become possible (paper B, version 3)"
