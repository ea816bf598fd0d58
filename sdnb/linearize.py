"""A decoder layer as a matrix for one token: attention A, FFN F, and the layer L that they make."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.gaussian import Activation, gaussian_moments
from sdnb.products import add_product_

if TYPE_CHECKING:
    from sdnb.layers import LayerView, Norm

_ROWS = 128  # rows of weights multiplied at a time on a CPU: what its cache holds
_SMALLEST = 1e-15  # shortest row whose square float32 holds; 1 / _SMALLEST is the longest
_UNITS = 2048, 16384  # inner units at a time on a CPU and on a GPU: B whole is as large as W
# Below this share of |b| the slope m1 / s would be a difference of nearly equal numbers; there it is taken at
# this width instead, which changes it by the order of the width's square.
_SMALLEST_SPREAD = 1e-5
_SAMPLES_AT_ONCE = 4096  # inputs held in memory, and the fresh ones that measure a sampled fit's residuals

Number = float | Tensor


@dataclass(frozen=True)
class LinearLayer:
    """The linear model of one decoder layer for one token: attention x -> A x, FFN x -> F x.

    L = (I + F)(I + A), or I + A + F if parallel. Where the residual stream passes norms (BERT) or has
    coefficients (Doge) itself, L = T (S2 + F)(S1 + A), or T (S2 + A + F).
    """

    A: Tensor  #: attention's matrix, shape (d, d)
    F: Tensor  #: the FFN's matrix on the stream before the norm that it reads from, shape (d, d)
    parallel: bool  #: whether attention and FFN read the same input
    method: str  #: how the FFN was fitted, "closed_form" or "sampled"
    standard_error: float | None = None  #: of the sampled fit, relative in Frobenius norm
    #: S1, S2 and T, what the stream goes through beside attention, beside the FFN and at the end, shape
    #: (d, d) each; None where that is I everywhere, as nearly always
    stream: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def R(self) -> Tensor:
        """L - I, shape (d, d): A + F + F A if serial, A + F if parallel; formed at each call."""
        if self.stream is None:
            return self.A + self.F if self.parallel else add_product_(self.A + self.F, self.F, self.A)
        S1, S2, T = self.stream
        R = T @ (S2 + self.A + self.F if self.parallel else (S2 + self.F) @ (S1 + self.A))
        R.diagonal().sub_(1)
        return R

    @property
    def L(self) -> Tensor:
        """The layer's matrix, shape (d, d): (I + F)(I + A), or I + A + F if parallel; formed at each call."""
        L = self.R
        L.diagonal().add_(1)
        return L

    def norm_aware(
        self, rho1: Number, rho2: Number, stream_rho: tuple[Number, Number, Number] = (1.0, 1.0, 1.0)
    ) -> Tensor:
        """Return L_rho = (I + F / rho2)(I + A / rho1), or I + A / rho1 + F / rho2, shape (d, d).

        The paper drops the divisors of the norms, which leaves only signs; this one predicts sizes. Those of
        the token in question are rho1 and rho2, from `branch_scales`, and `stream_rho` of S1, S2 and T, from
        `stream_scales`, ones where the stream passes no norm.
        """
        stream = self.stream and tuple(S / rho for S, rho in zip(self.stream, stream_rho, strict=True))
        return replace(self, A=self.A / rho1, F=self.F / rho2, stream=stream).L


