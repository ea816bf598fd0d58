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

_ROWS = 128  # of weights, multiplied at a time on a CPU: what its cache holds
_SMALLEST = 1e-15  # length of a row whose squares float32 holds, as it does those of 1e15
_UNITS = (
    2048,
    16384,
)  # inner units at a time where F is formed, on a CPU and on a GPU: B whole is as large as W
# Below this share of |b| the slope m1 / s would be a difference of nearly equal numbers; there it is taken at
# this width instead, which changes it by the order of the width's square.
_SMALLEST_SPREAD = 1e-5
_CHECK_SAMPLES = 4096  # fresh samples that measure a sampled fit's residuals

Number = float | Tensor


@dataclass(frozen=True)
class LinearLayer:
    """The linear model of one decoder layer for one token: attention x -> A x, FFN x -> F x.

    L = (I + F)(I + A), or I + A + F if parallel. Where the residual stream passes norms or has coefficients
    itself, L = T (S2 + F)(S1 + A), or T (S2 + A + F): in a layer norm2(y + f(y)), y = norm1(x + a(x)), as in
    BERT, that is diag(g2) (I + F') diag(g1) (I + A), with F = F' diag(g1) the FFN's matrix on the stream
    before the norm that it reads from.

    Args:
        A: attention's matrix, shape (d, d).
        F: the FFN's matrix, shape (d, d).
        parallel: whether attention and FFN read the same input.
        method: how the FFN was fitted, "closed_form" or "sampled".
        input_scale: the inputs it was fitted on, "paper" or "gain" (see `linear_layer`).
        standard_error: of the sampled fit, relative in Frobenius norm; None for the closed form.
        stream: S1, S2 and T, what the stream goes through beside attention, beside the FFN and at the end,
            shape (d, d) each; None where that is I everywhere, as nearly always.
    """

    A: Tensor
    F: Tensor
    parallel: bool
    method: str
    input_scale: str
    standard_error: float | None = None
    stream: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def R(self) -> Tensor:
        """L - I, shape (d, d): A + F + F A if serial, A + F if parallel; formed at each call."""
        if self.stream is not None:
            L = self.L
            L.diagonal().sub_(1)
            return L
        return self.A + self.F if self.parallel else add_product_(self.A + self.F, self.F, self.A)

    @property
    def L(self) -> Tensor:
        """The layer's matrix, shape (d, d): (I + F)(I + A), or I + A + F if parallel; formed at each call."""
        if self.stream is None:
            L = self.R
            L.diagonal().add_(1)
            return L
        S1, S2, T = self.stream
        return T @ (S2 + self.A + self.F if self.parallel else (S2 + self.F) @ (S1 + self.A))

    def norm_aware(
        self, rho1: Number, rho2: Number, stream_rho: tuple[Number, Number, Number] = (1.0, 1.0, 1.0)
    ) -> Tensor:
        """Return L_rho, the layer with the size of its input put back.

        L_rho = (I + F / rho2)(I + A / rho1), or I + A / rho1 + F / rho2 if parallel. The paper drops the
        divisors of the norms, which leaves only signs; this one predicts sizes. Where the stream passes norms
        itself, S1, S2 and T are divided by theirs.

        Args:
            rho1: the divisor in attention's branch for the token in question, from `branch_scales`.
            rho2: that in the FFN's branch.
            stream_rho: those on the stream, from `stream_scales`; ones where it passes no norm.

        Returns:
            L_rho, shape (d, d).
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

    Args:
        view: the layer.
        method: how to find B, "closed_form" or "sampled". An FFN whose formula is not recognised is always
            fitted from samples, as a whole.
        input_scale: the inputs to fit it on, "paper" or "gain".
        centre: put a LayerNorm's mean subtraction beside its gain; the paper leaves it out.
        samples: number of inputs of the sampled fit.
        seed: its seed.

    Returns:
        A, F and what they make.

    Raises:
        ParameterError: if the method or the input scale is unknown.

    Source: paper A (arXiv 2502.07004): I + R = (I + F)(I + A), and I + A + F for a parallel residual.
    """
    if method not in ("closed_form", "sampled") or input_scale not in ("paper", "gain"):
        raise ParameterError(
            "method is 'closed_form' or 'sampled' and input_scale 'paper' or 'gain', "
            f"not {method!r} and {input_scale!r}"
        )
    F, fit = _ffn_matrix(view, method, input_scale, centre, samples, seed)
    how, error = ("sampled", fit.standard_error) if fit else ("closed_form", None)
    A = attention_matrix(view, centre)
    return LinearLayer(A, F, view.parallel, how, input_scale, error, _stream(view, centre))


