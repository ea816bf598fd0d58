"""The few things that watching cannot see, each with its reason. Keep it short: a general rule is better."""

STATE_SPACE = "a state-space mixer, not attention"
READS_ANOTHER = "drafts for another model, whose keys and values it reads: no language model by itself"
N_GRAMS = "the decoder of an encoder-decoder, with a stream of its own for each n-gram"

# What the linear view is not about: no attention, or no language model of its own. Refused by name.
OUT_OF_SCOPE = {
    # Its token mixing is gated and its memory normalised, so that a token alone looks like gated attention;
    # but the time shift reads the token before, and the memory decays: nothing here is a softmax over values.
    "rwkv": "a recurrent network, not attention",
    "xlstm": "a recurrent network, not attention",
    **dict.fromkeys(("mamba", "mamba2", "falcon_mamba"), STATE_SPACE),
    "falcon_h1": "every layer has a state-space mixer beside its attention",
    **dict.fromkeys(("zamba", "zamba2"), "its attention only feeds the state-space mixer of the same layer"),
    **dict.fromkeys(("gemma4_assistant", "gemma4_unified_assistant"), READS_ANOTHER),
    "prophetnet": N_GRAMS,
}

# Decoders that a special case could take, with what stands in the way of the general one.
NO_SPECIAL_CASE = {
    **dict.fromkeys(("gemma3n", "gemma3n_text"), "several residual streams a token (AltUp)"),
    **dict.fromkeys(("deepseek_v4", "hy_v4"), "several residual streams a token (hyper-connections)"),
    **dict.fromkeys(("qwen4_exp", "qwen4_exp_text"), "several residual streams a token (hyper-connections)"),
    "inkling2_text": "its branches read a mixture of the residual streams of earlier blocks",
    "reformer": "two residual streams, each read by the branch that adds to the other (reversible layers)",
    "longcat_flash": "two attentions and three feed-forward networks in one layer",
    "xmod": "a third branch in every layer, the adapter of a language",
    "xlm": "no module is a layer: attentions, norms and feed-forward networks are lists side by side",
    "xlnet": "hidden states with tokens before sequences, and relative positions in a stream of their own",
    "cpmant": "prompt tokens of its own stand before the text in every layer",
    "zaya": "scales and shifts of their own for branch and stream in every sum",
}

# The layers of these are found and watched all the same: the refusal waits until one is to be taken apart.
LAYERS_ONLY = {
    "mamba", "mamba2", "falcon_mamba", "xlstm", "falcon_h1", "zamba", "zamba2", "qwen4_exp_text",
    "inkling2_text", "reformer", "longcat_flash", "zaya",
}  # fmt: skip