def linear_layer(
    view: LayerView,
    *,
    method: str = "closed_form",
    input_scale: str = "paper",
    centre: bool = False,
    samples: int = 100_000,
    seed: int = 0,
) -> LinearLayer:
    """Return the linear model of a decoder layer.

    A as in `attention_matrix`, and F = multiplier diag(g_post) W_down B diag(g2), B the least-squares fit of
    the FFN's inner units. With input_scale="paper" B is fitted at x ~ N(0, I) after the gain; with "gain" at
    g2 x + beta2, as real inputs are scaled, and F = multiplier diag(g_post) W_down B.

    The method is "closed_form" or, from so many samples drawn by a seed, "sampled"; an FFN whose formula is
    not recognised is always fitted from samples, as a whole. `centre` puts a LayerNorm's mean subtraction
    beside its gain, which the paper leaves out.

    Raises:
        ParameterError: if the method or the input scale is unknown.

    Source: paper A (arXiv 2502.07004): I + R = (I + F)(I + A), and I + A + F for a parallel residual.
    """
    if method not in ("closed_form", "sampled") or input_scale not in ("paper", "gain"):
        allowed = "method is 'closed_form' or 'sampled' and input_scale 'paper' or 'gain'"
        raise ParameterError(f"{allowed}, not {method!r} and {input_scale!r}")
    ffn, formula, error = view.ffn, view.ffn.formula, None
    inside = ffn.norm if input_scale == "gain" else None  # what the fit's inputs are scaled by
    if method == "closed_form" and formula is not None:
        M = _closed_form_ffn(formula, inside, centre)
    else:
        method = "sampled"
        module = view.ffn_module if formula is None else lambda x: formula.inner(x) @ formula.down.T

        def scaled_module(x: Tensor) -> Tensor:
            return module(x if inside is None else _diagonal_times(1.0, inside, x.T, centre).T + inside.bias)

        device = view.attention.matrix.device
        fit = sampled_fit(scaled_module, view.hidden_size, samples, seed=seed, device=device)
        M, error = fit.B, fit.standard_error
    F = _branch_matrix(ffn, None if inside else ffn.norm, M, centre)
    return LinearLayer(attention_matrix(view, centre), F, view.parallel, method, error, _stream(view, centre))


def apply_linear(linear: LinearLayer, view: LayerView, x: Tensor) -> Tensor:
    """Return what the linear model says of real inputs x: L_rho x, shape (n, d), each with its divisors."""
    x = x.to(linear.A)
    rho1, rho2, *stream_rho = (rho[:, None] for rho in _divisors(view, x))
    sides = zip(linear.stream or (None,) * 3, stream_rho, strict=True)
    S1, S2, T = (lambda x, S=S, rho=rho: x if S is None else x @ S.T / rho for S, rho in sides)
    attention = x @ linear.A.T / rho1
    y = x if linear.parallel else S1(x) + attention
    return T(S2(y) + y @ linear.F.T / rho2 + (attention if linear.parallel else 0))


def attention_matrix(view: LayerView, centre: bool = False) -> Tensor:
    """Return A, what attention's branch adds to a lone token, without the norm's divisor, shape (d, d).

    A = multiplier diag(g_post) W_O rep(W_V) diag(g1), the middle being the real module's answer to one-token
    sequences. `centre` puts a LayerNorm's mean subtraction I - 1 1^T / d beside its gain, which the paper
    leaves out.

    Source: paper A (arXiv 2502.07004), the linear model of the attention branch.
    """
    return _branch_matrix(view.attention, view.attention.norm, view.attention.matrix.detach(), centre)


def attention_intercept(view: LayerView, rho: Number = 1.0) -> Tensor:
    """Return the constant, from all its biases, that attention's branch adds to A x, shape (d,).

    multiplier (g_post (M beta + bias) / rho + beta_post), with M the module's matrix, beta the bias of the
    norm before it, and rho the post-norm's divisor, dropped as in A if it is 1; one for each of n inputs,
    shape (n, 1), gives n intercepts, shape (n, d).
    """
    branch = view.attention
    constant = branch.bias.detach()
    if branch.norm is not None:
        constant = constant + branch.matrix.detach() @ branch.norm.bias
    if branch.post_norm is not None:
        constant = branch.post_norm.gain * constant / rho + branch.post_norm.bias
    return branch.multiplier * constant


def _closed_form_ffn(formula: object, norm: Norm | None, centre: bool) -> Tensor:
    """Return W_down B, with B fitted at inputs scaled by a norm's gain and bias if one is given."""
    F = formula.down.new_zeros(len(formula.down), formula.w.shape[1])
    units = _UNITS[F.device.type != "cpu"]
    for start in range(0, len(formula.w), units):
        rows = slice(start, start + units)
        parts = (formula.w, formula.b, formula.v, formula.c)
        w, b, v, c = (None if part is None else part[rows].detach() for part in parts)
        if norm is not None:  # w x + b as a function of x where its input is g x + beta
            w, b = _times_diagonal(w, norm, centre), w @ norm.bias + (0 if b is None else b)
            if v is not None:
                v, c = _times_diagonal(v, norm, centre), v @ norm.bias + (0 if c is None else c)
        B = closed_form_fit(w, formula.activation, b, v, c)
        add_product_(F, formula.down[:, rows].detach(), B, weights=True)
    return F


