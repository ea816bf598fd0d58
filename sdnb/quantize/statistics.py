"""The inputs of every linear module: the largest, the typical, and the error that quantization makes of them.

What is kept from one call to the next is written into tensors that are there before the pass starts: small
tensors that stay, allocated between large ones that go, leave the heap in pieces that nobody can use (10 GB
for a model of half a GB).
"""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial

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

    def add(self, part: Tensor) -> None:
        start, self.count = self.count, self.count + len(part)
        if self.count > len(self.kept):  # a module that is called more than once for a token
            self.kept = torch.cat([self.kept, torch.empty(self.count)])
        self.kept[start : self.count] = part

    @property
    def values(self) -> Tensor:
        return self.kept[: self.count]


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

    def add(self, inputs: Tensor, outputs: Tensor, mask: Tensor) -> None:
        """Take one call: inputs (B, T, k), outputs (B, T, m), which tokens are real (B, T)."""
        lines = inputs if mask.all() else inputs.masked_fill(~mask[..., None], 0.0)
        self.tokens.add(largest_entry(lines, (-1,))[..., 0][mask])
        torch.maximum(self.channels, largest_entry(lines, (0, 1)).flatten().cpu(), out=self.channels)
        self.sample.add(self._drawn(lines, mask))
        if self.quantized is not None:
            y = outputs
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
    watch: Callable[[LinearModule, Tensor, Tensor, Tensor, list[int] | None], None] | None = None,
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
        watch: called with (linear module, inputs (B, T, k), outputs, mask, numbers of the lines) likewise;
            tokens that a mixture has sorted come as one line, (1, N, k), with None for the numbers.
        max_tokens: tokens in one forward pass.
    """
    total = sum(map(len, lines))
    linears = {linear.module: linear for linear in linear_modules(model).values()}
    gathered = {module: _Gathering(linear, total, scheme) for module, linear in linears.items()}
    batch: list = []  # mask and numbers of the lines; empty during passes that only look for the layers

    def show(real: Tensor, numbers: list[int], layer: int, state: Tensor) -> None:
        batch[:] = real, numbers
        if visit is not None:
            visit(layer, state, real, numbers)

    def hook(module: nn.Module, args: tuple, output: Tensor) -> None:
        if not (batch and args and torch.is_tensor(args[0]) and args[0].numel()):
            return
        x, (mask, numbers) = args[0], batch
        if x.numel() != mask.numel() * x.shape[-1]:
            mask, numbers = torch.ones(1, x.numel() // x.shape[-1], dtype=torch.bool), None
        x, y, mask = x.reshape(*mask.shape, -1), output.reshape(*mask.shape, -1), mask.to(x.device)
        gathered[module].add(x, y, mask)
        if watch is not None:
            watch(linears[module], x, y, mask, numbers)

    with ExitStack() as hooks:
        for module in linears:
            hooks.enter_context(module.register_forward_hook(hook))
        for ids, real, numbers in token_batches(lines, max_tokens=max_tokens):
            visit_states(model, ids, partial(show, real, numbers))
            batch.clear()
    return {found.linear.name: found.result() for found in gathered.values() if found.tokens.count}
