"""One decoder layer as linear algebra sees it. Read this file first.

    x ──┬── norm ── attention ── post-norm ── * multiplier ── a ──┐
        │          (matrix, bias)                                 │
        └──────────────────── residual path ──────────────────────┴── y

    y ──┬── norm ──── FFN ────── post-norm ── * multiplier ── f ──┐
        │          (formula)                                      │
        └──────────────────── residual path ──────────────────────┴── output norm ── output

Every branch has a norm in most families; few have a post-norm (Gemma) or a multiplier (Granite). A parallel
layer (GPT-J, Falcon) gives x to both branches: x + a + f. The residual path is nearly always bare. In BERT it
passes the norm that the FFN reads, and an output norm; in Doge it has coefficients.

A `LayerView` holds this picture for one layer; its methods run the real modules. It comes about in three
steps:

1. `decoder.py` copies the layer out of the model in float32, so that it runs by itself and can be watched.
2. `watching.py` finds the parts, by what modules do and not by their names: what mixes tokens is attention;
   with the last linear map of both branches ablated, what is left of the layer is the residual path.
3. `reading.py` reads attention's matrix and the FFN's formula, the latter with what `matrices.py` says of
   each row of a matrix, and compares them with the real layer. What does not fit is not used. Layers that are
   built alike skip step 2, and are compared all the same.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.layers.decoder import IsolatedLayer


@dataclass(frozen=True)
class Norm:
    """An RMS norm or a LayerNorm: gain * (x - c mean(x)) / scale(x) + bias, with c = 1 if centred, else 0."""

    gain: Tensor  #: the diagonal of the linear part, shape (d,)
    bias: Tensor  #: the answer to a row whose normed value is zero, shape (d,)
    centred: bool  #: whether the mean is subtracted (LayerNorm) or not (RMS norm)
    epsilon: float  #: what is added to the mean square
    name: str  #: the module's name in the layer

    def scale(self, x: Tensor) -> Tensor:
        """sqrt(mean((x - c mean(x))^2) + epsilon), the divisor that depends on the data, (n, 1)."""
        return (self.centre(x).square().mean(-1, keepdim=True) + self.epsilon).sqrt()

    def centre(self, x: Tensor) -> Tensor:
        """The rows without their mean, if the norm subtracts it; shape (n, d) in and out."""
        return x - x.mean(-1, keepdim=True) if self.centred else x

    def linear(self, x: Tensor) -> Tensor:
        """The norm without its divisor, gain * (x - c mean(x)) + bias; shape (n, d) in and out."""
        return self.gain * self.centre(x) + self.bias

    def __call__(self, x: Tensor) -> Tensor:
        """The whole formula, on rows of shape (n, d)."""
        return self.gain * self.centre(x) / self.scale(x) + self.bias


@dataclass(frozen=True)
class BranchStructure:
    """Which submodules of a layer make up one of its branches, by name; "" where it has no such branch."""

    module: str = ""
    inputs: tuple[str, ...] = ()  # read the normed input; none where a gate stands behind the norm
    output: str = ""  # its output is the branch's, before post-norm and multiplier
    ablated: str = ""  # returning zeros, takes the branch out of the layer
    norm: str | None = None
    post_norm: str | None = None


Rows = tuple[str, Tensor | slice]  # rows of a linear map: its name and their numbers


@dataclass(frozen=True)
class Structure:
    """Where the parts of a layer are: names and row numbers, no weights: it fits layers built alike."""

    attention: BranchStructure
    ffn: BranchStructure
    parallel: bool  # both branches read the layer's input
    middle: str  # the submodule that reads y (x, if parallel)
    output_norm: str | None
    inner_norms: tuple[tuple[str, int], ...] = ()  # norms in attention's matrix by their gains, their sizes
    plain: bool = False  # the residual path is bare and all multipliers are 1
    # linear maps that read attention's input and, for each input of the projection behind the heads, which of
    # their stacked outputs it is for a token alone; None where values pass more than that
    values: tuple[tuple[str, ...], Tensor] | None = None
    gate: Rows | None = None  # what stands inside the FFN's activation
    up: Rows | None = None  # what the activation multiplies; None in a plain unit
    activation: str | None = None  # "layer:" and a path in the layer, or a name in transformers


@dataclass(frozen=True)
class Branch:
    """One branch, x -> multiplier * post_norm(module(norm(x))), and the residual path beside it."""

    norm: Norm | None
    post_norm: Norm | None
    multiplier: float | Tensor = 1.0  # in the sum; a number, or one for each coordinate, (d,)
    norm_on_residual: bool = False  # the residual stream passes `norm` too, as in layers that norm the sum
    residual_scale: float | Tensor = 1.0  # the residual stream's coefficient in the sum, of the same kind
    # error of matrix or formula on normed rows, relative to the module's output; None without one
    error: float | None = None

    def normed(self, x: Tensor) -> Tensor:
        """What the module reads; (n, d) in and out."""
        return x if self.norm is None else self.norm(x)

    def added(self, output: Tensor) -> Tensor:
        """What the branch adds where its module returned `output`; (n, d) in and out."""
        return self.multiplier * (output if self.post_norm is None else self.post_norm(output))

    def residual(self, x: Tensor) -> Tensor:
        """The residual stream that the branch is added to; (n, d) in and out."""
        return self.residual_scale * (self.normed(x) if self.norm_on_residual else x)


@dataclass(frozen=True)
class AttentionBranch(Branch):
    """Attention: for a token alone its module is u -> matrix u + bias."""

    matrix: Tensor | None = None  # W_O rep(W_V), (d, d); where it is none, the fit on Gaussian rows
    bias: Tensor | None = None  # (d,)
    inner_norms: tuple[Norm, ...] = ()  # in the value path (latent attention), in the matrix by their gains
    fit_residual: float | None = None  # what a least-squares fit left, relative to the module's answers
    error_far: float | None = None  # on sums and multiples of rows, where clips and sinks cannot hide
    error_basis: float | None = None  # on zero and on rows of the identity, where even these must agree

    def inner_scale(self, u: Tensor, real: Tensor) -> Tensor:
        """1 / k, shape (n, 1), with k (matrix u) nearest to real - bias; ones without inner norms."""
        if not self.inner_norms:  # a fitted matrix has them in it, divisors and all
            return torch.ones_like(u[:, :1])
        linear = u @ self.matrix.T
        return linear.square().sum(1, keepdim=True) / (linear * (real - self.bias)).sum(1, keepdim=True)


@dataclass(frozen=True)
class FFNFormula:
    """A feed-forward network down(phi(w u + b) [* (v u + c)]), one row of w (and v) for each inner unit."""

    w: Tensor  #: rows w_i, shape (f, d)
    b: Tensor | None  #: biases b_i, shape (f,)
    v: Tensor | None  #: rows v_i of a gated unit, shape (f, d)
    c: Tensor | None  #: biases c_i, shape (f,)
    activation: Callable[[Tensor], Tensor]  #: phi, element by element, in float32 and in float64
    down: Tensor  #: the matrix after the units, shape (d, f)
    down_bias: Tensor | None  #: its bias, shape (d,)

    def inner(self, u: Tensor) -> Tensor:
        """The inner units phi(w_i.u + b_i) [* (v_i.u + c_i)] of rows (n, d), shape (n, f)."""
        y = self.activation(nn.functional.linear(u, self.w, self.b))
        return y if self.v is None else y * nn.functional.linear(u, self.v, self.c)

    def __call__(self, u: Tensor) -> Tensor:
        """The whole network, down inner(u) + down_bias, on rows (n, d)."""
        return nn.functional.linear(self.inner(u), self.down, self.down_bias)


@dataclass(frozen=True)
class FFNBranch(Branch):
    """The feed-forward network."""

    formula: FFNFormula | None = None  # None where it is not recognised; one dead unit where there is no FFN


@dataclass(frozen=True)
class LayerView:
    """A decoder layer taken apart; see the picture above. All tensors are float32, on the layer's device."""

    isolated: IsolatedLayer  #: the float32 copy of the layer
    structure: Structure  #: which submodules are which
    attention: AttentionBranch  #: norms, multiplier, matrix, bias and their errors
    ffn: FFNBranch  #: norms, multiplier, formula and its error
    output_norm: Norm | None  #: the norm that the whole sum passes at the end (BERT), as a rule None
    error: float | None = None  #: of norms, multipliers and sum around the real modules, relative to a branch
    #: "exact"; "approximate" if attention is no exact matrix; "sampled" if the FFN has no formula
    status: str | None = None

    @property
    def number(self) -> int:
        """The layer's number, 1..L."""
        return self.isolated.number

    @property
    def hidden_size(self) -> int:
        """The width d of the residual stream."""
        return self.isolated.hidden_size

    @property
    def parallel(self) -> bool:
        """Whether the FFN reads the layer's input instead of the residual stream after attention."""
        return self.structure.parallel

    @property
    def plain_residual(self) -> bool:
        """Whether the residual stream passes untouched, so that the layer adds its branches to its input."""
        touched = (b.norm_on_residual or not is_one(b.residual_scale) for b in (self.attention, self.ffn))
        return self.output_norm is None and not any(touched)

    def attention_module(self, u: Tensor) -> Tensor:
        """The real attention on normed one-token rows, before post-norm and multiplier; (n, d) in and out."""
        where = self.structure.attention
        return self.isolated.feed(u, where.inputs, where.output, where.norm)

    def ffn_module(self, u: Tensor) -> Tensor:
        """The real FFN on normed rows, before post-norm and multiplier (zeros if there is none); (n, d)."""
        where = self.structure.ffn
        if not where.module:
            return torch.zeros_like(u)
        return self.isolated.feed(u, where.inputs, where.output, where.norm, self.structure.attention.module)

    def attention_branch(self, x: Tensor) -> Tensor:
        """What the real attention adds to one-token sequences, multiplier * post_norm(attention(norm(x)))."""
        return self.attention.added(self.attention_module(self.attention.normed(x)))

    def ffn_branch(self, x: Tensor) -> Tensor:
        """What the real FFN adds to the stream x that it reads, multiplier * post_norm(FFN(norm(x)))."""
        return self.ffn.added(self.ffn_module(self.ffn.normed(x)))

    def attention_residual(self, x: Tensor) -> Tensor:
        """The residual stream that attention is added to: x, its norm or a multiple; (n, d) in and out."""
        return self._residual(self.attention, x)

    def ffn_residual(self, y: Tensor) -> Tensor:
        """The residual stream that the FFN is added to: y, its norm or a multiple; (n, d) in and out."""
        return self._residual(self.ffn, y)

    def _residual(self, branch: Branch, x: Tensor) -> Tensor:
        # by the norm's module, not its formula: a branch of zeros leaves no rounding
        x = self.isolated.module(branch.norm.name)(x) if branch.norm_on_residual else x
        return branch.residual_scale * x

    def summed(self, x: Tensor, a: Tensor, f: Tensor) -> Tensor:
        """The output for inputs x if the branches add a and f, by the norms' formulas; (n, d) in and out."""
        attention, ffn = self.attention, self.ffn
        total = (ffn.residual(x) + a if self.parallel else ffn.residual(attention.residual(x) + a)) + f
        return total if self.output_norm is None else self.output_norm(total)

    def layer(self, x: Tensor) -> Tensor:
        """The real layer on one-token sequences; (n, d) in and out; differentiable."""
        return self.isolated.rows(x)


def is_one(coefficient: float | Tensor) -> bool:
    """Whether a coefficient is the number 1, and not one for each coordinate."""
    return not torch.is_tensor(coefficient) and coefficient == 1.0
