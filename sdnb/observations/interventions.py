"""09: what happens when the explosion is prevented, its dimensions overwritten, attention switched off."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations import hidden_norms, token_batches, visit_states
from sdnb.activations.interventions import project_out, set_dimensions, zero_attention
from sdnb.activations.sampling import continuation
from sdnb.anatomy import layer_view
from sdnb.decompose import leading_triplets
from sdnb.errors import ParameterError
from sdnb.linearize import ffn_matrix
from sdnb.loading import Loaded
from sdnb.observations.common import Observation, encode_line, encode_text
from sdnb.observations.explosion import Explosion, find_explosion
from sdnb.observations.measures import text_ids, text_perplexity, text_sink_rate

HELD = 0.9
"""Massive dimensions hold this share of the squared length of the mean high-norm state, ..."""
MOST = 10
"""... but there are at most so many of them."""

Intervention = Callable[[], AbstractContextManager]


def interventions(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None = None,
    explosion_layer: int | None = None,
    massive_dimensions: list[int] | None = None,
    window: int | None = None,
    max_windows: int = 16,
    prompt: str = "Return the",
    new_tokens: int = 40,
    temperature: float = 0.8,
    seed: int = 0,
    results_dir: str | Path | None = None,
) -> Observation:
    """Measure norms, perplexity, sink rate and a sampled continuation, untouched and under each intervention.

    The interventions: the leading right singular vector of F projected out before the FFN of the explosion
    layer (paper A), and of all explosion layers where there are several; the massive dimensions of the
    high-norm tokens set to zero and to their mean behind these layers (Sun et al.); attention zeroed.

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own; a begin token then also starts each window.
        threshold: a norm that replaces the automatic ones.
        explosion_layer: a layer 1..L that replaces the automatic one.
        massive_dimensions: dimensions 0..d-1, one or more, that replace the automatic ones.
        window: tokens in a window of the perplexity; automatic when None.
        max_windows: windows at most.
        prompt: beginning of the sampled text.
        new_tokens: its length.
        temperature: of the sampling.
        seed: of every random draw.
        results_dir: where norms that notebooks share are cached; None keeps nothing.

    Returns:
        The record of template 09.

    Raises:
        ParameterError: no massive dimension is given, or one that does not exist.
    """
    size = loaded.model.config.get_text_config().hidden_size
    if massive_dimensions is not None and not (
        massive_dimensions and all(0 <= i < size for i in massive_dimensions)
    ):
        raise ParameterError(
            f"massive_dimensions is {massive_dimensions}: give one or more of 0 to {size - 1}, or null for "
            "the automatic ones"
        )
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    place = find_explosion(
        loaded, encoded, explosion_layer=explosion_layer, threshold=threshold, results_dir=results_dir
    )
    layers = [place.layer] if explosion_layer else place.layers or [place.layer]
    massive = massive_means(loaded, encoded.lines, layers, place.state_limits, massive_dimensions)
    ids, begin = text_ids(loaded, text, encoded.begin_token)
    start = encode_line(loaded, prompt, add_special_tokens)
    groups, first, others = {}, [], []
    for name, intervene in _interventions(loaded, place, layers, massive, seed).items():
        with intervene():
            norms = _line_norms(loaded, encoded.lines)
            groups[name] = {
                "peak_norm": max(part[1:].max().item() for part in norms),
                "perplexity": _finite(text_perplexity(loaded, ids, begin, window, max_windows).value),
                "sink_rate": text_sink_rate(loaded, ids, begin),
                "continuation": _sample(loaded, start, new_tokens, temperature, seed),
            }
        first.append(torch.stack([part[:, 0] for part in norms]).mean(dim=0))
        others.append(torch.cat([part[:, 1:] for part in norms], dim=1).median(dim=1).values)
        groups[name]["first_norm"] = first[-1][place.layer].item()
    values = {
        "explosion_layer": place.layer if place.found else None,
        "explosion_layers": place.layers,
        "interventions": groups,
        "massive_dimensions": [] if massive is None else massive[0],
        "massive_means": [] if massive is None else [massive[1][layers[0]][i].item() for i in massive[0]],
        "massive_share": None if massive is None else _held(massive[1][layers[0]], massive[0]),
        "prompt": prompt,
    }
    arrays = {"first_norms": torch.stack(first), "other_norms": torch.stack(others)}
    return Observation(values, arrays, encoded.text_hash, encoded.begin_token)


def massive_means(
    loaded: Loaded, lines: list[Tensor], layers: list[int], limits: Tensor, dimensions: list[int] | None
) -> tuple[list[int], dict[int, Tensor]] | None:
    """Find the massive dimensions and the mean high-norm state behind some layers.

    The fewest dimensions that hold `HELD` of the squared length of the mean state behind the first layer, but
    at most `MOST`.

    Args:
        loaded: the model.
        lines: token ids of each line, (T_i,).
        layers: layers 1..L, the most important first.
        limits: norm that a token must exceed at some layer 1..L to count, for every layer 0..L, (L+1,).
        dimensions: given ones, which replace the rule.

    Returns:
        The dimensions, the largest first, and the mean state (d,) behind each layer; None without a high-norm
        token.
    """
    sums = dict.fromkeys(layers, 0.0)
    count = 0
    for ids, real, _ in token_batches(lines):
        high = (hidden_norms(loaded.model, ids)[1:] > limits[1:, None, None]).any(dim=0) & real
        count += int(high.sum())

        def add(layer: int, state: Tensor, high: Tensor = high) -> None:
            if layer in sums:
                sums[layer] = sums[layer] + state[high.to(state.device)].double().sum(dim=0).cpu()

        visit_states(loaded.model, ids, add, stop_after=max(layers))
    if not count:
        return None
    means = {layer: total / count for layer, total in sums.items()}
    if dimensions is None:
        squares, order = means[layers[0]].square().sort(descending=True)
        needed = int((squares.cumsum(0) < HELD * squares.sum()).sum()) + 1
        dimensions = order[: min(needed, MOST)].tolist()
    return dimensions, means


def massive_limits(dimensions: list[int], means: dict[int, Tensor]) -> dict[int, float]:
    """Return from which absolute value on an entry is massive, behind every layer.

    Half the smallest of the massive dimensions' means there: the norm grows in several steps in some models,
    and what is massive behind the first is small behind the last.

    Args:
        dimensions: the massive dimensions.
        means: layer 1..L -> the mean state behind it, (d,); see `massive_means`.

    Returns:
        Layer 1..L -> the value.
    """
    return {layer: mean[dimensions].abs().min().item() / 2 for layer, mean in means.items()}


def _held(state: Tensor, dimensions: list[int]) -> float:
    """Share of a state's squared length that some dimensions hold."""
    return (state[dimensions].square().sum() / state.square().sum()).item()


