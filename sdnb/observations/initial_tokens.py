"""06: every vocabulary item at position 0, against random embeddings, and which module makes it explode."""

from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations.interventions import BRANCHES, zero_branch
from sdnb.activations.sweep import embedding_norms, item_norms, random_norms, vocabulary_size
from sdnb.anatomy import decoder_layers
from sdnb.errors import LayerRefused
from sdnb.labels import token_labels
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, encode_text
from sdnb.observations.explosion import Explosion, find_explosion

UNTRAINED = 0.1
"""Embeddings shorter than this share of the mean length count as untrained (paper A's authors' code)."""
LISTED = 50


def initial_tokens(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    explosion_layer: int | None = None,
    ablation_items: int = 1024,
    seed: int = 0,
    results_dir: str | Path | None = None,
) -> Observation:
    """Measure |h_l| after the explosion layer l of every item alone at position 0 (paper A, explosion path).

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines, on which the layer and the threshold are found.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own to the text; the sweep itself adds nothing.
        threshold: a norm that replaces the automatic one.
        explosion_layer: a layer 1..L that replaces the automatic one.
        ablation_items: trained items, a seeded draw, that are run again with one branch zeroed at a time.
        seed: of every random draw.
        results_dir: where norms that notebooks share are cached; None keeps nothing.

    Returns:
        The record of template 06.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    place = find_explosion(
        loaded, encoded, explosion_layer=explosion_layer, threshold=threshold, results_dir=results_dir
    )
    items = torch.arange(vocabulary_size(loaded.model))
    lengths, trained = trained_items(loaded, items)
    norms = item_norms(loaded.model, place.layer, items)
    random = random_norms(loaded.model, place.layer, len(items), lengths.mean().item(), seed=seed)
    quiet = items[trained & (norms <= place.threshold)]
    quiet = quiet[norms[quiet].argsort()]
    values = explosion_values(place) | {
        "exploding_share": _share(norms[trained], place),
        "random_share": _share(random, place),
        "norm_quantiles": torch.quantile(norms[trained].double(), _QUANTILES).tolist(),
        "random_quantiles": torch.quantile(random.double(), _QUANTILES).tolist(),
        "mean_embedding_norm": lengths.mean().item(),
        "untrained_count": int((~trained).sum()),
        "not_exploding_count": len(quiet),
        "not_exploding_ids": quiet[:LISTED].tolist(),
        "not_exploding_tokens": token_labels(loaded.tokenizer, quiet[:LISTED].tolist()),
        "not_exploding_norms": norms[quiet[:LISTED]].tolist(),
    }
    order = torch.randperm(int(trained.sum()), generator=torch.Generator().manual_seed(seed))
    values |= _ablations(loaded, place, items[trained][order[:ablation_items]], norms)
    arrays = {"norms_tokens": norms, "norms_random": random, "trained": trained}
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)


_QUANTILES = torch.tensor([0.05, 0.5, 0.95], dtype=torch.float64)


def trained_items(loaded: Loaded, items: Tensor) -> tuple[Tensor, Tensor]:
    """Lengths of the items' embeddings, (n,), and which are at least a tenth of the mean, (n,) bool."""
    lengths = embedding_norms(loaded.model, items)
    return lengths, lengths >= UNTRAINED * lengths.mean()


def explosion_values(place: Explosion) -> dict:
    """The entries of a record that say where the norms were taken and what counts as exploded."""
    return {
        "explosion_layer": place.layer if place.found else None,
        "explosion_layers": place.layers,
        "layer": place.layer,
        "threshold": place.threshold,
        "high_norm": place.high_norm,
        "ordinary_norm": place.ordinary_norm,
    }


def _share(norms: Tensor, place: Explosion) -> float:
    """Share of norms (n,) above the threshold."""
    return (norms > place.threshold).double().mean().item()


def _ablations(loaded: Loaded, place: Explosion, items: Tensor, norms: Tensor) -> dict:
    """Share of items that explode, and their median norm, with one branch of one layer zeroed at a time."""
    count = len(decoder_layers(loaded.model))
    values: dict = {
        "ablation_items": len(items),
        "intact_share": _share(norms[items], place),
        "intact_norm": norms[items].median().item(),
        "refused": {},
    }
    for branch in BRANCHES:
        shares, medians = [None] * count, [None] * count
        for layer in range(1, place.layer + 1):
            try:
                with zero_branch(loaded.model, branch, [layer]):
                    without = item_norms(loaded.model, place.layer, items)
            except LayerRefused as problem:
                values["refused"][str(layer)] = str(problem)
                continue
            shares[layer - 1], medians[layer - 1] = _share(without, place), without.median().item()
        values |= {f"{branch}_zeroed_share": shares, f"{branch}_zeroed_norm": medians}
    return values
