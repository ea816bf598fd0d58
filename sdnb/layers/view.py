"""One decoder layer as linear algebra sees it, read off the real modules and checked against them."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import SimpleNamespace

from torch import Tensor

from sdnb.layers.attention import AttentionMatrix
from sdnb.layers.check import Errors
from sdnb.layers.experts import find_expert
from sdnb.layers.ffn import FFNFormula
from sdnb.layers.norms import Norm
from sdnb.layers.parts import Wiring, branch_output, module_output
from sdnb.layers.probe import LayerProbe


class _FFN(SimpleNamespace):
    """The FFN's branch, which for a while has its formula's fields too."""

    def __getattr__(self, name: str) -> object:
        return getattr(vars(self)["formula"], name)

    def __call__(self, x: Tensor) -> Tensor:
        return self.formula(x)


@dataclass(frozen=True)
class LayerView:
    """A decoder layer: x + a(x) + f(x + a(x)), or x + a(x) + f(x) if parallel, with each branch taken apart.

    Each branch is multiplier * post_norm(module(norm(x))). In some families the residual stream does not pass
    untouched: then y = beside_attention(x) + a(x) and the output is closing(beside_ffn(y) + f(y)). All
    tensors are float32, on the layer's device.

    Args:
        probe: the float32 copy of the layer that is watched.
        wiring: branches, norms, multipliers, serial or parallel.
        affine: attention's matrix and bias, without any norm's gain.
        formula: the feed-forward formula; None if it is not recognised and has to be sampled.
        errors: what the check measured.
        status: "exact"; "approximate" if attention is no exact matrix (clips, sinks, gates); "sampled" if the
            feed-forward formula is not recognised; "refused" only where the check was told not to raise.
        only: the one expert that stands for the FFN, from `of_expert`; None as a rule.
    """

    probe: LayerProbe
    wiring: Wiring
    affine: AttentionMatrix
    formula: FFNFormula | None
    errors: Errors
    status: str
    only: Callable[[Tensor], Tensor] | None = None

    @property
    def number(self) -> int:
        """The layer's number, 1..L."""
        return self.probe.number

    @property
    def hidden_size(self) -> int:
        """The width d of the residual stream."""
        return self.probe.hidden_size

    @property
    def parallel(self) -> bool:
        """Whether the FFN reads the layer's input instead of the residual stream after attention."""
        return self.wiring.parallel

    @property
    def attention(self) -> SimpleNamespace:
        """Attention's branch (for a while a namespace; see `sdnb.layers` for its fields)."""
        branch, affine = self.wiring.attention, self.affine
        return SimpleNamespace(
            name=branch.name, norm=branch.norm, post_norm=branch.post_norm, multiplier=branch.multiplier,
            norm_on_residual=branch.on_stream, residual_scale=branch.skip, matrix=affine.matrix,
            bias=affine.bias, inner_norms=affine.inner_norms, fit_residual=affine.residual,
            error=self.errors.attention, error_far=self.errors.linearity,
        )  # fmt: skip

    @property
    def ffn(self) -> "_FFN":
        """The FFN's branch (for a while a namespace)."""
        branch = self.wiring.ffn
        return _FFN(
            name=branch.name, norm=branch.norm, post_norm=branch.post_norm, multiplier=branch.multiplier,
            norm_on_residual=branch.on_stream, residual_scale=branch.skip, formula=self.formula,
            error=self.errors.ffn,
        )  # fmt: skip

    @property
    def error(self) -> float:
        """The layer's error."""
        return self.errors.layer

    @property
    def output_norm(self) -> Norm | None:
        """The norm that the sum of all passes at the end of the layer (BERT), as a rule None."""
        return self.wiring.closing

    @property
    def plain_residual(self) -> bool:
        """Whether the layer adds its branches to its input, which itself passes untouched."""
        return self.wiring.plain

    def attention_residual(self, x: Tensor) -> Tensor:
        """The residual stream that attention is added to, shape (n, d)."""
        return self.wiring.attention.beside(x)

    def ffn_residual(self, y: Tensor) -> Tensor:
        """The residual stream that the FFN is added to, shape (n, d)."""
        return self.wiring.ffn.beside(y)

    def expert(self, number: int) -> "LayerView":
        """The same layer with one expert of its mixture in the FFN's place."""
        return self.of_expert(number)

    @property
    def attention_matrix(self) -> Tensor:
        """W_O rep(W_V), shape (d, d): attention on one-token sequences, without bias and without gains.

        Where attention is no matrix (gates, sinks, clips) it is the least-squares fit on Gaussian rows.
        """
        return self.affine.matrix

    @property
    def attention_bias(self) -> Tensor:
        """Attention's answer to zero, shape (d,)."""
        return self.affine.bias

    @property
    def attention_inner_norms(self) -> tuple[Norm, ...]:
        """Norms inside attention that are in the matrix by their gains alone (latent attention)."""
        return self.affine.inner_norms

    @property
    def attention_norm(self) -> Norm | None:
        """The norm before attention."""
        return self.wiring.attention.norm

    @property
    def attention_post_norm(self) -> Norm | None:
        """The norm between attention and the residual stream."""
        return self.wiring.attention.post_norm

    @property
    def attention_multiplier(self) -> float | Tensor:
        """The coefficient of attention in the layer's sum."""
        return self.wiring.attention.multiplier

    @property
    def ffn_norm(self) -> Norm | None:
        """The norm before the FFN."""
        return self.wiring.ffn.norm

    @property
    def ffn_post_norm(self) -> Norm | None:
        """The norm between the FFN and the residual stream."""
        return self.wiring.ffn.post_norm

    @property
    def ffn_multiplier(self) -> float | Tensor:
        """The coefficient of the FFN in the layer's sum."""
        return self.wiring.ffn.multiplier

    @property
    def closing_norm(self) -> Norm | None:
        """The norm that the sum of all passes at the end of the layer (BERT), as a rule None."""
        return self.wiring.closing

    @property
    def plain_stream(self) -> bool:
        """Whether the layer adds its branches to its input, which itself passes untouched."""
        return self.wiring.plain

    @property
    def norms_on_stream(self) -> tuple[bool, bool]:
        """Whether the residual stream passes attention's norm too, and the FFN's."""
        return self.wiring.attention.on_stream, self.wiring.ffn.on_stream

    @property
    def skips(self) -> tuple[float | Tensor, float | Tensor]:
        """The stream's coefficients in the sums with attention and with the FFN, as a rule 1."""
        return self.wiring.attention.skip, self.wiring.ffn.skip

    @property
    def attention_error(self) -> float:
        """Matrix and bias against the real module, relative to its output, on normed rows of real length."""
        return self.errors.attention

    @property
    def ffn_error(self) -> float | None:
        """The formula against the real FFN, relative to its output; None without a formula."""
        return self.errors.ffn

    @property
    def layer_error(self) -> float:
        """Norms, multipliers and sum around the real modules against the real layer, relative to a branch."""
        return self.errors.layer

    def attention_module(self, u: Tensor) -> Tensor:
        """The real attention module on normed one-token sequences.

        Args:
            u: normed rows, shape (n, d).

        Returns:
            Its output before post-norm and multiplier, shape (n, d).
        """
        return module_output(self.probe, self.wiring.attention, u)

    def attention_inner_scale(self, u: Tensor) -> Tensor:
        """The divisor, depending on the data, of the norms inside attention's value path.

        Args:
            u: normed rows, shape (n, d).

        Returns:
            s with attention(u) = attention_matrix u / s + attention_bias, shape (n, 1); ones as a rule.
        """
        return self.affine.inner_scale(u, self.attention_module(u))

    def ffn_module(self, u: Tensor) -> Tensor:
        """The real feed-forward network on normed rows.

        Args:
            u: normed rows, shape (n, d).

        Returns:
            Its output before post-norm and multiplier, shape (n, d).
        """
        if self.only is not None:
            return self.only(u)
        return module_output(self.probe, self.wiring.ffn, u, self.wiring.stand_in)

    def of_expert(self, number: int) -> "LayerView":
        """The same layer with one expert of its mixture, with weight 1, in the FFN's place.

        Its linear fit, from samples as that of the whole mixture, is the F of this expert.

        Args:
            number: the expert, from 0 as the router counts.

        Returns:
            The view; `layer` and `ffn_branch` remain those of the real layer with all its experts.
        """
        return replace(self, only=find_expert(self.probe, self.wiring, number))

    def attention_branch(self, x: Tensor) -> Tensor:
        """What attention adds to one-token sequences, on the real modules; differentiable.

        Args:
            x: hidden states, shape (n, d).

        Returns:
            multiplier * post_norm(attention(norm(x))), shape (n, d).
        """
        return branch_output(self.probe, self.wiring.attention, x)

    def ffn_branch(self, x: Tensor) -> Tensor:
        """What the FFN adds to the residual stream that it reads, on the real modules; differentiable.

        Args:
            x: hidden states (after attention, in a serial layer), shape (n, d).

        Returns:
            multiplier * post_norm(FFN(norm(x))), shape (n, d).
        """
        return branch_output(self.probe, self.wiring.ffn, x, self.wiring.stand_in)

    def beside_attention(self, x: Tensor) -> Tensor:
        """The residual stream that attention is added to: x itself, or its norm or a multiple of it.

        Args:
            x: hidden states, shape (n, d).

        Returns:
            Shape (n, d).
        """
        return self.wiring.attention.beside(x)

    def beside_ffn(self, y: Tensor) -> Tensor:
        """The residual stream that the FFN is added to: y itself, or its norm or a multiple of it.

        Args:
            y: the stream after attention (the layer's input, if parallel), shape (n, d).

        Returns:
            Shape (n, d).
        """
        return self.wiring.ffn.beside(y)

    def layer(self, x: Tensor) -> Tensor:
        """The real layer on one-token sequences; differentiable.

        Args:
            x: hidden states, shape (n, d).

        Returns:
            The layer's output, shape (n, d).
        """
        return self.probe.rows(x)
