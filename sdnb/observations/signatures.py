"""13: a model's signature is its empirical direction; a small angle between two of them means kinship.

The direction survives fine-tuning and differs from one training run to the next (paper A, its figure of
angles between models of one width). Two directions in spaces of different widths make no angle, and are
refused.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.cluster.hierarchy import leaves_list, linkage
from scipy.spatial.distance import squareform
from torch import Tensor

from sdnb.activations import HighNormStates, collect_high_norm_states, detect
from sdnb.anatomy import decoder_layers
from sdnb.decompose import angle_deg
from sdnb.decompose.chance import log10_chance
from sdnb.errors import ModelError
from sdnb.loading import Loaded
from sdnb.observations.common import DETECTION_LINES, encode_text, text_norms

CHANCE = 1e-6
"""Two models are called related when unrelated directions come so close less often than this."""

DIFFERENT_KINDS_DEG = 10.0
"""Initial and noninitial states further apart than this are not averaged; the initial ones count."""

REPLICATES = 200


class NoSignature(ModelError):
    """No token of the text is high-norm in this model."""


@dataclass(frozen=True)
class Facts:
    """What belongs to a signature beside its direction.

    Args:
        name: the model as it was asked for.
        kind: "all" high-norm states, or the "initial" ones only, where the two kinds differ.
        radius_deg: 95 % of the bootstrap replicates over lines lie within this angle of the direction.
        states: high-norm states behind it.
        hidden_size: d.
        layers: L.
        tokenizer: hash of the tokenizer's vocabulary, or None.
        fingerprint: of the weights.
        text_hash: of the lines that were read.
        settings: what else it depends on.
    """

    name: str
    kind: str
    radius_deg: float
    states: int
    hidden_size: int
    layers: int
    tokenizer: str | None
    fingerprint: str
    text_hash: str
    settings: dict


@dataclass(frozen=True)
class Signature:
    """A model's empirical direction.

    Args:
        direction: unit vector, (d,), float32.
        facts: what is known about it.
    """

    direction: Tensor
    facts: Facts


def signature(
    loaded: Loaded,
    *,
    text: str | list[str] = "heldout",
    max_lines: int = 200,
    add_special_tokens: bool = False,
    threshold: float | None = None,
    seed: int = 0,
) -> Signature:
    """Measure a model's signature.

    Without special tokens, as in the paper, every line begins with another token, and the bootstrap over
    lines says how much the direction depends on it. With a begin token position 0 is the same in every line,
    and the radius is zero.

    Args:
        loaded: the model.
        text: a named corpus, a path, or literal lines.
        max_lines: number of lines.
        add_special_tokens: whether the tokenizer adds its own.
        threshold: a norm that replaces the automatic one.
        seed: of the bootstrap.

    Returns:
        The signature.

    Raises:
        NoSignature: no token of the text is high-norm.
    """
    encoded = encode_text(loaded, text, max_lines, add_special_tokens)
    found = detect(text_norms(loaded, encoded.lines[:DETECTION_LINES]), threshold=threshold)
    states = collect_high_norm_states(loaded.model, encoded.lines, found.limits)
    if not len(states.states):
        raise NoSignature(f"{loaded.name} has no high-norm token on this text, so it has no signature")
    kind, chosen = _kind(states)
    direction, radius = bootstrap(states.states[chosen], states.line[chosen], len(encoded.lines), seed)
    settings = {"max_lines": max_lines, "add_special_tokens": add_special_tokens, "seed": seed}
    facts = Facts(
        loaded.name, kind, radius, int(chosen.sum()), len(direction), len(decoder_layers(loaded.model)),
        _vocabulary_hash(loaded.tokenizer), loaded.fingerprint, encoded.text_hash,
        settings | {"threshold": threshold},
    )  # fmt: skip
    return Signature(direction, facts)


def _kind(states: HighNormStates) -> tuple[str, Tensor]:
    """Which high-norm states count: all of them, or the initial ones where the two kinds differ."""
    initial = states.position == 0
    everything = torch.ones_like(initial)
    if initial.all() or not initial.any():
        return "all", everything
    means = [states.states[which].double().mean(dim=0) for which in (initial, ~initial)]
    apart = float(angle_deg(*means)) > DIFFERENT_KINDS_DEG
    return ("initial", initial) if apart else ("all", everything)


def bootstrap(states: Tensor, line: Tensor, lines: int, seed: int) -> tuple[Tensor, float]:
    """Return the unit mean of states and the radius of 95 % of its bootstrap replicates over lines.

    A replicate draws as many lines with replacement and averages all their states; the radius is the 95 %
    quantile of the angles between replicates and mean.

    Args:
        states: (n, d).
        line: number of the line that each state comes from, 0 to lines - 1, (n,).
        lines: number of lines, those without a state included.
        seed: of the draws.

    Returns:
        The direction, (d,) in float32, and the radius in degrees.
    """
    sums = torch.zeros(lines, states.shape[1], dtype=torch.float64).index_add_(0, line, states.double())
    counts = torch.bincount(line, minlength=lines).double()
    mean = sums.sum(dim=0)
    draws = torch.randint(lines, (REPLICATES, lines), generator=torch.Generator().manual_seed(seed))
    times = torch.zeros(REPLICATES, lines, dtype=torch.float64)
    times.scatter_add_(1, draws, torch.ones_like(draws, dtype=torch.float64))
    replicates = (times @ sums)[times @ counts > 0]
    radius = torch.quantile(angle_deg(replicates, mean), 0.95).item()
    return torch.nn.functional.normalize(mean, dim=0).float(), radius


def _vocabulary_hash(tokenizer: object | None) -> str | None:
    """SHA-256 of a tokenizer's vocabulary, 16 digits."""
    if tokenizer is None:
        return None
    pieces = sorted(tokenizer.get_vocab().items())
    return hashlib.sha256(repr(pieces).encode()).hexdigest()[:16]


