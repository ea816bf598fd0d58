"""A GPU that is only pretended, so that a step that mixes devices fails on a machine without one.

Tensors on it are ordinary ones whose storage is marked. Views share the mark, and what is made of a marked
tensor is marked. Inside the block such tensors say that they are on cuda:0, and refuse to meet others.
"""

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

GPU, CPU = torch.device("cuda:0"), torch.device("cpu")
CROSSES = {"to", "cpu", "copy_", "__setitem__"}  # what a real GPU does across devices


def on_gpu(tensor: Tensor) -> bool:
    """Whether a tensor counts as one on the pretended GPU."""
    return hasattr(tensor.untyped_storage(), "pretended")


def put(tensor: Tensor) -> Tensor:
    """Let a tensor, and all that share its memory, count as on the pretended GPU."""
    tensor.untyped_storage().pretended = True
    return tensor


def named(value) -> torch.device | None:
    """The device that an argument stands for."""
    text = isinstance(value, str) and value.split(":")[0] in ("cpu", "cuda")
    return torch.device(value) if text else value if isinstance(value, torch.device) else None


def at(value, device: torch.device, crosses: bool):
    """A result on a device; of a tensor on the other one it is a copy."""
    if not isinstance(value, Tensor) or on_gpu(value) == (device != CPU):
        return value
    value = value.clone() if crosses else value
    return put(value) if device != CPU else value


class PretendedGPU(TorchFunctionMode):
    """The block inside which marked tensors behave as if they were on another device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs, name = kwargs or {}, getattr(function, "__name__", "")
        if getattr(function, "__self__", None) is Tensor.device:
            return GPU if on_gpu(args[0]) else CPU
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        marked, strangers = any(map(on_gpu, tensors)), [t for t in tensors if t.dim() and not on_gpu(t)]
        if marked and name in ("numpy", "__array__"):
            raise TypeError("can't convert cuda:0 device type tensor to numpy")
        index = name == "__getitem__" and on_gpu(args[0])  # may lie on the CPU
        if marked and strangers and name not in CROSSES and not index:
            raise RuntimeError(f"{name}: expected all tensors to be on the same device")
        device = next((named(leaf) for leaf in leaves if named(leaf)), GPU if marked else CPU)
        if name == "cpu":
            device = CPU
        elif name == "to":  # another tensor, too, says where to and in which dtype
            device = GPU if any(map(on_gpu, tensors[1:])) else CPU if tensors[1:] else device
            args = (args[0], *(v.dtype if isinstance(v, Tensor) else v for v in args[1:]))
        args, kwargs = tree_map(lambda v: CPU if named(v) else v, (args, kwargs))
        result = function(*args, **kwargs)
        if name in ("copy_", "__setitem__"):
            return result
        return tree_map(lambda v: at(v, device, name in CROSSES), result)
