"""SmoothQuant moves part of the inputs' spread into the weights (Xiao et al., arXiv 2211.10438, eq. 4)."""

import torch
from torch import Tensor

from sdnb.quantize.linears import LinearModule
from sdnb.quantize.statistics import InputStatistics

SMALLEST = 1e-5
"""Bound from below of the largest inputs and weights of a channel, so that a dead channel divides nothing."""


def smoothing_factors(
    linears: dict[str, LinearModule],
    statistics: dict[str, InputStatistics],
    norms: dict[str, str],
    alpha: float,
) -> dict[str, Tensor]:
    """Return s_j = max|X_j|^alpha / max|W_j|^(1 - alpha) for the modules that a norm feeds.

    X diag(s)^-1 has the outlier channels taken down, diag(s) W^T takes them up, and their product is the
    same. All modules fed by one norm share s, so that 1/s can be folded into the norm's gain; a module that
    no norm feeds (the output of attention, the down-projection of an FFN) has nothing to fold it into and is
    not smoothed.

    Args:
        linears: from `linear_modules`.
        statistics: of the calibration text; modules it never reached are left out.
        norms: module -> norm that feeds it, from `norm_feeding`.
        alpha: migration strength: 0 leaves the inputs as they are but for the weights' own spread, 1 makes
            all input channels equally large.

    Returns:
        Full module name -> s, (k,), float32 on the CPU.
    """
    groups: dict[str, list[str]] = {}
    for name, norm in norms.items():
        if name in statistics:
            groups.setdefault(norm, []).append(name)
    factors: dict[str, Tensor] = {}
    for names in groups.values():
        inputs = torch.stack([statistics[name].channel_largest for name in names]).amax(dim=0)
        weights = torch.stack([linears[name].weight.abs().amax(dim=0).float().cpu() for name in names]).amax(
            dim=0
        )
        s = inputs.clamp(min=SMALLEST) ** alpha / weights.clamp(min=SMALLEST) ** (1 - alpha)
        factors |= dict.fromkeys(names, s.clamp(min=SMALLEST))
    return factors
