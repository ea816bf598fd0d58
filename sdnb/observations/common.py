"""What several observations share: the encoded text, the empirical direction, one linear view a layer."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from sdnb import text as texts
from sdnb.activations import collect_high_norm_states, detect, hidden_norms, token_batches
from sdnb.anatomy import LayerView, decoder_layers, layer_view
from sdnb.errors import LayerRefused
from sdnb.loading import Loaded
from sdnb.records import Measure, Record, cached, gather, write

DETECTION_LINES = 32
Found = TypeVar("Found")


@dataclass(frozen=True)
class Observation:
    """One template's result, as it goes into its record.

    Args:
        values: the record's JSON keys; lists over layers have L entries, layer 1 first.
        arrays: the record's arrays, float32 on the CPU.
        text_hash: hash of the text that was run, or None.
        begin_token: whether position 0 was a begin token, or None where no text was run.
    """

    values: dict
    arrays: dict[str, Tensor] = field(default_factory=dict)
    text_hash: str | None = None
    begin_token: bool | None = None


def save(
    result: Observation,
    cost: Measure,
    loaded: Loaded,
    template: str,
    *,
    results_dir: str | Path,
    seed: int | None = None,
) -> Record:
    """Write a template's result with its provenance.

    Args:
        result: what the observation returned.
        cost: wall time and memory of computing it.
        loaded: the model.
        template: the template's name, such as "04_singular_directions".
        results_dir: where records live.
        seed: the notebook's seed.

    Returns:
        The record as a reader will see it.
    """
    provenance = gather(
        loaded, seed=seed, text_hash=result.text_hash, begin_token=result.begin_token, measure=cost
    )
    return write(results_dir, loaded.slug, template, result.values, result.arrays, provenance)


@dataclass(frozen=True)
class EncodedText:
    """Lines of a text as token ids.

    Args:
        lines: token ids of each line, (T_i,).
        text_hash: hash of the lines' text.
        begin_token: whether every line starts with the tokenizer's begin token.
    """

    lines: list[Tensor]
    text_hash: str
    begin_token: bool


def encode_text(
    loaded: Loaded, text: str | list[str], max_lines: int, add_special_tokens: bool
) -> EncodedText:
    """Encode the first `max_lines` usable lines of a text.

    Args:
        loaded: model and tokenizer.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own (a begin token at position 0, usually).

    Returns:
        The encoded lines.
    """
    chosen = texts.lines_of(text, max_lines)
    lines = [encode_line(loaded, line, add_special_tokens) for line in chosen]
    begins = all(texts.begins_with_begin_token(line, loaded.tokenizer) for line in lines)
    return EncodedText(lines, texts.text_hash(chosen), begins)


def encode_line(loaded: Loaded, line: str, add_special_tokens: bool) -> Tensor:
    """Token ids of one line, (T,), within the model's positions and vocabulary."""
    limits = {
        "max_tokens": texts.position_limit(loaded.model.config),
        "vocabulary": loaded.model.get_input_embeddings().weight.shape[0],
    }
    return texts.encode(loaded.tokenizer, line, add_special_tokens, **limits)


@dataclass(frozen=True)
class Direction:
    """The empirical direction of a model on a text, and the layers where it comes and goes.

    Args:
        vector: (d,), the mean of the high-norm states; zero when there is none.
        count: number of high-norm states.
        threshold: norm above which a state counts; None when no token is high-norm.
        limits: the same for every layer 0..L, (L+1,), see `sdnb.activations.detection`.
        mean_low_norm: mean norm of the other states.
        explosion_layers: 1..L, largest step first.
        decay_layers: 1..L, largest step first.
        peak_ratio: largest norm over its layer's median.
    """

    vector: Tensor
    count: int
    threshold: float | None
    limits: Tensor
    mean_low_norm: float
    explosion_layers: list[int]
    decay_layers: list[int]
    peak_ratio: float

    @property
    def found(self) -> bool:
        """Whether the model has a high-norm state on this text."""
        return self.count > 0


def text_norms(loaded: Loaded, lines: list[Tensor]) -> Tensor:
    """Return |h_l| of every real token of the lines, one after the other, (L+1, N)."""
    batches = token_batches(lines)
    return torch.cat([hidden_norms(loaded.model, ids)[:, real] for ids, real, _ in batches], dim=1)