def apply_linear(linear: LinearLayer, view: LayerView, x: Tensor) -> Tensor:
    """Return what the linear model says of real inputs: L_rho x, each input with its own divisors.

    Args:
        linear: the layer's linear model.
        view: the layer, for the divisors.
        x: the layer's inputs, shape (n, d), on any device.

    Returns:
        The predicted outputs, shape (n, d), on the layer's device.
    """
    x = x.to(linear.A)
    rho1, rho2 = (rho[:, None] for rho in branch_scales(view, x))
    sides = zip(linear.stream or (None,) * 3, stream_scales(view, x), strict=True)
    S1, S2, T = (lambda x, S=S, rho=rho: x if S is None else x @ S.T / rho[:, None] for S, rho in sides)
    attention = x @ linear.A.T / rho1
    y = x if linear.parallel else S1(x) + attention
    return T(S2(y) + y @ linear.F.T / rho2 + (attention if linear.parallel else 0))


def attention_matrix(view: LayerView, centre: bool = False) -> Tensor:
    """Return A, what attention's branch adds to a lone token, without the norm's divisor.

    A = multiplier diag(g_post) W_O rep(W_V) diag(g1), the middle being the real module's answer to one-token
    sequences.

    Args:
        view: the layer.
        centre: put a LayerNorm's mean subtraction I - 1 1^T / d beside its gain; the paper leaves it out.

    Returns:
        A, shape (d, d).

    Source: paper A (arXiv 2502.07004), the linear model of the attention branch.
    """
    branch = view.attention
    return _branch_matrix(branch, branch.norm, branch.matrix.detach(), centre)


def attention_intercept(view: LayerView, rho: Number = 1.0) -> Tensor:
    """Return the constant that attention's branch adds beside A x, from its biases and those of its norms.

    multiplier (g_post (M beta + bias) / rho + beta_post), with M the module's matrix and beta the bias of the
    norm before it.

    Args:
        view: the layer.
        rho: the post-norm's divisor, a number or one for each of n inputs, shape (n, 1); dropped as in A if
            it is 1.

    Returns:
        the intercept, shape (d,) or (n, d); zero where nothing has a bias.
    """
    branch = view.attention
    constant, before, after = branch.bias.detach(), branch.norm, branch.post_norm
    if before is not None:
        constant = constant + branch.matrix.detach() @ before.bias
    if after is not None:
        constant = after.gain * constant / rho + after.bias
    return branch.multiplier * constant


def _ffn_matrix(
    view: LayerView, method: str, input_scale: str, centre: bool, samples: int, seed: int
) -> tuple[Tensor, SampledFit | None]:
    """Return F as `linear_layer` defines it, and the fit if it is sampled."""
    branch, formula = view.ffn, view.ffn.formula
    inside = branch.norm if input_scale == "gain" else None  # what the fit's inputs are scaled by
    if method == "closed_form" and formula is not None:
        fit, M = None, _closed_form_ffn(formula, inside, centre)
    else:
        module = view.ffn_module if formula is None else lambda x: formula.inner(x) @ formula.down.T

        def scaled_module(x: Tensor) -> Tensor:
            return module(x if inside is None else _diagonal_times(inside, x.T, centre).T + inside.bias)

        device = view.attention.matrix.device
        fit = sampled_fit(scaled_module, view.hidden_size, samples, seed=seed, device=device)
        M = fit.B
    return _branch_matrix(branch, None if inside else branch.norm, M, centre), fit


def _closed_form_ffn(formula: object, norm: Norm | None, centre: bool) -> Tensor:
    """Return W_down B, with B fitted at inputs scaled by a norm's gain and bias if one is given."""
    F = formula.down.new_zeros(len(formula.down), formula.w.shape[1])
    units = _UNITS[F.device.type != "cpu"]
    for start in range(0, len(formula.w), units):
        rows = slice(start, start + units)
        w, b, v, c = (
            None if t is None else t[rows].detach() for t in (formula.w, formula.b, formula.v, formula.c)
        )
        if norm is not None:
            (w, b), (v, c) = (_scaled_inputs(norm, centre, *pair) for pair in ((w, b), (v, c)))
        B = closed_form_fit(w, formula.activation, b, v, c)
        add_product_(F, formula.down[:, rows].detach(), B, weights=True)
    return F