def _interventions(
    loaded: Loaded,
    place: Explosion,
    layers: list[int],
    massive: tuple[list[int], dict[int, Tensor]] | None,
    seed: int,
) -> dict[str, Intervention]:
    """Every intervention by its name, the untouched model first."""
    model = loaded.model
    directions = {
        n: leading_triplets(ffn_matrix(layer_view(model, n)), k=1, seed=seed).V[:, 0] for n in layers
    }
    found: dict[str, Intervention] = {
        "none": nullcontext,
        f"direction out, layer {layers[0]}": partial(project_out, model, {layers[0]: directions[layers[0]]}),
    }
    if len(layers) > 1:
        found["direction out, all explosion layers"] = partial(project_out, model, directions)
    if massive is not None:
        dimensions, means = massive
        above = massive_limits(dimensions, means)
        for name, scale in (("zero", 0.0), ("mean", 1.0)):
            values = {n: {i: scale * means[n][i].item() for i in dimensions} for n in layers}
            found[f"massive dimensions to {name}"] = partial(set_dimensions, model, values, above=above)
    return found | {"attention zeroed": partial(zero_attention, model)}


def _line_norms(loaded: Loaded, lines: list[Tensor]) -> list[Tensor]:
    """|h_l| of each line's tokens, (L+1, T_i) each."""
    found = []
    for ids, real, _ in token_batches(lines):
        norms = hidden_norms(loaded.model, ids)
        found += [norms[:, row, which] for row, which in enumerate(real)]
    return found


def _finite(value: float) -> float | None:
    """A perplexity, or None where it exceeds every number."""
    return value if value < float("inf") else None


def _sample(loaded: Loaded, start: Tensor, count: int, temperature: float, seed: int) -> str:
    """A sampled continuation as text."""
    return loaded.tokenizer.decode(
        continuation(loaded.model, start, count, temperature=temperature, seed=seed)
    )
