"""Where a low-rank signal surfaces in a noisy matrix, W = W0 + X: theory and simulation (paper B, v3).

W is (n, m) with q = n/m <= 1 and W0 = theta u v^T. The noise X = C^(1/2) G / sqrt(m), G standard normal, has
row covariance C: C u = c u, and 1 on the rest. White noise is c = 1; correlated noise is quiet along u, c <
1, as training makes it along a direction that it has learned.

All follows from l = c + theta^2, the second moment of W along u, by the theory of spiked covariances (Baik,
Ben Arous and Peche 2005; Benaych-Georges and Nadakuditi 2012; Bai and Yao 2012): nu^2 = psi(l) = l (1 + q /
(l - 1)) outside the bulk if psi'(l) > 0, otherwise no outlier; |<u, u_hat>|^2 = l psi'(l) / psi(l), |<v,
v_hat>|^2 = psi'(l) theta^2 / l. For white noise l > 1, so that an outlier can only lie above; with c < 1 -
sqrt(q) a weak signal lies below.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sdnb.errors import ParameterError


@dataclass(frozen=True)
class Noise:
    """Noise by its name and its variance c >= 0 along the signal's left vector, 1 along all others."""

    name: str
    along_signal: float = 1.0

    def __post_init__(self):
        if self.along_signal < 0:
            raise ParameterError(f"noise {self.name}: its variance along the signal is negative")


@dataclass(frozen=True)
class Spike:
    """An outlier and its vectors."""

    position: float | None  #: its singular value; None inside the bulk
    left: float  #: |<u, u_hat>|, zero inside the bulk
    right: float  #: |<v, v_hat>|, zero inside the bulk
    side: str  #: "above", "below" or "none"


def predicted_spike(strength: float, noise: Noise, q: float) -> Spike:
    """Position and overlaps of the outlier that a rank-one signal makes, in the limit of large matrices.

    No signal in no noise, c = theta = 0, is the limit of weak signals.

    Args:
        strength: theta, in units in which the noise's entries have variance 1 / m.
        noise: covariance of the noise.
        q: n/m, in (0, 1].

    Returns:
        The outlier, or none.
    """
    moment = noise.along_signal + strength**2
    gap = moment - 1
    if abs(gap) < 1e-12:
        return Spike(None, 0.0, 0.0, "none")
    lift = 1 + q / gap  # psi / l
    slope = 1 - q / gap**2
    if slope <= 0 or lift <= 0:
        return Spike(None, 0.0, 0.0, "none")
    signal = strength**2 / moment if moment else 1.0
    side = "above" if gap > 0 else "below"
    return Spike(math.sqrt(moment * lift), math.sqrt(slope / lift), math.sqrt(slope * signal), side)


def thresholds(noise: Noise, q: float) -> tuple[float | None, float]:
    """Signal strengths between which the outlier is lost in the bulk.

    theta^2 = 1 - sqrt(q) - c below which an outlier stands below the bulk, theta^2 = 1 + sqrt(q) - c above
    which it stands above (for white noise the threshold of Baik, Ben Arous and Peche, theta = q^(1/4)).

    Args:
        noise: covariance of the noise.
        q: n/m.

    Returns:
        The lower threshold, None if no signal is weak enough, and the upper one.
    """
    low = 1 - math.sqrt(q) - noise.along_signal
    high = 1 + math.sqrt(q) - noise.along_signal
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
    x = torch.randn(n, m, **normal) / math.sqrt(m)
    along = math.sqrt(noise.along_signal / m) * torch.randn(rank, m, **normal)
    x = x - u @ (u.T @ x) + u @ along
    return (u * torch.tensor(strengths, dtype=torch.float64)) @ v.T + x, u, v


def observed_spike(matrix: Tensor, u: Tensor, v: Tensor) -> Spike:
    """The singular value of W (n, m) whose left vector leans most on the signal's u v^T, side "none"."""
    squares, left = torch.linalg.eigh(matrix @ matrix.T)
    overlaps = (u @ left).abs()
    k = int(overlaps.argmax())
    value = float(squares[k].clamp(min=0).sqrt())
    right = abs(float(left[:, k] @ (matrix @ v))) / value if value else 0.0
    return Spike(value, float(overlaps[k]), right, "none")
