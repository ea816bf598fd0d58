"""A fingerprint of a model's weights that does not depend on device, order of summation or file layout.

For every parameter and every saved buffer, in the order of their names, a line goes into one SHA-256:

    name | dtype | shape | sum_i w_i mod 2^64 | sum_i (2 c + 1)(i + 1) w_i mod 2^64 | 64 words at even strides

where the tensor's bytes are read as signed 64-bit words (the last one filled up with zeros) in blocks of
2^20, w_i is word i of block c. Integer sums are exact in any order, so a GPU and a CPU agree; the weighted
sum sees words that changed places. A tensor that several names share counts once, under the first of them.
The dtype is part of it: the same model loaded in another dtype has another fingerprint.
"""

import hashlib
from collections.abc import Iterator

import torch
from torch import nn

from sdnb.errors import ModelError

_BLOCK = 1 << 20
_SAMPLE = 64


def weights(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield a model's parameters and saved buffers by name, shared ones once, offloaded ones from disk.

    Args:
        model: any module; accelerate's offload is undone one leaf module at a time.

    Yields:
        `(name, tensor)`, the tensor detached.

    Raises:
        ModelError: a tensor has no data (it is on the meta device).
    """
    from accelerate.utils import align_module_device

    seen = set()
    for prefix, module in model.named_modules():
        own = {**module._parameters, **{k: b for k, b in module._buffers.items()
                                        if k not in module._non_persistent_buffers_set}}  # fmt: skip
        names = [name for name, tensor in own.items() if tensor is not None and id(tensor) not in seen]
        seen.update(id(own[name]) for name in names)
        if not names:
            continue
        with align_module_device(module):
            for name in names:
                tensor = getattr(module, name).detach()
                full = f"{prefix}.{name}" if prefix else name
                if tensor.is_meta:
                    raise ModelError(f"The weight {full} has no data: the model was loaded only in part.")
                yield full, tensor


def weights_fingerprint(model: nn.Module) -> str:
    """SHA-256 over every weight's name, dtype, shape, exact checksums of its bits and a strided sample.

    Args:
        model: the loaded model.

    Returns:
        64 hexadecimal digits.
    """
    lines = sorted(f"{name}|{_line(tensor)}" for name, tensor in weights(model))
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def first_not_finite(model: nn.Module) -> str | None:
    """The name of the first weight that holds a NaN or an infinity.

    Args:
        model: the loaded model; weights that are offloaded are skipped.

    Returns:
        The name, or None if all are finite.
    """
    for name, tensor in model.named_parameters():
        if tensor.is_meta or not tensor.is_floating_point() or tensor.numel() == 0:
            continue
        low, high = torch.aminmax(tensor.detach())  # a NaN anywhere makes both NaN
        if not (torch.isfinite(low) and torch.isfinite(high)):
            return name
    return None


def _words(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's bytes as int64 words, filled up with zeros."""
    raw = tensor.contiguous().reshape(-1).view(torch.uint8)
    if len(raw) % 8:
        raw = torch.cat([raw, raw.new_zeros(-len(raw) % 8)])
    if raw.data_ptr() % 8 or raw.storage_offset() % 8:
        raw = raw.clone()  # a view into a file may start anywhere
    return raw.view(torch.int64)


def _line(tensor: torch.Tensor) -> str:
    words = _words(tensor)
    place = torch.arange(1, min(_BLOCK, len(words)) + 1, device=words.device)
    plain = weighted = 0
    for block, start in enumerate(range(0, len(words), _BLOCK)):
        piece = words[start : start + _BLOCK]
        plain += int(piece.sum())
        weighted += (2 * block + 1) * int((piece * place[: len(piece)]).sum())  # wraps at 2^64, as it should
    sample = words[:: max(1, len(words) // _SAMPLE)][:_SAMPLE].tolist()
    return f"{tensor.dtype}|{tuple(tensor.shape)}|{plain % 2**64}|{weighted % 2**64}|{sample}"
