"""Singular vectors against chance: their entries (Porter-Thomas), and their overlap with a given basis.

A direction drawn evenly on the sphere in N dimensions has entries whose squares follow Beta(1/2, (N - 1)/2);
times sqrt(N) they are close to standard normal (Porter and Thomas 1956). A singular vector of pure noise is
such a direction. Because every vector has length one, the Kolmogorov-Smirnov distance is smaller than for
independent entries, and the textbook law would give p-values that are too large; the distance is calibrated
by simulation.

The overlap is O_k = max_j |v_k . f_j| (paper B, eq. 7, with the absolute value that its sign-free meaning
needs): v_k a right singular vector of W, f_j the eigenvectors of the covariance of W's input. By chance it is
the largest coordinate of a random direction, max_j |z_j| / |z| with z normal.
"""

import functools
import math

import numpy as np
import torch
from scipy.optimize import brentq
from scipy.special import betainc, erf, erfc, gammaln
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.spectra.singular import index_blocks

LARGEST_DRAW = 4096  # entries in one simulated draw; sqrt(n) times the distance has settled by then
POINTS, WIDTHS = 4001, 40.0  # of the integral: its points, and its reach in widths of the saddle
THREE_SIGMA = 0.00135  # probability of a normal variable above three standard deviations, on one side


def porter_thomas_cdf(entries: Tensor, n: int) -> Tensor:
    """Law F(t) = 1/2 + sign(t) I(t^2; 1/2, (n - 1)/2) / 2 of an entry of a random unit vector, n >= 2."""
    t = entries.double().cpu()
    half = torch.from_numpy(betainc(0.5, (n - 1) / 2, (t**2).clamp(max=1.0).numpy()))
    return 0.5 + 0.5 * t.sign() * half


def ks_distance(vectors: Tensor) -> float:
    """Kolmogorov-Smirnov distance of all entries of unit vectors, the columns of (N, p), to Porter-Thomas."""
    cdf = porter_thomas_cdf(vectors, vectors.shape[0]).flatten().sort().values
    return distances(cdf[None]).item()


def distances(cdf: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distances of sorted values of the law, one row a sample, (k, n) -> (k,)."""
    steps = torch.arange(cdf.shape[1] + 1, dtype=torch.float64) / cdf.shape[1]
    return torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).amax(1)


@functools.lru_cache(maxsize=32)
def null_distances(n: int, pooled: int, draws: int = 4000, seed: int = 0) -> Tensor:
    """Sorted sqrt(N p) times the distance of p random unit vectors of length N, (draws,), float64."""
    n = min(n, LARGEST_DRAW)  # fewer vectors, then shorter ones, leave the law of the scaled distance
    pooled = max(1, min(pooled, LARGEST_DRAW // n))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in torch.arange(draws).split(256):
        vectors = torch.randn(len(part), pooled, n, generator=generator, dtype=torch.float64)
        vectors /= vectors.norm(dim=-1, keepdim=True)
        found.append(distances(porter_thomas_cdf(vectors, n).flatten(1).sort(1).values))
    return torch.cat(found).sort().values * math.sqrt(n * pooled)


def ks_p_value(distance: float, n: int, pooled: int = 1, *, draws: int = 4000, seed: int = 0) -> float:
    """P-value of a distance of the entries of `pooled` random unit vectors: (1 + #larger) / (1 + draws)."""
    null = null_distances(n, pooled, draws, seed)
    larger = int((null >= distance * math.sqrt(n * pooled)).sum())
    return (1 + larger) / (1 + len(null))


def spectrum_p_values(
    vectors: Tensor, width: int, *, draws: int = 4000, seed: int = 0
) -> tuple[list[slice], Tensor, Tensor]:
    """Test the singular vectors along a spectrum, pooled over neighbours.

    The calibration draws independent vectors. Those of a spectrum are orthogonal, which the distance does not
    notice, not even where one pool is a whole basis.

    Args:
        vectors: singular vectors as columns in the order of the spectrum, shape (N, s).
        width: vectors in a pool, or a few more.
        draws: simulated pools behind each p-value.
        seed: of the simulation.

    Returns:
        The pools, their Kolmogorov-Smirnov distances and their p-values, float64.

    Raises:
        ParameterError: a width below 1.
    """
    if width < 1:
        raise ParameterError(f"pool width {width}: give at least 1 singular vector to a pool")
    n, count = vectors.shape
    blocks = index_blocks(count, max(1, count // width))
    found = [ks_distance(vectors[:, block]) for block in blocks]
    values = [
        ks_p_value(distance, n, block.stop - block.start, draws=draws, seed=seed)
        for distance, block in zip(found, blocks, strict=True)
    ]
    return blocks, torch.tensor(found, dtype=torch.float64), torch.tensor(values, dtype=torch.float64)


def largest_overlaps(right_vectors: Tensor, eigenvectors: Tensor) -> Tensor:
    """O_k = max_j |v_k . f_j|, (s,) in float64: v_k columns of (N, s), f_j a basis, columns of (N, N)."""
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


@functools.cache  # of one width, for every matrix of a model
def chance_band(n: int) -> tuple[float, float, float]:
    """0.135 %, 50 % and 99.865 % quantiles of a chance overlap in N dimensions: a three-sigma band."""

    def quantile(probability: float) -> float:
        low = 1 / math.sqrt(n)
        return brentq(lambda t: chance_survival(t, n) - (1 - probability), low, 1.0, xtol=1e-12)

    return quantile(THREE_SIGMA), quantile(0.5), quantile(1 - THREE_SIGMA)


def rank_correlation(a: Tensor, b: Tensor) -> tuple[float, float]:
    """Spearman's rank correlation of two series, and the share of circular shifts with as large a one."""
    # both vary smoothly along the spectrum, so that the law for independent pairs would say too little
    from scipy.stats import rankdata  # takes longer to load than all else here

    ranks_a, ranks_b = (torch.from_numpy(rankdata(x.double().numpy())) for x in (a, b))
    ranks_a, ranks_b = ranks_a - ranks_a.mean(), ranks_b - ranks_b.mean()
    products = torch.fft.irfft(torch.fft.rfft(ranks_a).conj() * torch.fft.rfft(ranks_b), n=len(a))
    as_large = products >= products[0] - 1e-9 * products.abs().max()
    return float(products[0] / (ranks_a.norm() * ranks_b.norm())), float(as_large.double().mean())