def compare(first: Signature, second: Signature, chance: float = CHANCE) -> dict:
    """Compare two signatures.

    By the triangle inequality the angle between the true directions differs from the measured one by at most
    the sum of both radii. The verdict is "related" when even the largest such angle is less likely than
    `chance` between unrelated directions, "no sign of kinship" when even the smallest is not, and "undecided"
    in between.

    Args:
        first: a signature.
        second: another one.
        chance: the threshold.

    Returns:
        A row of record 13: names, angle, uncertainty, log10 of the chance, verdict, note.
    """
    a, b = first.facts, second.facts
    row = {
        "first": a.name,
        "second": b.name,
        "angle_deg": None,
        "uncertainty_deg": None,
        "chance_log10": None,
    }
    if a.hidden_size != b.hidden_size:
        note = f"widths {a.hidden_size} and {b.hidden_size}: directions of two spaces make no angle"
        return row | {"verdict": "not comparable", "note": note}
    angle = float(angle_deg(first.direction, second.direction))
    spread = a.radius_deg + b.radius_deg
    nearest, furthest = (
        log10_chance(min(max(angle + sign * spread, 0.0), 90.0), a.hidden_size) for sign in (-1, 1)
    )
    limit = float(np.log10(chance))
    verdict = "related" if furthest < limit else "undecided" if nearest < limit else "no sign of kinship"
    log10 = log10_chance(angle, a.hidden_size)
    notes = [
        text
        for text, differs in (
            ("different tokenizers: the same text is read in other pieces", a.tokenizer != b.tokenizer),
            (f"{a.layers} and {b.layers} layers", a.layers != b.layers),
            ("measured on different texts", a.text_hash != b.text_hash),
            (f"states: {a.kind} of the one, {b.kind} of the other", a.kind != b.kind),
            ("the same weights", a.fingerprint == b.fingerprint),
        )
        if differs
    ]
    return row | {
        "angle_deg": angle, "uncertainty_deg": spread, "chance_log10": log10 if np.isfinite(log10) else None,
        "verdict": verdict, "note": "; ".join(notes),
    }  # fmt: skip


def grouping(names: Sequence[str], pairs: Sequence[dict]) -> tuple[np.ndarray, list[int], list[int]]:
    """Arrange models by their angles.

    Args:
        names: the models.
        pairs: rows of `compare`, one a pair, in the order of `itertools.combinations`.

    Returns:
        The matrix of angles in degrees (n, n), -1 where there is none; the number of the group each belongs
        to, from 1, groups being chains of related pairs; and the order of the models under average linkage.
    """
    n = len(names)
    angles, groups = np.zeros((n, n)), list(range(n))
    for (i, j), row in zip(zip(*np.triu_indices(n, 1), strict=True), pairs, strict=True):
        angles[i, j] = angles[j, i] = -1.0 if row["angle_deg"] is None else row["angle_deg"]
        if row["verdict"] == "related":
            old, new = groups[j], groups[i]
            groups = [new if group == old else group for group in groups]
    numbers = {group: place for place, group in enumerate(dict.fromkeys(groups), start=1)}
    far = np.where(angles < 0, 90.0, angles)
    order = leaves_list(linkage(squareform(far, checks=False), "average")).tolist() if n > 1 else [*range(n)]
    return angles, [numbers[group] for group in groups], order
