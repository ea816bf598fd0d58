"""The Marchenko-Pastur law of singular values, where those of finite noise end, and the values outside.

Everything is said about singular values nu of a raw matrix W, shape (n, m), entries of standard deviation
sigma: with L = max(n, m), s = min(n, m), q = s / L and the scale s~ = sigma sqrt(L), the bulk lies between
s~ (1 - sqrt q) and s~ (1 + sqrt q) (paper B, section on Marchenko-Pastur; Marchenko and Pastur 1967). The
extreme values of noise follow the Tracy-Widom law, with the centring and scale of second-order accuracy of
Ma (2012, Bernoulli 18, 322).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.linalg import eigvalsh_tridiagonal
from scipy.optimize import brentq
from scipy.special import airy
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.spectra.vectors import distances

HARD_EDGE = 0.9  # min/max above which the bulk's lower edge is near zero, a hard wall: nothing lies below
# Share of the largest singular value below which one is zero: what it measures is the rounding of the Gram
# matrix (1e-8) and of float32 weights (1e-7), not the matrix.
ZERO = 1e-6
SIMULATED_SIDE = 128
NODES, REACH = 64, 24.0  # of the quadrature on (0, REACH), beyond which the Airy function is nothing
MEAN, DEVIATION = -1.2065336, 1.2679814  # of the Tracy-Widom law of real matrices (Bornemann 2010)


class NoBulk(ParameterError):
    """A matrix whose median singular value is zero, as after pruning: there is no noise to fit."""


def mp_edges(q: float) -> tuple[float, float]:
    """Edges of the bulk in units of s~: 1 - sqrt(q) and 1 + sqrt(q), q in (0, 1]."""
    return 1 - math.sqrt(q), 1 + math.sqrt(q)


def mp_density(nu: Tensor, q: float) -> Tensor:
    """Density of nu over s~: sqrt((nu+^2 - nu^2)(nu^2 - nu-^2)) / (pi q nu), 0 outside the bulk (paper B)."""
    low, high = mp_edges(q)
    nu = nu.double()
    if low == 0:  # square: sqrt(4 - nu^2) / pi, finite at zero
        return (high**2 - nu**2).clamp(min=0).sqrt() / math.pi * (nu >= 0)
    inside = ((high**2 - nu**2) * (nu**2 - low**2)).clamp(min=0)
    return torch.where(nu > 0, inside.sqrt() / (math.pi * q * nu.clamp(min=low)), 0.0)


def mp_cdf(nu: Tensor, q: float) -> Tensor:
    """Share of singular values up to nu, in units of s~, in closed form: float64, in [0, 1]."""
    # With nu^2 = a + b cos(t), a = 1 + q, b = 2 sqrt(q), the law is 2 sin^2(t) / (pi nu^2) dt on (0, pi).
    a, b = 1 + q, 2 * math.sqrt(q)
    angle = torch.arccos(((nu.double().clamp(min=0) ** 2 - a) / b).clamp(-1, 1))
    low, high = mp_edges(q)
    inner = torch.atan2(low * torch.sin(angle / 2), high * torch.cos(angle / 2))
    return 1 - 2 / (math.pi * b * b) * (a * angle - b * torch.sin(angle) - 2 * (1 - q) * inner)


def mp_quantiles(probabilities: Tensor, q: float) -> Tensor:
    """Singular values over s~ below which shares (k,) of the law lie, (k,) in float64, by bisection."""
    low = torch.full_like(probabilities, mp_edges(q)[0], dtype=torch.float64)
    high = torch.full_like(low, mp_edges(q)[1])
    for _ in range(60):
        middle = (low + high) / 2
        below = mp_cdf(middle, q) < probabilities
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


@functools.cache  # the simulation behind sigma_error asks for the same one 200 times
def mp_median(q: float) -> float:
    """Median mu_q of the squared singular values over s~^2: 0.65278 at q = 1 (Gavish and Donoho 2014)."""
    return mp_quantiles(torch.tensor([0.5], dtype=torch.float64), q).item() ** 2


def median_sigma(singular_values: Tensor, shape: tuple[int, int]) -> float:
    """Noise level, sigma^2 = median(nu^2) / (L mu_q), which outliers do not move (Gavish and Donoho 2014)."""
    squares = singular_values.double().cpu().numpy() ** 2
    middle = float(np.median(squares))
    if middle <= ZERO**2 * squares.max():
        raise NoBulk(
            f"the median singular value of a {shape[0]} x {shape[1]} matrix is zero (at most {ZERO:g} of the "
            "largest): no bulk to fit"
        )
    return math.sqrt(middle / (max(shape) * mp_median(min(shape) / max(shape))))


def noise_spectrum(shape: tuple[int, int], *, generator: torch.Generator) -> Tensor:
    """Draw the singular values, ascending, of an (n, m) standard normal matrix, without forming it."""
    # Householder reflections make such a matrix bidiagonal with independent chi variables chi(L), ...,
    # chi(L - s + 1) on the diagonal and chi(s - 1), ..., chi(1) beside it (Dumitriu and Edelman 2002).

    def chi(freedom: Tensor) -> Tensor:
        return torch.sqrt(2 * torch._standard_gamma(freedom.double() / 2, generator=generator))

    longer, shorter = max(shape), min(shape)
    diagonal = chi(torch.arange(longer, longer - shorter, -1))
    beside = chi(torch.arange(shorter - 1, 0, -1))
    squares = diagonal**2
    squares[1:] += beside**2
    values = eigvalsh_tridiagonal(squares.numpy(), (diagonal[:-1] * beside).numpy(), lapack_driver="sterf")
    return torch.from_numpy(values).clamp(min=0).sqrt()


@functools.cache
def sigma_error(shape: tuple[int, int]) -> float:
    """Relative standard error of `median_sigma`, from 200 small noise matrices; it falls as one over s."""
    side = min(*shape, SIMULATED_SIDE)
    small = (side, round(side * max(shape) / min(shape)))
    generator = torch.Generator().manual_seed(0)
    found = [median_sigma(noise_spectrum(small, generator=generator), small) for _ in range(200)]
    return float(np.std(found)) * side / min(shape)


@dataclass(frozen=True)
class SpectrumFit:
    """Singular values of one matrix against Marchenko-Pastur, all edges in their units."""

    shape: tuple[int, int]  #: (n, m)
    sigma: float  #: standard deviation of the noise, from the median
    edges: tuple[float, float]  #: of the bulk in the infinite limit
    #: what a value must pass to count: noise alone does with the stated probability
    outlier_edges: tuple[float, float]
    edge_scale: float  #: Tracy-Widom scale of the upper edge
    outliers_below: int | None  #: number of values below the lower outlier edge; None at a hard edge
    outliers_above: int  #: number of values above the upper outlier edge
    hard_edge: bool  #: whether min/max exceeds HARD_EDGE, so that nothing is counted below
    distance: float  #: largest distance between the values' distribution function and the law's


def fit_spectrum(
    singular_values: Tensor, shape: tuple[int, int], *, false_positive_rate: float = 0.001
) -> SpectrumFit:
    """Compare a matrix' singular values with Marchenko-Pastur and count those outside the bulk on both sides.

    Args:
        singular_values: all min(n, m) of them, any order.
        shape: (n, m).
        false_positive_rate: probability that a matrix of pure noise shows any outlier on one side.

    Returns:
        The fit.

    Raises:
        ParameterError: a rate outside (0, 1), or a wrong number of singular values; NoBulk for a matrix
            whose median singular value is zero.
    """
    if not 0 < false_positive_rate < 1:
        raise ParameterError(f"false_positive_rate {false_positive_rate}: give a probability between 0 and 1")
    if singular_values.numel() != min(shape):
        raise ParameterError(
            f"{singular_values.numel()} singular values for shape {shape}: all {min(shape)} are needed"
        )
    q, values = min(shape) / max(shape), singular_values.double().cpu()
    sigma = median_sigma(singular_values, shape)
    scale, error = sigma * math.sqrt(max(shape)), sigma_error(tuple(sorted(shape)))
    top, edge_scale = (sigma * x for x in _largest_edge(shape, false_positive_rate, error))
    hard = q > HARD_EDGE
    bottom = 0.0 if hard else sigma * _smallest_edge(shape, false_positive_rate, error)
    return SpectrumFit(
        shape=tuple(shape),
        sigma=sigma,
        edges=tuple(scale * edge for edge in mp_edges(q)),
        outlier_edges=(bottom, top),
        edge_scale=edge_scale,
        outliers_below=None if hard else int((values < bottom).sum()),
        outliers_above=int((values > top).sum()),
        hard_edge=hard,
        distance=_distance(values / scale, q),
    )


def _distance(scaled: Tensor, q: float) -> float:
    """Kolmogorov distance max |F_n - F| of values over s~; noise's falls like 1/s, as values repel."""
    return distances(mp_cdf(scaled.sort().values, q)[None]).item()


