"""Symmetric quantization of a tensor, and the exact product of quantized matrices."""

import torch
from torch import Tensor

from sdnb.errors import ParameterError

LEVELS = {"int8": 127.0, "float8_e4m3": 448.0}
"""The largest number of each format; int8 is used symmetrically, so -128 is never taken."""

EXACT_SUMMANDS = 1024
"""127 * 127 * 1024 < 2**24: so many products of two int8 numbers add up without rounding in float32."""


def check_format(number_format: str) -> None:
    """Refuse an unknown number format.

    Args:
        number_format: "int8" or "float8_e4m3".

    Raises:
        ParameterError: it is neither.
    """
    if number_format not in LEVELS:
        raise ParameterError(f"number format {number_format!r} is unknown; give one of {', '.join(LEVELS)}")


def absmax_scale(largest: Tensor, number_format: str = "int8") -> Tensor:
    """Return the scale s = max|x| / levels, which maps the largest entry to the format's largest number.

    Args:
        largest: max|x|, of any shape, one for each scale.
        number_format: "int8" or "float8_e4m3".

    Returns:
        The scale in float32, of the same shape; 1 where everything is zero, NaN where an entry is.
    """
    check_format(number_format)
    scale = largest.float() / LEVELS[number_format]
    return torch.where(scale == 0, 1.0, scale)


def quantize(x: Tensor, scale: Tensor, number_format: str = "int8") -> Tensor:
    """Round to the nearest number of the format: clamp(round(x / s)), ties to even.

    Args:
        x: any shape.
        scale: broadcasts against `x`.
        number_format: "int8" or "float8_e4m3".

    Returns:
        The numbers, stored as int8 or float8_e4m3fn; entries beyond the scale's range saturate.

    Raises:
        ParameterError: entries or scales that are not finite leave NaN, and int8 has none; float8 keeps it.
    """
    check_format(number_format)
    levels = LEVELS[number_format]
    numbers = (x.float() / scale).clamp(-levels, levels)
    if number_format != "int8":
        return numbers.to(torch.float8_e4m3fn)
    if numbers.isnan().any():
        raise ParameterError(
            "numbers to quantize are not finite; load the model with dtype float32 or bfloat16"
        )
    return numbers.round().to(torch.int8)


def quantized_product(X: Tensor, W: Tensor) -> Tensor:
    """Return X W^T for quantized matrices, without a rounding error for int8.

    Integers: blocks of `EXACT_SUMMANDS` columns are multiplied in float32, where every partial sum is a whole
    number below 2**24 and thus exact, and the blocks are added up in float64. Equal to int32 accumulation up
    to 133,000 columns, where int32 overflows, and to int64 beyond. float8 numbers are multiplied exactly and
    summed in float32.

    Args:
        X: (n, k), int8 or float8_e4m3fn.
        W: (m, k), of the same dtype.

    Returns:
        (n, m), float64 for int8, float32 for float8.
    """
    if X.dtype != torch.int8:
        return X.float() @ W.float().T
    total = torch.zeros(len(X), len(W), dtype=torch.float64, device=X.device)
    for start in range(0, X.shape[1], EXACT_SUMMANDS):
        block = slice(start, start + EXACT_SUMMANDS)
        total += X[:, block].float() @ W[:, block].float().T
    return total
