"""Leading singular triplets by subspace iteration with a Chebyshev filter: the way of a GPU.

There a product with thirty columns costs what one with a single column does, and every look at a growing
Krylov basis costs more than many products. So a block of fixed width is filtered by a polynomial of M^T M
that is small on the unwanted part of the spectrum, and only then made orthonormal and looked at.
"""

import math

import torch
from torch import Tensor

MOST_TRIPLETS = 16  # half of the block: the others need room to converge
_WIDTH = 32  # columns of the block; a batch of eigenproblems is fast up to this size
_TURNS = 40  # looks before the dense decomposition is cheaper
_LOWEST, _HIGHEST = 2, 40  # degree of the filter
_LIFT = 1e4  # how far the filter may lift the largest value in it over the block's smallest
_RANK = 1e-6  # share of the largest value below which the block's smallest is rounding: rank below its width


def filtered_triplets(M: Tensor, k: int, limits: Tensor, seed: int) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return k leading triplets of matrices, or None where they do not converge or a rank is below 32.

    Each turn is a Rayleigh-Ritz step in the block X, with the Gram matrix of M X in float64, and then
    X <- T_m(2 P M^T M P / a - 1) X, with a the square of the block's smallest value, T_m the Chebyshev
    polynomial of degree m, and P the projector off the triplets that have converged, which would drown the
    others. Of several matrices each has its own a and P, and all have the smallest of their degrees.

    Args:
        M: matrix or matrices, shape (..., d, d), with d at least 32.
        k: number of triplets, at most MOST_TRIPLETS.
        limits: relative residual that each must reach, or what rounding leaves of it, shape (k,).
        seed: of the starting block, drawn on the CPU.

    Returns:
        U, S, V of the k triplets, shapes (..., d, k), (..., k), (..., d, k).

    Source: Chebyshev-filtered subspace iteration, Zhou, Saad, Tiago and Chelikowsky, J. Comput. Phys. 219
    (2006), here for M^T M.
    """
    start = torch.randn(M.shape[-1], _WIDTH, generator=torch.Generator().manual_seed(seed))
    X = torch.linalg.qr(start.to(M.device, M.dtype)).Q.expand(*M.shape[:-2], -1, -1)
    columns = torch.arange(_WIDTH, device=M.device)
    for turn in range(_TURNS):
        X, U, S = _turned(M, X)
        if not (S[..., -1] > _RANK * S[..., 0]).all():
            return None
        back = M.mT @ U
        residual = (back - X * S[..., None, :]).norm(dim=-2) / S
        rounding = 8 * torch.finfo(S.dtype).eps * S[..., :1] / S
        good = (residual <= rounding.clamp(min=_padded(limits)))[..., :k]
        if turn and good.all():  # a random block says nothing yet
            return U[..., :k], S[..., :k], X[..., :k]
        taken = good.long().cumprod(-1).sum(-1, keepdim=True)  # a later one may be overtaken yet
        kept, squares = (columns < taken)[..., None, :], S.square()
        a = squares[..., -1:]
        m = _degree((squares.gather(-1, taken) / a).max().item())
        Z = _filtered(M, X, back * S[..., None, :], (X * kept)[..., :k], a[..., None], m)
        X = _orthonormal(torch.where(kept, X, Z))[0]
    return None


def _padded(limits: Tensor) -> Tensor:
    """Return the limits of the first columns of the block, and no limit for the others."""
    return torch.nn.functional.pad(limits, (0, _WIDTH - len(limits)), value=torch.inf)


def _turned(M: Tensor, X: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the block turned to M's right singular vectors in it, the left ones, and the values, falling."""
    MX = M @ X
    wide = MX.double()
    turn = torch.linalg.eigh(wide.mT @ wide)[1].flip(-1).to(X)
    U, S = _orthonormal(MX @ turn)  # orthogonal, but for rounding beside large values
    return X @ turn, U, S


def _orthonormal(X: Tensor) -> tuple[Tensor, Tensor]:
    """Return Q of X = Q R and the diagonal of R, positive; by Cholesky of the Gram matrix, twice."""
    sizes, Q = 1.0, X
    for _ in range(2):
        wide = Q.double()
        R, failed = torch.linalg.cholesky_ex(wide.mT @ wide, upper=True)
        if failed.any():  # numerically dependent columns
            Q, R = torch.linalg.qr(X)
            sizes = R.diagonal(dim1=-2, dim2=-1)
            return torch.where(sizes[..., None, :] < 0, -Q, Q), sizes.abs()
        R = R.to(X)
        Q = torch.linalg.solve_triangular(R, Q, upper=True, left=False)
        sizes = sizes * R.diagonal(dim1=-2, dim2=-1)
    return Q, sizes


def _degree(largest: float) -> int:
    """Return the degree at which T_m(2 largest - 1), the lift of a value over those below 1, is _LIFT."""
    rate = math.acosh(max(2 * largest - 1, 1 + 1e-9))
    return min(_HIGHEST, max(_LOWEST, int(math.log(2 * _LIFT) / rate)))


def _filtered(M: Tensor, X: Tensor, first: Tensor, V: Tensor, a: Tensor, m: int) -> Tensor:
    """Return T_m(2 P M^T M P / a - 1) X, given M^T M X and the orthonormal columns V that P takes out."""
    before, now = X, (2 / a) * _off(V, first) - X
    for _ in range(m - 1):
        before, now = now, torch.sub((4 / a) * _off(V, M.mT @ (M @ now)) - before, now, alpha=2)
    return now


def _off(V: Tensor, X: Tensor) -> Tensor:
    """Return X without its part in the span of V's columns, which are orthonormal or zero."""
    return X - V @ (V.mT @ X)