def first_positions(lines: list[Tensor]) -> Tensor:
    """Return which of the tokens of `text_norms` stand at position 0 of their line, (N,) bool."""
    batches = token_batches(lines)
    return torch.cat([(torch.arange(ids.shape[1]) == 0).expand_as(ids)[real] for ids, real, _ in batches])


def detection_norms(loaded: Loaded, lines: list[Tensor], results_dir: str | Path | None) -> Tensor:
    """Return |h_l| of every token of the first lines, on which layers and thresholds are found.

    Args:
        loaded: the model.
        lines: token ids of each line, (T_i,).
        results_dir: where the cache lives that notebooks share; None keeps nothing.

    Returns:
        The norms, (L+1, N).
    """
    first = lines[:DETECTION_LINES]
    if results_dir is None:
        return text_norms(loaded, first)
    parts = {"tokens": _tokens_hash(first), "dtype": loaded.dtype, "weights": loaded.fingerprint}
    kept = cached(
        results_dir, loaded.slug, "detection_norms", parts, lambda: {"norms": text_norms(loaded, first)}
    )
    return kept["norms"]


def _tokens_hash(lines: list[Tensor]) -> str:
    """SHA-256 of the token ids: one text may be encoded in several ways."""
    return hashlib.sha256(json.dumps([line.tolist() for line in lines]).encode()).hexdigest()


def empirical_direction(
    loaded: Loaded, encoded: EncodedText, *, threshold: float | None, results_dir: str | Path
) -> Direction:
    """Find the threshold on the first lines and the mean high-norm state on all; kept in the cache.

    Args:
        loaded: the model.
        encoded: the lines.
        threshold: a norm that replaces the automatic one.
        results_dir: where records and their cache live.

    Returns:
        The direction, the same for every notebook that asks with the same tokens and threshold.
    """

    def compute() -> dict[str, Tensor]:
        norms = detection_norms(loaded, encoded.lines, results_dir)
        initial = first_positions(encoded.lines[:DETECTION_LINES])
        found = detect(norms, initial=initial, threshold=threshold)
        result = {
            "explosion_layers": torch.tensor(found.explosion_layers, dtype=torch.int64),
            "decay_layers": torch.tensor(found.decay_layers, dtype=torch.int64),
            "peak_ratio": torch.tensor(found.peak_ratio, dtype=torch.float64),
            "threshold": torch.tensor(found.threshold or 0.0, dtype=torch.float64),
            "limits": found.limits,
        }
        states = collect_high_norm_states(loaded.model, encoded.lines, found.limits)
        vector = states.direction if len(states.states) else torch.zeros(states.states.shape[1])
        return result | {
            "vector": vector,
            "count": torch.tensor(len(states.states)),
            "mean_low_norm": torch.tensor(states.mean_low_norm, dtype=torch.float64),
        }

    parts = {
        "tokens": _tokens_hash(encoded.lines), "threshold": threshold, "dtype": loaded.dtype,
        "weights": loaded.fingerprint,
    }  # fmt: skip
    kept = cached(results_dir, loaded.slug, "empirical_direction", parts, compute)
    return Direction(
        kept["vector"],
        int(kept["count"]),
        float(kept["threshold"]) or None,
        kept["limits"],
        float(kept["mean_low_norm"]),
        kept["explosion_layers"].tolist(),
        kept["decay_layers"].tolist(),
        float(kept["peak_ratio"]),
    )


def layer_views(loaded: Loaded, refused: dict[int, str]) -> Iterator[tuple[int, LayerView | None]]:
    """Yield (number, view) for every decoder layer, one float32 copy at a time; see `each_layer`."""
    return each_layer(loaded, refused, lambda number: layer_view(loaded.model, number))


def each_layer(
    loaded: Loaded, refused: dict[int, str], look: Callable[[int], Found]
) -> Iterator[tuple[int, Found | None]]:
    """Yield (number, found) for every decoder layer; a caller that keeps none of them holds one at a time.

    Args:
        loaded: the model.
        refused: filled with the reason of every layer that has no linear view; None is found there.
        look: takes the layer's number.

    Yields:
        The layer's number 1..L and what `look` gives.

    Raises:
        LayerRefused: when not one layer has a linear view.
    """
    count = len(decoder_layers(loaded.model))
    for number in range(1, count + 1):
        try:
            found = look(number)
        except LayerRefused as problem:
            refused[number] = str(problem)
            if len(refused) == count:
                raise
            found = None
        yield number, found
        found = None  # one layer at a time: this one goes before the next is watched
