"""11: the direction before and after fine-tuning."""

from collections.abc import Sequence

import torch

from sdnb.decompose import random_angle
from sdnb.errors import ParameterError
from sdnb.observations.checkpoints import (
    Checkpoint,
    CollectionObservation,
    direction_angle,
    look_at,
    visit_checkpoints,
)


def fine_tuning(
    model: str,
    descendants: Sequence[str],
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    window: int | None = None,
    max_windows: int = 16,
    dtype: str = "auto",
    device: str = "auto",
) -> CollectionObservation:
    """Compare directions and norm curves of a base model and others of its shape, loaded one by one.

    Args:
        model: the base model.
        descendants: the others, "name", "name@revision" or "@revision" of `model`.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        window: tokens in a window of the loss; automatic when None.
        max_windows: windows at most.
        dtype: see `sdnb.load`.
        device: see `sdnb.load`.

    Returns:
        The record of template 11, the base model first.

    Raises:
        ParameterError: no descendant, or one whose shape is another.
    """
    descendants = [descendants] if isinstance(descendants, str) else descendants
    if not descendants:
        raise ParameterError("descendants is empty: give at least one model to compare")
    options = {
        "text": text, "max_lines": max_lines, "add_special_tokens": add_special_tokens,
        "threshold": threshold, "window": window, "max_windows": max_windows,
    }  # fmt: skip
    seen: list[Checkpoint] = list(
        visit_checkpoints(
            [model, *descendants],
            model,
            lambda loaded: look_at(loaded, **options),
            dtype=dtype,
            device=device,
        )
    )
    base = seen[0]
    for other in seen[1:]:
        if other.first_states.shape != base.first_states.shape:
            raise ParameterError(
                f"{other.name} has {len(other.first_norms) - 1} layers of size "
                f"{other.first_states.shape[1]}, "
                f"{base.name} {len(base.first_norms) - 1} of size {base.first_states.shape[1]}: their "
                "directions "
                "cannot be compared"
            )
    pairs = [[direction_angle(a, b) for b in seen] for a in seen]
    d = base.first_states.shape[1]
    values = {
        "names": [c.name for c in seen],
        "angle_deg": pairs[0],
        "pair_angle_deg": pairs,
        "explosion_layers": [c.explosion_layers for c in seen],
        "decay_layers": [c.decay_layers for c in seen],
        "peak_ratio": [c.peak_ratio for c in seen],
        "high_norm_count": [c.high_norm_count for c in seen],
        "random_angle_deg": random_angle(d),
    }
    arrays = {
        "directions": torch.stack([torch.zeros(d) if c.direction is None else c.direction for c in seen]),
        "first_norms": torch.stack([c.first_norms for c in seen]),
        "other_norms": torch.stack([c.other_norms for c in seen]),
    }
    models = {c.name: c.provenance for c in seen}
    return CollectionObservation(values, arrays, base.text_hash, base.begin_token, models)
