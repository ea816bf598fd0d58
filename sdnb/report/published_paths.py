"""Published numbers for notebooks 06 to 11, each with its source; "~" marks a value read off a figure."""

from sdnb.report.published import A_POSTER, A_README

INITIAL = f"Llama-3.2-1B ~200 to 1010, mostly 600 to 950 ({A_README})"
INITIAL_SHARE = f"Llama-3.2-1B: nearly all trained items ({A_README})"
RANDOM = f"Llama-3.2-1B ~50 at rank 100,000, ~130 at 120,000, ~880 at the last of 128,256 ({A_README})"
NONINITIAL_TOP = f"Llama-3.2-1B: `<\\|begin_of_text\\|>` ~434, then ~154, ~60, ~43 ({A_README})"
NONINITIAL_BULK = f"Llama-3.2-1B ~1.8 to 4 ({A_README})"
LEADING_OUTPUT = f"LLaMA2-7B ~4985 ({A_POSTER}), Llama-3.2-1B ~1966 ({A_README})"
FIRST_TO_SECOND = f"LLaMA2-7B above ~50 ({A_POSTER}); Llama-3.2-1B ~2.8 ({A_README})"
FIRST_POSITION = f"Llama-3.2-1B ~1.8 and up ({A_README})"
SECOND_POSITION = f"Llama-3.2-1B ~−0.4 to 0.6, tail to ~2 ({A_README})"
PROJECTED = "poor generated text, no number published (paper A, as summarised by others)"
SETTLES = f"the direction settles during training; no number published ({A_POSTER})"
SURVIVES = (
    f"LLaMA2-7B to its chat, code, Python and instruct versions 1° to 3.3°, to Vicuna-1.5 1°; "
    f"unrelated models 87° to 89° ({A_POSTER})"
)
