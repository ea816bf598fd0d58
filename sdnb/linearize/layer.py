"""A decoder layer as a matrix: attention A, FFN F, and the layer L that they make."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdnb.linearize.branches import attention_matrix, fit_ffn, stream_operators
from sdnb.linearize.operator import (
    PLAIN,
    Operator,
    Stream,
    dense,
    product_operator,
    scaled_operator,
    sum_operator,
)
from sdnb.products import add_product_

if TYPE_CHECKING:
    from sdnb.layers import LayerView, Norm


@dataclass(frozen=True)
class LinearLayer:
    """The linear model of one decoder layer for one token: attention x -> A x, FFN x -> F x.

    L = (I + F)(I + A), or I + A + F if parallel. Where the residual stream passes norms or has coefficients
    itself, L = T (S2 + F)(S1 + A), or T (S2 + A + F), with the diagonal matrices of `stream_operators`: in a
    layer norm2(y + f(y)), y = norm1(x + a(x)), as in BERT, that is diag(g2) (I + F') diag(g1) (I + A), with
    F = F' diag(g1) the FFN's matrix on the stream before the norm that it reads from.

    Args:
        A: attention's matrix, shape (d, d).
        F: the FFN's matrix, shape (d, d), or an operator where it was asked not to be formed.
        parallel: whether attention and FFN read the same input.
        method: how the FFN was fitted, "closed_form" or "sampled".
        input_scale: the inputs it was fitted on, "paper" or "gain" (see `ffn_matrix`).
        standard_error: of the sampled fit, relative in Frobenius norm; None for the closed form.
        stream: S1, S2 and T, what the stream goes through beside attention, beside the FFN and at the end;
            None where it is I, as nearly always.
    """

    A: Tensor
    F: Tensor | Operator
    parallel: bool
    method: str
    input_scale: str
    standard_error: float | None = None
    stream: Stream = PLAIN

    @property
    def R(self) -> Tensor:
        """L - I, shape (d, d): A + F + F A if serial, A + F if parallel; formed at each call."""
        F = dense(self.F)
        if self.stream != PLAIN:
            formed = replace(self, F=F).operator.dense()
            formed.diagonal().sub_(1)
            return formed
        return self.A + F if self.parallel else add_product_(self.A + F, F, self.A)

    @property
    def L(self) -> Tensor:
        """The layer's matrix, shape (d, d): (I + F)(I + A), or I + A + F if parallel; formed at each call."""
        return _plus_identity(self.R)

    @property
    def operator(self) -> Operator:
        """L as an operator: products with A and F, nothing formed."""
        return (sum_operator if self.parallel else product_operator)(self.A, self.F, self.stream)

    def norm_aware(
        self,
        rho1: float | Tensor,
        rho2: float | Tensor,
        stream_rho: tuple[float | Tensor, float | Tensor, float | Tensor] = (1.0, 1.0, 1.0),
    ) -> Tensor:
        """Return L_rho, the layer with the size of its input put back.

        L_rho = (I + F / rho2)(I + A / rho1), or I + A / rho1 + F / rho2 if parallel. The paper drops the
        divisors of the norms, which leaves only signs; this one predicts sizes. Where the stream passes norms
        itself, S1, S2 and T are divided by theirs.

        Args:
            rho1: the divisors in attention's branch for the token in question, from `branch_scales`.
            rho2: those in the FFN's branch.
            stream_rho: those on the stream, from `stream_scales`; ones where it passes no norm.

        Returns:
            L_rho, shape (d, d).
        """
        stream = tuple(
            S if S is None else scaled_operator(S, 1 / rho)
            for S, rho in zip(self.stream, stream_rho, strict=True)
        )
        return replace(self, A=self.A / rho1, F=dense(self.F) / rho2, stream=stream).L


def linear_layer(
    view: LayerView,
    *,
    method: str = "closed_form",
    input_scale: str = "paper",
    centre: bool = False,
    samples: int = 100_000,
    seed: int = 0,
    form: bool = True,
) -> LinearLayer:
    """Return the linear model of a decoder layer.

    Args:
        view: the layer.
        method: how to fit the FFN, "closed_form" or "sampled"; an unrecognised FFN is always sampled.
        input_scale: the inputs to fit it on, "paper" or "gain" (see `ffn_matrix`).
        centre: put a LayerNorm's mean subtraction beside its gain; the paper leaves it out.
        samples: number of inputs of the sampled fit.
        seed: its seed.
        form: form F; if False a closed-form F stays an operator, which saves its memory and the 2 d^2 f
            operations of forming it, but each product of a gated F takes 3 f / d times as many.

    Returns:
        A, F and what they make.

    Source: paper A (arXiv 2502.07004): I + R = (I + F)(I + A), and I + A + F for a parallel residual.
    """
    F, fit = fit_ffn(view, method, input_scale, centre, samples, seed)
    return LinearLayer(
        attention_matrix(view, centre),
        dense(F) if form else F,
        view.parallel,
        "sampled" if fit else "closed_form",
        input_scale,
        fit.standard_error if fit else None,
        stream_operators(view, centre),
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
    x = x.to(view.attention_matrix)
    with torch.no_grad():
        inner = x if view.attention_norm is None else view.attention_norm.module(x)
        rho1 = _divisor(view.attention_norm, x) * view.attention_inner_scale(inner)[:, 0]
        if view.attention_post_norm is not None:
            rho1 = rho1 * _divisor(view.attention_post_norm, view.attention_module(inner))
        y = x if view.parallel else view.beside_attention(x) + view.attention_branch(x)
        rho2 = _divisor(view.ffn_norm, y)
        if view.ffn_post_norm is not None:
            inner = y if view.ffn_norm is None else view.ffn_norm.module(y)
            rho2 = rho2 * _divisor(view.ffn_post_norm, view.ffn_module(inner))
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
    x = x.to(view.attention_matrix)
    one = x.new_ones(len(x))
    if view.plain_stream:
        return one, one, one
    with torch.no_grad():
        a = view.attention_branch(x)
        y = x if view.parallel else view.beside_attention(x) + a
        end = view.beside_ffn(y) + view.ffn_branch(y) + (a if view.parallel else 0)
    sides = ((view.attention_norm, view.norms_on_stream[0], x), (view.ffn_norm, view.norms_on_stream[1], y))
    first, second = (_divisor(norm, rows) if on_stream else one for norm, on_stream, rows in sides)
    return first, second, _divisor(view.closing_norm, end)


def _divisor(norm: Norm | None, x: Tensor) -> Tensor:
    """Return what a norm divides rows by, shape (n,); ones without a norm."""
    return x.new_ones(len(x)) if norm is None else norm.scale(x)[:, 0]


def _plus_identity(M: Tensor) -> Tensor:
    """Return I + M, in place."""
    M.diagonal().add_(1)
    return M
