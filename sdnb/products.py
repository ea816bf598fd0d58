"""Products of large float32 matrices, on the tensor cores of a GPU where these are many times faster.

Tensor cores multiply bfloat16 numbers and add up in float32. A float32 number is the sum of three bfloat16
numbers (of one, where the weights were stored so), and a product of such sums is a few products: Henry, Tang
and Heinecke (arXiv 1904.06376).
"""

import torch
from torch import Tensor

_PIECES = 3  # times 8 bits: all 24 of float32
# Terms that are added up inside: tensor cores cut off where others round, a bias that grows with the number
# (Ootomo and Yokota, arXiv 2203.03341). tests/test_products.py holds what is left to float32's own rounding.
_INNER = 512
_LEAST = 1024  # rows and columns below which there is nothing to win
# A100, H100 and B200, whose tensor cores are many times as fast as float32; elsewhere it was not measured
_FAST = ((8, 0), (9, 0), (10, 0))


def add_product_(M: Tensor, X: Tensor, Y: Tensor, weights: bool = False) -> Tensor:
    """Add X Y to M in place; `weights`: see whether X was stored in bfloat16, which waits for a GPU."""
    if not _pays(X, Y):
        return M.addmm_(X, Y)
    left, right = _pieces(X, weights), _pieces(Y)
    # what is left out, i + j > 2, is at most 2^-24 of |X| |Y|
    pairs = [(i, j) for i in range(len(left)) for j in range(len(right)) if i + j < _PIECES]
    for i, j in sorted(pairs, key=sum, reverse=True):  # small numbers first
        at_once = X.shape[1] if i + j else _INNER  # the bias of small products is small
        for x, y in zip(left[i].split(at_once, dim=1), right[j].split(at_once), strict=True):
            M += _multiplied(x, y)
    return M


def _pays(X: Tensor, Y: Tensor) -> bool:
    """Whether tensor cores are there and faster, and no derivative is wanted, which they do not have."""
    if not X.is_cuda or torch.version.cuda is None or not X.dtype == Y.dtype == torch.float32:
        return False
    if torch.is_grad_enabled() and (X.requires_grad or Y.requires_grad):
        return False
    return min(*X.shape, Y.shape[1]) >= _LEAST and torch.cuda.get_device_capability(X.device) in _FAST


def _pieces(X: Tensor, look: bool = False) -> list[Tensor]:
    """Return bfloat16 tensors whose sum is X, large to small: three, or one where `look` finds that exact."""
    pieces, rest = [], X
    for _ in range(_PIECES):
        pieces.append(rest.bfloat16())
        rest = rest - pieces[-1]
        if look and not rest.any():
            break
        look = False
    return pieces


def _multiplied(x: Tensor, y: Tensor) -> Tensor:
    """Return x y in float32 of bfloat16 matrices on a GPU."""
    return torch.mm(x, y, out_dtype=torch.float32)
