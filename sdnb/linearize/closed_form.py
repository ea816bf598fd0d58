"""The least-squares fit of an FFN's inner activation in closed form: the limit of infinitely many samples."""

from collections.abc import Callable

import torch
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.linearize.gaussian import gaussian_moments

# Below this share of |b| the slope m1 / s would be a difference of nearly equal numbers; there it is taken at
# this width instead, which changes it by the order of the width's square.
_SMALLEST_SPREAD = 1e-5
_ROWS = 512  # multiplied at a time on a CPU: what a cache holds


def closed_form_fit(
    w: Tensor,
    activation: Callable[[Tensor], Tensor],
    b: Tensor | None = None,
    v: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    """Return B, the matrix that fits the inner units of an FFN best over Gaussian inputs.

    B = argmin E|y(x) - B x|^2 = E[y x^T] for x ~ N(0, I_d), with y_i = phi(w_i.x + b_i) or, gated,
    y_i = phi(w_i.x + b_i) (v_i.x + c_i). This is the matrix that the paper estimates from 100,000 samples.

    Args:
        w: weights inside the activation, shape (f, d).
        activation: elementwise function phi that takes float64.
        b: biases inside the activation, shape (f,).
        v: weights of the factor outside the activation, shape (f, d); None for a plain unit.
        c: biases of that factor, shape (f,).

    Returns:
        B, shape (f, d), float64 where w is, float32 otherwise.

    Source: paper A (arXiv 2502.07004), the FFN's linear model; closed form by Stein's lemma.
    """
    alpha, mu = closed_form_coefficients(w, activation, b, v, c)
    B = alpha[:, None] * w.to(alpha)
    return B if mu is None else B.addcmul_(mu[:, None], v.to(alpha))


def closed_form_coefficients(
    w: Tensor,
    activation: Callable[[Tensor], Tensor],
    b: Tensor | None = None,
    v: Tensor | None = None,
    c: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Return alpha and mu with B = diag(alpha) W + diag(mu) V, the fit without its matrix.

    plain: alpha = m1 / s; gated: alpha = (w.v / s^2) m2 + (c / s) m1 and mu = m0, with s = |w_i| and the
    moments of `gaussian_moments`. In the limit s -> 0 (a dead unit) the product alpha w vanishes, and
    mu = phi(b) remains.

    Args:
        w: weights inside the activation, shape (f, d).
        activation: elementwise function phi that takes float64.
        b: biases inside the activation, shape (f,).
        v: weights of the factor outside the activation, shape (f, d); None for a plain unit.
        c: biases of that factor, shape (f,).

    Returns:
        alpha, shape (f,), and mu, shape (f,), or None for a plain unit; float64 where w is, float32
        otherwise.

    Raises:
        ParameterError: if the shapes do not belong together.
    """
    shapes = [None if t is None else tuple(t.shape) for t in (w, b, v, c)]
    if w.dim() != 2 or shapes[1] not in (None, shapes[0][:1]) or shapes[2] not in (None, shapes[0]):
        raise ParameterError(f"w and v must be of one shape (f, d), b of shape (f,); w, b, v, c are {shapes}")
    if c is not None and (v is None or shapes[3] != shapes[0][:1]):
        raise ParameterError(f"c must have shape (f,) and belongs to v; w, b, v, c are {shapes}")
    s, overlap = _row_products(w, v)
    spread = s if b is None else torch.maximum(s, _SMALLEST_SPREAD * b.detach().to(s).abs())
    m0, m1, m2 = gaussian_moments(activation, spread, b)
    spread = torch.where(spread == 0, 1.0, spread)
    dtype = torch.promote_types(w.dtype, torch.float32)
    if v is None:
        return (m1 / spread).to(dtype), None
    alpha = overlap * m2 / spread.square()
    if c is not None:
        alpha += c.detach().to(s) * m1 / spread
    return alpha.to(dtype), m0.to(dtype)


def _row_products(w: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Return |w_i| and w_i.v_i (None without v), both float64 of shape (f,), a few rows at a time.

    The squares are float64, so that small weights do not vanish; the terms of w_i.v_i may round to float32.
    """
    norms, overlaps = [], []
    at_once = _ROWS if w.device.type == "cpu" else len(w)
    dtype = torch.promote_types(
        w.dtype if v is None else torch.promote_types(w.dtype, v.dtype), torch.float32
    )
    for start in range(0, len(w), at_once):
        rows = w[start : start + at_once].detach().to(dtype)
        norms.append(torch.linalg.vector_norm(rows, dim=1, dtype=torch.float64))
        if v is not None:
            products = rows * v[start : start + at_once].detach().to(dtype)
            overlaps.append(products.sum(1, dtype=torch.float64))
    return torch.cat(norms), torch.cat(overlaps) if overlaps else None
