"""Number formats: what they can hold, rounding to them, and products that are exact in float32.

A tensor x is stored as numbers of the format times a scale, x ~ s X, which the caller shares (in a tensor, a
channel, a token), or every block of 16 or 32 entries in a row.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from sdnb.errors import ParameterError

# 127 * 127 * 1024 < 2**24: so many products of int8 numbers add up without rounding in float32.
EXACT_SUMMANDS = 1024


@dataclass(frozen=True)
class NumberFormat:
    """What numbers of a format look like."""

    largest: float
    fraction: int | None = None  #: bits of a float's fraction; None for whole numbers
    smallest: int = 0  #: exponent of a float's smallest normal number
    block: int | None = None  #: entries of a row that share a scale; None where the caller decides
    #: how a block's scale is stored: "float32", "power of two", or "float8_e4m3" times a float32 per tensor
    scale: str = "float32"
    stored: torch.dtype = torch.bfloat16  #: keeps numbers (times their block's scale) without loss

    def rounded(self, x: Tensor) -> Tensor:
        """Overwrite float32 x with the nearest numbers, ties to even, saturating; NaN stays NaN."""
        if self.fraction is None:
            return x.round_().clamp_(-self.largest, self.largest)
        x.clamp_(-self.largest, self.largest)
        # adding 1.5 * 2^(23 + e - fraction) and taking it away leaves x with `fraction` bits behind 2^e
        exponent = (x.view(torch.int32) & 0x7F800000).view(torch.float32)
        shift = exponent.clamp_(min=2.0**self.smallest).mul_(1.5 * 2.0 ** (23 - self.fraction))
        return x.add_(shift).sub_(shift)


FORMATS = {
    "int8": NumberFormat(127, stored=torch.int8),
    "int4": NumberFormat(7, stored=torch.int8),
    "float8_e4m3": NumberFormat(448, 3, -6),
    "int8_block": NumberFormat(127, block=32, stored=torch.float32),
    "int4_block": NumberFormat(7, block=32, stored=torch.float32),
    "mxfp8": NumberFormat(448, 3, -6, block=32, scale="power of two"),
    "mxfp4": NumberFormat(6, 1, 0, block=32, scale="power of two"),
    "nvfp4": NumberFormat(6, 1, 0, block=16, scale="float8_e4m3"),
}
"""int8 and int4 are symmetric, -128 and -8 are never taken; mxfp8 (e4m3) and mxfp4 (e2m1) follow the OCP
Microscaling specification 1.0, nvfp4 NVIDIA's Blackwell, int8_block GGUF's Q8_0 with float32 scales."""

PLAIN = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # formats without a scale


def number_format(name: str) -> NumberFormat:
    """The format of that name."""
    if name not in FORMATS:
        raise ParameterError(f"number format {name!r} is unknown; give one of {', '.join(FORMATS)}")
    return FORMATS[name]


def largest_entry(x: Tensor, dims: tuple[int, ...] | None = None) -> Tensor:
    """Max |x| over some dimensions, which are kept, or over all of them, without a copy of x; float32."""
    dims = tuple(range(x.ndim)) if dims is None else dims
    return torch.maximum(x.amax(dims, keepdim=True), -x.amin(dims, keepdim=True)).float()


def absmax_scale(largest: Tensor, name: str = "int8") -> Tensor:
    """Return the scales outside of blocks: `largest`, which is max|x|, over the largest number of a format.

    float32; NaN where an entry is; 1 where everything is zero, and where a format has scales of blocks only
    (all block formats but nvfp4).
    """
    kind = number_format(name)
    if kind.block is not None and kind.scale != "float8_e4m3":
        return torch.ones_like(largest, dtype=torch.float32)
    scale = largest.float() / (kind.largest if kind.block is None else kind.largest * 448)
    return torch.where(scale == 0, 1.0, scale)


def numbers(x: Tensor, scale: Tensor, name: str = "int8") -> Tensor:
    """Numbers X of a format, x (..., k) ~ s X, float32; those of a block format carry their block's scale."""
    kind, x, width = number_format(name), x.float(), x.shape[-1]
    if kind.block is None:
        return kind.rounded(x / scale)
    if width % kind.block:
        x = functional.pad(x, (0, -width % kind.block))
    blocks, scale = x.unflatten(-1, (-1, kind.block)), scale[..., None]
    steps = _block_scales(largest_entry(blocks, (-1,)) / scale, kind)
    found = kind.rounded(blocks / torch.where(steps == 0, 1.0, steps * scale)).mul_(steps)
    return found.flatten(-2)[..., :width]


