"""What every linear module is given: its largest and its typical input, and what int8 makes of them.

Everything comes from one pass over the text, by forward hooks; the model is never changed.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sdnb.activations import token_batches, visit_states
from sdnb.quantize.integers import absmax_scale, quantize, quantized_product
from sdnb.quantize.linears import LinearModule, linear_modules

_BITS = 16
"""Bits of a float32 that tell bins apart: sign, exponent and 7 of the fraction, steps of 0.8 %."""


@dataclass(frozen=True)
class InputStatistics:
    """Inputs X of one linear module over a text, entries x, tokens t.

    Args:
        name: full name of the module.
        layer: its decoder layer, 1..L, or None.
        branch: the layer's own child that holds it, such as "mlp".
        order: its place in the order of calls, 0 first.
        largest: max |x|.
        median: median |x|, to 0.4 %.
        token_median: median over tokens of max_j |x_tj|.
        int8_error: mean over tokens of |y - y'| / |y| with y = W x and y' the same with W and x in int8, one
            scale each, that of x from the token's own line; None where the weights are not in memory.
        channel_largest: max_t |x_tj| for each input channel j, (k,), float32 on the CPU.
        parameters: entries of W.
    """

    name: str
    layer: int | None
    branch: str
    order: int
    largest: float
    median: float
    token_median: float
    int8_error: float | None
    channel_largest: Tensor
    parameters: int

    @property
    def outputs(self) -> int:
        """Rows of W."""
        return self.parameters // len(self.channel_largest)

    @property
    def ratio(self) -> float | None:
        """Max |x| over median |x|; None where half of the inputs are zero."""
        return self.largest / self.median if self.median else None

    @property
    def token_ratio(self) -> float | None:
        """Max |x| over the median token's largest |x|: how far spikes stand out; None where that is zero."""
        return self.largest / self.token_median if self.token_median else None


class _Gathering:
    """The sums of one module while the text runs."""

    def __init__(self, linear: LinearModule):
        self.linear = linear
        self.order: int | None = None
        self.tokens: list[Tensor] = []
        self.channels: Tensor | None = None
        self.counts: Tensor | None = None
        self.error, self.error_tokens = 0.0, 0

    def add(self, inputs: Tensor, real: Tensor, order: int) -> None:
        """Take the inputs of one call, (B, T, k), or rows in another order when a mixture has sorted them."""
        self.order = order if self.order is None else self.order
        magnitude = inputs.detach().float().abs()
        if inputs.shape[:-1] == real.shape or magnitude.numel() == real.numel() * magnitude.shape[-1]:
            lines, mask = inputs.detach().reshape(*real.shape, -1), real.to(inputs.device)
        else:
            lines = inputs.detach().reshape(1, -1, inputs.shape[-1])
            mask = torch.ones(lines.shape[:2], dtype=torch.bool, device=inputs.device)
        if not mask.any():
            return
        magnitude = magnitude.reshape(lines.shape)[mask]
        self.tokens.append(magnitude.amax(dim=1).cpu())
        channels = magnitude.amax(dim=0)
        self.channels = channels if self.channels is None else torch.maximum(self.channels, channels)
        bins = torch.bincount(magnitude.view(torch.int32).flatten() >> _BITS, minlength=2 ** (31 - _BITS))
        self.counts = bins if self.counts is None else self.counts + bins
        if self.linear.module.weight.device.type != "meta":
            errors = int8_errors(lines, mask, self.linear.weight)
            self.error, self.error_tokens = self.error + errors.sum().item(), self.error_tokens + len(errors)

    def result(self) -> InputStatistics:
        """The statistics of all calls."""
        tokens = torch.cat(self.tokens)
        return InputStatistics(
            name=self.linear.name,
            layer=self.linear.layer,
            branch=self.linear.branch,
            order=self.order,
            largest=tokens.max().item(),
            median=_median_of(self.counts),
            token_median=tokens.double().median().item(),
            int8_error=self.error / self.error_tokens if self.error_tokens else None,
            channel_largest=self.channels.cpu(),
            parameters=self.linear.weight.numel(),
        )


