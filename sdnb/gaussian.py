"""Gaussian integrals of an activation: what the least-squares fit of an FFN's units is made of."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sdnb.errors import ParameterError

_RIM = 8.5  # standard deviations; beyond lie 2e-17 of the weight
_AGREES = 1e-7  # relative distance of two rules at which the mean of both is taken
_NOISE = 1e-13  # share of the sum of all moments that rounding leaves of one that vanishes
_NODES, _MOST = 16, 64  # nodes of either sign: of the coarsest grid; and the most, for each unit of s
_CHUNK = 256, 4096  # FFN units at a time on a CPU (its cache holds them) and on a GPU
# Where the activations of `transformers` and their like break: 0 (ReLU and kin), 1 and 3 (hard units), 6
# (ReLU6), 10 (clipped GELU), 20 (softplus turns into its argument).
_BREAKS = (0.0, 0.5, 1.0, 2.0, 3.0, 6.0, 10.0, 20.0, -0.5, -1.0, -2.0, -3.0, -6.0, -10.0, -20.0)
_STEP = 2.0**-8  # between the seven points around a possible break
_BROKEN = 1e-3  # jump of a derivative above which it is a break

Activation = Callable[[Tensor], Tensor]


def gaussian_moments(activation: Activation, s: Tensor, b: Tensor | None = None) -> tuple[Tensor, ...]:
    """Return the Gaussian moments of an activation that the least-squares fit of an FFN needs.

    m0 = E[phi(s z + b)], m1 = E[z phi(s z + b)], m2 = E[(z^2 - 1) phi(s z + b)], z ~ N(0, 1).

    phi is a sum of kinks c (g - k)_+ + c' (g - k)_+^2 / 2 at the places where activations have them, whose
    moments are closed forms, and of a smooth rest, for which the trapezoidal rule converges exponentially:
    the grid in z is halved until it agrees to 1e-7 with the one halfway between its nodes. A kink elsewhere
    than at 0, +-0.5, +-1, +-2, +-3, +-6, +-10 or +-20 costs time, and accuracy where s is large.

    Args:
        activation: elementwise function phi that takes float64.
        s: standard deviations of the pre-activations, shape (f,), not negative.
        b: their means, shape (f,); zero when None.

    Returns:
        m0, m1, m2, each float64 of shape (f,), on the device of s.

    Raises:
        ParameterError: if a value is negative or not finite.
    """
    s = s.detach().double()
    b = torch.zeros_like(s) if b is None else b.detach().to(s)
    if not (torch.isfinite(s).all() and torch.isfinite(b).all() and (s >= 0).all()):
        raise ParameterError("s must be finite and not negative, b finite: the weights hold NaN or infinity")
    kinks = _kinks(activation, s)
    moments = s.new_zeros(3, len(s))
    for units in s.argsort().split(_CHUNK[s.device.type != "cpu"]):  # neighbours in scale need the same grid
        moments[:, units] = _moments(activation, kinks, s[units], b[units])
    return tuple(moments)


def _moments(activation: Activation, kinks: list, s: Tensor, b: Tensor) -> Tensor:
    """Return m0, m1, m2 of a few units as rows, shape (3, n)."""

    def smooth(g: Tensor) -> Tensor:
        y = activation(g)
        for k, slope, curvature in kinks:
            above = (g - k).clamp_(min=0)
            y = y - above * (slope + curvature / 2 * above)
        return y

    def summed(offset: float) -> Tensor:
        z = torch.arange(offset - nodes, nodes, dtype=s.dtype, device=s.device) * (_RIM / nodes)
        weight = torch.exp(-z * z / 2) * (_RIM / nodes / math.sqrt(2 * math.pi))
        # of phi - phi(b), so that m1 and m2 of a constant are exactly 0
        rise = smooth(torch.addcmul(b[:, None], s[:, None], z)).sub_(at_mean[:, None])
        return (rise @ torch.stack([weight, weight * z, weight * (z * z - 1)], dim=1)).T

    at_mean = smooth(b)
    kinked = sum((_kink_moments(kink, s, b) for kink in kinks), start=s.new_zeros(3, len(s)))
    nodes, agree = _NODES, False  # of each sign
    moments = summed(0.0)
    while not agree and nodes < _MOST * max(s.max().item(), 2 * _NODES):
        between = summed(0.5)
        apart, moments, nodes = (between - moments).abs(), (between + moments) / 2, 2 * nodes
        sizes = (moments + kinked).abs()
        agree = (apart <= _AGREES * sizes + _NOISE * sizes.sum(0)).all()
    moments[0] += at_mean
    return moments + kinked


def _kinks(activation: Activation, like: Tensor) -> list[tuple[float, float, float]]:
    """Return where phi has kinks, and the jumps of its first and second derivative there."""
    steps = torch.arange(-3, 4, dtype=like.dtype, device=like.device) * _STEP
    values = activation(like.new_tensor(_BREAKS)[:, None] + steps)
    # derivatives on the right minus those on the left, each exact for cubic polynomials
    slope = like.new_tensor([2, -9, 18, -22, 18, -9, 2]) / (6 * _STEP)
    curvature = like.new_tensor([1, -4, 5, 0, -5, 4, -1]) / _STEP**2
    jumps = (values @ torch.stack([slope, curvature], dim=1)).tolist()
    return [(k, *jump) for k, jump in zip(_BREAKS, jumps, strict=True) if max(map(abs, jump)) > _BROKEN]


def _kink_moments(kink: tuple[float, float, float], s: Tensor, b: Tensor) -> Tensor:
    """Return the moments of slope (g - k)_+ + curvature (g - k)_+^2 / 2, shape (3, n)."""
    k, slope, curvature = kink
    a = torch.where(s > 0, (k - b) / s, torch.where(b > k, -math.inf, math.inf))
    beyond = torch.special.erfc(a / math.sqrt(2)) / 2  # P(z > a)
    density = torch.exp(-a * a / 2) / math.sqrt(2 * math.pi)
    above = (b - k) * beyond + s * density  # E[(g - k)_+]; by Stein's lemma the others are its derivatives
    square = (b - k) * above + s * s * beyond
    return torch.stack([
        slope * above + curvature / 2 * square,
        s * (slope * beyond + curvature * above),
        s * (slope * density + curvature * s * beyond),
    ])  # fmt: skip
