"""The leading singular triplets of a matrix, by block Krylov iteration on its products."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sdnb.decompose.krylov import extend, times
from sdnb.errors import ParameterError

if TYPE_CHECKING:
    from sdnb.linearize import Operator

_SPARE = 1  # columns of the block beyond the k wanted, so that values that coincide are all found
_WIDE = 16  # columns of the block at least on a GPU, where a product costs the same for one and for several
_FEW = 256  # up to this size the dense decomposition is faster
_SHARE = 4  # the basis may grow to d / 4 columns before the dense decomposition is cheaper
_LEAST = 96  # but not to fewer than this
_LOOSE = 0.05  # residual of the triplet after the k-th, of which only the value is used, for the gap


@dataclass(frozen=True)
class Triplets:
    """The k leading singular triplets, M V = U diag(S), largest first.

    Args:
        U: left singular vectors as columns, shape (d, k).
        S: singular values, shape (k,).
        V: right singular vectors as columns, shape (d, k).
        residual: larger of |M v - s u| and |M^T u - s v| over s, shape (k,); 0 where s is 0.
        gap: distance of s to the nearest other singular value over s, shape (k,); a direction without a gap
            means nothing. 0 where s is 0.
        method: "krylov", or "dense" where the size or a small gap asked for the full decomposition.
    """

    U: Tensor
    S: Tensor
    V: Tensor
    residual: Tensor
    gap: Tensor
    method: str


def leading_triplets(M: Tensor | Operator, k: int = 2, *, seed: int = 0, tol: float = 1e-5) -> Triplets:
    """Return the k leading singular triplets of a matrix.

    Block Krylov: an orthonormal basis Q of span{X, M^T M X, (M^T M)^2 X, ...}, fully reorthogonalised, from a
    seeded random block X; the triplets are those of M Q. It stops when every residual is below tol (or below
    what rounding leaves of it, 8 eps s_1 / s_i), and turns to the dense decomposition when the basis has
    grown past d / 4 columns: then the gap is too small to be worth it. On a GPU a value below 1e-8 s_1
    counts as 0.

    Signs: in every u the entry largest in absolute value (the first of equals) is positive.

    Args:
        M: matrix, shape (d, d), or an operator with its products; float64 stays, all else becomes float32.
        k: number of triplets, 1..d.
        seed: of the starting block, drawn on the CPU: the same on every device.
        tol: relative residual to reach.

    Returns:
        the triplets, on the device of M.

    Raises:
        ParameterError: if M is not square, k is out of range, or M holds NaN or infinity.

    Source: paper A (arXiv 2502.07004), layer-wise singular direction: the first column of U for L = I + R.
    """
    d = M.shape[0]
    if len(M.shape) != 2 or M.shape[1] != d or not 1 <= k <= d:
        raise ParameterError(
            f"leading_triplets needs a square matrix and 1 <= k <= {d}, not {tuple(M.shape)}, k={k}"
        )
    if isinstance(M, Tensor):
        M = M.detach().to(torch.promote_types(M.dtype, torch.float32))
    found = _krylov(M, k, seed, tol) if d > _FEW else None
    U, S, V, method = (*found, "krylov") if found else (*_dense(M, min(k + 1, d)), "dense")
    flip = torch.where(U.gather(0, U[:, :k].abs().argmax(0)[None])[0] < 0, -1.0, 1.0).to(S)
    U, V = U[:, :k] * flip, V[:, :k] * flip
    return Triplets(U, S[:k], V, _residual(M, U, S[:k], V), _gap(S, k), method)


def _krylov(M: Tensor | Operator, k: int, seed: int, tol: float) -> tuple[Tensor, Tensor, Tensor] | None:
    """Return U, S, V of k + 1 leading triplets, or None if the basis outgrew its budget."""
    d, block = M.shape[0], k + _SPARE
    more = 1.25  # how far the basis grows between two looks at it, which cost more on a GPU than products
    if M.device.type != "cpu":
        block, more = max(block, _WIDE), 2.0
    start = torch.randn(d, block, generator=torch.Generator().manual_seed(seed))
    Q = torch.linalg.qr(start.to(M.device, M.dtype)).Q
    MQ = times(M, Q)
    check_at, budget = 3 * block, max(_LEAST, d // _SHARE)
    while Q.shape[1] + block <= budget:
        Q = extend(Q, times(M.T, MQ[:, -block:]))
        MQ = torch.cat([MQ, times(M, Q[:, -block:])], dim=1)
        if Q.shape[1] >= check_at or Q.shape[1] + block > budget:
            U, S, V = _ritz(Q, MQ, k + 1)
            limit = (8 * torch.finfo(S.dtype).eps * S[0] / S).clamp(min=tol).nan_to_num()
            limit[k:] = limit[k:].clamp(min=_LOOSE)
            if (_residual(M, U, S, V) <= limit).all():
                return U, S, V
            check_at = int(more * Q.shape[1])
    return None


def _ritz(Q: Tensor, MQ: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V of the k leading triplets of M within the span of Q, shapes (d, k), (k,), (d, k)."""
    U, S, V = _decomposed(MQ, k)
    return U, S, Q @ V


def _dense(M: Tensor | Operator, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V of the k leading triplets from the full decomposition."""
    return _decomposed(M if isinstance(M, Tensor) else M.dense(), k)


def _decomposed(M: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return U, S, V of the k leading triplets of a tall or square matrix, shapes (d, k), (k,), (n, k)."""
    if not torch.isfinite(M).all():
        raise ParameterError("the matrix holds NaN or infinity: are the weights sound?")
    if M.device.type == "cpu":
        left, R = torch.linalg.qr(M)
        inner, S, VT = torch.linalg.svd(R)
        return left @ inner[:, :k], S[:k], VT[:k].T
    # A GPU's float32 decomposition is off by 3e-4 of a value (benchmarks/spectra.py). The eigenvectors of the
    # Gram matrix in float64 are exact for float32 weights, and faster.
    wide = M.double()
    V = torch.linalg.eigh(wide.T @ wide)[1].flip(1)[:, :k]
    U, R = torch.linalg.qr(wide @ V)  # the columns are orthogonal: R is diagonal
    sizes = R.diagonal()
    return (U * torch.where(sizes < 0, -1.0, 1.0)).to(M), sizes.abs().to(M), V.to(M)


def _residual(M: Tensor | Operator, U: Tensor, S: Tensor, V: Tensor) -> Tensor:
    """Return the relative residual of each triplet, shape (k,)."""
    error = torch.maximum((times(M, V) - U * S).norm(dim=0), (times(M.T, U) - V * S).norm(dim=0))
    return torch.where(S > 0, error / S, 0.0)


def _gap(S: Tensor, k: int) -> Tensor:
    """Return the distance of each of k values to its nearest other value, relative to it, shape (k,)."""
    below = S[:k] - torch.cat([S[1:], S.new_zeros(1)])[:k] if len(S) == k else S[:k] - S[1 : k + 1]
    above = torch.cat([S.new_full((1,), torch.inf), S[: k - 1] - S[1:k]])
    return torch.where(S[:k] > 0, torch.minimum(below, above) / S[:k], 0.0)
