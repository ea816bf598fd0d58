"""Angles between directions, what they are between random ones, and how likely a small one is."""

import itertools
import math

import numpy as np
import torch
from scipy import integrate, special
from torch import Tensor

from sdnb.errors import ParameterError


def angle_deg(a: Tensor, b: Tensor) -> Tensor:
    """Return the acute angle between directions (..., d), 0 to 90 degrees, float64, (...); NaN if one is 0.

    angle = 2 atan2(|a - b|, |a + b|) for unit vectors with a.b >= 0: arccos |a.b|, as paper A (arXiv
    2502.07004) takes it, without its loss of digits at small angles; a and b are broadcast.
    """
    a, b = (t / t.norm(dim=-1, keepdim=True) for t in (a.double(), b.to(a.device).double()))
    apart, together = (a - b).norm(dim=-1), (a + b).norm(dim=-1)
    return torch.rad2deg(2 * torch.atan2(torch.minimum(apart, together), torch.maximum(apart, together)))


def random_angle(d: int) -> float:
    """Return the expected acute angle between two random directions in d dimensions, in degrees.

    cos^2(angle) ~ Beta(1/2, (d - 1)/2): 45 for d = 2, 57.3 (one radian) for d = 3, towards 90.
    """
    return expected_nearest_angle(d, 1)


def random_angle_quantile(d: int, q: float) -> float:
    """Return the acute angle, in degrees, below which a share q of all pairs of random directions lies.

    sin^2(angle) ~ Beta((d - 1)/2, 1/2), inverted.

    Raises:
        ParameterError: if d is less than 1 or q lies outside 0 to 1.
    """
    if d < 1 or not 0 <= q <= 1:
        raise ParameterError(f"a quantile needs d >= 1 and 0 <= q <= 1, not d={d}, q={q}")
    if d == 1:
        return 0.0
    # near 90 degrees sin^2 has no digits left, so the angle comes from the smaller of sin^2 and cos^2
    sine2 = special.betaincinv((d - 1) / 2, 0.5, q)
    cosine2 = special.betainccinv(0.5, (d - 1) / 2, q)
    return math.degrees(math.atan2(math.sqrt(sine2), math.sqrt(cosine2)))


def expected_nearest_angle(d: int, n: int) -> float:
    """Return the expected acute angle to the nearest of n random directions in d dimensions, in degrees.

    E = integral over t from 0 to 90 degrees of P(angle > t)^n.

    Raises:
        ParameterError: if d or n is less than 1.
    """
    if d < 1 or n < 1:
        raise ParameterError(f"the nearest of n directions in d dimensions needs d, n >= 1, not d={d}, n={n}")
    if d == 1:
        return 0.0

    def all_beyond(t: float) -> float:
        nearer = special.betainc((d - 1) / 2, 0.5, math.sin(t) ** 2)
        return math.exp(n * math.log1p(-nearer)) if nearer < 1 else 0.0

    # the integrand falls from 1 to 0 within a narrow range: cut there, in quantiles of the smallest angle
    shares = (-math.expm1(math.log1p(-q) / n) for q in (1e-12, 0.01, 0.5, 0.99, 1 - 1e-12))
    edges = [0.0, *(math.radians(random_angle_quantile(d, share)) for share in shares), math.pi / 2]
    ranges = [(low, high) for low, high in itertools.pairwise(edges) if low < high]
    return math.degrees(math.fsum(integrate.quad(all_beyond, *each)[0] for each in ranges))


def log10_chance(angle_deg: float, d: int) -> float:
    """Return log10 of the probability that random directions in d dimensions are at most these degrees apart.

    P = I_x(a, 1/2) with x = sin^2(angle), a = (d - 1)/2, 0 at 0; where that is too small for a float, from
    its series x^a sqrt(1 - x) / (a B(a, 1/2)) sum_k prod_{j<k} x (a + 1/2 + j) / (a + 1 + j).

    Raises:
        ParameterError: an angle outside 0 to 90 degrees, or a dimension below 2.
    """
    if not 0 <= angle_deg <= 90 or d < 2:
        raise ParameterError(f"an angle is 0 to 90 degrees and d at least 2, not {angle_deg} and {d}")
    a, x = (d - 1) / 2, math.sin(math.radians(angle_deg)) ** 2
    if x == 0:
        return -math.inf
    chance = special.betainc(a, 0.5, x)
    if chance > 1e-290:
        return math.log10(chance)
    k = np.arange(10_000)
    terms = np.cumprod(np.concatenate([[1.0], (a + 0.5 + k) / (a + 1 + k) * x]))
    log = (
        a * math.log(x) + 0.5 * math.log1p(-x) - math.log(a) - special.betaln(a, 0.5) + math.log(terms.sum())
    )
    return float(log / math.log(10))
