"""The Tracy-Widom law of real matrices, and where the extreme singular values of noise end.

F1(x) = det(1 - K_x) with K_x(y, z) = Ai(x + y + z) on (0, inf), a Fredholm determinant that Gauss-Legendre
quadrature gives to machine precision (Ferrari and Spohn 2005; Bornemann 2010). Centring and scale of
second-order accuracy for matrices of real Gaussian entries are those of Ma (2012, Bernoulli 18, 322).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
from scipy.optimize import brentq
from scipy.special import airy

NODES, REACH = 64, 24.0
MEAN, DEVIATION = -1.2065336, 1.2679814
"""Mean and standard deviation of the Tracy-Widom law of real matrices (Bornemann 2010)."""


@functools.cache
def _quadrature() -> tuple[np.ndarray, np.ndarray]:
    """Nodes and square roots of the weights on (0, REACH), beyond which the Airy function is nothing."""
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    return REACH * (nodes + 1) / 2, np.sqrt(weights * REACH / 2)


def tracy_widom_cdf(x: float) -> float:
    """Distribution function F1 of the Tracy-Widom law of real matrices (beta = 1).

    Args:
        x: a number above about -8, where F1 is below 1e-16.

    Returns:
        F1(x), with an absolute error near 1e-14.
    """
    nodes, roots = _quadrature()
    kernel = airy(x + nodes[:, None] + nodes[None, :])[0]
    return float(np.linalg.det(np.eye(NODES) - roots[:, None] * kernel * roots[None, :]))


@functools.cache
def tracy_widom_quantile(probability: float) -> float:
    """Quantile of the Tracy-Widom law: F1(x) = probability.

    Args:
        probability: between 1e-12 and 1 - 1e-12.

    Returns:
        x.
    """
    return brentq(lambda x: tracy_widom_cdf(x) - probability, -8.0, 12.0, xtol=1e-10)


@dataclass(frozen=True)
class Edge:
    """Where a singular value of noise stops, for entries of variance one.

    Args:
        edge: the singular value that is passed with the stated probability.
        scale: Tracy-Widom scale of the extreme singular value, to first order.
    """

    edge: float
    scale: float


def _sides(shape: tuple[int, int]) -> tuple[float, float]:
    """Square roots of the longer and the shorter side, each less one half (Ma 2012)."""
    return math.sqrt(max(shape) - 0.5), math.sqrt(min(shape) - 0.5)


def _upper_quantile(rate: float, relative_error: float) -> float:
    """Upper quantile of Tracy-Widom, widened about its mean; the error in the law's standard deviations."""
    return MEAN + (tracy_widom_quantile(1 - rate) - MEAN) * math.hypot(1, relative_error)


def largest_edge(shape: tuple[int, int], rate: float, sigma_error: float = 0.0) -> Edge:
    """Upper end of the singular values of noise: nu^2 = mu + sigma t, t the upper quantile of Tracy-Widom.

    mu = (sqrt(L - 1/2) + sqrt(s - 1/2))^2, sigma = sqrt(mu) (1/sqrt(L - 1/2) + 1/sqrt(s - 1/2))^(1/3).

    Args:
        shape: (n, m), entries of variance one.
        rate: probability that noise passes the edge.
        sigma_error: relative standard error of the sigma that the edge will be multiplied with.

    Returns:
        The edge.
    """
    longer, shorter = _sides(shape)
    root = longer + shorter
    scale = root * (1 / longer + 1 / shorter) ** (1 / 3)
    quantile = _upper_quantile(rate, 2 * root**2 * sigma_error / (scale * DEVIATION))
    return Edge(math.sqrt(root**2 + scale * quantile), scale / (2 * root))


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
    longer, shorter = _sides(shape)
    root = longer - shorter
    tau = (1 / shorter - 1 / longer) ** (1 / 3) / root
    quantile = _upper_quantile(rate, 2 * sigma_error / (tau * DEVIATION))
    return math.exp((math.log(root**2) + tau**2 / 8 - tau * quantile) / 2)
