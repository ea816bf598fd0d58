"""Which states are high-norm, and which layers make and unmake them: one rule, no number per model.

N[l, t] is the norm of token t after layer l (l = 0: what enters layer 1), m[l] the median of N[l] over the
tokens, or over ordinary tokens of another text where those are shorter: where most of the tokens given are
high-norm, so is their own median.

1. A state, not a token, is high, and relative to its layer. A *wave* of a token begins with a state that is
   longer than five medians of its layer (or than the threshold, where one is given) and ends when the state
   is ordinary again, shorter than one and a half. One token can have several waves, one after the other; a
   norm that triples once more, after a layer that added less than a fifth to it, begins a new one.
2. `threshold` is half the lower decile of the waves' peaks, taken for initial and for noninitial tokens, the
   smaller of the two, and limits[l] the larger of it and five medians. A state is *high-norm* above
   limits[l]: what a token passes on its way to a peak far above is not. A threshold that is given stands
   alone, as in paper A. A token is high-norm when one of its states is.
3. The *step* of a token at layer l is N[l] - N[l-1], less what m does there in the same direction (what all
   tokens do is no explosion), over the peak of the wave that the layer begins, moves or ends. A step up leads
   to a state that is high, a step down from one that was and is not ordinary yet; all else is no step.
4. Neighbouring steps up of 2 % or more are looked at together. Four or more of which none is more than twice
   as large as the others are on average, 30 % together, are a *climb* from the first to the last of these
   layers: no cut tells one of them from its neighbours. The others are *sudden* where they make a tenth of
   the wave's peak and a fifth of the norm after them. Steps down are read alike, with the norm before them.
5. A layer is an explosion (decay) layer when a quarter of the high-norm tokens of one kind, initial or
   noninitial, make a sudden step up (down) there; so is a layer part of a climb (a descent). Lists are sorted
   by the length of the mean step, the largest first.
"""

from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from sdnb.errors import ParameterError, TextError

MIN_RATIO = 5.0  # medians of a layer: from here on a state is high-norm
END_RATIO = 1.5  # medians: below, a wave has ended
REGROWTH = 3.0  # a wave whose norm grows by this factor at one layer begins anew
MIN_STEP = 0.1  # of the wave's peak: a sudden step
MIN_CHANGE = 0.2  # of the norm after a step up, of the norm before a step down: a sudden step
SMALL_STEP = 0.02  # smaller steps are none
CLIMB_LAYERS, MIN_CLIMB = 4, 0.3  # a climb's layers, and what they make in all, of the wave's peak
STANDS_OUT = 2.0  # times the mean of the neighbouring steps
MIN_SHARE = 0.25  # of the high-norm tokens of one kind
ALIKE = 1.25  # norms within this factor of one another have nothing ordinary among them to compare with


@dataclass(frozen=True, eq=False)
class Detection:
    """What the rule of this module finds."""

    peak_ratio: float  #: the largest N[l, t] / m[l], layers 1..L
    threshold: float | None  #: norm that all high-norm states exceed; None without one, unless it was given
    limits: Tensor  #: norm above which a state is high-norm, layers 0..L, (L+1,); infinite without one
    explosion_layers: list[int]  #: layers (1..L) where the norm jumps, the largest step first
    decay_layers: list[int]  #: layers (1..L) where it collapses, the largest step first
    climbs: list[tuple[int, int]]  #: pairs (a, b): from layer a to b the norm climbs without a jump
    descents: list[tuple[int, int]]  #: the same for a norm that falls
    high: Tensor  #: which states are high-norm, (L+1, T) bool
    steps: Tensor  #: every token's step at every layer in units of its wave's peak, 0 outside waves, (L, T)
    undecided: str | None  #: why it cannot be told whether states are high-norm; None where it can

    @property
    def high_norm(self) -> Tensor:
        """Which tokens have a high-norm state after some layer 1..L, (T,) bool."""
        return self.high[1:].any(dim=0)


def detect(
    norms: Tensor,
    *,
    initial: Tensor | None = None,
    threshold: float | None = None,
    reference: Tensor | None = None,
) -> Detection:
    """Return high-norm states, the threshold and the layers that make and unmake them, by this module's rule.

    Without a high-norm state the lists are empty and the threshold is None, or the one given. `norms` are
    |h_l|, (L+1, T), of lines one after the other; `initial` says which tokens stand at position 0, (T,) bool
    (without it all are of one kind), and `reference` are medians of ordinary tokens of another text, (L+1,).

    Raises:
        TextError: fewer than three tokens and no reference: a median over them means nothing.
        ParameterError: norms that are not finite, or a threshold that is not positive.
    """
    if norms.shape[1] < (3 if reference is None else 1):
        raise TextError(f"{norms.shape[1]} tokens are too few to tell high norms from ordinary ones; give 3")
    if not torch.isfinite(norms).all():
        raise ParameterError("hidden states are not finite; load the model with dtype float32 or bfloat16")
    if threshold is not None and threshold <= 0:
        raise ParameterError(f"threshold is {threshold}; give a positive norm, or null for the automatic one")
    norms, automatic = norms.double(), threshold is None
    medians = norms.median(dim=1).values
    if reference is not None:
        medians = torch.minimum(medians, reference.double())
    first = torch.zeros(norms.shape[1], dtype=torch.bool) if initial is None else initial
    limits = MIN_RATIO * medians if automatic else torch.full_like(medians, threshold)
    above = norms > limits[:, None]
    inside, begins, peaks = _waves(norms, above, torch.minimum(END_RATIO * medians, limits))
    if automatic:  # rule 2
        kinds = (peaks[1:][begins[1:] & kind] for kind in (first, ~first))
        deciles = [found.quantile(0.1, interpolation="lower").item() for found in kinds if len(found)]
        threshold = min(deciles) / 2 if deciles else None
        limits = limits.clamp(min=threshold or torch.inf)
    steps = _steps(norms, medians, above, inside, peaks)
    high = norms > limits[:, None]
    which = high[1:].any(dim=0)
    before, after, own = norms[:-1, which], norms[1:, which], steps[:, which]
    explosion, climbs = _moving_layers(own, after - before, after, first[which])
    decay, descents = _moving_layers(-own, before - after, before, first[which])
    undecided, alike = None, (norms.amax(dim=1) < ALIKE * norms.amin(dim=1)).all()
    if automatic and reference is None and alike and not which.any():
        undecided = (
            "It cannot be told whether states are high-norm: after every layer all of them have nearly the "
            "same norm, and no ordinary token is there to compare with. Give a text of more different tokens."
        )
    ratio = (norms[1:] / medians[1:, None].clamp(min=torch.finfo(norms.dtype).tiny)).max().item()
    return Detection(ratio, threshold, limits, explosion, decay, climbs, descents, high, steps, undecided)


