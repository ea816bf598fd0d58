"""01: norms per layer and token; which tokens are high-norm, and at which layers that begins and ends."""

import torch

from sdnb import text as texts
from sdnb.activations import detect, hidden_norms
from sdnb.errors import ParameterError
from sdnb.loading import Loaded
from sdnb.observations.common import Observation


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
    if token_ids is None:
        ids = texts.encode(loaded, sentence, add_special_tokens)
    else:
        ids = _checked_ids(loaded, token_ids)
    norms = hidden_norms(loaded.model, ids[None])[:, 0]
    found = detect(norms, threshold=threshold)
    begin = getattr(loaded.tokenizer, "bos_token_id", None)
    values = {
        "peak_ratio": found.peak_ratio,
        "threshold": found.threshold,
        "explosion_layers": found.explosion_layers,
        "decay_layers": found.decay_layers,
        "tokens": texts.token_labels(loaded.tokenizer, ids),
        "token_ids": ids.tolist(),
        "high_norm_positions": found.high_norm.nonzero().flatten().tolist(),
        "peak_norm": norms[1:].max().item(),
        "median_norm": norms[1:].median(dim=1).values.tolist(),
    }
    return Observation(values, {"norms": norms}, texts.text_hash([sentence]), int(ids[0]) == begin)


def _checked_ids(loaded: Loaded, token_ids: list[int]) -> torch.Tensor:
    """Token ids as a tensor (T,), refused when one is not in the vocabulary."""
    size = loaded.model.get_input_embeddings().weight.shape[0]
    wrong = [i for i in token_ids if not 0 <= i < size]
    if wrong or not token_ids:
        raise ParameterError(f"token_ids {wrong or 'is empty'}: give ids from 0 to {size - 1}")
    return torch.tensor(token_ids)
