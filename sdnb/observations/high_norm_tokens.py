"""01: norms per layer and token; which tokens are high-norm, and at which layers that begins and ends."""

import torch

from sdnb import text as texts
from sdnb.activations import detect, hidden_norms
from sdnb.labels import token_labels
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, encode_line


def high_norm_tokens(
    loaded: Loaded,
    *,
    sentence: str,
    token_ids: list[int] | None = None,
    add_special_tokens: bool = True,
    threshold: float | None = None,
) -> Observation:
    """Measure |h_l| of every token of one sentence and apply the detection rule (paper A, figure 1).

    Args:
        loaded: the model.
        sentence: the text; not used when `token_ids` is given.
        token_ids: token ids to run instead of the sentence.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.

    Returns:
        The record of template 01.
    """
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    if token_ids is None:
        ids = encode_line(loaded, sentence, add_special_tokens)
    else:
        limit = texts.position_limit(loaded.model.config)
        ids = texts.check_ids(token_ids, max_tokens=limit, vocabulary=vocabulary)
    norms = hidden_norms(loaded.model, ids[None])[:, 0]
    found = detect(norms, initial=torch.arange(len(ids)) == 0, threshold=threshold)
    source = texts.text_hash([sentence if token_ids is None else repr(token_ids)])
    values = {
        "peak_ratio": found.peak_ratio,
        "threshold": found.threshold,
        "explosion_layers": found.explosion_layers,
        "decay_layers": found.decay_layers,
        "tokens": token_labels(loaded.tokenizer, ids),
        "token_ids": ids.tolist(),
        "high_norm_positions": found.high_norm.nonzero().flatten().tolist(),
        "peak_norm": norms[1:].max().item(),
        "median_norm": norms[1:].median(dim=1).values.tolist(),
    }
    return Observation(values, {"norms": norms}, source, texts.begins_with_begin_token(ids, loaded.tokenizer))
