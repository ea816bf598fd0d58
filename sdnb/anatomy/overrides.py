"""The few things that watching cannot see, each with its reason. Keep it short: a general rule is better."""

REFUSED_TYPES = {
    # Its token mixing is gated and its memory normalised, so that a token alone looks like gated attention;
    # but the time shift reads the token before, and the memory decays: nothing here is a softmax over values.
    "rwkv": "a recurrent network, not attention",
}
