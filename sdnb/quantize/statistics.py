"""The inputs of every linear module: the largest, the typical, and the error that quantization makes of them.

What is kept from one call to the next is written into tensors that are there before the pass starts: small
tensors that stay, allocated between large ones that go, leave the heap in pieces that nobody can use (10 GB
for a model of half a GB).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from sdnb.activations import token_batches, visit_states
from sdnb.quantize.formats import largest_entry
from sdnb.quantize.modules import InputStatistics, LinearModule, linear_modules
from sdnb.quantize.schemes import QuantizedLinear, Scheme

SAMPLED = 2**16  # entries of a module's inputs that its median is taken from, drawn where there are more


class _Series:
    """Numbers that arrive in parts, in one tensor that seldom grows."""

    def __init__(self, size: int):
        self.kept, self.count = torch.empty(size), 0

    @property
    def values(self) -> Tensor:
        return self.kept[: self.count]

    def add(self, part: Tensor) -> None:
        self.count += len(part)
        if self.count > len(self.kept):  # a module that is called more than once for a token
            self.kept = torch.cat([self.kept, torch.empty(self.count)])
        self.values[len(self.values) - len(part) :] = part


class _Gathering:
    """Statistics of one module, gathered while a text of so many tokens runs."""

    def __init__(self, linear: LinearModule, tokens: int, scheme: Scheme | None):
        width = linear.weight.shape[1]
        self.linear, self.tokens = linear, _Series(tokens)
        self.sample, self.share = _Series(min(tokens * width, SAMPLED)), min(1.0, SAMPLED / (tokens * width))
        self.generator = torch.Generator().manual_seed(0)
        self.channels = torch.zeros(width)
        self.quantized = None
        if scheme is not None and not linear.weight.is_meta:
            self.quantized = QuantizedLinear(linear, scheme)
            self.quantized.bias = None
        self.error, self.error_tokens = 0.0, 0

    def add(self, inputs: Tensor, outputs: Tensor, real: Tensor) -> None:
        """Take one call, (B, T, k), or rows in another order when a mixture has sorted them."""
        if inputs.numel() == real.numel() * inputs.shape[-1]:
            lines, mask = inputs.reshape(*real.shape, -1), real.to(inputs.device)
        else:
            lines = inputs.reshape(1, -1, inputs.shape[-1])
            mask = torch.ones(lines.shape[:2], dtype=torch.bool, device=inputs.device)
        if not mask.all():
            lines = lines.masked_fill(~mask[..., None], 0.0)
        self.tokens.add(largest_entry(lines, (-1,))[..., 0][mask])
        torch.maximum(self.channels, largest_entry(lines, (0, 1)).flatten().cpu(), out=self.channels)
        self.sample.add(self._drawn(lines, mask))
        if self.quantized is not None:
            y = outputs.reshape(*mask.shape, -1)
            if y.dtype != torch.float32:
                y = lines.float() @ self.linear.weight.float().T
            elif getattr(self.linear.module, "bias", None) is not None:
                y = y - self.linear.module.bias
            off, length = (self.quantized(lines.float()) - y).norm(dim=-1), y.norm(dim=-1)
            counted = mask & (length > 0)
            self.error += (off / length)[counted].double().sum().item()
            self.error_tokens += int(counted.sum())

    def _drawn(self, lines: Tensor, mask: Tensor) -> Tensor:
        """Some of the |entries| of the real tokens, or all of them."""
        if self.share == 1.0:
            return lines[mask].float().abs().flatten()
        rows = mask.flatten().nonzero().flatten().cpu()
        number = max(1, int(self.share * len(rows) * lines.shape[-1]))
        picked = rows[torch.randint(len(rows), (number,), generator=self.generator)]
        columns = torch.randint(lines.shape[-1], (number,), generator=self.generator)
        return lines.flatten(0, 1)[picked.to(lines.device), columns.to(lines.device)].float().abs()

    def result(self) -> InputStatistics:
        largest = self.tokens.values
        return InputStatistics(
            name=self.linear.name,
            layer=self.linear.layer,
            largest=largest.max().item(),
            median=self.sample.values.median().item(),
            token_median=largest.double().median().item(),
            output_error=self.error / self.error_tokens if self.error_tokens else None,
            channel_largest=self.channels,
        )


@torch.no_grad()
def input_statistics(
    model: nn.Module,
    lines: Sequence[Tensor],
    *,
    scheme: Scheme | None = Scheme(),  # noqa: B008 - it is frozen
    visit: Callable[[int, Tensor, Tensor, list[int]], None] | None = None,
    max_tokens: int = 4096,
) -> dict[str, InputStatistics]:
    """Return the statistics of every linear module's inputs, by its full name, from one pass over a text.

    Modules that are never called are left out.

    Args:
        model: a causal language model.
        lines: token ids of each line, (T_i,), each run by itself.
        scheme: for which each module's output error is measured, all other modules in full precision; None
            for no errors, which takes half the time.
        visit: called with (l, hidden state (B, T, d), mask of real tokens (B, T), numbers of the lines) for
            l = 0..L of every batch, for a caller that needs the residual stream of the same pass.
        max_tokens: tokens in one forward pass.
    """
    total = sum(len(line) for line in lines)
    linears = linear_modules(model).values()
    gathered = {linear.module: _Gathering(linear, total, scheme) for linear in linears}
    running: list[Tensor] = []  # the mask of real tokens, empty during passes that only look for the layers

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if running and args and torch.is_tensor(args[0]) and args[0].numel():
            gathered[module].add(args[0], output, running[0])

    with ExitStack() as hooks:
        for module in gathered:
            hooks.enter_context(module.register_forward_hook(hook))
        for ids, real, numbers in token_batches(lines, max_tokens=max_tokens):

            def show(layer: int, state: Tensor, real: Tensor = real, numbers: list[int] = numbers) -> None:
                running[:] = [real]
                if visit is not None:
                    visit(layer, state, real, numbers)

            visit_states(model, ids, show)
            running.clear()
    return {found.linear.name: found.result() for found in gathered.values() if found.tokens.count}
