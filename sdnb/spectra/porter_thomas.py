"""Entries of singular vectors against the Porter-Thomas law, with p-values that hold.

A direction drawn evenly on the sphere in N dimensions has entries whose squares follow Beta(1/2, (N - 1)/2);
times sqrt(N) they are close to standard normal (Porter and Thomas 1956). A singular vector of pure noise is
such a direction. Because every vector has length one, the Kolmogorov-Smirnov distance is smaller than for
independent entries, and the textbook law would give p-values that are too large; the distance is calibrated
by simulation.
"""

import functools
import math

import torch
from scipy.special import betainc
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.spectra.singular import index_blocks

LARGEST_DRAW = 4096
"""Entries in one simulated draw; sqrt(n) times the distance has settled by then."""


def porter_thomas_cdf(entries: Tensor, n: int) -> Tensor:
    """Distribution function of an entry of a random unit vector, exact at every n >= 2.

    F(t) = 1/2 + sign(t) I(t^2; 1/2, (n - 1)/2) / 2, I the regularised incomplete beta function.

    Args:
        entries: entries t of unit vectors, any shape.
        n: length N of the vectors.

    Returns:
        F, float64, same shape.
    """
    t = entries.double().cpu()
    half = torch.from_numpy(betainc(0.5, (n - 1) / 2, (t**2).clamp(max=1.0).numpy()))
    return 0.5 + 0.5 * t.sign() * half


def ks_distance(vectors: Tensor) -> float:
    """Largest distance between the entries' distribution function and the Porter-Thomas law, entries pooled.

    Args:
        vectors: unit vectors as columns, shape (N, p).

    Returns:
        Kolmogorov-Smirnov distance of all N p entries.
    """
    cdf = porter_thomas_cdf(vectors, vectors.shape[0]).flatten().sort().values
    return float(_distances(cdf[None])[0])


def _distances(cdf: Tensor) -> Tensor:
    """Kolmogorov-Smirnov distances of sorted values of the law, one row a sample, (k, n) -> (k,)."""
    steps = torch.arange(cdf.shape[1] + 1, dtype=torch.float64) / cdf.shape[1]
    return torch.maximum(steps[1:] - cdf, cdf - steps[:-1]).amax(1)


@functools.lru_cache(maxsize=32)
def null_distances(n: int, pooled: int, draws: int = 4000, seed: int = 0) -> Tensor:
    """sqrt(N p) times the distance, for p random unit vectors of length N.

    Args:
        n: length N.
        pooled: vectors p in a pool. Draws are limited to LARGEST_DRAW entries: fewer vectors, then shorter
            ones, which leaves the law of the scaled distance where it is.
        draws: number of simulated pools.
        seed: of the draws.

    Returns:
        Sorted scaled distances, shape (draws,), float64.
    """
    n = min(n, LARGEST_DRAW)
    pooled = max(1, min(pooled, LARGEST_DRAW // n))
    generator = torch.Generator().manual_seed(seed)
    found = []
    for part in torch.arange(draws).split(256):
        vectors = torch.randn(len(part), pooled, n, generator=generator, dtype=torch.float64)
        vectors /= vectors.norm(dim=-1, keepdim=True)
        found.append(_distances(porter_thomas_cdf(vectors, n).flatten(1).sort(1).values))
    return torch.cat(found).sort().values * math.sqrt(n * pooled)


def ks_p_value(distance: float, n: int, pooled: int = 1, *, draws: int = 4000, seed: int = 0) -> float:
    """Probability that random unit vectors lie at least this far from the law: (1 + #larger) / (1 + draws).

    Args:
        distance: Kolmogorov-Smirnov distance of the pooled entries.
        n: length N of a vector.
        pooled: vectors p in the pool.
        draws: simulated pools; the smallest p-value is 1 / (1 + draws).
        seed: of the simulation.

    Returns:
        The p-value.
    """
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
    distances = [ks_distance(vectors[:, block]) for block in blocks]
    values = [
        ks_p_value(distance, n, block.stop - block.start, draws=draws, seed=seed)
        for distance, block in zip(distances, blocks, strict=True)
    ]
    return blocks, torch.tensor(distances).double(), torch.tensor(values).double()
