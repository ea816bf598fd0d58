"""Orthonormal bases that grow: the one building block of both iterative decompositions."""

import torch
from torch import Tensor


def extend(Q: Tensor, X: Tensor) -> Tensor:
    """Return the orthonormal basis Q with the columns of X taken in.

    Twice is enough for Gram-Schmidt, unless a column vanishes on the way because it lies in the span: what is
    left of it is rounding noise, and later rounds make that into a fresh direction orthogonal to the rest.

    Args:
        Q: orthonormal columns, shape (d, m).
        X: columns, shape (d, b), with m + b <= d.

    Returns:
        the basis, shape (d, m + b).
    """
    for turn in range(5):
        X, R = torch.linalg.qr(X - times(Q, times(Q.T, X)))
        if turn and R.diagonal().abs().min() > 0.5:
            break
    return torch.cat([Q, X], dim=1)


def times(M: Tensor, X: Tensor) -> Tensor:
    """Return M X, on a CPU column by column: there a few columns at once can be many times slower.

    Args:
        M: matrix or operator, shape (n, d).
        X: columns, shape (d, b).

    Returns:
        the products, shape (n, b).
    """
    if M.device.type != "cpu":
        return M @ X
    return torch.cat([M @ X[:, i : i + 1].contiguous() for i in range(X.shape[1])], dim=1)
