"""Simulated quantization of every linear module, with the arithmetic of real kernels.

A module's output is y = s_x s_W (X W^T) + b, X and W numbers of the format, their product exact for whole
numbers and scaled once. Only `forward` is replaced, inside a context manager, which holds one copy of the
quantized weights (a byte a weight for int8).
"""

import math
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.errors import ParameterError
from sdnb.layers import decoder_layers
from sdnb.layers.calls import Call, replaced_forward
from sdnb.quantize.experts import expert_parameters
from sdnb.quantize.formats import absmax_scale, exact_product, largest_entry, number_format, numbers
from sdnb.quantize.modules import InputStatistics, LinearModule, linear_modules

SMALLEST = 1e-5  # lower bound of SmoothQuant's inputs, weights and factors: no division by a dead channel's 0
ENTRIES_AT_ONCE = 2**19  # inputs rounded at a time on a CPU: they stay in its cache


@dataclass(frozen=True)
class Scheme:
    """How weights and inputs of the linear modules are quantized; symmetric, round to nearest.

    Raises:
        ParameterError: a value that is none of these.
    """

    number_format: str = "int8"  #: a key of `FORMATS`, for weights and inputs
    #: "tensor" (one scale) or "channel" (one for each output); "block" in block formats
    weights: str | None = None
    #: "tensor" (one scale for a sequence, or for everything when static) or "token"; "block" in block formats
    inputs: str | None = None
    #: input scales are fixed beforehand from the statistics of a calibration text; otherwise each scale comes
    #: from the input at hand
    static: bool = False
    alpha: float | None = None  #: SmoothQuant's migration strength, 0 to 1; None for plain round-to-nearest

    def __post_init__(self):
        block = number_format(self.number_format).block is not None
        for field, finer in (("weights", "channel"), ("inputs", "token")):
            known = ("block",) if block else ("tensor", finer)
            value = getattr(self, field) or known[0]
            if value not in known:
                scales = f"scales of {field} per {value!r} in {self.number_format}"
                raise ParameterError(f"{scales}: give {' or '.join(known)}")
            object.__setattr__(self, field, value)
        if self.static and self.inputs != "tensor":
            raise ParameterError("a static scale is one for all inputs: give inputs per tensor, or no static")
        if self.alpha is not None and not 0 <= self.alpha <= 1:
            raise ParameterError(f"alpha is {self.alpha}: give a migration strength between 0 and 1")

    @property
    def needs_calibration(self) -> bool:
        """Whether statistics of a calibration text are needed."""
        return self.static or self.alpha is not None


SCHEMES = {
    "int8 tensor": Scheme(),
    "int8 channel, token": Scheme(weights="channel", inputs="token"),
    "float8 tensor": Scheme("float8_e4m3"),
    "int8 blocks of 32": Scheme("int8_block"),
    "mxfp8": Scheme("mxfp8"),
    "mxfp4": Scheme("mxfp4"),
    "nvfp4": Scheme("nvfp4"),
    "int4 blocks of 32": Scheme("int4_block"),
}
"""The schemes that are compared, coarse to fine and 8 to 4 bits; all dynamic, round to nearest."""


