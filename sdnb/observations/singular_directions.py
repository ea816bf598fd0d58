"""04: the singular directions of L and F and the largest-gain output, against the empirical direction."""

from pathlib import Path

import torch
from torch import Tensor

from sdnb.anatomy import layer_view
from sdnb.decompose import angle_deg, largest_gain, leading_triplets, random_angle
from sdnb.linearize import linear_layer
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, each_layer, empirical_direction, encode_text
from sdnb.records import cached

KEYS = (
    "angle_deg", "singular_value", "second_singular_value",
    "ffn_angle_deg", "ffn_singular_value", "ffn_second_singular_value",
    "gain_angle_deg", "gain", "status",
)  # fmt: skip
STATUSES = ("exact", "approximate", "sampled")


def singular_directions(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    method: str = "closed_form",
    input_scale: str = "paper",
    centre: bool = False,
    samples: int = 100_000,
    starts: int = 64,
    seed: int = 0,
    results_dir: str | Path,
) -> Observation:
    """Compare each layer's singular directions with the empirical direction (paper A, section 4).

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines, for the empirical direction.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        method: "closed_form" or "sampled" linear view of the FFN.
        input_scale: "paper" or "gain".
        centre: include a LayerNorm's mean subtraction.
        samples: of the sampled view.
        starts: of the largest-gain iteration.
        seed: of every random draw.
        results_dir: where records and their cache live.

    Returns:
        The record of template 04; angles are None where there is no empirical direction.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    direction = empirical_direction(loaded, encoded, threshold=threshold, results_dir=results_dir)
    how = {"method": method, "input_scale": input_scale, "centre": centre, "samples": samples, "seed": seed}

    parts = how | {"starts": starts, "dtype": loaded.dtype, "weights": loaded.fingerprint}

    def look(number: int) -> dict[str, Tensor]:
        def compute() -> dict[str, Tensor]:
            return _layer(loaded, number, starts, **how)

        return cached(results_dir, loaded.slug, f"layer_{number}", parts | {"layer": number}, compute)

    refused: dict[int, str] = {}
    layers = [found or {} for _, found in each_layer(loaded, refused, look)]
    rows = [_row(found, direction.vector if direction.found else None) for found in layers]
    d = direction.vector.numel()
    values = {key: [row[key] for row in rows] for key in KEYS} | {
        "explosion_layers": direction.explosion_layers,
        "decay_layers": direction.decay_layers,
        "random_angle_deg": random_angle(d),
        "method": method,
        "input_scale": input_scale,
        "refused": {str(number): reason for number, reason in refused.items()},
    }
    names = ("directions", "ffn_directions", "gain_inputs", "gain_outputs")
    arrays = {name: torch.stack([found.get(name, torch.zeros(d)) for found in layers]) for name in names}
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)


def _layer(loaded: Loaded, number: int, starts: int, *, seed: int, **how) -> dict[str, Tensor]:
    """What depends on the weights alone: directions of L and F, and those of the real FFN's largest gain."""
    view = layer_view(loaded.model, number)
    layer = linear_layer(view, seed=seed, **how)
    whole, ffn = leading_triplets(layer.L, k=2, seed=seed), leading_triplets(layer.F, k=2, seed=seed)
    d = view.hidden_size
    # The norm before the FFN divides the scale out, but for its epsilon: rows of a real size, sqrt(d) long.
    gain = largest_gain(
        lambda x: view.ffn_branch(x * d**0.5), d, starts=starts, seed=seed,
        extra=torch.stack([ffn.V[:, 0], -ffn.V[:, 0]]),
    )  # fmt: skip
    found = {"directions": whole.U[:, 0], "singular_values": whole.S[:2]}
    if ffn.S[0] > 0:  # else F is zero, as in a layer without an FFN, and has no direction
        found |= {"ffn_directions": ffn.U[:, 0], "ffn_singular_values": ffn.S[:2]}
    if gain.gain > 0:
        found |= {"gain_inputs": gain.input, "gain_outputs": gain.output}
    status = torch.tensor(STATUSES.index(view.status))
    return {name: array.float() for name, array in found.items()} | {
        "gain": torch.tensor(gain.gain, dtype=torch.float64), "status": status,
    }  # fmt: skip


def _row(found: dict[str, Tensor], direction: Tensor | None) -> dict:
    """One layer's entries in the record; all None where nothing was found."""
    if not found:
        return dict.fromkeys(KEYS)

    def angle(name: str) -> float | None:
        there = direction is not None and name in found
        return float(angle_deg(found[name], direction)) if there else None

    ffn = found["ffn_singular_values"].tolist() if "ffn_singular_values" in found else [None, None]
    return {
        "angle_deg": angle("directions"),
        "singular_value": float(found["singular_values"][0]),
        "second_singular_value": float(found["singular_values"][1]),
        "ffn_angle_deg": angle("ffn_directions"),
        "ffn_singular_value": ffn[0],
        "ffn_second_singular_value": ffn[1],
        "gain_angle_deg": angle("gain_outputs"),
        "gain": float(found["gain"]) or None,
        "status": STATUSES[int(found["status"])],
    }
