"""Where a model's norm explodes, and from which norm on a token counts as exploded there (06 to 09)."""

from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations import detect, layer_steps
from sdnb.activations.detection import MIN_RATIO
from sdnb.anatomy import decoder_layers
from sdnb.errors import ParameterError
from sdnb.loading import Loaded
from sdnb.observations.common import DETECTION_LINES, EncodedText, detection_norms, first_positions


@dataclass(frozen=True)
class Explosion:
    """Where the norm explodes on a text.

    Args:
        layers: explosion layers by the rule of notebook 01, the largest step first.
        layer: the layer that is looked at, 1..L: the one asked for, else the first of `layers`, else the one
            with the largest step.
        found: whether it is an explosion layer by the rule, or was asked for.
        threshold: norm after that layer from which a token counts as exploded.
        state_threshold: norm from which a state after any layer counts as high-norm.
        state_limits: the same for every layer 0..L, (L+1,), see `sdnb.activations.detection`.
        high_norm: median norm after the layer of the high-norm tokens, None without any.
        ordinary_norm: median norm after the layer of the other tokens.
    """

    layers: list[int]
    layer: int
    found: bool
    threshold: float
    state_threshold: float
    state_limits: Tensor = field(compare=False)  # tensors have no equality of one value
    high_norm: float | None
    ordinary_norm: float


def find_explosion(
    loaded: Loaded,
    encoded: EncodedText,
    *,
    explosion_layer: int | None = None,
    threshold: float | None = None,
    results_dir: str | Path | None = None,
) -> Explosion:
    """Find the explosion layer on a text and the norm that tells exploded tokens from others right after it.

    The threshold is half the lower decile of the high-norm tokens' norms after this one layer, or, where an
    ordinary token comes higher, the geometric mean of both. Where it comes as high as that decile, or there
    is no high-norm token, it is five times the median, as for a high-norm token.

    Args:
        loaded: the model.
        encoded: lines of text; the first ones are run.
        explosion_layer: a layer 1..L that replaces the automatic one.
        threshold: a norm that replaces the automatic ones.
        results_dir: where the norms are cached; None keeps nothing.

    Returns:
        The layer and its thresholds.

    Raises:
        ParameterError: there is no such layer.
    """
    count = len(decoder_layers(loaded.model))
    if explosion_layer is not None and not 1 <= explosion_layer <= count:
        raise ParameterError(f"explosion_layer is {explosion_layer}: give 1 to {count}, or null")
    norms = detection_norms(loaded, encoded.lines, results_dir)
    seen = detect(norms, initial=first_positions(encoded.lines[:DETECTION_LINES]), threshold=threshold)
    high = seen.high_norm
    steps = layer_steps(norms, high if high.any() else torch.ones_like(high)).mean(dim=1)
    layer = explosion_layer or (seen.explosion_layers or [int(steps.argmax()) + 1])[0]
    here = norms[layer]
    state_threshold, state_limits = seen.threshold, seen.limits
    if state_threshold is None:
        state_threshold = MIN_RATIO * norms[1:].median(dim=1).values.max().item()
        state_limits = torch.full_like(seen.limits, state_threshold)
    return Explosion(
        seen.explosion_layers,
        layer,
        bool(seen.explosion_layers) or explosion_layer is not None,
        threshold if threshold is not None else _threshold(here, high),
        state_threshold,
        state_limits,
        here[high].median().item() if high.any() else None,
        (here[~high] if (~high).any() else here).median().item(),
    )


def _threshold(norms: Tensor, high: Tensor) -> float:
    """The norm between the high-norm tokens and the others after one layer, norms and high (N,)."""
    peak = torch.quantile(norms[high].double(), 0.1).item() if high.any() else 0.0
    ordinary = norms[~high].max().item() if (~high).any() else 0.0
    if ordinary >= peak:
        return MIN_RATIO * norms.median().item()
    return peak / 2 if ordinary <= peak / 2 else (peak * ordinary) ** 0.5
