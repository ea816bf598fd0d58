"""Overlap of singular vectors with the eigenvectors of an activation covariance, and what chance gives.

O_k = max_j |v_k . f_j| (paper B, eq. 7, with the absolute value that its sign-free meaning needs): v_k a
right singular vector of W, f_j the eigenvectors of the covariance of W's input. By chance v_k is a direction
drawn evenly on the sphere in N dimensions, and O_k is its largest coordinate in absolute value, max_j |z_j| /
|z| with z normal.
"""

import functools
import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import erf, erfc, gammaln
from torch import Tensor

from sdnb.errors import ParameterError

POINTS, WIDTHS = 4001, 40.0
THREE_SIGMA = 0.00135
"""Probability of a normal variable above three standard deviations, on one side."""


def largest_overlaps(right_vectors: Tensor, eigenvectors: Tensor) -> Tensor:
    """O_k = max_j |v_k . f_j| of every singular vector.

    Args:
        right_vectors: v_k as columns, shape (N, s).
        eigenvectors: f_j as columns, an orthonormal basis, shape (N, N).

    Returns:
        O, shape (s,), float64.
    """
    return (eigenvectors.double().T @ right_vectors.double()).abs().amax(0)


def chance_survival(t: float, n: int) -> float:
    """P(max_j |z_j| / |z| > t), exact: an inverse Laplace transform of the cube's Gaussian measure.

    For z normal the length |z| and the direction are independent, so that E exp(-lambda |z|^2) over the cube
    |z_j| < 1 is a Laplace transform in u = 1 / t^2 of the wanted law:
    P(max <= t) = Gamma(N/2) u^(1 - N/2) / (2 pi i) * integral of e^(lambda u) lambda^(-N/2) erf(sqrt
    lambda)^N. The integral runs along the vertical line through the saddle N / (2 u), where the trapezoidal
    rule converges faster than any power; 1 - erf^N in place of erf^N gives the small tail without
    cancellation.

    Args:
        t: an overlap.
        n: dimension N >= 8.

    Returns:
        The probability.

    Raises:
        ParameterError: a dimension below 8, where the integral converges slowly.
    """
    if n < 8:
        raise ParameterError(f"dimension {n}: the law of the largest overlap is computed from dimension 8 on")
    if t >= 1:
        return 0.0
    if t <= 1 / math.sqrt(n):
        return 1.0
    u = 1 / t**2
    saddle = n / (2 * u)
    step = np.linspace(-WIDTHS, WIDTHS, POINTS) * math.sqrt(2 / n)
    point = saddle * (1 + 1j * step)
    root = np.sqrt(point)
    front = gammaln(n / 2) + (1 - n / 2) * math.log(u) + point * u - n / 2 * np.log(point)
    with np.errstate(all="ignore"):
        power = n * np.log1p(-erfc(root)) if t > 2 / math.sqrt(n) else n * np.log(erf(root))
        integrand = np.exp(front) * -np.expm1(power)
    weight = saddle * (step[1] - step[0]) / (2 * math.pi)
    return float(np.clip(np.real(integrand.sum()) * weight, 0.0, 1.0))


@functools.cache
def chance_quantile(probability: float, n: int) -> float:
    """Overlap that chance stays below with the given probability.

    Args:
        probability: between 1e-6 and 1 - 1e-9.
        n: dimension N.

    Returns:
        t with P(max_j |z_j| / |z| <= t) = probability.
    """
    low = 1 / math.sqrt(n)
    return brentq(lambda t: chance_survival(t, n) - (1 - probability), low, 1.0, xtol=1e-12)


def chance_band(n: int) -> tuple[float, float, float]:
    """Three-sigma band of an overlap by chance: its 0.135 %, 50 % and 99.865 % quantiles.

    Args:
        n: dimension N.

    Returns:
        Lower end, median and upper end. One vector in 370 leaves the band by chance.
    """
    low, middle, high = (chance_quantile(p, n) for p in (THREE_SIGMA, 0.5, 1 - THREE_SIGMA))
    return low, middle, high


def rank_correlation(a: Tensor, b: Tensor) -> float:
    """Spearman's rank correlation of two series; ties get their mean rank.

    Args:
        a: shape (s,).
        b: shape (s,).

    Returns:
        Between -1 and 1; nan where a series is constant.
    """
    from scipy.stats import spearmanr  # takes longer to load than all else here

    return float(spearmanr(a.double().numpy(), b.double().numpy()).statistic)


def rank_correlation_p_value(a: Tensor, b: Tensor) -> float:
    """How often a circular shift of one series gives as large a rank correlation.

    Both vary smoothly along the spectrum, so that the law for independent pairs would say too little.

    Args:
        a: shape (s,).
        b: shape (s,).

    Returns:
        Share of the s shifts (the shift by zero included) with a correlation at least as large.
    """
    from scipy.stats import rankdata

    ranks_a, ranks_b = (torch.from_numpy(rankdata(x.double().numpy())) for x in (a, b))
    ranks_a, ranks_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    products = torch.fft.irfft(torch.fft.rfft(ranks_a).conj() * torch.fft.rfft(ranks_b), n=len(a))
    return float((products >= products[0] - 1e-9 * products.abs().max()).double().mean())
