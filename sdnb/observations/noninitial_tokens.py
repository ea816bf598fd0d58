"""07: which items explode with all attention switched off, and whether they do so in context as well."""

from pathlib import Path

import torch

from sdnb.activations.interventions import zero_attention
from sdnb.activations.sweep import item_norms, item_trajectories, vocabulary_size
from sdnb.labels import token_labels
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, encode_line, encode_text
from sdnb.observations.explosion import find_explosion
from sdnb.observations.initial_tokens import explosion_values, trained_items


def noninitial_tokens(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    explosion_layer: int | None = None,
    prefix: str = "I am",
    top: int = 20,
    results_dir: str | Path | None = None,
) -> Observation:
    """Measure |h_l| after the explosion layer l of every item without attention (paper A, explosion path).

    Without attention a token explodes by its embedding and the FFNs alone, wherever it stands. The `top`
    items are then put behind a neutral prefix, attention on: real noninitial high-norm tokens explode there.

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines, on which the layer and the threshold are found.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own to the text; sweep and prefix have none.
        threshold: a norm that replaces the automatic ones.
        explosion_layer: a layer 1..L that replaces the automatic one.
        prefix: the neutral text in front of each of the top items.
        top: number of items that are named and followed.
        results_dir: where norms that notebooks share are cached; None keeps nothing.

    Returns:
        The record of template 07.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    place = find_explosion(
        loaded, encoded, explosion_layer=explosion_layer, threshold=threshold, results_dir=results_dir
    )
    items = torch.arange(vocabulary_size(loaded.model))
    _, trained = trained_items(loaded, items)
    with zero_attention(loaded.model):
        norms = item_norms(loaded.model, place.layer, items)
    first = norms.argsort(descending=True, stable=True)[:top]
    before = encode_line(loaded, prefix, False)
    paths = item_trajectories(loaded.model, first, before)
    values = explosion_values(place) | {
        "state_threshold": place.state_threshold,
        "exploding_share": (norms > place.threshold).double().mean().item(),
        "median_norm": norms.median().item(),
        "top_token_ids": first.tolist(),
        "top_tokens": token_labels(loaded.tokenizer, first.tolist()),
        "top_norms": norms[first].tolist(),
        "top_trained": trained[first].tolist(),
        "prefix_tokens": token_labels(loaded.tokenizer, before.tolist()),
        "in_context_peak": paths[1:].amax(dim=0).tolist(),
        "real": (paths[1:] > place.state_limits[1:, None]).any(dim=0).tolist(),
    }
    arrays = {"norms": norms, "in_context_norms": paths, "trained": trained}
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)
