"""Leading singular triplets by subspace iteration with a Chebyshev filter: the way of a GPU.

There a product with thirty columns costs what one with a single column does, and every look at a growing
Krylov basis costs more than many products. So a block of fixed width is filtered by a polynomial of M^T M
that is small on the unwanted part of the spectrum, and only then made orthonormal and looked at.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sdnb.linearize import Operator

_WIDTH = 32  # columns of the block
MOST_TRIPLETS = 16  # that the block leaves room to converge for
_TURNS = 40  # looks before the dense decomposition is cheaper
_LEAST, _MOST = 2, 40  # degree of the filter
_GROWTH = 1e4  # how far the filter may lift the largest value in it over the block's smallest
_RANK = 1e-6  # share of the largest value below which the block's smallest is rounding: rank below its width


def filtered_triplets(
    M: Tensor | Operator, k: int, limits: Tensor, seed: int
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return k leading triplets of a matrix, or None where they do not converge or its rank is below 32.

    Each turn is a Rayleigh-Ritz step in the block X, with the Gram matrix of M X in float64, and then
    X <- T_m(2 P M^T M P / a - 1) X, with a the square of the block's smallest value, T_m the Chebyshev
    polynomial of degree m, and P the projector off the triplets that have converged, which would drown the
    others.

    Args:
        M: matrix or operator, shape (d, d), with d at least 32.
        k: number of triplets, at most 17.
        limits: relative residual that each must reach, or what rounding leaves of it, shape (k,).
        seed: of the starting block, drawn on the CPU.

    Returns:
        U, S, V of the k triplets, shapes (d, k), (k,), (d, k).
    """
    start = torch.randn(M.shape[0], _WIDTH, generator=torch.Generator().manual_seed(seed))
    X = torch.linalg.qr(start.to(M.device, M.dtype)).Q
    for _ in range(_TURNS):
        X, U, S = _ritz(M, X)
        if not S[-1] > _RANK * S[0]:
            return None
        back = M.T @ U
        residual = ((back - X * S).norm(dim=0) / S)[:k]
        good = residual <= torch.maximum(limits, 8 * torch.finfo(S.dtype).eps * S[0] / S[:k])
        if good.all():
            return U[:, :k], S[:k], X[:, :k]
        taken = int(good.long().cumprod(0).sum())  # a later one may be overtaken yet
        V, squares = X[:, :taken], S.square()
        m = _degree((squares[taken] / squares[-1]).item())
        Z = _filtered(M, X[:, taken:], back[:, taken:] * S[taken:], V, squares[-1], m)
        X = torch.linalg.qr(torch.cat([V, Z], dim=1)).Q
    return None


def _ritz(M: Tensor | Operator, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block turned to M's right singular vectors in it, the left ones, and the values, falling."""
    MX = M @ X
    wide = MX.double()
    turn = torch.linalg.eigh(wide.T @ wide)[1].flip(1).to(X)
    U, R = torch.linalg.qr(
        MX @ turn
    )  # orthogonal columns: R is diagonal, but for rounding beside large values
    sizes = R.diagonal()
    return X @ turn, U * torch.where(sizes < 0, -1.0, 1.0), sizes.abs()


def _degree(largest: float) -> int:
    """Return the degree at which T_m(2 largest - 1), the lift of a value over those below 1, is _GROWTH."""
    rate = math.acosh(max(2 * largest - 1, 1 + 1e-9))
    return min(_MOST, max(_LEAST, int(math.log(2 * _GROWTH) / rate)))


def _filtered(M: Tensor | Operator, X: Tensor, first: Tensor, V: Tensor, a: Tensor, m: int) -> Tensor:
    """Return T_m(2 P M^T M P / a - 1) X, given M^T M X and the columns V that P takes out."""
    before, now = X, (2 / a) * _off(V, first) - X
    for _ in range(m - 1):
        before, now = now, torch.sub((4 / a) * _off(V, M.T @ (M @ now)) - before, now, alpha=2)
    return now


def _off(V: Tensor, X: Tensor) -> Tensor:
    """Return X without its part in the span of V's orthonormal columns."""
    return X - V @ (V.T @ X) if V.shape[1] else X
