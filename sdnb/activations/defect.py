"""The defect of a model on a text: direction, layers, thresholds, massive dimensions."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sdnb.activations.capture import hidden_norms, token_batches
from sdnb.activations.detection import MIN_RATIO, detect
from sdnb.activations.direction import HighNormStates, collect_high_norm_states
from sdnb.bar import progress

MASSIVE = 5.0


@dataclass(frozen=True, eq=False)
class Defect:
    """What a text shows of a model's high-norm states; see `find_defect`.

    Args:
        direction: mean of the high-norm states, (d,); zeros without any.
        count: number of high-norm states.
        explosion_layers: 1..L, the largest step first.
        decay_layers: 1..L, the largest step first.
        climbs: pairs (a, b) of layers between which the norm climbs slowly.
        threshold: norm above which a state counts; None when no state is high-norm.
        limits: the same for every layer 0..L, (L+1,).
        peak_ratio: largest norm over its layer's median.
        mean_low_norm: mean norm of the other states.
        massive: rows with layer, dimension (0-based), value, share (of the squared norm).
        by_layer: explosion layer -> mean of the high-norm states of its wave, (d,).
        undecided: why it cannot be told whether states are high-norm; None where it can.
        norms: |h_l| of every token, (L+1, N).
        token_ids: (N,).
        positions: position in the line, (N,).
        lines: number of the line, (N,).
        states: the high-norm states, None where they were not asked for.
    """

    direction: Tensor
    count: int
    explosion_layers: list[int]
    decay_layers: list[int]
    climbs: list[tuple[int, int]]
    threshold: float | None
    limits: Tensor
    peak_ratio: float
    mean_low_norm: float
    massive: list[dict]
    by_layer: dict[int, Tensor]
    undecided: str | None
    norms: Tensor
    token_ids: Tensor
    positions: Tensor
    lines: Tensor
    states: HighNormStates | None

    @property
    def found(self) -> bool:
        """Whether there is a high-norm state."""
        return self.count > 0

    @property
    def high(self) -> Tensor:
        """Which states are high-norm, (L+1, N) bool."""
        return self.norms > self.limits[:, None]

    def at(self, layer: int | None = None) -> "Exploded":
        """The norm that tells exploded tokens from others after one layer (06 to 09).

        Args:
            layer: 1..L; the first explosion layer when None, or the layer with the largest step.

        Returns:
            The layer, its threshold, and the median norms there.
        """
        found = detect(self.norms, initial=self.positions == 0)
        from sdnb.activations.detection import layer_steps

        high = found.high_norm
        steps = layer_steps(self.norms, high if high.any() else torch.ones_like(high)).mean(dim=1)
        number = layer or (self.explosion_layers or [int(steps.argmax()) + 1])[0]
        here = self.norms[number]
        ordinary = here[~high]
        peak = torch.quantile(here[high].double(), 0.1).item() if high.any() else 0.0
        largest = ordinary.max().item() if len(ordinary) else 0.0
        if largest >= peak:
            threshold = MIN_RATIO * here.median().item()
        else:
            threshold = peak / 2 if largest <= peak / 2 else (peak * largest) ** 0.5
        return Exploded(
            number,
            layer is not None or bool(self.explosion_layers),
            threshold,
            here[high].median().item() if high.any() else None,
            (ordinary if len(ordinary) else here).median().item(),
        )


@dataclass(frozen=True)
class Exploded:
    """What counts as exploded after one layer.

    Args:
        layer: the layer, 1..L.
        found: whether it is an explosion layer by the rule, or was asked for.
        threshold: norm after that layer from which a token counts as exploded.
        high_norm: median norm there of the high-norm tokens, None without any.
        ordinary_norm: median norm there of the others.
    """

    layer: int
    found: bool
    threshold: float
    high_norm: float | None
    ordinary_norm: float


def find_defect(
    loaded: object,
    text: object,
    *,
    threshold: float | None = None,
    results_dir: str | Path | None = None,
    states: bool = True,
) -> Defect:
    """Find the high-norm states of a text, their mean, and the layers that make and unmake them.

    Args:
        loaded: a loaded model (`sdnb.load`).
        text: encoded lines (`sdnb.encode`), or a list of token ids, each (T_i,).
        threshold: a norm that replaces the automatic one.
        results_dir: where the result is kept for other notebooks; None keeps nothing.
        states: keep the high-norm states themselves in `Defect.states`.

    Returns:
        The defect; `found` is False where there is no high-norm state.
    """
    lines = list(getattr(text, "lines", text))
    parts, numbers = [], []
    batches = list(token_batches(lines))
    for ids, real, group in progress(batches, desc="norms"):
        norms = hidden_norms(loaded.model, ids)
        for row, number in enumerate(group):
            parts.append(norms[:, row, real[row]])
            numbers.append(number)
    order = sorted(range(len(numbers)), key=numbers.__getitem__)
    norms = torch.cat([parts[i] for i in order], dim=1)
    positions = torch.cat([torch.arange(len(line)) for line in lines])
    where = torch.cat([torch.full((len(line),), n) for n, line in enumerate(lines)])
    seen = detect(norms, initial=positions == 0, threshold=threshold)
    found = collect_high_norm_states(loaded.model, lines, seen.limits)
    direction = found.direction if len(found.states) else torch.zeros(found.states.shape[1])
    by_layer = {n: found.states[found.layer == n].mean(0) for n in seen.explosion_layers}
    massive = []
    for layer in found.layer.unique().tolist():
        mean = found.states[found.layer == layer].double().mean(0)
        share = mean.square() / mean.square().sum()
        for j in (share >= MASSIVE**2 / len(share)).nonzero().flatten().tolist():
            massive.append(
                {"layer": layer, "dimension": j, "value": mean[j].item(), "share": share[j].item()}
            )
    return Defect(
        direction, len(found.states), seen.explosion_layers, seen.decay_layers, [], seen.threshold,
        seen.limits, seen.peak_ratio, found.mean_low_norm, massive, by_layer, None, norms,
        torch.cat(lines), positions, where, found if states else None,
    )  # fmt: skip
