"""Gaussian integrals of an activation, to about ten digits for any scale and bias of its argument.

The integrand is an activation at `s z + b` under a Gaussian weight. Where `s` is large the activation is a
kink on the scale of the weight, where it is small a line: no single rule in z serves both. So the line is cut
into panels at both structures, the activation's (in g = s z + b) and the weight's (in z), and every panel
gets one Gauss-Legendre rule. Without biases the moments are smooth functions of the scale alone: those of
many units are read off a polynomial through those of a few.
"""

import itertools
import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from sdnb.errors import ParameterError

# Where the activations of `transformers` bend or break, in g: kinks at 0 (ReLU and kin), +-1, +-3 (hard
# units), 6 (ReLU6), 10 (clipped GELU), 20 (softplus turns into its argument); beyond, steps that grow like a
# root's scale.
_HALF_EDGES = (1.0, 2.0, 3.0, 6.0, 10.0, 20.0, 40.0, 150.0, 600.0)
_ACTIVATION_EDGES = (0.0, *_HALF_EDGES, *(-g for g in _HALF_EDGES))
# exp(-z^2/2) underflows in float64 beyond 38.6; the far panels matter only to units that are flat up to them.
_WEIGHT_EDGES = (-38.5, -10.0, -6.5, -4.25, -2.0, 0.0, 2.0, 4.25, 6.5, 10.0, 38.5)
_NODES = 14
# Beyond this the weight falls by many orders of magnitude within one panel, see `_panel_nodes`.
_TAIL = 6.0
_DROP = 44.0  # a panel ends where the weight has fallen by exp(-22) from its inner edge
_CHUNK = 256  # units at a time: a megabyte, which a core's cache holds
_DEGREES = (16, 32, 64, 128)  # of the polynomials that are tried
_AGREES = 1e-10  # relative error up to which the last one must have met the next one's nodes


