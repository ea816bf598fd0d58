"""Round-to-nearest quantization of every linear module, simulated with the arithmetic of the real thing.

A module's answer is y = s_x s_W (X W^T) + b, X and W numbers of the format, their product exact
(`quantized_product`) and scaled once. The weights stay where they are: only `forward` is replaced, inside a
context manager.
"""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.anatomy import decoder_layers
from sdnb.anatomy.calls import Call, replaced_forward
from sdnb.errors import ParameterError
from sdnb.quantize.integers import absmax_scale, check_format, quantize, quantized_product
from sdnb.quantize.linears import LinearModule, linear_modules
from sdnb.quantize.smoothquant import smoothing_factors
from sdnb.quantize.statistics import InputStatistics


@dataclass(frozen=True)
class Scheme:
    """How weights and inputs of the linear modules are quantized; symmetric, round to nearest.

    Args:
        number_format: "int8" or "float8_e4m3", for weights and inputs.
        weights: "tensor" (one scale) or "channel" (one for each output).
        inputs: "tensor" (one scale for a sequence, or for everything when static) or "token".
        static: input scales are fixed beforehand from the statistics of a calibration text; otherwise each
            scale comes from the input at hand.
        alpha: SmoothQuant's migration strength, 0 to 1; None for plain round-to-nearest.

    Raises:
        ParameterError: a value that is none of these.
    """

    number_format: str = "int8"
    weights: str = "tensor"
    inputs: str = "tensor"
    static: bool = False
    alpha: float | None = None

    def __post_init__(self):
        check_format(self.number_format)
        if self.weights not in ("tensor", "channel") or self.inputs not in ("tensor", "token"):
            raise ParameterError(
                f"scales of weights per {self.weights!r} and of inputs per {self.inputs!r}: give tensor or "
                "channel for weights, tensor or token for inputs"
            )
        if self.static and self.inputs == "token":
            raise ParameterError(
                "a token's scale cannot be fixed beforehand; give inputs per tensor, or no static"
            )
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ParameterError(
                f"alpha is {self.alpha}; SmoothQuant's migration strength lies between 0 and 1"
            )

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of a calibration text are needed."""
        return self.static or self.alpha is not None


class QuantizedLinear:
    """What stands in for a linear module's `forward`.

    Args:
        linear: the module.
        scheme: how to quantize.
        statistics: of the module's inputs; needed for a static scale.
        smoothing: SmoothQuant's factors s_j > 0 of the input channels, (k,): x is divided, W multiplied by
            them.
    """

    def __init__(
        self,
        linear: LinearModule,
        scheme: Scheme,
        statistics: InputStatistics | None = None,
        smoothing: Tensor | None = None,
    ):
        weight = linear.weight.detach()
        if weight.device.type == "meta":
            raise ParameterError(
                "quantization needs all weights in memory; load the model without device=offload"
            )
        self.scheme, self.bias = scheme, getattr(linear.module, "bias", None)
        self.smoothing = None if smoothing is None else smoothing.to(weight.device)
        W = weight.float() if smoothing is None else weight.float() * self.smoothing
        largest = W.abs().amax(dim=1) if scheme.weights == "channel" else W.abs().max()
        self.weight_scale = absmax_scale(largest, scheme.number_format)
        rows = self.weight_scale[:, None] if scheme.weights == "channel" else self.weight_scale
        self.weight = quantize(W, rows, scheme.number_format)
        # (B, T) of the pass at hand, from `quantized`: it tells whose the rows are that OPT's FFN is given
        self.sequences: torch.Size | None = None
        self.input_scale = None
        if scheme.static:
            channels = statistics.channel_largest.to(weight.device)
            channels = channels if smoothing is None else channels / self.smoothing
            self.input_scale = absmax_scale(channels.max(), scheme.number_format)

    def __call__(self, x: Tensor) -> Tensor:
        """Return the module's answer to x (..., k), in x's dtype."""
        rows = self.sequences is not None and x.ndim == 2 and len(x) == self.sequences.numel()
        X = x.float().reshape(*self.sequences, -1) if rows else x.float()
        X = X if self.smoothing is None else X / self.smoothing
        scale = self._scale(X)
        numbers = quantize(X, scale, self.scheme.number_format).reshape(-1, x.shape[-1])
        product = quantized_product(numbers, self.weight).reshape(*X.shape[:-1], -1)
        y = product * (scale.to(product.dtype) * self.weight_scale.to(product.dtype))
        y = y if self.bias is None else y + self.bias.to(y.dtype)
        return y.reshape(*x.shape[:-1], -1).to(x.dtype)

    def _scale(self, X: Tensor) -> Tensor:
        """The scale of the input, broadcasting against (..., k): fixed, of each token or of each sequence."""
        if self.input_scale is not None:
            return self.input_scale
        if self.scheme.inputs == "token":
            axes: tuple[int, ...] = (-1,)
        else:  # sequences of one batch do not share a scale, so that batching changes nothing
            axes = tuple(range(1 if X.ndim > 2 else 0, X.ndim))
        return absmax_scale(X.abs().amax(dim=axes, keepdim=True), self.scheme.number_format)


@contextmanager
def quantized(
    model: nn.Module,
    scheme: Scheme,
    *,
    skip: Collection[str] = (),
    statistics: dict[str, InputStatistics] | None = None,
    norms: dict[str, str] | None = None,
) -> Iterator[list[str]]:
    """Quantize every linear module but those to skip and the output embedding, for the length of a block.

    Args:
        model: a causal language model, all weights in memory.
        scheme: how to quantize.
        skip: full names of modules that keep their precision; names of other modules are ignored.
        statistics: of a calibration text, from `input_statistics`; needed for static scales and SmoothQuant.
        norms: which norm feeds which module, from `norm_feeding`; needed for SmoothQuant.

    Yields:
        Full names of the quantized modules. A module that the calibration text never reached keeps its
        precision when the scheme needs its statistics.

    Raises:
        ParameterError: calibration statistics are needed and missing, or the weights are not in memory.
    """
    if scheme.needs_calibration and statistics is None:
        raise ParameterError("static scales and SmoothQuant need the statistics of a calibration text")
    linears = linear_modules(model)
    smoothing = {}
    if scheme.alpha is not None:
        smoothing = smoothing_factors(linears, statistics, norms or {}, scheme.alpha)
    known = {} if statistics is None else statistics
    chosen = [
        name for name in linears if name not in skip and (not scheme.needs_calibration or name in known)
    ]
    forwards = {
        linears[name].module: QuantizedLinear(linears[name], scheme, known.get(name), smoothing.get(name))
        for name in chosen
    }

    def note_sequences(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        for forward in forwards.values():
            forward.sequences = Call.of(args, kwargs).hidden.shape[:-1]

    first = decoder_layers(model)[0].register_forward_pre_hook(note_sequences, with_kwargs=True)
    with torch.no_grad(), first, replaced_forward(forwards):
        yield chosen


def kept_share(model: nn.Module, quantized_names: Collection[str]) -> float:
    """Return the share of the linear modules' weights that keeps its precision, without the output embedding.

    Args:
        model: a causal language model.
        quantized_names: full names of the quantized modules.

    Returns:
        A number between 0 and 1.
    """
    sizes = {name: linear.weight.numel() for name, linear in linear_modules(model).items()}
    return 1 - sum(sizes[name] for name in quantized_names) / sum(sizes.values())