def noise_distances(shape: tuple[int, int], draws: int, *, seed: int = 0) -> Tensor:
    """Kolmogorov distances of noise (n, m) from the law, sigma from the median, (draws,), ascending."""
    generator, found = torch.Generator().manual_seed(seed), []
    for _ in range(draws):
        values = noise_spectrum(shape, generator=generator)
        scale = median_sigma(values, shape) * math.sqrt(max(shape))
        found.append(_distance(values / scale, min(shape) / max(shape)))
    return torch.tensor(found, dtype=torch.float64).sort().values


def rounding_band(sigma: float, shape: tuple[int, int]) -> float:
    """Upper edge sigma (sqrt(n) + sqrt(m)) of rounding noise of this rms, which may make all values below."""
    return sigma * (math.sqrt(shape[0]) + math.sqrt(shape[1]))


# --- the extreme values of noise


def tracy_widom_cdf(x: float) -> float:
    """Tracy-Widom law of real matrices (beta = 1), F1(x) for x > -8, to 1e-14 (Bornemann 2010)."""
    # F1(x) = det(1 - K_x) with K_x(y, z) = Ai(x + y + z) on (0, inf), a Fredholm determinant by
    # Gauss-Legendre quadrature (Ferrari and Spohn 2005).
    nodes, weights = np.polynomial.legendre.leggauss(NODES)
    nodes, roots = REACH * (nodes + 1) / 2, np.sqrt(weights * REACH / 2)
    kernel = airy(x + nodes[:, None] + nodes[None, :])[0]
    return float(np.linalg.det(np.eye(NODES) - roots[:, None] * kernel * roots[None, :]))


