"""What 10 and 11 share: models that are loaded one after another, and what is measured on each."""

import gc
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations import collect_high_norm_states, detect, hidden_states
from sdnb.checkpoint import slug_of
from sdnb.decompose import angle_deg
from sdnb.errors import ParameterError
from sdnb.loading import Loaded, load
from sdnb.observations.common import DETECTION_LINES, Observation, encode_text
from sdnb.observations.measures import text_ids, text_perplexity, text_sink_rate
from sdnb.records import Measure, Record, gather, write


@dataclass(frozen=True)
class Checkpoint:
    """What one model shows on the text.

    Args:
        name: the model with its revision, as a person reads it.
        direction: mean high-norm state, (d,); None without one.
        first_states: mean state of the first tokens after every layer, (L+1, d), float32.
        first_norms: mean norm of the first tokens, (L+1,).
        other_norms: median norm of the other tokens, (L+1,).
        explosion_layers: 1..L, the largest step first.
        decay_layers: 1..L, the largest step first.
        peak_ratio: largest norm over its layer's median.
        high_norm_count: number of high-norm states.
        sink_rate: share of heads with a sink at position 0, None where attention is not told.
        loss: mean negative log-likelihood of a token of the text, in nats.
        provenance: where the numbers come from.
        text_hash: hash of the lines.
        begin_token: whether every line starts with a begin token.
    """

    name: str
    direction: Tensor | None
    first_states: Tensor
    first_norms: Tensor
    other_norms: Tensor
    explosion_layers: list[int]
    decay_layers: list[int]
    peak_ratio: float
    high_norm_count: int
    sink_rate: float | None
    loss: float
    provenance: dict
    text_hash: str
    begin_token: bool


@dataclass(frozen=True)
class CollectionObservation(Observation):
    """The result of a template over several models.

    Args:
        models: provenance of each model by its name.
    """

    models: dict[str, dict] | None = None


def model_and_revision(entry: str, model: str) -> tuple[str, str | None]:
    """Read an entry of a list of checkpoints.

    Args:
        entry: "name", "name@revision", or "@revision" of `model`.
        model: the model that a bare revision belongs to.

    Returns:
        The model's name and its revision or None.

    Raises:
        ParameterError: the entry is empty.
    """
    name, _, revision = str(entry).partition("@")
    if not name and not revision:
        raise ParameterError(f"{entry!r} names no checkpoint: give a model, model@revision or @revision")
    return name or model, revision or None


def step_of(entry: str) -> int:
    """Read the training step off an entry: its last number ("step3000", "…/003000").

    Args:
        entry: an entry of a list of checkpoints.

    Returns:
        The step.

    Raises:
        ParameterError: there is no number in it.
    """
    numbers = re.findall(r"\d+", str(entry).rpartition("@")[2] or str(entry))
    if not numbers:
        raise ParameterError(f"{entry!r} holds no training step: give `steps`, one number a checkpoint")
    return int(numbers[-1])


def visit_checkpoints(
    entries: Sequence[str], model: str, look: Callable[[Loaded], object], *, dtype: str, device: str
) -> Iterator:
    """Load models one after another, never two at once, and look at each.

    Args:
        entries: names of models, see `model_and_revision`.
        model: the model that bare revisions belong to.
        look: what is done with a loaded model; it must not keep the model.
        dtype: see `sdnb.load`.
        device: see `sdnb.load`.

    Yields:
        What `look` returns, in order.
    """
    for entry in entries:
        name, revision = model_and_revision(entry, model)
        loaded = load(name, revision=revision, dtype=dtype, device=device)
        result = look(loaded)
        # The next one is loaded when this one's memory is free.
        del loaded
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        yield result


def look_at(
    loaded: Loaded,
    *,
    text: str | list[str],
    max_lines: int,
    add_special_tokens: bool,
    threshold: float | None,
    window: int | None,
    max_windows: int,
) -> Checkpoint:
    """Measure norms, direction, layers, sink rate and loss of one model on a text.

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        window: tokens in a window of the loss; automatic when None.
        max_windows: windows at most.

    Returns:
        The measurements; nothing of the model itself is kept.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    norms, first, states = [], [], 0.0
    for line in encoded.lines[:DETECTION_LINES]:
        hidden = hidden_states(loaded.model, line[None])[:, 0]
        norms.append(hidden.norm(dim=-1))
        first.append(norms[-1][:, 0])
        states = states + hidden[:, 0].double()
    initial = torch.cat([torch.arange(n.shape[1]) == 0 for n in norms])
    found = detect(torch.cat(norms, dim=1), initial=initial, threshold=threshold)
    high = collect_high_norm_states(loaded.model, encoded.lines, found.limits)
    others = [n[:, 1:] for n in norms if n.shape[1] > 1] or norms
    ids, begin = text_ids(loaded, text, encoded.begin_token)
    return Checkpoint(
        name=loaded.name if loaded.revision is None else f"{loaded.name}@{loaded.revision}",
        direction=high.direction if len(high.states) else None,
        first_states=(states / len(first)).float(),
        first_norms=torch.stack(first).mean(dim=0),
        other_norms=torch.cat(others, dim=1).median(dim=1).values,
        explosion_layers=found.explosion_layers,
        decay_layers=found.decay_layers,
        peak_ratio=found.peak_ratio,
        high_norm_count=len(high.states),
        sink_rate=text_sink_rate(loaded, ids, begin),
        loss=text_perplexity(loaded, ids, begin, window, max_windows).nll.mean().item(),
        provenance=gather(loaded),
        text_hash=encoded.text_hash,
        begin_token=encoded.begin_token,
    )


def direction_angle(one: Checkpoint, other: Checkpoint) -> float | None:
    """Return the acute angle between two models' empirical directions.

    Args:
        one: a model's measurements.
        other: another's.

    Returns:
        Degrees; None where one of them has no direction.
    """
    if one.direction is None or other.direction is None:
        return None
    return float(angle_deg(one.direction, other.direction))


def save_collection(
    result: CollectionObservation,
    cost: Measure,
    model: str,
    template: str,
    *,
    results_dir: str | Path,
    revision: str | None = None,
    seed: int | None = None,
) -> Record:
    """Write the record of a template over several models, in the folder of the one it is named after.

    Args:
        result: what the observation returned.
        cost: wall time and memory of computing it.
        model: the model that the collection is named after.
        template: the template's name, such as "10_training_dynamics".
        results_dir: where records live.
        revision: the model's revision.
        seed: the notebook's seed.

    Returns:
        The record as a reader will see it.
    """
    provenance = gather(
        None, seed=seed, text_hash=result.text_hash, begin_token=result.begin_token, measure=cost
    )
    seen = {name: entry["fingerprint"][:16] for name, entry in (result.models or {}).items()}
    return write(
        results_dir,
        slug_of(model, revision),
        template,
        result.values,
        result.arrays,
        provenance | {"models": seen},
    )
