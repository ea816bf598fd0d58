"""The matrices of a layer's two branches, A and F, with the gains and multipliers around them."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdnb.errors import ParameterError
from sdnb.linearize.closed_form import closed_form_coefficients
from sdnb.linearize.operator import Operator, Stream, dense, diagonal_operator
from sdnb.linearize.sampled import SampledFit, sampled_fit
from sdnb.products import add_product_

if TYPE_CHECKING:
    from sdnb.layers import FFNFormula, LayerView, Norm

_UNITS, _UNITS_GPU = 4096, 16384  # inner units at a time where F is formed


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
    M = view.attention_matrix.detach()
    M = _scaled(view.attention_post_norm, centre, _scaled_transposed(view.attention_norm, centre, M.T).T)
    return _times(view.attention_multiplier, M)


def attention_intercept(view: LayerView, rho: float | Tensor = 1.0) -> Tensor:
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
    constant, before, after = view.attention_bias.detach(), view.attention_norm, view.attention_post_norm
    if before is not None:
        constant = constant + view.attention_matrix.detach() @ before.bias.to(constant)
    if after is not None:
        constant = after.gain.to(constant) * constant / rho + after.bias.to(constant)
    return view.attention_multiplier * constant


def stream_operators(view: LayerView, centre: bool = False) -> Stream:
    """Return what the residual stream goes through beside attention, beside the FFN and at the end.

    S = skip diag(g) where the branch's norm is on the stream, else skip I; T = diag(g) of the closing norm.
    Norms enter by their gains, without the divisor that depends on the data, as they do in A and F.

    Args:
        view: the layer.
        centre: put a LayerNorm's mean subtraction beside its gain; the paper leaves it out.

    Returns:
        S1, S2 and T, each None where it is I; nearly always all three.
    """
    if view.plain_stream:
        return None, None, None
    on_stream = (*view.norms_on_stream, True)
    parts = []
    norms = (view.attention_norm, view.ffn_norm, view.closing_norm)
    for norm, passed, skip in zip(norms, on_stream, (*view.skips, 1.0), strict=True):
        norm = norm if passed else None
        gain = torch.ones_like(view.attention_bias) if norm is None else norm.gain.to(view.attention_bias)
        identity = norm is None and not torch.is_tensor(skip) and skip == 1.0
        centred = centre and norm is not None and norm.centred
        parts.append(None if identity else diagonal_operator(skip * gain, centred))
    return tuple(parts)


def ffn_matrix(
    view: LayerView,
    method: str = "closed_form",
    input_scale: str = "paper",
    centre: bool = False,
    samples: int = 100_000,
    seed: int = 0,
) -> Tensor:
    """Return F, the linear model of what the FFN's branch adds, without the norm's divisor.

    F = multiplier diag(g_post) W_down B diag(g2), B the least-squares fit of the inner units. With
    input_scale="paper" B is fitted at x ~ N(0, I) after the gain; with "gain" at g2 x + beta2, as real inputs
    are scaled, and F = multiplier diag(g_post) W_down B. An FFN without a recognised formula is always fitted
    as a whole, from samples.

    Args:
        view: the layer.
        method: "closed_form", or "sampled" as in the paper.
        input_scale: "paper" or "gain".
        centre: put a LayerNorm's mean subtraction beside its gain; the paper leaves it out.
        samples: number of inputs of the sampled fit.
        seed: its seed.

    Returns:
        F, shape (d, d).

    Source: paper A (arXiv 2502.07004), the linear model of the FFN branch.
    """
    return dense(fit_ffn(view, method, input_scale, centre, samples, seed)[0])


def fit_ffn(
    view: LayerView, method: str, input_scale: str, centre: bool, samples: int, seed: int
) -> tuple[Tensor | Operator, SampledFit | None]:
    """Return F as `ffn_matrix` defines it, an operator where it has a closed form, and a sampled one's fit.

    Args:
        view: the layer.
        method: "closed_form" or "sampled".
        input_scale: "paper" or "gain".
        centre: put a LayerNorm's mean subtraction beside its gain.
        samples: number of inputs of the sampled fit.
        seed: its seed.

    Returns:
        F, an operator or, if sampled, a tensor of shape (d, d); and the sampled fit or None.

    Raises:
        ParameterError: if the method or the input scale is unknown.
    """
    if method not in ("closed_form", "sampled") or input_scale not in ("paper", "gain"):
        raise ParameterError(
            "method is 'closed_form' or 'sampled' and input_scale 'paper' or 'gain', "
            f"not {method!r} and {input_scale!r}"
        )
    if method == "closed_form" and _formula(view) is not None:
        return _closed_form_operator(view, input_scale, centre), None
    formula = _formula(view)
    module = view.ffn_module if formula is None else lambda x: formula.inner(x) @ formula.down.T
    norm = view.ffn_norm

    def scaled_module(x: Tensor) -> Tensor:
        return module(_scaled(norm, centre, x.T).T + (0.0 if norm is None else norm.bias.to(x)))

    fit = sampled_fit(
        module if input_scale == "paper" else scaled_module,
        view.hidden_size,
        samples,
        seed=seed,
        device=view.attention_matrix.device,
    )
    M = fit.B.T if input_scale == "gain" else _scaled_transposed(norm, centre, fit.B.T)
    return _times(view.ffn_multiplier, _scaled(view.ffn_post_norm, centre, M.T)), fit


def _closed_form_operator(view: LayerView, input_scale: str, centre: bool) -> Operator:
    """Return F = multiplier diag(g_post) W_down (diag(alpha) W + diag(mu) V) [diag(g2)] as an operator."""
    formula, norm, post = _formula(view), view.ffn_norm, view.ffn_post_norm
    down, W, V, b, c = (
        None if t is None else t.detach() for t in (formula.down, formula.w, formula.v, formula.b, formula.c)
    )
    if input_scale == "gain" and norm is not None:
        b, c = (
            None if M is None else M @ norm.bias.to(M) + (0.0 if bias is None else bias)
            for M, bias in ((W, b), (V, c))
        )
        W, V = (None if M is None else _scaled_transposed(norm, centre, M.T).T.contiguous() for M in (W, V))
        norm = None
    alpha, mu = (
        None if t is None else t[:, None] for t in closed_form_coefficients(W, formula.activation, b, V, c)
    )

    def apply(X: Tensor) -> Tensor:
        Y = _scaled(norm, centre, X)
        inner = alpha * (W @ Y) if V is None else alpha * (W @ Y) + mu * (V @ Y)
        return _times(view.ffn_multiplier, _scaled(post, centre, down @ inner))

    def apply_transposed(X: Tensor) -> Tensor:
        inner = down.T @ _scaled_transposed(post, centre, _times(view.ffn_multiplier, X))
        Y = W.T @ (alpha * inner) if V is None else W.T @ (alpha * inner) + V.T @ (mu * inner)
        return _scaled_transposed(norm, centre, Y)

    def form() -> Tensor:
        M = torch.zeros(down.shape[0], W.shape[1], dtype=down.dtype, device=down.device)
        at_once = _UNITS if down.device.type == "cpu" else _UNITS_GPU
        for start in range(0, len(W), at_once):  # B whole would be as large as W
            rows = slice(start, start + at_once)
            B = alpha[rows] * W[rows] if V is None else (alpha[rows] * W[rows]).addcmul_(mu[rows], V[rows])
            add_product_(M, down[:, rows], B, weights=True)
        M = _scaled(post, centre, _scaled_transposed(norm, centre, M.T).T)
        return _times(view.ffn_multiplier, M)

    return Operator(apply, apply_transposed, like=down, size=down.shape[0], form=form)


def _scaled(norm: Norm | None, centre: bool, X: Tensor) -> Tensor:
    """Return diag(g) X, or diag(g) (I - 1 1^T / d) X, for columns X of shape (d, k)."""
    if norm is None:
        return X
    X = X - X.mean(0) if centre and norm.centred else X
    return norm.gain.to(X)[:, None] * X


def _scaled_transposed(norm: Norm | None, centre: bool, X: Tensor) -> Tensor:
    """Return diag(g) X, or (I - 1 1^T / d) diag(g) X, for columns X of shape (d, k)."""
    if norm is None:
        return X
    X = norm.gain.to(X)[:, None] * X
    return X - X.mean(0) if centre and norm.centred else X


def _times(c: float | Tensor, X: Tensor) -> Tensor:
    """Return c X, or diag(c) X where a multiplier has a number for each coordinate; X is (d, k)."""
    return c[:, None] * X if isinstance(c, Tensor) else c * X


def _formula(view: LayerView) -> FFNFormula | None:
    """Return the FFN's formula, or None where it is not recognised."""
    return getattr(view.ffn, "formula", view.ffn)
