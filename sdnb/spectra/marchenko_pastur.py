"""The Marchenko-Pastur law of singular values, its finite-size edges, and the values outside of them.

Everything is said about singular values nu of a raw matrix W, shape (n, m), entries of standard deviation
sigma: with L = max(n, m), s = min(n, m), q = s / L and the scale s~ = sigma sqrt(L), the bulk lies between
s~ (1 - sqrt q) and s~ (1 + sqrt q) (paper B, section on Marchenko-Pastur; Marchenko and Pastur 1967).
"""

import functools
import math
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import brentq
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.spectra.noise import noise_spectrum
from sdnb.spectra.tracy_widom import largest_edge, smallest_edge

HARD_EDGE = 0.9
"""min/max above which no outliers below the bulk are counted: its lower edge is near zero, a hard wall."""

ZERO = 1e-6
"""Share of the largest singular value below which one is zero: what it measures is the rounding of the Gram
matrix (1e-8) and of float32 weights (1e-7), not the matrix."""

SIMULATED_SIDE = 128


class NoBulk(ParameterError):
    """A matrix whose median singular value is zero, as after pruning: there is no noise to fit."""


def aspect(shape: tuple[int, int]) -> tuple[float, int]:
    """Aspect ratio and longer side of a matrix: q = min/max and L = max.

    Args:
        shape: (n, m).

    Returns:
        q in (0, 1] and L.
    """
    return min(shape) / max(shape), max(shape)


def mp_edges(q: float) -> tuple[float, float]:
    """Edges of the bulk in units of s~: 1 - sqrt(q) and 1 + sqrt(q).

    Args:
        q: aspect ratio min/max, in (0, 1].

    Returns:
        The lower and the upper edge.
    """
    return 1 - math.sqrt(q), 1 + math.sqrt(q)


def mp_density(nu: Tensor, q: float) -> Tensor:
    """Density of singular values: sqrt((nu+^2 - nu^2)(nu^2 - nu-^2)) / (pi q nu), in units of s~ (paper B).

    Args:
        nu: singular values over s~, any shape.
        q: aspect ratio min/max.

    Returns:
        The density, float64, zero outside the bulk.
    """
    low, high = mp_edges(q)
    square = nu.double() ** 2
    inside = ((high**2 - square) * (square - low**2)).clamp(min=0)
    if low == 0:  # square: sqrt(4 - nu^2) / pi, finite at zero
        return (high**2 - square).clamp(min=0).sqrt() / math.pi * (nu >= 0)
    return torch.where(inside > 0, inside.sqrt() / (math.pi * q * nu.double().clamp(min=low)), 0.0)


def mp_cdf(nu: Tensor, q: float) -> Tensor:
    """Share of singular values up to nu, in closed form.

    With nu^2 = a + b cos(t), a = 1 + q, b = 2 sqrt(q), the law is 2 sin^2(t) / (pi nu^2) dt on (0, pi), whose
    integral is elementary.

    Args:
        nu: singular values over s~, any shape.
        q: aspect ratio min/max.

    Returns:
        The distribution function, float64, in [0, 1].
    """
    a, b = 1 + q, 2 * math.sqrt(q)
    angle = torch.arccos(((nu.double().clamp(min=0) ** 2 - a) / b).clamp(-1, 1))
    low, high = mp_edges(q)
    inner = torch.atan2(low * torch.sin(angle / 2), high * torch.cos(angle / 2))
    return 1 - 2 / (math.pi * b * b) * (a * angle - b * torch.sin(angle) - 2 * (1 - q) * inner)


def mp_quantiles(probabilities: Tensor, q: float) -> Tensor:
    """Singular values below which the given shares of the law lie.

    Args:
        probabilities: in [0, 1], shape (k,).
        q: aspect ratio min/max.

    Returns:
        Quantiles in units of s~, shape (k,), float64; found by 60 bisections of the closed form.
    """
    low = torch.full_like(probabilities, mp_edges(q)[0], dtype=torch.float64)
    high = torch.full_like(low, mp_edges(q)[1])
    for _ in range(60):
        middle = (low + high) / 2
        below = mp_cdf(middle, q) < probabilities
        low, high = torch.where(below, middle, low), torch.where(below, high, middle)
    return (low + high) / 2


def mp_median(q: float) -> float:
    """Median mu_q of the squared singular values over s~^2: 0.65278 at q = 1, 0.91600 at q = 1/4.

    Args:
        q: aspect ratio min/max.

    Returns:
        mu_q (Gavish and Donoho 2014).
    """
    low, high = mp_edges(q)
    return brentq(lambda nu: float(mp_cdf(torch.tensor(nu), q)) - 0.5, low, high, xtol=1e-14) ** 2


def median_sigma(singular_values: Tensor, shape: tuple[int, int], drop_top: float = 0.0) -> float:
    """Noise level from the median: sigma^2 = median(nu^2) / (L mu_q) (Gavish and Donoho 2014).

    A few outliers do not move the median, as they would the Frobenius norm.

    Args:
        singular_values: all min(n, m) of them, any order.
        shape: (n, m).
        drop_top: share of the largest values that is left out first; the median that they leave behind is
            matched to the same quantile of the law.

    Returns:
        sigma.

    Raises:
        ParameterError: the share is not in [0, 1).
        NoBulk: the median is below ZERO times the largest value.
    """
    if not 0 <= drop_top < 1:
        raise ParameterError(
            f"drop_top {drop_top}: give the share of largest values to leave out, from 0 to below 1"
        )
    q, longer = aspect(shape)
    values = np.sort(singular_values.double().cpu().numpy() ** 2)
    kept = values[: len(values) - int(drop_top * len(values))]
    if np.median(kept) <= ZERO**2 * values[-1]:
        raise NoBulk(
            f"the median singular value of a {shape[0]} x {shape[1]} matrix is zero (at most {ZERO:g} of the "
            "largest): no bulk to fit"
        )
    return math.sqrt(float(np.median(kept)) / (longer * _square_at(0.5 * len(kept) / len(values), q)))


