"""How likely a small angle between unrelated directions is."""

import math

import numpy as np
from scipy import special

from sdnb.errors import ParameterError


def log10_chance(angle_deg: float, d: int) -> float:
    """Return log10 of the probability that two random directions make at most this acute angle.

    sin^2 of the angle follows Beta((d - 1)/2, 1/2), so that P = I_x(a, 1/2) with x = sin^2 angle, a = (d -
    1)/2; where that is too small for a float, from its series x^a sqrt(1 - x) / (a B(a, 1/2)) sum_k prod_j (a
    + 1/2 + j)/(a + 1 + j) x^k.

    Args:
        angle_deg: acute angle, 0 to 90 degrees.
        d: dimension, at least 2.

    Returns:
        log10 P, at most 0; -infinity at an angle of 0.

    Raises:
        ParameterError: an angle outside 0 to 90 degrees, or a dimension below 2.
    """
    if not 0 <= angle_deg <= 90 or d < 2:
        raise ParameterError(
            f"a chance needs an angle of 0 to 90 degrees and d >= 2, not {angle_deg} and {d}"
        )
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