def _block_scales(largest: Tensor, kind: NumberFormat) -> Tensor:
    """Scale of each block, rounded as the format stores it."""
    if kind.scale == "power of two":  # the block's largest power of two over the format's; NaN stays NaN
        power = (largest.view(torch.int32) & 0x7F800000).view(torch.float32)
        return power / 2.0 ** (int(kind.largest).bit_length() - 1) + 0 * largest
    scale = largest / kind.largest
    return scale if kind.scale == "float32" else FORMATS["float8_e4m3"].rounded(scale)


def rounded(x: Tensor, name: str, scales: str = "tensor") -> Tensor:
    """Return what a format makes of x, (..., k): rounded and scaled back, float32.

    The format is a key of FORMATS, or float16 or bfloat16, which have no scale (float16 overflows to inf);
    `scales` is "tensor" for one scale, "token" for one for each row.

    Raises:
        ParameterError: neither tensor nor token.
    """
    if name in PLAIN:
        return x.to(PLAIN[name]).float()
    if scales not in ("tensor", "token"):
        raise ParameterError(f"scales per {scales!r}: give tensor or token")
    scale = absmax_scale(largest_entry(x, (-1,) if scales == "token" else None), name)
    return numbers(x, scale, name) * scale


def levels_left(x: Tensor, name: str, scales: str = "tensor") -> Tensor:
    """Return how many positive numbers of a format lie up to each token's largest entry, x (n, k).

    What is left to describe a token with, under the scale that it meets: the tensor's, its own
    (`scales="token"`), or that of the block which holds its largest entry; 1 for float16 and bfloat16.
    """
    size = largest_entry(x, (-1,))
    if name in PLAIN:
        scale, grid = 1.0, torch.arange(1, 2**15).to(torch.int16).view(PLAIN[name]).double()
    else:
        kind, scale = number_format(name), absmax_scale(size if scales == "token" else size.max(), name)
        if kind.block is not None:
            steps = _block_scales(size / scale, kind)
            scale = scale * torch.where(steps == 0, 1.0, steps)
        step = 1.0 if kind.fraction is None else 2.0 ** (kind.smallest - kind.fraction)
        grid = kind.rounded(torch.arange(1, int(kind.largest / step) + 1) * step).unique().double()
    grid = grid[grid.isfinite()].to(x.device)
    return torch.searchsorted(grid, ((1 + 1e-6) * size.double() / scale)[:, 0].contiguous(), right=True)


def exact_product(X: Tensor, W: Tensor) -> Tensor:
    """X W^T (n, m) of whole numbers up to 127, X (n, k) and W (m, k) float32, without a rounding error."""
    # A partial sum over any columns S is at most |x_S| |w_S| <= |x| |w| (Cauchy-Schwarz): where the longest
    # row of X times the longest of W stays below 2^24, every partial sum is a whole number that float32
    # holds, in whatever order it is added up. Otherwise the columns are added up in parts in float64.
    few = X.shape[-1] <= EXACT_SUMMANDS or not len(X)
    if few or X.norm(dim=-1).max() * W.norm(dim=-1).max() < 0.999 * 2**24:
        return X @ W.T
    parts = zip(X.split(EXACT_SUMMANDS, dim=-1), W.split(EXACT_SUMMANDS, dim=-1), strict=True)
    return sum((x @ w.T).double() for x, w in parts)
