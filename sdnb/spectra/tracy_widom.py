"""The Tracy-Widom law of real matrices, and where the extreme singular values of noise end.

F1(x) = det(1 - K_x) with K_x(y, z) = Ai(x + y + z) on (0, inf), a Fredholm determinant that Gauss-Legendre
quadrature gives to machine precision (Ferrari and Spohn 2005; Bornemann 2010). Centring and scale of
second-order accuracy for matrices of real Gaussian entries are those of Ma (2012, Bernoulli 18, 322).
"""

import functools
import math

import numpy as np
from scipy.optimize import brentq
from scipy.special import airy

NODES, REACH = 64, 24.0
"""Nodes of the quadrature on (0, REACH), beyond which the Airy function is nothing."""
MEAN, DEVIATION = -1.2065336, 1.2679814
"""Mean and standard deviation of the Tracy-Widom law of real matrices (Bornemann 2010)."""


def tracy_widom_cdf(x: float) -> float:
    """Distribution function F1 of the Tracy-Widom law of real matrices (beta = 1).

    Args:
        x: a number above about -8, where F1 is below 1e-16.

    Returns:
        F1(x), with an absolute error near 1e-14.
    """
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    nodes, roots = REACH * (nodes + 1) / 2, np.sqrt(weights * REACH / 2)
    kernel = airy(x + nodes[:, None] + nodes[None, :])[0]
    return float(np.linalg.det(np.eye(NODES) - roots[:, None] * kernel * roots[None, :]))


@functools.cache  # of one rate, for every matrix of a model
def tracy_widom_quantile(probability: float) -> float:
    """Quantile of the Tracy-Widom law: F1(x) = probability.

    Args:
        probability: between 1e-12 and 1 - 1e-12.

    Returns:
        x.
    """
    return brentq(lambda x: tracy_widom_cdf(x) - probability, -8.0, 12.0, xtol=1e-10)


def _upper_quantile(rate: float, relative_error: float) -> float:
    """Upper quantile of Tracy-Widom, widened about its mean; the error in the law's standard deviations."""
    return MEAN + (tracy_widom_quantile(1 - rate) - MEAN) * math.hypot(1, relative_error)


def largest_edge(shape: tuple[int, int], rate: float, sigma_error: float = 0.0) -> tuple[float, float]:
    """Upper end of the singular values of noise: nu^2 = mu + sigma t, t the upper quantile of Tracy-Widom.

    mu = (sqrt(L - 1/2) + sqrt(s - 1/2))^2, sigma = sqrt(mu) (1/sqrt(L - 1/2) + 1/sqrt(s - 1/2))^(1/3).

    Args:
        shape: (n, m), entries of variance one.
        rate: probability that noise passes the edge.
        sigma_error: relative standard error of the sigma that the edge will be multiplied with.

    Returns:
        The singular value, and the Tracy-Widom scale of the largest one to first order.
    """
    longer, shorter = math.sqrt(max(shape) - 0.5), math.sqrt(min(shape) - 0.5)
    root = longer + shorter
    scale = root * (1 / longer + 1 / shorter) ** (1 / 3)
    quantile = _upper_quantile(rate, 2 * root**2 * sigma_error / (scale * DEVIATION))
    return math.sqrt(root**2 + scale * quantile), scale / (2 * root)


def smallest_edge(shape: tuple[int, int], rate: float, sigma_error: float = 0.0) -> float:
    """Lower end of the singular values of noise, for shapes well away from square.

    The logarithm of the smallest nu^2 follows the reflected law: log nu^2 = log mu + tau^2/8 - tau t, with
    mu = (sqrt(L - 1/2) - sqrt(s - 1/2))^2 and tau = (1/sqrt(s - 1/2) - 1/sqrt(L - 1/2))^(1/3) / sqrt(mu).

    Args:
        shape: (n, m), entries of variance one, not square.
        rate: probability that noise passes the edge.
        sigma_error: relative standard error of the sigma that the edge will be multiplied with.

    Returns:
        The singular value.
    """
    longer, shorter = math.sqrt(max(shape) - 0.5), math.sqrt(min(shape) - 0.5)
    root = longer - shorter
    tau = (1 / shorter - 1 / longer) ** (1 / 3) / root
    quantile = _upper_quantile(rate, 2 * sigma_error / (tau * DEVIATION))
    return math.exp((math.log(root**2) + tau**2 / 8 - tau * quantile) / 2)
