"""Single singular triplets, eigenpairs and largest gains, and the angles between directions."""

from sdnb.decompose.angles import (
    angle_deg,
    expected_nearest_angle,
    log10_chance,
    random_angle,
    random_angle_quantile,
)
from sdnb.decompose.eigenpair import Eigenpair, nearest_eigenpair
from sdnb.decompose.gain import Gain, largest_gain
from sdnb.decompose.triplets import Triplets, leading_triplets

__all__ = [
    "Eigenpair", "Gain", "Triplets", "angle_deg", "expected_nearest_angle", "largest_gain",
    "leading_triplets", "log10_chance", "nearest_eigenpair", "random_angle", "random_angle_quantile",
]  # fmt: skip
