"""Published numbers about quantization and signatures, each with its source.

Paper A is Wang, Zhang and Salzmann, arXiv 2502.07004 (ICML 2025), its poster; the spike ratios come from the
lists published with Yang, Kim and Kim, arXiv 2405.14428 (code of the authors).
"""

A_POSTER = "paper A, poster"

PERPLEXITY = {
    ("none", "none"): f"Llama-2-7B 5.47, Llama-3-8B 6.14 ({A_POSTER})",
    ("rtn", "none"): f"10.18, 59.38 ({A_POSTER})",
    ("rtn", "paper"): f"6.51, 8.80 ({A_POSTER})",
    ("smoothquant", "none"): f"13.87, 54.99 ({A_POSTER})",
    ("smoothquant", "paper"): f"6.78, 9.14 ({A_POSTER})",
}
"""Of 8-bit tensor-wise quantization by method and skipped modules; float16 under "none"."""

LAYERS = f"Llama-2-7B 2; 31, Llama-3-8B 2; 32 ({A_POSTER} and code)"
MASSIVE = "Llama-2-7B 2533 and 1415 (Sun et al., arXiv 2402.17762, code)"
SPIKES = (
    "Llama-2-7B: layer 2 down-projection 4136, layer 31 down-projection 139, next 17.8 (Yang et al., lists)"
)
SIGNATURES_WITHIN = f"within Llama-2 and its fine-tunings 0.7 to 3.3, Llama-3 to 3.1 6.6 to 7.7 ({A_POSTER})"
SIGNATURES_ACROSS = f"87 to 89 across families of width 4096 ({A_POSTER})"