@functools.cache  # of one rate, for every matrix of a model
def tracy_widom_quantile(probability: float) -> float:
    """Quantile x of the Tracy-Widom law, F1(x) = probability, from 1e-12 to 1 - 1e-12."""
    return brentq(lambda x: tracy_widom_cdf(x) - probability, -8.0, 12.0, xtol=1e-10)


def _upper_quantile(rate: float, relative_error: float) -> float:
    """Upper quantile of Tracy-Widom, widened about its mean by an error in the law's standard deviations."""
    return MEAN + (tracy_widom_quantile(1 - rate) - MEAN) * math.hypot(1, relative_error)


def _largest_edge(shape: tuple[int, int], rate: float, error: float) -> tuple[float, float]:
    """What the largest value of unit noise exceeds at a rate, sigma known to an error; Tracy-Widom scale."""
    # nu^2 = mu + sigma t, t the upper quantile of Tracy-Widom, mu = (sqrt(L - 1/2) + sqrt(s - 1/2))^2 and
    # sigma = sqrt(mu) (1/sqrt(L - 1/2) + 1/sqrt(s - 1/2))^(1/3)
    longer, shorter = math.sqrt(max(shape) - 0.5), math.sqrt(min(shape) - 0.5)
    root = longer + shorter
    scale = root * (1 / longer + 1 / shorter) ** (1 / 3)
    quantile = _upper_quantile(rate, 2 * root**2 * error / (scale * DEVIATION))
    return math.sqrt(root**2 + scale * quantile), scale / (2 * root)


def _smallest_edge(shape: tuple[int, int], rate: float, error: float) -> float:
    """What the smallest value of unit noise, well away from square, falls below at a rate."""
    # log nu^2 = log mu + tau^2/8 - tau t by the reflected law, mu = (sqrt(L - 1/2) - sqrt(s - 1/2))^2 and
    # tau = (1/sqrt(s - 1/2) - 1/sqrt(L - 1/2))^(1/3) / sqrt(mu)
    longer, shorter = math.sqrt(max(shape) - 0.5), math.sqrt(min(shape) - 0.5)
    root = longer - shorter
    tau = (1 / shorter - 1 / longer) ** (1 / 3) / root
    quantile = _upper_quantile(rate, 2 * error / (tau * DEVIATION))
    return math.exp((math.log(root**2) + tau**2 / 8 - tau * quantile) / 2)