def _waves(norms: Tensor, above: Tensor, ends: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rule 1: which states are inside a wave, which begin one, and its peak, all (L+1, T)."""
    inside, begins, peaks = torch.zeros_like(above), torch.zeros_like(above), torch.zeros_like(norms)
    nothing = torch.zeros_like(above[0])
    before, last, steady, within, peak = nothing, norms[0], nothing, nothing, torch.zeros_like(norms[0])
    for layer, (state, now) in enumerate(zip(norms, above, strict=True)):
        starts = now & (~before | (steady & (state >= REGROWTH * last)))
        within = now | (within & (state > ends[layer]))
        peak = torch.where(within, torch.where(starts, state, torch.maximum(peak, state)), 0.0)
        inside[layer], begins[layer], peaks[layer] = within, starts, peak
        steady = before & now & (state < (1 + MIN_CHANGE) * last)
        before, last = now, state
    for layer in range(len(norms) - 2, -1, -1):  # the peak so far becomes the peak of the whole wave
        same = inside[layer + 1] & ~begins[layer + 1]
        peaks[layer] = torch.where(same, peaks[layer + 1], peaks[layer])
    return inside, begins, peaks


def _steps(norms: Tensor, medians: Tensor, above: Tensor, inside: Tensor, peaks: Tensor) -> Tensor:
    """Rule 3: every token's step at every layer, (L, T)."""
    own, common = norms.diff(dim=0), medians.diff(dim=0)[:, None]
    own = own - torch.minimum(torch.maximum(common, own.clamp(max=0)), own.clamp(min=0))
    unit = torch.where(inside[1:], peaks[1:], peaks[:-1]).clamp(min=1e-300)
    up, down = (own > 0) & above[1:], (own < 0) & inside[:-1]
    return torch.where(up | down, own / unit, 0.0)


def _moving_layers(
    steps: Tensor, lengths: Tensor, whole: Tensor, initial: Tensor
) -> tuple[list[int], list[tuple[int, int]]]:
    """Rules 4 and 5 for steps up: the layers of sudden steps, the largest first, and the climbs."""
    sudden, slow = torch.zeros(2, *steps.shape, dtype=torch.bool)
    for token, column in enumerate(steps.T.tolist()):
        for rises, run in groupby(enumerate(column), key=lambda pair: pair[1] >= SMALL_STEP):
            if rises:
                jumps, climb = _read_run(list(run))
                sudden[jumps, token], slow[climb, token] = True, True
    sudden &= (steps >= MIN_STEP) & (lengths >= MIN_CHANGE * whole)
    kinds = [kind for kind in (initial, ~initial) if kind.any()]

    def enough(moved: Tensor) -> bool:
        return any(moved[kind].double().mean() >= MIN_SHARE for kind in kinds)

    layers = [layer for layer in range(len(steps)) if enough(sudden[layer])]
    layers.sort(key=lambda layer: -lengths[layer, sudden[layer]].mean())
    return [layer + 1 for layer in layers], _runs([enough(row) for row in slow])


def _read_run(run: list[tuple[int, float]]) -> tuple[list[int], list[int]]:
    """Rule 4: the layers of single steps and those of climbs in a run of neighbouring steps (layer, step)."""
    if len(run) < CLIMB_LAYERS:
        return [layer for layer, _ in run], []
    place = max(range(len(run)), key=lambda i: run[i][1])
    layer, largest = run[place]
    total = sum(step for _, step in run)
    if largest * (len(run) - 1) > STANDS_OUT * (total - largest):
        (left, first), (right, last) = _read_run(run[:place]), _read_run(run[place + 1 :])
        return [*left, layer, *right], first + last
    return [], [layer for layer, _ in run] * (total >= MIN_CLIMB)


def _runs(chosen: list[bool]) -> list[tuple[int, int]]:
    """First and last layer, 1..L, of every run of chosen layers."""
    runs = [list(group) for _, group in groupby(enumerate(chosen, start=1), key=lambda pair: pair[1])]
    return [(run[0][0], run[-1][0]) for run in runs if run[0][1]]
