"""Published numbers, each with its source; "~" marks a value read off a figure.

Sources: paper A is Wang, Zhang and Salzmann, arXiv 2502.07004 (ICML 2025), its poster and the figures of its
    code's
README; the norms of LLaMA2-7B follow from the massive activations given by Sun et al., arXiv 2402.17762.
"""

A_POSTER = "paper A, poster"
A_README = "paper A, code's README"

EXPLOSION_LAYERS = f"LLaMA2-7B 2, Llama-3.2-1B 2, Qwen2-7B 4 ({A_POSTER} and code)"
DECAY_LAYERS = f"LLaMA2-7B 31 of 32, Llama-3.2-1B 16 of 16 ({A_POSTER} and code)"
PEAK_NORM = f"Llama-3.2-1B ~850 to 900 ({A_README}); LLaMA2-7B 894 initial, 2957 noninitial (from Sun et al.)"
THRESHOLD = "LLaMA2-7B 500, Llama-3.2-1B 700, set by hand (paper A, code)"
INITIAL_NONINITIAL_ANGLE = "LLaMA2-7B 0.32° (from the massive activations of Sun et al.)"
SINGULAR_ANGLE_EXPLOSION = f"LLaMA2-7B 6.05° ({A_POSTER}), Llama-3.2-1B 14.78° ({A_README})"
SINGULAR_ANGLE_DECAY = f"LLaMA2-7B 2.93° ({A_POSTER}), Llama-3.2-1B 15.45° ({A_README})"
SINGULAR_ANGLE_OTHERS = (
    f"LLaMA2-7B ~67 at layer 30, ~86 to 90 elsewhere ({A_POSTER}); Llama-3.2-1B ~78 to 90 ({A_README})"
)
EIGEN_EXPLOSION = f"LLaMA2-7B 11.33°, +0.50 ({A_POSTER}); Llama-3.2-1B 9.2°, +0.6 ({A_README})"
EIGEN_DECAY = f"LLaMA2-7B 2.86°, −15.60 ({A_POSTER}); Llama-3.2-1B 9.2°, −7.3 ({A_README})"
