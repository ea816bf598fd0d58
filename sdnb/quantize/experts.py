"""Experts of a mixture one by one: what each one's down-projection is given and what it puts out.

In transformers 5 the experts of a layer are slices of three-dimensional parameters. While the module that
owns these runs its plain loop over experts, every product with a slice is seen, with the slice's number.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from sdnb.layers import decoder_layers
from sdnb.layers.calls import replaced_forward

# An expert is named when its largest output is above this quantile and this share of the model's largest.
QUANTILE, SHARE = 0.995, 0.1
PRODUCTS = {
    nn.functional.linear, torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm,
    Tensor.bmm,
}  # fmt: skip


@dataclass
class ExpertStatistics:
    """Largest input and output of one expert's down-projection over a text."""

    name: str  #: of the module and the expert, "model.layers.3.mlp.experts.17"
    layer: int  #: its decoder layer, 1..L
    expert: int  #: its number, 0 first, as the router counts
    tokens: int = 0  #: how many were sent to it
    largest_input: float = 0.0  #: max |x|; 0 where no token was sent
    largest_output: float = 0.0  #: max |W x|, before the router's weight


class _Products(TorchFunctionMode):
    """Notes x and y of the last product with each slice of the parameters, by the slice's number."""

    def __init__(self, parameters: list[nn.Parameter]):
        super().__init__()
        self.parameters, self.last = parameters, {}

    def __torch_function__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for parameter in self.parameters if function in PRODUCTS and len(args) > 1 else ():
            offset = args[1].data_ptr() - parameter.data_ptr()
            if args[1].ndim == 2 and 0 <= offset < parameter.nbytes:
                self.last[offset * len(parameter) // parameter.nbytes] = (args[0], result)
            elif args[1].shape == parameter.shape and offset == 0:  # all experts at once
                self.last |= enumerate(zip(args[0], result, strict=True))
        return result


def expert_parameters(model: nn.Module) -> Iterator[tuple[int, str, nn.Module, list[nn.Parameter]]]:
    """Modules whose parameters hold experts as slices: layer 1..L, full name, module, these parameters."""
    names = {module: name for name, module in model.named_modules()}
    for number, layer in enumerate(decoder_layers(model), start=1):
        for module in layer.modules():
            found = [p for p in module.parameters(recurse=False) if p.ndim == 3]
            if len(found) > 1 and len({len(parameter) for parameter in found}) == 1:
                yield number, names[module], module, found


@contextmanager
def watched_experts(model: nn.Module) -> Iterator[list[ExpertStatistics]]:
    """Watch experts' down-projections inside the block, which fills the list; empty where there are none."""
    found: list[ExpertStatistics] = []
    forwards: dict[nn.Module, Callable] = {}
    for number, name, module, parameters in expert_parameters(model):
        rows = [ExpertStatistics(f"{name}.{e}", number, e) for e in range(len(parameters[0]))]
        forwards[module] = partial(_watched, module, parameters, rows)
        found += rows
    with replaced_forward(forwards):
        yield found


def _watched(module: nn.Module, parameters: list, rows: list[ExpertStatistics], *args, **kwargs) -> object:
    """Run the module and note the last product with a slice of each expert, its down-projection."""
    with _Products(parameters) as products:
        # the plain loop over experts, not the batched products that transformers may put in its place
        result = inspect.unwrap(type(module).forward)(module, *args, **kwargs)
    for expert, (x, y) in products.last.items():
        row = rows[expert]
        row.tokens += len(x)
        row.largest_input = max(row.largest_input, x.abs().max().item())
        row.largest_output = max(row.largest_output, y.abs().max().item())
    return result


def super_experts(statistics: list[ExpertStatistics]) -> list[ExpertStatistics]:
    """Return experts whose largest output is above the 99.5th percentile and a tenth of the largest of all.

    The largest output first; `statistics` are of all experts of a model. Source: Su et al., arXiv 2507.23279.
    """
    outputs = torch.tensor([found.largest_output for found in statistics], dtype=torch.float64)
    limit = max(outputs.quantile(QUANTILE).item(), SHARE * outputs.max().item())
    chosen = [found for found in statistics if found.largest_output > limit]
    return sorted(chosen, key=lambda found: -found.largest_output)
