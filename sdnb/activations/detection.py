"""Which tokens are high-norm, and which layers make and unmake them: one rule, no threshold per model.

The rule, for norms N[l, t] of hidden states (layers l = 1..L, tokens t):

1. A token is high-norm when at some layer its norm is at least `MIN_RATIO` times that layer's median over
   all tokens that are given, of whatever line. Where more than half of them are high-norm (two of three,
   say), so is the median, and none is found: give more ordinary tokens, or a threshold.
2. The peak of a token is its largest norm, and `threshold` half the lower decile of the peaks of the
   high-norm tokens. A *state* is high-norm above the threshold and above `MIN_RATIO` times the same median
   of its layer: in some models ordinary tokens grow late, past the threshold and past the peaks themselves,
   and no state of theirs may count. A threshold that is given stands alone, as in paper A: norm > threshold.
3. The step of a high-norm token at layer l is N[l] - N[l-1], less what the ordinary tokens' median does there
   in the same direction, over the token's own peak: what all tokens do is no explosion. Layer l is an
   explosion (decay) layer when the step is at least `MIN_STEP` (at most -`MIN_STEP`) for at least a quarter
   of the high-norm tokens of one kind, initial or noninitial: a layer that moves the one kind only is found
   where the other is more frequent. Lists are sorted by the mean step of both, the largest first.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.errors import ParameterError, TextError

MIN_RATIO = 5.0
MIN_STEP = 0.15
MIN_SHARE = 0.25


@dataclass(frozen=True)
class Detection:
    """What the rule found.

    Args:
        peak_ratio: the largest ratio of a token's norm to its layer's median over tokens, layers 1..L.
        threshold: norm above which a hidden state is high-norm; None when no token is.
        limits: the same for every layer 0..L, with the median of rule 2, (L+1,) in float64; infinite
            without a threshold.
        explosion_layers: layers (1..L) where the norm jumps, the largest step first.
        decay_layers: layers (1..L) where it collapses, the largest step first.
        high_norm: which tokens are high-norm, (T,) bool.
    """

    peak_ratio: float
    threshold: float | None
    limits: Tensor
    explosion_layers: list[int]
    decay_layers: list[int]
    high_norm: Tensor


def detect(norms: Tensor, *, initial: Tensor | None = None, threshold: float | None = None) -> Detection:
    """Find the high-norm tokens, the threshold and the explosion and decay layers by the rule of this module.

    Args:
        norms: |h_l| for l = 0..L and every token, (L+1, T); tokens of several lines may be concatenated.
        initial: which tokens stand at position 0 of their line, (T,) bool; without it all are of one kind.
        threshold: a norm that replaces the automatic one: tokens that pass it at some layer 1..L are high-
            norm.

    Returns:
        The detection; without a high-norm token its lists are empty and its threshold None (or the one
        given).

    Raises:
        TextError: fewer than three tokens: a median over them means nothing.
        ParameterError: norms that are not finite, or a threshold that is not positive.
    """
    if norms.shape[1] < 3:
        raise TextError(
            f"{norms.shape[1]} tokens are too few to tell high norms from ordinary ones; give at least 3"
        )
    if not torch.isfinite(norms).all():
        raise ParameterError("hidden states are not finite; load the model with dtype float32 or bfloat16")
    if threshold is not None and threshold <= 0:
        raise ParameterError(f"threshold is {threshold}; give a positive norm, or null for the automatic one")
    medians = norms.median(dim=1).values
    ratio = norms[1:] / medians[1:, None].clamp(min=torch.finfo(norms.dtype).tiny)
    peaks = norms[1:].amax(dim=0)
    high = ratio.amax(dim=0) >= MIN_RATIO if threshold is None else peaks > threshold
    peak_ratio = ratio.max().item()
    limits = torch.full_like(medians, torch.inf if threshold is None else threshold, dtype=torch.float64)
    if not high.any():
        return Detection(peak_ratio, threshold, limits, [], [], high)
    if threshold is None:
        threshold = torch.quantile(peaks[high].double(), 0.1).item() / 2
        limits = (MIN_RATIO * medians.double()).clamp(min=threshold)
    first = torch.zeros_like(high) if initial is None else initial
    explosion, decay = _moving_layers(layer_steps(norms, high), first[high])
    return Detection(peak_ratio, threshold, limits, explosion, decay, high)


def _moving_layers(steps: Tensor, initial: Tensor) -> tuple[list[int], list[int]]:
    """Rule 3: steps (L, n), initial (n,) bool -> explosion and decay layers 1..L, the largest first."""
    kinds = [kind for kind in (initial, ~initial) if kind.any()]

    def enough(moved: Tensor) -> bool:
        return any(moved[kind].double().mean() >= MIN_SHARE for kind in kinds)

    order = steps.mean(dim=1).argsort(descending=True).tolist()
    explosion = [layer + 1 for layer in order if enough(steps[layer] >= MIN_STEP)]
    decay = [layer + 1 for layer in reversed(order) if enough(steps[layer] <= -MIN_STEP)]
    return explosion, decay


def layer_steps(norms: Tensor, high: Tensor) -> Tensor:
    """Rule 3: how far each layer moves the norm of high-norm tokens, in units of their peak.

    With D[l] = N[l] - N[l-1] and M[l] the median of D[l] over ordinary tokens (0 without any), the step is
    (D[l] - C[l]) / max_l N, where C[l] is M[l] cut to lie between 0 and D[l].

    Args:
        norms: norms of all tokens, (L+1, T).
        high: which of them are high-norm, (T,) bool.

    Returns:
        The step of every high-norm token at every layer, (L, n), layer 1 first.
    """
    moves = norms.diff(dim=0)
    own = moves[:, high]
    if not high.all():
        common = moves[:, ~high].median(dim=1, keepdim=True).values
        own = own - torch.minimum(torch.maximum(common, own.clamp(max=0)), own.clamp(min=0))
    return own / norms[1:, high].amax(dim=0)