class QuantizedLinear:
    """The function that replaces the `forward` of a linear module, whose weights are in memory and finite.

    A static scale needs the `statistics` of the module's inputs; `smoothing` are SmoothQuant's factors of the
    input channels, s_j > 0, (k,), by which x is divided and W multiplied.
    """

    def __init__(
        self,
        linear: LinearModule,
        scheme: Scheme,
        statistics: InputStatistics | None = None,
        smoothing: Tensor | None = None,
    ):
        weight = linear.weight.detach()
        if weight.is_meta:
            raise ParameterError("weights are quantized in memory: load the model without device=offload")
        self.scheme, self.bias = scheme, getattr(linear.module, "bias", None)
        self.smoothing = None if smoothing is None else smoothing.to(weight.device)
        W = weight.float() if smoothing is None else weight.float() * self.smoothing
        name = scheme.number_format
        scale = absmax_scale(largest_entry(W, (1,) if scheme.weights == "channel" else None), name)
        if not scale.isfinite().all():
            raise ParameterError(f"{linear.name} has weights that are not finite: they cannot be quantized")
        self.weight = numbers(W, scale, name).to(number_format(name).stored)
        self.weight_scale = scale.flatten()
        # (B, T) of the pass at hand, from `quantized`: it tells whose the rows are that OPT's FFN is given
        self.sequences: torch.Size | None = None
        self.input_scale = None
        if scheme.static:
            channels = statistics.channel_largest.to(weight.device)
            channels = channels if smoothing is None else channels / self.smoothing
            self.input_scale = absmax_scale(channels.max(), name).reshape(1)

    def __call__(self, x: Tensor) -> Tensor:
        """The module's output for x (..., k), in x's dtype."""
        X = x if self.smoothing is None else x / self.smoothing
        scales, X = self._input_scales(X), X.reshape(-1, x.shape[-1])
        W, whole = self.weight.float(), self.weight.dtype == torch.int8
        y = torch.empty(len(X), len(W), dtype=x.dtype, device=x.device)
        step = len(X) if x.is_cuda else max(1, ENTRIES_AT_ONCE // X.shape[1])
        for rows in (slice(start, start + step) for start in range(0, len(X), step)):
            found = numbers(X[rows], scales[rows], self.scheme.number_format)
            product = exact_product(found, W) if whole else found @ W.T
            product *= scales[rows] * self.weight_scale
            y[rows] = product if self.bias is None else product.add_(self.bias)
        return y.reshape(*x.shape[:-1], -1)

    def _input_scales(self, X: Tensor) -> Tensor:
        """Scales of the input's rows, (rows, 1)."""
        if self.input_scale is not None:
            return self.input_scale.expand(X[..., 0].numel(), 1)
        name = self.scheme.number_format
        if self.scheme.inputs == "token":
            return absmax_scale(largest_entry(X, (-1,)), name).reshape(-1, 1)
        # sequences of one batch do not share a scale, so that batching changes nothing
        if self.sequences is not None and X.ndim == 2 and len(X) == self.sequences.numel():
            X = X.reshape(*self.sequences, -1)
        scale = absmax_scale(largest_entry(X, tuple(range(X.ndim > 2, X.ndim))), name)
        return scale.expand(*X.shape[:-1], 1).reshape(-1, 1)


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

    Modules in `skip` keep their precision, by full name, and so do experts in three-dimensional parameters.
    Static scales and SmoothQuant need the `statistics` of a calibration text, from `input_statistics`, and
    SmoothQuant also the `norms` that feed modules, from `norm_feeding`.

    Yields:
        Full names of the quantized modules, without those whose statistics are needed and missing.

    Raises:
        ParameterError: no calibration statistics where they are needed, or the weights are not in memory.
    """
    if scheme.needs_calibration and statistics is None:
        raise ParameterError("static scales and SmoothQuant need the statistics of a calibration text")
    linears, known = linear_modules(model), statistics or {}
    smoothing = {} if scheme.alpha is None else smoothing_factors(linears, known, norms or {}, scheme.alpha)
    chosen = [n for n in linears if n not in skip and (not scheme.needs_calibration or n in known)]
    forwards = {
        linears[n].module: QuantizedLinear(linears[n], scheme, known.get(n), smoothing.get(n)) for n in chosen
    }

    def note_sequences(layer: nn.Module, args: tuple, kwargs: dict) -> None:
        for forward in forwards.values():
            forward.sequences = Call.of(args, kwargs).hidden.shape[:-1]

    first = decoder_layers(model)[0].register_forward_pre_hook(note_sequences, with_kwargs=True)
    with torch.no_grad(), first, replaced_forward(forwards):
        yield chosen


def smoothing_factors(
    linears: dict[str, LinearModule],
    statistics: dict[str, InputStatistics],
    norms: dict[str, str],
    alpha: float,
) -> dict[str, Tensor]:
    """Return SmoothQuant's s_j = max|X_j|^alpha / max|W_j|^(1 - alpha), (k,), of modules that a norm feeds.

    X diag(s)^-1 has the outlier channels taken down, diag(s) W^T takes them up. All modules fed by one norm
    share s, so that 1/s can be folded into the norm's gain; others, and those that the calibration text of
    the `statistics` never reached, are not smoothed. Source: Xiao et al., arXiv 2211.10438, eq. 4.
    """
    groups: dict[str, list[str]] = {}
    for name, norm in norms.items():
        if name in statistics:
            groups.setdefault(norm, []).append(name)
    factors: dict[str, Tensor] = {}
    for names in groups.values():
        inputs = torch.stack([statistics[name].channel_largest for name in names]).amax(0)
        weights = torch.stack([largest_entry(linears[name].weight, (0,))[0].cpu() for name in names]).amax(0)
        s = inputs.clamp(min=SMALLEST) ** alpha / weights.clamp(min=SMALLEST) ** (1 - alpha)
        factors |= dict.fromkeys(names, s.clamp(min=SMALLEST))
    return factors


def kept_share(model: nn.Module, quantized_names: Collection[str]) -> float:
    """Return the share of weights, embeddings left out, that keep their precision if these modules do not."""
    sizes = {name: linear.weight.numel() for name, linear in linear_modules(model).items()}
    experts = sum(p.numel() for *_, parameters in expert_parameters(model) for p in parameters)
    return 1 - sum(sizes[name] for name in quantized_names) / (sum(sizes.values()) + experts)


@dataclass(frozen=True)
class PairedRatio:
    """Perplexity of one run over that of another, and its standard error, NaN for a single window."""

    ratio: float
    error: float


def perplexity_ratio(losses: Tensor, reference: Tensor) -> PairedRatio:
    """Return ratio = exp(mean(a - b)) of two runs on the same windows, error = ratio std(a - b) / sqrt(W).

    `losses` and `reference` are the mean negative log-likelihoods of each window, in nats, (W,). Windows
    differ in difficulty far more than the runs do: their differences have a far smaller error.

    Raises:
        ParameterError: the runs have different numbers of windows.
    """
    if losses.shape != reference.shape:
        raise ParameterError(f"{len(losses)} windows against {len(reference)}: compare runs on the same text")
    difference = losses.double() - reference.double()
    ratio = math.exp(difference.mean())
    spread = difference.std().item() if len(difference) > 1 else math.nan
    return PairedRatio(ratio, ratio * spread / math.sqrt(len(difference)))