@functools.cache
def _square_at(share: float, q: float) -> float:
    """Squared singular value over s~^2 below which a share of the law lies."""
    return mp_median(q) if share == 0.5 else float(mp_quantiles(torch.tensor([share]), q)) ** 2


@functools.cache
def sigma_error(shape: tuple[int, int], drop_top: float = 0.0) -> float:
    """Relative standard error of `median_sigma` on noise, which matters at the edges of small matrices.

    Args:
        shape: (n, m).
        drop_top: share of the largest values left out; the quantile that is left varies more.

    Returns:
        The standard deviation over 200 simulated matrices (seed 0), of the same aspect ratio and at most
        SIMULATED_SIDE rows, scaled by 1/s.
    """
    shorter, longer = min(shape), max(shape)
    side = min(shorter, SIMULATED_SIDE)
    small = (side, round(side * longer / shorter))
    generator = torch.Generator().manual_seed(0)
    found = [median_sigma(noise_spectrum(small, generator=generator), small, drop_top) for _ in range(200)]
    return float(np.std(found)) * side / shorter


@dataclass(frozen=True)
class SpectrumFit:
    """Singular values of one matrix against Marchenko-Pastur.

    Args:
        shape: (n, m).
        sigma: standard deviation of the noise, from the median.
        edges: of the bulk in the infinite limit, in the units of the singular values.
        outlier_edges: what a value must pass to count: the edge that noise alone passes with the stated
            probability.
        edge_scale: Tracy-Widom scale of the upper edge, in the units of the singular values.
        outliers_below: number of values below the lower outlier edge; None at a hard edge.
        outliers_above: number of values above the upper outlier edge.
        hard_edge: whether min/max exceeds HARD_EDGE, so that nothing is counted below.
        distance: largest distance between the values' distribution function and the law's.
    """

    shape: tuple[int, int]
    sigma: float
    edges: tuple[float, float]
    outlier_edges: tuple[float, float]
    edge_scale: float
    outliers_below: int | None
    outliers_above: int
    hard_edge: bool
    distance: float


def fit_spectrum(
    singular_values: Tensor,
    shape: tuple[int, int],
    *,
    false_positive_rate: float = 0.001,
    drop_top: float = 0.0,
) -> SpectrumFit:
    """Compare a matrix' singular values with Marchenko-Pastur and count those outside the bulk on both sides.

    Args:
        singular_values: all min(n, m) of them, any order.
        shape: (n, m).
        false_positive_rate: probability that a matrix of pure noise shows any outlier on one side.
        drop_top: share of the largest values left out of the estimate of sigma.

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
    q, longer = aspect(shape)
    sigma = median_sigma(singular_values, shape, drop_top)
    scale = sigma * math.sqrt(longer)
    error = sigma_error(tuple(sorted(shape)), drop_top)
    top = largest_edge(shape, false_positive_rate, error)
    hard = q > HARD_EDGE
    bottom = 0.0 if hard else smallest_edge(shape, false_positive_rate, error)
    values = singular_values.double().cpu()
    below = None if hard else int((values < sigma * bottom).sum())
    low, high = mp_edges(q)
    return SpectrumFit(
        shape=tuple(shape),
        sigma=sigma,
        edges=(scale * low, scale * high),
        outlier_edges=(sigma * bottom, sigma * top.edge),
        edge_scale=sigma * top.scale,
        outliers_below=below,
        outliers_above=int((values > sigma * top.edge).sum()),
        hard_edge=hard,
        distance=mp_distance(values / scale, q),
    )


def mp_distance(scaled: Tensor, q: float) -> float:
    """Kolmogorov distance between singular values and the law: max |F_n - F|.

    Args:
        scaled: singular values over s~, shape (s,).
        q: aspect ratio min/max.

    Returns:
        The distance. Singular values repel one another, so for noise it falls like 1/s, not 1/sqrt(s).
    """
    cdf = mp_cdf(scaled.double().cpu().sort().values, q)
    steps = torch.arange(len(cdf) + 1, dtype=torch.float64) / len(cdf)
    return float(torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).max())


def noise_distances(shape: tuple[int, int], draws: int, *, seed: int = 0) -> Tensor:
    """Distances between noise and Marchenko-Pastur, with sigma from the median as for a weight matrix.

    Args:
        shape: (n, m).
        draws: number of noise matrices.
        seed: of the draws.

    Returns:
        Kolmogorov distances, shape (draws,), ascending.
    """
    generator = torch.Generator().manual_seed(seed)
    q, longer = aspect(shape)
    found = []
    for _ in range(draws):
        values = noise_spectrum(shape, generator=generator)
        found.append(mp_distance(values / (median_sigma(values, shape) * math.sqrt(longer)), q))
    return torch.tensor(found, dtype=torch.float64).sort().values
