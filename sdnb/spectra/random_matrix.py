"""Where a low-rank rule surfaces in a noisy matrix, W = W0 + X: theory and simulation (paper B, v3).

W is (n, m) with q = n/m <= 1 and W0 = theta u v^T. The noise X = C^(1/2) G / sqrt(m), G standard normal, has
row covariance C. White noise is C = 1. Correlated noise here is quiet along u: C u = c u, and 1 (or any other
levels with weights) on the rest, as training makes it along a direction that it has learned.

All follows from l = c + theta^2, the second moment of W along u, by the theory of spiked covariances (Baik,
Ben Arous and Peche 2005; Benaych-Georges and Nadakuditi 2012; Bai and Yao 2012), with levels t_i of weight
h_i elsewhere: nu^2 = psi(l) = l (1 + q sum_i h_i t_i / (l - t_i)) outside the bulk if psi'(l) > 0, otherwise
no outlier; |<u, u_hat>|^2 = l psi'(l) / psi(l), |<v, v_hat>|^2 = psi'(l) theta^2 / l. For white noise l > 1,
so that an outlier can only lie above; with c < 1 - sqrt(q) a weak signal lies below.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.errors import ParameterError


@dataclass(frozen=True)
class Noise:
    """Row covariance of the noise: one quiet (or loud) direction, and the levels of all others.

    Args:
        name: how rows of a table call it.
        along_signal: variance c along the signal's left vector.
        levels: variances t_i of the other directions.
        weights: their shares h_i, which add up to one.
    """

    name: str
    along_signal: float = 1.0
    levels: tuple[float, ...] = (1.0,)
    weights: tuple[float, ...] = (1.0,)

    def __post_init__(self):
        fits = len(self.levels) == len(self.weights) and math.isclose(sum(self.weights), 1.0, abs_tol=1e-9)
        if not fits or min((*self.levels, *self.weights, self.along_signal)) < 0:
            raise ParameterError(
                f"noise {self.name}: give as many weights as levels, none negative, weights that add to 1"
            )


@dataclass(frozen=True)
class Spike:
    """An outlier and its vectors.

    Args:
        position: its singular value; None inside the bulk.
        left: |<u, u_hat>|, zero inside the bulk.
        right: |<v, v_hat>|, zero inside the bulk.
        side: "above", "below" or "none".
    """

    position: float | None
    left: float
    right: float
    side: str


def predicted_spike(strength: float, noise: Noise, q: float) -> Spike:
    """Position and overlaps of the outlier that a rank-one signal makes, in the limit of large matrices.

    No signal in no noise, c = theta = 0, is the limit of weak signals.

    Args:
        strength: theta, in units in which the noise' entries have variance t / m.
        noise: covariance of the noise.
        q: n/m, in (0, 1].

    Returns:
        The outlier, or none.
    """
    moment = noise.along_signal + strength**2
    gaps = [moment - level for level in noise.levels]
    if any(abs(gap) < 1e-12 for gap in gaps):
        return Spike(None, 0.0, 0.0, "none")
    terms = list(zip(noise.levels, noise.weights, gaps, strict=True))
    lift = 1 + q * sum(h * t / gap for t, h, gap in terms)  # psi / l
    slope = 1 - q * sum(h * (t / gap) ** 2 for t, h, gap in terms)
    if slope <= 0 or lift <= 0:
        return Spike(None, 0.0, 0.0, "none")
    side = "above" if moment > max(noise.levels) else "below" if moment < min(noise.levels) else "between"
    signal = strength**2 / moment if moment else 1.0
    return Spike(math.sqrt(moment * lift), math.sqrt(slope / lift), math.sqrt(slope * signal), side)


def thresholds(noise: Noise, q: float) -> tuple[float | None, float]:
    """Signal strengths between which the outlier is lost in the bulk, for noise of one level t.

    theta^2 = t (1 - sqrt q) - c below which an outlier stands below the bulk, theta^2 = t (1 + sqrt q) - c
    above which it stands above (for white noise the threshold of Baik, Ben Arous and Peche, theta = q^(1/4)).

    Args:
        noise: covariance of the noise, with one level.
        q: n/m.

    Returns:
        The lower threshold, None if no signal is weak enough, and the upper one.

    Raises:
        ParameterError: the noise has several levels.
    """
    if len(noise.levels) != 1:
        raise ParameterError(
            f"noise {noise.name} has several levels: its thresholds have no closed form here"
        )
    level = noise.levels[0]
    low = level * (1 - math.sqrt(q)) - noise.along_signal
    high = level * (1 + math.sqrt(q)) - noise.along_signal
    return (math.sqrt(low) if low >= 0 else None), math.sqrt(max(high, 0.0))


def draw_matrix(
    n: int, m: int, strengths: list[float], noise: Noise, *, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Draw W = sum_i theta_i u_i v_i^T + X, quiet along every u_i.

    Args:
        n: rows, at most m.
        m: columns.
        strengths: theta_i; the vectors of different i are orthogonal.
        noise: covariance of the noise.
        generator: of the random numbers.

    Returns:
        W (n, m), the left vectors (n, r) and the right vectors (m, r), float64.

    Raises:
        ParameterError: more rows than columns, or more signals than rows.
    """
    rank = len(strengths)
    if not rank <= n <= m:
        raise ParameterError(f"{rank} signals in a {n} x {m} matrix: give n <= m and at most n signals")
    normal = dict(generator=generator, dtype=torch.float64)
    u = torch.linalg.qr(torch.randn(n, rank, **normal))[0]
    v = torch.linalg.qr(torch.randn(m, rank, **normal))[0]
    counts = torch.tensor(noise.weights, dtype=torch.float64).cumsum(0).mul(n).round().long()
    levels = torch.tensor(noise.levels, dtype=torch.float64)[
        torch.searchsorted(counts, torch.arange(n), right=True)
    ]
    x = levels.sqrt()[:, None] * torch.randn(n, m, **normal) / math.sqrt(m)
    along = math.sqrt(noise.along_signal / m) * torch.randn(rank, m, **normal)
    x = x - u @ (u.T @ x) + u @ along
    return (u * torch.tensor(strengths, dtype=torch.float64)) @ v.T + x, u, v


def observed_spike(matrix: Tensor, u: Tensor, v: Tensor) -> Spike:
    """The singular value whose left vector leans most on the signal's, and its overlaps.

    Args:
        matrix: W, shape (n, m).
        u: the signal's left vector, shape (n,).
        v: its right vector, shape (m,).

    Returns:
        The singular value and both overlaps; the side is "none", since an edge is not asked for here.
    """
    squares, left = torch.linalg.eigh(matrix @ matrix.T)
    overlaps = (u @ left).abs()
    k = int(overlaps.argmax())
    value = float(squares[k].clamp(min=0).sqrt())
    right = abs(float(left[:, k] @ (matrix @ v))) / value if value else 0.0
    return Spike(value, float(overlaps[k]), right, "none")
