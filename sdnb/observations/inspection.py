"""One pass over a text: high-norm tokens, layers, massive dimensions, what every linear module is given."""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.activations import Detection, detect
from sdnb.anatomy import decoder_layers
from sdnb.labels import token_labels
from sdnb.loading import Loaded
from sdnb.observations.common import EncodedText, Observation, encode_text
from sdnb.quantize import MIN_TOKEN_RATIO, InputStatistics, SkipList, input_statistics, skip_list

MASSIVE = 5.0
"""A dimension is massive when the mean high-norm state there is at least five times its rms entry."""


@dataclass(frozen=True)
class Inspection:
    """What one pass over a text shows.

    Args:
        detection: threshold, explosion and decay layers, and which tokens are high-norm, lines one after the
            other.
        norms: |h_l| of every token, (L+1, N).
        positions: position of every token in its line, (N,).
        token_ids: (N,).
        mean_state: mean over high-norm tokens of the state at its longest, (d,); zero without such a token.
        statistics: of every linear module's inputs.
        skip: the modules that should keep their precision.
    """

    detection: Detection
    norms: Tensor
    positions: Tensor
    token_ids: Tensor
    mean_state: Tensor
    statistics: dict[str, InputStatistics]
    skip: SkipList

    def massive_dimensions(self) -> list[dict]:
        """Dimensions that stand out of the mean high-norm state by the rule of `MASSIVE`, the largest first.

        Returns:
            Rows with `dimension` (0-based, as in the weights), `value` and `share` of the squared norm.
        """
        squares = self.mean_state.double() ** 2
        total = squares.sum()
        if total == 0:
            return []
        found = (squares >= MASSIVE**2 * total / len(squares)).nonzero().flatten().tolist()
        rows = [
            {"dimension": j, "value": float(self.mean_state[j]), "share": float(squares[j] / total)}
            for j in found
        ]
        return sorted(rows, key=lambda row: -row["share"])

    def high_norm_tokens(self) -> list[tuple[int, int, float, int]]:
        """Distinct high-norm tokens: (token id, 0 or -1 for a later position, largest norm, how often)."""
        peaks = self.norms[1:].amax(dim=0)
        found: dict[tuple[int, int], list[float]] = {}
        for place in self.detection.high_norm.nonzero().flatten().tolist():
            key = (int(self.token_ids[place]), 0 if self.positions[place] == 0 else -1)
            found.setdefault(key, []).append(peaks[place].item())
        rows = [(token, position, max(norms), len(norms)) for (token, position), norms in found.items()]
        return sorted(rows, key=lambda row: (-row[3], -row[2]))


class _Stream:
    """Norms of every token after every layer, and its longest state, line by line."""

    def __init__(self):
        self.norms: dict[int, list[Tensor]] = {}
        self.longest: dict[int, tuple[Tensor, Tensor]] = {}

    def visit(self, layer: int, state: Tensor, real: Tensor, numbers: list[int]) -> None:
        """Take one batch's hidden states (B, T, d) after a layer; 0 is what enters layer 1."""
        for row, number in enumerate(numbers):
            states = state[row].float().cpu()[real[row]]
            norms = states.norm(dim=1)
            self.norms.setdefault(number, []).append(norms)
            if layer > 1:
                before, kept = self.longest[number]
                higher = norms > before
                norms, states = torch.where(higher, norms, before), torch.where(higher[:, None], states, kept)
            self.longest[number] = (norms, states)


def inspect_lines(
    loaded: Loaded,
    lines: list[Tensor],
    *,
    threshold: float | None = None,
    min_ratio: float = MIN_TOKEN_RATIO,
) -> Inspection:
    """Run lines once and look at the residual stream and every linear module's inputs in the same pass.

    Args:
        loaded: the model.
        lines: token ids of each line, (T_i,).
        threshold: a norm that replaces the automatic one of the detection.
        min_ratio: the skip list's threshold.

    Returns:
        What the pass shows.
    """
    stream = _Stream()
    statistics = input_statistics(loaded.model, lines, visit=stream.visit)
    norms = torch.cat([torch.stack(stream.norms[number]) for number in range(len(lines))], dim=1)
    positions = torch.cat([torch.arange(len(line)) for line in lines])
    found = detect(norms, initial=positions == 0, threshold=threshold)
    high = torch.cat([stream.longest[number][1] for number in range(len(lines))])[found.high_norm]
    mean = high.double().mean(dim=0).float() if len(high) else torch.zeros(high.shape[1])
    chosen = skip_list(loaded.model, statistics, threshold=min_ratio)
    return Inspection(found, norms, positions, torch.cat(lines), mean, statistics, chosen)


def detection_values(loaded: Loaded, seen: Inspection) -> dict:
    """Say what a pass has shown, as plain JSON values.

    Args:
        loaded: the model.
        seen: from `inspect_lines`.

    Returns:
        The values of `sdnb detect --json`, also recorded by template 12.
    """
    tokens = seen.high_norm_tokens()
    labels = token_labels(loaded.tokenizer, [token for token, *_ in tokens])
    return {
        "token_count": len(seen.token_ids),
        "layer_count": len(decoder_layers(loaded.model)),
        "peak_ratio": seen.detection.peak_ratio,
        "threshold": seen.detection.threshold,
        "explosion_layers": seen.detection.explosion_layers,
        "decay_layers": seen.detection.decay_layers,
        "high_norm_tokens": [
            {
                "token": label, "token_id": token, "position": "first" if position == 0 else "later",
                "peak_norm": norm, "count": count,
            }
            for label, (token, position, norm, count) in zip(labels, tokens, strict=True)
        ],
        "massive_dimensions": seen.massive_dimensions(),
        "linear_inputs": [_row(found) for found in seen.statistics.values()],
        "skip_threshold": seen.skip.threshold,
        "spiking_modules": list(seen.skip.spiking),
        "never_quantized": list(seen.skip.by_default),
        "skip_list": seen.skip.modules,
    }  # fmt: skip


def _row(found: InputStatistics) -> dict:
    """One linear module's statistics."""
    return {
        "module": found.name,
        "layer": found.layer,
        "largest_input": found.largest,
        "median_input": found.median,
        "ratio": found.ratio,
        "median_token_largest": found.token_median,
        "token_ratio": found.token_ratio,
        "int8_error": found.int8_error,
    }


def detect_defects(
    loaded: Loaded,
    *,
    text: str | list[str] = "heldout",
    max_lines: int = 64,
    add_special_tokens: bool = True,
    threshold: float | None = None,
    min_ratio: float = MIN_TOKEN_RATIO,
) -> Observation:
    """Find what a quantizer should know about a model, in one pass over a text (`sdnb detect`).

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        min_ratio: largest input over the median token's largest input from which on a module goes on the skip
            list.

    Returns:
        Detection, massive dimensions, statistics of every linear module's inputs, and the skip list with its
        forms.
    """
    encoded: EncodedText = encode_text(loaded, text, max_lines, add_special_tokens)
    seen = inspect_lines(loaded, encoded.lines, threshold=threshold, min_ratio=min_ratio)
    values = {"model": loaded.name} | detection_values(loaded, seen) | {"forms": seen.skip.forms()}
    return Observation(values, {"mean_state": seen.mean_state}, encoded.text_hash, encoded.begin_token)
