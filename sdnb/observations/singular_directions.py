"""04: the singular directions of L and F and the largest-gain output, against the empirical direction."""

from pathlib import Path

import torch
from torch import Tensor

from sdnb.anatomy import LayerView
from sdnb.decompose import angle_deg, largest_gain, leading_triplets, random_angle
from sdnb.linearize import linear_layer
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, empirical_direction, encode_text, layer_views

KEYS = (
    "angle_deg", "singular_value", "second_singular_value",
    "ffn_angle_deg", "ffn_singular_value", "ffn_second_singular_value",
    "gain_angle_deg", "gain", "status",
)  # fmt: skip


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
    rows: list[dict] = []
    vectors: list[dict[str, Tensor]] = []
    refused: dict[int, str] = {}
    for _, view in layer_views(loaded, refused):
        if view is None:
            rows.append(dict.fromkeys(KEYS))
            vectors.append({})
            continue
        layer = linear_layer(
            view, method=method, input_scale=input_scale, centre=centre, samples=samples, seed=seed
        )
        row, found = _one_layer(view, layer, direction.vector if direction.found else None, starts, seed)
        rows.append(row)
        vectors.append(found)
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
    arrays = {name: torch.stack([v.get(name, torch.zeros(d)) for v in vectors]) for name in names}
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)


def _one_layer(
    view: LayerView, layer, direction: Tensor | None, starts: int, seed: int
) -> tuple[dict, dict[str, Tensor]]:
    """Directions of one layer: of L, of F, and the output of the real FFN's largest gain."""
    whole, ffn = leading_triplets(layer.L, k=2, seed=seed), leading_triplets(layer.F, k=2, seed=seed)
    d = view.hidden_size
    # The norm before the FFN divides the scale out, but for its epsilon: rows of a real size, sqrt(d) long.
    gain = largest_gain(
        lambda x: view.ffn_branch(x * d**0.5), d, starts=starts, seed=seed,
        extra=torch.stack([ffn.V[:, 0], -ffn.V[:, 0]]),
    )  # fmt: skip

    def angle(vector: Tensor) -> float | None:
        return None if direction is None else float(angle_deg(vector, direction))

    row = {
        "angle_deg": angle(whole.U[:, 0]),
        "singular_value": float(whole.S[0]),
        "second_singular_value": float(whole.S[1]),
        "ffn_angle_deg": angle(ffn.U[:, 0]),
        "ffn_singular_value": float(ffn.S[0]),
        "ffn_second_singular_value": float(ffn.S[1]),
        "gain_angle_deg": angle(gain.output),
        "gain": gain.gain,
        "status": view.status,
    }
    vectors = {
        "directions": whole.U[:, 0], "ffn_directions": ffn.U[:, 0],
        "gain_inputs": gain.input, "gain_outputs": gain.output,
    }  # fmt: skip
    return row, {name: vector.float().cpu() for name, vector in vectors.items()}
