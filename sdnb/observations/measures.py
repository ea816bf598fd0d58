"""Perplexity and sink rate of a text, as 09 to 11 measure them."""

import torch
from torch import Tensor

from sdnb import text as texts
from sdnb.activations import Perplexity, perplexity, window_length
from sdnb.activations.sinks import sink_rate
from sdnb.errors import ModelError
from sdnb.loading import Loaded

SINK_LENGTH, SINK_LINES = 64, 16
"""Gu et al. measure sinks on sequences of 64 tokens."""


def text_ids(loaded: Loaded, text: str | list[str], begins: bool) -> tuple[Tensor, int | None]:
    """Encode a text as one sequence, without special tokens.

    Args:
        loaded: model and tokenizer.
        text: a named corpus, a path, or literal lines.
        begins: whether each window starts with the tokenizer's begin token.

    Returns:
        Token ids, (N,), and the begin token's id or None.
    """
    vocabulary = loaded.model.get_input_embeddings().weight.shape[0]
    ids = texts.encode(loaded.tokenizer, texts.whole(text), False, vocabulary=vocabulary)
    return ids, loaded.tokenizer.bos_token_id if begins else None


def text_perplexity(
    loaded: Loaded, ids: Tensor, begin: int | None, window: int | None, max_windows: int
) -> Perplexity:
    """Measure the perplexity of the beginning of a text by the standard protocol.

    Args:
        loaded: the model.
        ids: token ids of the text, (N,).
        begin: an id in front of each window, or None.
        window: tokens in a window; automatic when None.
        max_windows: windows at most.

    Returns:
        The perplexity.
    """
    body = window_length(loaded.model, window) - (begin is not None)
    return perplexity(loaded.model, ids[: max_windows * body], window=window, begin_token=begin)


def text_sink_rate(loaded: Loaded, ids: Tensor, begin: int | None) -> float | None:
    """Measure the sink rate on up to 16 sequences of 64 tokens, a begin token included.

    Args:
        loaded: the model.
        ids: token ids of the text, (N,).
        begin: an id in front of each sequence, or None.

    Returns:
        The rate; None where the model does not tell its attention.
    """
    front = torch.tensor([] if begin is None else [begin], dtype=ids.dtype)
    body = min(SINK_LENGTH - len(front), len(ids))
    count = min(SINK_LINES, len(ids) // body)
    rows = torch.cat([front.expand(count, len(front)), ids[: count * body].reshape(count, body)], dim=1)
    try:
        return sink_rate(loaded.model, rows).value
    except ModelError:
        return None
