"""02: one direction for all samples, layers and tokens."""

from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations import HighNormStates, collect_high_norm_states, mean_pairwise_angle
from sdnb.anatomy import decoder_layers
from sdnb.decompose import angle_deg
from sdnb.labels import token_labels
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, empirical_direction, encode_text


def direction_over_text(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    seed: int = 0,
    results_dir: str | Path,
) -> Observation:
    """Collect every high-norm state of a text and measure how well one direction describes them.

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        seed: of the draw of pairs, where there are too many states for all.
        results_dir: where records and their cache live.

    Returns:
        The record of template 02: acute angles of every state to the mean state, by layer, line and token.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    summary = empirical_direction(loaded, encoded, threshold=threshold, results_dir=results_dir)
    states = collect_high_norm_states(loaded.model, encoded.lines, summary.limits)
    angles = angle_deg(states.states, summary.vector) if summary.found else torch.zeros(0)
    initial = states.position == 0
    values = {
        "high_norm_count": summary.count,
        "threshold": summary.threshold,
        "mean_low_norm": summary.mean_low_norm,
        "peak_ratio": summary.peak_ratio,
        "explosion_layers": summary.explosion_layers,
        "decay_layers": summary.decay_layers,
        "layer_count": len(decoder_layers(loaded.model)),
        "line_count": len(encoded.lines),
        "initial_count": int(initial.sum()),
        "noninitial_count": int((~initial).sum()),
        "noninitial_tokens": _most_common(loaded, states.token_id[~initial]),
    }
    values |= _pairwise("mean_pairwise_angle", states.states, seed)
    values |= _pairwise("initial_pairwise_angle", states.states[initial], seed)
    values |= _pairwise("noninitial_pairwise_angle", states.states[~initial], seed)
    values["initial_to_noninitial_angle_deg"] = (
        angle_deg(states.states[initial].double().mean(0), states.states[~initial].double().mean(0)).item()
        if initial.any() and (~initial).any()
        else None
    )
    arrays = {"direction": summary.vector, "state_angle_deg": angles.float()} | _places(states)
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)


def _pairwise(name: str, states: Tensor, seed: int) -> dict:
    """Mean angle over pairs of states and its standard error (0 when exact), or None without a pair."""
    mean, error = mean_pairwise_angle(states, seed=seed) if len(states) > 1 else (None, None)
    return {f"{name}_deg": mean, f"{name}_error_deg": error}


def _places(states: HighNormStates) -> dict[str, Tensor]:
    """Where each high-norm state was found, as int32 arrays of shape (n,)."""
    places = {"state_layer": states.layer, "state_position": states.position, "state_line": states.line}
    return {name: place.to(torch.int32) for name, place in places.items()}


def _most_common(loaded: Loaded, ids: Tensor, count: int = 10) -> list[str]:
    """Labels of the most frequent token ids."""
    values, counts = ids.unique(return_counts=True)
    top = values[counts.argsort(descending=True, stable=True)[:count]]
    return token_labels(loaded.tokenizer, top)
