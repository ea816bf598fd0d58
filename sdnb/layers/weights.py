"""Reading weights: a float32 copy of one layer, offloaded weights included, and never a `meta` tensor.

Under accelerate's offload a weight lives on the `meta` device until its own leaf module runs, and arithmetic
on a `meta` tensor silently gives another one. So every leaf module is aligned by itself, and let go again.
"""

import copy
from collections.abc import Iterator

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from sdnb.errors import ModelError

HOOK_TABLES = {
    name for name, value in vars(nn.Module()).items() if "_hooks" in name and isinstance(value, dict)
}


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain affine map with a weight matrix: `nn.Linear` or transformers' `Conv1D`."""
    return isinstance(module, (nn.Linear, Conv1D))


def linear_weight(module: nn.Module) -> Tensor:
    """The matrix W of an affine leaf y = W x + b, shape (out, in); a `Conv1D` stores its transpose."""
    return module.weight.T if isinstance(module, Conv1D) else module.weight


def as_float32(tensor: Tensor) -> Tensor:
    """A copy that shares no memory: floating point as float32, everything else as it is."""
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return tensor.detach().to(dtype, copy=True)


def own_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Name and tensor of a module's direct parameters and buffers that are not None."""
    for table in (module._parameters, module._buffers):
        yield from ((name, tensor) for name, tensor in table.items() if tensor is not None)


def structure_key(layer: nn.Module) -> tuple:
    """Names, classes and shapes of all that is in a layer; layers that share them count as built alike."""
    return tuple(
        (name, type(module), tuple((key, tuple(tensor.shape)) for key, tensor in own_tensors(module)))
        for name, module in layer.named_modules()
    )


def copy_layer(layer: nn.Module) -> nn.Module:
    """Copy a decoder layer, offloaded or not, in float32 without hooks or gradients, in evaluation mode."""
    memo: dict[int, object] = {}
    for module in layer.modules():
        with align_module_device(module):
            if missing := [name for name, tensor in own_tensors(module) if tensor.is_meta]:
                raise ModelError(
                    f"the weight {missing[0]!r} of {type(module).__name__} has no data (meta device): load "
                    f"the model with its weights; device_map='auto' lets accelerate place what does not fit"
                )
            copies = [as_float32(tensor) for _, tensor in own_tensors(module)]
        # only now: fetching may have replaced the objects
        for (_, tensor), copied in zip(own_tensors(module), copies, strict=True):
            is_parameter = isinstance(tensor, nn.Parameter)
            memo[id(tensor)] = nn.Parameter(copied, requires_grad=False) if is_parameter else copied
        for name, value in vars(module).items():
            if isinstance(value, PretrainedConfig):
                memo[id(value)] = value  # shared: a configuration is only read
            elif name in HOOK_TABLES:
                memo[id(value)] = type(value)()  # deep copies of these would take most of the time
        if "_hf_hook" in vars(module):
            memo[id(module._hf_hook)] = None  # it holds the map of all offloaded weights
    copied = copy.deepcopy(layer, memo)
    for module in copied.modules():
        if "_hf_hook" in vars(module):
            for name in ("_hf_hook", "_old_forward", "forward"):
                vars(module).pop(name, None)
    return copied.eval()