def _scaled_inputs(
    norm: Norm, centre: bool, w: Tensor | None, b: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """Return w diag(g) and w beta + b: w x + b as a function of x where its input is g x + beta."""
    if w is None:
        return None, None
    return _times_diagonal(w, norm, centre), w @ norm.bias + (0 if b is None else b)


def _branch_matrix(branch: object, norm: Norm | None, M: Tensor, centre: bool) -> Tensor:
    """Return multiplier diag(g_post) M diag(g), with g of the norm that is given."""
    M = M if norm is None else _times_diagonal(M, norm, centre)
    M = M if branch.post_norm is None else _diagonal_times(branch.post_norm, M, centre)
    return _scaled_rows(branch.multiplier, M)


def _diagonal_times(norm: Norm, X: Tensor, centre: bool) -> Tensor:
    """Return diag(g) X, or diag(g) (I - 1 1^T / d) X, shape (d, k)."""
    return norm.gain[:, None] * (X - X.mean(0) if centre and norm.centred else X)


def _times_diagonal(X: Tensor, norm: Norm, centre: bool) -> Tensor:
    """Return X diag(g), or X diag(g) (I - 1 1^T / d), shape (k, d)."""
    X = X * norm.gain
    return X - X.mean(1, keepdim=True) if centre and norm.centred else X


def _scaled_rows(c: Number, X: Tensor) -> Tensor:
    """Return c X, or diag(c) X where c has a number for each row."""
    return torch.as_tensor(c).to(X).reshape(-1, 1) * X


def _stream(view: LayerView, centre: bool) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return S1, S2 and T: c diag(g) where the stream passes the branch's norm too, else c I."""
    if view.plain_residual:
        return None
    eye = torch.eye(view.hidden_size, device=view.attention.matrix.device)
    sides = [(b.norm if b.norm_on_residual else None, b.residual_scale) for b in (view.attention, view.ffn)]
    sides.append((view.output_norm, 1.0))
    return tuple(
        _scaled_rows(c, eye if norm is None else _diagonal_times(norm, eye, centre)) for norm, c in sides
    )


def branch_scales(view: LayerView, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the norms of each branch divide real inputs by.

    rho1 and rho2: the root mean square (the standard deviation if the norm is centred) that the branch's norm
    meets, times that which its post-norm meets, and for rho1 times that of a norm inside the value path
    (latent attention).

    Args:
        view: the layer.
        x: the layer's inputs, shape (n, d), on any device.

    Returns:
        rho1 for the attention branch and rho2 for the FFN branch, shape (n,) each, on the layer's device; 1
        where there is no norm.
    """
    attention, ffn = view.attention, view.ffn
    x = x.to(attention.matrix)
    with torch.no_grad():
        inner = _normed(attention.norm, x)
        rho1 = _divisor(attention.norm, x) * view.attention_inner_scale(inner)[:, 0]
        if attention.post_norm is not None:
            rho1 = rho1 * _divisor(attention.post_norm, view.attention_module(inner))
        y = x if view.parallel else view.attention_residual(x) + view.attention_branch(x)
        rho2 = _divisor(ffn.norm, y)
        if ffn.post_norm is not None:
            rho2 = rho2 * _divisor(ffn.post_norm, view.ffn_module(_normed(ffn.norm, y)))
    return rho1, rho2


def stream_scales(view: LayerView, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return what the norms that the residual stream itself passes divide real inputs by.

    Args:
        view: the layer.
        x: the layer's inputs, shape (n, d), on any device.

    Returns:
        The divisors of the norm on the stream beside attention, of that beside the FFN and of that at the end
        of the layer, shape (n,) each, on the layer's device; ones where there is none, as nearly always.
    """
    x = x.to(view.attention.matrix)
    one = x.new_ones(len(x))
    if view.plain_residual:
        return one, one, one
    with torch.no_grad():
        a = view.attention_branch(x)
        y = x if view.parallel else view.attention_residual(x) + a
        end = view.ffn_residual(y) + view.ffn_branch(y) + (a if view.parallel else 0)
    sides = ((view.attention, x), (view.ffn, y))
    first, second = (
        _divisor(branch.norm, rows) if branch.norm_on_residual else one for branch, rows in sides
    )
    return first, second, _divisor(view.output_norm, end)


def _divisor(norm: Norm | None, x: Tensor) -> Tensor:
    """Return what a norm divides rows by, shape (n,); ones without a norm."""
    return x.new_ones(len(x)) if norm is None else norm.scale(x)[:, 0]


def _normed(norm: Norm | None, x: Tensor) -> Tensor:
    """Return normed rows, shape (n, d); the rows themselves without a norm."""
    return x if norm is None else norm(x)


def closed_form_fit(
    w: Tensor,
    activation: Activation,
    b: Tensor | None = None,
    v: Tensor | None = None,
    c: Tensor | None = None,
) -> Tensor:
    """Return B, the matrix that fits the inner units of an FFN best over Gaussian inputs.

    B = argmin E|y(x) - B x|^2 = E[y x^T] for x ~ N(0, I_d), with y_i = phi(w_i.x + b_i) or, gated,
    y_i = phi(w_i.x + b_i) (v_i.x + c_i). This is the matrix that the paper estimates from 100,000 samples.
    With s = |w_i| and the moments m0, m1, m2 of `gaussian_moments`, its row i is

        plain: (m1 / s) w_i
        gated: ((w_i.v_i / s^2) m2 + (c_i / s) m1) w_i + m0 v_i

    and in the limit s -> 0 (a dead unit) 0 or phi(b_i) v_i.

    Args:
        w: weights inside the activation, shape (f, d).
        activation: elementwise function phi that takes float64.
        b: biases inside the activation, shape (f,).
        v: weights of the factor outside the activation, shape (f, d); None for a plain unit.
        c: biases of that factor, shape (f,).

    Returns:
        B, shape (f, d), float64 where w is, float32 otherwise.

    Raises:
        ParameterError: if the shapes do not belong together.

    Source: paper A (arXiv 2502.07004), the FFN's linear model; closed form by Stein's lemma.
    """
    shapes = [None if t is None else tuple(t.shape) for t in (w, b, v, c)]
    if w.dim() != 2 or shapes[1] not in (None, shapes[0][:1]) or shapes[2] not in (None, shapes[0]):
        raise ParameterError(f"w and v must be of one shape (f, d), b of shape (f,); w, b, v, c are {shapes}")
    if c is not None and (v is None or shapes[3] != shapes[0][:1]):
        raise ParameterError(f"c must have shape (f,) and belongs to v; w, b, v, c are {shapes}")
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
    """A least-squares fit from samples, with its uncertainty.

    Args:
        B: the fitted matrix, shape (m, d), float32.
        standard_error: expected |B - B_limit| / |B| in Frobenius norm.
        samples: how many inputs were drawn for the fit.
        seed: of the generator that drew them.
    """

    B: Tensor
    standard_error: float
    samples: int
    seed: int


def sampled_fit(
    function: Callable[[Tensor], Tensor],
    d: int,
    samples: int = 100_000,
    *,
    seed: int = 0,
    chunk: int = 4096,
    device: str | torch.device = "cpu",
) -> SampledFit:
    """Fit a matrix to a function of Gaussian inputs by least squares without intercept: the paper's way.

    B^T = (sum x x^T)^-1 sum x y^T over x ~ N(0, I_d), y = function(x), streamed through the normal equations:
    chunks are multiplied in float32 and added up in float64, so memory does not grow with the number of
    samples. Inputs are drawn on the CPU, so that one seed means the same samples on every device.

    The standard error follows from the spread of the residuals r = y - B x over 4,096 fresh samples. Each
    sample moves B by about r x^T / n, independently of the others, hence E|B - B_limit|^2 = E[|x|^2 |r|^2] /
    (n - 1): the inverse of a random matrix of moments makes n into n - d - 1, and the residuals' own excess
    over those of the limit undoes it.

    Args:
        function: maps float32 inputs, shape (n, d), to outputs, shape (n, m).
        d: size of the inputs.
        samples: number of inputs, more than d + 1.
        seed: seed of the inputs.
        chunk: inputs held in memory at a time.
        device: where the function runs.

    Returns:
        the fit.

    Raises:
        ParameterError: if there are too few samples, the chunk is not positive, or the function answers NaN
            or infinity.

    Source: paper A (arXiv 2502.07004), the estimate of the FFN's linear model from 100,000 samples.
    """
    if samples <= d + 1 or chunk < 1:
        raise ParameterError(
            f"a fit in {d} dimensions needs more than {d + 1} samples and a positive chunk, "
            f"not samples={samples}, chunk={chunk}"
        )
    generator = torch.Generator().manual_seed(seed)

    def batches(count: int) -> Iterator[tuple[Tensor, Tensor]]:
        for start in range(0, count, chunk):
            X = torch.randn(min(chunk, count - start), d, generator=generator).to(device)
            with torch.no_grad():
                yield X, function(X).float()

    XX, XY = torch.zeros(d, d, dtype=torch.float64, device=device), 0.0
    for X, Y in batches(samples):
        XX += X.T @ X
        XY = XY + (X.T @ Y).double()
    if not torch.isfinite(XY).all():
        raise ParameterError(
            "the function answered NaN or infinity to Gaussian inputs: are the weights sound?"
        )
    B = torch.cholesky_solve(XY, torch.linalg.cholesky(XX)).T.float().contiguous()
    size, spread = B.norm().item(), 0.0
    for X, Y in batches(_CHECK_SAMPLES):
        spread += (X.square().sum(1) * (Y - X @ B.T).square().sum(1)).double().sum().item() / _CHECK_SAMPLES
    error = math.sqrt(spread / (samples - 1)) / size if size > 0 else 0.0
    return SampledFit(B, error, samples, seed)