def gaussian_moments(
    activation: Callable[[Tensor], Tensor], s: Tensor, b: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the three Gaussian moments of an activation that the least-squares fit of an FFN needs.

    m0 = E[phi(s z + b)], m1 = E[z phi(s z + b)], m2 = E[(z^2 - 1) phi(s z + b)], z ~ N(0, 1).

    Composite Gauss-Legendre in float64. m1 and m2 are taken of phi - phi(b), which changes neither and leaves
    nothing to cancel where phi is flat; so units that are cut off far out in a tail keep their relative
    accuracy. At s = 0 the moments are phi(b), 0 and 0. A kink elsewhere than at g = 0, +-1, +-2, +-3, +-6,
    +-10, +-20 costs accuracy. Where all biases are zero, a Chebyshev interpolant in log s takes the place of
    most integrals, if it is checked to be as good.

    Args:
        activation: elementwise function phi that takes float64.
        s: standard deviations of the pre-activations, shape (f,), not negative.
        b: their means, shape (f,); zero when None.

    Returns:
        m0, m1, m2, each float64 of shape (f,), on the device of s.

    Raises:
        ParameterError: if s is not a vector, or b has another shape, or a value is negative or not finite.
    """
    s = s.detach().double()
    b = torch.zeros_like(s) if b is None else b.detach().to(s)
    if s.dim() != 1 or s.shape != b.shape:
        raise ParameterError(
            f"s and b must be vectors of one length, not {tuple(s.shape)} and {tuple(b.shape)}"
        )
    if not (torch.isfinite(s).all() and torch.isfinite(b).all() and (s >= 0).all()):
        raise ParameterError("s must be finite and not negative, b finite: the weights hold NaN or infinity")
    moments = None if b.any() else _interpolated(activation, s)
    return tuple(_integrated(activation, s, b) if moments is None else moments)


def _integrated(activation: Callable[[Tensor], Tensor], s: Tensor, b: Tensor) -> Tensor:
    """Return m0, m1, m2 as rows, (3, n), each unit by its own integrals."""
    moments = [
        torch.stack(_moments_of_chunk(activation, s_part, b_part))
        for s_part, b_part in zip(s.split(_CHUNK), b.split(_CHUNK), strict=True)
    ]
    return torch.cat(moments, dim=1)


def _interpolated(activation: Callable[[Tensor], Tensor], s: Tensor) -> Tensor | None:
    """Return m0, m1, m2 as rows, (3, n), for b = 0, from a polynomial in log s; None where there is none.

    Degrees are doubled until a polynomial foretells all values that the next one is made of. A dead unit, too
    few units, or scales too far apart leave no such polynomial.
    """
    degrees = [degree for degree in _DEGREES if 2 * degree <= len(s)]
    if len(degrees) < 2 or s.min() == 0 or s.min() == s.max():
        return None
    ends = s.aminmax()
    middle, half = (ends.max * ends.min).log() / 2, (ends.max / ends.min).log() / 2
    x = _chebyshev_points(degrees[-1], s)
    values = _integrated(activation, torch.exp(middle + half * x), torch.zeros_like(x))
    # a moment that vanishes by symmetry is rounding noise of the others
    allowed = _AGREES * values.abs() + 1e-15 * values.abs().sum(0)
    for low, high in itertools.pairwise(degrees):  # the points of a degree are every second one of its double
        few, more = (slice(None, None, degrees[-1] // degree) for degree in (low, high))
        foretold = _polynomial(values[:, few], x[more])
        if ((foretold - values[:, more]).abs() <= allowed[:, more]).all():
            return _polynomial(values[:, more], (s.log() - middle) / half)
    return None


def _chebyshev_points(degree: int, like: Tensor) -> Tensor:
    """Return cos(j pi / degree), j = 0 .. degree, in another tensor's dtype and on its device."""
    return torch.cos(torch.linspace(0, math.pi, degree + 1, dtype=like.dtype, device=like.device))


def _polynomial(values: Tensor, x: Tensor) -> Tensor:
    """Return polynomials at x, (k, n), given their values at the Chebyshev points, (k, degree + 1).

    Barycentric formula: p(x) = sum_j w_j p_j / (x - x_j) / sum_j w_j / (x - x_j).
    """
    nodes = _chebyshev_points(values.shape[1] - 1, x)
    weights = torch.ones_like(nodes)
    weights[1::2] = -1
    weights[[0, -1]] /= 2
    distance = x[:, None] - nodes
    terms = weights / torch.where(distance == 0, 1e-200, distance)  # at a node its own term is all
    return values @ (terms / terms.sum(1, keepdim=True)).T


def _moments_of_chunk(
    activation: Callable[[Tensor], Tensor], s: Tensor, b: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return m0, m1, m2 of one chunk of units, each of shape (n,)."""
    z, weight = _panel_nodes(_panel_edges(s, b))
    at_mean = activation(b)
    rise = activation(torch.addcmul(b[:, None], s[:, None], z)).sub_(at_mean[:, None])
    rise *= weight
    m0 = rise.sum(1) + at_mean
    rise *= z
    m1 = rise.sum(1)
    rise *= z
    # E[(z^2 - 1) phi] with E[phi - phi(b)] = m0 - phi(b)
    return m0, m1, rise.sum(1) - (m0 - at_mean)


def _panel_edges(s: Tensor, b: Tensor) -> Tensor:
    """Return sorted panel edges in z, (n, edges): the weight's, and the activation's at z = (g - b) / s."""
    g, z = s.new_tensor(_ACTIVATION_EDGES), s.new_tensor(_WEIGHT_EDGES)
    # s = 0 puts the activation's edges at infinity, or nowhere (0 / 0) where b is an edge: both go to the rim
    own = ((g - b[:, None]) / s[:, None]).nan_to_num(nan=math.inf).clamp(z[0], z[-1])
    return torch.cat([own, z.expand(len(s), -1)], dim=1).sort(dim=1).values


def _panel_nodes(edges: Tensor) -> tuple[Tensor, Tensor]:
    """Return nodes z and weights (Gaussian density included) of all panels, each (n, panels * nodes).

    A panel runs from its inner edge a (nearer to zero) outwards, and no farther than where the weight has
    fallen by exp(-22). Out in the tail, where it falls that far in one panel, nodes are graded as t^2 towards
    the inner edge.
    """
    t, omega = (edges.new_tensor(x) for x in _unit_rule())
    low, high = edges[:, :-1, None], edges[:, 1:, None]
    outwards = torch.where(low >= 0, 1.0, -1.0)
    inner = torch.where(low >= 0, low, -high)
    length = torch.minimum(high - low, (inner.square() + _DROP).sqrt() - inner)
    tail = inner > _TAIL
    z = inner + length * torch.where(tail, t * t, t)
    weight = length * torch.where(tail, 2 * t * omega, omega)
    weight *= torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)
    return (outwards * z).flatten(1), weight.flatten(1)


@lru_cache(maxsize=1)
def _unit_rule() -> tuple[np.ndarray, np.ndarray]:
    """Return the Gauss-Legendre nodes and weights on [0, 1]."""
    x, omega = np.polynomial.legendre.leggauss(_NODES)
    return (x + 1) / 2, omega / 2