def _branch_matrix(branch: object, norm: Norm | None, M: Tensor, centre: bool) -> Tensor:
    """Return multiplier diag(g_post) M diag(g), with g of the norm that is given."""
    M = M if norm is None else _times_diagonal(M, norm, centre)
    return _diagonal_times(branch.multiplier, branch.post_norm, M, centre)


def _diagonal_times(c: Number, norm: Norm | None, X: Tensor, centre: bool) -> Tensor:
    """Return c diag(g) X, or c diag(g) (I - 1 1^T / d) X, (d, k); g = 1 without a norm, c may be (d,)."""
    if norm is not None:
        X = norm.gain[:, None] * (X - X.mean(0) if centre and norm.centred else X)
    return torch.as_tensor(c).to(X).reshape(-1, 1) * X


def _times_diagonal(X: Tensor, norm: Norm, centre: bool) -> Tensor:
    """Return X diag(g), or X diag(g) (I - 1 1^T / d), shape (k, d)."""
    X = X * norm.gain
    return X - X.mean(1, keepdim=True) if centre and norm.centred else X


def _stream(view: LayerView, centre: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return S1, S2 and T: c diag(g) where the stream passes the branch's norm too, else c I."""
    if view.plain_residual:
        return None
    eye = torch.eye(view.hidden_size, device=view.attention.matrix.device)
    sides = [(b.residual_scale, b.norm if b.norm_on_residual else None) for b in (view.attention, view.ffn)]
    return tuple(_diagonal_times(*side, eye, centre) for side in (*sides, (1.0, view.output_norm)))


def branch_scales(view: LayerView, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return rho1 and rho2, what the norms of each branch divide real inputs x (n, d) by, shape (n,) each.

    The root mean square (the standard deviation if the norm is centred) that the branch's norm meets, times
    that which its post-norm meets, and for rho1 times that of a norm inside the value path (latent
    attention); 1 where there is no norm.
    """
    return _divisors(view, x)[:2]


def stream_scales(view: LayerView, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the divisors of the norms on the stream itself for x (n, d): those of S1, S2, T, (n,) each."""
    return _divisors(view, x)[2:]


@torch.no_grad()
def _divisors(view: LayerView, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return what `branch_scales` and `stream_scales` do, from one pass through the branches."""

    def divisor(norm: Norm | None, x: Tensor) -> Tensor:
        return x.new_ones(len(x)) if norm is None else norm.scale(x)[:, 0]

    attention, ffn, end = view.attention, view.ffn, None
    x = x.to(attention.matrix)
    u = attention.normed(x)
    answers = view.attention_module(u)
    rho1 = divisor(attention.norm, x) * attention.inner_scale(u, answers)[:, 0]
    rho1 = rho1 * divisor(attention.post_norm, answers)
    a = attention.added(answers)
    y = x if view.parallel else view.attention_residual(x) + a
    rho2 = divisor(ffn.norm, y)
    if ffn.post_norm is not None or view.output_norm is not None:
        answers = view.ffn_module(ffn.normed(y))
        rho2 = rho2 * divisor(ffn.post_norm, answers)
        end = view.ffn_residual(y) + ffn.added(answers) + (a if view.parallel else 0)
    sides = ((attention, x), (ffn, y))
    on_stream = (divisor(side.norm if side.norm_on_residual else None, rows) for side, rows in sides)
    return rho1, rho2, *on_stream, divisor(view.output_norm, x if end is None else end)


def closed_form_fit(
    w: Tensor,
    activation: Activation,
    b: Tensor | None = None,
    v: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    """Return B, the matrix that fits the inner units of an FFN best over Gaussian inputs.

    B = argmin E|y(x) - B x|^2 = E[y x^T] for x ~ N(0, I_d), with y_i = phi(w_i.x + b_i) or, gated,
    y_i = phi(w_i.x + b_i) (v_i.x + c_i). With s = |w_i| and the m0, m1, m2 of `gaussian_moments`, row i is

        plain: (m1 / s) w_i
        gated: ((w_i.v_i / s^2) m2 + (c_i / s) m1) w_i + m0 v_i

    and in the limit s -> 0 (a dead unit) 0 or phi(b_i) v_i. Shapes are (f, d) of w and v, (f,) of b and c;
    v is None for a plain unit, and the activation phi takes float64. B, (f, d), is float64 where w is, else
    float32.

    Raises:
        ParameterError: if the shapes do not belong together.

    Source: paper A (arXiv 2502.07004), the FFN's linear model; closed form by Stein's lemma.
    """
    expected = ((b, w.shape[:1]), (v, w.shape), (c, v is not None and w.shape[:1]))
    if w.dim() != 2 or any(t is not None and t.shape != shape for t, shape in expected):
        shapes = [None if t is None else tuple(t.shape) for t in (w, b, v, c)]
        raise ParameterError(f"w and v have one shape (f, d), b and, beside v, c (f,); w, b, v, c: {shapes}")
    w = w.detach().to(torch.promote_types(w.dtype, torch.float32))
    s = _row_products(w, w).sqrt()
    if not ((s > _SMALLEST) & (s < 1 / _SMALLEST)).all():
        s = torch.linalg.vector_norm(w, dim=1, dtype=torch.float64)
    spread = s if b is None else torch.maximum(s, _SMALLEST_SPREAD * b.detach().to(s).abs())
    m0, m1, m2 = gaussian_moments(activation, spread, b)
    spread = torch.where(spread == 0, 1.0, spread)
    if v is None:
        return (m1 / spread).to(w)[:, None] * w
    v = v.detach().to(w)
    alpha = _row_products(w, v) * m2 / spread.square()
    if c is not None:
        alpha += c.detach().to(s) * m1 / spread
    return (alpha.to(w)[:, None] * w).addcmul_(m0.to(w)[:, None], v)


def _row_products(X: Tensor, Y: Tensor) -> Tensor:
    """Return x_i.y_i of all rows, shape (f,), float64; the terms and their pairwise sums are float32."""
    rows = _ROWS if X.device.type == "cpu" else len(X)
    pieces = zip(X.split(rows), Y.split(rows), strict=True)
    return torch.cat([(x * y).sum(1) for x, y in pieces]).double()


@dataclass(frozen=True)
class SampledFit:
    """A least-squares fit from samples, with its uncertainty."""

    B: Tensor  #: the fitted matrix, shape (m, d), float32
    standard_error: float  #: expected |B - B_limit| / |B| in Frobenius norm


def sampled_fit(
    function: Callable[[Tensor], Tensor],
    d: int,
    samples: int = 100_000,
    *,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> SampledFit:
    """Return the paper's fit of a matrix to a function of Gaussian inputs: least squares without intercept.

    B^T = (sum x x^T)^-1 sum x y^T over n inputs x ~ N(0, I_d), y = function(x), summed in float64, with
    E|B - B_limit|^2 = E[|x|^2 |y - B x|^2] / (n - 1) from 4,096 fresh ones: each sample moves B by about its
    residual times x^T / n, independently of the others.

    The function maps float32 inputs, shape (n, d), to outputs, shape (n, m), on a device. Inputs are drawn on
    the CPU, the same on every device; memory does not grow with their number.

    Raises:
        ParameterError: if there are too few samples, or the function answers NaN or infinity.

    Source: paper A (arXiv 2502.07004), the estimate of the FFN's linear model from 100,000 samples.
    """
    if samples <= d + 1:
        raise ParameterError(f"a fit in {d} dimensions needs more than {d + 1} samples, not {samples}")
    generator = torch.Generator().manual_seed(seed)

    @torch.no_grad()
    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, count, _SAMPLES_AT_ONCE):
            rows = min(_SAMPLES_AT_ONCE, count - start)
            X = torch.randn(rows, d, generator=generator).to(device)
            yield X, function(X).float()

    XX, XY = torch.zeros(d, d, dtype=torch.float64, device=device), 0.0
    for X, Y in batches(samples):
        XX += X.T @ X
        XY = XY + (X.T @ Y).double()
    if not torch.isfinite(XY).all():
        raise ParameterError("the function answered NaN or infinity: are the weights sound?")
    B = torch.cholesky_solve(XY, torch.linalg.cholesky(XX)).T.float().contiguous()
    size, [(X, Y)] = B.norm().item(), batches(_SAMPLES_AT_ONCE)
    spread = (X.square().sum(1) * (Y - X @ B.T).square().sum(1)).double().mean().item()
    error = math.sqrt(spread / (samples - 1)) / size if size > 0 else 0.0
    return SampledFit(B, error)