def _median_of(counts: Tensor) -> float:
    """The middle of the bin in which the median falls; counts of float32 by their leading bits."""
    cumulated = counts.cumsum(0)
    place = int(torch.searchsorted(cumulated, (cumulated[-1] + 1) // 2))
    edges = torch.tensor([place, place + 1], dtype=torch.int64) << _BITS
    return edges.to(torch.int32).view(torch.float32).double().mean().item() if place else 0.0


def int8_errors(lines: Tensor, real: Tensor, W: Tensor) -> Tensor:
    """Return |y_t - y'_t| / |y_t| of every token, y = W x and y' from int8, one scale for W and one a line.

    Args:
        lines: inputs, (B, T, k).
        real: which of them count, (B, T).
        W: (m, k).

    Returns:
        Errors of the n real tokens, (n,); tokens with y = 0 are left out.
    """
    scale = absmax_scale((lines.abs() * real[..., None]).amax(dim=(1, 2), keepdim=True))
    X, scales = lines[real], scale.expand(*real.shape, 1)[real]
    weight_scale = absmax_scale(W.abs().max())
    exact = X.float() @ W.float().T
    product = quantized_product(quantize(X, scales), quantize(W, weight_scale))
    length = exact.norm(dim=1)
    errors = (product * (scales * weight_scale) - exact).norm(dim=1) / length
    return errors[length > 0]


@contextmanager
def gathering(model: nn.Module) -> Iterator[tuple[Callable[[Tensor], None], Callable[[], dict]]]:
    """Watch the inputs of every linear module while the model runs inside the block.

    Args:
        model: a causal language model.

    Yields:
        `expect(real)`, which starts counting with the mask of real tokens (B, T), or stops with None, and
        `results()`, name -> InputStatistics of the modules that were called.
    """
    sums = {name: _Gathering(linear) for name, linear in linear_modules(model).items()}
    state: dict = {"real": None, "calls": 0}

    def watch(gathered: _Gathering) -> Callable:
        def hook(module: nn.Module, args: tuple) -> None:
            if state["real"] is not None and args and torch.is_tensor(args[0]) and args[0].numel():
                gathered.add(args[0], state["real"], state["calls"])
                state["calls"] += 1

        return hook

    def expect(real: Tensor | None) -> None:
        state["real"] = real

    def results() -> dict[str, InputStatistics]:
        return {name: gathered.result() for name, gathered in sums.items() if gathered.tokens}

    with ExitStack() as hooks:
        for gathered in sums.values():
            hooks.callback(gathered.linear.module.register_forward_pre_hook(watch(gathered)).remove)
        yield expect, results


@torch.no_grad()
def input_statistics(
    model: nn.Module,
    lines: Sequence[Tensor],
    *,
    visit: Callable[[int, Tensor, Tensor, list[int]], None] | None = None,
    max_tokens: int = 4096,
) -> dict[str, InputStatistics]:
    """Run a text once and return the statistics of every linear module's inputs.

    Args:
        model: a causal language model.
        lines: token ids of each line, (T_i,), each run by itself.
        visit: called with (l, hidden state (B, T, d), mask of real tokens (B, T), numbers of the lines) for
            l = 0..L of every batch, for whoever needs the residual stream of the same pass.
        max_tokens: tokens in one forward pass.

    Returns:
        Full module name -> statistics, modules in the order of the model.
    """
    with gathering(model) as (expect, results):
        for ids, real, numbers in token_batches(lines, max_tokens=max_tokens):

            def show(layer: int, state: Tensor, real: Tensor = real, numbers: list[int] = numbers) -> None:
                if layer == 0:  # not earlier: finding the decoder layers takes a short pass of its own
                    expect(real)
                if visit is not None:
                    visit(layer, state, real, numbers)

            visit_states(model, ids, show)
            expect(None)
        return results()
