"""The linear modules of a model, found without a table of names, their inputs, and which norm feeds them."""

from contextlib import ExitStack
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers.quantizers.base import get_keys_to_not_convert

from sdnb.activations import input_device
from sdnb.errors import ModelError
from sdnb.layers import decoder_layers
from sdnb.layers.weights import is_linear, linear_weight


@dataclass(frozen=True)
class LinearModule:
    """One linear module and its place."""

    name: str  #: full name, as in `named_modules` of the model
    module: nn.Module  #: an `nn.Linear`, or the `Conv1D` of GPT-2, which stores the transpose
    layer: int | None  #: the decoder layer it belongs to, 1..L, or None outside of all

    @property
    def weight(self) -> Tensor:
        """W of y = W x + b, (out, in)."""
        return linear_weight(self.module)


@dataclass(frozen=True)
class InputStatistics:
    """Inputs X of one linear module over a text, entries x, tokens t."""

    name: str  #: full name of the module
    layer: int | None  #: its decoder layer, 1..L, or None
    largest: float  #: max |x|
    median: float  #: median |x|, within about 0.5 % where there are more than 65,536 entries
    token_median: float  #: median over tokens of max_j |x_tj|
    #: mean over tokens of |y - y'| / |y| with y = W x and y' the same quantized; None where it was not asked
    #: for, or the weights are not in memory
    output_error: float | None
    channel_largest: Tensor  #: max_t |x_tj| for each input channel j, (k,), float32 on the CPU

    @property
    def ratio(self) -> float | None:
        """Max |x| over median |x|; None where the median is zero."""
        return self.largest / self.median if self.median else None

    @property
    def token_ratio(self) -> float | None:
        """Max |x| over the median token's largest |x|: how far spikes stand out; None where that is zero."""
        return self.largest / self.token_median if self.token_median else None


def linear_modules(model: nn.Module) -> dict[str, LinearModule]:
    """Return every linear module that a quantizer would take, by full name, in the order of the model.

    Embeddings, and experts that lie in three-dimensional parameters, are not among them.

    Raises:
        ModelError: there is none.
    """
    embeddings = (model.get_output_embeddings(), model.get_input_embeddings())
    layers = enumerate(decoder_layers(model), start=1)
    layer_of = {module: number for number, layer in layers for module in layer.modules()}
    found = {
        name: LinearModule(name, module, layer_of.get(module))
        for name, module in model.named_modules()
        if is_linear(module) and module not in embeddings
    }
    if not found:
        raise ModelError(f"{type(model).__name__} has no linear module that could be quantized")
    return found


def never_quantized(model: nn.Module) -> list[str]:
    """Full names of the modules that quantizers skip by themselves: the output embedding and tied weights."""
    skipped = get_keys_to_not_convert(model)  # with the last module, most often the head or a norm
    named = model.named_modules(remove_duplicate=False)
    return [name for name, module in named if name in skipped and module.weight.ndim == 2]


@torch.no_grad()
def norm_feeding(model: nn.Module, linears: dict[str, LinearModule], ids: Tensor) -> dict[str, str]:
    """Watch which norm feeds each linear module, so that a scale can move from one to the other.

    A norm is a leaf module all of whose parameters are vectors; the linear module must be given the very
    tensor that the norm returned. `linears` are those of `linear_modules`, `ids` a few token ids, (1, T).

    Returns:
        Name of the linear module -> name of the norm, for those that a norm feeds.
    """
    names = {module: name for name, module in model.named_modules()}
    made: dict[int, tuple[str, Tensor]] = {}  # keeps the tensors, so that no id is used twice
    fed: dict[str, str] = {}

    def after_norm(module: nn.Module, args: tuple, output: Tensor) -> None:
        if torch.is_tensor(output):
            made[id(output)] = (names[module], output)

    def before_linear(module: nn.Module, args: tuple) -> None:
        if args and id(args[0]) in made:
            fed[names[module]] = made[id(args[0])][0]

    with ExitStack() as hooks:
        for linear in linears.values():
            hooks.enter_context(linear.module.register_forward_pre_hook(before_linear))
        for module in model.base_model.modules():
            own = list(module.parameters(recurse=False))
            if own and not list(module.children()) and all(p.ndim == 1 for p in own):
                hooks.enter_context(module.register_forward_hook(after_norm))
        model.base_model(input_ids=ids.to(input_device(model)), use_cache=False)
    return fed
