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
